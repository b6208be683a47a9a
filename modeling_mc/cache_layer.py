# Copyright 2026 the mc-transformers authors.
"""The segment-state cache: one state per finished segment, the running state, and nothing per token."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

from ..configuration_mc import LAYER_TYPE
from ..kernels.step.decode import fetch
from ..kernels.step.slot import slot_write
from .borders import Borders
from .memories import State


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
        ValueError: it is the cache of an attention layer, or of a model with fewer layers, or no cache at all.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if not is_memory_layer(layer):
        found = "nothing" if layer is None else type(layer).__name__
        raise ValueError(
            f"`cache` ({type(cache).__name__}) holds {found} for memory layer {index}, allowed: an "
            "MCCache or DynamicCache(config=model.config); PEFT's prefix tuning hands over keys and values of "
            "attention, which a memory layer cannot use: take prompt tuning or LoRA"
        )
    cache.layers[index] = layer = own_layer(layer)
    return layer


def own_layer(layer: "MCCacheLayer") -> "MCCacheLayer":
    """An empty layer of a bundle's copy of this code as one of ours: Transformers makes layers of the class that was
    imported last, and versions may differ. Other layers stay as they are."""
    if isinstance(layer, MCCacheLayer) or layer.is_initialized:
        return layer
    kind = MCStaticCacheLayer if layer.is_compileable else MCCacheLayer
    new = kind(max_cache_len=layer.get_max_length())
    new.kept_dtype, new.kept_device, new.record_past = layer.kept_dtype, layer.kept_device, layer.record_past
    return new


class Kept:
    """Finished segments' states as a cache layer stores them, decoded and moved to the device that reads them."""

    def __init__(self, layer: "MCCacheLayer") -> None:
        self.layer, self.like = layer, layer.tensors["state.0"]
        self.num = len(layer.group("kept"))
        self.num_slots = layer.tensors["kept.0"].shape[1]

    def stored(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tensor `number` of all states `[B, S, H, ...]` as it is stored, and the scale of int8 ones."""
        return self.layer.tensors[f"kept.{number}"], self.layer.tensors.get(f"scale.{number}")

    def all(self) -> State:
        """`[B, S, H, ...]`."""
        return tuple(fetch(*self.stored(i), None, self.like) for i in range(self.num))

    def chosen(self, index: torch.Tensor) -> State:
        """`[B, k, H, ...]` for slots `[B, H, k]`: only these are fetched and decoded."""
        return tuple(fetch(*self.stored(i), index, self.like) for i in range(self.num))


@dataclass
class Recorded:
    """A forward that `crop` may have to repeat: the mixer that ran it, its input `[B, T, hidden]` and padding mask."""

    mixer: nn.Module
    hidden_states: torch.Tensor
    mask: torch.Tensor | None


class MCCacheLayer(CacheLayerMixin):
    """Cache of one memory layer for a batch of B rows, each at its own position.

    All tensors have the batch as their first dimension and live in `tensors`:
    `position` `[B]` real tokens written; `conv.q/k/v` `[B, K - 1, C]` the convolutions' tails; running states, running
    summaries and finished segments as `History` describes them.

    Attributes:
        kept_dtype: how finished segments' states are stored: None (as computed), a float dtype, or torch.int8 (with
            one scale per row of a state, `scale.i`).
        kept_device: where they are stored; None = where they are computed.
    """

    _layer_type: str | None = LAYER_TYPE
    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self.num_tokens: int | torch.Tensor = 0  # with padding: the length that generate() counts
        self.signature: dict = {}
        self.kept_dtype: torch.dtype | None = None
        self.kept_device: torch.device | None = None
        self.record_past = False
        self.recorded: list[Recorded] = []
        self.snapshot: dict | None = None

    # ------------------------------------------------------------------------------------------------- for the mixer
    def check(self, signature: dict, batch_size: int) -> None:
        """Refuse a cache that another kind of model or another batch has filled.

        Args:
            signature: what of a layer's config decides the shapes and meaning of its states.
            batch_size: B of the coming forward.

        Raises:
            ValueError: the layer already holds something that does not fit.
        """
        self._thaw()
        if not self.is_initialized:
            self.signature = signature
            return
        if self.signature != signature:
            differ = [f"{k}={self.signature[k]!r}, here {v!r}" for k, v in signature.items() if self.signature[k] != v]
            raise ValueError(f"`cache` was filled by another model ({'; '.join(differ)}): use a new cache")
        if self.position.shape[0] != batch_size:
            raise ValueError(f"`cache` holds a batch of {self.position.shape[0]} rows, the input has {batch_size}")
        self._fetch()

    def _fetch(self) -> None:
        """Bring back what `offload` has moved."""
        if self.is_initialized and self.position.device != self.device:
            self._map(lambda t: t.to(self.device))

    def _thaw(self) -> None:
        """Outside of inference mode, tensors that were made in it can be neither overwritten nor kept for a gradient:
        copy them, once."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if any(tensor.is_inference() for tensor in self.tensors.values()):
            self._map(torch.clone)

    @property
    def position(self) -> torch.Tensor:
        """`[B]` int64: real tokens written, without padding."""
        return self.tensors["position"]

    def group(self, prefix: str) -> tuple[torch.Tensor, ...]:
        """The tensors `prefix.0`, `prefix.1`, ..."""
        names = (f"{prefix}.{i}" for i in range(len(self.tensors)))
        return tuple(self.tensors[name] for name in names if name in self.tensors)

    def bound(self, num_tokens: int) -> int:
        """Tokens that sizes must allow for when `num_tokens` more come."""
        return self.num_tokens + num_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
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
        self._count(key_states.shape[1])
        return key_states, value_states

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    # ------------------------------------------------------------------------------------------------------- tensors
    def _encode(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """How a tensor is stored: more than one only for quantised states."""
        if not name.startswith("kept."):
            return {name: value}
        device = self.kept_device or value.device
        if self.kept_dtype != torch.int8:
            return {name: value.to(device, self.kept_dtype or value.dtype)}
        scale = (value.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(value.dtype).tiny)
        coded = (value / scale).round().to(torch.int8)
        return {name: coded.to(device), name.replace("kept.", "scale."): scale.to(device)}

    def _set(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = value

    def put(self, name: str, value: torch.Tensor) -> None:
        """Set a tensor `[B, ...]`."""
        for part, coded in self._encode(name, value).items():
            self._set(part, coded)

    def store(
        self, name: str, value: torch.Tensor, slot: torch.Tensor, keep: torch.Tensor, backend: str = "torch"
    ) -> None:
        """Write `value` `[B, L, ...]` into slots `slot` `[B, L]` of tensor `name` where `keep` `[B, L]` is set; see
        `kernels.step.slot`. int8 is coded by torch."""
        coded = self.kept_dtype == torch.int8 and name.startswith("kept.")
        for part, new in (self._encode(name, value) if coded else {name: value}).items():
            old = self.tensors[part]
            overwrite = self._in_place(part, old, new)
            self.tensors[part] = slot_write(old, new, slot, keep, overwrite, "torch" if coded else backend)

    def _in_place(self, name: str, old: torch.Tensor, new: torch.Tensor) -> bool:
        """Whether `old` may be overwritten: no gradient needs it (that of a query needs states that have none) and the
        snapshot does not share it."""
        shared = self.snapshot is not None and self.snapshot["tensors"].get(name) is old
        return not (torch.is_grad_enabled() or new.requires_grad or old.requires_grad or shared)

    def extend(self, prefixes: tuple[str, ...], size: int, copy_last: bool = False) -> None:
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
        finished = Borders(self.signature["segment_size"]).finished(int(self.position.max()))
        if self.signature["segmentation"] == "logarithmic":
            return finished.bit_count()
        return min(finished, self.signature["max_cached_segments"] or finished)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this layer, on whatever device."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

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

    def _map(self, function) -> None:
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        if self.snapshot is not None:
            self.snapshot["tensors"] = {name: function(t) for name, t in self.snapshot["tensors"].items()}
        for entry in self.recorded:
            entry.hidden_states = function(entry.hidden_states)
            entry.mask = None if entry.mask is None else function(entry.mask)

    def reset(self) -> None:
        """Forget everything."""
        self.tensors, self.num_tokens, self.is_initialized = {}, 0, False
        self.recorded, self.snapshot = [], None

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

    # --------------------------------------------------------------------------------------------------- rolling back
    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs: a snapshot, and the inputs of every forward since the last crop."""
        self.record_past = True

    def remember(self, mixer: nn.Module, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Called by the mixer before a forward of `hidden_states` `[B, T, hidden]` while recording."""
        if self.snapshot is None:
            self.snapshot = self._take_snapshot()
        self.recorded.append(Recorded(mixer, hidden_states.detach(), mask))

    def _take_snapshot(self) -> dict:
        return {"tensors": dict(self.tensors), "num_tokens": self.num_tokens, "initialized": self.is_initialized}

    def _restore(self, snapshot: dict) -> None:
        self.tensors, self.num_tokens = snapshot["tensors"], snapshot["num_tokens"]
        self.is_initialized = snapshot["initialized"]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, exactly: go back to the snapshot and write the tokens that stay once more.

        Args:
            tokens_to_remove: how many, as a negative number (a positive one means the same); 0 only drops the record.

        Raises:
            RuntimeError: more tokens than were recorded since the last crop (see `activate_past_recording`).
        """
        self._fetch()
        recorded, snapshot, remove = self.recorded, self.snapshot, abs(tokens_to_remove)
        known = sum(entry.hidden_states.shape[1] for entry in recorded)
        if remove > known:
            raise RuntimeError(
                f"cannot remove {remove} tokens from the cache, {known} are recorded: call "
                "`activate_past_recording()` before the forward whose tokens are to be removed"
            )
        self.recorded, self.snapshot = [], None
        if not remove:
            return
        self._restore(snapshot)
        recording, self.record_past = self.record_past, False
        left = known - remove
        for entry in recorded:
            count = min(left, entry.hidden_states.shape[1])
            if count:
                mask = None if entry.mask is None else entry.mask[:, :count]
                entry.mixer.replay(entry.hidden_states[:, :count], mask, self)
            left -= count
        self.record_past = recording


class MCStaticCacheLayer(MCCacheLayer):
    """The same with tensors whose shape and address never change: for `cache_implementation="static"`, torch.compile
    and CUDA graphs. All sizes follow from `max_cache_len`; counters are tensors, changed in place."""

    _layer_type = None  # only the dynamic class registers itself under this layer type
    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.num_tokens = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        super().lazy_initialization(key_states)
        self.num_tokens = self._fixed(self.num_tokens.to(self.device))

    @staticmethod
    def _fixed(tensor: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)
        return tensor

    def bound(self, num_tokens: int) -> int:
        return self.max_cache_len

    def _count(self, num_tokens: int) -> None:
        self.num_tokens.add_(num_tokens)

    def _set(self, name: str, value: torch.Tensor) -> None:
        old = self.tensors.get(name)
        if old is None or old.shape != value.shape:
            self.tensors[name] = self._fixed(value.clone(memory_format=torch.contiguous_format))
        else:
            old.copy_(value)

    def _in_place(self, name: str, old: torch.Tensor, new: torch.Tensor) -> bool:
        return True

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0  # as attention's static layers: masks are made for all layers from the first one

    def _thaw(self) -> None:
        super()._thaw()
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if self.num_tokens.is_inference():
            self.num_tokens = self._fixed(self.num_tokens.clone())

    def reset(self) -> None:
        """Forget everything but the tensors themselves: the next forward begins anew, with M_0, and fills them."""
        self._thaw()
        for tensor in (*self.tensors.values(), self.num_tokens):
            tensor.zero_()
        self.is_initialized = False
        self.recorded, self.snapshot = [], None

    def _take_snapshot(self) -> dict:
        tensors = {name: t.clone() for name, t in self.tensors.items()}
        return {"tensors": tensors, "num_tokens": self.num_tokens.clone(), "initialized": self.is_initialized}

    def _restore(self, snapshot: dict) -> None:
        if not snapshot["initialized"]:
            self.reset()
            return
        for name, tensor in snapshot["tensors"].items():
            self._set(name, tensor)
        self.num_tokens.copy_(snapshot["num_tokens"])
