# Copyright 2026 the mc-transformers authors.
"""What is kept of finished segments, and who may read it.

Segments are kept on levels: level l has segments of 2^l * segment_size tokens, each written by a memory of its own.
With constant segmentation there is level 0 alone, and all its finished segments are kept and read. With logarithmic
segmentation a token that has s finished segments behind it reads, for every bit l that is set in s, the last finished
segment of level l: the Fenwick split of its prefix, largest first (37 = 32 + 4 + 1). One slot per level is enough.
"""

from dataclasses import dataclass

import torch

from .cache import Kept, MCCacheLayer
from .memories import Memory, State
from .segments import SegmentTable


NEVER = 2**30  # birth of a slot that may not be read


@dataclass
class Caches:
    """Readable states of finished segments, what the gates know of them, and who may read which.

    Attributes:
        states: tensors `[R, S, H, ...]`.
        summaries: `[R, S, H, m, du]`, means of the m sub-blocks of each segment, or None without content gates.
        birth: `[R, S]` int64, memory i may be read by grid segments j >= birth.
        first: `[R, N]` int64, the first memory that grid segment j may read.
    """

    states: State
    summaries: torch.Tensor | None
    birth: torch.Tensor
    first: torch.Tensor

    def visible(self) -> torch.Tensor:
        """`[R, N, S]` bool."""
        rank = torch.arange(self.first.shape[1], device=self.first.device)
        slot = torch.arange(self.birth.shape[1], device=self.first.device)
        return (self.birth[:, None] <= rank[:, None]) & (slot >= self.first[..., None])


@dataclass
class Level:
    """One level's write of a grid: its table, end states `[R, N, H, ...]` and end sums `[R, N, H, m, du]`."""

    table: SegmentTable
    ends: State
    sums: torch.Tensor | None


