# Copyright 2026 the mc-transformers authors.
"""What one segment of a text leaves in a cache, taken out, and caches made of such parts."""

import torch
from torch import nn

from ..kernels.shared.ops import compute_dtype
from .cache import MCCache, ModelRef
from .cache_layer import is_memory_layer
from .standing import KEPT, NOTED, fill_attention, settle


Parts = list[dict[str, torch.Tensor]]  # of one segment, a dictionary per layer, without the dimension of the batch


def segments_apart(model: nn.Module, num_tokens: int) -> int:
    """Segments that may be read at once, at most `num_tokens` tokens, so that `take` finds every one of them."""
    config = model.config
    most = max(1, num_tokens // config.segment_size)
    if config.max_cached_segments is not None:
        most = min(most, config.max_cached_segments)
    return 1 if "sliding_attention" in config.layer_types else most


def take(cache: MCCache, number: int) -> Parts:
    """Copies of what segment `number` has left in a cache of one row, made with `keep_borders` and without padding.
    Of a sliding window it must be the last segment that was read."""
    segment_size = cache.filled_by().config.segment_size
    found = []
    for layer in cache.layers:
        if is_memory_layer(layer):
            held = {name: x for name, x in layer.tensors.items() if name.startswith((*KEPT, NOTED))}
            found.append({name: x[0, number % x.shape[1]].clone() for name, x in held.items()})
        else:
            columns = slice(number * segment_size, (number + 1) * segment_size)
            if layer.is_sliding:
                columns = slice(-min(segment_size, layer.keys.shape[2]), None)
            found.append({name: getattr(layer, name)[0, :, columns].clone() for name in ("keys", "values")})
    return found


def assemble(segments: list[Parts], model: nn.Module) -> MCCache:
    """A cache of one row that has read these segments, at least one, and notes its borders from there on."""
    cache, number = MCCache(config=model.config, keep_borders=True), len(segments)
    for index, (block, layer) in enumerate(zip(model.layers, cache.layers, strict=True)):
        parts = [segment[index] for segment in segments]
        if is_memory_layer(layer):
            history = block.mixer.history
            start = history.borders.start(number)
            slots = history.num_slots(start)
            order = sorted(range(number - slots, number), key=lambda segment: segment % slots)
            names = [name for name in parts[-1] if name.startswith(KEPT)]
            held = {name: torch.stack([parts[segment][name] for segment in order])[None] for name in names}
            border = {n.removeprefix(NOTED): x[None] for n, x in parts[-1].items() if n.startswith(NOTED)}
            device = next(block.parameters()).device
            dtype = compute_dtype(torch.empty(0, dtype=model.dtype))
            history.stand(layer, number, held, border, torch.empty(1, dtype=dtype, device=device))
            settle(layer, block.mixer, start)
        else:
            window = slice(-layer.sliding_window + 1, None) if layer.is_sliding else slice(None)
            both = [torch.cat([part[name] for part in parts], 1)[None, :, window] for name in ("keys", "values")]
            fill_attention(layer, *both, number * model.config.segment_size)
    cache.filled_by = ModelRef(model)
    return cache


def forget_borders(cache: MCCache) -> MCCache:
    """The same cache, which has noted nothing."""
    for layer in cache.memory_layers:
        layer.keep_borders = False
        layer.tensors = {name: x for name, x in layer.tensors.items() if not name.startswith(NOTED)}
    return cache


@torch.no_grad()
def begin(cache: MCCache, model: nn.Module) -> MCCache:
    """An empty cache as a row of a batch that has read nothing but padding."""
    config = model.config
    for block, layer in zip(model.layers, cache.layers, strict=True):
        device = next(block.parameters()).device
        if is_memory_layer(layer):
            nothing = torch.zeros(1, 1, config.hidden_size, device=device, dtype=model.dtype)
            block.mixer.replay(nothing, torch.zeros(1, 1, dtype=torch.long, device=device), layer)
        else:
            keys = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim, device=device, dtype=model.dtype)
            fill_attention(layer, keys, keys, 0)
    return cache


def side_by_side(rows: list[MCCache], model: nn.Module, num_tokens: int) -> MCCache:
    """A batch of rows, each read on its own, as if it had been padded on the left to `num_tokens` tokens."""
    cache = MCCache(config=model.config)
    for index, (block, layer) in enumerate(zip(model.layers, cache.layers, strict=True)):
        parts = [row.layers[index] for row in rows]
        if is_memory_layer(layer):
            for name in parts[0].tensors:
                tensors = [part.tensors[name] for part in parts]
                if name.startswith(KEPT):
                    most = max(x.shape[1] for x in tensors)
                    tensors = [torch.cat([x, x.new_zeros(1, most - x.shape[1], *x.shape[2:])], 1) for x in tensors]
                layer.tensors[name] = torch.cat(tensors)
            settle(layer, block.mixer, num_tokens)
        else:
            width = min(num_tokens, layer.sliding_window - 1) if layer.is_sliding else num_tokens
            both = (
                [nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in (getattr(p, name) for p in parts)]
                for name in ("keys", "values")
            )
            fill_attention(layer, *(torch.cat(x) for x in both), num_tokens)
    cache.filled_by = ModelRef(model)
    return cache
