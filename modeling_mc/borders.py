# Copyright 2026 the mc-transformers authors.
"""Borders: where the segments of a sequence end. The one place that says which segment a token belongs to, how far in
it stands, whether it is the last one, and how many tokens a segment has."""

from dataclasses import dataclass, replace

import torch


Number = int | torch.Tensor
NEVER = 2**48  # where a segment ends that has not ended


@dataclass(frozen=True)
class Borders:
    """A border after every `size` tokens of a sequence.

    Positions count the tokens of a sequence from 0, padding left out; segments are counted from 0. Both are numbers or
    int64 tensors `[R, ...]`, one row per row of the batch, and so are the answers.

    Attributes:
        size: tokens per segment; or a tensor `[L]`, one for each level, against which positions `[R, 1]` broadcast.
    """

    size: Number

    @classmethod
    def of(cls, config) -> "Borders":
        """The borders of a model's memory layers, as far as its config tells."""
        if config.segmentation == "content":
            return Bounds(config.segment_size, config.least_segment_size)
        return cls(config.segment_size)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Borders":
        """The same on another device."""
        return self

    def of_rows(self, rows: torch.Tensor | slice) -> "Borders":
        """The borders of the sequences `rows` (`[R]` int64, or a slice) of those that these are of."""
        return self

    @property
    def left(self) -> dict[str, torch.Tensor]:
        """What a cache has to hold, beside positions, so that the next piece knows where its segments are."""
        return {}

    # ---------------------------------------------------------------------------------------------- of one token
    def finished(self, position: Number) -> Number:
        """Segments that end before this token, which is also the number of the segment that it belongs to."""
        return position // self.size

    def offset(self, position: Number) -> Number:
        """Tokens of its segment before this one."""
        return position % self.size

    def full(self, position: Number) -> Number:
        """Whether this token is the last of its segment."""
        return (position + 1) % self.size == 0

    # ------------------------------------------------------------------------------------------- of one segment
    def start(self, segment: Number) -> Number:
        """Position of its first token."""
        return segment * self.size

    def count(self, segment: Number) -> Number:
        """Its tokens, once it is finished. A plain number if all segments have the same."""
        return self.size

    # ------------------------------------------------------------------------------------------------- of shapes
    @property
    def longest(self) -> Number:
        """The most tokens that a segment can have."""
        return self.size

    @property
    def least(self) -> int:
        """The fewest tokens that a finished segment can have."""
        return self.size

    def most_finished(self, num_tokens: int) -> int:
        """The most segments that a sequence of `num_tokens` tokens can have finished."""
        return num_tokens // self.least

    def most_begun(self, num_tokens: int, anywhere: bool = False) -> int:
        """The most segments that `num_tokens` >= 1 tokens in a row can stand in. Their first begins a segment, or is
        `anywhere` in one."""
        first = int(anywhere)
        return first - (first - num_tokens) // self.least

    # ------------------------------------------------------------------------------------------------- of levels
    def coarser(self, factor: Number) -> "Borders":
        """Borders of segments that are `factor` times as long (one level of logarithmic segmentation)."""
        return Borders(self.size * factor)

    def levels(self, num: int, device: torch.device) -> "Borders":
        """Borders of `num` levels at once, level l with segments 2^l times as long."""
        return self if num == 1 else self.coarser(1 << torch.arange(num, device=device))


@dataclass(frozen=True, eq=False)
class Bounds(Borders):
    """Segments of `shortest` to `size` tokens whose borders are not known here: what sizes follow from.

    Raises:
        ValueError: (all questions about a token or a segment) where it ends is not known here.
    """

    shortest: int

    def _unknown(self, *args) -> Number:
        raise ValueError(
            "`segmentation`='content' has borders that only a forward and its cache know, allowed: 'constant' or "
            "'logarithmic'"
        )

    finished = offset = full = start = count = coarser = _unknown

    @property
    def least(self) -> int:
        return self.shortest


@dataclass(frozen=True, eq=False)
class Decided(Bounds):
    """Borders that were chosen for the tokens of one forward, differently in every row.

    S sequences stand in R rows of T compact tokens: one in each, or packed documents in one. Segments that ended
    before this forward are known by their number only.

    Attributes:
        ends: `[R, n + 1]` int64, how many tokens of the row stand before the i-th border; `NEVER` behind the last.
        before: `[R, T + 1]` int64, borders before the t-th token of the row.
        row, place: `[S]` int64, where a sequence stands: its row, and its first token there.
        position: `[S]` int64, tokens of the sequence before this forward.
        number, begin: `[S]` int64, of the segment that goes on: how many were finished before it, and the position of
            its first token.
        after: what `left` returns.
        most: segments that a row stands in, where that may be read back; None = as many as there can be.
    """

    ends: torch.Tensor
    before: torch.Tensor
    row: torch.Tensor
    place: torch.Tensor
    position: torch.Tensor
    number: torch.Tensor
    begin: torch.Tensor
    after: dict[str, torch.Tensor]
    most: int | None = None

    @property
    def left(self) -> dict[str, torch.Tensor]:
        return self.after

    def _like(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Attribute `name` `[S]` against `x` `[S, ...]`."""
        return getattr(self, name).view(-1, *[1] * (x.dim() - 1))

    def finished(self, position: torch.Tensor) -> torch.Tensor:
        row, place = self._like(position, "row"), self._like(position, "place")
        last = self.before.shape[1] - 1
        index = (position - self._like(position, "position") + place).clamp(0, last)
        return self._like(position, "number") + self.before[row, index] - self.before[row, place]

    def start(self, segment: torch.Tensor) -> torch.Tensor:
        row, place = self._like(segment, "row"), self._like(segment, "place")
        rank = segment - self._like(segment, "number")
        index = (self.before[row, place] + rank - 1).clamp(0, self.ends.shape[1] - 1)
        start = self.ends[row, index] - place + self._like(segment, "position")
        return torch.where(rank > 0, start, self._like(segment, "begin"))

    def offset(self, position: torch.Tensor) -> torch.Tensor:
        return position - self.start(self.finished(position))

    def full(self, position: torch.Tensor) -> torch.Tensor:
        return self.start(self.finished(position) + 1) == position + 1

    def count(self, segment: torch.Tensor) -> torch.Tensor:
        return self.start(segment + 1) - self.start(segment)

    def most_begun(self, num_tokens: int, anywhere: bool = False) -> int:
        bound = super().most_begun(num_tokens, anywhere)
        return bound if self.most is None else min(bound, self.most)

    def of_rows(self, rows: torch.Tensor | slice) -> "Decided":
        names = ("row", "place", "position", "number", "begin")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def to(self, device: torch.device, non_blocking: bool = False) -> "Decided":
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in vars(self).items() if torch.is_tensor(x)}
        left = {name: x.to(device, non_blocking=non_blocking) for name, x in self.after.items()}
        return replace(self, **moved, after=left)
