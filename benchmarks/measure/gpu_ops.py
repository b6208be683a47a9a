# Copyright 2026 the mc-transformers authors.
"""The ops of `kernels/` with random inputs of any size, and how far their Triton kernels are from torch in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from mc_transformers.kernels.read.deep import deep_constant_read, deep_read, deep_selected_read
from mc_transformers.kernels.read.segment import segment_read
from mc_transformers.kernels.read.selected import segment_route, selected_read
from mc_transformers.kernels.shared.deep import ANSWER
from mc_transformers.kernels.shared.ops import triton_interpreted
from mc_transformers.kernels.step.decode import decode_step
from mc_transformers.kernels.step.slot import slot_write
from mc_transformers.kernels.step.state import state_step
from mc_transformers.kernels.write.deep import deep_write
from mc_transformers.kernels.write.linear import linear_write


DEVICE = torch.device("cpu" if triton_interpreted() else "cuda")
CHUNK, EXPANSION = 16, 2 if triton_interpreted() else 4  # of deep memories: inner chunk, hidden width / width
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5}  # RMS of the error / RMS of the result


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(error) / RMS(expected); infinite if anything is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    size = expected.double().pow(2).mean().sqrt().item()
    error = (actual.double() - expected.double()).pow(2).mean().sqrt().item()
    return error / size if size > 1e-12 else error


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.float(), dim=-1).to(x.dtype)


@dataclass
class Size:
    rows: int
    num: int
    width: int
    heads: int
    dim: int
    value: int
    cached: int = 3
    top_k: int = 2

    @property
    def grid(self) -> tuple[int, ...]:
        return self.rows, self.num, self.width, self.heads

    @property
    def memories(self) -> int:
        return self.cached + self.num

    @property
    def pairs(self) -> int:
        """(token, past memory) pairs of all heads, when every segment reads all that are before it."""
        return self.rows * self.heads * self.width * sum(self.cached + i for i in range(self.num))


@dataclass
class Op:
    """A call `(backend, *inputs)`, its inputs (those at the places `half` get the dtype that is asked for), and how
    many multiply-adds its forward needs at least."""

    call: Callable
    inputs: list
    half: tuple[int, ...]
    products: int


def write_op(size: Size) -> Op:
    q, k, v = unit(randn(*size.grid, size.dim)), unit(randn(*size.grid, size.dim)), randn(*size.grid, size.value)
    log_decay = F.logsigmoid(randn(*size.grid) + 4)
    initial = randn(size.rows, size.heads, size.dim, size.value) / 4
    tokens = size.rows * size.num * size.width * size.heads
    return Op(
        lambda backend, *x: linear_write(*x, None, True, backend),
        [q, k, v, log_decay, initial],
        (0, 1, 2),
        tokens * (32 * (size.dim + size.value) + 2 * size.dim * size.value),
    )


def independent_op(size: Size) -> Op:
    """Segments that start from nothing, without a decay."""
    op = write_op(size)
    return Op(
        lambda backend, *x: linear_write(*x, None, None, None, False, backend), op.inputs[:3], op.half, op.products
    )


def _memories(size: Size) -> tuple[torch.Tensor, ...]:
    """States, summaries, birth and first."""
    birth = torch.cat([torch.zeros(size.cached), torch.arange(1, size.num + 1)]).long().to(DEVICE)
    first = torch.zeros(size.rows, size.num, dtype=torch.int64, device=DEVICE)
    return (
        randn(size.rows, size.memories, size.heads, size.dim, size.value),
        randn(size.rows, size.memories, size.heads, 1, size.dim) / 4,
        birth.expand(size.rows, -1).contiguous(),
        first,
    )


def read_op(size: Size) -> Op:
    states, summaries, birth, first = _memories(size)
    q, u = unit(randn(*size.grid, size.dim)), randn(*size.grid, size.dim) / 4
    return Op(
        lambda backend, *x: segment_read(*x, "softmax", backend),
        [q, u, states, summaries, randn(*size.grid), birth, first],
        (0, 1, 2),
        size.pairs * size.dim * size.value,
    )


def packed_op(size: Size) -> Op:
    """Documents of about two segments: a token reads those of its own only."""
    op, first = read_op(size), torch.arange(size.num, device=DEVICE) // 2 * 2
    op.inputs[-1] = (first + size.cached * (first > 0)).expand(size.rows, -1).contiguous()
    op.products //= max(1, size.memories // 2)
    return op


def route_op(size: Size) -> Op:
    inputs = [randn(*size.grid, size.dim), *_memories(size)[1:]]
    return Op(lambda backend, *x: segment_route(*x, size.top_k, backend)[0], inputs, (0,), size.pairs * size.dim)


def selected_op(size: Size) -> Op:
    states, summaries, birth, first = _memories(size)
    index = segment_route(randn(*size.grid, size.dim), summaries, birth, first, size.top_k, "torch")[0]
    inputs = [unit(randn(*size.grid, size.dim)), randn(*index.shape).softmax(-1) * (index >= 0), states]
    products = index.numel() * size.dim * size.value
    return Op(lambda backend, *x: selected_read(*x, index, backend), inputs, (0, 2), products)


def decode_op(size: Size) -> Op:
    """One token per row; it has no gradient."""
    states, summaries, _, _ = _memories(size)
    visible = torch.ones(size.rows, size.memories, dtype=torch.bool, device=DEVICE)
    q, u = unit(randn(size.rows, size.heads, size.dim)), randn(size.rows, size.heads, size.dim) / 4
    online, logit = randn(size.rows, size.heads, size.dim, size.value), randn(size.rows, size.heads)

    def call(backend: str, q, u, online, logit, states, summaries) -> torch.Tensor:
        with torch.no_grad():
            return decode_step(
                q, u, online, logit, states, None, summaries, visible, top_k=size.top_k, backend=backend
            )[0]

    products = size.rows * size.heads * (1 + size.top_k) * size.dim * size.value
    return Op(call, [q, u, online, logit, states, summaries], (1, 4), products)


def state_op(size: Size, delta: bool) -> Op:
    """One token per row into the running states: with the token before it (swla), or by the delta rule."""
    group = (size.rows, size.heads)
    k, v = unit(randn(*group, size.dim)), randn(*group, size.value)
    again = () if delta else (unit(randn(*group, size.dim)), randn(*group, size.value), randn(*group).sigmoid())

    def call(backend: str, state, k, v, log_decay, write, *again) -> torch.Tensor:
        with torch.no_grad():
            return state_step(state, k, v, log_decay, write, again or None, delta, backend)

    inputs = [randn(*group, size.dim, size.value), k, v, F.logsigmoid(randn(*group) + 4), randn(*group).sigmoid()]
    return Op(call, [*inputs, *again], (1, 2), size.rows * size.heads * 3 * size.dim * size.value)


def slot_op(size: Size) -> Op:
    """Every second row's state moves into its slot of the cache."""
    rows = torch.arange(size.rows, device=DEVICE)[:, None] % 2 == 0
    slot = torch.full((size.rows, 1), size.memories - 1, device=DEVICE)

    def call(backend: str, kept, state) -> torch.Tensor:
        with torch.no_grad():
            return slot_write(kept, state[:, None], slot, rows, True, backend).detach()

    kept = _memories(size)[0]
    return Op(call, [kept, randn(size.rows, *kept.shape[2:])], (0,), 0)


