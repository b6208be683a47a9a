# Copyright 2026 the mc-transformers authors.
"""Mixer: write → read, over one segment table; MCMixer: project → write → read → output."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..configuration_mc import MCConfig
from ..kernels.shared.ops import autocast_off, compute_dtype
from .aggregation import Aggregation
from .attention import rotate
from .cache_layer import MCCacheLayer, memory_layer
from .fenwick import FenwickHistory
from .history import Caches, History, Level
from .least_read import LeastReadHistory
from .memories import MEMORIES, Bias, Memory, State
from .moment import Moment
from .norms import make_output_norm, unit
from .qualify import auto_backend, kind_of
from .read_gates import GateLog, ReadGates, by_segment
from .segments import SegmentTable, rows_where
from .short_conv import ShortConv
from .summary import Summary
from .tensor_parallel import HeadShare


# a cache is refused by a model that differs from the one that filled it in any of these
CACHE_FIELDS = (
    "memory",
    "aggregation",
    "segmentation",
    "segment_size",
    "border_rule",
    "border_budget",
    "least_segment_size",
    "state_init",
    "online_memory",
    "gate_source",
    "segment_summary",
    "summaries_per_segment",
    "memory_chunk_size",
    "memory_expansion",
    "conv_kernel_size",
    "max_cached_segments",
    "vector_read",
)


FAR = -1e4  # an online logit that leaves gates of past memories as if there were no online one


@dataclass
class Projected:
    """What the projections make of compact tokens.

    Attributes:
        q, k: `[R, T, H, dk]`. v: `[R, T, H, dv]`. u: `[R, T, H, du]` of the gates, or None without content gates.
        source: `[R, T, H, du]`, what segment descriptors average, or None. gates: `[R, T, H]` or, per channel,
            `[R, T, H, d]`, in fp32.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor | None
    source: torch.Tensor | None
    gates: dict[str, torch.Tensor]

    def at(self, time: int | slice) -> "Projected":
        """The same for one token or a range of tokens."""
        q, k, v, u, source = (None if x is None else x[:, time] for x in (self.q, self.k, self.v, self.u, self.source))
        return Projected(q, k, v, u, source, {name: gate[:, time] for name, gate in self.gates.items()})


def make_history(config: MCConfig, memory: Memory, carry: bool) -> History:
    """What keeps the finished segments of a layer: by segmentation, and by who leaves a bounded cache."""
    if config.aggregation == "none":
        return History(config, memory, carry)
    if config.segmentation == "logarithmic":
        return FenwickHistory(config, memory, carry)
    bounded = config.max_cached_segments is not None and config.cache_eviction == "least_read"
    return (LeastReadHistory if bounded else History)(config, memory, carry)


