# Copyright 2026 the mc-transformers authors.
"""The layer alone: Memory Caching as a module of any model."""

import difflib
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..configuration_mc import MCConfig
from ..kernels.shared.ops import unobserved
from .cache import MCCache
from .cache_layer import MCCacheLayer
from .context_parallel import active_shards, check_shards
from .mixer import MCMixer, Mixer
from .segments import SegmentTable


# fields of the config that are arguments of their own here, or that only a whole model has
NOT_OF_A_LAYER = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_memory_heads",
    "hidden_act",
    "max_position_embeddings",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "layer_types",
    "sliding_window",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "route_sharing",
    "attention",
    "attention_norm",
}


def config_of_layer(who: str, allowed: Iterable[str], fields: dict, num_hidden_layers: int, **others) -> MCConfig:
    """The config of a layer that stands alone.

    Args:
        who: named in errors. allowed: names of fields that the user may give. fields: those that were given.

    Raises:
        ValueError: a name that is not allowed, or what `MCConfig` refuses.
    """
    for name in fields.keys() - set(allowed):
        near = difflib.get_close_matches(name, allowed, 1, 0.7)
        hint = f"; is `{near[0]}` meant?" if near else f", allowed: {', '.join(sorted(allowed))}"
        raise ValueError(f"{who}: `{name}` is not a field of a memory layer{hint}")
    if num_hidden_layers < 1:
        raise ValueError(f"{who}: `layer_idx`={num_hidden_layers - 1} is not valid, allowed: an integer >= 0")
    return MCConfig(vocab_size=1, intermediate_size=0, num_hidden_layers=num_hidden_layers, **others, **fields)


