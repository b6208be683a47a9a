# Copyright 2026 the mc-transformers authors.
"""Titans' long-term memory (eq. 34-36): descent on |M(k) - v|^2 with momentum and decay.

    S_t = b_t S_{t-1} - e_t grad,    W_t = a_t W_{t-1} + S_t

The signs of eq. 34-35 as printed, W_t = a_t W_{t-1} - S_t with the same S, climb the loss
(tests/model/test_deep_memory.py).
"""

import torch
from torch.nn import functional as F

from .deep import STEP_SIZE, DeepMemory, products


class TitansMemory(DeepMemory):
    gate_names = ("a", "b", "e")
    gate_bias = {"a": 4.0}  # keep-rate near 1 at the start: 0.982 a token
    loss = "l2"
    momentum = True

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "log_decay": F.logsigmoid(raw["a"]),
            "log_momentum": F.logsigmoid(raw["b"]),
            "step": STEP_SIZE * raw["e"].sigmoid(),
        }

    def coefficients(self, gates, valid):
        (decay, kept), (momentum, held) = products(gates["log_decay"]), products(gates["log_momentum"])
        decay = decay * valid[..., None, :]  # momentum moves the maps only where there is a token
        mix = decay @ momentum * gates["step"][..., None, :]
        enter = torch.stack([kept, (decay @ held[..., None])[..., 0]], -1)
        leave = torch.stack([mix[..., -1, :], momentum[..., -1, :] * gates["step"]], -1)
        after = torch.stack([torch.zeros_like(held[..., -1]), held[..., -1]], -1)
        return mix, enter, leave, torch.stack([enter[..., -1, :], after], -2)
