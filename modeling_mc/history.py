# Copyright 2026 the mc-transformers authors.
"""What is kept of finished segments, and who may read it.

Segments are written on levels: level l has segments 2^l times as long as level 0, each with a memory of its own. With
constant segmentation there is level 0 alone; logarithmic segmentation (fenwick.py) has several. Which finished
segments stay readable when their number is bounded is decided here ("oldest") and in least_read.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.shared.ops import unobserved
from ..kernels.step.slot import slot_write
from .borders import Borders
from .cache_layer import MCCacheLayer
from .memories import Memory, State
from .moment import Moment
from .segments import SegmentTable, rows_where
from .shards import Shards
from .storage import Kept
from .summary import Summary


NEVER = 2**30  # birth of a slot that may not be read


GatesReceived = Callable[[int, torch.Tensor | None, torch.Tensor], torch.Tensor]


@dataclass
class Caches:
    """Readable states of finished segments, what the gates know of them, and who may read which.

    Attributes:
        states: tensors `[R, S, H, ...]`.
        summaries: `[R, S, H, m, du]`, means of the m sub-blocks of each segment, or None without content gates.
        birth: `[R, S]` int64, memory i may be read by grid segments j >= birth.
        first: `[R, N]` int64, the first memory that grid segment j may read.
        number: `[R, S]` int64, the column of each memory among the gates that users see, if these are asked for.
    """

    states: State
    summaries: torch.Tensor | None
    birth: torch.Tensor
    first: torch.Tensor
    number: torch.Tensor | None = None

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

    def mean(self) -> torch.Tensor | None:
        """Descriptors `[R, N, H, m, du]` of the segments that are finished; of others they mean nothing."""
        if self.sums is None:
            return None
        return Summary(self.table.borders, self.sums.shape[-2]).mean(self.sums, self.table.count)

    def finished(self, num_read: int) -> list[torch.Tensor]:
        """What is kept of finished segments: `num_read` tensors of their states, and descriptors if there are any."""
        mean = self.mean()
        return [*self.ends[:num_read], *([] if mean is None else [mean])]


class Slots:
    """What a cache layer holds for a memory, and how much of it: both halves of a history build on it.

    Running states of all levels `state.i` `[B, L, H, ...]` and their sums `sums` `[B, L, H, m, du]`; finished segments
    `kept.i` `[B, S, H, ...]` and `summaries` `[B, S, H, m, du]`. Here L = 1 and segment i of a row is kept in slot i
    modulo S.
    """

    stands = True  # whether what was held at a border can be told from what is held later

    def __init__(self, config, memory: Memory, carry: bool) -> None:
        self.memory, self.carry, self.borders = memory, carry, Borders.of(config)
        self.keeps = config.aggregation != "none"
        self.stands = self.stands and config.segmentation != "content"
        # levels in front of the others: with online_memory="running" one, whose memory never starts anew
        self.lead = int(config.online_memory == "running")
        self.num_blocks = config.summaries_per_segment
        self.max_segments: int | None = config.max_cached_segments

    def _names(self) -> list[str]:
        """What is kept of finished segments."""
        return [f"kept.{i}" for i in range(self.memory.num_read)] + ["summaries"]

    def num_levels(self, num_tokens: int, running: bool) -> int:
        """Levels needed by rows of at most `num_tokens`; `running`: and the one above, for the tokens after them."""
        return 1

    def num_slots(self, num_tokens: int) -> int:
        """Slots for finished segments of at most `num_tokens`; at least one, so that no tensor is ever empty."""
        needed = max(1, self.borders.most_finished(num_tokens))
        return needed if self.max_segments is None else min(needed, self.max_segments)

    def num_columns(self, num_tokens: int) -> int:
        """Columns of past memories among the gates that users see: segments that the last of `num_tokens` tokens can
        have behind it."""
        return self.borders.most_finished(num_tokens - 1) if self.keeps else 0

    def check_room(self, layer: MCCacheLayer, num_tokens: int) -> None:
        """Refuse `num_tokens` more tokens if a static cache has no slots for the segments that they finish.

        Raises:
            ValueError: they would overwrite earlier segments.
        """
        room = layer.bound(num_tokens)
        if unobserved() or not self.keeps or self.num_slots(room) == self.max_segments:
            return
        total = int(layer.num_tokens) + num_tokens
        if self.num_slots(total) > self.num_slots(room):
            raise ValueError(
                f"`cache` has room for the segments of {room} tokens (`max_cache_len`), and {total} would "
                "be read: make a larger one"
            )

    def begin(self, layer: MCCacheLayer, rows: int, sums_shape: tuple | None, device, dtype) -> None:
        """Fill an empty cache layer: nothing written, one level, one (empty) slot."""
        state = self.memory.initial_state(rows, device, dtype)
        layer.storage.put("position", torch.zeros(rows, dtype=torch.int64, device=device))
        for i, part in enumerate(state):
            layer.storage.put(f"state.{i}", part[:, None].expand(-1, self.lead + 1, *part.shape[1:]))
            if self.keeps and i < self.memory.num_read:
                layer.storage.put(f"kept.{i}", torch.zeros_like(part)[:, None])
        if sums_shape is not None:
            for name in ("sums", "summaries"):
                layer.storage.put(name, torch.zeros(rows, 1, *sums_shape, device=device, dtype=dtype))

    def grow(self, layer: MCCacheLayer, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens: slots, and levels, which start as copies of the endless top one."""
        total = layer.bound(num_tokens)
        layer.storage.extend(("kept.", "scale.", "summaries"), self.num_slots(total))
        levels = self.num_levels(total, True)
        layer.storage.extend(("state.",), self.lead + levels, copy_last=True)
        layer.storage.extend(("sums",), levels, copy_last=True)

    def shrink(self, layer: MCCacheLayer) -> None:
        """Give up the room that no row needs since some have begun anew; the longest row is the length from now on."""
        layer.num_tokens = total = int(layer.position.max())
        levels = self.num_levels(total, True)
        layer.storage.cut(("kept.", "scale.", "summaries"), self.num_slots(total))
        layer.storage.cut(("state.",), self.lead + levels)
        layer.storage.cut(("sums",), levels)

    # ------------------------------------------------------------------------------------- standing at a border again
    def note(
        self,
        layer: MCCacheLayer,
        name: str,
        values: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        slots: int,
    ) -> None:
        """Keep in `border.NAME` `[B, S, ...]` what a layer held at the borders that are passed, a slot per segment.

        Args:
            values: `[B, N, ...]` at the ends of the next N segments of every row.
            before, after: `[B]` int64, tokens that each row has written before and after this. slots: S.
        """
        first, last = self.borders.finished(before)[:, None], self.borders.finished(after)[:, None] - 1
        if after.device.type == "cpu" and not bool((last >= first).any()):
            return
        name = f"border.{name}"
        old = layer.tensors.get(name, values.new_empty(len(values), 0, *values.shape[2:]))
        unknown = (len(old), max(0, slots - old.shape[1]), *old.shape[2:])
        old = torch.cat([old, old.new_full(unknown, float("nan"))], 1)  # nobody stands at a border with NaN
        slot = torch.arange(old.shape[1], device=old.device)
        segment = last - (last - slot) % len(slot)  # the last finished one that belongs into this slot
        row = torch.arange(len(old), device=old.device)[:, None]
        new = values[row, (segment - first).clamp(0, values.shape[1] - 1)]
        layer.storage.put(name, rows_where(segment >= first, new.to(old.dtype), old))

    def _note_states(self, layer: MCCacheLayer, states: State, before: torch.Tensor, after: torch.Tensor, slots: int):
        """`note` of running states `[B, N, H, ...]`, unless they start anew or are kept exactly anyway."""
        if not layer.keep_borders or not (self.carry or self.lead):
            return
        kept = self.memory.num_read if self.keeps and not self.lead and layer.kept_dtype is None else 0
        for i, state in enumerate(states[kept:], kept):
            self.note(layer, f"state.{i}", state, before, after, slots)

    def stand(self, layer: MCCacheLayer, number: int, held: dict, border: dict, like: torch.Tensor) -> None:
        """Fill an empty layer with what it holds once every row has finished `number` >= 1 segments and no more.

        Args:
            held: `kept.i`, `scale.i` and `summaries` as they are stored, `[B, S, ...]` with S = `num_slots`.
            border: what was noted at the border, `conv.NAME` and `state.i`, `[B, ...]`.
            like: a running state, for dtype, device and B.
        """
        put, start, rows = layer.storage.put, self.borders.start(number), len(like)
        put("position", torch.full((rows,), start, device=like.device))
        for i, fresh in enumerate(self.memory.initial_state(rows, like.device, like.dtype)):
            levels = [fresh] * (self.lead + 1)
            if f"state.{i}" in border:
                levels[0] = border[f"state.{i}"]
            elif self.carry:
                levels[0] = held[f"kept.{i}"][:, (number - 1) % self.num_slots(start)].to(like.device)
            put(f"state.{i}", torch.stack(levels, 1))
        if "summaries" in held:
            put("sums", torch.zeros_like(held["summaries"][:, :1]))
        layer.tensors |= held | {name: x for name, x in border.items() if name.startswith("conv.")}


