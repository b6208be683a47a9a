# Copyright 2026 the mc-transformers authors.
"""Blocks of vLLM's pool, and how the cache layers that mixers work with are made of them and put back.

A block belongs to one segment of a request, or to a few, as a block of attention belongs to so many tokens: vLLM hands
out a new one when they begin, shares full ones between requests with the same beginning, and takes back what nobody
reads.
"""

import math
from dataclasses import dataclass

import torch

from ...configuration_mc import MCConfig
from ...modeling_mc.cache_layer import MCCacheLayer
from ...modeling_mc.mixer import MCMixer
from ...modeling_mc.segments import rows_where
from ...modeling_mc.storage import Storage
from .pool import PoolStorage
from .steps import Call, Planner


KEPT = ("kept.", "scale.", "summaries")  # tensors with one entry per finished segment
ALIGNMENT = 64  # bytes


class BlockCacheLayer(MCCacheLayer):
    """A cache layer whose sizes follow from `room`, tokens of the longest row, and not from what has been read."""

    _layer_type = None  # else it registers itself as the dynamic cache of this layer type

    def __init__(self, room: int, kept_dtype: torch.dtype | None = None, storage: Storage | None = None) -> None:
        super().__init__()
        self.storage = storage or self.storage
        self.room, self.kept_dtype = room, kept_dtype

    def bound(self, num_tokens: int) -> int:
        return self.room


class OneLayer:
    """The part of a Transformers cache that a mixer touches."""

    def __init__(self, index: int, layer: MCCacheLayer) -> None:
        self.layers = {index: layer}

    def update(self, keys: torch.Tensor, values: None, index: int) -> None:
        self.layers[index].update(keys, values)


