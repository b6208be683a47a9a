# Copyright 2026 the mc-transformers authors.
"""RetNet of flash-linear-attention to `retention` with rotary queries and keys."""

from ..source import Source, refuse
from .fla import LINEAR_RULES, linear_fields


def make_config(found: dict) -> dict:
    if not found.get("use_output_gate", True):
        refuse("no output gate (use_output_gate)", False, "True")
    rope = {"rope_type": "default", "rope_theta": 10000.0}  # fixed in the library
    fields = {"memory": "retention", "rope": "all", "rope_parameters": rope}
    return linear_fields(found, expand_v=2, hidden_ratio=2) | fields


SOURCE = Source("retnet", ("retnet",), make_config, LINEAR_RULES)
