"""Write of a matrix memory whose state is multiplied by a diagonal plus a rank-one matrix, and the online answers.

    S_t = diag(w_t) S_{t-1} + b_t (S_{t-1}^T c_t)^T + k_t v_t^T          o_t = S_t^T q_t

Every channel of the keys has a decay w_t of its own; the probe c_t asks the state before the token, and its answer is
put at b_t. RWKV-7 has c = k^ and b = -a k^ (arXiv 2503.14456), gated linear attention with decays per channel b = 0.

Inside a sub-chunk with start state S, let G_t be the sum of log w_j, j <= t, per channel, and

    q^_t = q_t exp(G_t),   c^_t = c_t exp(G_{t-1}),   x = rows b_i exp(-G_i), then rows k_i exp(-G_i)

With p_t the answer to the probe and z = rows p_i, then rows v_i (tril masks both halves alike):

    p = c^ S + tril_{<}(c^ x^T) z          o = q^ S + tril(q^ x^T) z          S' = exp(G_last) (S + x^T z)

The first is a unit lower triangular system in p. exp(-G) grows; decays are bounded from below by `floor`, and a
sub-chunk has so few slots that it stays below exp(RANGE). Nothing else is lost: a channel's terms all scale alike.

Layout: `[R, N, W, H, d]`; a slot without a token has k = v = b = c = 0 and log w = 0.
"""

import torch

from ..shared.ops import compute_dtype, register_op, running_sum
from .chunks import CHUNK, Chunks


RANGE = 20.0  # exp(20) = 5e8, far from the 3e38 of fp32; RWKV-7, whose decays are above 0.545, gets 32 slots
LOWEST = -80.0  # as a floor: of a single slot exp(80) is still an fp32


class _Diagonal:
    """The system of every sub-chunk, its solution and the states."""

    def __init__(self, q, k, v, log_decay, probe, place, initial, starts, carry, floor) -> None:
        dtype = compute_dtype(q)
        self.chunks = chunks = Chunks(q, starts, carry, max(1, int(min(CHUNK, RANGE / -floor))))
        k, v, log_decay, place = (chunks.cut(part, dtype) for part in (k, v, log_decay, place))
        total = running_sum(log_decay, -2)
        self.late, self.early, self.back = total.exp(), (total - log_decay).exp(), total.neg().exp()
        self.q, self.c = chunks.cut(q, dtype) * self.late, chunks.cut(probe, dtype) * self.early
        self.x = torch.cat([place * self.back, k * self.back], -2)
        self.upto = q.new_ones(chunks.size, chunks.size, dtype=dtype).tril().repeat(1, 2)
        self.before_t = self.upto - torch.eye(chunks.size, device=q.device, dtype=dtype).repeat(1, 2)
        system, of_v = (self.c @ self.x.transpose(-1, -2) * self.before_t).split(chunks.size, -1)
        self.system, self.of_v, self.last = -system, of_v, self.late[..., -1, :, None]
        # p = free + per_state @ (state before the sub-chunk)
        free, self.per_state = self.solve(torch.cat([of_v @ v, self.c], -1)).split([v.shape[-1], k.shape[-1]], -1)
        self.place, written = self.x[..., : chunks.size, :], self.x[..., chunks.size :, :].transpose(-1, -2) @ v

        def advance(m: slice, state: torch.Tensor) -> torch.Tensor:
            answers = free[:, :, m] + self.per_state[:, :, m] @ state
            return self.last[:, :, m] * (state + written[:, :, m] + self.place[:, :, m].transpose(-1, -2) @ answers)

        self.before, self.ends = chunks.scan(advance, initial, k, v)
        self.z = torch.cat([free + self.per_state @ self.before, v], -2)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)

    def solve_transposed(self, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.system.transpose(-1, -2), right, upper=True, unitriangular=True)

    def scores(self) -> torch.Tensor:
        """`[..., C, 2 C]`, how much a token's answer holds of every row of z."""
        return (self.q @ self.x.transpose(-1, -2)).mul_(self.upto)


