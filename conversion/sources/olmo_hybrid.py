# Copyright 2026 the mc-transformers authors.
"""OLMo-Hybrid to `gated_delta`: its attention layers stay, with their norms behind attention and MLP."""

import re

from ..source import Source, keep
from .delta_rule import convolution, hybrid_fields


O_NORM_EPS = 1e-5  # not in its config


def make_config(found: dict) -> dict:
    rope = found.get("rope_parameters")
    rotary = rope is not None and rope.get("rope_theta") is not None
    return hybrid_fields(found, O_NORM_EPS) | {
        "allow_negative_eigenvalues": found["linear_allow_neg_eigval"],
        "attention": "olmo_hybrid",
        "attention_norm": "post",
        "rope": "attention" if rotary else "none",
        "rope_parameters": rope if rotary else None,
    }


# first and second norm of a layer, as files name them and as Transformers does; saving renames the first norm of
# attention layers like the second of the others
NORMS = {
    "linear_attention": {
        "attention_layer_norm": 1,
        "input_layernorm": 1,
        "feedforward_layer_norm": 2,
        "post_attention_layernorm": 2,
    },
    "full_attention": {"post_attention_layernorm": 1, "feedforward_layer_norm": 1, "post_feedforward_layernorm": 2},
}


def _norms(match: re.Match, found: dict) -> list[str]:
    number = NORMS[found["layer_types"][int(match[1])]].get(match[2])
    target = {1: "input_layernorm", 2: "post_attention_layernorm"}.get(number, match[2])
    return [f"model.layers.{match[1]}.{target}.weight"]


LAYER, MIXER = r"model\.layers\.(\d+)\.", r"model.layers.\1.mixer."
SOURCE = Source(
    name="olmo_hybrid",
    model_types=("olmo_hybrid",),
    make_config=make_config,
    zeros=("b_bias.bias",),
    # Transformers saves three equal parts, whatever is in them
    merges=((r".+\.linear_attn\.(?P<part>[qkv]_)conv1d\.weight", ("q_", "k_", "v_")),),
    rules=(
        (r"(model\.embed_tokens|model\.norm|lm_head)\.weight", (r"\1.weight",), keep),
        (LAYER + r"(mlp\.\w+|self_attn\.\w+)\.(weight|bias)", (r"model.layers.\1.\2.\3",), keep),
        (LAYER + r"(\w+norm)\.weight", _norms, keep),
        (LAYER + r"linear_attn\.([qkvgoab]_proj|o_norm)\.weight", (MIXER + r"\2.weight",), keep),
        (LAYER + r"linear_attn\.conv1d\.weight", tuple(f"{MIXER}{x}_conv.weight" for x in "qkv"), convolution),
        (LAYER + r"linear_attn\.dt_bias", (MIXER + "a_bias.bias",), keep),
        (LAYER + r"linear_attn\.A_log", (MIXER + "memory.A_log.bias",), keep),
    ),
)
