# Copyright 2026 the mc-transformers authors.
"""What a memory file must hold to be believed: what a cache of the model would hold after as many tokens."""

import torch
from torch import nn

from ..kernels.shared.ops import compute_dtype
from .border_rule import CUT, BorderRule
from .borders import Borders
from .cache_layer import LATER, MCCacheLayer, is_memory_layer
from .memory_file import Described
from .mixer import Mixer


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_TOKENS = 2**48  # far beyond any text; numbers of tokens stay exact in every dtype that counts them

Expected = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]  # allowed dtypes and shape, by name


def check_description(meta: dict, found: Described, model: nn.Module, layers: list) -> None:
    """Refuse names, dtypes, shapes and numbers of tokens that a cache of `model` cannot have.

    Args:
        meta: the description in the file. found: dtype and shape of every tensor in it.
        model: the base model. layers: of an empty cache of `model`, with the file's `state_dtype`.

    Raises:
        ValueError: something is missing, too much or different; says what.
    """
    about = meta.get("layers")
    if not isinstance(about, list) or len(about) != len(layers) or not all(isinstance(x, dict) for x in about):
        raise ValueError(f"`layers` must describe {len(layers)} layers")
    names = [("position" if is_memory_layer(layer) else "keys") for layer in layers]
    first = found.get(f"0.{names[0]}")
    if first is None or not first[1] or first[1][0] < 1:
        raise ValueError(f"tensor '0.{names[0]}' is missing or has no rows")
    rows, num_tokens = first[1][0], num_tokens_of(meta, found, layers)
    expected: Expected = {}
    for index, layer in enumerate(layers):
        prefix = f"{index}."
        here = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
        if is_memory_layer(layer):
            mixer = model.layers[index].mixer
            _check_signature(index, about[index], mixer)
            wanted = _of_memory(mixer, model.dtype, layer, rows, num_tokens, here)
        else:
            wanted = _of_attention(model.config, layer, rows, num_tokens)
        expected |= {prefix + name: x for name, x in wanted.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"tensor {missing[0]!r} is missing")
    if more := sorted(found.keys() - expected.keys()):
        raise ValueError(f"tensor {more[0][:80]!r} is none of this model's")
    for name, (dtypes, shape) in expected.items():
        dtype, size = found[name]
        if dtype not in dtypes:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, allowed: {', '.join(map(str, dtypes))}")
        if size != shape:
            raise ValueError(f"tensor {name!r} has shape {size}, after {num_tokens} tokens it must be {shape}")


def _count(index: int, about: dict, name: str) -> int:
    value = about.get(name)
    if type(value) is not int or not 0 <= value <= MOST_TOKENS:
        raise ValueError(f"layer {index}: `{name}` must be an integer from 0 to {MOST_TOKENS}")
    return value


def num_tokens_of(meta: dict, found: Described, layers: list) -> int:
    """Tokens read, on which all layers must agree. Args and errors: as of `check_description`."""
    about, counts = meta["layers"], {}
    for index, layer in enumerate(layers):
        if is_memory_layer(layer):
            counts[index] = _count(index, about[index], "num_tokens")
        elif hasattr(layer, "cumulative_length"):
            counts[index] = _count(index, about[index], "cumulative_length")
        else:
            shape = found.get(f"{index}.keys", (None, ()))[1]
            counts[index] = shape[-2] if len(shape) == 4 else -1
    if len(set(counts.values())) != 1:
        raise ValueError(f"layers differ in the number of tokens that they have read: {sorted(set(counts.values()))}")
    return counts[0]


def _check_signature(index: int, about: dict, mixer: Mixer) -> None:
    signature = about.get("signature")
    if not isinstance(signature, dict):
        raise ValueError(f"layer {index}: `signature` is missing")
    theirs = LATER | signature
    if differ := [name for name, value in mixer.cache_signature.items() if theirs.get(name) != value]:
        raise ValueError(f"layer {index}: `signature` has another {', '.join(differ)} than the model")


@torch.no_grad()
def _of_memory(
    mixer: Mixer, dtype: torch.dtype, layer: MCCacheLayer, rows: int, num_tokens: int, found: Described
) -> Expected:
    """From what the mixer leaves in an empty layer after one token."""
    one = MCCacheLayer()
    one.kept_dtype = layer.kept_dtype
    device = next(mixer.parameters()).device
    mixer.replay(torch.zeros(1, 1, mixer.config.hidden_size, device=device, dtype=dtype), None, one)
    history = mixer.history
    levels, slots = history.num_levels(num_tokens, True), history.num_slots(num_tokens)
    if mixer.config.segmentation == "constant" and mixer.config.max_cached_segments is None:
        slots += found.get("kept.0", (None, ()))[1][1:2] == (slots + 1,)  # `MCCache.cat` leaves an empty one
    if mixer.config.segmentation == "content":
        state = one.tensors["state.0"]
        one.tensors |= BorderRule.blank(1, mixer.config.hidden_size, device, compute_dtype(state))
    expected: Expected = {}
    for name, tensor in one.tensors.items():
        size = tensor.shape[1:]
        if name.startswith("state."):
            size = (history.lead + levels, *size[1:])
        elif name == "sums":
            size = (levels, *size[1:])
        elif name.startswith(("kept.", "scale.", "summaries")):
            size = (slots, *size[1:])
        # what convolutions hold is in the dtype of the forward, which autocast may have chosen
        # and gates received were fp32 in earlier versions
        free = name.startswith("conv.") or name == "received"
        expected[name] = FLOATS if free else (tensor.dtype,), (rows, *size)
    return expected


