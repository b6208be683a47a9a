# Copyright 2026 the mc-transformers authors.
"""What Transformers reads from tables of its own, where a family from outside has to be entered by name."""

import sys

from transformers import configuration_utils
from transformers.models.auto import modeling_auto

from ..configuration_mc import LAYER_TYPE, MCConfig


def enter_names(classes: dict[str, str]) -> None:
    """Enter class names by task ("CAUSAL_LM", ...), and our layer type.

    By these names the Trainer shifts labels for label smoothing, and pipelines know what they support. It also reads a
    checkpoint's config as a bare `PreTrainedConfig`, which refuses layer types that are not on a list.
    """
    for task, name in classes.items():
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").setdefault(MCConfig.model_type, name)
    for table in ("ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_LAYER_TYPES"):
        known = getattr(configuration_utils, table)
        if LAYER_TYPE not in known:
            setattr(configuration_utils, table, (*known, LAYER_TYPE))


def enter_lora_targets(targets: list[str]) -> None:
    """Make `targets` what PEFT adapts by default; only where the user has imported PEFT, which we never do."""
    if constants := sys.modules.get("peft.utils.constants"):
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(MCConfig.model_type, targets)
