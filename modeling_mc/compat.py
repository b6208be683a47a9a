# Copyright 2026 the mc-transformers authors.
"""What differs between versions of Transformers, and what it reads from tables of its own, where a family from outside
has to be entered by name."""

import functools
import inspect
import sys
from collections.abc import Callable

from transformers import configuration_utils
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto import modeling_auto

from ..configuration_mc import LAYER_TYPE, MCConfig


# What this version of Transformers calls a cache, in its arguments and outputs: `past_key_values` before 5.24.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def rename_cache(arguments: dict, name: str) -> dict:
    """`arguments` with a cache under `name`, whichever of its two names it has.

    Raises:
        ValueError: two caches.
    """
    given = {key: arguments[key] for key in ("cache", "past_key_values") if key in arguments}
    if not given:
        return arguments
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) > 1:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give only one of them")
    others = {key: value for key, value in arguments.items() if key not in given}
    return others | {name: caches[0] if caches else None}


def cache_by_any_name(forward: Callable) -> Callable:
    """Decorates a method with an argument `cache`: it may be called `past_key_values`, too, and its signature, which
    Transformers reads, has the name of the version."""

    @functools.wraps(forward)
    def renamed(self, *args, **kwargs):
        return forward(self, *args, **rename_cache(kwargs, "cache"))

    signature = inspect.signature(forward)
    parameters = [p.replace(name=CACHE_NAME) if p.name == "cache" else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)
    return renamed


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
