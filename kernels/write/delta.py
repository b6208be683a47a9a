"""Write of a matrix memory by the gated delta rule, chunk-parallel, and the online answers.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T          o_t = S_t^T q_t

The delta is taken against the decayed state (Gated DeltaNet, arXiv 2412.06464). With u_t the bracket times b_t, the
rule is the linear one, S_t = a_t S_{t-1} + k_t u_t^T, and inside a sub-chunk with start state S the u_t solve the
unit lower triangular system (WY form)

    u_t + b_t sum_{i<t} D_ti <k_t, k_i> u_i = b_t (v_t - A_t S^T k_t),        D, A: decay products.

Layout: `[R, N, W, H, d]`; a slot without a token has k = v = 0, b = 0 and log a = 0.
"""

import functools
import importlib.util
import logging

import torch

from ..shared.ops import NAMESPACE, compute_dtype, register_op
from .chunks import Chunks, Decay, answer_chunks, answer_chunks_backward


class _Delta:
    """The system of every sub-chunk, its solution and the states."""

    def __init__(self, q, k, v, log_decay, write, initial, starts, carry) -> None:
        dtype = compute_dtype(q)
        self.chunks = chunks = Chunks(q, starts, carry)
        self.q, self.k, self.v = (chunks.cut(x, dtype) for x in (q, k, v))
        self.strength = chunks.cut(write, dtype)[..., None]
        self.decay = decay = Decay(chunks.cut(log_decay, dtype), self.q)
        self.scores = self.k @ self.k.transpose(-1, -2)
        self.system = self.strength * (self.scores * decay.matrix).tril(-1)  # the unit diagonal is implied
        right = self.strength * torch.cat([self.v, decay.since_start(self.k)], -1)
        # u = free - per_state @ (state before the sub-chunk)
        free, self.per_state = self.solve(right).split([v.shape[-1], k.shape[-1]], -1)
        self.late_k = decay.to_end(self.k)

        def advance(m: slice, state: torch.Tensor) -> torch.Tensor:
            added = free[:, :, m] - self.per_state[:, :, m] @ state
            return decay.over(m, state) + self.late_k[:, :, m].transpose(-1, -2) @ added

        self.before, self.ends = chunks.scan(advance, initial, self.k, self.v)
        self.u = free - self.per_state @ self.before

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)

    def solve_transposed(self, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.system.transpose(-1, -2), right, upper=True, unitriangular=True)


def delta_write_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    write: torch.Tensor,
    initial: torch.Tensor | None,
    starts: torch.Tensor | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `delta_write`."""
    d = _Delta(q, k, v, log_decay, write, initial, starts, carry)
    return d.chunks.join(answer_chunks(d.q, d.k, d.u, d.decay, d.before), q.dtype), d.ends


def delta_write_backward_torch(
    grad_out: torch.Tensor,
    grad_ends: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    write: torch.Tensor,
    initial: torch.Tensor | None,
    starts: torch.Tensor | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, log_decay, write and initial (empty where the input is None). States are recomputed."""
    d = _Delta(q, k, v, log_decay, write, initial, starts, carry)
    go = d.chunks.cut(grad_out, d.q.dtype)
    read = d.decay.since_start(d.q).transpose(-1, -2) @ go
    answered = (d.q @ d.k.transpose(-1, -2) * d.decay.matrix).transpose(-1, -2) @ go  # gradient of u by the answers

    def retreat(m: slice, grad: torch.Tensor) -> torch.Tensor:
        grad_u = answered[:, :, m] + d.late_k[:, :, m] @ grad
        return d.decay.over(m, grad) + read[:, :, m] - d.per_state[:, :, m].transpose(-1, -2) @ grad_u

    after, grad_initial = d.chunks.scan_backward(retreat, grad_ends, d.q.dtype)
    grad_q, grad_k, grad_u, grad_matrix, grad_from_start = answer_chunks_backward(
        go, d.q, d.k, d.u, d.decay, d.before, after
    )
    # through the system: right = strength * (v - predicted), predicted = decay since the start * (k S)
    grad_right = d.solve_transposed(grad_u)
    grad_system = -(grad_right @ d.u.transpose(-1, -2)).tril(-1)
    known = d.k @ d.before
    grad_v = d.strength * grad_right
    grad_strength = (grad_right * (d.v - d.decay.since_start(known))).sum(-1)
    grad_from_start = grad_from_start - (grad_v * known).sum(-1)
    grad_k = grad_k - d.decay.since_start(grad_v) @ d.before.transpose(-1, -2)
    # system = strength * scores * decay, strictly below the diagonal
    grad_strength = grad_strength + (grad_system * d.scores * d.decay.matrix).sum(-1)
    grad_system = grad_system * d.strength
    grad_matrix = grad_matrix + grad_system * d.scores
    grad_scores = grad_system * d.decay.matrix
    grad_k = grad_k + (grad_scores + grad_scores.transpose(-1, -2)) @ d.k
    grads = (
        (grad_q, q),
        (grad_k, k),
        (grad_v, v),
        (d.decay.backward(grad_matrix, grad_from_start), log_decay),
        (grad_strength, write),
    )
    return (
        *(d.chunks.join(grad, x.dtype) for grad, x in grads),
        q.new_empty(0) if initial is None else grad_initial.to(initial.dtype).contiguous(),
    )