class Mixer(nn.Module):
    """Writes tokens into memories and reads them: all of a mixer but what stands before (`_project`) and behind it.

    Shapes: B rows, T tokens, H heads, dk/dv widths of keys/values, N grid segments of W slots, S memories.
    """

    def __init__(self, config: MCConfig, layer_idx: int, memory: Memory) -> None:
        super().__init__()
        self.config, self.layer_idx, self.memory = config, layer_idx, memory
        self.num_heads, self.num_key_heads = config.memory_heads, config.memory_key_heads
        self.summary_dim, self.share = config.summary_dim, None
        self.read_gates = ReadGates()
        self.set_read_rule()

    def set_read_rule(self) -> None:
        """Take the read rule from the config, which `MCPreTrainedModel.read_as` changes."""
        config, memory = self.config, self.memory
        self.aggregation = Aggregation(config, memory)
        self.carry = config.state_init == "checkpoint" or not self.aggregation.uses_cache
        self.history = make_history(config, memory, self.carry)
        self.kind = kind_of(config, self.num_heads)
        self.cache_signature = {name: getattr(config, name) for name in CACHE_FIELDS} | {
            "heads": self.num_heads,
            "key_heads": self.num_key_heads,
            "key_dim": config.memory_key_dim,
            "value_dim": memory.value_dim,
            "hidden_size": config.hidden_size,
        }

    def take_heads(self, share: HeadShare) -> None:
        """Have a part of the heads, while other ranks have the others (tensor parallel): from now on all shapes are
        those of this rank. The projections must have been split."""
        for module in self.modules():
            if hasattr(module, "share"):
                module.share = share
        self.num_heads, self.num_key_heads = self.num_heads // share.size, self.num_key_heads // share.size
        self.memory.num_heads = self.num_heads
        self.set_read_rule()

    def _project(self, x: torch.Tensor, table: SegmentTable, layer: MCCacheLayer | None) -> Projected:
        """What memories and gates need of compact tokens `[R, T, hidden]`."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------- whole sequences
    def _grid(self, parts: Projected, table: SegmentTable, layer: MCCacheLayer | None) -> torch.Tensor:
        """Answers `[R, T, H, dv]` of compact tokens, in parallel over tokens and segments."""
        before = layer if table.resumed else None
        if before is not None:
            self.history.grow(before, table.num_tokens)
        bound = table.num_tokens if layer is None else layer.bound(table.num_tokens)
        levels, trace, logit, lead = [], None, None, self.history.lead
        q, u = table.to_grid(parts.q), None if parts.u is None else table.to_grid(parts.u)
        for bit in range(self.history.num_levels(bound, layer is not None)):
            coarse = table.coarser(1 << bit)
            k, v = coarse.clear(coarse.to_grid(parts.k)), coarse.clear(coarse.to_grid(parts.v))
            gates = {name: coarse.clear(coarse.to_grid(gate)) for name, gate in parts.gates.items()}
            running = before and before.storage.group("state")
            state = before and self._resumed(tuple(part[:, lead + bit] for part in running), coarse)
            inputs = (coarse.to_grid(parts.q) if bit else q, k, v, gates, coarse)
            if lead and not bit:
                written = self.memory.write_running(*inputs, before and tuple(part[:, 0] for part in running), state)
                ends = written.segment_ends
            else:
                written = self.memory.write(*inputs, state, self.carry)
                ends = written.ends
            trace = trace or written  # only level 0 answers
            sums = None
            if parts.u is not None:
                source = k if parts.source is parts.k else coarse.clear(coarse.to_grid(parts.source))
                summary = Summary(coarse.borders, self.config.summaries_per_segment)
                earlier = before and before.tensors["sums"][:, bit]
                online, sums = summary.grid(coarse.to_grid(parts.u), source, coarse, earlier)
                logit = self._online_logit(online) if logit is None else logit
            levels.append(Level(coarse, ends, sums))

        def gates_received(segment: int, summaries: torch.Tensor | None, visible: torch.Tensor) -> torch.Tensor:
            tokens = (None, None) if u is None else (u[:, segment], logit[:, segment])
            return self.aggregation.gates_received(*tokens, summaries, visible)

        caches = self.history.caches(levels, before, gates_received)
        out = self.aggregation.mix(q, u, trace, logit, caches, table.routes, self._cached_scale(compute_dtype(q)))
        if table.gates is not None:
            table.gates[self.layer_idx].pieces.append(table.from_grid(self._grid_gates(q, u, logit, caches, table)))
        if layer is not None:
            self.history.leave(levels, caches, layer, trace.ends if lead else None)
        return table.from_grid(out)

    def _columns(self, table: SegmentTable, layer: MCCacheLayer | None) -> int:
        earlier = 0 if table.shards is None else table.shards.rank * table.num_tokens
        return self.history.num_columns(earlier + (layer.bound(table.num_tokens) if layer else table.num_tokens))

    def _grid_gates(self, q, u, logit, caches: Caches, table: SegmentTable) -> torch.Tensor:
        """The gates of `_grid` as users see them, `[R, N, W, H, S + 1]`."""
        if not self.aggregation.uses_cache:
            return torch.ones(*q.shape[:4], 1, dtype=compute_dtype(q), device=q.device)
        rows, columns, found = caches.first.shape, table.gates[self.layer_idx].columns, []
        u, logit = (None if x is None else x.reshape(*rows, *x.shape[2:]) for x in (u, logit))
        dtype = compute_dtype(q)
        visible, scale = caches.visible(), self._cached_scale(dtype)
        for segment in range(rows[1]):
            tokens = (None, None) if u is None else (u[:, segment], logit[:, segment])
            index = table.routes["grid"][:, segment] if self.aggregation.shares_routes else None
            past, online = self.aggregation.gates(*tokens, caches.summaries, visible[:, segment], scale, index, dtype)
            shape = (rows[0], *q.shape[2:4])
            past, online = past.expand(*shape, past.shape[-1]), online.expand(shape)
            found.append(by_segment(past, online, caches.number, columns))
        return torch.stack(found, 1).reshape(*q.shape[:4], columns + 1)

    def _resumed(self, state: State, table: SegmentTable) -> State:
        """Where the first grid segments go on, `[R, H, ...]`: from the cached state. One that is about to begin starts
        from M_0 itself, which is the same, so that gradients reach M_0 from behind a detached cache."""
        if self.carry or not torch.is_grad_enabled():
            return state
        begins = table.borders.offset(table.position) == 0
        fresh = self.memory.initial_state(len(begins), begins.device, state[0].dtype)
        return tuple(rows_where(begins, new, old) for new, old in zip(fresh, state, strict=True))

    # ------------------------------------------------------------------------------------------------ token by token
    def _tokens(self, parts: Projected, table: SegmentTable, layer: MCCacheLayer, begin: int = 0) -> torch.Tensor:
        """Answers `[R, T, H, dv]`, one token after the other: decoding, and the specification of `_grid`."""
        if not layer.is_initialized:
            self.begin(layer, len(parts.q), parts.q.device, compute_dtype(parts.q))
        self.history.grow(layer, table.num_tokens)
        out = []
        for t in range(table.num_tokens):
            if begin + t not in table.moments:
                levels = layer.tensors["state.0"].shape[1] - self.history.lead
                real = None if table.order is None else t < table.length
                table.moments[begin + t] = Moment(table.borders, levels, layer.position, real)
            out.append(self._token(parts.at(t), layer, table, begin + t))
        return torch.stack(out, 1)

    def begin(self, layer: MCCacheLayer, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        """Fill an empty layer of a cache with what it is before the first token."""
        sums = (self.num_heads, self.config.summaries_per_segment, self.summary_dim)
        self.history.begin(layer, rows, sums if self.aggregation.uses_gates else None, device, dtype)

    def begin_rows(self, layer: MCCacheLayer, rows: torch.Tensor) -> None:
        """Let the rows `rows` `[B]` bool of a filled layer be what they are before the first token."""
        start = MCCacheLayer()
        start.kept_dtype = layer.kept_dtype
        self.begin(start, 1, layer.device, layer.tensors["state.0"].dtype)
        layer.storage.restart(rows, start.tensors)
        self.history.shrink(layer)

    def _token(self, parts: Projected, layer: MCCacheLayer, table: SegmentTable, time: int) -> torch.Tensor:
        """Answers `[B, H, dv]` of one token per row; rows that have none stay as they are."""
        running, moment = layer.storage.group("state"), table.moments[time]
        levels = running[0].shape[1]

        def each(x: torch.Tensor) -> torch.Tensor:
            return x if levels == 1 else x[:, None].expand(-1, levels, *x.shape[1:]).flatten(0, 1)

        gates = {name: each(gate) for name, gate in parts.gates.items()}
        states = self.memory.step(tuple(s.flatten(0, 1) for s in running), each(parts.k), each(parts.v), gates)
        states = tuple(s.unflatten(0, (-1, levels)) for s in states)
        sums = logit = None
        if parts.u is not None:
            sums, logit = self._summarise(parts, layer, moment)
        kept, summaries, visible = self.history.kept(layer, moment) if self.history.keeps else (None, None, None)
        online = tuple(s[:, 0] for s in states)
        q = parts.q.to(online[0].dtype)
        read = (parts.u, online, logit, kept, summaries, visible, table.routes, time, self._cached_scale(q.dtype))
        out = self.aggregation.mix_token(q, *read)
        if table.gates is not None:
            found = self._token_gates(parts.u, logit, summaries, visible, layer, table, time)
            table.gates[self.layer_idx].pieces.append(found)
        gates = None
        if self.history.needs_gates:
            tokens = (None, None) if logit is None else (parts.u[:, None], logit[:, None])
            gates = self.aggregation.gates_received(*tokens, summaries, visible)[:, 0]
        self.history.push(layer, moment, states, sums, gates)
        return out.to(parts.q.dtype)

    def _token_gates(self, u, logit, summaries, visible, layer, table: SegmentTable, time: int) -> torch.Tensor:
        """The gates of `_token` as users see them, `[B, 1, H, S + 1]`."""
        shape = (len(layer.position), 1, self.num_heads)
        if visible is None:
            return torch.ones(*shape, 1, dtype=layer.tensors["state.0"].dtype, device=layer.position.device)
        tokens = (None, None) if logit is None else (u[:, None], logit[:, None])
        index = table.routes[time][:, None] if self.aggregation.shares_routes else None
        dtype = layer.tensors["state.0"].dtype
        past, online = self.aggregation.gates(*tokens, summaries, visible, self._cached_scale(dtype), index, dtype)
        past, online = past.expand(*shape, past.shape[-1]), online.expand(shape)
        columns = table.gates[self.layer_idx].columns
        return by_segment(past, online, self.history.columns(layer, table.borders), columns)

    def _summarise(self, parts: Projected, layer: MCCacheLayer, moment: Moment) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums `[B, L, H, m, du]` with the new token, and the online logit `[B, H]` from those of level 0."""
        summary = Summary(moment.borders, self.history.num_blocks)
        sums = summary.add(layer.tensors["sums"], parts.source, moment.offset, moment.begins)
        return sums, self._online_logit(summary.token(parts.u, sums, moment.offset))

    def _online_logit(self, logit: torch.Tensor) -> torch.Tensor:
        """The online memory's logit `[..., H]` as the gates take it, from <u_t, its summary>."""
        if "cached_scale" in self._modules:  # no part in the gates: they are made among finished segments
            return torch.full_like(logit, FAR)
        return logit + self.online_bias(logit.dtype) if "online_bias" in self._modules else logit

    def _cached_scale(self, dtype: torch.dtype) -> torch.Tensor | None:
        """`[H]`, see `memories.mix_answers`."""
        return self.cached_scale(dtype) if "cached_scale" in self._modules else None

    def _reference(self, parts: Projected, table: SegmentTable, layer: MCCacheLayer | None) -> torch.Tensor:
        """`_tokens` without a cache, document by document."""
        if layer is not None:
            return self._tokens(parts, table, layer)
        edges = [0, table.num_tokens] if table.cu_seq_lens is None else table.cu_seq_lens.tolist()
        out = []
        for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
            borders = table.borders
            if table.cu_seq_lens is not None:
                borders = borders.of_rows(slice(number, number + 1))
            document = replace(table, num_tokens=stop - start, borders=borders)
            out.append(self._tokens(parts.at(slice(start, stop)), document, MCCacheLayer(), start))
        return torch.cat(out, 1)

    # ------------------------------------------------------------------------------------------------- all of it
    def _answers(self, x: torch.Tensor, table: SegmentTable, layer: MCCacheLayer | None) -> torch.Tensor:
        """Answers `[R, T, H, dv]` of compact tokens `[R, T, hidden]`, and their traces in the cache."""
        parts = self._project(x, table, layer)
        if table.gates is not None:
            table.gates[self.layer_idx] = GateLog(self._columns(table, layer))
        if self.config.mc_backend == "auto":
            chosen = auto_backend(self.memory, self.kind, parts.q)
            if chosen != self.memory.chosen:
                self.memory.chosen = chosen
        with autocast_off(x.device):  # states and gates are fp32, in one pass and token by token
            if self.config.mc_backend == "reference":
                out = self._reference(parts, table, layer)
            elif table.resumed and table.num_tokens == 1:
                out = self._tokens(parts, table, layer)
            else:
                out = self._grid(parts, table, layer)
        if self.config.value_skip:
            out = out + (self.skip(compute_dtype(out))[:, None] * parts.v).to(out.dtype)
        return out

    def cache_layer(self, cache: Cache, x: torch.Tensor) -> MCCacheLayer:
        """The layer of `cache` that tokens `[B, T, ...]` are to read and fill.

        Raises:
            ValueError: it does not fit this mixer or this batch, or has no room for that many tokens.
        """
        layer = memory_layer(cache, self.layer_idx)
        layer.check(self.cache_signature, len(x))
        self.history.check_room(layer, x.shape[1])
        return layer

    def table(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, layer: MCCacheLayer | None = None, **packed
    ) -> SegmentTable:
        """Where tokens `[B, T, ...]` with padding `mask` `[B, T]` stand, after those that `layer` holds; `packed`:
        borders of documents, see `SegmentTable.build`."""
        known = layer is not None and layer.is_initialized
        return SegmentTable.build(
            *x.shape[:2],
            segment_size=self.config.segment_size,
            device=x.device,
            attention_mask=mask,
            position=layer.position.to(x.device) if known else None,
            align=self.memory.align,
            **packed,
        )

    @torch.no_grad()
    def replay(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, layer: MCCacheLayer) -> None:
        """Write tokens `[B, T, hidden]` of an earlier forward into `layer` once more (`MCCacheLayer.crop`)."""
        table = self.table(hidden_states, mask, layer)
        self.memory(self._answers, table.compact(hidden_states), table, layer)
        layer.update(hidden_states)

    def answers(
        self, hidden_states: torch.Tensor, table: SegmentTable, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compact tokens `[R, T, hidden]` of hidden states `[B, T, hidden]`, and their answers `[R, T, H, dv]`."""
        layer = None
        if cache is not None:
            layer = cache.layers[self.layer_idx]
            layer.check(self.cache_signature, hidden_states.shape[0])
            if self.config.segmentation == "content" and (layer.record_past or layer.keep_borders):
                raise ValueError(
                    "tokens cannot be taken back and no border noted (`activate_past_recording`, `keep_borders`) with "
                    "`segmentation`='content', allowed: 'constant' or 'logarithmic'"
                )
            if layer.record_past:
                layer.rollback.remember(layer, self, hidden_states, table.mask)
        x = table.compact(hidden_states)
        out = self.memory(self._answers, x, table, layer)
        if layer is not None:
            for name, tensor in table.borders.left.items():
                layer.storage.put(name, tensor)
            cache.update(x, None, self.layer_idx)
        if table.gates is not None:
            gates = torch.cat(table.gates.pop(self.layer_idx).pieces, 1)
            gates = gates if self.share is None else self.share.every(gates, 2)
            self.read_gates(table.expand(gates).transpose(1, 2))
        return x, out


class MCMixer(Mixer):
    """The sequence mixer of a memory layer: project, convolve, write and read, norm, gate, project.

    Shapes: as in `Mixer`.
    """

    def __init__(self, config: MCConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, MEMORIES[config.memory](config))
        width, keys = config.hidden_size, self.num_key_heads * config.memory_key_dim
        values = self.num_heads * self.memory.value_dim
        chooses = self.aggregation.uses_gates and config.gate_source == "query"
        self.projected = "qkv" if self.memory.reads_query or chooses else "kv"
        if "q" in self.projected:
            self.q_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, values, bias=config.qkv_bias)
        if self.aggregation.uses_gates and config.gate_source == "projection":
            self.u_proj = nn.Linear(width, self.num_heads * config.summary_dim, bias=False)
        for name in self.memory.gate_names:
            shape = self.memory.gate_shape(name)
            self.add_module(f"{name}_proj", nn.Linear(width, math.prod(shape), bias=False))
            start = partial(init.constant_, val=self.memory.gate_bias.get(name, 0.0))
            self.add_module(f"{name}_bias", Bias(shape, start))
        if config.conv_kernel_size:
            for name in self.projected:
                channels = values if name == "v" else keys
                self.add_module(f"{name}_conv", ShortConv(channels, config.conv_kernel_size, config.conv_bias))
        if config.use_output_gate:
            self.g_proj = nn.Linear(width, values, bias=False)
        if config.value_skip:
            self.skip = Bias((self.num_heads,), init.ones_)
        if config.online_gate_bias is not None:
            self.online_bias = Bias((self.num_heads,), partial(init.constant_, val=config.online_gate_bias))
        if config.cached_answers == "added":
            self.cached_scale = Bias((self.num_heads,), partial(init.constant_, val=config.cached_answers_start))
        self.o_norm = make_output_norm(config)
        self.o_proj = nn.Linear(values, width, bias=False)

    # ------------------------------------------------------------------------------------------------------ project
    def _convolved(self, name: str, x: torch.Tensor, table: SegmentTable, layer: MCCacheLayer | None) -> torch.Tensor:
        """One of q, k, v for compact tokens `[R, T, C]`."""
        y = getattr(self, f"{name}_proj")(x)
        then = self._units if name != "v" and self.config.qk_norm else None
        if not self.config.conv_kernel_size:
            return y if then is None else then(y)
        tail = None if layer is None else layer.tensors.get(f"conv.{name}")
        if layer is not None and layer.keep_borders:
            ends = table.tails(y, tail, self.config.conv_kernel_size - 1)
            slots = self.history.num_slots(layer.bound(table.num_tokens))
            self.history.note(layer, f"conv.{name}", ends, table.position, table.next_position, slots)
        conv = partial(getattr(self, f"{name}_conv"), then=then)
        y, tail = table.convolve(conv, self.config.conv_kernel_size - 1, y, tail)
        if layer is not None:
            layer.storage.put(f"conv.{name}", tail)
        return y

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _units(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., key heads * dk]` with every head divided by its norm."""
        return unit(x.unflatten(-1, (self.num_key_heads, -1)), self.config.qk_norm_eps).flatten(-2)

    def _key_heads(self, x: torch.Tensor, table: SegmentTable) -> torch.Tensor:
        """Queries or keys `[R, T, H, dk]` from `[R, T, key heads * dk]`."""
        x = x.unflatten(-1, (self.num_key_heads, -1))
        if self.config.rope == "all":
            x = rotate(x, table.token_position(), self.config.rope_parameters["rope_theta"])
        shared = self.num_heads // self.num_key_heads
        return x if shared == 1 else x.repeat_interleave(shared, -2)

    def _source(self, x: torch.Tensor, k: torch.Tensor, table: SegmentTable) -> torch.Tensor:
        """What segment descriptors average, `[R, T, H, du]`: keys, the input in heads, or where a token stands."""
        if self.config.segment_summary == "keys":
            return k
        if self.config.segment_summary == "hidden":
            return self._heads(x)
        wave = torch.ones(k.shape, dtype=compute_dtype(k), device=k.device)
        wave[..., k.shape[-1] // 2 :] = 0  # turned, it is the cosines and then the sines of all angles
        return rotate(wave, table.token_position(), theta=10_000.0)

    def _project(self, x: torch.Tensor, table: SegmentTable, layer: MCCacheLayer | None) -> Projected:
        parts = {name: self._convolved(name, x, table, layer) for name in self.projected}
        k, v = self._key_heads(parts["k"], table), self._heads(parts["v"])
        q = self._key_heads(parts["q"], table) if "q" in parts else k.detach()
        u = source = None
        if self.aggregation.uses_gates:
            u = self._heads(self.u_proj(x)) if self.config.gate_source == "projection" else q
            source = self._source(x, k, table)
        dtype = compute_dtype(x)
        raw = {
            name: getattr(self, f"{name}_proj")(x).to(dtype).unflatten(-1, self.memory.gate_shape(name))
            + getattr(self, f"{name}_bias")(dtype)
            for name in self.memory.gate_names
        }
        return Projected(q, k, v, u, source, self.memory.gates(raw, k, x))

    # ------------------------------------------------------------------------------------------------------ forward
    def forward(self, hidden_states: torch.Tensor, segment_table: SegmentTable, cache=None) -> torch.Tensor:
        """`[B, T, hidden]` to `[B, T, hidden]`; the table says where the tokens stand, the cache what was before."""
        x, out = self.answers(hidden_states, segment_table, cache)
        gate = self._heads(self.g_proj(x)) if self.config.use_output_gate else None
        out = self.o_norm(out, gate)
        return segment_table.expand(self.o_proj(out.flatten(-2)))
