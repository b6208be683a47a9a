# Copyright 2026 the mc-transformers authors.
"""A cache that stands at a border of what another one has read, made of what that one holds."""

import torch
from torch import nn

from .cache_layer import MCCacheLayer


KEPT = ("kept.", "scale.", "summaries")  # names of what is held of finished segments, one slot each
NOTED = "border."  # prefix of what is noted at every border


def check_stands(mixer: nn.Module) -> None:
    """Refuse a memory layer whose history does not tell what was held at an earlier border.

    Raises:
        ValueError: logarithmic segments, or a cache that forgets what is read least.
    """
    config = mixer.config
    if not mixer.history.stands:
        name = "segmentation" if config.segmentation != "constant" else "cache_eviction"
        raise ValueError(
            f"the model's `{name}`={getattr(config, name)!r} leaves no earlier border to stand at, allowed: "
            "segmentation='constant', without a bound or with cache_eviction='oldest'"
        )


def memory_at(layer: MCCacheLayer, new: MCCacheLayer, mixer: nn.Module, number: int) -> None:
    """Fill the empty `new` with what `layer` held once every row had finished `number` >= 1 segments.

    Raises:
        ValueError: segments of that time have left the cache, or the border was not noted.
    """
    history = mixer.history
    slots, most = history.num_slots(history.borders.start(number)), history.max_segments
    finished = int(history.borders.finished(layer.position.max()))
    if history.keeps and most is not None and finished - most > max(0, number - most):
        raise ValueError(
            f"segment {finished - most} is the oldest one left in the cache (`max_cached_segments`={most}): border "
            f"{number} cannot be stood at, allowed: {finished}"
        )
    held = {name: x[:, :slots] for name, x in layer.tensors.items() if name.startswith(KEPT)}
    border, missing = {}, [name for name in layer.tensors if name.startswith("conv.")]
    if history.lead or (history.carry and (not history.keeps or layer.kept_dtype is not None)):
        missing.append("state.0")
    elif history.carry:
        missing += [f"state.{i}" for i in range(mixer.memory.num_read, len(layer.storage.group("state")))]
    for name, tensor in layer.tensors.items():
        if name.startswith(NOTED) and tensor.shape[1] > (number - 1) % slots:
            border[name.removeprefix(NOTED)] = tensor[:, (number - 1) % slots]
    if any(name not in border or bool(border[name].isnan().any()) for name in missing):
        raise ValueError(
            f"border {number} was not noted while it was passed ({', '.join(missing)}): read the text into "
            "MCCache(config=config, keep_borders=True), whose files do not hold borders"
        )
    history.stand(new, number, held, border, layer.tensors["state.0"])
    if new.keep_borders:
        new.tensors |= {name: x[:, :slots] for name, x in layer.tensors.items() if name.startswith(NOTED)}
    for storage in (layer.storage, new.storage):
        storage.shared = {name: x for name, x in storage.tensors.items() if name.startswith((*KEPT, NOTED))}
    settle(new, mixer, history.borders.start(number))


def settle(layer: MCCacheLayer, mixer: nn.Module, num_tokens: int) -> None:
    """Make a layer whose tensors are in place one of `mixer` that has read `num_tokens` tokens."""
    layer.signature, layer.num_tokens = mixer.cache_signature, num_tokens
    layer.lazy_initialization(layer.tensors["state.0"])


def attention_at(layer, new, num_tokens: int) -> None:
    """Fill the empty `new` of an attention layer with what `layer` held after `num_tokens` >= 1 tokens.

    Raises:
        ValueError: a sliding window has forgotten some of them.
    """
    seen, first = layer.get_seq_length(), 0
    if layer.is_sliding:
        first = max(0, num_tokens - layer.sliding_window + 1)
    begin = seen - layer.keys.shape[-2]  # of what is still held
    if first < begin:
        raise ValueError(
            f"a sliding window has forgotten the tokens before {begin}, and standing after {num_tokens} needs those "
            f"from {first} on: allowed are borders from {begin + layer.sliding_window - 1} on"
        )
    fill_attention(new, *(x[:, :, first - begin : num_tokens - begin] for x in (layer.keys, layer.values)), num_tokens)


def fill_attention(layer, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
    """Put keys and values `[B, H, T, d]` into an empty cache layer that then has read `num_tokens` tokens."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = num_tokens
