# Copyright 2026 the mc-transformers authors.
"""Gated linear attention in the Mamba-2 (SSD) form: S_t = a_t S_{t-1} + k_t v_t^T, a_t = sigmoid(W_a x_t + b_a)."""

import torch
from torch.nn import functional as F

from .matrix import MatrixMemory


class GatedLinearMemory(MatrixMemory):
    gate_names = ("a",)
    gate_bias = {"a": 4.0}  # decay near 1 at the start: 0.982 a token

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"log_decay": F.logsigmoid(raw["a"])}
