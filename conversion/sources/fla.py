# Copyright 2026 the mc-transformers authors.
"""What the models of flash-linear-attention have in common: blocks, names, and queries scaled by 1 / sqrt(d).

In linear attention and RetNet the scale goes into the queries' projection: nothing but rotations stands between.
"""

import torch

from ..source import keep, refuse


REFUSED = {"use_short_conv": "short convolutions", "feature_map": "a feature map"}


def key_width(found: dict) -> int:
    return int(found["hidden_size"] * found.get("expand_k", 1)) // found["num_heads"]


def _mlp_width(found: dict, ratio: int) -> int:
    """The library's rule where the config gives no width: 2/3 of ratio x hidden size, up to a multiple of 256."""
    if found.get("intermediate_size"):
        return found["intermediate_size"]
    ratio = found.get("hidden_ratio", ratio) or 4
    return -(-int(found["hidden_size"] * ratio * 2 / 3) // 256) * 256


def block_fields(found: dict, hidden_ratio: int) -> dict:
    """Fields of an MCConfig that all models share but for the mixer; the argument is the library's default."""
    if found.get("attn") is not None:
        refuse("attention layers (attn)", found["attn"], "none")
    if found.get("hidden_act", "swish") not in ("swish", "silu"):
        refuse("another activation (hidden_act)", found["hidden_act"], "'swish'")
    return {
        "vocab_size": found.get("vocab_size", 32000),
        "hidden_size": found["hidden_size"],
        "intermediate_size": _mlp_width(found, hidden_ratio),
        "num_hidden_layers": found["num_hidden_layers"],
        "num_attention_heads": found["num_heads"],
        "rms_norm_eps": found.get("norm_eps", 1e-6),
        "max_position_embeddings": found.get("max_position_embeddings") or 2048,
        "tie_word_embeddings": found.get("tie_word_embeddings", False),
        **{name: found.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def linear_fields(found: dict, expand_v: float, hidden_ratio: int) -> dict:
    """The same with the mixer of linear attention and RetNet; the arguments are the library's defaults."""
    for name, piece in REFUSED.items():
        if found.get(name) not in (None, False, "identity"):
            refuse(f"{piece} ({name})", found[name], "none")
    heads = found["num_heads"]
    if found.get("num_kv_heads") not in (None, heads):
        refuse("values shared by heads (num_kv_heads)", found["num_kv_heads"], str(heads))
    return block_fields(found, hidden_ratio) | {
        "head_dim": key_width(found),
        "value_head_dim": int(found["hidden_size"] * found.get("expand_v", expand_v)) // heads,
        "conv_kernel_size": 0,
        "qk_norm": False,
    }


def _scaled(tensor: torch.Tensor, found: dict) -> tuple[torch.Tensor]:
    return ((tensor.float() * key_width(found) ** -0.5).to(tensor.dtype),)


LAYER, OURS = r"model\.layers\.(\d+)\.", r"model.layers.\1."
BLOCK_RULES = (
    (r"model\.embeddings\.weight", ("model.embed_tokens.weight",), keep),
    (r"(model\.norm|lm_head)\.weight", (r"\1.weight",), keep),
    (LAYER + r"attn_norm\.weight", (OURS + "input_layernorm.weight",), keep),
    (LAYER + r"mlp_norm\.weight", (OURS + "post_attention_layernorm.weight",), keep),
    (LAYER + r"mlp\.(gate|up|down)_proj\.weight", (OURS + r"mlp.\2_proj.weight",), keep),
)
LINEAR_RULES = (
    *BLOCK_RULES,
    (LAYER + r"attn\.q_proj\.weight", (OURS + "mixer.q_proj.weight",), _scaled),
    (LAYER + r"attn\.([kvgo])_proj\.weight", (OURS + r"mixer.\2_proj.weight",), keep),
    (LAYER + r"attn\.(?:norm|g_norm|g_norm_swish_gate)\.weight", (OURS + "mixer.o_norm.weight",), keep),
)
