# Copyright 2026 the mc-transformers authors.
"""Gated linear attention in the Mamba-2 (SSD) form: S_t = a_t S_{t-1} + b_t k_t v_t^T.

With `gate_form="sigmoid"` a_t = sigmoid(W_a x_t + b_a) and b_t = 1. With `gate_form="step"` one step size per head and
token, d_t = softplus(W_a x_t + b_a), is both: a_t = exp(-exp(A_log) d_t) and b_t = d_t (Mamba-2, arXiv 2405.21060).
"""

import torch
from torch.nn import functional as F

from .base import Bias
from .gated_delta import spread_rates
from .matrix import MatrixMemory


class GatedLinearMemory(MatrixMemory):
    gate_names = ("a",)
    gate_bias = {"a": 4.0}  # decay near 1 at the start: 0.982 a token
    own_fields = ("gate_form",)
    scalar_decay = True

    def __init__(self, config) -> None:
        super().__init__(config)
        if config.gate_form == "step":
            self.gate_bias = {"a": -4.6}  # step size 0.01
            self.A_log = Bias((self.num_heads,), spread_rates)

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if not hasattr(self, "A_log"):
            return {"log_decay": F.logsigmoid(raw["a"])}
        step = F.softplus(raw["a"])
        return {"log_decay": -self.A_log(step.dtype).exp() * step, "write": step}
