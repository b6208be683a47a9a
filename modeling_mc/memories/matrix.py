# Copyright 2026 the mc-transformers authors.
"""Matrix memories S `[dk, dv]` that are read linearly, S^T q, and written with a scalar decay per head and token."""

import torch

from ...kernels.read.segment import segment_read
from ...kernels.read.selected import selected_read
from ...kernels.step.decode import decode_step
from ...kernels.step.state import state_step
from ...kernels.write.linear import linear_write
from ..segments import SegmentTable, rows_where
from .base import Memory, State, Trace, mix_answers


class MatrixMemory(Memory):
    """S_t = a_t S_{t-1} + k_t v_t^T. Subclasses give the gates; "log_decay" and "write" (strength) are optional."""

    has_triton = True
    scalar_decay = False  # whether `write` and `gates` are all of the rule: nothing else is multiplied or carried over

    def initial_state(self, num: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        zero = torch.zeros((), device=device, dtype=dtype)  # expanded: who reads M_0 reads one number
        return (zero.expand(num, self.num_heads, self.key_dim, self.value_dim),)

    def write(self, q, k, v, gates, table: SegmentTable, state: State | None, carry: bool) -> Trace:
        if "write" in gates:
            v = v * gates["write"][..., None].to(v.dtype)
        initial = None if state is None else state[0]
        starts = table.starts if carry else None
        log_decay, backend = gates.get("log_decay"), self.backend
        online, ends = linear_write(q, k, v, log_decay, initial, starts, carry, backend)
        return Trace(online, (ends,))

    def write_running(self, q, k, v, gates, table: SegmentTable, running: State | None, state: State | None) -> Trace:
        if not self.scalar_decay:
            return super().write_running(q, k, v, gates, table, running, state)
        # written with one factor a_t per token, what a memory held before enters its end times the product of all a_t:
        # one write gives both, S_segment = S_end - (product of a) (S_start - what the segment itself started from)
        trace = self.write(q, k, v, gates, table, running, True)
        (end,) = trace.ends
        first = torch.zeros_like(end[:, :1]) if running is None else running[0][:, None]
        start = torch.cat([first, end[:, :-1]], 1)
        if table.starts is not None:
            start = rows_where(table.starts, torch.zeros_like(start), start)
        if state is not None:
            start = torch.cat([start[:, :1] - state[0][:, None], start[:, 1:]], 1)
        if "log_decay" in gates:
            start = start * gates["log_decay"].sum(2).exp()[..., None, None]
        trace.segment_ends = (end - start,)
        return trace

    def step(self, state: State, k, v, gates) -> State:
        strengths = (gates.get("log_decay"), gates.get("write"))
        return (state_step(state[0], k, v, *strengths, backend=self.backend),)

    def read(self, state: State, q: torch.Tensor) -> torch.Tensor:
        return (q.to(state[0].dtype)[..., None, :] @ state[0])[..., 0, :]

    def gated_read(self, q, u, states, summaries, online_logit, birth, first, function):
        gating = (summaries, online_logit, birth, first, function)
        return segment_read(q, u, states[0], *gating, self.backend)

    def selected_read(self, q, weights, states, index):
        return selected_read(q, weights, states[0], index, self.backend)

    def token_read(self, q, u, online, online_logit, kept, summaries, visible, index, top_k, function, scale=None):
        gating = (summaries, visible, index, top_k, function)
        if kept.in_pool:
            return super().token_read(q, u, online, online_logit, kept, *gating, scale)
        # an empty online memory leaves the sum of the cached answers
        now = online[0] if scale is None else online[0].new_zeros(()).expand_as(online[0])
        out, index = decode_step(q, u, now, online_logit, *kept.stored(0), *gating, self.backend)
        return (out if scale is None else mix_answers(out, None, self.read(online, q), scale)), index

    def token_soup(self, q, u, online, online_logit, kept, *gating):
        if self.config.mc_backend == "reference":
            return super().token_soup(q, u, online, online_logit, kept, *gating)
        return self.token_read(q, u, online, online_logit, kept, *gating)[0]  # of linear maps, soup is GRM

    def constant_read(self, q: torch.Tensor, states: State, visible: torch.Tensor) -> torch.Tensor:
        # the caches are summed before they are read (eq. 13): one matrix per grid segment
        (matrix,) = states
        total = (visible.to(matrix.dtype) @ matrix.flatten(2)).unflatten(-1, matrix.shape[2:])  # [R, N, H, dk, dv]
        out = q.to(matrix.dtype).transpose(2, 3) @ total
        return out.transpose(2, 3).to(q.dtype)