def _of_attention(config, layer, rows: int, num_tokens: int) -> Expected:
    length = num_tokens
    if layer.is_sliding:
        length = len(range(num_tokens)[-layer.sliding_window + 1 :])
    return dict.fromkeys(("keys", "values"), (FLOATS, (rows, config.num_key_value_heads, length, config.head_dim)))


def check_values(tensors: dict[str, torch.Tensor], num_tokens: int, borders: Borders) -> None:
    """Refuse numbers that no cache holds: not finite, or positions and counters out of range.

    Args:
        tensors: by name, of all layers. num_tokens: read into them. borders: of the segments.

    Raises:
        ValueError: says which tensor.
    """
    first = None
    for name, tensor in tensors.items():
        kind = name.split(".", 1)[1]
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name!r} holds numbers that are not finite")
        if kind.startswith("scale.") and not bool((tensor > 0).all()):
            raise ValueError(f"tensor {name!r} holds scales that are not positive")
        if tensor.dtype == torch.int8 and bool((tensor < -127).any()):
            raise ValueError(f"tensor {name!r} holds codes below -127")
        if tensor.dtype == torch.uint8 and bool(((tensor & 15 == 0) | (tensor >> 4 == 0)).any()):
            raise ValueError(f"tensor {name!r} holds codes below -7")
        if kind != "position":
            continue
        if not bool(((tensor >= 0) & (tensor <= num_tokens)).all()):
            raise ValueError(f"tensor {name!r} holds positions outside of 0 to {num_tokens}")
        first = tensor if first is None else first
        if not torch.equal(first.cpu(), tensor.cpu()):
            raise ValueError(f"tensor {name!r} differs from that of other layers")
    for name, sums in tensors.items():
        if name.endswith(".sums"):
            position = tensors[name.replace(".sums", ".position")]
            begin = tensors.get(name.replace(".sums", f".{CUT}begin"))
            between = (borders.offset(position) if begin is None else position - begin) == 0
            if bool(sums[between, 0].any()):
                raise ValueError(
                    f"tensor {name!r} holds tokens of a segment, and the positions say that none has begun"
                )
    for name, begin in tensors.items():
        if name.endswith(f".{CUT}begin"):
            _check_cut(tensors, name.removesuffix("begin"), begin, borders)
            same = [x for other, x in tensors.items() if other.endswith(f".{CUT}begin")]
            if not all(torch.equal(begin.cpu(), x.cpu()) for x in same):
                raise ValueError(f"tensor {name!r} differs from that of other layers")
    for name, segment in tensors.items():
        if name.endswith(".segment"):
            position = tensors[name.replace(".segment", ".position")]
            received = tensors[name.replace(".segment", ".received")]
            _check_occupants(name, segment, received, position, borders)


def _check_cut(tensors: dict[str, torch.Tensor], prefix: str, begin: torch.Tensor, borders: Borders) -> None:
    """`BorderRule.blank`: as many segments as can have been finished, and one that goes on within its bounds."""
    position = tensors[prefix.replace(CUT, "position")]
    number, spent = tensors[f"{prefix}number"], tensors[f"{prefix}spent"]
    right = (begin >= 0) & (begin <= position) & (position - begin < borders.longest) & (spent >= 0)
    right &= (number * borders.least <= begin) & (number * borders.longest >= begin)
    if not bool(right.all()):
        raise ValueError(f"tensors {prefix + '*'!r} describe a segment that cannot go on there")


def _check_occupants(
    name: str, segment: torch.Tensor, received: torch.Tensor, position: torch.Tensor, borders: Borders
) -> None:
    """`least_read.Occupants`: every slot empty or with a finished segment of its own; gates are from 0 to 1."""
    finished = borders.finished(position)[:, None]
    ordered, taken = segment.sort(1).values, (segment >= 0).sum(1, keepdim=True)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    right = (segment >= -1) & (segment < finished) & (taken == finished.clamp(max=segment.shape[1]))
    if bool(twice.any()) or not bool(right.all()):
        raise ValueError(f"tensor {name!r} holds segments that are not finished, or not those that must be there")
    if not bool(((received >= 0) & (received <= 1.001 * position[:, None] + 1)).all()):
        raise ValueError(f"tensor {name.replace('.segment', '.received')!r} is out of range")