def deep_write_op(size: Size, parts: int, loss: str) -> Op:
    """Titans (momentum and decay: parts = 2) or DLA without decay (parts = 1), in whole inner chunks. Steps are small,
    so that fp32 itself is exact enough to be compared with."""
    chunk = min(CHUNK, size.width)
    rows, chunks, gated = size.rows * size.num, size.width // chunk, parts > 1
    tokens, cells = (rows, chunks * chunk, size.heads), (rows, chunks, size.heads)
    run = torch.zeros(size.rows, dtype=torch.int64, device=DEVICE)
    enter, trans = 0.5 + 0.5 * randn(*cells, chunk, parts).sigmoid(), randn(*cells, parts, parts).sigmoid().triu()
    every = [
        *(randn(*tokens, size.dim) for _ in range(3)),
        (0.01 * randn(*cells, chunk, chunk)).tril(),
        enter if gated else None,
        0.01 * randn(*cells, chunk, parts).sigmoid(),
        trans if gated else None,
        *_deep_maps(size, (rows, size.heads)),
        *[None] * 4,
        *_norm(size),
        run,
        run,
    ]

    def call(backend: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(inputs)
        found = deep_write(
            *(None if x is None else next(given) for x in every), loss=loss, read=ANSWER, backend=backend
        )
        return tuple(x for x in found if x.numel())

    hidden = EXPANSION * size.dim
    products = tokens[0] * tokens[1] * tokens[2] * hidden * ((4 + 4 * parts) * size.dim + 2 * chunk)
    return Op(call, [x for x in every if x is not None], (0, 1, 2), products)


def _deep_maps(size: Size, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = EXPANSION * size.dim
    return randn(*shape, size.dim, hidden) / size.dim**0.5, randn(*shape, hidden, size.dim) / size.dim**0.5


def _norm(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + 0.3 * randn(size.heads, size.dim), randn(size.heads, size.dim)


def deep_read_op(size: Size) -> Op:
    _, summaries, birth, first = _memories(size)
    maps = _deep_maps(size, (size.rows, size.memories, size.heads))
    q, u = randn(*size.grid, size.dim), randn(*size.grid, size.dim) / 4
    return Op(
        lambda backend, *x: deep_read(*x, "softmax", backend),
        [q, u, *maps, summaries, randn(*size.grid), *_norm(size), birth, first],
        (0, 1, 2, 3),
        size.pairs * 2 * size.dim * EXPANSION * size.dim,
    )


def deep_constant_op(size: Size) -> Op:
    maps = _deep_maps(size, (size.rows, size.memories, size.heads))
    birth = _memories(size)[2]
    visible = birth[:, None, :] <= torch.arange(size.num, device=DEVICE)[:, None]
    return Op(
        lambda backend, *x: deep_constant_read(*x, backend),
        [randn(*size.grid, size.dim), *maps, *_norm(size), visible],
        (0, 1, 2),
        size.pairs * 2 * size.dim * EXPANSION * size.dim,
    )


def deep_selected_op(size: Size) -> Op:
    _, summaries, birth, first = _memories(size)
    index = segment_route(randn(*size.grid, size.dim), summaries, birth, first, size.top_k, "torch")[0]
    weights = randn(*index.shape).softmax(-1) * (index >= 0)
    maps = _deep_maps(size, (size.rows, size.memories, size.heads))
    return Op(
        lambda backend, q, w, *x: deep_selected_read(q, w * (index >= 0), *x, index, backend),
        [randn(*size.grid, size.dim), weights, *maps, *_norm(size)],
        (0, 2, 3),
        index.numel() * 2 * size.dim * EXPANSION * size.dim,
    )


DEEP: dict[str, Callable[[Size], Op]] = {
    "deep_write dla": partial(deep_write_op, parts=1, loss="dot"),
    "deep_write titans": partial(deep_write_op, parts=2, loss="l2"),
    "deep_read": deep_read_op,
    "deep_constant_read": deep_constant_op,
    "deep_selected_read": deep_selected_op,
}
OPS: dict[str, Callable[[Size], Op]] = {
    "linear_write": write_op,
    "segment_read": read_op,
    "linear_write independent": independent_op,
    "segment_read packed": packed_op,
    "segment_route": route_op,
    "selected_read": selected_op,
    "decode_step": decode_op,
    "state_step": partial(state_op, delta=False),
    "state_step delta": partial(state_op, delta=True),
    "slot_write": slot_op,
    **DEEP,
}


def rounded(op: Op, dtype: torch.dtype) -> list:
    return [
        x.to(dtype if place in op.half else torch.float32) if x.is_floating_point() else x
        for place, x in enumerate(op.inputs)
    ]


def results(call: Callable, inputs: list, cotangents: list | None = None) -> tuple[list, list]:
    """Outputs with the gradients of all float inputs, and the gradients that were sent in."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = call(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not outputs[0].is_floating_point() or not outputs[0].requires_grad:
        return outputs, []
    cotangents = cotangents or [randn(*x.shape, dtype=x.dtype) for x in outputs]
    total = sum((x * c.to(x.dtype)).sum() for x, c in zip(outputs, cotangents, strict=True))
    leaves = [x for x in inputs if x.requires_grad]
    return outputs + list(torch.autograd.grad(total, leaves)), cotangents


def check(build: Callable[[Size], Op], size: Size, dtype: torch.dtype) -> dict:
    """How far the kernels are from torch in float64 on the same inputs. `deep_write` may be further: its products are
    TF32's, which Triton truncates."""
    op = build(size)
    inputs = rounded(op, dtype)
    actual, cotangents = results(lambda *x: op.call("triton", *x), inputs)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    expected, _ = results(lambda *x: op.call("torch", *x), exact, [c.double() for c in cotangents])
    if not actual[0].is_floating_point():
        equal = (actual[0] == expected[0]).double().mean().item()
        return {"equal": equal, "ok": equal > 0.999}
    errors = [rms_ratio(a, e) for a, e in zip(actual, expected, strict=True)]
    allowed = 1e-2 if build in (DEEP["deep_write dla"], DEEP["deep_write titans"]) else TOLERANCE[dtype]
    return {"errors": errors, "ok": max(errors) < allowed}
