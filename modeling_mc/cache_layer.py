# Copyright 2026 the mc-transformers authors.
"""The segment-state cache: one state per finished segment, the running state, and nothing per token."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

from ..configuration_mc import LAYER_TYPE
from .borders import Borders
from .rollback import Rollback
from .storage import FixedStorage, Storage
from .transaction import Transaction


# what of a signature earlier versions did not know, in files and pickles, and what it then was
LATER = {"online_memory": "segment", "border_rule": "dissimilarity", "border_budget": 32.0, "least_segment_size": None}


def memory_caching_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> torch.Tensor | None:
    """The part of a 2-D padding mask that covers the current tokens, also when there is just one."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -inputs_embeds.shape[1] :].contiguous()


def is_memory_layer(layer: object) -> bool:
    """Whether a cache layer is one of ours; or of a bundle's copy of this code, loaded in the same process."""
    return hasattr(layer, "tensors") and hasattr(layer, "kept_dtype")


def memory_layer(cache: Cache, index: int) -> "MCCacheLayer":
    """Layer `index` of a cache, which a memory layer is to read and fill.

    Raises:
        ValueError: it was made without a config, is the cache of an attention layer, or of a model with fewer layers,
            or no cache at all.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if not is_memory_layer(layer):
        found, why = "nothing", ""
        if layer is not None:
            found = type(layer).__name__
            why = (
                " (PEFT's prefix tuning hands over keys and values of attention, which a memory layer cannot use: "
                "take prompt tuning or LoRA)"
            )
        elif isinstance(cache, Cache) and not layers:
            why = ", because it was made without a config"
        raise ValueError(
            f"`cache` ({type(cache).__name__}) holds {found} for memory layer {index}{why}, allowed: "
            "MCCache(config=model.config) or DynamicCache(config=model.config)"
        )
    cache.layers[index] = layer = own_layer(layer)
    return layer


def own_layer(layer: "MCCacheLayer") -> "MCCacheLayer":
    """A layer of a bundle's copy of this code as one of ours, if it is empty or of an earlier version: Transformers
    makes layers of the class that was imported last, and versions may differ. Other layers stay as they are."""
    if isinstance(layer, MCCacheLayer) or (layer.is_initialized and hasattr(layer, "storage")):
        return layer
    kind = MCStaticCacheLayer if layer.is_compileable else MCCacheLayer
    new = kind(max_cache_len=layer.get_max_length())
    if layer.is_initialized:
        new.__setstate__(vars(layer))
        return new
    new.kept_dtype, new.kept_device, new.record_past = layer.kept_dtype, layer.kept_device, layer.record_past
    new.keep_borders = getattr(layer, "keep_borders", False)
    return new


def _held_by(part: str, name: str) -> property:
    """An attribute of a cache layer that one of its parts holds."""

    def get(self):
        return getattr(getattr(self, part), name)

    def put(self, value):
        setattr(getattr(self, part), name, value)

    return property(get, put)


class MCCacheLayer(CacheLayerMixin):
    """Cache of one memory layer for a batch of B rows, each at its own position.

    What it holds is kept by `storage`, and `rollback` takes tokens back.

    Attributes:
        tensors: `position` `[B]` real tokens written; `conv.q/k/v` `[B, K - 1, C]` the convolutions' tails; running
            states, running summaries and finished segments as `History` describes them.
        num_tokens: tokens read, with padding: the length that `generate` counts.
        kept_dtype, kept_device: see `Storage`.
        signature: what of a layer's config decides the shapes and meaning of its states.
        record_past, recorded: see `Rollback`.
        keep_borders: note what else it takes to stand at a border again, in tensors `border.*` (`Slots.note`).
    """

    _layer_type: str | None = LAYER_TYPE
    _storage_type: type[Storage] = Storage
    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    keep_borders = False

    tensors = _held_by("storage", "tensors")
    num_tokens = _held_by("storage", "num_tokens")
    kept_dtype = _held_by("storage", "kept_dtype")
    kept_device = _held_by("storage", "kept_device")
    record_past = _held_by("rollback", "recording")
    recorded = _held_by("rollback", "recorded")

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.storage, self.rollback, self.signature = self._storage_type(), Rollback(), {}
        self.transaction = Transaction()

    def __setstate__(self, state: dict) -> None:
        """Also of earlier versions, whose layers held tensors and record themselves."""
        state = dict(state)
        if "storage" not in state:
            self.storage, self.rollback = self._storage_type(), Rollback()
            snapshot = state.pop("snapshot")
            for name in ("tensors", "num_tokens", "kept_dtype", "kept_device", "record_past", "recorded"):
                setattr(self, name, state.pop(name))
            if snapshot is not None:
                self.storage.snapshot = snapshot["tensors"], snapshot["num_tokens"]
                self.rollback.was_initialized = snapshot["initialized"]
        self.transaction = Transaction()
        vars(self).update(state)

    # ------------------------------------------------------------------------------------------------- for the mixer
    def check(self, signature: dict, batch_size: int) -> None:
        """Refuse a cache that another kind of model or another batch has filled.

        Args:
            signature: what of a layer's config decides the shapes and meaning of its states.
            batch_size: B of the coming forward.

        Raises:
            ValueError: the layer already holds something that does not fit.
        """
        self.storage.thaw()
        if not self.is_initialized:
            self.signature = signature
            return
        if self.signature != signature:
            mine, theirs = LATER | self.signature, LATER | signature
            if differ := [f"{k}={mine.get(k)!r}, here {v!r}" for k, v in theirs.items() if mine.get(k) != v]:
                raise ValueError(f"`cache` was filled by another model ({'; '.join(differ)}): use a new cache")
        if self.position.shape[0] != batch_size:
            raise ValueError(f"`cache` holds a batch of {self.position.shape[0]} rows, the input has {batch_size}")
        self._fetch()

    def _fetch(self) -> None:
        """Bring back what `offload` has moved."""
        if self.is_initialized and self.position.device != self.device:
            self._map(lambda t: t.to(self.device))

    def _map(self, function) -> None:
        self.storage.map(function)
        self.rollback.map(function)

    @property
    def position(self) -> torch.Tensor:
        """`[B]` int64: real tokens written, without padding."""
        return self.storage.tensors["position"]

    def bound(self, num_tokens: int) -> int:
        """Tokens that sizes must allow for when `num_tokens` more come."""
        return self.num_tokens + num_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.storage.settle(self.device)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None, *args, **kwargs):
        """Count the tokens of `key_states` `[B, T, ...]`, whose traces the mixer has left in `tensors`; returns its
        arguments, as Transformers' caches do.

        Raises:
            ValueError: values are given too, so the caller is an attention layer.
        """
        if value_states is not None:
            raise ValueError(
                "a memory layer's cache was given keys and values of attention: `cache` belongs to another "
                "model, use a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.storage.count(key_states.shape[1])
        return key_states, value_states

    # ------------------------------------------------------------------------------------------------- for the user
    @property
    def num_segments(self) -> int:
        """Memories of finished segments that the longest row can read."""
        if not self.storage.group("kept"):
            return 0
        if (number := self.tensors.get("cut.number")) is not None:  # content chose the borders
            finished = int(number.max())
        else:
            finished = Borders(self.signature["segment_size"]).finished(int(self.position.max()))
        if self.signature["segmentation"] == "logarithmic":
            return finished.bit_count()
        return min(finished, self.signature["max_cached_segments"] or finished)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this layer, on whatever device."""
        return self.storage.nbytes

    # -------------------------------------------------------------------------------------------- for Transformers
    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens read, padding included: the length that `generate` counts."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int | torch.Tensor, int]:
        """Length and offset of the mask of a forward of `query_length` tokens."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` before Transformers 5.23."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget everything; a static layer keeps the tensors themselves, which the next forward fills anew."""
        self.storage.clear()
        self.is_initialized, self.recorded, self.transaction = False, [], Transaction()

    def offload(self) -> None:
        """Move all tensors to host memory (Transformers' offloading layer by layer; see `MCCache` for segments). They
        are complete when this returns, since the host may read them next. The next forward brings them back."""
        self._map(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        """Nothing: Transformers fetches ahead on another stream and waits for it in `update`, before which a memory
        layer has read its tensors."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: row i goes on from row `beam_idx[i]`, `[B]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` `[B']`, in this order."""
        self._map(lambda t: t[indices.to(t.device)])

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs: a snapshot, and the inputs of every forward since the last crop."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, exactly: go back to the snapshot and write the tokens that stay once more.

        Args:
            tokens_to_remove: how many, as a negative number (a positive one means the same); 0 only drops the record.

        Raises:
            RuntimeError: more tokens than were recorded since the last crop (see `activate_past_recording`).
            ValueError: the cache is broken or in use (see `Transaction`).
        """
        with self.transaction:
            self._fetch()
            self.rollback.crop(self, tokens_to_remove)


class MCStaticCacheLayer(MCCacheLayer):
    """The same with tensors whose shape and address never change: for `cache_implementation="static"`, torch.compile
    and CUDA graphs. All sizes follow from `max_cache_len`; counters are tensors, changed in place."""

    _layer_type = None  # only the dynamic class registers itself under this layer type
    _storage_type = FixedStorage
    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len

    def bound(self, num_tokens: int) -> int:
        return self.max_cache_len

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0  # as attention's static layers: masks are made for all layers from the first one
