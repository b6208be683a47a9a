# Copyright 2026 the mc-transformers authors.
"""Everything that Transformers (and PEFT) look up by name and that a family from outside has to be entered into.

Two more things Transformers finds by itself: the cache of a memory layer, by the `_layer_type` of its class, and the
plans for parallel training, which are attributes of the config and of the models.
"""

import sys
from collections.abc import Callable, Iterable

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, configuration_utils
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.models.auto import modeling_auto

from ..configuration_mc import LAYER_TYPE, MCConfig


# the Auto class that makes each of our models
AUTO_CLASSES = {
    "MCModel": "AutoModel",
    "MCForCausalLM": "AutoModelForCausalLM",
    "MCForSequenceClassification": "AutoModelForSequenceClassification",
    "MCForTokenClassification": "AutoModelForTokenClassification",
    "MCForQuestionAnswering": "AutoModelForQuestionAnswering",
}
# Transformers' names of tasks: by these tables pipelines know what they support, and the Trainer shifts labels for
# label smoothing
TASKS = {
    "CAUSAL_LM": "MCForCausalLM",
    "SEQUENCE_CLASSIFICATION": "MCForSequenceClassification",
    "TOKEN_CLASSIFICATION": "MCForTokenClassification",
    "QUESTION_ANSWERING": "MCForQuestionAnswering",
}


def register_layer_type(mask: Callable, static_layer: type[CacheLayerMixin]) -> None:
    """Enter our layer type and the names of our models: all that a copy of this code in a repository needs, too.

    Args:
        mask: makes the mask of a memory layer. static_layer: its cache for `cache_implementation="static"`.
    """
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[LAYER_TYPE] = mask
    STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = static_layer
    for task, name in TASKS.items():
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").setdefault(MCConfig.model_type, name)
    # Before it resumes the Trainer reads a checkpoint's config.json as a bare config, which refuses layer types that
    # it does not know. Today's files have another name for theirs (`MCConfig.to_json_string`), earlier ones have not.
    for table in ("ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_LAYER_TYPES"):
        known = getattr(configuration_utils, table)
        if LAYER_TYPE not in known:
            setattr(configuration_utils, table, (*known, LAYER_TYPE))


def register_auto_classes(models: Iterable[type]) -> None:
    """Make the Auto classes know the family. Only the package does: of a repository's code `auto_map` says it.

    The models also become names of `transformers` itself, where `transformers serve` looks for its classes.
    """
    AutoConfig.register(MCConfig.model_type, MCConfig)
    for model in models:
        setattr(transformers, model.__name__, model)
        getattr(transformers, AUTO_CLASSES[model.__name__]).register(MCConfig, model)


def register_decoder(config: type[PreTrainedConfig], decoder: type) -> None:
    """Let heads, which make their decoder through `AutoModel`, find it by this class of config: that of a repository
    is loaded a second time."""
    AutoModel.register(config, decoder, exist_ok=True)


def register_lora_targets(targets: list[str]) -> None:
    """Make `targets` what PEFT adapts by default; only where the user has imported PEFT, which we never do."""
    if constants := sys.modules.get("peft.utils.constants"):
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(MCConfig.model_type, targets)
