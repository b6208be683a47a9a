"""`deep_constant_read` on Triton: the kernels of `triton_deep_read` with gates of 0 and 1."""

import torch

from .deep_triton import DeepRead


def _gates(read: DeepRead, visible: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """`[G, S, T]`, 1 for the memories that a token may read."""
    seen = visible[:, begin : begin + count].float().transpose(1, 2)[:, None, :, :, None]  # [R, 1, S, count, 1]
    seen = seen.expand(-1, read.heads, -1, -1, read.width)
    return seen.reshape(read.groups, read.memories, count * read.width)


def _read(q, w2, w1, scale, shift, visible) -> DeepRead:
    rows, num, memories = visible.shape
    first, kept, stop = (
        torch.full(shape, value, dtype=torch.int64, device=q.device)
        for shape, value in (((rows, num), 0), ((rows,), memories - num), ((rows, memories), num))
    )
    return DeepRead(q, w2, w1, scale, shift, first, kept, stop)


def forward(q, w2, w1, scale, shift, visible):
    """See `deep_constant_read`."""
    read = _read(q, w2, w1, scale, shift, visible)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for begin, count in read.blocks():
        read.read(out, _gates(read, visible, begin, count), begin, count)
    return out


def backward(grad_out, q, w2, w1, scale, shift, visible):
    """See `deep_constant_read_backward_torch`."""
    read = _read(q, w2, w1, scale, shift, visible)
    read.begin_backward(grad_out)
    for begin, count in read.blocks():
        read.backward(_gates(read, visible, begin, count), begin, count)
    return read.gradients(q, w2, w1, scale, shift)
