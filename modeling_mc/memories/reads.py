# Copyright 2026 the mc-transformers authors.
"""How memories are read: the online one and those of finished segments, for one token or for a whole segment grid."""

import torch
from torch import nn

from ...kernels.read.gates import token_gates
from ...kernels.read.segment import segment_read
from ...kernels.read.selected import segment_route
from ...kernels.step.decode import weigh


State = tuple[torch.Tensor, ...]


def mix_answers(
    past: torch.Tensor, online_gate: torch.Tensor, online: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """The answer of a token from the weighed answers of finished segments and the online one, `[..., H, dv]`.

    Args:
        online_gate: `[..., H]` (eq. 9). scale: `[H]`, cached_answers="added": what the cached answers are multiplied
            with before they are added, and the online answer counts as it is; None = eq. 9.
    """
    if scale is None:
        return past + online_gate[..., None].to(past.dtype) * online
    return online + scale[:, None].to(past.dtype) * past


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    """Of one tensor or more."""
    return sum(parts[1:], parts[0])


class Reads(nn.Module):
    """The half of a `Memory` that answers queries; `Memory` says what a subclass must and may have of it."""

    own_gates = False

    def read(self, state: State, q: torch.Tensor) -> torch.Tensor:
        """M(q) `[..., H, dv]` of states `[..., H, ...]` for queries `[..., H, dk]` that broadcast against them."""
        raise NotImplementedError

    def read_cached(self, state: State, q: torch.Tensor) -> torch.Tensor:
        """The same of a finished segment's memory, for memories that answer differently then (`own_gates`)."""
        return self.read(state, q)

    def token_read(self, q, u, online, online_logit, kept, summaries, visible, index, top_k, function, scale=None):
        """Answers of one token per row from its running state and the kept ones, and the slots that were read; see
        `kernels.step.decode`. online: the leading tensors of the running state. kept: `Kept` of storage.py. scale: see
        `mix_answers`."""
        answer = self.read(online, q)
        q = answer if self.own_gates else q
        gates, online_gate, index = token_gates(u, online_logit, summaries, visible, index, top_k, function)
        pieces = kept.pieces() if index is None else [(slice(None), kept.chosen(index))]
        past = sum_of([weigh(gates[..., s], self.read_cached(x, q[:, None])) for s, x in pieces])
        return mix_answers(past, online_gate, answer, scale), index

    def token_soup(self, q, u, online, online_logit, kept, summaries, visible, index, top_k, function):
        """Memory Soup for one token per row, eq. 15 letter by letter: answers of one set of mixed parameters per row.
        Args: as in `token_read`."""
        gates, online_gate, _ = token_gates(u, online_logit, summaries, visible, index, top_k, function)
        past: list[torch.Tensor | None] = [None] * kept.num
        for part, states in kept.pieces():
            for i, state in enumerate(states):
                more = (gates[..., part, None] * state.transpose(1, 2).flatten(3)).sum(2)
                past[i] = more if past[i] is None else past[i] + more
        mixed = tuple(
            total.view_as(now) + online_gate.view(*online_gate.shape, *[1] * (now.dim() - 2)) * now
            for total, now in zip(past, online, strict=False)
        )
        return self.read(mixed, q)

    def map_read(self, index: int, x, u, states, summaries, online_logit, birth, first, function):
        """The part of finished segments in a soup's linear map number `index`, and the online gate; see
        `kernels.read.segment`. x: the map's inputs."""
        gating = (summaries, online_logit, birth, first, function)
        return segment_read(x, u, states[index], *gating, self.backend)

    def route(self, u, summaries, birth, first, top_k):
        """The finished segments that tokens choose (eq. 16), see `kernels.read.selected`."""
        return segment_route(u, summaries, birth, first, top_k, self.backend)

    def between(self, index: int, z: torch.Tensor) -> torch.Tensor:
        """The pointwise function after map number `index` (soup of memories with several maps)."""
        raise NotImplementedError

    def finish(self, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """M(q) from the last map's output r (soup of memories with several maps)."""
        raise NotImplementedError

    def soup_read(self, q, u, online, states, summaries, online_logit, birth, first, function):
        """The answer of states mixed token by token (eq. 15); as `gated_read`, and online: the leading tensors of the
        online states `[R, N, W, H, ...]`."""
        raise NotImplementedError

    def gated_read(self, q, u, states, summaries, online_logit, birth, first, function):
        """GRM's past part and online gate, see `kernels.read.segment`; states is the cached part of the state."""
        raise NotImplementedError

    def selected_read(self, q, weights, states, index):
        """Weighted sum over chosen memories, see `kernels.read.selected`."""
        raise NotImplementedError

    def constant_read(self, q: torch.Tensor, states: State, visible: torch.Tensor) -> torch.Tensor:
        """Sum of the answers of all visible memories; visible `[R, N, S]` bool (eq. 7)."""
        raise NotImplementedError
