"""Write of a matrix memory with scalar decay, chunk-parallel, and the online answers of the segment being written.

    S_t = a_t S_{t-1} + k_t v_t^T          o_t = S_t^T q_t          (eq. 12; with a_t: retention, gated linear, SWLA)

Layout: `[R, N, W, H, d]`, R rows of N grid segments of W slots; a slot without a token has k = v = 0 and log a = 0.
"""

import torch

from ..shared.ops import choose_backend, compute_dtype, register_op
from .chunks import Chunks, Decay, answer_chunks, answer_chunks_backward


def _chunked(q, k, v, log_decay, initial, starts, carry):
    """Chunks, their q, k, v and decay, the states before them and after every segment."""
    dtype, chunks = compute_dtype(q), Chunks(q, starts, carry)
    qc, kc, vc = (chunks.cut(x, dtype) for x in (q, k, v))
    decay = Decay(None if log_decay is None else chunks.cut(log_decay, dtype), qc)
    update = decay.to_end(kc).transpose(-1, -2) @ vc
    before, ends = chunks.scan(lambda m, state: decay.over(m, state) + update[:, :, m], initial, kc, vc)
    return chunks, qc, kc, vc, decay, before, ends


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
    chunks, *parts, before, ends = _chunked(q, k, v, log_decay, initial, starts, carry)
    return chunks.join(answer_chunks(*parts, before), q.dtype), ends


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
    chunks, qc, kc, vc, decay, before, _ = _chunked(q, k, v, log_decay, initial, starts, carry)
    go = chunks.cut(grad_out, qc.dtype)
    read = decay.since_start(qc).transpose(-1, -2) @ go
    after, grad_initial = chunks.scan_backward(
        lambda m, grad: decay.over(m, grad) + read[:, :, m], grad_ends, qc.dtype
    )
    grad_q, grad_k, grad_v, *grad_decay = answer_chunks_backward(go, qc, kc, vc, decay, before, after)
    none = q.new_empty(0)
    return (
        *(chunks.join(g, x.dtype) for g, x in ((grad_q, q), (grad_k, k), (grad_v, v))),
        none if log_decay is None else chunks.join(decay.backward(*grad_decay), log_decay.dtype),
        none.clone() if initial is None else grad_initial.to(initial.dtype).contiguous(),
    )


def _fake(q, k, v, log_decay, initial, starts, carry):
    rows, segments, _, heads, key_dim = q.shape
    ends = q.new_empty(rows, segments, heads, key_dim, v.shape[-1], dtype=compute_dtype(q))
    return torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format), ends


def _fake_backward(grad_out, grad_ends, q, k, v, log_decay, initial, starts, carry):
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, initial)
    )


linear_write_op = register_op(
    "linear_write",
    linear_write_torch,
    linear_write_backward_torch,
    _fake,
    _fake_backward,
    differentiable=5,
    triton="write.linear_triton",
)


def linear_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    initial: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    carry: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write every segment of the grid and answer every slot from the memory that holds the tokens up to it.

    Args:
        q, k: `[R, N, W, H, dk]`, any float dtype. v: `[R, N, W, H, dv]`. A slot without a token has k = v = 0.
        log_decay: `[R, N, W, H]`, log a_t <= 0 (0 in empty slots), or None for a_t = 1.
        initial: `[R, H, dk, dv]`, the state before the first segment of each row; None is zero.
        starts: `[R, N]` bool, segments that start from zero although `carry` is set (borders of packed documents).
        carry: a segment starts from the last state of the one before it (checkpoint), else from zero.
        backend: "auto", "triton" or "torch", see `choose_backend`.

    Returns:
        answers `[R, N, W, H, dv]` in the dtype of q, and the state after every segment `[R, N, H, dk, dv]` in fp32
        (float64 for float64 input). Both are differentiable with respect to q, k, v, log_decay and initial.
    """
    backend = choose_backend(backend, "linear_write", q, k.shape[-1], v.shape[-1])
    return linear_write_op(q, k, v, log_decay, initial, starts, carry, backend)
