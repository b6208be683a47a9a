# Copyright 2026 the mc-transformers authors.
"""Taking tokens back (speculative decoding): from a snapshot, the tokens that stay are written once more."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Recorded:
    """A forward that `crop` may have to repeat: the mixer that ran it, its input `[B, T, hidden]` and padding mask."""

    mixer: nn.Module
    hidden_states: torch.Tensor
    mask: torch.Tensor | None


class Rollback:
    """The record of one memory layer's cache, an `MCCacheLayer` that is passed to the methods.

    Attributes:
        recording: whether forwards are recorded.
        recorded: those since the last crop. The storage of the layer holds a snapshot from before the first one.
        was_initialized: whether the layer held anything then.
    """

    def __init__(self) -> None:
        self.recording = False
        self.recorded: list[Recorded] = []
        self.was_initialized = False

    def remember(
        self, layer: CacheLayerMixin, mixer: nn.Module, hidden_states: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """Called by the mixer before a forward of `hidden_states` `[B, T, hidden]` while recording."""
        if layer.storage.snapshot is None:
            layer.storage.take_snapshot()
            self.was_initialized = layer.is_initialized
        self.recorded.append(Recorded(mixer, hidden_states.detach(), mask))

    def crop(self, layer: CacheLayerMixin, tokens_to_remove: int) -> None:
        """See `MCCacheLayer.crop`."""
        recorded, remove = self.recorded, abs(tokens_to_remove)
        known = sum(entry.hidden_states.shape[1] for entry in recorded)
        if remove > known:
            raise RuntimeError(
                f"cannot remove {remove} tokens from the cache, {known} are recorded: call "
                "`activate_past_recording()` before the forward whose tokens are to be removed"
            )
        self.recorded = []
        if not remove:
            layer.storage.snapshot = None
            return
        layer.transaction.write()
        layer.storage.go_back()
        layer.is_initialized = self.was_initialized
        recording, self.recording = self.recording, False
        left = known - remove
        for entry in recorded:
            count = min(left, entry.hidden_states.shape[1])
            if count:
                mask = None if entry.mask is None else entry.mask[:, :count]
                entry.mixer.replay(entry.hidden_states[:, :count], mask, layer)
            left -= count
        self.recording = recording

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `function(tensor)` in the place of every tensor that is held."""
        for entry in self.recorded:
            entry.hidden_states = function(entry.hidden_states)
            entry.mask = None if entry.mask is None else function(entry.mask)
