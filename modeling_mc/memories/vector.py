# Copyright 2026 the mc-transformers authors.
"""Vector memories: the state of a classic recurrent cell, cached per segment like any other memory.

One fused cell runs over all heads: its input at token t is (k_t, v_t) of all heads, its output h_t `[H * d]` is cut
into heads. Three reads (`vector_read`):

    "multiply"  M(q) = q * h, elementwise (eq. 18-20); aggregations as for every other memory, soup is GRM.
    "add"       y_t = h_t + sum_i g_ti * h_i with g_ti = sigmoid(A h_t + B h_i + b), elementwise, A and B per head,
                over all finished segments (grm, soup) or the k best (ssc); residual has g = 1, mean takes the mean.
                The query has no part in it and no projection. With ssc nothing passes a gradient to the projection
                that scores segments: it stays as it starts (DistributedDataParallel: find_unused_parameters=True).
    "add_weighted"  with ssc: y_t = c_t h_t + sum of c_ti g_ti * h_i over the k best, c the gates of eq. 9 of what was
                chosen and of the online memory: the projection that scores segments learns by them.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...kernels.read.segment import segment_read
from ...kernels.read.selected import selected_read
from ...kernels.read.vector import gated_sum
from ...kernels.write.recurrent import recurrence
from ..segments import SegmentTable, rows_where
from .base import Memory, State, Trace, compute_dtype


class Cell(nn.Module):
    """The parameters of `nn.LSTM(inputs, width)` (gates = 4) or `nn.GRU` (gates = 3), under the same names."""

    def __init__(self, inputs: int, width: int, gates: int) -> None:
        super().__init__()
        self.width, self.gates = width, gates
        self.weight_ih_l0 = nn.Parameter(torch.empty(gates * width, inputs))
        self.weight_hh_l0 = nn.Parameter(torch.empty(gates * width, width))
        self.bias_ih_l0 = nn.Parameter(torch.empty(gates * width))
        self.bias_hh_l0 = nn.Parameter(torch.empty(gates * width))
        self.init_weights()

    def init_weights(self) -> None:
        """As torch's own, but for an LSTM's forget gate, which starts open."""
        for parameter in self.parameters():
            init.uniform_(parameter, -(self.width**-0.5), self.width**-0.5)
        if self.gates == 4:
            bias = torch.zeros(self.gates, self.width)
            bias[1] = 1.0
            init.copy_(self.bias_ih_l0, bias.flatten())
            init.zeros_(self.bias_hh_l0)

    def forward(self, x: torch.Tensor, state: State, empty: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `kernels.write.recurrent.recurrence`; state: h, and c of an LSTM, `[B, width]`."""
        weights = (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)
        return recurrence(x, weights, *state, *[None] * (2 - len(state)), empty)


