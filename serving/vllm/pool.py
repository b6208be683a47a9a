# Copyright 2026 the mc-transformers authors.
"""States of finished segments that stay where they are in vLLM's pool while tokens are decoded.

To lay them side by side for every token would be most of its time: a token reads each state once, or, with "ssc", k of
them. So a token's mixer asks for those it needs, a few at a time, and hands over the ones that it finishes.
"""

import math
from collections.abc import Iterator

import torch

from ...kernels.step.decode import fetch
from ...modeling_mc.memories import State
from ...modeling_mc.storage import Kept, Storage
from .steps import Finished


PIECE = 4 << 20  # bytes that are copied out of the pool at a time on a CPU: they stay in its cache


class PoolStorage(Storage):
    """What a mixer finds when one token per row goes on.

    Args:
        pool: tensors `[P, n, H, ...]` by the names of what is kept. where: the slots.

    Attributes:
        finished: what was stored of segments that the token has finished, `[B, H, ...]` by name.
    """

    def __init__(self, pool: dict[str, torch.Tensor], where: Finished) -> None:
        super().__init__()
        self.pool, self.where = pool, where
        self.finished: dict[str, torch.Tensor] = {}

    def kept(self) -> "PoolKept":
        return PoolKept(self)

    def store(
        self, name: str, value: torch.Tensor, slot: torch.Tensor, keep: torch.Tensor, backend: str = "torch"
    ) -> None:
        if name not in self.pool:
            super().store(name, value, slot, keep, backend)
            return
        for part, coded in self._encode(name, value).items():
            self.finished[part] = coded[:, 0]


class PoolKept(Kept):
    """The states of a `PoolStorage`. Those of slots without a segment are zero, whatever stands in their blocks."""

    in_pool = True

    def __init__(self, storage: PoolStorage) -> None:
        self.storage, self.like, self.where = storage, storage.tensors["state.0"], storage.where
        self.num = sum(name.startswith("kept.") for name in storage.pool)
        self.num_slots = self.where.blocks.shape[1]

    def stored(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.storage.pool[f"kept.{number}"], self.storage.pool.get(f"scale.{number}")

    def _range(self, slots: slice) -> State:
        where = self.where.blocks[:, slots], self.where.places[:, slots]
        absent = self.where.absent[:, slots]
        states = tuple(fetch(*self.stored(i), None, self.like, where) for i in range(self.num))
        if absent.device.type == "cpu" and not absent.any():
            return states
        return tuple(x.masked_fill_(absent.view(*absent.shape, *[1] * (x.dim() - 2)), 0) for x in states)

    def all(self) -> State:
        return self._range(slice(None))

    def pieces(self) -> Iterator[tuple[slice, State]]:
        step = self.num_slots
        if self.like.device.type == "cpu":
            stored = [self.stored(i)[0] for i in range(self.num)]
            numbers = len(self.where.blocks) * sum(math.prod(x.shape[2:]) for x in stored)
            step = max(1, PIECE // (numbers * self.like.itemsize))
        for first in range(0, self.num_slots, step):
            slots = slice(first, first + step)
            yield slots, self._range(slots)

    def chosen(self, index: torch.Tensor) -> State:
        where = self.where.blocks, self.where.places
        states = tuple(fetch(*self.stored(i), index, self.like, where) for i in range(self.num))
        nothing = (index < 0).transpose(1, 2)
        return tuple(x.masked_fill(nothing.view(*nothing.shape, *[1] * (x.dim() - 3)), 0) for x in states)