def diagonal_write_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    probe: torch.Tensor,
    place: torch.Tensor,
    initial: torch.Tensor | None,
    starts: torch.Tensor | None,
    carry: bool,
    floor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `diagonal_write`."""
    d = _Diagonal(q, k, v, log_decay, probe, place, initial, starts, carry, floor)
    return d.chunks.join(d.scores() @ d.z + d.q @ d.before, q.dtype), d.ends


def diagonal_write_backward_torch(
    grad_out: torch.Tensor,
    grad_ends: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    probe: torch.Tensor,
    place: torch.Tensor,
    initial: torch.Tensor | None,
    starts: torch.Tensor | None,
    carry: bool,
    floor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, log_decay, probe, place and initial (empty where it is None). States are recomputed."""
    d = _Diagonal(q, k, v, log_decay, probe, place, initial, starts, carry, floor)
    size, go = d.chunks.size, d.chunks.cut(grad_out, d.q.dtype)
    read = d.q.transpose(-1, -2) @ go
    answered = d.scores().transpose(-1, -2) @ go  # gradient of z by the answers

    def retreat(m: slice, grad: torch.Tensor) -> torch.Tensor:
        grad = d.last[:, :, m] * grad
        grad_p = answered[:, :, m, :size] + d.place[:, :, m] @ grad
        return grad + read[:, :, m] + d.per_state[:, :, m].transpose(-1, -2) @ grad_p

    after, grad_initial = d.chunks.scan_backward(retreat, grad_ends, d.q.dtype)
    grad_sum = d.last * after  # of S + x^T z
    grad_z = answered + d.x @ grad_sum
    grad_right = d.solve_transposed(grad_z[..., :size, :])  # of c^ S and of everything else that p is made of
    of_answers, of_probes = (go @ d.z.transpose(-1, -2)) * d.upto, (grad_right @ d.z.transpose(-1, -2)) * d.before_t
    grad_q = of_answers @ d.x + go @ d.before.transpose(-1, -2)
    grad_c = of_probes @ d.x + grad_right @ d.before.transpose(-1, -2)
    grad_x = of_answers.transpose(-1, -2) @ d.q + of_probes.transpose(-1, -2) @ d.c
    grad_x = grad_x + d.z @ grad_sum.transpose(-1, -2)
    # G_t stands in q^_t, in both rows x_t and in c^_{t+1}, the last one in S' too
    by_c, by_x = d.c * grad_c, (d.x * grad_x).unflatten(-2, (2, size)).sum(-3)
    grad_total = d.q * grad_q + by_c - by_x
    grad_total[..., -1, :] += (grad_sum * (d.before + d.x.transpose(-1, -2) @ d.z)).sum(-1)
    grad_decay = running_sum(grad_total.flip(-2), -2).flip(-2) - by_c
    grad_place, grad_k = (part * d.back for part in grad_x.split(size, -2))
    grad_v = grad_z[..., size:, :] + d.of_v.transpose(-1, -2) @ grad_right
    grads = ((grad_q * d.late, q), (grad_k, k), (grad_v, v), (grad_decay, log_decay))
    return (
        *(d.chunks.join(grad, x.dtype) for grad, x in (*grads, (grad_c * d.early, probe), (grad_place, place))),
        q.new_empty(0) if initial is None else grad_initial.to(initial.dtype).contiguous(),
    )


def _fake(q, k, v, log_decay, probe, place, initial, starts, carry, floor):
    rows, segments, _, heads, key_dim = q.shape
    ends = q.new_empty(rows, segments, heads, key_dim, v.shape[-1], dtype=compute_dtype(q))
    return torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format), ends


def _fake_backward(grad_out, grad_ends, q, k, v, log_decay, probe, place, initial, starts, carry, floor):
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, probe, place, initial)
    )


diagonal_write_op = register_op(
    "diagonal_write", diagonal_write_torch, diagonal_write_backward_torch, _fake, _fake_backward, differentiable=7
)


def diagonal_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    probe: torch.Tensor,
    place: torch.Tensor,
    floor: float,
    initial: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    carry: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write every segment of the grid by the rule above and answer every slot from the memory that holds it.

    Args:
        q, k: `[R, N, W, H, dk]`, any float dtype. v: `[R, N, W, H, dv]`. A slot without a token has k = v = 0.
        log_decay: `[R, N, W, H, dk]`, log w_t, from `floor` to 0; 0 in slots without a token.
        probe, place: `[R, N, W, H, dk]`, c_t and b_t; 0 in slots without a token.
        floor: no log_decay is below it. The lower it is, the fewer slots a sub-chunk has.
        initial, starts, carry: as in `linear_write`.

    Returns:
        answers `[R, N, W, H, dv]` in the dtype of q, and the state after every segment `[R, N, H, dk, dv]` in fp32
        (float64 for float64 input). Differentiable with respect to q, k, v, log_decay, probe, place and initial.

    Raises:
        ValueError: the floor is not between LOWEST and 0.
    """
    if not LOWEST <= floor < 0:
        raise ValueError(f"diagonal_write: `floor`={floor} is not valid, allowed: from {LOWEST} to below 0")
    return diagonal_write_op(q, k, v, log_decay, probe, place, initial, starts, carry, floor)
