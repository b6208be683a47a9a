# Copyright 2026 the mc-transformers authors.
"""Norms inside the mixer."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init

from ..kernels.shared.recompute import recomputed
from .tensor_parallel import HeadShare


def unit(x: torch.Tensor, eps: float | None) -> torch.Tensor:
    """x `[..., d]` / its L2 norm; with `eps`, which published delta-rule models have, x / sqrt(|x|^2 + eps)."""
    if eps is None:
        # torch's 1e-12 is zero in fp16, and a token of padding is zero too: 0 / 0 spoils all gradients
        return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))
    x32 = x.float() if x.dtype != torch.float64 else x
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class HeadRMSNorm(nn.RMSNorm):
    """RMS norm of each head's answer `[..., H, dv]`, then the output gate of the same shape."""

    share: HeadShare | None = None

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        weight = self.weight if self.share is None else self.share.whole(self.weight)

        def normed(x: torch.Tensor, gate: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
            x = F.rms_norm(x, self.normalized_shape, weight, self.eps)
            return x if gate is None else x * F.silu(gate)

        return recomputed(normed, x, gate, weight)


class GatedNorm(nn.Module):
    """The output gate, then an RMS norm over all heads of one key head, as in Mamba-2; `[..., H, dv]`."""

    share: HeadShare | None = None

    def __init__(self, heads: int, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(heads * width))

    def init_weights(self) -> None:
        init.ones_(self.weight)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        weight, groups = self.weight, self.groups
        if self.share is not None:
            weight, groups = self.share.part(weight), groups // self.share.size
        grouped = x.flatten(-2).unflatten(-1, (groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2)
        return (weight * normed).view_as(x)


class NoNorm(nn.Module):
    """Only the output gate."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return x if gate is None else x * F.silu(gate)


def make_output_norm(config: PreTrainedConfig) -> nn.Module:
    """What stands between the memories' answers and the output projection, for an `MCConfig`: which imports the
    memories, and they these norms."""
    heads, width = config.memory_heads, config.memory_value_dim
    eps = config.rms_norm_eps if config.output_norm_eps is None else config.output_norm_eps
    if config.output_norm == "head":
        return HeadRMSNorm(width, eps=eps)
    return GatedNorm(heads, width, config.memory_key_heads, eps) if config.output_norm == "gated" else NoNorm()
