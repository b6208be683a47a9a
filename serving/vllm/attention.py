# Copyright 2026 the mc-transformers authors.
"""Attention layers of hybrids, whose blocks are as long as the memory layers'."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from ...configuration_mc import MCConfig
from .limits import refuse, segments_per_block


class SegmentAttention(Attention):
    """vLLM's attention in the blocks that it shares with the memory layers. Keys and values that have left a window
    stay in their blocks, as the memories beside them do."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=segments_per_block(vllm_config) * vllm_config.model_config.hf_config.segment_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            sliding_window=self.sliding_window,
        )


class MCAttention(nn.Module):
    """The attention of Llama, or with norms of queries and keys that of Qwen3."""

    def __init__(self, config: MCConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks, width = get_tensor_model_parallel_world_size(), config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if heads % ranks or (groups % ranks and ranks % groups):
            refuse("tensor_parallel_size", ranks, f"a divisor of the {heads} heads ({groups} of keys) of attention")
        self.width, self.heads, self.groups = width, heads // ranks, max(1, groups // ranks)
        options = {"bias": config.attention_bias}
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, width, heads, groups, prefix=f"{prefix}.qkv_proj", **options
        )
        self.o_proj = RowParallelLinear(heads * width, config.hidden_size, prefix=f"{prefix}.o_proj", **options)
        if config.attention == "qwen3":
            self.q_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        longest = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)
        self.rotary_emb = get_rope(width, max_position=longest, rope_parameters=config.rope_parameters)
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.attn = SegmentAttention(
            self.heads,
            width,
            width**-0.5,
            num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=config.sliding_window if sliding else None,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` at `positions` `[tokens]` to `[tokens, hidden]`."""
        sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        q, k, v = self.qkv_proj(x)[0].split(sizes, dim=-1)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q.unflatten(-1, (-1, self.width))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.width))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]
