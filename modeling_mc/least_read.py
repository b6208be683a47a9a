# Copyright 2026 the mc-transformers authors.
"""A bounded cache that forgets what is read least: when a segment finishes and all slots are taken, the segment with
the smallest running mean of the gates that it received, over tokens and heads, leaves; the oldest of equals.

Which one leaves depends on the gates of all earlier tokens, so a grid is decided segment after segment; gates need
summaries only, and the memories themselves are still read in parallel.
"""

from dataclasses import dataclass

import torch

from ..kernels.shared.ops import widest
from .borders import Borders
from .cache_layer import MCCacheLayer
from .history import NEVER, Caches, GatesReceived, History, Level
from .segments import rows_where


class Occupants:
    """What stands in the S slots of every row.

    Attributes:
        segment: `[R, S]` int64, number of the segment in the slot, -1 = empty.
        received: `[R, S]` float64, sum over tokens of the mean over heads of the gates that it received. In fp32 the
            sum of a segment that stays would stop growing after some 10^7 tokens.
    """

    def __init__(self, segment: torch.Tensor, received: torch.Tensor) -> None:
        self.segment, self.received = segment, received

    def victim(self, position: torch.Tensor, borders: Borders) -> torch.Tensor:
        """`[R]` the slot that the next finished segment takes, for rows that have written `position` `[R]` tokens."""
        age = position[:, None] - borders.start(self.segment + 1)
        mean = (self.received / age.clamp(min=1)).masked_fill(self.segment < 0, -1.0)
        least = mean == mean.amin(1, keepdim=True)
        return self.segment.masked_fill(~least, torch.iinfo(torch.int64).max).argmin(1)

    def read(self, gates: torch.Tensor, real: torch.Tensor) -> None:
        """Count gates `[R, T, H, S]` of the tokens that `real` `[R, T]` marks."""
        self.received = self.received + (gates.mean(2) * real[..., None]).sum(1)

    def replace(self, slot: torch.Tensor, segment: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Put `segment` `[R]` into `slot` `[R]` of the marked rows; returns the changed places `[R, S]`."""
        changed = (torch.arange(self.segment.shape[1], device=slot.device) == slot[:, None]) & rows[:, None]
        self.segment = torch.where(changed, segment[:, None], self.segment)
        self.received = self.received.masked_fill(changed, 0.0)
        return changed


@dataclass
class Survivors(Caches):
    """Caches of one row per grid segment, and what is left after the last: occupants, and their memories by slot."""

    who: Occupants = None
    after: tuple[torch.Tensor | None, ...] = ()


class LeastReadHistory(History):
    """The cache layer also holds `segment` and `received` of `Occupants`."""

    needs_gates = True
    stands = False

    def num_slots(self, num_tokens: int) -> int:
        return self.max_segments

    def _occupants(self, layer: MCCacheLayer | None, rows: int, device: torch.device) -> Occupants:
        if layer is not None and "segment" in layer.tensors:
            received = layer.tensors["received"].to(widest(device))  # files of earlier versions have fp32
            return Occupants(layer.tensors["segment"], received)
        shape = (rows, self.max_segments)
        return Occupants(torch.full(shape, -1, device=device), torch.zeros(shape, device=device, dtype=widest(device)))

    def begin(self, layer: MCCacheLayer, rows: int, sums_shape: tuple | None, device, dtype) -> None:
        super().begin(layer, rows, sums_shape, device, dtype)
        self._leave_occupants(self._occupants(None, rows, device), layer)

    def _leave_occupants(self, who: Occupants, layer: MCCacheLayer) -> None:
        layer.storage.put("segment", who.segment)
        layer.storage.put("received", who.received)

    def caches(self, levels: list[Level], layer: MCCacheLayer | None, gates_received: GatesReceived) -> Caches:
        table, number, finishes = levels[0].table, levels[0].table.number, levels[0].table.finishes()
        states, summaries, known = self._memories(levels[0], layer, in_order=False)
        rows, old = known.shape
        device = known.device
        who = self._occupants(layer, rows, device)
        last = old + table.num_segments - 1
        place = torch.arange(self.max_segments, device=device).clamp(max=last).expand(rows, -1)  # of the slot's memory
        row = torch.arange(rows, device=device)[:, None]
        places, visible, numbers = [], [], []
        for rank in range(table.num_segments):
            if table.starts is not None:
                who.segment = rows_where(table.starts[:, rank], torch.full_like(who.segment, -1), who.segment)
            taken = who.segment >= 0
            places.append(place)
            visible.append(taken)
            numbers.append(who.segment)
            with torch.no_grad():
                near = None if summaries is None else summaries[row, place]
                who.read(gates_received(rank, near, taken), table.valid[:, rank])
                slot = who.victim(table.borders.start(number[:, rank] + 1), table.borders)
                changed = who.replace(slot, number[:, rank], finishes[:, rank])
            place = torch.where(changed, old + rank, place)
        index = torch.stack(places, 1)  # [R, N, S]
        index = torch.nn.functional.pad(index, (0, 1))
        birth = torch.nn.functional.pad(torch.where(torch.stack(visible, 1), 0, NEVER), (0, 1), value=NEVER)
        folded = [None if x is None else x[row[..., None], index].flatten(0, 1) for x in (*states, summaries)]
        birth = birth.flatten(0, 1)
        after = tuple(None if x is None else x[row, place] for x in (*states, summaries))
        number = torch.nn.functional.pad(torch.stack(numbers, 1), (0, 1)).flatten(0, 1)
        first = torch.zeros_like(birth[:, :1])
        return Survivors(tuple(folded[:-1]), folded[-1], birth, first, number, who=who, after=after)

    def _leave_finished(self, levels, caches: Survivors, layer: MCCacheLayer, row: torch.Tensor) -> None:
        for name, part in zip(self._names(), caches.after, strict=True):
            if part is not None:
                layer.storage.put(name, part)
        self._leave_occupants(caches.who, layer)

    def _readable(self, layer: MCCacheLayer, borders: Borders, slot: torch.Tensor) -> torch.Tensor:
        return layer.tensors["segment"] >= 0

    def _finish(self, layer, borders, segment: torch.Tensor, full: torch.Tensor, real, gates) -> torch.Tensor:
        who = self._occupants(layer, len(full), full.device)
        who.read(gates[:, None], torch.ones_like(full) if real is None else real[:, None])
        slot = who.victim(layer.position + 1, borders)
        who.replace(slot, segment[:, 0], full[:, 0])
        self._leave_occupants(who, layer)
        return slot[:, None]

    def columns(self, layer: MCCacheLayer, borders: Borders) -> torch.Tensor:
        return layer.tensors["segment"]
