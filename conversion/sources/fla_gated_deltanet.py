# Copyright 2026 the mc-transformers authors.
"""Gated DeltaNet of flash-linear-attention to `gated_delta`.

Queries are scaled by 1 / sqrt(d) there, behind their L2 norm, and are not here: the output norm takes the scale away,
RMSNorm(x / sqrt(d); eps) = RMSNorm(x; eps d). Without short convolutions SiLU remains: a convolution of width 1.
"""

import re

import torch

from ..source import Source, keep, refuse
from .delta_rule import QK_NORM_EPS
from .fla import BLOCK_RULES, LAYER, OURS, block_fields


DEFAULTS = {  # the library's
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2.0,
    "num_hidden_layers": 21,
    "conv_size": 4,
    "norm_eps": 1e-6,
}


def make_config(found: dict) -> dict:
    found = DEFAULTS | found
    keys, heads = found["num_heads"], found.get("num_v_heads") or found["num_heads"]
    if heads % keys:
        refuse("values that heads of keys share unevenly (num_v_heads)", heads, f"a multiple of num_heads={keys}")
    return block_fields(found, hidden_ratio=4) | {
        "memory": "gated_delta",
        "num_memory_heads": heads,
        "num_key_heads": keys,
        "head_dim": found["head_dim"],
        "value_head_dim": int(found["head_dim"] * found["expand_v"]),
        "conv_kernel_size": found["conv_size"] if _convolves(found) else 1,
        "qk_norm_eps": QK_NORM_EPS,
        "use_output_gate": found.get("use_gate", True),
        "output_norm_eps": found["norm_eps"] * found["head_dim"],
        "allow_negative_eigenvalues": found.get("allow_neg_eigval", False),
    }


def _convolves(found: dict) -> bool:
    return found.get("use_short_conv", True)


def _projection_targets(match: re.Match, found: dict) -> list[str]:
    """The projection, and the convolution that stands in for SiLU alone."""
    names = ["_proj.weight"] if _convolves(found) else ["_proj.weight", "_conv.weight"]
    return [match.expand(rf"{OURS}mixer.\2{name}") for name in names]


def _projection(tensor: torch.Tensor, found: dict) -> list[torch.Tensor]:
    return [tensor] if _convolves(found) else [tensor, tensor.new_ones(len(tensor), 1, 1)]


SOURCE = Source(
    name="gated_deltanet",
    model_types=("gated_deltanet",),
    make_config=make_config,
    zeros=("b_bias.bias",),
    rules=(
        *BLOCK_RULES,
        (LAYER + r"attn\.([qkv])_proj\.weight", _projection_targets, _projection),
        (LAYER + r"attn\.([goab])_proj\.weight", (OURS + r"mixer.\2_proj.weight",), keep),
        (LAYER + r"attn\.([qkv])_conv1d\.weight", (OURS + r"mixer.\2_conv.weight",), keep),
        (LAYER + r"attn\.dt_bias", (OURS + "mixer.a_bias.bias",), keep),
        (LAYER + r"attn\.A_log", (OURS + "mixer.memory.A_log.bias",), keep),
        (LAYER + r"attn\.o_norm\.weight", (OURS + "mixer.o_norm.weight",), keep),
    ),
)
