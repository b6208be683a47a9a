# Copyright 2026 the mc-transformers authors.
"""The read rule (eq. 5): online answer and cached memories, mixed by constant gates, content gates or a top-k choice.

Two forms of the same rule: `Aggregation.mix` for a whole segment grid, through the kernels, and
`Aggregation.mix_token` for one token per row, which decoding uses and which specifies the first form.
"""

import torch

from ..kernels.read.gates import (
    CONSTANT,
    apply_gates,
    content_gates,
    first_readable,
    hidden_memories,
    logits_of_chosen,
)
from .history import Caches
from .memories import Memory, State, Trace, mix_answers
from .memories.reads import sum_of
from .storage import Kept


BLOCK = 32  # segments that are read at a time where all memories count alike


class Aggregation:
    """Everything that `aggregation`, `gate_function` and `num_selected_segments` of the config decide."""

    def __init__(self, config, memory: Memory) -> None:
        self.kind = config.aggregation
        constant = memory.own_gates and not memory.weighs_choice
        self.gate_function = CONSTANT if constant else config.gate_function
        self.top_k, self.memory = config.num_selected_segments, memory  # a schedule changes top_k in training
        self.shares_routes = config.route_sharing == "model"
        self.uses_cache = self.kind != "none"
        # a memory with gates of its own needs ours only to choose
        self.uses_gates = self.kind == "ssc" or (self.kind in ("grm", "soup") and not memory.own_gates)

    # -------------------------------------------------------------------------------------------------- whole grid
    def mix(
        self,
        q: torch.Tensor,
        u: torch.Tensor | None,
        trace: Trace,
        online_logit: torch.Tensor | None,
        caches: Caches,
        routes: dict,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[R, N, W, H, dv]` from queries `[R, N, W, H, dk]`, u `[R, N, W, H, du]` and logits `[R, N, W, H]`.

        `caches` has R rows, or R * N rows of one grid segment each when every segment has memories of its own.
        `routes` holds the choices of earlier layers of this forward. `scale`: see `memories.mix_answers`.
        """
        if not self.uses_cache:
            return trace.online
        q = trace.online if self.memory.own_gates else q
        rows, grid = (len(caches.first), caches.first.shape[1]), q.shape[:2]

        def fold(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(*rows, *x.shape[2:])

        if not self.uses_gates:
            past, count = self._read_alike(fold(q), caches)
            total = fold(trace.online) + (past if scale is None else scale[:, None].to(past.dtype) * past)
            if self.kind == "mean":
                total = total / (count + 1).to(total.dtype)[:, :, None, None, None]
            return total.reshape(*grid, *total.shape[2:])
        gating = (fold(online_logit), caches.birth, caches.first, self.gate_function)
        if self.kind == "soup" and self.memory.num_maps > 1:
            return self._soup(q, fold(u), trace, caches, gating, fold)
        if self.kind == "soup" and self.memory.num_maps == 0:
            online = tuple(map(fold, trace.states))
            out = self.memory.soup_read(fold(q), fold(u), online, caches.states, caches.summaries, *gating)
            return out.reshape(*grid, *out.shape[2:])
        if self.kind == "ssc":
            past, online_gate = self._select(fold(q), fold(u), caches, *gating, routes)
        else:
            past, online_gate = self.memory.gated_read(fold(q), fold(u), caches.states, caches.summaries, *gating)
        total = mix_answers(past, online_gate, fold(trace.online), scale)
        return total.reshape(*grid, *total.shape[2:])

    def _read_alike(self, q: torch.Tensor, caches: Caches) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the answers `[R, N, W, H, dv]` of all memories that a grid segment may read (eq. 7), and their
        number `[R, N]`. On a CPU blocks of segments look at what they may read only: a bounded cache and packed
        documents cost what their bound says."""
        num, slots = q.shape[1], caches.birth.shape[1]
        in_blocks = q.device.type == "cpu" and num > BLOCK and not torch.compiler.is_compiling()
        first, step = (first_readable(caches.first), BLOCK) if in_blocks else ([0] * num, num)
        past, count = [], []
        for start in range(0, num, step):
            stop = min(start + step, num)  # the end states of the grid come last, and only later segments see them
            segments, seen = slice(start, stop), slice(min(first[start:stop]), slots - num + stop)
            visible = ~hidden_memories(caches.birth, caches.first, segments, seen)
            states = tuple(state[:, seen] for state in caches.states)
            past.append(self.memory.constant_read(q[:, segments], states, visible))
            count.append(visible.sum(-1))
        return torch.cat(past, 1), torch.cat(count, 1)

    def _soup(self, q, u, trace, caches, gating, fold):
        """Mixed parameters (eq. 15) map by map: no token's own weights are ever built."""
        x = q
        for index in range(self.memory.num_maps):
            past, online_gate = self.memory.map_read(index, fold(x), u, caches.states, caches.summaries, *gating)
            mixed = mix_answers(past, online_gate, fold(trace.read_map(index, x)), None)
            mixed = mixed.reshape(*q.shape[:2], *mixed.shape[2:])
            x = mixed if index == self.memory.num_maps - 1 else self.memory.between(index, mixed)
        return self.memory.finish(q, x)

    def _select(self, q, u, caches, online_logit, birth, first, function, routes):
        index = routes.get("grid")  # the first layer's choice, where all layers share it
        if index is None:
            index, logits = self.memory.route(u, caches.summaries, birth, first, self.top_k)
            if self.shares_routes:
                routes["grid"] = index
        else:
            logits = logits_of_chosen(u, caches.summaries, index)
        gates, online_gate = apply_gates(logits, online_logit, function)
        return self.memory.selected_read(q, gates, caches.states, index), online_gate

    # --------------------------------------------------------------------------------------------------- one token
    def mix_token(
        self,
        q: torch.Tensor,
        u: torch.Tensor | None,
        online: State,
        online_logit: torch.Tensor | None,
        kept: Kept | None,
        summaries: torch.Tensor | None,
        visible: torch.Tensor | None,
        routes: dict,
        time: int,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Answers `[B, H, dv]` of one token per row; `time` tells the tokens of one forward apart in `routes`.

        Args:
            q, u: `[B, H, d]`. online: the state that already holds the token. online_logit: `[B, H]`.
            kept: S cached memories per row. summaries: `[B, S, H, m, du]`. visible: `[B, S]` bool, those it may read.
            scale: `[H]` or None, see `memories.mix_answers`.
        """
        memory, online = self.memory, online[: self.memory.num_read]
        if not self.uses_gates:
            answer = memory.read(online, q)
            if not self.uses_cache:
                return answer
            weight, q = visible.to(answer.dtype), answer if memory.own_gates else q
            parts = [(weight[:, slots], memory.read_cached(x, q[:, None])) for slots, x in kept.pieces()]
            past = sum_of([torch.einsum("bs,bshv->bhv", *part) for part in parts])
            past = past if scale is None else scale[:, None] * past
            return (answer + past) / (weight.sum(1)[:, None, None] + 1 if self.kind == "mean" else 1)
        index = routes.get(time) if self.shares_routes else None
        gating = (summaries, visible, index, self.top_k if self.kind == "ssc" else 0, self.gate_function)
        if self.kind == "soup":
            return memory.token_soup(q, u, online, online_logit, kept, *gating)
        out, index = memory.token_read(q, u, online, online_logit, kept, *gating, scale)
        if self.shares_routes:
            routes[time] = index
        return out

    # ----------------------------------------------------------------------------------------- who reads how much
    def gates(
        self,
        u: torch.Tensor | None,
        online_logit: torch.Tensor | None,
        summaries: torch.Tensor | None,
        visible: torch.Tensor,
        scale: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What T tokens per row multiply answers with: of S past memories (0 = not read) and of the online one.

        Args:
            u: `[B, T, H, du]`. online_logit: `[B, T, H]`. summaries: `[B, S, H, m, du]`. visible: `[B, S]` bool. The
                first three are None for read rules without content gates.
            index: `[B, T, H, K]`, a choice that was made already. scale: `[H]`, see `memories.mix_answers`.
            dtype: of constant gates; the others have that of the summaries.

        Returns:
            `[B, T, H, S]` and `[B, T, H]`; with constant gates T and H are 1, the same for all.
        """
        if not self.uses_gates:
            past = visible[:, None, None].to(dtype)
            total = past.sum(-1) + 1 if self.kind == "mean" else torch.ones_like(past[..., 0])
            past, online = past / total[..., None], 1 / total
        else:
            top_k, slots = self.top_k if self.kind == "ssc" else 0, visible.shape[1]
            function = self.gate_function
            past, online, index = content_gates(u, online_logit, summaries, visible, index, top_k, function)
            if index is not None:  # the place behind the last memory takes what was not chosen
                every = past.new_zeros(*past.shape[:-1], slots + 1)
                past = every.scatter(-1, index.where(index >= 0, slots), past)[..., :slots]
        if scale is not None:  # the online answer counts as it is
            past, online = past * scale[:, None], torch.ones_like(online)
        return past, online

    def gates_received(self, u, online_logit, summaries, visible) -> torch.Tensor:
        """Gates `[B, T, H, S]` (or `[B, 1, 1, S]`) as eviction counts them: constant ones are all alike, whatever they
        are divided by. Args: as in `gates`."""
        if not self.uses_gates:
            return visible[:, None, None].float()
        return self.gates(u, online_logit, summaries, visible)[0]
