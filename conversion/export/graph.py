# Copyright 2026 the mc-transformers authors.
"""A model as functions of tensors: what one token, or one piece of a prompt, makes of logits and of a static cache.

A cache is a list of named tensors, the states, all of fixed size. The graphs change none of them: they give the next
ones. Of a finished segment a step gives the memory and the slot that it belongs into, so that what is kept of all the
others is not copied for every token.
"""

import torch
from torch import nn

from ...modeling_mc.cache import MCCache
from ...modeling_mc.cache_layer import MCStaticCacheLayer
from ...modeling_mc.storage import Storage


POSITION = "position"  # the only tensor that all layers share
NEXT, FINISHED, SLOT, LOGITS, READS = "next_", "finished_", "slot", "logits", "reads"
KEPT = ("kept.", "summaries")  # of finished segments, one slot each


class GraphStorage(Storage):
    """Overwrites nothing, and puts aside what is to be written into a slot.

    Attributes:
        finished: by name what a segment leaves behind, `[B, 1, ...]`. slot: `[B]` int64 where it belongs, or -1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.finished: dict[str, torch.Tensor] = {}
        self.slot: torch.Tensor | None = None

    def store(self, name, value, slot, keep, backend="torch") -> None:
        self.finished[name] = value
        self.slot = torch.where(keep, slot, -1)[:, 0]

    def _in_place(self, name: str, old: torch.Tensor, new: torch.Tensor) -> bool:
        return False


class GraphCacheLayer(MCStaticCacheLayer):
    """A static cache's sizes, and tensors that are put in and taken out."""

    _storage_type = GraphStorage


def state_name(layer: int, name: str) -> str:
    """What a graph calls a tensor of a cache layer."""
    return POSITION if name == POSITION else f"layer{layer}_{name.replace('.', '_')}"


def _empty_cache(model: nn.Module, max_length: int) -> MCCache:
    cache = MCCache(config=model.config)
    cache.layers = [GraphCacheLayer(max_length) for _ in cache.layers]
    return cache


@torch.no_grad()
def first_states(model: nn.Module, max_length: int) -> list[dict[str, torch.Tensor]]:
    """Tensors of every layer's cache before the first token, of one row and with room for `max_length` tokens."""
    cache = _empty_cache(model, max_length)
    found = []
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), cache=cache, use_cache=True)  # for their shapes
    for block, layer in zip(model.model.layers, cache.layers, strict=True):
        start = GraphCacheLayer(max_length)
        block.mixer.begin(start, 1, layer.device, layer.tensors["state.0"].dtype)
        start.lazy_initialization(layer.tensors["state.0"])
        block.mixer.history.grow(start, max_length)
        tensors = {name: torch.zeros_like(tensor) for name, tensor in layer.tensors.items()} | start.tensors
        found.append({name: tensors[name].contiguous() for name in layer.tensors})
    return found


class Step(nn.Module):
    """`forward(input_ids, length, **states)` of a model: the logits of the last token, and the next states.

    Args:
        model: an `MCForCausalLM`. names: of the tensors of every layer's cache. max_length: tokens that the cache has
            room for. reads: also give which segments the last token read.
    """

    def __init__(self, model: nn.Module, names: list[list[str]], max_length: int, reads: bool) -> None:
        super().__init__()
        self.model, self.names, self.max_length, self.reads = model, names, max_length, reads

    def _cache(self, states: dict[str, torch.Tensor]) -> MCCache:
        cache = _empty_cache(self.model, self.max_length)
        for index, (layer, names) in enumerate(zip(cache.layers, self.names, strict=True)):
            layer.storage.tensors = {name: states[state_name(index, name)] for name in names}
            layer.signature = self.model.model.layers[index].mixer.cache_signature
            layer.lazy_initialization(layer.tensors["state.0"])
        return cache

    def forward(
        self, input_ids: torch.Tensor, length: torch.Tensor | None = None, **states: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids: `[1, T]` int64. length: `[1]` int64, how many of them are tokens; what follows is not read.
            states: `[1, ...]` each, see `first_states`.

        Returns:
            `logits` `[1, vocab_size]`; `next_NAME` of every state that is another one afterwards; of one token
            `finished_NAME` `[1, 1, ...]` of those that have a slot per segment, and `slot` `[1]` int64, the one that
            they belong into, or -1; with `reads` `reads` `[layers, heads, segments + 1]`, see `MCModel.forward`.
        """
        cache, mask, last = self._cache(states), None, 1
        if length is not None:
            mask = (torch.arange(input_ids.shape[1], device=length.device) < length[:, None]).long()
            last = length - 1
        found = self.model(
            input_ids,
            attention_mask=mask,
            cache=cache,
            use_cache=True,
            logits_to_keep=last,
            output_attentions=self.reads or None,
        )
        out = {LOGITS: found.logits[:, -1]}
        for index, (layer, names) in enumerate(zip(cache.layers, self.names, strict=True)):
            for name in names:
                if name in layer.storage.finished:
                    out[FINISHED + state_name(index, name)] = layer.storage.finished[name]
                elif name != POSITION or index == 0:
                    out[NEXT + state_name(index, name)] = layer.storage.tensors[name]
        if cache.layers[0].storage.slot is not None:
            out[SLOT] = cache.layers[0].storage.slot
        if self.reads:
            last = 0 if length is None else last
            out[READS] = torch.cat([gates[:, :, last].reshape(1, gates.shape[1], -1) for gates in found.attentions])
        return out


def steps(
    model: nn.Module, states: list[dict[str, torch.Tensor]], max_length: int, piece: int, reads: bool
) -> dict[str, tuple[Step, dict[str, torch.Tensor]]]:
    """The graphs of a model, `prefill` of `piece` tokens and `decode` of one, each with inputs to trace it with."""
    inputs = {state_name(i, name): x for i, layer in enumerate(states) for name, x in layer.items()}
    names = [list(layer) for layer in states]
    ids = torch.zeros(1, piece, dtype=torch.long, device=model.device)
    length = torch.full((1,), piece, device=model.device)
    return {
        "prefill": (Step(model, names, max_length, False), {"input_ids": ids, "length": length, **inputs}),
        "decode": (Step(model, names, max_length, reads), {"input_ids": ids[:, :1], **inputs}),
    }
