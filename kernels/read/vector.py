"""Sum of all visible vector memories under elementwise gates, `o_t = sum_i sigmoid(x_t + p_i) * h_i`.

One memory at a time: the gates, tokens x memories x width, exist in neither pass, and the backward makes them again.
"""

import torch

from ..shared.ops import register_op


def gated_sum_torch(x: torch.Tensor, p: torch.Tensor, h: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """See `gated_sum`."""
    out, seen = torch.zeros_like(x, memory_format=torch.contiguous_format), visible.to(x.dtype)
    for i in range(h.shape[1]):
        gate = (x + p[:, i, None, None]).sigmoid_()
        out += gate.mul_(h[:, i, None, None]).mul_(seen[:, :, i, None, None, None])
    return out


def gated_sum_backward_torch(
    grad_out: torch.Tensor, x: torch.Tensor, p: torch.Tensor, h: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, p and h."""
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_p, grad_h, seen = torch.empty_like(p), torch.empty_like(h), visible.to(x.dtype)
    for i in range(h.shape[1]):
        gate = (x + p[:, i, None, None]).sigmoid_()
        weighted = grad_out * gate * seen[:, :, i, None, None, None]
        grad_h[:, i] = weighted.sum((1, 2))
        weighted *= (1 - gate) * h[:, i, None, None]
        grad_p[:, i] = weighted.sum((1, 2))
        grad_x += weighted
    return grad_x, grad_p, grad_h


gated_sum_op = register_op(
    "gated_sum",
    gated_sum_torch,
    gated_sum_backward_torch,
    lambda x, p, h, visible: torch.empty_like(x, memory_format=torch.contiguous_format),
    lambda grad, x, p, h, visible: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(p),
        torch.empty_like(h),
    ),
    differentiable=3,
)


def gated_sum(x: torch.Tensor, p: torch.Tensor, h: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Sum over the memories that each grid segment may read, every element with a gate of its own.

    Args:
        x: `[R, N, W, H, d]`, the tokens' part of the gate. p, h: `[R, S, H, d]`, the memories' part of it, and the
            memories; all of one float dtype. visible: `[R, N, S]` bool.

    Returns:
        `[R, N, W, H, d]`.
    """
    return gated_sum_op(x, p, h, visible)