class GridHistory(Slots):
    """The half that whole grids ask: `caches` before they read, `leave` after."""

    def caches(self, levels: list[Level], layer: MCCacheLayer | None, gates_received: GatesReceived) -> Caches:
        """What the tokens of a grid may read: memories kept in `layer`, then the end states of the grid.

        Args:
            gates_received: function of (grid segment, summaries, visible) that gives the gates of past memories, for a
                history that decides by them.
        """
        table = levels[0].table
        bounded = self.keeps and self.max_segments is not None
        states, summaries, known = self._memories(levels[0], layer if self.keeps else None, in_order=bounded)
        old, rank = known.shape[1], torch.arange(table.num_segments, device=known.device)
        birth = torch.cat([torch.where(known, 0, NEVER), (rank + 1).expand(len(known), -1)], 1)
        first = table.first
        if bounded:
            count = known.sum(1, keepdim=True)
            drop = (count + rank - first - self.max_segments).clamp(min=0)
            first = torch.where(drop < count, first + drop, old + first + drop - count)
        number = None if table.gates is None else self._numbers(table, known, bounded)
        return Caches(states, summaries, birth, first, number)

    @staticmethod
    def _numbers(table: SegmentTable, known: torch.Tensor, in_order: bool) -> torch.Tensor:
        """`[R, S]` of the memories of `_memories`: the segment that each is of, counted in its own sequence."""
        old = torch.arange(known.shape[1], device=known.device).expand_as(known)
        if table.shards is not None:
            return torch.cat([old, old.shape[1] + table.number], 1)
        if in_order:
            old = old + (table.finished_before[:, None] - known.sum(1, keepdim=True))
        return torch.cat([old, table.number], 1)

    def _memories(self, level: Level, layer: MCCacheLayer | None, in_order: bool):
        """States and summaries of kept segments (oldest first if `in_order`), then of the grid's; and which slots
        `[R, S]` of the kept ones are taken."""
        states, summaries = level.ends[: self.memory.num_read], level.mean()
        if layer is None:
            if level.table.shards is not None:
                states, summaries = self._with_earlier_ranks(level.table.shards, states, summaries)
            old = states[0].shape[1] - level.table.num_segments
            return states, summaries, torch.ones(len(states[0]), old, dtype=torch.bool, device=states[0].device)
        finished = level.table.finished_before[:, None]
        kept, old = Kept(layer.storage).all(), layer.tensors.get("summaries")
        slots = kept[0].shape[1]
        slot, count = torch.arange(slots, device=finished.device), finished.clamp(max=slots)
        if in_order:
            row, place = torch.arange(len(finished), device=slot.device)[:, None], (finished - count + slot) % slots
            kept, old = tuple(k[row, place] for k in kept), None if old is None else old[row, place]
        states = tuple(torch.cat(pair, 1) for pair in zip(kept, states, strict=True))
        return states, None if old is None else torch.cat([old, summaries], 1), slot < count

    @staticmethod
    def _with_earlier_ranks(shards: Shards, states: State, summaries: torch.Tensor | None):
        """States and summaries of all segments up to the last one of this rank, from those of each rank."""
        mine = [*states] if summaries is None else [*states, summaries]
        every = [torch.cat(pair, 1) for pair in zip(shards.earlier(*mine), mine, strict=True)]
        return tuple(every[: len(states)]), None if summaries is None else every[-1]

    def leave(self, levels: list[Level], caches: Caches, layer: MCCacheLayer, endless: State | None = None) -> None:
        """Leave in the cache what the next forward needs: running states of all levels, finished segments in order.

        Args:
            endless: states `[R, N, H, ...]` of the memory that never starts anew, if there is one.
        """
        row = torch.arange(len(levels[0].table.position), device=caches.first.device)
        running: list[list[torch.Tensor]] = []
        for level in levels:
            index = level.table.running_index()
            last, begun = index.clamp(max=level.table.num_segments - 1), index < level.table.num_segments
            fresh = self.memory.initial_state(len(row), row.device, level.ends[0].dtype)
            stays = torch.ones_like(begun) if self.carry else begun
            ends = [rows_where(stays, e[row, last], f) for e, f in zip(level.ends, fresh, strict=True)]
            if level.sums is not None:
                ends.append(rows_where(begun, level.sums[row, last], torch.zeros_like(level.sums[:, 0])))
            running.append(ends)
        names = [f"state.{i}" for i in range(len(levels[0].ends))] + ["sums"]
        columns = [[*parts] for parts in zip(*running, strict=True)]
        if endless is not None:
            last = levels[0].table.running_index().clamp(max=levels[0].table.num_segments - 1)
            for column, state in zip(columns, endless, strict=False):
                column.insert(0, state[row, last])
        for name, parts in zip(names, columns, strict=False):
            layer.storage.put(name, torch.stack(parts, 1))
        if self.keeps:
            self._leave_finished(levels, caches, layer, row)
        table = levels[0].table
        slots, states = self.num_slots(layer.bound(table.num_tokens)), levels[0].ends if endless is None else endless
        self._note_states(layer, states, table.position, table.next_position, slots)
        layer.storage.put("position", table.next_position)

    def _leave_finished(self, levels, caches: Caches, layer: MCCacheLayer, row: torch.Tensor) -> None:
        table, total = levels[0].table, caches.birth.shape[1]
        before, after = table.finished_before[:, None], table.finished_after[:, None]
        slots, old = self.num_slots(layer.bound(table.num_tokens)), total - table.num_segments
        slot = torch.arange(slots, device=row.device)
        segment = after - 1 - (after - 1 - slot) % slots  # the last finished one that belongs into this slot
        place = torch.where(segment < before, segment - before + before.clamp(max=old), old + segment - before)
        place = place.clamp(0, total - 1)
        for name, part in zip(self._names(), (*caches.states, caches.summaries), strict=True):
            if part is not None:
                layer.storage.put(name, part[row[:, None], place])


