# Copyright 2026 the mc-transformers authors.
"""Gates as users see them (`output_attentions`): by segment of the text, the online memory in the last place."""

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class GateLog:
    """Where a layer leaves what it reads.

    Attributes:
        columns: S, columns of past memories. pieces: `[R, t, H, S + 1]`, together the gates of all tokens.
    """

    columns: int
    pieces: list[torch.Tensor] = field(default_factory=list)


class ReadGates(nn.Module):
    """Passes the gates of a layer on; Transformers hooks into it when attentions are asked for."""

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """`[B, H, T, S + 1]`, as they are."""
        return gates


def by_segment(past: torch.Tensor, online: torch.Tensor, number: torch.Tensor, columns: int) -> torch.Tensor:
    """Gates `[B, T, H, columns + 1]` with one column per segment of the text and one for the online memory.

    Args:
        past: `[B, T, H, S]`, 0 where a memory is not read. online: `[B, T, H]`. number: `[B, S]` int64, the column of
            each memory; it may be anything where nobody reads it.
    """
    place = number.clamp(0, columns)[:, None, None].expand_as(past)
    found = past.new_zeros(*past.shape[:-1], columns + 1).scatter_add(-1, place, past)
    return torch.cat([found[..., :columns], online[..., None]], -1)
