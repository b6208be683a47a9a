# Copyright 2026 the mc-transformers authors.
"""Memory Caching for Transformers: `import mc_transformers` registers the model family with the Auto classes."""

from .configuration_mc import MCConfig
from .modeling_mc.cache import MCCache
from .modeling_mc.cache_layer import MCCacheLayer
from .modeling_mc.layer import MemoryCaching, make_cache
from .modeling_mc.look import LayerGates, plot_gates, read_gates
from .modeling_mc.model import (
    MC_LORA_TARGETS,
    MCForCausalLM,
    MCForQuestionAnswering,
    MCForSequenceClassification,
    MCForTokenClassification,
    MCModel,
    MCPreTrainedModel,
)
from .modeling_mc.prefix_store import PrefixStore
from .modeling_mc.registration import register_auto_classes
from .modeling_mc.rnn import CachedRNN, wrap_rnn
from .modeling_mc.stream import Stream
from .modeling_mc.warmup import warmup
from .tokenization_mc import byte_tokenizer


__version__ = "0.1.0"

register_auto_classes(
    (MCModel, MCForCausalLM, MCForSequenceClassification, MCForTokenClassification, MCForQuestionAnswering)
)

__all__ = [
    "MC_LORA_TARGETS",
    "CachedRNN",
    "LayerGates",
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
    "PrefixStore",
    "Stream",
    "byte_tokenizer",
    "make_cache",
    "plot_gates",
    "read_gates",
    "warmup",
    "wrap_rnn",
]