@dataclass(frozen=True)
class Part:
    """A tensor in a block: shape, dtype and first byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class Blocks:
    """One block holds all that a request has: memories without finished segments, those of logarithmic segments, and
    of a cache that forgets what is read least. A new block takes over from the one before it.

    Args:
        max_len: tokens of the longest request. dtype: of the model. kept_dtype: see `Storage`.
        per_block: segments that a block is long.

    Attributes:
        parts: the tensors of a block by their names in a cache layer. nbytes: of a block.
        reach: finished segments whose blocks a token needs, with that of the token before it; None = all.
    """

    by_segment = False

    def __init__(
        self,
        mixer: MCMixer,
        max_len: int,
        dtype: torch.dtype,
        kept_dtype: torch.dtype | None = None,
        per_block: int = 1,
    ) -> None:
        self.mixer, self.max_len, self.kept_dtype, self.per_block = mixer, max_len, kept_dtype, per_block
        self.reach: int | None = 0
        layer = self._layer(self._longest)
        device = mixer.o_proj.weight.device
        mixer.begin(layer, 1, device, torch.float32)
        mixer.history.grow(layer, 1)
        if mixer.config.conv_kernel_size:
            for name in mixer.projected:
                conv = getattr(mixer, f"{name}_conv")
                tail = (1, conv.kernel_size[0] - 1, conv.in_channels)
                layer.storage.put(f"conv.{name}", torch.zeros(tail, dtype=dtype, device=device))
        self.parts: dict[str, Part] = {}
        self.nbytes = 0
        wide_first = sorted(layer.tensors.items(), key=lambda item: -item[1].itemsize)
        for name, tensor in wide_first:
            if self._is_stored(name):
                self.parts[name] = part = Part(self._shape(name, tensor), tensor.dtype, self.nbytes)
                self.nbytes = part.end
        self.nbytes = -(-self.nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def _longest(self) -> int:
        return self.max_len

    def _is_stored(self, name: str) -> bool:
        return name != "position"  # the scheduler knows it

    def _shape(self, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape[1:])

    def _layer(self, room: int, storage: Storage | None = None) -> BlockCacheLayer:
        return BlockCacheLayer(room, self.kept_dtype, storage)

    def views(self, pool: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of all blocks, `[num, ...]` each, in `pool` `[num, nbytes]` int8."""
        return {
            name: pool[:, part.offset : part.end].view(part.dtype).view(len(pool), *part.shape)
            for name, part in self.parts.items()
        }

    def request_bytes(self, num_tokens: int) -> int:
        """Bytes of this layer that a request of so many tokens holds at most, what is shared with others included."""
        begun = self.mixer.history.borders.coarser(self.per_block).most_begun(num_tokens)
        if self.reach is None:
            return self.nbytes * begun
        return self.nbytes * min(begun, 1 + max(1, -(-self.reach // self.per_block)))

    def planner(self, cuts: bool) -> Planner:
        """What makes the calls of a step. Args: see `Planner`."""
        return Planner(self.mixer.history, self.mixer.memory.align, self.by_segment, self.per_block, cuts)

    # ------------------------------------------------------------------------------------------------------- a call
    def load(self, pool: dict[str, torch.Tensor], call: Call) -> BlockCacheLayer:
        """The cache layer that a mixer goes on from."""
        if call.begins:
            return self._layer(self._room(call))
        layer = self._layer(self._room(call), self._storage(pool, call))
        self._fill(layer, pool, call)
        layer.tensors["position"] = call.table.position.clone()
        layer.signature, layer.num_tokens = self.mixer.cache_signature, layer.room
        layer.lazy_initialization(layer.tensors["state.0"])
        return layer

    def _room(self, call: Call) -> int:
        return self.max_len

    def _storage(self, pool: dict[str, torch.Tensor], call: Call) -> Storage:
        return Storage()

    def _fill(self, layer: BlockCacheLayer, pool: dict[str, torch.Tensor], call: Call) -> None:
        for name, stored in pool.items():
            layer.tensors[name] = stored[call.read]

    def save(self, pool: dict[str, torch.Tensor], call: Call, layer: BlockCacheLayer) -> None:
        """Put back what a mixer has left."""
        for name, stored in pool.items():
            stored[call.write] = layer.tensors[name]


class SegmentBlocks(Blocks):
    """A block holds the running state and convolution tails after its last token so far, and what is kept of each of
    its segments once it is finished. With one segment to a block that starts from M_0 the two lie in the same place:
    what runs is needed until the segment is finished, and what is kept from then on."""

    by_segment = True

    def __init__(self, mixer: MCMixer, max_len: int, dtype: torch.dtype, kept_dtype=None, per_block: int = 1) -> None:
        self.overlaid = can_overlay(mixer.config, kept_dtype) and per_block == 1
        super().__init__(mixer, max_len, dtype, kept_dtype, per_block)
        self.reach = mixer.history.max_segments

    @property
    def _longest(self) -> int:
        return self.mixer.history.borders.size  # so there is one slot

    def _is_stored(self, name: str) -> bool:
        return super()._is_stored(name) and not (self.overlaid and name.startswith(KEPT))

    def _shape(self, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        return (self.per_block if name.startswith(KEPT) else tensor.shape[1], *tensor.shape[2:])

    def _place(self, name: str) -> str:
        """Where a tensor with one entry per finished segment is stored."""
        if not self.overlaid:
            return name
        return "sums" if name == "summaries" else name.replace("kept.", "state.")

    def _kept(self) -> list[str]:
        """Their names."""
        if not self.overlaid:
            return [name for name in self.parts if name.startswith(KEPT)]
        names = [f"kept.{i}" for i in range(self.mixer.memory.num_read)]
        return names + ["summaries"] * ("sums" in self.parts)

    def _room(self, call: Call) -> int:
        return call.room

    def _storage(self, pool: dict[str, torch.Tensor], call: Call) -> Storage:
        if call.table.num_tokens > 1:
            return Storage()
        states = [name for name in self._kept() if name != "summaries"]
        return PoolStorage({name: pool[self._place(name)] for name in states}, call.finished)

    def _fill(self, layer: BlockCacheLayer, pool: dict[str, torch.Tensor], call: Call) -> None:
        for name, stored in pool.items():
            if not name.startswith(KEPT):
                layer.tensors[name] = stored[call.read]
        if self.overlaid and call.anew is not None:
            self._begin_segments(layer, call.anew)
        found = call.finished
        for name in self._kept():
            if isinstance(layer.storage, PoolStorage) and name in layer.storage.pool:
                continue
            kept, absent = pool[self._place(name)][found.blocks, found.places], found.absent
            # whatever stands in a block that is not the row's, its gate of zero would let a NaN through
            layer.tensors[name] = kept.masked_fill_(absent.view(*absent.shape, *[1] * (kept.dim() - 2)), 0)

    def _begin_segments(self, layer: BlockCacheLayer, rows: torch.Tensor) -> None:
        """In the place of a running state `rows` `[R, 1]` have what is kept of the segment before."""
        fresh = self.mixer.memory.initial_state(1, rows.device, layer.tensors["state.0"].dtype)
        for i, state in enumerate(fresh):
            name = f"state.{i}"
            layer.tensors[name] = rows_where(rows, state[:, None], layer.tensors[name])
        if "sums" in layer.tensors:
            layer.tensors["sums"] = rows_where(rows, torch.zeros_like(layer.tensors["sums"]), layer.tensors["sums"])

    def save(self, pool: dict[str, torch.Tensor], call: Call, layer: BlockCacheLayer) -> None:
        for name, stored in pool.items():
            if not name.startswith(KEPT):
                stored[call.write] = layer.tensors[name]
        done = call.finished
        if len(done.rows):
            made = getattr(layer.storage, "finished", {})
            for name in self._kept():
                new = made[name][done.rows] if name in made else layer.tensors[name][done.rows, done.slots]
                pool[self._place(name)][done.into, done.into_places] = new


def by_segment(config: MCConfig) -> bool:
    """Whether blocks hold segments one by one."""
    evicts = config.max_cached_segments is not None and config.cache_eviction == "least_read"
    return config.aggregation != "none" and config.segmentation == "constant" and not evicts


def can_overlay(config: MCConfig, kept_dtype: torch.dtype | None) -> bool:
    """Whether what runs and what is kept of a segment can lie in the same place."""
    starts_anew = config.state_init == "independent" and config.online_memory == "segment"
    return by_segment(config) and starts_anew and kept_dtype is None


def make_blocks(mixer: MCMixer, *args, **kwargs) -> Blocks:
    """How a mixer's requests lie in blocks. Args: see `Blocks`."""
    return (SegmentBlocks if by_segment(mixer.config) else Blocks)(mixer, *args, **kwargs)
