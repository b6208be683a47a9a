# Copyright 2026 the mc-transformers authors.
"""Where one token per row stands: asked once per forward, and the same for all layers."""

import torch

from ..kernels.shared.ops import unobserved
from .borders import Borders


class Moment:
    """The next token of B rows, in the segments of L levels.

    Attributes:
        first: borders of level 0. borders: of all levels.
        position: `[B]` int64, tokens that each row has written before. written: `[B]`, and with this one.
        real: `[B]` bool, rows that have a token now; None = all.
        segment, offset: `[B, L]` int64, the segment it belongs to, and tokens of that before it.
        full: `[B, L]` bool, real tokens that are the last of their segment.
        begins, ends: whether a token of any row may be the first, or the last, of a segment. Where asking is for
            nothing (a CPU) False is an answer that saves work; elsewhere both are True.
        visible: `[B, S]` bool, finished segments that each row may read, once a layer has asked; None = not yet.
    """

    def __init__(self, first: Borders, levels: int, position: torch.Tensor, real: torch.Tensor | None) -> None:
        self.first, self.borders = first, first.levels(levels, position.device)
        self.position, self.real = position.clone(), real  # the first layer changes the counter of a static cache
        place = self.position[:, None]
        self.segment, self.offset = self.borders.finished(place), self.borders.offset(place)
        full = self.borders.full(place)
        self.full = full if real is None else full & real[:, None]
        self.written = self.position + (1 if real is None else real)
        asked = position.device.type == "cpu" and not unobserved()
        self.begins = not asked or not bool(self.offset.all())
        self.ends = not asked or bool(self.full.any())
        self.visible: torch.Tensor | None = None
