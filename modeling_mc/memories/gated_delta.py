# Copyright 2026 the mc-transformers authors.
"""Gated delta rule: S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T (Gated DeltaNet, arXiv 2412.06464)."""

import torch
from torch.nn import functional as F
from transformers import initialization as init

from ...kernels.step.state import state_step
from ...kernels.write.delta import delta_write, fla_rule, fla_write
from ..segments import SegmentTable
from .base import Bias, State, Trace
from .matrix import MatrixMemory


def spread_rates(A_log: torch.Tensor) -> None:
    """Heads forget at rates A = 1 ... 16 at the start."""
    init.copy_(A_log, torch.logspace(0, 4, len(A_log), base=2).log())


class GatedDeltaMemory(MatrixMemory):
    """Gates as in published checkpoints: a_t = exp(-exp(A_log) softplus(W_a x_t + b_a)), b_t = sigmoid(W_b x_t + b_b),
    doubled with `allow_negative_eigenvalues`, so that a write can also turn a stored value around.

    Half-precision inputs on a GPU are written by the package `fla` when it is installed, one segment after
    the other when they depend on each other; everything else by `kernels.write.delta`.
    """

    gate_names = ("a", "b")
    gate_bias = {"a": -4.6}  # softplus = 0.01: decays from 0.99 (A = 1) to 0.85 (A = 16) at the start
    has_triton = False  # `delta_write` has none
    own_fields = ("allow_negative_eigenvalues",)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.A_log = Bias((self.num_heads,), spread_rates)

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        decay = self.A_log(raw["a"].dtype).exp() * F.softplus(raw["a"])
        strength = raw["b"].sigmoid()
        return {"log_decay": -decay, "write": 2 * strength if self.config.allow_negative_eigenvalues else strength}

    def _use_fla(self, v: torch.Tensor) -> bool:
        """Whether `fla` is there, was not ruled out, and can do it."""
        return (
            v.is_cuda
            and v.dtype in (torch.bfloat16, torch.float16)
            and self.config.mc_backend in ("auto", "triton")
            and max(self.key_dim, self.value_dim) <= 256
            and not torch.compiler.is_compiling()
            and fla_rule() is not None
        )

    def write(self, q, k, v, gates, table: SegmentTable, state: State | None, carry: bool) -> Trace:
        function = fla_write if self._use_fla(v) else delta_write
        initial = None if state is None else state[0]
        starts = table.starts if carry else None
        online, ends = function(q, k, v, gates["log_decay"], gates["write"], initial, starts, carry)
        return Trace(online, (ends,))

    def step(self, state: State, k, v, gates) -> State:
        strengths, backend = (gates["log_decay"], gates["write"]), self.backend
        return (state_step(state[0], k, v, *strengths, delta=True, backend=backend),)
