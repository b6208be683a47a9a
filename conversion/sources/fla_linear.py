# Copyright 2026 the mc-transformers authors.
"""LinearAttention of flash-linear-attention, with the identity as feature map, to `linear`."""

from ..source import Source, refuse
from .fla import LINEAR_RULES, linear_fields


def make_config(found: dict) -> dict:
    found = {"feature_map": "elementwise_product", **found}  # the library's default
    for name in ("norm_q", "norm_k", "norm_feature_map"):
        if found.get(name):
            refuse(f"normalised queries or keys ({name})", True, "False")
    return linear_fields(found, expand_v=1, hidden_ratio=4) | {"memory": "linear", "use_output_gate": False}


SOURCE = Source("fla_linear", ("linear_attn",), make_config, LINEAR_RULES)
