# Copyright 2026 the mc-transformers authors.
"""The ranks that share a sequence, and what one of them can ask of those before it (used by context_parallel)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F


class _Earlier(torch.autograd.Function):
    """`[R, L, ...]` of every rank to `[R, rank * L, ...]` of the ranks before this one; gradients go back to them."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, shards: "Shards") -> torch.Tensor:
        ctx.shards, ctx.shape = shards, x.shape
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(shards.size)]
        dist.all_gather(parts, x, group=shards.group)
        return torch.cat([x[:, :0], *parts[: shards.rank]], 1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        shards, length = ctx.shards, ctx.shape[1]
        known = [part.contiguous() for part in grad.split(length, 1)] if shards.rank else []
        parts = known + [grad.new_zeros(ctx.shape)] * (shards.size - shards.rank)
        mine = grad.new_empty(ctx.shape)
        dist.reduce_scatter(mine, parts, group=shards.group)
        return mine, None


@dataclass(frozen=True)
class Shards:
    """The ranks that share a sequence; this one holds run number `rank` of `size` equally long ones."""

    group: "dist.ProcessGroup | None"
    rank: int
    size: int

    def tail(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """The `length` tokens `[R, length, C]` before the tokens `[R, T, C]` of this rank; zeros before the first."""
        before = _Earlier.apply(x[:, max(0, x.shape[1] - length) :], self)
        return F.pad(before, (0, 0, length, 0))[:, -length:] if length else before[:, :0]

    def earlier(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """What the ranks before this one hold, `[R, rank * N, ...]`, of tensors `[R, N, ...]` of one dtype."""
        flat = [x.flatten(2) for x in tensors]
        found = _Earlier.apply(torch.cat(flat, -1), self).split([x.shape[-1] for x in flat], -1)
        return [part.unflatten(-1, x.shape[2:]) for part, x in zip(found, tensors, strict=True)]
