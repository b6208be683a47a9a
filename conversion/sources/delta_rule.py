# Copyright 2026 the mc-transformers authors.
"""What the hybrids of gated delta rule and attention in Transformers have in common."""

import torch

from ..source import refuse


LAYER_TYPES = {"linear_attention": "memory_caching", "full_attention": "full_attention"}
QK_NORM_EPS = 1e-6  # of the L2 norm in all of them


def hybrid_fields(found: dict, norm_eps: float) -> dict:
    """Fields of an MCConfig that every one of these hybrids shares.

    Queries are scaled by 1 / sqrt(d) there and are not here: RMSNorm(x / sqrt(d); eps) = RMSNorm(x; eps d).
    """
    unknown = set(found["layer_types"]) - set(LAYER_TYPES)
    if unknown:
        refuse("other kinds of layers (layer_types)", sorted(unknown), ", ".join(LAYER_TYPES))
    if found.get("hidden_act", "silu") != "silu":
        refuse("another activation (hidden_act)", found["hidden_act"], "'silu'")
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "attention_dropout",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    return {name: found[name] for name in same if name in found} | {
        "head_dim": found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
        "layer_types": [LAYER_TYPES[kind] for kind in found["layer_types"]],
        "num_memory_heads": found["linear_num_value_heads"],
        "num_key_heads": found["linear_num_key_heads"],
        "key_head_dim": found["linear_key_head_dim"],
        "value_head_dim": found["linear_value_head_dim"],
        "conv_kernel_size": found["linear_conv_kernel_dim"],
        "memory": "gated_delta",
        "qk_norm_eps": QK_NORM_EPS,
        "output_norm_eps": norm_eps * found["linear_key_head_dim"],
    }


def convolution(tensor: torch.Tensor, found: dict) -> tuple[torch.Tensor, ...]:
    """Rows of queries, keys and values."""
    keys = found["linear_num_key_heads"] * found["linear_key_head_dim"]
    return tensor.split([keys, keys, found["linear_num_value_heads"] * found["linear_value_head_dim"]])
