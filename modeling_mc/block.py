# Copyright 2026 the mc-transformers authors.
"""One block of the decoder: norm, mixer or attention, norm, MLP."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_mc import LAYER_TYPE, MCConfig
from .attention import make_attention
from .mixer import MCMixer
from .segments import SegmentTable


class MCMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MCConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MCDecoderLayer(GradientCheckpointingLayer):
    """Norm, mixer or attention, norm, MLP, with residuals; or the norms behind what they otherwise precede."""

    def __init__(self, config: MCConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.window = {}
        if self.layer_type == LAYER_TYPE:
            self.mixer = MCMixer(config, layer_idx)
        else:
            self.self_attn = make_attention(config, layer_idx)
        if self.layer_type == "sliding_attention" and not hasattr(self.self_attn, "sliding_window"):
            self.window = {"sliding_window": config.sliding_window}  # Qwen3's attention knows its own
        self.post_norm = self.layer_type != LAYER_TYPE and config.attention_norm == "post"
        self.mlp = MCMLP(config) if config.intermediate_size else None
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.intermediate_size:
            self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        segment_table: SegmentTable | None = None,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        def mix(x: torch.Tensor) -> torch.Tensor:
            if self.layer_type == LAYER_TYPE:
                return self.mixer(x, segment_table, cache)
            window = self.window | kwargs
            return self.self_attn(x, position_embeddings, attention_mask, cache, **window)[0]

        hidden_states = self._residual(self.input_layernorm, mix, hidden_states)
        if self.mlp is None:
            return hidden_states
        return self._residual(self.post_attention_layernorm, self.mlp, hidden_states)

    def _residual(self, norm: nn.Module, function: Callable, x: torch.Tensor) -> torch.Tensor:
        return x + (norm(function(x)) if self.post_norm else function(norm(x)))
