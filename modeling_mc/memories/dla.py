# Copyright 2026 the mc-transformers authors.
"""Deep linear attention (eq. 30-33): gradient descent on -<M(k), v>, W_t = W_{t-1} - e_t grad; optional decay of W."""

import torch
from torch.nn import functional as F

from .deep import STEP_SIZE, DeepMemory, products


class DLAMemory(DeepMemory):
    gate_names = ("e",)
    gate_bias = {"a": 4.0}
    loss = "dot"
    momentum = False

    @classmethod
    def gate_names_for(cls, config) -> tuple[str, ...]:
        return ("a", "e") if config.memory_decay else ("e",)

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        gates = {"step": STEP_SIZE * raw["e"].sigmoid()}
        if "a" in raw:
            gates["log_decay"] = F.logsigmoid(raw["a"])
        return gates

    def coefficients(self, gates, valid):
        step = gates["step"]
        if "log_decay" not in gates:
            return step[..., None, :].expand(*step.shape, -1).tril(), None, step[..., None], None
        since, enter = products(gates["log_decay"])
        mix = since * step[..., None, :]
        return mix, enter[..., None], mix[..., -1, :, None], enter[..., -1:, None]