class ReadGate(nn.Module):
    """The two halves of `A h_t + B h_i + b`, per head."""

    def __init__(self, heads: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(heads, width, 2 * width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def init_weights(self) -> None:
        init.normal_(self.weight, std=self.std)
        init.zeros_(self.bias)

    def forward(self, online: torch.Tensor, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`A h_t + b` of online `[..., H, d]` and `B h_i` of cached `[..., H, d]`."""
        of_online, of_cached = self.weight.to(online.dtype).chunk(2, -1)
        x = torch.einsum("...hd,hed->...he", online, of_online) + self.bias.to(online.dtype)
        return x, torch.einsum("...hd,hed->...he", cached, of_cached)


def last_output(hidden: torch.Tensor, valid: torch.Tensor | None, before: torch.Tensor) -> torch.Tensor:
    """A cell's output `[B, ...]` after the last of its slots `[B, W, ...]` that is `valid` `[B, W]`; those come first.
    Where there is none, what was `before` `[B, ...]`."""
    if valid is None:
        return hidden[:, -1]
    length = valid.sum(1)
    end = hidden[torch.arange(len(hidden), device=hidden.device), (length - 1).clamp(min=0)]
    return rows_where(length > 0, end, before.to(end.dtype))


class VectorMemory(Memory):
    """State: the cell's output h, and whatever else it carries, `[num, H, dv]` each; subclasses say which cell."""

    cell_gates = 3
    num_states = 1
    mixes_heads = True
    own_fields = ("vector_read",)

    def __init__(self, config, cell: nn.Module | None = None) -> None:
        super().__init__(config)
        inputs = self.num_heads * (self.key_dim + self.value_dim)
        self.cell = Cell(inputs, self.num_heads * self.value_dim, self.cell_gates) if cell is None else cell
        self.multiplies = self.reads_query = config.vector_read == "multiply"
        self.own_gates = not self.multiplies and config.aggregation in ("grm", "soup", "ssc")
        self.weighs_choice = config.vector_read == "add_weighted"
        if self.own_gates:
            self.read_gate = ReadGate(self.num_heads, self.value_dim, config.initializer_range)

    @classmethod
    def check(cls, config) -> None:
        cls.check_square(config)
        if config.vector_read == "add" and config.online_gate_bias is not None:
            config.refuse("online_gate_bias", "None with vector_read='add', whose gates belong to the memory")
        if config.vector_read == "add_weighted" and config.aggregation != "ssc":
            config.refuse("vector_read", "'multiply' or 'add' unless aggregation is 'ssc'")

    def init_weights(self) -> None:
        for part in self.children():
            part.init_weights()

    def initial_state(self, num: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        shape = (num, self.num_heads, self.value_dim)
        return tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(self.num_states))

    # ------------------------------------------------------------------------------------------------------- write
    @staticmethod
    def _inputs(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([k.flatten(-2), v.flatten(-2)], -1)

    def _run(self, x: torch.Tensor, valid: torch.Tensor | None, state: State) -> tuple[torch.Tensor, State]:
        """h `[B, W, H, dv]` of x `[B, W, in]`, and the state after the last token; valid `[B, W]` slots come first."""
        empty = None if valid is None or self.num_states == 1 else ~valid
        hidden, last = self.cell(x, tuple(s.flatten(1) for s in state), empty)
        hidden = hidden.unflatten(-1, (self.num_heads, -1))
        end = last_output(hidden, valid, state[0])
        return hidden, (end,) if self.num_states == 1 else (end, last.view_as(end))

    def write(self, q, k, v, gates, table: SegmentTable, state: State | None, carry: bool) -> Trace:
        x, valid, (rows, num) = self._inputs(k, v), table.valid, k.shape[:2]
        fresh = self.initial_state(rows, k.device, compute_dtype(k))
        state = fresh if state is None else state
        if carry:
            hidden, ends = [], []
            for n in range(num):
                if table.starts is not None:
                    start = table.starts[:, n, None, None]
                    state = tuple(torch.where(start, new, old) for new, old in zip(fresh, state, strict=True))
                out, state = self._run(x[:, n], valid[:, n], state)
                hidden.append(out)
                ends.append(state)
            hidden, ends = torch.stack(hidden, 1), tuple(torch.stack(parts, 1) for parts in zip(*ends, strict=True))
        else:
            others = self.initial_state(rows * (num - 1), k.device, state[0].dtype)
            begin = tuple(
                torch.cat([first[:, None], rest.unflatten(0, (rows, num - 1))], 1).flatten(0, 1)
                for first, rest in zip(state, others, strict=True)
            )
            hidden, ends = self._run(x.flatten(0, 1), valid.flatten(0, 1), begin)
            hidden, *ends = (part.unflatten(0, (rows, num)) for part in (hidden, *ends))
        return Trace(self._answer(hidden, q).to(q.dtype), tuple(ends))

    def step(self, state: State, k, v, gates) -> State:
        return self._run(self._inputs(k, v)[:, None], None, state)[1]

    # -------------------------------------------------------------------------------------------------------- read
    def _answer(self, h: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return q.to(h.dtype) * h if self.multiplies else h

    def read(self, state: State, q: torch.Tensor) -> torch.Tensor:
        return self._answer(state[0], q)

    def read_cached(self, state: State, q: torch.Tensor) -> torch.Tensor:
        if not self.own_gates:
            return self.read(state, q)
        x, p = self.read_gate(q.to(state[0].dtype), state[0])
        return (x + p).sigmoid() * state[0]

    def gated_read(self, q, u, states, summaries, online_logit, birth, first, function):
        # the gated sum of vectors is a matrix memory's read with one row and the query 1
        one = torch.ones_like(q[..., :1])
        past, online = segment_read(one, u, states[0][..., None, :], summaries, online_logit, birth, first, function)
        return self._answer(past, q), online

    def constant_read(self, q: torch.Tensor, states: State, visible: torch.Tensor) -> torch.Tensor:
        (h,) = states
        if self.own_gates:
            x, p = self.read_gate(q.to(h.dtype), h)
            return gated_sum(x, p, h, visible).to(q.dtype)
        total = (visible.to(h.dtype) @ h.flatten(2)).unflatten(-1, h.shape[2:])[:, :, None]  # [R, N, 1, H, dv]
        return self._answer(total, q).to(q.dtype)

    def selected_read(self, q, weights, states, index):
        (h,) = states
        if not self.own_gates:
            one = torch.ones_like(q[..., :1])
            return self._answer(selected_read(one, weights, h[..., None, :], index), q)
        x, p = self.read_gate(q.to(h.dtype), h)
        row = torch.arange(len(h), device=h.device).view(-1, 1, 1, 1, 1)
        head = torch.arange(self.num_heads, device=h.device)[:, None]
        flat = ((row * h.shape[1] + index.clamp(min=0)) * self.num_heads + head).flatten()
        p, h = (y.flatten(0, 2)[flat].view(*index.shape, -1) for y in (p, h))  # [R, N, W, H, k, dv]
        return ((x[..., None, :] + p).sigmoid() * h * weights[..., None].to(h.dtype)).sum(-2).to(q.dtype)
