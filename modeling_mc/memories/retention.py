# Copyright 2026 the mc-transformers authors.
"""Retention: a fixed decay per head, gamma_h = 1 - 2^(-5 - h) (RetNet's schedule)."""

import torch

from .base import compute_dtype
from .matrix import MatrixMemory


class RetentionMemory(MatrixMemory):
    scalar_decay = True

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        head = torch.arange(k.shape[-2], device=k.device, dtype=compute_dtype(k))
        return {"log_decay": torch.log1p(-torch.exp2(-5.0 - head)).expand(k.shape[:-1])}
