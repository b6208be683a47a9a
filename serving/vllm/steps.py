# Copyright 2026 the mc-transformers authors.
"""What a step of the scheduler asks of the memory layers: pieces of requests, put together into calls of the mixers.

A request's tokens are cut at the ends of blocks where other requests may want to go on from there (prefix caching), so
that every full block holds what its tokens left. Pieces that need nothing of each other go together, those of similar
length as the rows of one batch; decoding is the case of pieces of one token.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from ...modeling_mc.borders import Borders
from ...modeling_mc.history import History
from ...modeling_mc.segments import SegmentTable


@dataclass(frozen=True)
class Piece:
    """Tokens `begin` ... `end - 1` of request number `row`, which stand at `place` ... of the step."""

    row: int
    place: int
    begin: int
    end: int

    @property
    def kind(self) -> tuple[bool, int]:
        """Pieces of the same kind may be rows of one call: whether it begins the request, and roughly how long it is
        (padding at most doubles a call)."""
        return self.begin == 0, (self.end - self.begin).bit_length()


def cut(
    starts: list[int], before: list[int], borders: Borders | None, blocks: list[list[int]] | None = None
) -> list[list[Piece]]:
    """Pieces in waves: what one wave has written, those behind it read.

    Args:
        starts: `[R + 1]`, where the tokens of each request stand. before: `[R]`, tokens that each has written.
        borders: of what is not to be passed in one piece; None = of nothing.
        blocks: the numbers of each request's blocks, one for every stretch between `borders`. A request may begin
            behind blocks that another one fills in this very step; it then waits for them. None = nobody shares.
    """
    waves: list[list[Piece]] = []
    written: dict[int, int] = {}  # the wave that fills a block
    rows = range(len(before))
    if blocks is not None:  # who fills a block begins before who shares it
        rows = sorted(rows, key=before.__getitem__)
    for row in rows:
        place, begin, number = starts[row], before[row], 0
        last = begin + starts[row + 1] - place
        if blocks is not None:
            shared = blocks[row][: borders.finished(begin)]
            number = max((written[block] + 1 for block in shared if block in written), default=0)
        while begin < last:
            end = last if borders is None else min(last, borders.start(borders.finished(begin) + 1))
            waves += [[] for _ in range(number + 1 - len(waves))]
            waves[number].append(Piece(row, place, begin, end))
            if blocks is not None:
                written[blocks[row][borders.finished(begin)]] = number
            number, place, begin = number + 1, place + end - begin, end
    return waves


@dataclass
class Finished:
    """Segments that are finished, for a call whose cache layers have S slots.

    Attributes:
        blocks, places: `[R, S]` int64, where the segment of every slot is kept: the block, and the place in it.
        absent: `[R, S]` bool, slots without one.
        rows, slots: `[n]` int64, the segments that this call finishes. into, into_places: `[n]`, where to keep them.
    """

    blocks: torch.Tensor
    places: torch.Tensor
    absent: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    into: torch.Tensor
    into_places: torch.Tensor

    @classmethod
    def of(
        cls,
        before: torch.Tensor,
        after: torch.Tensor,
        blocks: torch.Tensor,
        borders: Borders,
        per_block: int,
        slots: int,
    ) -> "Finished":
        """Args: before, after: `[R]` on the host. blocks: `[R, W]`, of the rows. slots: S; segment i is kept in slot i
        modulo S."""
        device, old, new = blocks.device, borders.finished(before)[:, None], borders.finished(after)[:, None]
        slot = torch.arange(slots)
        segment = old - 1 - (old - 1 - slot) % slots  # the last one of those that belong into a slot
        fresh = new - 1 - (new - 1 - slot) % slots
        rows, columns = torch.nonzero(fresh >= old, as_tuple=True)
        known, done = segment.clamp(min=0), fresh[rows, columns]
        return cls(
            blocks=blocks.gather(1, (known // per_block).to(device)),
            places=(known % per_block).to(device),
            absent=(segment < 0).to(device),
            rows=rows.to(device),
            slots=columns.to(device),
            into=blocks[rows.to(device), (done // per_block).to(device)],
            into_places=(done % per_block).to(device),
        )


@dataclass
class Call:
    """Pieces that go through every mixer together, one row each.

    Attributes:
        tokens: `[n]` int64, where their tokens stand in the step. mask: `[R, T]` bool, the rows' tokens; None = all.
        table: the segment table, for all layers.
        room: tokens of the longest row once the call is done.
        begins: the rows are new requests.
        read: `[R]` int64, blocks of the last token before. write: `[R]`, blocks of the last token.
        anew: `[R, 1]` bool, rows that begin a segment; None = none does.
        finished: of layers whose blocks hold segments one by one, else None.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    table: SegmentTable
    room: int
    begins: bool
    read: torch.Tensor
    write: torch.Tensor
    anew: torch.Tensor | None
    finished: Finished | None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[R, T, hidden]` of a step's hidden states `[tokens, hidden]`."""
        rows = x[self.tokens]
        if self.mask is None:
            return rows.view(-1, self.table.num_tokens, x.shape[-1])
        return rows.new_zeros(*self.mask.shape, x.shape[-1]).masked_scatter_(self.mask[..., None], rows)

    def scatter(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """Put answers `[R, T, hidden]` into their places of `out` `[tokens, hidden]`."""
        out[self.tokens] = y.flatten(0, 1) if self.mask is None else y[self.mask]


@dataclass(frozen=True)
class Planner:
    """Makes the calls of a step.

    Attributes:
        history: of the mixers, which are all alike. align: of their memories.
        by_segment: whether blocks hold segments one by one. per_block: segments that a block is long.
        cuts: no piece goes on behind the end of a block.
    """

    history: History
    align: int
    by_segment: bool
    per_block: int
    cuts: bool

    def calls(self, starts: list[int], before: list[int], blocks: torch.Tensor) -> list[Call]:
        """In their order. Args: starts, before: as in `cut`. blocks: `[requests, W]` int64, in the order of their
        tokens."""
        found, ends = [], self.history.borders.coarser(self.per_block)
        # a request that has just found its beginning stands at the end of a block; only then numbers are looked at
        sharing = self.cuts and len(before) > 1 and any(n and ends.offset(n) == 0 for n in before)
        for wave in cut(starts, before, ends if self.cuts else None, blocks.tolist() if sharing else None):
            kinds: dict[tuple, list[Piece]] = defaultdict(list)
            for piece in wave:
                kinds[piece.kind].append(piece)
            found += [self._call(pieces, blocks) for pieces in kinds.values()]
        return found

    def _call(self, pieces: list[Piece], blocks: torch.Tensor) -> Call:
        """Of pieces of the same kind."""
        device, borders = blocks.device, self.history.borders
        ends = borders.coarser(self.per_block)
        lengths = [piece.end - piece.begin for piece in pieces]
        size, begins = max(lengths), pieces[0].begin == 0
        tokens = [torch.arange(piece.place, piece.place + n) for piece, n in zip(pieces, lengths, strict=True)]
        before, after = torch.tensor([p.begin for p in pieces]), torch.tensor([p.end for p in pieces])
        mask = None
        if min(lengths) < size:
            mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).to(device)
        rows = torch.tensor([piece.row for piece in pieces], device=device)
        position = None if begins else before.to(device)
        anew, room = (borders.offset(before) == 0)[:, None], int(after.max())
        finished = None
        if self.by_segment:
            kept = (before, after, blocks[rows], borders, self.per_block)
            finished = Finished.of(*kept, self.history.num_slots(room))
        return Call(
            tokens=torch.cat(tokens).to(device),
            mask=mask,
            table=SegmentTable.build(len(pieces), size, borders.size, device, mask, position, align=self.align),
            room=room,
            begins=begins,
            read=blocks[rows, ends.finished(before - 1).clamp(min=0).to(device)],
            write=blocks[rows, ends.finished(after - 1).to(device)],
            anew=anew.to(device) if bool(anew.any()) else None,
            finished=finished,
        )