def _fake(q, k, v, log_decay, write, initial, starts, carry):
    rows, segments, _, heads, key_dim = q.shape
    ends = q.new_empty(rows, segments, heads, key_dim, v.shape[-1], dtype=compute_dtype(q))
    return torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format), ends


def _fake_backward(grad_out, grad_ends, q, k, v, log_decay, write, initial, starts, carry):
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, write, initial)
    )


delta_write_op = register_op(
    "delta_write", delta_write_torch, delta_write_backward_torch, _fake, _fake_backward, differentiable=6
)


def delta_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    write: torch.Tensor,
    initial: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    carry: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write every segment of the grid by the gated delta rule and answer every slot from the memory that holds it.

    Args:
        q, k: `[R, N, W, H, dk]`, any float dtype. v: `[R, N, W, H, dv]`. A slot without a token has k = v = 0.
        log_decay: `[R, N, W, H]`, log a_t <= 0. write: `[R, N, W, H]`, b_t. Both are 0 in slots without a token.
        initial, starts, carry: as in `linear_write`.

    Returns:
        answers `[R, N, W, H, dv]` in the dtype of q, and the state after every segment `[R, N, H, dk, dv]` in fp32
        (float64 for float64 input). Differentiable with respect to q, k, v, log_decay, write and initial.
    """
    return delta_write_op(q, k, v, log_decay, write, initial, starts, carry)


@functools.cache
def fla_rule():
    """The chunked rule of the package `fla` (fla-core >= 0.6), or None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    logging.getLogger(NAMESPACE).info("delta_write: kernels of the package `fla`")
    return chunk_gated_delta_rule


def fla_write(q, k, v, log_decay, write, initial=None, starts=None, carry=False):
    """`delta_write` in v's half precision on a GPU, by the kernels of the package `fla`.

    They return a state at the end of a sequence only: segments are the batch when they are independent, and follow
    one another when they are not.
    """
    rows, segments, _, heads, key_dim = q.shape
    parts = [q.to(v.dtype), k.to(v.dtype), v, log_decay, write]
    if initial is None:
        initial = q.new_zeros(rows, heads, key_dim, v.shape[-1], dtype=torch.float32)

    def run(parts: list[torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fla_rule()(*parts, scale=1.0, initial_state=state, output_final_state=True)

    if not carry:
        state = torch.cat([initial[:, None], initial.new_zeros(rows, segments - 1, *initial.shape[1:])], 1)
        out, ends = run([x.flatten(0, 1) for x in parts], state.flatten(0, 1))
        return out.unflatten(0, (rows, segments)).to(q.dtype), ends.unflatten(0, (rows, segments))
    out, ends, state = [], [], initial
    for n in range(segments):
        if starts is not None:
            state = state.masked_fill(starts[:, n, None, None, None], 0.0)
        answers, state = run([x[:, n] for x in parts], state)
        out.append(answers.to(q.dtype))
        ends.append(state)
    return torch.stack(out, 1), torch.stack(ends, 1)
