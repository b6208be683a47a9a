# Copyright 2026 the mc-transformers authors.
"""The attention layers of hybrids, which are Transformers' own, and rotary positions in memory layers."""

import importlib
import math

import torch
from torch import nn

from ..configuration_mc import MCConfig
from ..kernels.shared.ops import widest


# what `MCConfig.attention` names: the model of Transformers whose attention and rotary embedding are taken
SOURCES = {"llama": "Llama", "qwen3": "Qwen3", "olmo_hybrid": "OlmoHybrid", "qwen3_next": "Qwen3Next"}


def _take(kind: str, part: str) -> type[nn.Module]:
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    return getattr(module, SOURCES[kind] + part)


def make_attention(config: MCConfig, layer_idx: int) -> nn.Module:
    """An attention layer of the kind that the config names."""
    return _take(config.attention, "Attention")(config, layer_idx)


def make_rotary(config: MCConfig) -> nn.Module | None:
    """Rotary embedding of the attention layers; None where they have none."""
    return None if config.rope == "none" else _take(config.attention, "RotaryEmbedding")(config)


def rotate(x: torch.Tensor, position: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding, half split, in fp32; angles are float64 until their whole turns are taken off, so that a
    difference of positions is what it is at any position.

    Args:
        x: `[R, T, H, d]`, d even. position: `[R, T]` (or `[1, T]`) integers. theta: slowest wavelength / 2 pi.
    """
    half = x.shape[-1] // 2
    wide = widest(x.device)
    rate = theta ** -(torch.arange(half, device=x.device, dtype=wide) / half)
    angle = (position[..., None, None].to(wide) * rate).remainder(2 * math.pi).float()
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().unflatten(-1, (2, half)).unbind(-2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
