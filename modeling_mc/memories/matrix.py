# Copyright 2026 the mc-transformers authors.
"""Matrix memories S `[dk, dv]` that are read linearly, S^T q, and written with a scalar decay per head and token."""

import torch

from ...kernels.read.segment import segment_read
from ...kernels.read.selected import selected_read
from ...kernels.step.decode import decode_step
from ...kernels.step.state import state_step
from ...kernels.write.linear import linear_write
from ..segments import SegmentTable
from .base import Memory, State, Trace


class MatrixMemory(Memory):
    """S_t = a_t S_{t-1} + k_t v_t^T. Subclasses give the gates; "log_decay" and "write" (strength) are optional."""

    has_triton = True

    def initial_state(self, num: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        zero = torch.zeros((), device=device, dtype=dtype)  # expanded: who reads M_0 reads one number
        return (zero.expand(num, self.num_heads, self.key_dim, self.value_dim),)

    def write(self, q, k, v, gates, table: SegmentTable, state: State | None, carry: bool) -> Trace:
        if "write" in gates:
            v = v * gates["write"][..., None].to(v.dtype)
        initial = None if state is None else state[0]
        starts = table.starts if carry else None
        log_decay, backend = gates.get("log_decay"), self.config.mc_backend
        online, ends = linear_write(q, k, v, log_decay, initial, starts, carry, backend)
        return Trace(online, (ends,))

    def step(self, state: State, k, v, gates) -> State:
        strengths = (gates.get("log_decay"), gates.get("write"))
        return (state_step(state[0], k, v, *strengths, backend=self.config.mc_backend),)

    def read(self, state: State, q: torch.Tensor) -> torch.Tensor:
        return (q.to(state[0].dtype)[..., None, :] @ state[0])[..., 0, :]

    def gated_read(self, q, u, states, summaries, online_logit, birth, first, function):
        gating = (summaries, online_logit, birth, first, function)
        return segment_read(q, u, states[0], *gating, self.config.mc_backend)

    def selected_read(self, q, weights, states, index):
        return selected_read(q, weights, states[0], index, self.config.mc_backend)

    def token_read(self, q, u, online, online_logit, kept, summaries, visible, index, top_k, function):
        gating = (summaries, visible, index, top_k, function)
        return decode_step(q, u, online[0], online_logit, *kept.stored(0), *gating, self.config.mc_backend)

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
