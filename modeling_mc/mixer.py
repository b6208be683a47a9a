# Copyright 2026 the mc-transformers authors.
"""MCMixer: project → write → read → output, over one segment table."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from ..configuration_mc import MCConfig
from ..kernels.common import compute_dtype
from .aggregation import Aggregation, Caches, Summary
from .cache import MCCacheLayer
from .memories import MEMORIES, State
from .segments import SegmentTable


# a cache is refused by a model that differs from the one that filled it in any of these
CACHE_FIELDS = (
    "memory", "aggregation", "segmentation", "segment_size", "state_init", "gate_source", "segment_summary",
    "summaries_per_segment", "memory_chunk_size", "memory_expansion", "conv_kernel_size",
)  # fmt: skip


@dataclass
class Projected:
    """What the projections make of compact tokens.

    Attributes:
        q, k: `[R, T, H, dk]`. v: `[R, T, H, dv]`. u: `[R, T, H, du]` of the gates, or None without content gates.
        source: `[R, T, H, du]`, what segment descriptors average, or None. gates: `[R, T, H]` in fp32.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor | None
    source: torch.Tensor | None
    gates: dict[str, torch.Tensor]

    def at(self, time: int | slice) -> "Projected":
        """The same for one token or a range of tokens."""
        q, k, v, u, source = (
            None if x is None else x[:, time] for x in (self.q, self.k, self.v, self.u, self.source)
        )
        return Projected(q, k, v, u, source, {name: gate[:, time] for name, gate in self.gates.items()})


