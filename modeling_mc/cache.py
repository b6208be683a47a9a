# Copyright 2026 the mc-transformers authors.
"""The segment-state cache: one state per finished segment, the running state, and nothing per token."""

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from ..configuration_mc import LAYER_TYPE


def memory_caching_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> torch.Tensor | None:
    """The part of a 2-D padding mask that covers the current tokens, also when there is just one."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -inputs_embeds.shape[1] :].contiguous()


LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[LAYER_TYPE] = memory_caching_mask


class MCCacheLayer(CacheLayerMixin):
    """Cache of one memory layer for a batch of B rows, each at its own position.

    All tensors have the batch as their first dimension and live in `tensors`:
    `position` `[B]` real tokens written; `conv.q/k/v` `[B, K - 1, C]` the convolutions' tails; running states, running
    summaries and finished segments as `History` describes them. With constant segmentation slot i of `kept.*` and
    `summaries` is the row's segment i; a row has finished the first `position // segment_size` of them.
    """

    _layer_type = LAYER_TYPE
    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self.num_tokens = 0  # with padding: the length that generate() counts
        self.signature: dict = {}

    # ------------------------------------------------------------------------------------------------- for the mixer
    def check(self, signature: dict, batch_size: int) -> None:
        """Refuse a cache that another kind of model or another batch has filled.

        Raises:
            ValueError: the layer already holds something that does not fit.
        """
        if not self.is_initialized:
            self.signature = signature
            return
        if self.signature != signature:
            differ = [f"{k}={self.signature[k]!r}, here {v!r}" for k, v in signature.items() if self.signature[k] != v]
            raise ValueError(f"`past_key_values` was filled by another model ({'; '.join(differ)}): use a new cache")
        if self.position.shape[0] != batch_size:
            raise ValueError(
                f"`past_key_values` holds a batch of {self.position.shape[0]} rows, the input has {batch_size}"
            )

    @property
    def position(self) -> torch.Tensor:
        return self.tensors["position"]

    def group(self, prefix: str) -> tuple[torch.Tensor, ...]:
        """The tensors `prefix.0`, `prefix.1`, ..."""
        names = (f"{prefix}.{i}" for i in range(len(self.tensors)))
        return tuple(self.tensors[name] for name in names if name in self.tensors)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None, *args, **kwargs):
        """Count the tokens of `key_states` `[B, T, ...]`, whose traces the mixer has left in `tensors`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.num_tokens += key_states.shape[1]
        return key_states, value_states

    def put(self, name: str, value: torch.Tensor) -> None:
        """Set a tensor `[B, ...]`."""
        self.tensors[name] = value

    def store(self, name: str, value: torch.Tensor, slot: torch.Tensor, keep: torch.Tensor) -> None:
        """Write `value` `[B, ...]` into slot `slot` `[B]` of tensor `name` for the rows that `keep` `[B]` marks."""
        stack = self.tensors[name]
        row = torch.arange(value.shape[0], device=value.device)
        slot = slot.clamp(max=stack.shape[1] - 1)
        value = torch.where(keep.view(-1, *[1] * (value.dim() - 1)), value.to(stack.dtype), stack[row, slot])
        frozen = stack.is_inference() and not torch.is_inference_mode_enabled()
        if value.requires_grad or stack.requires_grad or frozen:
            self.tensors[name] = stack.index_put((row, slot), value)
        else:
            stack.index_put_((row, slot), value)

    def slots(self, needed: int) -> int:
        """How many segment slots to allocate when `needed` are needed."""
        return needed

    def extend(self, prefixes: tuple[str, ...], size: int, copy_last: bool) -> None:
        """Lengthen dimension 1 of the tensors of these names to `size`, with zeros or copies of the last entry."""
        for name, stack in self.tensors.items():
            missing = size - stack.shape[1] if name.startswith(prefixes) else 0
            if missing > 0:
                more = stack[:, -1:].expand(-1, missing, *stack.shape[2:])
                self.tensors[name] = torch.cat([stack, more if copy_last else torch.zeros_like(more)], 1)

    # ------------------------------------------------------------------------------------------------- for the user
    @property
    def num_segments(self) -> int:
        """Memories of finished segments that the longest row can read."""
        if not self.group("kept"):
            return 0
        finished = int(self.position.max()) // self.signature["segment_size"]
        return finished.bit_count() if self.signature["segmentation"] == "logarithmic" else finished

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    # -------------------------------------------------------------------------------------------- for Transformers
    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before Transformers 5.23

    def _map(self, function) -> None:
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}

    def reset(self) -> None:
        self.tensors, self.num_tokens, self.is_initialized = {}, 0, False

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])


class MCCache(DynamicCache):
    """A `DynamicCache` of this family with the numbers that people want to know of a memory.

    Example:
        >>> cache = MCCache(config=model.config)
        >>> model.generate(**inputs, past_key_values=cache)
        >>> cache.num_segments, cache.nbytes
    """

    @property
    def memory_layers(self) -> list[MCCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, MCCacheLayer)]

    @property
    def num_segments(self) -> int:
        """Finished segments kept per memory layer (of the longest row)."""
        return max((layer.num_segments for layer in self.memory_layers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, attention layers' keys and values included."""
        total = sum(layer.nbytes for layer in self.memory_layers)
        for layer in self.layers:
            if not isinstance(layer, MCCacheLayer):
                total += sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
        return total