class CachedLayer(nn.Module):
    """A mixer in a model of somebody else's: it finds out by itself where its tokens stand.

    Attributes:
        config: the `MCConfig` that its arguments amount to.
    """

    def __init__(self, config: MCConfig, mixer: Mixer) -> None:
        super().__init__()
        if config.segmentation == "content":
            config.refuse("segmentation", "'constant' or 'logarithmic' for a layer alone: a whole model decides")
        self.config, self.mixer = config, mixer

    @property
    def layer_idx(self) -> int:
        """Its number among the layers that share a cache."""
        return self.mixer.layer_idx

    def _place(
        self,
        x: torch.Tensor,
        width: int,
        attention_mask: torch.Tensor | None,
        cu_seq_lens: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[SegmentTable, MCCacheLayer | None]:
        """Where tokens `[B, T, width]` stand, and what of the cache they read.

        Raises:
            ValueError: arguments that do not fit; see `MemoryCaching.forward`.
        """
        if x.ndim != 3 or x.shape[-1] != width or not x.numel() or not x.is_floating_point():
            raise ValueError(
                f"`x` must be floats of shape (rows, tokens, {width}), at least one row and token, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
        if active_shards() is not None:
            absent = {"attention_mask": attention_mask, "cu_seq_lens": cu_seq_lens, "cache": cache}
            check_shards(self.config, x.shape[1], **absent)
        if cache is not None and cu_seq_lens is not None:
            raise ValueError("`cu_seq_lens` (packed documents) and `cache` exclude each other: leave one out")
        layer = None
        if cache is not None:
            if self.layer_idx >= len(cache.layers):
                raise ValueError(
                    f"`cache` has {len(cache.layers)} layers, and this one is number {self.layer_idx}: make it by "
                    "`make_cache(model)`, for all layers of a model"
                )
            layer = self.mixer.cache_layer(cache, x)
        if attention_mask is not None and layer is not None:
            attention_mask = self._new_part(attention_mask, x, layer)
        table = self.mixer.table(x, attention_mask, layer, cu_seq_lens=cu_seq_lens)
        return replace(table, shards=active_shards()), layer

    @staticmethod
    def _new_part(mask: torch.Tensor, x: torch.Tensor, layer: MCCacheLayer) -> torch.Tensor:
        """The mask of the tokens x `[B, T, ...]` alone."""
        rows, num_tokens = x.shape[:2]
        if tuple(mask.shape) == (rows, num_tokens):
            return mask
        seen = layer.get_seq_length()
        if not unobserved() and tuple(mask.shape) != (rows, int(seen) + num_tokens):
            raise ValueError(
                f"`attention_mask` must have shape {(rows, num_tokens)} or, with what was read, "
                f"{(rows, int(seen) + num_tokens)}, got {tuple(mask.shape)}"
            )
        return mask[:, -num_tokens:]

    def extra_repr(self) -> str:
        """What kind of layer it is."""
        names = ("memory", "aggregation", "segmentation", "segment_size", "state_init")
        return ", ".join(f"{name}={getattr(self.config, name)!r}" for name in names)


class MemoryCaching(CachedLayer):
    """A sequence mixer with cached memories, `[B, T, hidden_size]` to the same: what stands in the place of attention
    in an `MCModel`, without the model. Norms before it, residuals and MLPs are yours.

    Weights start as in a model: linear maps normal with `initializer_range`, no biases.

    Args:
        hidden_size (`int`): width of the input and of the output.
        num_heads (`int`): heads, each with a memory of its own.
        memory (`str`): the write rule, see `MCConfig`.
        aggregation (`str`): the read rule, see `MCConfig`.
        segment_size (`int`): tokens per segment.
        layer_idx (`int`): number of the layer among those that share a cache, from 0 on.
        fields: any other field of `MCConfig` that concerns a memory layer, for example `state_init`, `head_dim`,
            `conv_kernel_size` or `mc_backend`.

    Attributes:
        config: the `MCConfig` that all of this amounts to.

    Raises:
        ValueError: a name that is not such a field, a value that is not allowed, or a combination that means nothing.

    Example:
        >>> layer = MemoryCaching(64, 2, memory="gated_linear", segment_size=16)
        >>> x = torch.randn(3, 100, 64)
        >>> layer(x).shape
        torch.Size([3, 100, 64])
        >>> cache = make_cache(layer)
        >>> pieces = torch.cat([layer(piece, cache=cache) for piece in x.split([33, 1, 66], 1)], 1)
        >>> torch.allclose(pieces, layer(x), atol=1e-5), cache.num_segments
        (True, 6)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        memory: str = "linear",
        aggregation: str = "grm",
        segment_size: int = 256,
        layer_idx: int = 0,
        **fields,
    ) -> None:
        config = config_of_layer(
            "MemoryCaching",
            set(MCConfig.__annotations__) - NOT_OF_A_LAYER,
            fields,
            hidden_size=hidden_size,
            num_hidden_layers=layer_idx + 1,
            num_attention_heads=num_heads,
            memory=memory,
            aggregation=aggregation,
            segment_size=segment_size,
        )
        super().__init__(config, MCMixer(config, layer_idx))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as a model of this family does."""
        for module in self.mixer.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    init.zeros_(module.bias)
            elif hasattr(module, "init_weights"):
                module.init_weights()
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Every token's answer from the memory of its segment and the cached ones before it.

        Args:
            x: `[B, T, hidden_size]` in the dtype of the weights; B, T >= 1.
            attention_mask: `[B, T]`, or with the tokens in the cache `[B, read + T]`, of any dtype: 0 = padding,
                anywhere. Segments count from a row's first real token. None = no padding.
            cu_seq_lens: `[documents + 1]` integers from 0 to T, borders of documents packed into one row (B = 1, no
                padding, no cache).
            cache: of `make_cache`: what was read before, in pieces of any length down to a token. It is changed in
                place. None = a text begins, and nothing is kept.

        Returns:
            `[B, T, hidden_size]` in the dtype of x, zero at padding.

        Raises:
            ValueError: x, mask or borders of another shape, or a cache that was filled by another model or batch.
        """
        table, _ = self._place(x, self.config.hidden_size, attention_mask, cu_seq_lens, cache)
        return self.mixer(x, table, cache)


def make_cache(model: nn.Module, **kwargs) -> MCCache:
    """An empty cache that the `MemoryCaching` layers and wrapped RNNs of a model share: pass it to each of them.

    It is an `MCCache`: it knows its size, its rows can be selected and repeated (`batch_select_indices`), and it can
    be bounded, offloaded, stored in 8 bits and rolled back. Its files (`save_pretrained`) are for whole `MCModel`s:
    `torch.save` it.

    Args:
        model: a layer, or any module that has some; their `layer_idx` must be 0, 1, 2, ... in any order.
        kwargs: of `MCCache`, for example `offload_segments` or `state_dtype`.

    Raises:
        ValueError: no such layer in it, or two of the same number, or one that is missing.
    """
    layers = [module for module in model.modules() if isinstance(module, CachedLayer)]
    found = sorted(layer.layer_idx for layer in layers)
    if not found or found != list(range(len(found))):
        raise ValueError(
            f"make_cache: `model` has layers with a memory with `layer_idx` {found}, allowed: one or more, numbered "
            "from 0 on without gaps"
        )
    return MCCache(config=max(layers, key=lambda layer: layer.layer_idx).config, **kwargs)
