# Copyright 2026 the mc-transformers authors.
"""Logarithmic segmentation: the finished segments of every prefix, grouped as a Fenwick tree groups them.

A token that has s finished segments behind it reads, for every bit l that is set in s, the last finished segment of
level l, which is 2^l segments of the model long: 37 segments are read as 32 + 4 + 1, largest first. So one slot per
level is enough, and one running memory per level, the highest of which has not finished a segment yet.
"""

import torch

from .borders import Borders
from .cache_layer import MCCacheLayer
from .history import NEVER, Caches, GatesReceived, History, Level
from .segments import rows_where
from .storage import Kept


class FenwickHistory(History):
    """Slot l holds the last finished segment of level l."""

    stands = False

    def num_levels(self, num_tokens: int, running: bool) -> int:
        finished = self.borders.most_finished(num_tokens if running else num_tokens - 1)
        return max(1, finished.bit_length() + running)

    def num_slots(self, num_tokens: int) -> int:
        return self.num_levels(num_tokens, True)

    def num_columns(self, num_tokens: int) -> int:
        return self.borders.most_finished(num_tokens - 1).bit_length()

    def grow(self, layer: MCCacheLayer, num_tokens: int) -> None:
        known = layer.storage.group("state")[0].shape[1] - self.lead
        super().grow(layer, num_tokens)
        if self.num_blocks > 1 and "sums" in layer.tensors:
            # a new level has sub-blocks twice as long as those of the level that it is copied from
            sums = list(layer.tensors["sums"].unbind(1))
            for level in range(known, len(sums)):
                pairs = torch.nn.functional.pad(sums[level - 1], (0, 0, 0, self.num_blocks))
                sums[level] = pairs.unflatten(2, (self.num_blocks, 2)).sum(3)
            layer.storage.put("sums", torch.stack(sums, 1))

    def caches(self, levels: list[Level], layer: MCCacheLayer | None, gates_received: GatesReceived) -> Caches:
        """One row of L level slots (and one that nobody reads) per grid segment: `[R * N, L + 1, H, ...]`."""
        table, num = levels[0].table, len(levels)
        finished = table.number  # [R, N] segments before, of the same sequence
        row = torch.arange(len(finished), device=finished.device)[:, None]
        kept = [] if layer is None else [*Kept(layer.storage).all(), layer.tensors.get("summaries")]
        slots: list[list[torch.Tensor]] = []
        for bit, level in enumerate(levels):
            first = table.first_of_level(level.table)
            # the last finished segment of this level, counted in this level's grid; -1: it is from before
            index = (finished >> bit) - 1 - level.table.finished_before[:, None]
            local = (first + index.clamp(min=0)).clamp(max=level.table.num_segments - 1)
            parts = [part[row, local] for part in level.finished(self.memory.num_read)]  # [R, N, H, ...]
            if kept:
                parts = [rows_where(index < 0, old[:, None, bit], new) for old, new in zip(kept, parts, strict=False)]
            slots.append(parts)
        columns = zip(*slots, strict=True)
        stacked = [torch.stack([*column, torch.zeros_like(column[0])], 2).flatten(0, 1) for column in columns]
        bits = torch.arange(num, device=finished.device)
        birth = torch.where((finished[..., None] >> bits) & 1 == 1, 0, NEVER).flatten(0, 1)
        birth = torch.nn.functional.pad(birth, (0, 1), value=NEVER)
        summaries = stacked.pop() if levels[0].sums is not None else None
        number = torch.arange(num + 1, device=birth.device).expand_as(birth)
        return Caches(tuple(stacked), summaries, birth, torch.zeros_like(birth[:, :1]), number)

    def _leave_finished(self, levels, caches: Caches, layer: MCCacheLayer, row: torch.Tensor) -> None:
        kept = [*Kept(layer.storage).all(), layer.tensors.get("summaries")] if layer.storage.group("kept") else []
        finished: list[list[torch.Tensor]] = []
        for bit, level in enumerate(levels):
            new = level.table.running_index() - 1  # last segment of this level that this grid has finished
            parts = [part[row, new.clamp(min=0)] for part in level.finished(self.memory.num_read)]
            if kept:
                parts = [rows_where(new < 0, old[:, bit], part) for old, part in zip(kept, parts, strict=False)]
            finished.append(parts)
        for name, parts in zip(self._names(), zip(*finished, strict=True), strict=False):
            layer.storage.put(name, torch.stack(parts, 1))

    def _readable(self, layer: MCCacheLayer, borders: Borders, slot: torch.Tensor) -> torch.Tensor:
        return borders.finished(layer.position)[:, None] >> slot & 1 == 1

    def _finish(self, layer, borders, segment: torch.Tensor, full: torch.Tensor, real, gates) -> torch.Tensor:
        return torch.arange(full.shape[1], device=full.device).expand_as(full)

    def columns(self, layer: MCCacheLayer, borders: Borders) -> torch.Tensor:
        slots = layer.tensors["kept.0"].shape[1]
        return torch.arange(slots, device=layer.position.device).expand(len(layer.position), -1)
