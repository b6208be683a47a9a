# Copyright 2026 the mc-transformers authors.
"""Borders: where the segments of a sequence end. The one place that says which segment a token belongs to, how far in
it stands, whether it is the last one, and how many tokens a segment has."""

from dataclasses import dataclass

import torch


Number = int | torch.Tensor


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
        """The borders of a model's memory layers."""
        return cls(config.segment_size)

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

    def most_finished(self, num_tokens: int) -> int:
        """The most segments that a sequence of `num_tokens` tokens can have finished."""
        return num_tokens // self.size

    def most_begun(self, num_tokens: int, anywhere: bool = False) -> int:
        """The most segments that `num_tokens` >= 1 tokens in a row can stand in. Their first begins a segment, or is
        `anywhere` in one."""
        first = int(anywhere)
        return first - (first - num_tokens) // self.size

    # ------------------------------------------------------------------------------------------------- of levels
    def coarser(self, factor: Number) -> "Borders":
        """Borders of segments that are `factor` times as long (one level of logarithmic segmentation)."""
        return Borders(self.size * factor)

    def levels(self, num: int, device: torch.device) -> "Borders":
        """Borders of `num` levels at once, level l with segments 2^l times as long."""
        return self if num == 1 else self.coarser(1 << torch.arange(num, device=device))
