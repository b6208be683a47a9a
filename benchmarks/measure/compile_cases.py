# Copyright 2026 the mc-transformers authors.
"""What `compile_table` compiles: forward and backward of every op on meta tensors, by width of a head and dtype."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from mc_transformers.kernels.read import (
    deep_constant_triton,
    deep_selected_triton,
    route_triton,
    segment_triton,
    selected_triton,
)
from mc_transformers.kernels.read import deep_triton as deep_read_triton
from mc_transformers.kernels.shared.deep import ANSWER
from mc_transformers.kernels.shared.ops import WIDEST, WIDEST_DEEP
from mc_transformers.kernels.step import decode_triton, slot_triton, state_triton
from mc_transformers.kernels.write import deep_triton as deep_write_triton
from mc_transformers.kernels.write import linear_triton


WIDTHS = {"mc-170m": 48, "mc-340m": 64, "mc-760m": 96, "d128": 128, "mc-1.3b": 256}
ROWS, SEGMENTS, WIDTH, HEADS, CACHED, TOP_K = 2, 16, 256, 16, 16, 4
CHUNK, EXPANSION = 16, 4  # of deep memories: the defaults of a config
Run = Callable[[int, torch.dtype], None]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def grid(*width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return empty(ROWS, SEGMENTS, WIDTH, HEADS, *width, dtype=dtype)


def visibility() -> tuple[torch.Tensor, torch.Tensor]:
    """`birth` and `first` of the reads."""
    return empty(ROWS, CACHED + SEGMENTS, dtype=torch.int64), empty(ROWS, SEGMENTS, dtype=torch.int64)


def linear_write(width: int, dtype: torch.dtype, decay: bool = True) -> None:
    q, k, v, go = (grid(width, dtype=dtype) for _ in range(4))
    log_decay = grid() if decay else None
    states = empty(ROWS, SEGMENTS, HEADS, width, width)
    for initial, carry in ((None, False), (states[:, 0], True)):
        linear_triton.forward(q, k, v, log_decay, initial, None, carry)
        linear_triton.backward(go, states, q, k, v, log_decay, initial, None, carry)


def segment_read(width: int, dtype: torch.dtype, blocks: int = 1, function: str = "softmax") -> None:
    q, u, out = (grid(width, dtype=dtype) for _ in range(3))
    states = empty(ROWS, CACHED + SEGMENTS, HEADS, width, width)
    summaries = empty(ROWS, CACHED + SEGMENTS, HEADS, blocks, width)
    inputs = (q, u, states, summaries, grid(), *visibility(), function)
    segment_triton.forward(*inputs)
    segment_triton.backward(out, grid(), *inputs)


def segment_route(width: int, dtype: torch.dtype, blocks: int = 1) -> None:
    summaries, chosen = empty(ROWS, CACHED + SEGMENTS, HEADS, blocks, width), grid(TOP_K, dtype=torch.int64)
    inputs = (grid(width, dtype=dtype), summaries, *visibility(), TOP_K)
    route_triton.forward(*inputs)
    route_triton.backward(None, grid(TOP_K), *inputs, chosen)


def selected_read(width: int, dtype: torch.dtype) -> None:
    q, out = (grid(width, dtype=dtype) for _ in range(2))
    states = empty(ROWS, CACHED + SEGMENTS, HEADS, width, width)
    inputs = (q, grid(TOP_K), states, grid(TOP_K, dtype=torch.int64))
    selected_triton.forward(*inputs)
    selected_triton.backward(out, *inputs)


def decode_step(
    width: int, dtype: torch.dtype, kept: torch.dtype | None = None, function: str = "softmax", given: bool = False
) -> None:
    """One token; finished states as a cache holds them, in `kept` (int8: with a scale), else in `dtype`. It reads all
    of them, and those that it chooses or (`given`) is given."""
    q, u, logit = empty(ROWS, HEADS, width), empty(ROWS, HEADS, width, dtype=dtype), empty(ROWS, HEADS)
    online, states = empty(ROWS, HEADS, width, width), empty(ROWS, CACHED, HEADS, width, width, dtype=kept or dtype)
    scale = empty(ROWS, CACHED, HEADS, width, 1, dtype=torch.bfloat16) if kept == torch.int8 else None
    summaries, visible = empty(ROWS, CACHED, HEADS, 1, width), empty(ROWS, CACHED, dtype=torch.bool)
    index = empty(ROWS, HEADS, TOP_K, dtype=torch.int64) if given else None
    for top_k in (0, TOP_K):
        chosen = index if top_k else None
        decode_triton.forward(q, u, online, logit, states, scale, summaries, visible, chosen, top_k, function)


def state_step(width: int, dtype: torch.dtype) -> None:
    """One token: gated linear attention, with the token before it (swla), by the delta rule."""
    state, gate = empty(ROWS, HEADS, width, width), empty(ROWS, HEADS)
    k, last = empty(ROWS, HEADS, width, dtype=dtype), empty(ROWS, HEADS, width)
    for again, delta in (((None, None, None), False), ((last, last, gate), False), ((None, None, None), True)):
        state_triton.forward(state, k, k, gate, gate, *again, delta)


def slot_write(width: int, dtype: torch.dtype) -> None:
    """A state moves into the cache, is set to zero, and keeps what it had."""
    state, kept = empty(ROWS, 1, HEADS, width, width), empty(ROWS, CACHED, HEADS, width, width, dtype=dtype)
    slot, rows = empty(ROWS, 1, dtype=torch.int64), empty(ROWS, 1, dtype=torch.bool)
    slot_triton.forward(kept, state, slot, rows)
    slot_triton.forward(state, empty().expand_as(state), None, rows)
    slot_triton.forward(state, state, None, rows)


def deep_write(width: int, dtype: torch.dtype, parts: int, loss: str, resumed: bool = False) -> None:
    """Independent segments of WIDTH tokens. parts: 2 with momentum and decay, else 1. resumed: in the middle of an
    inner chunk, segment after segment."""
    rows, chunks = ROWS * SEGMENTS, WIDTH // CHUNK
    tokens, cells, gated = (rows, WIDTH, HEADS), (rows, chunks, HEADS), parts > 1
    maps = empty(rows, HEADS, width, EXPANSION * width), empty(rows, HEADS, EXPANSION * width, width)
    groups = empty(ROWS, dtype=torch.int64)
    inputs = (
        *(empty(*tokens, width, dtype=dtype) for _ in range(3)),
        empty(*cells, CHUNK, CHUNK),
        empty(*cells, CHUNK, parts) if gated else None,
        empty(*cells, CHUNK, parts),
        empty(*cells, parts, parts) if gated else None,
        *maps,
        *(maps if resumed else (None, None)),
        *(maps if resumed and gated else (None, None)),
        empty(HEADS, width),
        empty(HEADS, width),
        groups,
        groups,
        loss,
        ANSWER,
    )
    out, *ends = deep_write_triton.forward(*inputs)
    deep_write_triton.backward(out, *(end if end.numel() else None for end in ends), *inputs)


def deep_maps(width: int) -> tuple[torch.Tensor, ...]:
    """W2, W1 of finished segments, as they are written."""
    shape, hidden = (ROWS, CACHED + SEGMENTS, HEADS), EXPANSION * width
    return empty(*shape, width, hidden), empty(*shape, hidden, width)


def deep_read(width: int, dtype: torch.dtype) -> None:
    q, u, out = (grid(width, dtype=dtype) for _ in range(3))
    summaries, norm = empty(ROWS, CACHED + SEGMENTS, HEADS, 1, width), (empty(HEADS, width), empty(HEADS, width))
    inputs = (q, u, *deep_maps(width), summaries, grid(), *norm, *visibility(), "softmax")
    deep_read_triton.forward(*inputs)
    deep_read_triton.backward(out, grid(), *inputs)


def deep_constant_read(width: int, dtype: torch.dtype) -> None:
    q, out = (grid(width, dtype=dtype) for _ in range(2))
    visible = empty(ROWS, SEGMENTS, CACHED + SEGMENTS, dtype=torch.bool)
    inputs = (q, *deep_maps(width), empty(HEADS, width), empty(HEADS, width), visible)
    deep_constant_triton.forward(*inputs)
    deep_constant_triton.backward(out, *inputs)


def deep_selected_read(width: int, dtype: torch.dtype) -> None:
    q, out = (grid(width, dtype=dtype) for _ in range(2))
    norm = empty(HEADS, width), empty(HEADS, width)
    inputs = (q, grid(TOP_K), *deep_maps(width), *norm, grid(TOP_K, dtype=torch.int64))
    deep_selected_triton.forward(*inputs)
    deep_selected_triton.backward(out, *inputs)


LINEAR: dict[str, Run] = {
    "linear_write": linear_write,
    "segment_read": segment_read,
    "segment_route": segment_route,
    "selected_read": selected_read,
    "decode_step": decode_step,
}
DEEP: dict[str, Run] = {
    "deep_write dla": partial(deep_write, parts=1, loss="dot"),
    "deep_write titans": partial(deep_write, parts=2, loss="l2"),
    "deep_read": deep_read,
    "deep_selected_read": deep_selected_read,
}
OPS = LINEAR | {"state_step": state_step} | DEEP
# flags, at one width
VARIANTS: dict[str, Run] = {
    "linear_write no-decay": partial(linear_write, decay=False),
    "segment_read sub-blocks": partial(segment_read, blocks=4),
    "segment_read sigmoid": partial(segment_read, function="sigmoid"),
    "segment_read relu": partial(segment_read, function="relu"),
    "segment_route sub-blocks": partial(segment_route, blocks=4),
    "decode_step int8": partial(decode_step, kept=torch.int8),
    "decode_step sigmoid": partial(decode_step, function="sigmoid"),
    "decode_step relu": partial(decode_step, function="relu"),
    "decode_step given": partial(decode_step, given=True),
    "slot_write": slot_write,  # no width is known to it
    "deep_write titans-resumed": partial(deep_write, parts=2, loss="l2", resumed=True),
    "deep_constant_read": deep_constant_read,
}


def widths_of(op: str) -> dict[str, int]:
    """The preset widths that the kernels of an op take."""
    widest = WIDEST_DEEP if op in DEEP else WIDEST
    return {preset: width for preset, width in WIDTHS.items() if width <= widest}


PRESETS = {f"{op} {preset} bf16": (run, width) for op, run in OPS.items() for preset, width in widths_of(op).items()}


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and runs: the preset widths in bf16, fp32 at some, and flags at width 64. fp16 takes the instructions of
    bf16."""
    for name, (run, width) in PRESETS.items():
        yield name, partial(run, width, torch.bfloat16)
    for op, run in OPS.items():
        yield f"{op} d64 fp32", partial(run, 64, torch.float32)
    yield "deep_read d128 fp32", partial(deep_read, 128, torch.float32)
    for name, run in VARIANTS.items():
        yield f"{name} d64 bf16", partial(run, 64, torch.bfloat16)