class TokenHistory(Slots):
    """The half that one token per row asks: `kept` before it reads, `push` after it is written."""

    def kept(self, layer: MCCacheLayer, moment: Moment) -> tuple[Kept, torch.Tensor | None, torch.Tensor]:
        """Finished segments, their summaries and which of them `[B, S]` bool each row may read now."""
        kept = layer.storage.kept()
        if moment.visible is None or self.needs_gates:  # then every layer has segments of its own
            slot = torch.arange(kept.num_slots, device=layer.position.device)
            moment.visible = self._readable(layer, moment.first, slot)
        return kept, layer.tensors.get("summaries"), moment.visible

    def _readable(self, layer: MCCacheLayer, borders: Borders, slot: torch.Tensor) -> torch.Tensor:
        return slot < borders.finished(layer.position)[:, None]

    def columns(self, layer: MCCacheLayer, borders: Borders) -> torch.Tensor:
        """`[B, S]` int64, the column of every slot among the gates that users see."""
        slots, last = layer.tensors["kept.0"].shape[1], borders.finished(layer.position)[:, None] - 1
        return last - (last - torch.arange(slots, device=last.device)) % slots

    def push(
        self,
        layer: MCCacheLayer,
        moment: Moment,
        states: State,
        sums: torch.Tensor | None,
        gates: torch.Tensor | None = None,
    ) -> None:
        """Take over states `[B, lead + L, H, ...]` and sums `[B, L, ...]` that hold one more token of the rows that
        have one, and move the ones that are complete to the finished segments.

        Args:
            gates: `[B, H, S]`, what past segments received.
        """
        borders, real, full, backend = moment.borders, moment.real, moment.full, self.memory.backend
        if self.keeps and (moment.ends or self.needs_gates):
            slot = self._finish(layer, borders, moment.segment, full, real, gates)
            read = states[: self.memory.num_read]
            done = [(name, state[:, self.lead :]) for name, state in zip(self._names(), read, strict=False)]
            if sums is not None:
                done.append(("summaries", Summary(borders, self.num_blocks).mean(sums, borders.count(moment.segment))))
            for name, value in done:
                layer.storage.store(name, value, slot, full, backend)
        if layer.keep_borders:
            slots = layer.tensors["kept.0"].shape[1] if self.keeps else self.num_slots(int(moment.written.max()))
            first = tuple(state[:, :1] for state in states)
            self._note_states(layer, first, moment.position, moment.written, slots)
        running = {f"state.{i}": state for i, state in enumerate(states)}
        if not self.carry and moment.ends:
            fresh = self.memory.initial_state(1, full.device, states[0].dtype)
            anew = torch.nn.functional.pad(full, (self.lead, 0))
            for (name, after), new in zip(running.items(), fresh, strict=True):
                running[name] = slot_write(after, new[:, None], None, anew, True, backend)
        if sums is not None:
            running["sums"] = sums
            if moment.ends:
                running["sums"] = slot_write(sums, sums.new_zeros(()).expand_as(sums), None, full, True, backend)
        for name, after in running.items():
            if real is not None:
                before, absent = layer.tensors[name], ~real[:, None].expand(after.shape[:2])
                after = slot_write(after, before, None, absent, True, backend)
            layer.storage.put(name, after)
        layer.storage.put("position", moment.written)

    def _finish(self, layer, borders, segment: torch.Tensor, full: torch.Tensor, real, gates) -> torch.Tensor:
        """Slots `[B, L]` that segments number `segment` `[B, L]` of all levels take where they are `full` `[B, L]`."""
        return segment % layer.storage.kept().num_slots


class History(GridHistory, TokenHistory):
    """Keeps the finished segments of a memory layer; constant segmentation, the oldest leave a full cache."""

    needs_gates = False  # whether `push` asks what past segments received
