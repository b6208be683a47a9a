"""Ops as the functions of PyTorch that they are made of: for exporters, which know none of ours."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .ops import PLAIN


def solve_unit_lower(
    system: torch.Tensor, right: torch.Tensor, *, upper: bool = False, unitriangular: bool = True
) -> torch.Tensor:
    """`torch.linalg.solve_triangular` of a lower triangle whose diagonal is one, as products of matrices.

    The inverse grows from blocks on the diagonal, twice as large each time: that of [[A, 0], [L, D]] has -D' L A' in
    its lower left corner, with A' and D' the inverses of A and D.

    Args:
        system: `[..., n, n]`; what is on and above the diagonal is not read. right: `[..., n, d]`, same dtype.
    """
    size = system.shape[-1]
    padding = (1 << (size - 1).bit_length()) - size
    system = F.pad(system, (0, padding, 0, padding))
    inverse, width = system.new_ones(*system.shape[:-1], 1, 1), 1  # [..., blocks, width, width]
    while width < system.shape[-1]:
        pairs = (-1, 2 * width)
        lower = system.unflatten(-1, pairs).unflatten(-3, pairs).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -(second @ lower[..., width:, :width] @ first)
        upper_half = torch.cat([first, torch.zeros_like(first)], -1)
        inverse = torch.cat([upper_half, torch.cat([corner, second], -1)], -2)
        width *= 2
    return inverse[..., 0, :size, :size] @ right


class Inlined(TorchFunctionMode):
    """A region in which ops run as functions of PyTorch, where no gradient is needed.

    Example:
        >>> with torch.no_grad(), Inlined():
        ...     program = torch.export.export(model, (input_ids,))
    """

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        plain = solve_unit_lower if func is torch.linalg.solve_triangular else PLAIN.get(func)
        if plain is None:
            return func(*args, **(kwargs or {}))
        with self:  # an op may call others
            return plain(*args, **(kwargs or {}))
