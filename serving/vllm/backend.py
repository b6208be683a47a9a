# Copyright 2026 the mc-transformers authors.
"""What vLLM's model runner asks of an attention-like layer: a backend whose builder says, once per step, which request
stands where, and which blocks of the pool are its own."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImplBase,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from .steps import Call


@dataclass
class MCStep:
    """The calls of one step of the scheduler, for all memory layers."""

    calls: list[Call]


class MCBuilder(AttentionMetadataBuilder[MCStep]):
    """All memory layers of a model share one: their blocks are alike."""

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MCStep:
        batch = common_attn_metadata
        starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        # exact without speculation; the other one would wait for the device
        lengths = batch.seq_lens if batch.seq_lens_cpu_upper_bound is None else batch.seq_lens_cpu_upper_bound
        lengths = lengths[: batch.num_reqs].tolist()
        before = [n - (stop - start) for n, start, stop in zip(lengths, starts, starts[1:], strict=False)]
        return MCStep(self.layer.calls(starts, before, batch.block_table_tensor[: batch.num_reqs].long()))


class MCBackend(AttentionBackend):
    """A block is one segment, and never split."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(1) if kv_cache_spec is None else kv_cache_spec.block_size]

    @staticmethod
    def get_name() -> str:
        return "MC_SEGMENTS"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        raise NotImplementedError("the layer itself is the implementation")

    @staticmethod
    def get_builder_cls() -> type[MCBuilder]:
        return MCBuilder
