# Copyright 2026 the mc-transformers authors.
"""PagedMixer: a mixer whose memories lie in vLLM's pool of blocks."""

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from ...configuration_mc import LAYER_TYPE, MCConfig
from ...modeling_mc.mixer import MCMixer
from ...modeling_mc.segments import SegmentTable
from .backend import MCBackend
from .blocks import Blocks, OneLayer, make_blocks
from .limits import rank_config, segments_per_block, state_dtype
from .steps import Call


logger = init_logger(f"vllm.{__name__}")


class PagedMixer(MCMixer, AttentionLayerBase):
    """The mixer of a memory layer, or one rank's heads of it.

    Args:
        config: of the whole model. prefix: the layer's name in vLLM.
    """

    def __init__(self, config: MCConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str) -> None:
        self.ranks = get_tensor_model_parallel_world_size()
        super().__init__(rank_config(config, self.ranks), layer_idx)
        self.name, self.alone = prefix, set(config.layer_types) == {LAYER_TYPE}
        self.cuts = bool(vllm_config.cache_config.enable_prefix_caching) or vllm_config.kv_transfer_config is not None
        self.blocks: Blocks | None = None  # made once the weights are there
        self.kv_cache = torch.tensor([])
        self.pool: dict[str, torch.Tensor] = {}
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are called {prefix!r}")
        layers[prefix] = self

    # ------------------------------------------------------------------------------------------------------ for vLLM
    def get_attn_backend(self) -> type[MCBackend]:
        return MCBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        """To vLLM it is attention that stores so many bytes for every segment, or for every few."""
        model, per_block = vllm_config.model_config, segments_per_block(vllm_config)
        size = per_block * self.config.segment_size
        self.blocks = make_blocks(self, model.max_model_len, model.dtype, state_dtype(vllm_config), per_block)
        fields = {
            "block_size": size,
            "num_kv_heads": 1,
            "head_size": 1,
            "dtype": torch.int8,
            "state_content_bytes": self.blocks.nbytes,
            "tokens_per_state": size,
        }
        if not self.alone:  # attention layers share the blocks, and need them all
            self.blocks.reach = None
        if self.layer_idx == self.config.layer_types.index(LAYER_TYPE) and not get_tensor_model_parallel_rank():
            self._tell_sizes(model.max_model_len)
        if self.blocks.reach is None:
            return FullAttentionSpec(**fields)
        window = self.blocks.reach * self.config.segment_size + 1
        return SlidingWindowSpec(**fields, sliding_window=max(2, window))  # with the token before, at least

    def _tell_sizes(self, longest: int) -> None:
        layers, mib = self.config.layer_types.count(LAYER_TYPE), 1 / 2**20
        logger.info(
            "%d memory layers: %.3f MiB per block of %d tokens, at most %.2f MiB for a request of %d tokens%s",
            layers,
            layers * self.blocks.nbytes * mib,
            self.blocks.per_block * self.config.segment_size,
            layers * self.blocks.request_bytes(longest) * mib,
            longest,
            "" if self.alone else ", and what attention layers keep of every token",
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Args: kv_cache: `[num, 1, 1, nbytes]` int8."""
        self.kv_cache = kv_cache
        self.pool = self.blocks.views(kv_cache[:, 0, 0])

    def calls(self, starts: list[int], before: list[int], blocks: torch.Tensor) -> list[Call]:
        """The calls of a step. Args: as in `Planner.calls`."""
        return self.blocks.planner(self.cuts).calls(starts, before, blocks)

    # ------------------------------------------------------------------------------------------------------- forward
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` to `[tokens, hidden]`, the tokens of all requests of a step one after the other."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # profiling: no request, no blocks
            table = SegmentTable.build(1, len(x), self.config.segment_size, x.device, align=self.memory.align)
            out = super().forward(x[None], table)[0]
        else:
            out = torch.zeros_like(x)
            for call in metadata[self.name].calls:
                layer = self.blocks.load(self.pool, call)
                call.scatter(super().forward(call.gather(x), call.table, OneLayer(self.layer_idx, layer)), out)
                self.blocks.save(self.pool, call, layer)
        return out if self.ranks == 1 else tensor_model_parallel_all_reduce(out)
