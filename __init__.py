# Copyright 2026 the mc-transformers authors.
"""Memory Caching for Transformers: `import mc_transformers` registers the model family with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_mc import MCConfig
from .hub import models as _hub
from .modeling_mc.cache import MCCache
from .modeling_mc.cache_layer import MCCacheLayer
from .modeling_mc.layer import MemoryCaching, make_cache
from .modeling_mc.model import (
    MC_LORA_TARGETS,
    MCForCausalLM,
    MCForQuestionAnswering,
    MCForSequenceClassification,
    MCForTokenClassification,
    MCModel,
    MCPreTrainedModel,
)
from .modeling_mc.warmup import warmup
from .tokenization_mc import byte_tokenizer


__version__ = "0.1.0"

# what these classes save or push is a repository that loads where this package is not installed
MCPreTrainedModel.save_pretrained = _hub.save_pretrained
MCPreTrainedModel.push_to_hub = _hub.push_to_hub

AutoConfig.register("mc", MCConfig)
AutoModel.register(MCConfig, MCModel)
AutoModelForCausalLM.register(MCConfig, MCForCausalLM)
AutoModelForSequenceClassification.register(MCConfig, MCForSequenceClassification)
AutoModelForTokenClassification.register(MCConfig, MCForTokenClassification)
AutoModelForQuestionAnswering.register(MCConfig, MCForQuestionAnswering)

__all__ = [
    "MC_LORA_TARGETS",
    "MCCache",
    "MCCacheLayer",
    "MCConfig",
    "MCForCausalLM",
    "MCForQuestionAnswering",
    "MCForSequenceClassification",
    "MCForTokenClassification",
    "MCModel",
    "MCPreTrainedModel",
    "MemoryCaching",
    "byte_tokenizer",
    "make_cache",
    "warmup",
]
