# Copyright 2026 the mc-transformers authors.
"""A write rule without kernels: `initial_state`, `step` and `read` are all that it needs. Slow, and right.

Tokens are written one after the other, and every token reads every memory. A rule that has shown its worth gets a
`write` that is parallel over tokens; where its answers are linear in a matrix, `MatrixMemory` has the reads.
"""

from dataclasses import dataclass

import torch

from ...kernels.read.gates import grid_gates
from ...kernels.shared.ops import compute_dtype
from ..segments import SegmentTable, rows_where
from .base import Memory, State, Trace


@dataclass
class PlainTrace(Trace):
    """`states`: what reads the memory after every token, tensors `[R, N, W, H, ...]`."""

    states: State


class PlainMemory(Memory):
    """`Memory` with a `write` and all reads made from a subclass's `step` and `read`.

    Set `num_maps = 1` where answers are linear in the state: `soup` is then `grm`, which costs less.
    """

    num_maps = 0

    def write(self, q, k, v, gates, table: SegmentTable, state: State | None, carry: bool) -> PlainTrace:
        fresh = self.initial_state(len(k), k.device, compute_dtype(k))
        state, states, ends = fresh if state is None else state, [], []
        for n in range(k.shape[1]):
            if n > 0 and not carry:
                state = fresh
            elif carry and table.starts is not None:
                state = self._where(table.starts[:, n], fresh, state)
            for w in range(k.shape[2]):
                token = {name: gate[:, n, w] for name, gate in gates.items()}
                state = self._where(table.valid[:, n, w], self.step(state, k[:, n, w], v[:, n, w], token), state)
                states.append(state[: self.num_read])
            ends.append(state)
        states, ends = (tuple(torch.stack(parts, 1) for parts in zip(*x, strict=True)) for x in (states, ends))
        states = tuple(x.unflatten(1, k.shape[1:3]) for x in states)
        return PlainTrace(self.read(states, q).to(q.dtype), ends, states)

    @staticmethod
    def _where(rows: torch.Tensor, new: State, old: State) -> State:
        return tuple(rows_where(rows, a, b) for a, b in zip(new, old, strict=True))

    def _answers(self, states: State, q: torch.Tensor) -> torch.Tensor:
        """What all S memories answer to all queries, `[R, N, W, S, H, dv]`."""
        return self.read_cached(tuple(x[:, None, None] for x in states), q[:, :, :, None])

    def gated_read(self, q, u, states, *gating):
        past, online = grid_gates(u, *gating)
        return torch.einsum("rnwhs,rnwshv->rnwhv", past, self._answers(states, q)).to(q.dtype), online

    def soup_read(self, q, u, online, states, *gating):
        past, now = grid_gates(u, *gating)
        mixed = tuple(
            torch.einsum("rnwhs,rshx->rnwhx", past, kept.flatten(3)).view_as(one)
            + now.view(*now.shape, *[1] * (one.dim() - 4)) * one
            for kept, one in zip(states, online, strict=True)
        )
        return self.read(mixed, q).to(q.dtype)

    def selected_read(self, q, weights, states, index):
        answers = self._answers(states, q).transpose(3, 4)  # [R, N, W, H, S, dv]
        chosen = answers.gather(4, index.clamp(min=0)[..., None].expand(*index.shape, answers.shape[-1]))
        return (chosen * weights[..., None].to(chosen.dtype)).sum(4).to(q.dtype)

    def constant_read(self, q: torch.Tensor, states: State, visible: torch.Tensor) -> torch.Tensor:
        answers = self._answers(states, q)
        return torch.einsum("rns,rnwshv->rnwhv", visible.to(answers.dtype), answers).to(q.dtype)
