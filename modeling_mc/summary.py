# Copyright 2026 the mc-transformers authors.
"""Segment descriptors: what the content gates know of a segment."""

from functools import partial

import torch

from ..kernels.shared.ops import compute_dtype, running_sum
from ..kernels.shared.recompute import recomputed
from .borders import Borders, Number
from .segments import SegmentTable


class Summary:
    """Running segment descriptor: per head, the mean of the keys of each of m equal sub-blocks of a segment.

    Sub-blocks are m equal parts of the longest segment; the last ones of a shorter segment hold no token.
    """

    def __init__(self, borders: Borders, num_blocks: int) -> None:
        self.num_blocks, self.block = num_blocks, borders.longest // num_blocks

    def counts(self, offset: torch.Tensor) -> torch.Tensor:
        """`[..., m]` tokens in every sub-block once the token at `offset` `[...]` is written."""
        if self.num_blocks == 1:
            return offset[..., None] + 1
        block = self.block if isinstance(self.block, int) else self.block[..., None]
        begin = torch.arange(self.num_blocks, device=offset.device) * block
        return (offset[..., None] + 1 - begin).clamp(min=0).clamp(max=block)

    def _best(self, products: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Largest `<u, mean>` over the sub-blocks that have begun; products `[..., H, m]`, counts `[..., 1, m]`."""
        return (products / counts.clamp(min=1)).masked_fill(counts == 0, float("-inf")).amax(-1)

    def mean(self, sums: torch.Tensor, count: Number) -> torch.Tensor:
        """Descriptors of segments of `count` tokens from their sums `[..., H, m, du]`.

        Args:
            count: `[...]` int64, at least 1; or one number, for segments as long as they can be.
        """
        if isinstance(count, int):
            return sums / self.block
        counts = self.counts(count - 1)[..., None, :, None]
        mean = sums / counts.clamp(min=1).to(sums.dtype)
        # a sub-block without a token repeats the first one, so that it never wins the segment's score
        return torch.where(counts > 0, mean, mean[..., :1, :])

    def grid(
        self, u: torch.Tensor, source: torch.Tensor, table: SegmentTable, sums: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Online logits of a grid and the sums after every grid segment, in fp32. Only the arguments are kept for the
        backward.

        Args:
            u: `[R, N, W, H, du]`. source: `[R, N, W, H, du]`, zero where there is no token.
            sums: `[R, H, m, du]`, of the segment that the first grid segment resumes, or None.

        Returns:
            `[R, N, W, H]` and `[R, N, H, m, du]`.
        """
        ends = torch.stack([part.sum(2) for part in self._parts(source.to(compute_dtype(source)), table)], 3)
        if sums is not None:
            ends = ends + self._first(table, ends)[..., None, None, None] * sums[:, None]
        return recomputed(partial(self._logits, table), u, source, sums), ends

    def _parts(self, source: torch.Tensor, table: SegmentTable) -> list[torch.Tensor]:
        """What of `[R, N, W, H, du]` is in each of the m sub-blocks."""
        if self.num_blocks == 1:
            return [source]
        block = table.offset // self.block
        return [source * (block == index)[..., None, None] for index in range(self.num_blocks)]

    @staticmethod
    def _first(table: SegmentTable, like: torch.Tensor) -> torch.Tensor:
        """`[N]`, one for the first grid segment."""
        return (torch.arange(table.num_segments, device=like.device) == 0).to(like.dtype)

    def _logits(
        self, table: SegmentTable, u: torch.Tensor, source: torch.Tensor, sums: torch.Tensor | None
    ) -> torch.Tensor:
        products = []
        for index, part in enumerate(self._parts(source.to(compute_dtype(source)), table)):
            total = running_sum(part, 2)
            if sums is not None:
                total = total + self._first(table, total)[:, None, None, None] * sums[:, None, None, :, index]
            products.append((u.to(total.dtype) * total).sum(-1))
        return self._best(torch.stack(products, -1), self.counts(table.offset)[..., None, :])

    def token(self, u: torch.Tensor, sums: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Online logit `[B, H]` from sums `[B, L, H, m, du]` of all levels that already hold the token at `offset`
        `[B, L]`: level 0 answers."""
        products = (u[..., None, :].to(sums.dtype) * sums[:, 0]).sum(-1)
        if self.num_blocks == 1:
            return products[..., 0] / (offset[:, :1] + 1)
        return self._best(products, self.counts(offset)[:, 0, None])

    def add(self, sums: torch.Tensor, source: torch.Tensor, offset: torch.Tensor, begins: bool = True) -> torch.Tensor:
        """Sums `[B, L, H, m, du]` of all levels with one more token `[B, H, du]`, at `offset` `[B, L]` of segments; a
        new segment starts from zero. `begins`: whether there may be one."""
        kept = torch.where((offset == 0)[..., None, None, None], 0, sums) if begins else sums
        if self.num_blocks == 1:
            return kept + source[:, None, :, None].to(sums.dtype)
        here = torch.arange(self.num_blocks, device=offset.device) == (offset // self.block)[..., None]
        return kept + here[:, :, None, :, None].to(sums.dtype) * source[:, None, :, None].to(sums.dtype)
