# Copyright 2026 the mc-transformers authors.
"""Cheap steps whose inputs are kept for the backward, and nothing of what they make on the way."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .ops import needs_gradient


class _Recomputed(torch.autograd.Function):
    """`function(*inputs)`; the backward calls it once more and differentiates that."""

    @staticmethod
    def forward(ctx, function: Callable[..., torch.Tensor], device: str, *inputs: torch.Tensor | None) -> torch.Tensor:
        ctx.function, ctx.device = function, device
        known = torch.amp.is_autocast_available(device)
        ctx.autocast = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) if known else None
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            if ctx.autocast is None:
                out = ctx.function(*inputs)
            else:
                with torch.autocast(ctx.device, ctx.autocast[0], enabled=ctx.autocast[1]):
                    out = ctx.function(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad))
        return (None, None, *[next(found) if need else None for need in needed])


def recomputed(function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
    """`function(*inputs)` with all that it makes on the way computed again in the backward; torch.compile decides that
    itself.

    Args:
        function: without randomness, and of nothing that needs a gradient besides its inputs, all of which the result
            depends on, and the first of which is not None. It can be differentiated once.
    """
    if torch.compiler.is_compiling() or not needs_gradient(*inputs):
        return function(*inputs)
    return _Recomputed.apply(function, inputs[0].device.type, *inputs)
