"""Write of a matrix memory with scalar decay, chunk-parallel, and the online answers of the segment being written.

    S_t = a_t S_{t-1} + k_t v_t^T          o_t = S_t^T q_t          (eq. 12; with a_t: retention, gated linear, SWLA)

Layout: `[R, N, W, H, d]`, R rows of N grid segments of W slots; a slot without a token has k = v = 0 and log a = 0.
Derivation of the chunk form and of the backward: docs/design.md.
"""

import torch

from .common import compute_dtype, register_op


CHUNK = 64  # slots per sub-chunk: the score matrix of a sub-chunk is CHUNK x CHUNK


def _decay_matrix(log_decay: torch.Tensor) -> torch.Tensor:
    """`D[t, i] = prod_{i < j <= t} a_j` for i <= t, else 0, from log a `[..., C]`.

    A masked cumulative sum of logs and never a difference of two sums, so that a decay of exactly 0 is allowed.
    """
    size = log_decay.shape[-1]
    mask = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    terms = log_decay[..., :, None].expand(*log_decay.shape, size).masked_fill(~mask.tril(-1), 0.0)
    return terms.cumsum(-2).exp().masked_fill(~mask.tril(), 0.0)


def _decay_matrix_backward(grad: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Gradient `[..., C]` of log a from that of `_decay_matrix`, whose entry (t, i) holds log a_j for i < j <= t."""
    weighted = (grad * decay).tril(-1)
    from_t_on = weighted.flip(-2).cumsum(-2).flip(-2)  # sum over t >= j
    return from_t_on.tril(-1).sum(-1)


class _Chunks:
    """The same tensors cut into sub-chunks: `[R, H, M, C, d]`, with M = N * (W padded to a multiple of C) / C."""

    def __init__(self, width: int, num_segments: int) -> None:
        self.num_segments, self.width = num_segments, width
        self.size = min(CHUNK, width)
        self.per_segment = -(-width // self.size)
        self.padding = self.per_segment * self.size - width

    def cut(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.to(dtype).movedim(3, 1)  # [R, H, N, W, ...]
        if self.padding:
            x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 4) + (0, self.padding))
        return x.reshape(*x.shape[:2], self.num_segments * self.per_segment, self.size, *x.shape[4:])

    def join(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.reshape(*x.shape[:2], self.num_segments, self.per_segment * self.size, *x.shape[4:])
        return x[:, :, :, : self.width].movedim(1, 3).to(dtype).contiguous()

    def segments(self) -> list[range]:
        return [range(n * self.per_segment, (n + 1) * self.per_segment) for n in range(self.num_segments)]


def _start_states(chunks, update, total_decay, initial, starts, carry):
    """State before every sub-chunk, stacked `[R, H, M, dk, dv]`, and after every segment `[R, N, H, dk, dv]`."""
    state = torch.zeros_like(update[:, :, 0]) if initial is None else initial.to(update.dtype)
    before, ends = [], []
    for n, segment in enumerate(chunks.segments()):
        if n and not carry:
            state = torch.zeros_like(state)
        elif starts is not None:
            state = state.masked_fill(starts[:, n, None, None, None], 0.0)
        for m in segment:
            before.append(state)
            state = (state if total_decay is None else total_decay[:, :, m, None, None] * state) + update[:, :, m]
        ends.append(state)
    return torch.stack(before, 2), torch.stack(ends, 1)


def linear_write_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial: torch.Tensor | None,
    starts: torch.Tensor | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `linear_write`."""
    dtype, chunks = compute_dtype(q), _Chunks(q.shape[2], q.shape[1])
    qc, kc, vc = (chunks.cut(x, dtype) for x in (q, k, v))
    scores = qc @ kc.transpose(-1, -2)
    if log_decay is None:
        before, ends = _start_states(chunks, kc.transpose(-1, -2) @ vc, None, initial, starts, carry)
        out = scores.tril() @ vc + qc @ before
    else:
        log = chunks.cut(log_decay, dtype)
        decay, from_start = _decay_matrix(log), log.cumsum(-1).exp()
        update = (kc * decay[..., -1, :, None]).transpose(-1, -2) @ vc
        before, ends = _start_states(chunks, update, from_start[..., -1], initial, starts, carry)
        out = (scores * decay) @ vc + from_start[..., None] * (qc @ before)
    return chunks.join(out, q.dtype), ends


def linear_write_backward_torch(
    grad_out: torch.Tensor,
    grad_ends: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial: torch.Tensor | None,
    starts: torch.Tensor | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, log_decay and initial (empty tensors where the input is None). States are recomputed."""
    dtype, chunks = compute_dtype(q), _Chunks(q.shape[2], q.shape[1])
    qc, kc, vc, go = (chunks.cut(x, dtype) for x in (q, k, v, grad_out))
    if log_decay is None:
        mask = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril()
        decay, to_end, from_start, total = mask.to(dtype), None, None, None
    else:
        log = chunks.cut(log_decay, dtype)
        decay, from_start = _decay_matrix(log), log.cumsum(-1).exp()
        to_end, total = decay[..., -1, :, None], from_start[..., -1]
    weighted_k = kc if to_end is None else kc * to_end
    weighted_q = qc if from_start is None else qc * from_start[..., None]
    before, _ = _start_states(chunks, weighted_k.transpose(-1, -2) @ vc, total, initial, starts, carry)

    # reverse scan: gradient of the state after every sub-chunk
    read = weighted_q.transpose(-1, -2) @ go
    grad_after: list[torch.Tensor] = [read] * (chunks.num_segments * chunks.per_segment)
    grad = torch.zeros_like(read[:, :, 0])
    for n, segment in reversed(list(enumerate(chunks.segments()))):
        grad = grad + grad_ends[:, n].to(dtype)
        for m in reversed(segment):
            grad_after[m] = grad
            grad = (grad if total is None else total[:, :, m, None, None] * grad) + read[:, :, m]
        if starts is not None:
            grad = grad.masked_fill(starts[:, n, None, None, None], 0.0)
        if n and not carry:
            grad = torch.zeros_like(grad)
    grad_initial = q.new_empty(0) if initial is None else grad.to(initial.dtype)
    after = torch.stack(grad_after, 2)

    scores = qc @ kc.transpose(-1, -2)
    products = go @ vc.transpose(-1, -2)
    grad_scores = products * decay
    grad_weighted_k = vc @ after.transpose(-1, -2)
    grad_weighted_q = go @ before.transpose(-1, -2)
    grad_q = grad_scores @ kc + (grad_weighted_q if from_start is None else grad_weighted_q * from_start[..., None])
    grad_k = grad_scores.transpose(-1, -2) @ qc + (grad_weighted_k if to_end is None else grad_weighted_k * to_end)
    grad_v = (scores * decay).transpose(-1, -2) @ go + weighted_k @ after
    grad_log = q.new_empty(0)
    if log_decay is not None:
        grad_decay = products * scores
        grad_decay[..., -1, :] += (grad_weighted_k * kc).sum(-1)
        grad_from_start = (grad_weighted_q * qc).sum(-1)
        grad_from_start[..., -1] += (after * before).sum((-1, -2))
        grad_log = _decay_matrix_backward(grad_decay, decay)
        grad_log = grad_log + (grad_from_start * from_start).flip(-1).cumsum(-1).flip(-1)
        grad_log = chunks.join(grad_log, log_decay.dtype)
    return (
        *(chunks.join(g, x.dtype) for g, x in ((grad_q, q), (grad_k, k), (grad_v, v))),
        grad_log,
        grad_initial.contiguous(),
    )


def _fake(q, k, v, log_decay, initial, starts, carry):
    rows, segments, _, heads, key_dim = q.shape
    ends = q.new_empty(rows, segments, heads, key_dim, v.shape[-1], dtype=compute_dtype(q))
    return torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format), ends


def _fake_backward(grad_out, grad_ends, q, k, v, log_decay, initial, starts, carry):
    return tuple(q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
                 for x in (q, k, v, log_decay, initial))


linear_write_op = register_op(
    "linear_write", linear_write_torch, linear_write_backward_torch, _fake, _fake_backward, differentiable=5
)


def linear_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    initial: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    carry: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write every segment of the grid and answer every slot from the memory that holds the tokens up to it.

    Args:
        q, k: `[R, N, W, H, dk]`, any float dtype. v: `[R, N, W, H, dv]`. A slot without a token has k = v = 0.
        log_decay: `[R, N, W, H]`, log a_t <= 0 (0 in empty slots), or None for a_t = 1.
        initial: `[R, H, dk, dv]`, the state before the first segment of each row; None is zero.
        starts: `[R, N]` bool, segments that start from zero although `carry` is set (borders of packed documents).
        carry: a segment starts from the last state of the one before it (checkpoint), else from zero.

    Returns:
        answers `[R, N, W, H, dv]` in the dtype of q, and the state after every segment `[R, N, H, dk, dv]` in fp32
        (float64 for float64 input). Both are differentiable with respect to q, k, v, log_decay and initial.
    """
    return linear_write_op(q, k, v, log_decay, initial, starts, carry)
