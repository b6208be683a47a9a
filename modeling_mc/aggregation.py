# Copyright 2026 the mc-transformers authors.
"""The read rule (eq. 5): online answer and cached memories, mixed by constant gates, content gates or a top-k choice.

Two forms of the same rule: `Aggregation.mix` for a whole segment grid, through the kernels, and
`Aggregation.mix_token` for one token per row, which decoding uses and which specifies the first form.
"""

from collections.abc import Callable

import torch

from ..kernels.read.segment import segment_read
from ..kernels.read.selected import segment_route
from ..kernels.step.decode import gates_of, token_gates
from .cache_layer import Kept
from .history import Caches
from .memories import Memory, State, Trace
from .segments import SegmentTable


class Summary:
    """Running segment descriptor: per head, the mean of the keys of each of m equal sub-blocks of a segment."""

    def __init__(self, segment_size: int, num_blocks: int) -> None:
        self.segment_size, self.num_blocks = segment_size, num_blocks
        self.block = segment_size // num_blocks

    def counts(self, offset: torch.Tensor) -> torch.Tensor:
        """`[..., m]` tokens in every sub-block once the token at `offset` is written."""
        begin = torch.arange(self.num_blocks, device=offset.device) * self.block
        return (offset[..., None] + 1 - begin).clamp(0, self.block)

    def _best(self, products: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Largest `<u, mean>` over the sub-blocks that have begun; products `[..., H, m]`, counts `[..., 1, m]`."""
        return (products / counts.clamp(min=1)).masked_fill(counts == 0, float("-inf")).amax(-1)

    def grid(
        self, u: torch.Tensor, source: torch.Tensor, table: SegmentTable, sums: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Online logits of a grid and the sums after every grid segment.

        Args:
            u: `[R, N, W, H, du]`. source: `[R, N, W, H, du]` fp32, zero where there is no token.
            sums: `[R, H, m, du]`, of the segment that the first grid segment resumes, or None.

        Returns:
            `[R, N, W, H]` and `[R, N, H, m, du]`.
        """
        block = table.offset // self.block
        totals, products = [], []
        for index in range(self.num_blocks):
            part = source if self.num_blocks == 1 else source * (block == index)[..., None, None]
            total = part.cumsum(2)
            if sums is not None:
                resumed = (torch.arange(table.num_segments, device=u.device) == 0).to(total.dtype)
                total = total + resumed[:, None, None, None] * sums[:, None, None, :, index]
            products.append((u.to(total.dtype) * total).sum(-1))
            totals.append(total[:, :, -1])
        logits = self._best(torch.stack(products, -1), self.counts(table.offset)[..., None, :])
        return logits, torch.stack(totals, 3)

    def token(self, u: torch.Tensor, sums: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Online logit `[B, H]` from sums `[B, H, m, du]` that already hold the token at `offset` `[B]`."""
        return self._best((u[..., None, :].to(sums.dtype) * sums).sum(-1), self.counts(offset)[:, None])

    def add(self, sums: torch.Tensor, source: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Sums `[B, H, m, du]` with one more token `[B, H, du]` at `offset` `[B]`; a new segment starts from zero."""
        kept = torch.where((offset == 0)[:, None, None, None], 0, sums)
        here = torch.arange(self.num_blocks, device=offset.device) == (offset // self.block)[:, None]
        return kept + here[:, None, :, None].to(sums.dtype) * source[:, :, None].to(sums.dtype)


class Aggregation:
    """Everything that `aggregation`, `gate_function` and `num_selected_segments` of the config decide."""

    def __init__(self, config, memory: Memory) -> None:
        self.kind, self.function = config.aggregation, config.gate_function
        self.gate_function = "one" if memory.own_gates else config.gate_function
        self.top_k, self.memory = config.num_selected_segments, memory
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
    ) -> torch.Tensor:
        """`[R, N, W, H, dv]` from queries `[R, N, W, H, dk]`, u `[R, N, W, H, du]` and logits `[R, N, W, H]`.

        `caches` has R rows, or R * N rows of one grid segment each when every segment has memories of its own.
        `routes` holds the choices of earlier layers of this forward.
        """
        if not self.uses_cache:
            return trace.online
        q = trace.online if self.memory.own_gates else q
        rows, grid = (len(caches.first), caches.first.shape[1]), q.shape[:2]

        def fold(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(*rows, *x.shape[2:])

        if not self.uses_gates:
            visible = caches.visible()
            total = fold(trace.online) + self.memory.constant_read(fold(q), caches.states, visible)
            if self.kind == "mean":
                total = total / (visible.sum(-1) + 1).to(total.dtype)[:, :, None, None, None]
            return total.reshape(*grid, *total.shape[2:])
        gating = (fold(online_logit), caches.birth, caches.first, self.function)
        if self.kind == "soup" and self.memory.num_maps > 1:
            return self._soup(q, fold(u), trace, caches, gating, fold)
        if self.kind == "soup" and self.memory.num_maps == 0:
            online = tuple(map(fold, trace.states))
            out = self.memory.soup_read(fold(q), fold(u), online, caches.states, caches.summaries, *gating)
            return out.reshape(*grid, *out.shape[2:])
        if self.kind == "ssc":
            past, online_gate = self._select(fold(q), fold(u), gating[0], caches, routes)
        else:
            past, online_gate = self.memory.gated_read(fold(q), fold(u), caches.states, caches.summaries, *gating)
        total = past + online_gate[..., None].to(past.dtype) * fold(trace.online)
        return total.reshape(*grid, *total.shape[2:])

    def _soup(self, q, u, trace, caches, gating, fold):
        """Mixed parameters (eq. 15) map by map: no token's own weights are ever built."""
        x = q
        for index in range(self.memory.num_maps):
            past, online_gate = segment_read(
                fold(x), u, caches.states[index], caches.summaries, *gating, self.memory.config.mc_backend
            )
            mixed = past + online_gate[..., None].to(past.dtype) * fold(trace.read_map(index, x))
            mixed = mixed.reshape(*q.shape[:2], *mixed.shape[2:])
            x = mixed if index == self.memory.num_maps - 1 else self.memory.between(index, mixed)
        return self.memory.finish(q, x)

    def _route(self, routes: dict, key, choose: Callable[[], torch.Tensor]) -> torch.Tensor:
        """This layer's choice of segments, or the first layer's where all layers share it."""
        if not self.shares_routes:
            return choose()
        if key not in routes:
            routes[key] = choose()
        return routes[key]

    def _select(self, q, u, online_logit, caches, routes):
        index = self._route(
            routes,
            "grid",
            lambda: segment_route(
                u, caches.summaries, caches.birth, caches.first, self.top_k, self.memory.config.mc_backend
            ),
        )
        row = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1, 1)
        head = torch.arange(q.shape[3], device=q.device).view(-1, 1)
        chosen = caches.summaries[row, index.clamp(min=0), head]  # [R, N, W, H, k, m, du]
        logits = (chosen * u.to(chosen.dtype)[..., None, None, :]).sum(-1).amax(-1)
        gates, online_gate = self._gates(logits.masked_fill(index < 0, float("-inf")), online_logit)
        return self.memory.selected_read(q, gates, caches.states, index), online_gate

    def _gates(self, logits: torch.Tensor, online_logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates of past memories `[..., S]` (hidden ones have logit -inf) and of the online one `[...]`."""
        return gates_of(logits, online_logit, self.gate_function)

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
    ) -> torch.Tensor:
        """Answers `[B, H, dv]` of one token per row; `time` tells the tokens of one forward apart in `routes`.

        Args:
            q, u: `[B, H, d]`. online: the state that already holds the token. online_logit: `[B, H]`.
            kept: S cached memories per row. summaries: `[B, S, H, m, du]`. visible: `[B, S]` bool, those it may read.
        """
        memory, online = self.memory, online[: self.memory.num_read]
        if not self.uses_gates:
            answer = memory.read(online, q)
            if not self.uses_cache:
                return answer
            weight, q = visible.to(answer.dtype), answer if memory.own_gates else q
            past = torch.einsum("bs,bshv->bhv", weight, memory.read_cached(kept.all(), q[:, None]))
            return (answer + past) / (weight.sum(1)[:, None, None] + 1 if self.kind == "mean" else 1)
        index = routes.get(time) if self.shares_routes else None
        gating = (summaries, visible, index, self.top_k if self.kind == "ssc" else 0, self.gate_function)
        if self.kind == "soup" and not (memory.num_maps == 1 and memory.config.mc_backend == "triton"):
            gates, online_gate, _ = token_gates(u, online_logit, *gating)
            return memory.read(self._mixed_parameters(gates, kept.all(), online_gate, online), q)
        out, index = memory.token_read(q, u, online, online_logit, kept, *gating)
        if self.shares_routes:
            routes[time] = index
        return out

    def past_gates(
        self,
        u: torch.Tensor | None,
        online_logit: torch.Tensor | None,
        summaries: torch.Tensor | None,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """The gates `[B, T, H, S]` (or `[B, 1, 1, S]` if all tokens agree) of S past memories per row, 0 = not read.

        Args:
            u: `[B, T, H, du]`. online_logit: `[B, T, H]`. summaries: `[B, S, H, m, du]`. visible: `[B, S]` bool.
        """
        if not self.uses_gates:
            return visible[:, None, None].float()
        logits = torch.einsum("bthd,bshmd->bthsm", u.to(summaries.dtype), summaries).amax(-1)
        logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
        if self.kind == "ssc":
            best = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
            logits = torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)
        return self._gates(logits, online_logit)[0]

    @staticmethod
    def _mixed_parameters(gates: torch.Tensor, states: State, online_gate: torch.Tensor, online: State) -> State:
        """Eq. 15 letter by letter: one set of parameters per row, from gates `[B, H, S]` and `[B, H]`."""
        return tuple(
            (gates[..., None] * kept.transpose(1, 2).flatten(3)).sum(2).view_as(now)
            + online_gate.view(*online_gate.shape, *[1] * (now.dim() - 2)) * now
            for kept, now in zip(states, online, strict=False)
        )
