# Copyright 2026 the mc-transformers authors.
"""What of vLLM and of the family does not go together: refused by name before anything is loaded."""

import itertools

import torch
from vllm.config import VllmConfig

from ...configuration_mc import LAYER_TYPE, MCConfig
from ...modeling_mc.memories import MEMORIES
from ...modeling_mc.tensor_parallel import mixed_by
from .backend import MCBackend
from .blocks import can_overlay


STATE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
STATE_DTYPE = "mc_state_dtype"  # in vLLM's `additional_config`
SEGMENTATIONS = ("constant", "logarithmic")
ATTENTION = ("llama", "qwen3")


def refuse(field: str, value: object, allowed: str) -> None:
    """Raises: ValueError, always."""
    raise ValueError(f"mc-transformers in vLLM: `{field}`={value!r} is not supported, allowed: {allowed}")


def check(vllm_config: VllmConfig) -> None:
    """Refuse what would give wrong answers, or none.

    Raises:
        ValueError: the message names the field, its value and what is allowed.
    """
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if config.segmentation not in SEGMENTATIONS:
        refuse("segmentation", config.segmentation, ", ".join(map(repr, SEGMENTATIONS)))
    if set(config.layer_types) != {LAYER_TYPE} and config.attention not in ATTENTION:
        refuse("attention", config.attention, ", ".join(map(repr, ATTENTION)))
    if vllm_config.speculative_config is not None:
        refuse("speculative_config", vllm_config.speculative_config.method, "None: a state cannot be rolled back")
    if parallel.pipeline_parallel_size > 1:
        refuse("pipeline_parallel_size", parallel.pipeline_parallel_size, "1")
    if parallel.decode_context_parallel_size > 1:
        refuse("decode_context_parallel_size", parallel.decode_context_parallel_size, "1")
    if vllm_config.quant_config is not None:
        refuse("quantization", vllm_config.quant_config.get_name(), f"None; for states see {STATE_DTYPE!r}")
    state_dtype(vllm_config)
    rank_config(config, parallel.tensor_parallel_size)


def state_dtype(vllm_config: VllmConfig) -> torch.dtype | None:
    """How states of finished segments are kept: `additional_config={"mc_state_dtype": "int8"}`; None = as computed.

    Raises:
        ValueError: another name than those of `MCCache`'s dtypes.
    """
    options = vllm_config.additional_config
    name = options.get(STATE_DTYPE, "float32") if isinstance(options, dict) else "float32"
    if name not in STATE_DTYPES:
        refuse(STATE_DTYPE, name, ", ".join(map(repr, STATE_DTYPES)))
    return STATE_DTYPES[name]


def segments_per_block(vllm_config: VllmConfig) -> int:
    """How many segments a block of the pool is long, for all layers: one where that costs nothing, eight where every
    block also holds a running state; more where attention layers need longer blocks; `--block-size` decides.

    Raises:
        ValueError: `block_size` is no multiple of `segment_size`, or not what attention layers can take.
    """
    cache, config = vllm_config.cache_config, vllm_config.model_config.hf_config
    size, layers = config.segment_size, vllm_config.compilation_config.static_forward_context.values()
    backends = {layer.get_attn_backend() for layer in layers} - {MCBackend}

    def fits(segments: int) -> bool:
        return all(backend.supports_block_size(segments * size) for backend in backends)

    if cache.user_specified_block_size:
        if cache.block_size % size or not fits(cache.block_size // size):
            sizes = [backend.get_supported_kernel_block_sizes() for backend in backends]
            refuse(
                "block_size", cache.block_size, f"multiples of segment_size={size}{f' and of {sizes}' * bool(sizes)}"
            )
        return cache.block_size // size
    least = 1 if can_overlay(config, state_dtype(vllm_config)) else 8
    return next(number for number in itertools.count(least) if fits(number))


def rank_config(config: MCConfig, ranks: int) -> MCConfig:
    """The config of one rank's share of a memory layer: a part of the heads, as everything between the projections is
    done head by head.

    Raises:
        ValueError: there is something that is not, or the heads do not divide.
    """
    if ranks == 1:
        return config
    if (mixed := mixed_by(config, MEMORIES[config.memory])) is not None:
        refuse("tensor_parallel_size", ranks, f"1 with {mixed[0]}={mixed[1]!r}, which mixes heads")
    if config.memory_heads % ranks or config.memory_key_heads % ranks:
        heads = f"{config.memory_heads} heads of memory layers ({config.memory_key_heads} of keys)"
        refuse("tensor_parallel_size", ranks, f"a divisor of the {heads}")
    fields = config.to_dict() | {
        "num_memory_heads": config.memory_heads // ranks,
        "num_key_heads": config.memory_key_heads // ranks,
        "key_head_dim": config.memory_key_dim,
        "value_head_dim": config.memory_value_dim,
    }
    return type(config).from_dict(fields)