def rows_where(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a` in the rows that `rows` `[B]` marks, else `b`."""
    return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)


class MCMixer(nn.Module):
    """The sequence mixer of a memory layer.

    Shapes: B rows, T tokens, H heads, dk/dv widths of keys/values, N grid segments of W slots, S memories.
    """

    def __init__(self, config: MCConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.key_dim = config.num_attention_heads, config.head_dim
        self.memory = MEMORIES[config.memory](config)
        self.value_dim = self.memory.value_dim
        self.aggregation = Aggregation(config, self.memory)
        self.summary = Summary(config.segment_size, config.summaries_per_segment)
        self.carry = config.state_init == "checkpoint" or not self.aggregation.uses_cache
        width, keys, values = config.hidden_size, self.num_heads * self.key_dim, self.num_heads * self.value_dim
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        if self.aggregation.uses_gates and config.gate_source == "projection":
            self.u_proj = nn.Linear(width, self.num_heads * config.summary_dim, bias=False)
        for name in self.memory.gate_names:
            self.add_module(f"{name}_proj", nn.Linear(width, self.num_heads, bias=False))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(self.num_heads)))
        if config.conv_kernel_size:
            for name, channels in (("q", keys), ("k", keys), ("v", values)):
                conv = nn.Conv1d(channels, channels, config.conv_kernel_size, groups=channels, bias=False)
                self.add_module(f"{name}_conv", conv)
        if config.use_output_gate:
            self.g_proj = nn.Linear(width, values, bias=False)
        self.o_norm = nn.RMSNorm(self.value_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(values, width, bias=False)
        self.cache_signature = {name: getattr(config, name) for name in CACHE_FIELDS} | {
            "heads": self.num_heads, "key_dim": self.key_dim, "value_dim": self.value_dim, "hidden_size": width,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ project
    def _convolved(self, name: str, x: torch.Tensor, table: SegmentTable, layer: MCCacheLayer | None) -> torch.Tensor:
        """One of q, k, v for compact tokens `[R, T, C]`."""
        y = getattr(self, f"{name}_proj")(x)
        if not self.config.conv_kernel_size:
            return y
        tail = None if layer is None else layer.tensors.get(f"conv.{name}")
        y, tail = table.convolve(getattr(self, f"{name}_conv"), y, tail)
        if layer is not None:
            layer.tensors[f"conv.{name}"] = tail
        return F.silu(y)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _project(self, x: torch.Tensor, table: SegmentTable, layer: MCCacheLayer | None) -> Projected:
        q, k, v = (self._heads(self._convolved(name, x, table, layer)) for name in "qkv")
        if self.config.qk_norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        u = source = None
        if self.aggregation.uses_gates:
            u = self._heads(self.u_proj(x)) if self.config.gate_source == "projection" else q
            source = k if self.config.segment_summary == "keys" else self._heads(x)
        dtype = compute_dtype(x)
        raw = {
            name: getattr(self, f"{name}_proj")(x).to(dtype) + getattr(self, f"{name}_bias").to(dtype)
            for name in self.memory.gate_names
        }
        return Projected(q, k, v, u, source, self.memory.gates(raw, k))

    # ---------------------------------------------------------------------------------------------- whole sequences
    def _grid(self, parts: Projected, table: SegmentTable, layer: MCCacheLayer | None) -> torch.Tensor:
        """Answers `[R, T, H, dv]` of compact tokens, in parallel over tokens and segments."""
        before = layer if table.resumed else None
        q, u = table.to_grid(parts.q), None if parts.u is None else table.to_grid(parts.u)
        k, v = table.clear(table.to_grid(parts.k)), table.clear(table.to_grid(parts.v))
        gates = {name: table.clear(table.to_grid(gate)) for name, gate in parts.gates.items()}
        trace = self.memory.write(q, k, v, gates, table, before and before.group("state"), self.carry)

        logit = sums = None
        if u is not None:
            source = k if parts.source is parts.k else table.clear(table.to_grid(parts.source))
            logit, sums = self.summary.grid(
                u, source.to(compute_dtype(source)), table, before and before.tensors["sums"]
            )
        caches = self._caches(trace.ends, sums, before)
        out = self.aggregation.mix(q, u, trace, logit, caches, table)
        if layer is not None:
            self._leave(trace.ends, sums, caches, table, layer)
        return table.from_grid(out)

    def _caches(self, ends: State, sums: torch.Tensor | None, before: MCCacheLayer | None) -> Caches:
        """Memories kept from earlier forwards, then the end states of this grid."""
        states = ends[: self.memory.num_read]
        summaries = None if sums is None else self.summary.mean(sums)
        if before is not None and self.aggregation.uses_cache:
            states = tuple(torch.cat(pair, 1) for pair in zip(before.group("kept"), states, strict=True))
            if summaries is not None:
                summaries = torch.cat([before.tensors["summaries"], summaries], 1)
        return Caches(states, summaries)

    def _leave(
        self, ends: State, sums: torch.Tensor | None, caches: Caches, table: SegmentTable, layer: MCCacheLayer
    ) -> None:
        """Leave in the cache what the next forward needs: each row's running state and finished segments in order."""
        row = torch.arange(ends[0].shape[0], device=ends[0].device)
        running = table.running_index()
        last, begun = running.clamp(max=table.num_segments - 1), running < table.num_segments
        fresh = self.memory.initial_state(len(row), ends[0].device, ends[0].dtype)
        for i, (end, new) in enumerate(zip(ends, fresh, strict=True)):
            layer.tensors[f"state.{i}"] = rows_where(begun | self.carry, end[row, last], new)
        if sums is not None:
            layer.tensors["sums"] = rows_where(begun, sums[row, last], torch.zeros_like(sums[:, 0]))
        if self.aggregation.uses_cache:
            cached, before = caches.states[0].shape[1] - table.num_segments, table.finished_before[:, None]
            slot = torch.arange(layer.capacity_after(table), device=row.device)
            source = torch.where(slot < before, slot, cached + slot - before).clamp(max=caches.states[0].shape[1] - 1)
            for i, states in enumerate(caches.states):
                layer.tensors[f"kept.{i}"] = states[row[:, None], source]
            if caches.summaries is not None:
                layer.tensors["summaries"] = caches.summaries[row[:, None], source]
        layer.tensors["position"] = table.next_position

    # ------------------------------------------------------------------------------------------------ token by token
    def _tokens(self, parts: Projected, table: SegmentTable, layer: MCCacheLayer) -> torch.Tensor:
        """Answers `[R, T, H, dv]`, one token after the other: decoding, and the specification of `_grid`."""
        if "position" not in layer.tensors:
            self._begin(layer, parts.q)
        layer.reserve(layer.capacity_after(table))
        out = [
            self._token(parts.at(t), None if table.order is None else t < table.length, layer)
            for t in range(table.num_tokens)
        ]
        return torch.stack(out, 1)

    def _begin(self, layer: MCCacheLayer, q: torch.Tensor) -> None:
        rows, device, dtype = q.shape[0], q.device, compute_dtype(q)
        state = self.memory.initial_state(rows, device, dtype)
        layer.tensors["position"] = torch.zeros(rows, dtype=torch.int64, device=device)
        layer.tensors |= {f"state.{i}": part for i, part in enumerate(state)}
        if self.aggregation.uses_cache:
            kept = enumerate(state[: self.memory.num_read])
            layer.tensors |= {f"kept.{i}": part.new_zeros(rows, 0, *part.shape[1:]) for i, part in kept}
        if self.aggregation.uses_gates:
            shape = (self.num_heads, self.summary.num_blocks, self.config.summary_dim)
            layer.tensors["sums"] = torch.zeros(rows, *shape, device=device, dtype=dtype)
            layer.tensors["summaries"] = torch.zeros(rows, 0, *shape, device=device, dtype=dtype)

    def _token(self, parts: Projected, real: torch.Tensor | None, layer: MCCacheLayer) -> torch.Tensor:
        """Answers `[B, H, dv]` of one token per row; rows outside `real` `[B]` stay as they are."""
        position, size = layer.position, self.config.segment_size
        offset, finished = position % size, position // size
        old = layer.group("state")
        state = self.memory.step(old, parts.k, parts.v, parts.gates)
        logit = sums = caches = visible = None
        if self.aggregation.uses_gates:
            sums = self.summary.add(layer.tensors["sums"], parts.source, offset)
            logit = self.summary.token(parts.u, sums, offset)
        if self.aggregation.uses_cache:
            caches = Caches(layer.group("kept"), layer.tensors.get("summaries"))
            visible = torch.arange(caches.states[0].shape[1], device=position.device) < finished[:, None]
        out = self.aggregation.mix_token(parts.q.to(state[0].dtype), parts.u, state, logit, caches, visible)

        real = torch.ones_like(position, dtype=torch.bool) if real is None else real
        full = real & (offset + 1 == size)
        if self.aggregation.uses_cache:
            for i in range(self.memory.num_read):
                layer.store(f"kept.{i}", state[i], finished, full)
        if sums is not None:
            layer.store("summaries", self.summary.mean(sums), finished, full)
            layer.tensors["sums"] = rows_where(real, sums, layer.tensors["sums"])
        fresh = state if self.carry else self.memory.initial_state(len(full), position.device, state[0].dtype)
        for i, (before, after, new) in enumerate(zip(old, state, fresh, strict=True)):
            layer.tensors[f"state.{i}"] = rows_where(real, rows_where(full, new, after), before)
        layer.tensors["position"] = position + real
        return out.to(parts.q.dtype)

    def _reference(self, parts: Projected, table: SegmentTable, layer: MCCacheLayer | None) -> torch.Tensor:
        """`_tokens` without a cache, document by document."""
        if layer is not None:
            return self._tokens(parts, table, layer)
        borders = [0, table.num_tokens] if table.borders is None else table.borders.tolist()
        out = []
        for start, stop in zip(borders, borders[1:], strict=False):
            document = replace(table, num_tokens=stop - start)
            out.append(self._tokens(parts.at(slice(start, stop)), document, MCCacheLayer()))
        return torch.cat(out, 1)

    # ------------------------------------------------------------------------------------------------------ forward
    def forward(self, hidden_states: torch.Tensor, segment_table: SegmentTable, past_key_values=None) -> torch.Tensor:
        """`[B, T, hidden]` to `[B, T, hidden]`; the table says where the tokens stand, the cache what was before."""
        table, layer = segment_table, None
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            layer.check(self.cache_signature, hidden_states.shape[0])
        x = table.compact(hidden_states)
        parts = self._project(x, table, layer)
        if self.config.mc_backend == "reference":
            out = self._reference(parts, table, layer)
        elif table.resumed and table.num_tokens == 1:
            out = self._tokens(parts, table, layer)
        else:
            out = self._grid(parts, table, layer)
        if layer is not None:
            past_key_values.update(x, None, self.layer_idx)
        out = self.o_norm(out)
        if self.config.use_output_gate:
            out = out * F.silu(self._heads(self.g_proj(x)))
        return table.expand(self.o_proj(out.flatten(-2)))
