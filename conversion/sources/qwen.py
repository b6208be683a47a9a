# Copyright 2026 the mc-transformers authors.
"""Text models of Qwen3.5, and Qwen3-Next where its MLPs are dense, to `gated_delta`; attention layers stay.

Their RMS norms scale by 1 + w, those of the family by w: the 1 goes into the weight.
"""

import torch

from ..source import Source, keep, refuse
from .delta_rule import convolution, hybrid_fields


def make_config(found: dict) -> dict:
    rope = found["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        refuse("scaled rotary positions (rope_type)", rope["rope_type"], "'default'")
    if "num_experts" in found:
        dense = set(found["mlp_only_layers"])
        if found["num_experts"] and dense != set(range(found["num_hidden_layers"])):
            refuse("a mixture of experts (num_experts)", found["num_experts"], "dense MLPs in all layers")
    return hybrid_fields(found, found["rms_norm_eps"]) | {
        "attention": "qwen3_next",
        "rope_parameters": {name: rope[name] for name in ("rope_type", "rope_theta", "partial_rotary_factor")},
    }


def _plus_one(tensor: torch.Tensor, found: dict) -> tuple[torch.Tensor]:
    return ((1 + tensor.float()).to(tensor.dtype),)


def _per_key_head(tensor: torch.Tensor, found: dict, *widths: int) -> list[torch.Tensor]:
    """Rows `[key heads, sum of widths]` of Qwen3-Next, cut into the parts that each key head has of everything."""
    groups = tensor.unflatten(0, (found["linear_num_key_heads"], -1)).split(list(widths), 1)
    return [part.flatten(0, 1) for part in groups]


def _qkvz(tensor: torch.Tensor, found: dict) -> list[torch.Tensor]:
    keys = found["linear_key_head_dim"]
    values = found["linear_num_value_heads"] // found["linear_num_key_heads"] * found["linear_value_head_dim"]
    return _per_key_head(tensor, found, keys, keys, values, values)


def _ba(tensor: torch.Tensor, found: dict) -> list[torch.Tensor]:
    heads = found["linear_num_value_heads"] // found["linear_num_key_heads"]
    return _per_key_head(tensor, found, heads, heads)


LAYER, MIXER = r"model\.(?:language_model\.)?layers\.(\d+)\.", r"model.layers.\1.mixer."
QKV = tuple(f"{MIXER}{name}_proj.weight" for name in "qkv")
SOURCE = Source(
    name="qwen",
    model_types=("qwen3_5_text", "qwen3_next"),
    make_config=make_config,
    zeros=("b_bias.bias",),
    rules=(
        (r"(?:mtp|model\.visual)\..*", (), keep),  # speculation heads and images: Transformers leaves them out too
        (r"model\.(?:language_model\.)?embed_tokens\.weight", ("model.embed_tokens.weight",), keep),
        (r"model\.(?:language_model\.)?norm\.weight", ("model.norm.weight",), _plus_one),
        (r"lm_head\.weight", ("lm_head.weight",), keep),
        (LAYER + r"(mlp\.\w+|self_attn\.\w+)\.(weight|bias)", (r"model.layers.\1.\2.\3",), keep),
        (LAYER + r"(input_layernorm|post_attention_layernorm)\.weight", (r"model.layers.\1.\2.weight",), _plus_one),
        (LAYER + r"linear_attn\.in_proj_qkv\.weight", QKV, convolution),
        (LAYER + r"linear_attn\.in_proj_qkvz\.weight", (*QKV, MIXER + "g_proj.weight"), _qkvz),
        (LAYER + r"linear_attn\.in_proj_ba\.weight", (MIXER + "b_proj.weight", MIXER + "a_proj.weight"), _ba),
        (LAYER + r"linear_attn\.in_proj_z\.weight", (MIXER + "g_proj.weight",), keep),
        (LAYER + r"linear_attn\.in_proj_([ab])\.weight", (MIXER + r"\2_proj.weight",), keep),
        (LAYER + r"linear_attn\.conv1d\.weight", tuple(f"{MIXER}{x}_conv.weight" for x in "qkv"), convolution),
        (LAYER + r"linear_attn\.dt_bias", (MIXER + "a_bias.bias",), keep),
        (LAYER + r"linear_attn\.A_log", (MIXER + "memory.A_log.bias",), keep),
        (LAYER + r"linear_attn\.norm\.weight", (MIXER + "o_norm.weight",), keep),
        (LAYER + r"linear_attn\.out_proj\.weight", (MIXER + "o_proj.weight",), keep),
    ),
)