def rows_where(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a` where `rows` `[B]` (or `[B, L]`) is set, else `b`."""
    return torch.where(rows.view(*rows.shape, *[1] * (a.dim() - rows.dim())), a, b)


class History:
    """Keeps the finished segments of a memory layer, on one level or several.

    In the cache layer: `state.i` `[B, L, H, ...]` running states of all levels, `sums` `[B, L, H, m, du]`, and the
    finished ones in `kept.i` `[B, S, H, ...]` and `summaries` `[B, S, H, m, du]`: slot = segment (constant) or level.
    """

    def __init__(self, config, memory: Memory, carry: bool) -> None:
        self.memory, self.carry, self.segment_size = memory, carry, config.segment_size
        self.keeps = config.aggregation != "none"
        self.logarithmic = self.keeps and config.segmentation == "logarithmic"
        self.num_blocks = config.summaries_per_segment

    # --------------------------------------------------------------------------------------------------- sizes
    def num_levels(self, num_tokens: int, running: bool) -> int:
        """Levels needed by rows of at most `num_tokens`; `running`: and the one above, for the tokens after them."""
        if not self.logarithmic:
            return 1
        finished = (num_tokens if running else num_tokens - 1) // self.segment_size
        return max(1, finished.bit_length() + running)

    def _num_slots(self, num_tokens: int) -> int:
        """Slots for finished segments; at least one, so that no tensor is ever empty."""
        return self.num_levels(num_tokens, True) if self.logarithmic else max(1, num_tokens // self.segment_size)

    def mean(self, sums: torch.Tensor, level: int = 0) -> torch.Tensor:
        """Descriptors of complete segments of a level from their sums."""
        return sums * (self.num_blocks / (self.segment_size << level))

    def begin(self, layer: MCCacheLayer, rows: int, sums_shape: tuple | None, device, dtype) -> None:
        """Fill an empty cache layer: nothing written, one level, one (empty) slot."""
        state = self.memory.initial_state(rows, device, dtype)
        layer.put("position", torch.zeros(rows, dtype=torch.int64, device=device))
        for i, part in enumerate(state):
            layer.put(f"state.{i}", part[:, None])
            if self.keeps and i < self.memory.num_read:
                layer.put(f"kept.{i}", torch.zeros_like(part)[:, None])
        if sums_shape is not None:
            for name in ("sums", "summaries"):
                layer.put(name, torch.zeros(rows, 1, *sums_shape, device=device, dtype=dtype))

    def grow(self, layer: MCCacheLayer, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens: slots, and levels, which start as copies of the endless top one."""
        total = layer.bound(num_tokens)
        layer.extend(("kept.", "scale.", "summaries"), self._num_slots(total), copy_last=False)
        layer.extend(("state.", "sums"), self.num_levels(total, True), copy_last=True)

    # --------------------------------------------------------------------------------------------- whole grids
    def caches(self, levels: list[Level], layer: MCCacheLayer | None) -> Caches:
        """What the tokens of a grid may read: memories kept in `layer`, then the end states of the grid."""
        if self.logarithmic:
            return self._fenwick(levels, layer)
        (level,) = levels
        table, states = level.table, level.ends[: self.memory.num_read]
        summaries = None if level.sums is None else self.mean(level.sums)
        new = torch.arange(1, table.num_segments + 1, device=table.first.device).expand(len(table.position), -1)
        if layer is None or not self.keeps:
            return Caches(states, summaries, new, table.first)
        kept = Kept(layer, new.device).all()
        known = torch.arange(kept[0].shape[1], device=new.device) < table.finished_before[:, None]
        states = tuple(torch.cat(pair, 1) for pair in zip(kept, states, strict=True))
        if summaries is not None:
            summaries = torch.cat([layer.tensors["summaries"], summaries], 1)
        return Caches(states, summaries, torch.cat([torch.where(known, 0, NEVER), new], 1), table.first)

    def _fenwick(self, levels: list[Level], layer: MCCacheLayer | None) -> Caches:
        """One row of L level slots (and one that nobody reads) per grid segment: `[R * N, L + 1, H, ...]`."""
        table, num = levels[0].table, len(levels)
        rank = torch.arange(table.num_segments, device=table.first.device)
        row = torch.arange(len(table.position), device=rank.device)[:, None]
        finished = table.finished_before[:, None] + rank - table.first  # [R, N] segments before, of the same sequence
        kept = [] if layer is None else [*Kept(layer, row.device).all(), layer.tensors.get("summaries")]
        slots: list[list[torch.Tensor]] = []
        for bit, level in enumerate(levels):
            first = table.first_of_level(level.table)
            # the last finished segment of this level, counted in this level's grid; -1: it is from before
            index = (finished >> bit) - 1 - level.table.finished_before[:, None]
            local = (first + index.clamp(min=0)).clamp(max=level.table.num_segments - 1)
            parts = list(level.ends[: self.memory.num_read])
            if level.sums is not None:
                parts.append(self.mean(level.sums, bit))
            parts = [part[row, local] for part in parts]  # [R, N, H, ...]
            if kept:
                parts = [rows_where(index < 0, old[:, None, bit], new) for old, new in zip(kept, parts, strict=False)]
            slots.append(parts)
        columns = zip(*slots, strict=True)
        stacked = [torch.stack([*column, torch.zeros_like(column[0])], 2).flatten(0, 1) for column in columns]
        bits = torch.arange(num, device=rank.device)
        birth = torch.where((finished[..., None] >> bits) & 1 == 1, 0, NEVER).flatten(0, 1)
        birth = torch.nn.functional.pad(birth, (0, 1), value=NEVER)
        summaries = stacked.pop() if levels[0].sums is not None else None
        return Caches(tuple(stacked), summaries, birth, torch.zeros_like(birth[:, :1]))

    def leave(self, levels: list[Level], caches: Caches, layer: MCCacheLayer) -> None:
        """Leave in the cache what the next forward needs: running states of all levels, finished segments in order."""
        row = torch.arange(len(levels[0].table.position), device=caches.first.device)
        running: list[list[torch.Tensor]] = []
        for level in levels:
            index = level.table.running_index()
            last, begun = index.clamp(max=level.table.num_segments - 1), index < level.table.num_segments
            fresh = self.memory.initial_state(len(row), row.device, level.ends[0].dtype)
            ends = [rows_where(begun | self.carry, e[row, last], f) for e, f in zip(level.ends, fresh, strict=True)]
            if level.sums is not None:
                ends.append(rows_where(begun, level.sums[row, last], torch.zeros_like(level.sums[:, 0])))
            running.append(ends)
        names = [f"state.{i}" for i in range(len(levels[0].ends))] + ["sums"]
        for name, parts in zip(names, zip(*running, strict=True), strict=False):
            layer.put(name, torch.stack(parts, 1))
        if self.keeps:
            self._leave_finished(levels, caches, layer, row)
        layer.put("position", levels[0].table.next_position)

    def _leave_finished(self, levels, caches: Caches, layer: MCCacheLayer, row: torch.Tensor) -> None:
        names = [f"kept.{i}" for i in range(self.memory.num_read)] + ["summaries"]
        if not self.logarithmic:
            table, parts = levels[0].table, [*caches.states, caches.summaries]
            cached, before = caches.birth.shape[1] - table.num_segments, table.finished_before[:, None]
            slot = torch.arange(self._num_slots(layer.bound(table.num_tokens)), device=row.device)
            source = torch.where(slot < before, slot, cached + slot - before).clamp(max=caches.birth.shape[1] - 1)
            for name, part in zip(names, parts, strict=True):
                if part is not None:
                    layer.put(name, part[row[:, None], source])
            return
        old_states = Kept(layer, row.device).all() if layer.group("kept") else [None] * self.memory.num_read
        kept = [*old_states, layer.tensors.get("summaries")]
        finished: list[list[torch.Tensor]] = []
        for bit, level in enumerate(levels):
            new = level.table.running_index() - 1  # last segment of this level that this grid has finished
            parts = [end[row, new.clamp(min=0)] for end in level.ends[: self.memory.num_read]]
            if level.sums is not None:
                parts.append(self.mean(level.sums[row, new.clamp(min=0)], bit))
            pairs = zip(kept, parts, strict=False)
            finished.append([x if old is None else rows_where(new < 0, old[:, bit], x) for old, x in pairs])
        for name, parts in zip(names, zip(*finished, strict=True), strict=False):
            layer.put(name, torch.stack(parts, 1))

    # ---------------------------------------------------------------------------------------------- one token
    def kept(self, layer: MCCacheLayer) -> tuple[Kept, torch.Tensor | None, torch.Tensor]:
        """Finished segments, their summaries and which of them `[B, S]` bool each row may read now."""
        finished = layer.position // self.segment_size
        kept = Kept(layer, finished.device)
        slot = torch.arange(kept.num_slots, device=finished.device)
        visible = (finished[:, None] >> slot) & 1 == 1 if self.logarithmic else slot < finished[:, None]
        return kept, layer.tensors.get("summaries"), visible

    def push(self, layer: MCCacheLayer, states: State, sums: torch.Tensor | None, real: torch.Tensor | None) -> None:
        """Take over states `[B, L, H, ...]` and sums of all levels that hold one more token of the rows `real` `[B]`,
        and move the ones that are complete to the finished segments."""
        position = layer.position
        real = torch.ones_like(position, dtype=torch.bool) if real is None else real
        level = torch.arange(states[0].shape[1], device=position.device)
        full = real[:, None] & ((position[:, None] + 1) % (self.segment_size << level) == 0)  # [B, L]
        if self.keeps:
            done = [(f"kept.{i}", states[i]) for i in range(self.memory.num_read)]
            if sums is not None:
                factor = self.num_blocks / (self.segment_size << level).to(sums.dtype)
                done.append(("summaries", sums * factor.view(-1, *[1] * (sums.dim() - 2))))
            for name, value in done:
                for bit in range(value.shape[1]):
                    slot = torch.full_like(position, bit) if self.logarithmic else position // self.segment_size
                    layer.store(name, value[:, bit], slot, full[:, bit])
        fresh = self.memory.initial_state(len(position), position.device, states[0].dtype)
        for i, (after, new) in enumerate(zip(states, fresh, strict=True)):
            after = after if self.carry else rows_where(full, new[:, None], after)
            layer.put(f"state.{i}", rows_where(real, after, layer.tensors[f"state.{i}"]))
        if sums is not None:
            layer.put("sums", rows_where(real, rows_where(full, torch.zeros_like(sums), sums), layer.tensors["sums"]))
        layer.put("position", position + real)
