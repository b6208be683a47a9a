# Copyright 2026 the mc-transformers authors.
"""Sliding-window linear attention of window 2 (eq. 28): S_t = a S_{t-1} + b k_{t-1} v_{t-1}^T + l k_t v_t^T."""

import torch
from torch.nn import functional as F

from ...kernels.step.state import state_step
from ...kernels.write.linear import linear_write
from ..segments import SegmentTable
from .base import State, Trace, compute_dtype
from .matrix import MatrixMemory


def _previous_token(table: SegmentTable, carry: bool) -> torch.Tensor:
    """`[R, N, W + 1]`: for every slot, and for the end of the segment, where the token before it stands in
    `[nothing, state's token, grid slots...]`."""
    rows, num, width = table.valid.shape
    start = torch.arange(num, device=table.valid.device) * width
    # one increasing number per event, so that a running maximum finds the latest one: 1 the state's token, even = a
    # segment that forgets what was before, odd from 3 on = a token
    begin = torch.where(table.fresh(carry), 2 * start + 2, 0)
    begin[:, 0] = torch.where(begin[:, 0] > 0, begin[:, 0], 1)
    slots = 2 * torch.arange(num * width, device=start.device).view(num, width) + 3
    events = torch.cat([begin[..., None], torch.where(table.valid, slots, 0)], -1)
    latest = events.flatten(1).cummax(1)[0].view(rows, num, width + 1)
    return torch.where(latest % 2 == 0, 0, (latest + 1) // 2)


class SWLAMemory(MatrixMemory):
    """State: the matrix, and the key and value of the last token, which the next token writes once more."""

    gate_names = ("a", "b", "e")
    gate_bias = {"a": 4.0}

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"log_decay": F.logsigmoid(raw["a"]), "again": raw["b"].sigmoid(), "write": raw["e"].sigmoid()}

    def initial_state(self, num: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        key = torch.zeros(num, self.num_heads, self.key_dim, device=device, dtype=dtype)
        value = torch.zeros(num, self.num_heads, self.value_dim, device=device, dtype=dtype)
        return (*super().initial_state(num, device, dtype), key, value)

    def write(self, q, k, v, gates, table: SegmentTable, state: State | None, carry: bool) -> Trace:
        if state is None:
            state = self.initial_state(q.shape[0], q.device, compute_dtype(q))
        before = _previous_token(table, carry)
        row = torch.arange(q.shape[0], device=q.device)[:, None, None]

        def earlier(x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            known = torch.stack([torch.zeros_like(last), last], 1)
            return torch.cat([known, x.flatten(1, 2).to(last.dtype)], 1)[row, before]

        last_k, last_v = earlier(k, state[1]), earlier(v, state[2])
        starts = table.starts if carry else None
        log_decay, backend = gates["log_decay"], self.backend
        # the rule is linear in what is written: the online answers of the two writes add up
        written = v * gates["write"][..., None].to(v.dtype)
        new, ends = linear_write(q, k, written, log_decay, state[0], starts, carry, backend)
        again = (last_v[:, :, :-1] * gates["again"][..., None]).to(v.dtype)
        old, old_ends = linear_write(q, last_k[:, :, :-1].to(k.dtype), again, log_decay, None, starts, carry, backend)
        return Trace(new + old, (ends + old_ends, last_k[:, :, -1], last_v[:, :, -1]))

    def step(self, state: State, k, v, gates) -> State:
        matrix, last_k, last_v = state
        again, backend = (last_k, last_v, gates["again"]), self.backend
        matrix = state_step(matrix, k, v, gates["log_decay"], gates["write"], again, backend=backend)
        return matrix, k.to(matrix.dtype, copy=True), v.to(matrix.dtype, copy=True)
