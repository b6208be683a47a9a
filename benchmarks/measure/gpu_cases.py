# Copyright 2026 the mc-transformers authors.
"""What `gpu.py` measures, the most important things first: names of cases, and the functions that run them."""

import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import triton
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure.gpu_ops import DEEP, DEVICE, OPS, Op, Size, check, randn, results, rounded, unit
from mc_transformers import MemoryCaching, make_cache
from mc_transformers.kernels.shared.ops import WIDEST_DEEP
from mc_transformers.modeling_mc.cache_layer import MCStaticCacheLayer


SMOKE = "--smoke" in sys.argv
# parts in their order, and how much of the time has passed when each must end
SHARE = {
    "compile": 0.17,
    "peaks": 0.2,
    "correctness": 0.38,
    "ops": 0.52,
    "profile": 0.56,
    "layer": 0.8,
    "decode": 0.9,
    "deep": 1.0,
}

HEADS, DIM, SEGMENT, TOP_K = (1, 16, 16, 2) if SMOKE else (16, 128, 256, 4)
DEEP_DIM = 16 if SMOKE else 64
WIDE, WIDE_HEADS = (32, 1) if SMOKE else (256, 8)  # of the 1.3B preset
TOKENS = 32 if SMOKE else 2**17  # of a batch of the layer part, whatever the length
LENGTHS = (32,) if SMOKE else (2**14, 2**17)  # the more important one first
DOCUMENT = 8 if SMOKE else 2**12  # tokens of packed documents
CONTEXTS = (48,) if SMOKE else (2**12, 2**17, 2**20)
BATCHES = (2,) if SMOKE else (1, 32)
OP_LENGTH = 32 if SMOKE else 2**14
PASSES = {"forward": False, "forward+backward": True}
PINNED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
LINEAR = [name for name in OPS if name not in DEEP]


class LeftOut(Exception):
    """A case that cannot run here, with the reason."""


@dataclass
class Case:
    part: str
    name: str
    run: Callable[[], dict]
    fields: dict = field(default_factory=dict)
    limit: float = 25.0  # seconds after which it is killed

    @property
    def key(self) -> dict:
        return {"part": self.part, "case": self.name, **self.fields}


# ------------------------------------------------------------------------------------------------------- measuring
def bench(run: Callable[[], object], grads: list[torch.Tensor] | None = None, graph: bool = False) -> dict:
    """Milliseconds of a call: median and quantiles. `graph`: replayed as a CUDA graph, without the launches' cost."""
    if SMOKE:
        start = time.perf_counter()
        run()
        median = low = high = 1e3 * (time.perf_counter() - start)
    elif graph:
        median, low, high = triton.testing.do_bench_cudagraph(run, rep=30, quantiles=[0.5, 0.2, 0.8])
    else:
        median, low, high = triton.testing.do_bench(
            run, warmup=20, rep=80, grad_to_none=grads, quantiles=[0.5, 0.2, 0.8]
        )
    return {"ms": median, "ms_20": low, "ms_80": high}


def correctness_cases() -> Iterator[Case]:
    """What matters most first: linear memories of width 128 and 256 in bf16, deep ones of width 64, ragged shapes in
    bf16 and fp32, the other presets."""
    if SMOKE:
        ragged = Size(1, 2, 13, 1, 16, 24, 1)
        groups = [(ragged, torch.bfloat16, [*OPS]), (ragged, torch.float32, [*OPS])]
    else:
        ragged, whole = Size(2, 5, 200, 2, 64, 48), partial(Size, 2, 6, 256, 4)
        groups = [
            (whole(128, 128, 5, 4), torch.bfloat16, LINEAR),
            (whole(256, 256, 5, 4), torch.bfloat16, LINEAR),
            (whole(64, 64, 5, 4), torch.bfloat16, [*DEEP]),
            (ragged, torch.bfloat16, LINEAR),
            (ragged, torch.float32, LINEAR),
            (ragged, torch.bfloat16, [*DEEP]),
            *((whole(d, d, 5, 4), torch.bfloat16, LINEAR) for d in (48, 96, 64)),
            (whole(128, 128, 5, 4), torch.bfloat16, [*DEEP]),
        ]
    for size, dtype, names in groups:
        for name in names:
            if name in DEEP and size.dim > WIDEST_DEEP:
                continue
            shape = {"dtype": str(dtype).removeprefix("torch."), "key": size.dim, "value": size.value}
            run = partial(check, OPS[name], size, dtype)
            yield Case("correctness", name, run, shape | {"width": size.width}, 40 if name in DEEP else 25)


def time_op(build: Callable[[Size], Op], dim: int, backward: bool) -> dict:
    size = Size(TOKENS // OP_LENGTH, OP_LENGTH // SEGMENT, SEGMENT, HEADS, dim, dim, 0, TOP_K)
    op = build(size)
    inputs = [x.requires_grad_(backward and x.is_floating_point()) for x in rounded(op, torch.bfloat16)]
    out = _one(op.call("triton", *inputs))
    if backward and not out.requires_grad:
        raise LeftOut("it has no gradient")
    grad = torch.randn_like(out) if backward else None

    def run() -> None:
        out = _one(op.call("triton", *inputs))
        if backward:
            out.backward(grad)

    found = bench(run, [x for x in inputs if x.requires_grad])
    return found | {"tflops": 2 * op.products * (3 if backward else 1) / found["ms"] / 1e9}


def _one(out):
    return out[0] if isinstance(out, tuple) else out


def time_sdpa(pin: str, length: int, backward: bool) -> dict:
    """Causal attention alone, by one of torch's kernels."""
    q, k, v = (randn(TOKENS // length, HEADS, length, DIM, dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (x.requires_grad_(backward) for x in (q, k, v))
    grad = torch.randn_like(v)

    def run() -> None:
        with pinned(pin):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            out.backward(grad)

    found = bench(run, [q, k, v])
    return found | {"tflops": 2 * TOKENS * HEADS * length * DIM * (3.5 if backward else 1) / found["ms"] / 1e9}


def pinned(pin: str | None):
    return nullcontext() if SMOKE or pin is None else sdpa_kernel(PINNED[pin])


def op_cases() -> Iterator[Case]:
    """C = 256, L = 16384, beside attention of the same tokens and heads; and fla's kernels for the same sums without a
    cache. Deep memories come last, in a part of their own."""
    for length in LENGTHS:
        for pin in PINNED:
            for name, backward in PASSES.items():
                kind = {"pass": name, "head_dim": DIM, "length": length}
                yield Case("ops", f"attention {pin}", partial(time_sdpa, pin, length, backward), kind)
    for op in LINEAR:
        for name, backward in PASSES.items():
            kind = {"pass": name, "head_dim": DIM, "length": OP_LENGTH}
            yield Case("ops", op, partial(time_op, OPS[op], DIM, backward), kind)
    if importlib.util.find_spec("fla"):
        for op in FLA:
            for name, backward in PASSES.items():
                yield Case("ops", f"fla {op}", partial(time_fla, op, backward), {"pass": name})


# fla op: its module, and what it takes beside q, k and v, from the shape [B, T, H] of a gate
FLA: dict[str, tuple[str, Callable]] = {
    "chunk_simple_gla": ("simple_gla", lambda shape: {"g": F.logsigmoid(randn(*shape) + 4)}),
    "chunk_gated_delta_rule": (
        "gated_delta_rule",
        lambda shape: {"g": F.logsigmoid(randn(*shape) + 4), "beta": randn(*shape, dtype=torch.bfloat16).sigmoid()},
    ),
    "chunk_log_linear_attn": (
        "log_linear_attn",
        lambda shape: {
            "g": F.logsigmoid(randn(*shape) + 4),
            "level_scales": randn(*shape, shape[1].bit_length()).softmax(-1).bfloat16(),
        },
    ),
}


def time_fla(name: str, backward: bool) -> dict:
    module, extra = FLA[name]
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    shape = (TOKENS // OP_LENGTH, OP_LENGTH, HEADS)
    heads = 1 if name == "chunk_log_linear_attn" else HEADS  # of queries and keys: it takes no more
    q, k, v = (
        unit(randn(*shape[:2], h, DIM, dtype=torch.bfloat16)).requires_grad_(backward) for h in (heads, heads, HEADS)
    )
    others = extra(shape)
    grad = torch.randn_like(v)

    def run() -> None:
        out = _one(function(q, k, v, **others))
        if backward:
            out.backward(grad)

    return bench(run, [q, k, v])


# ---------------------------------------------------------------------------------------------------------- peaks
def tensor_peak() -> dict:
    n = 64 if SMOKE else 8192
    a, b = randn(n, n, dtype=torch.bfloat16), randn(n, n, dtype=torch.bfloat16)
    found = bench(lambda: a @ b)
    return found | {"tflops": 2 * n**3 / found["ms"] / 1e9}


def memory_peak() -> dict:
    a = torch.empty(2**10 if SMOKE else 2**31, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    found = bench(lambda: b.copy_(a))
    return found | {"gb_per_s": 2 * a.numel() / found["ms"] / 1e6}


# ---------------------------------------------------------------------------------------------------------- layers
def layer_of(
    memory: str, aggregation: str, backend: str = "triton", dim: int = DIM, heads: int = HEADS
) -> MemoryCaching:
    """A memory layer as a model has it, convolutions, norms and output gate included."""
    return MemoryCaching(
        heads * dim,
        heads,
        memory=memory,
        aggregation=aggregation,
        segment_size=SEGMENT,
        num_selected_segments=TOP_K,
        mc_backend=backend,
        memory_chunk_size=min(16, SEGMENT),
    )


class Attention(nn.Module):
    """Four projections around torch's causal scaled_dot_product_attention; or one token, with the past's keys and
    values."""

    def __init__(self, dim: int = DIM, pin: str | None = None) -> None:
        super().__init__()
        self.pin = pin
        self.projections = nn.ModuleList(nn.Linear(HEADS * dim, HEADS * dim, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.projections[:3])
        if past is not None:  # the new token has its place at the end
            past[0][:, :, -1:], past[1][:, :, -1:] = k, v
            k, v = past
        with pinned(self.pin):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.projections[3](out.transpose(1, 2).flatten(2))


def make(layer: nn.Module) -> nn.Module:
    return layer.to(DEVICE, torch.bfloat16)


def stepper(build: Callable[[], nn.Module], width: int, length: int, backward: bool, how: str = "") -> tuple:
    """A forward (and backward) of a layer, and what gets gradients. `how`: "compiled", or "packed" documents."""
    layer = make(build())
    rows = 1 if how == "packed" else TOKENS // length
    x = randn(rows, length, width, dtype=torch.bfloat16).requires_grad_(backward)
    grad = torch.randn_like(x) if backward else None
    options = {}
    if how == "packed":
        options["cu_seq_lens"] = torch.arange(0, length + 1, DOCUMENT, device=DEVICE)
    if how == "compiled":
        layer = torch.compile(layer, backend="eager" if SMOKE else "inductor")

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = layer(x, **options)
        if backward:
            out.backward(grad)

    return run, [x, *layer.parameters()]


def time_layer(build, width: int, length: int, backward: bool, how: str = "", repeat: bool = True) -> dict:
    run, leaves = stepper(build, width, length, backward, how)
    begin = peak_memory(True)
    run()
    found = {"peak_mib": (peak_memory() - begin) / 2**20}
    if repeat:
        return found | bench(run, leaves)
    run()  # once more, without what the first call compiles
    peak_memory(True)
    start = time.perf_counter()
    run()
    peak_memory(True)
    return found | dict.fromkeys(("ms", "ms_20", "ms_80"), 1e3 * (time.perf_counter() - start))


def peak_memory(reset: bool = False) -> int:
    if SMOKE:
        return 0
    if reset:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def profile(memory: str, aggregation: str, length: int) -> dict:
    """The 20 kernels that take most of a training step of a layer."""
    run, _ = stepper(partial(layer_of, memory, aggregation), HEADS * DIM, length, True)
    run()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (not SMOKE)
    with torch.profiler.profile(activities=activities) as seen:
        run()
        peak_memory(True)
    name = "self_cpu_time_total" if SMOKE else "self_device_time_total"
    events = sorted(seen.key_averages(), key=lambda event: getattr(event, name), reverse=True)[:20]
    return {"kernels": [[event.key[:80], round(getattr(event, name) / 1e3, 4), event.count] for event in events]}


def profile_cases() -> Iterator[Case]:
    for aggregation in ("grm", "ssc"):
        yield Case("profile", f"linear {aggregation}", partial(profile, "linear", aggregation, LENGTHS[0]))


def layer_cases() -> Iterator[Case]:
    """Beside attention by each of torch's kernels: linear memories, compiled and packed too, and the 1.3B preset's."""
    width = HEADS * DIM
    for length in LENGTHS:
        for name, backward in reversed(PASSES.items()):
            shape = {"length": length, "pass": name}

            def case(kind: str, build: Callable[[], nn.Module], how: str = "", size: int = width, limit: float = 25.0):
                run = partial(time_layer, build, size, length, backward, how)  # noqa: B023 (bound at once)
                fields = shape | ({"how": how} if how else {}) | ({"width": size} if size != width else {})  # noqa: B023
                return Case("layer", kind, run, fields, limit)

            for pin in PINNED:
                yield case(f"attention {pin}", partial(Attention, DIM, pin))
            for aggregation in ("grm", "ssc", "none"):
                yield case(f"linear {aggregation}", partial(layer_of, "linear", aggregation))
            if not backward:
                continue
            yield case("gated_linear ssc", partial(layer_of, "gated_linear", "ssc"))
            if length == LENGTHS[0]:
                build = partial(layer_of, "swla", "grm", "triton", WIDE, WIDE_HEADS)
                yield case("swla grm", build, size=WIDE * WIDE_HEADS)
            if length == LENGTHS[-1]:
                yield case("linear grm", partial(layer_of, "linear", "grm"), "packed")
    for length in LENGTHS:
        for aggregation in ("grm", "ssc"):
            run = partial(time_layer, *compiled(aggregation, length))
            fields = {"length": length, "pass": "forward+backward", "how": "compiled"}
            yield Case("layer", f"linear {aggregation}", run, fields, 75.0)


def compiled(aggregation: str, length: int) -> tuple:
    """Arguments of `stepper`: a training step of a layer by `torch.compile`."""
    return partial(layer_of, "linear", aggregation), HEADS * DIM, length, True, "compiled"


def deep_cases() -> Iterator[Case]:
    """What PyTorch's own operations take, and deep memories; some take seconds a step."""
    kinds = [("linear", "grm", DIM), ("linear", "ssc", DIM)][: 1 if SMOKE else 2]
    deep = [("titans", "grm", DEEP_DIM), ("dla", "grm", DEEP_DIM), ("titans", "ssc", DEEP_DIM)][: 1 if SMOKE else 3]
    for backend, chosen in (("triton", deep), ("torch", kinds + deep)):
        for memory, aggregation, dim in chosen:
            build = partial(layer_of, memory, aggregation, backend, dim)
            run = partial(time_layer, build, HEADS * dim, LENGTHS[0], True, "", backend == "triton")
            fields = {"length": LENGTHS[0], "pass": "forward+backward", "backend": backend, "head_dim": dim}
            yield Case("deep", f"{memory} {aggregation}", run, fields, 40.0)
    for op in DEEP:
        run = partial(time_op, OPS[op], DEEP_DIM, True)
        yield Case("deep", op, run, {"pass": "forward+backward", "head_dim": DEEP_DIM}, 40.0)


# ---------------------------------------------------------------------------------------------------------- decode
def need(num_bytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] if not SMOKE else 2**30
    if num_bytes > 0.9 * free:
        raise LeftOut(f"{num_bytes / 2**30:.0f} GiB of cache do not fit")


@torch.inference_mode()
def time_decoding(memory: str, aggregation: str, backend: str, context: int, batch: int, graph: bool) -> dict:
    """One token of one layer whose cache, of fixed size, holds random states of `context` tokens."""
    slots = context // SEGMENT
    if aggregation != "none":
        need(batch * slots * HEADS * DIM * (2 * DIM + 4))
    layer = make(layer_of(memory, aggregation, backend, DIM)).eval()
    cache, mixer = make_cache(layer, state_dtype=torch.bfloat16), layer.mixer
    past = MCStaticCacheLayer(max_cache_len=2 * SEGMENT)
    past.kept_dtype = torch.bfloat16
    cache.layers[0] = past
    x = randn(batch, 1, HEADS * DIM, dtype=torch.bfloat16)

    def step() -> torch.Tensor:  # without the layer's look for room in the cache, which waits for the GPU
        return mixer(x, mixer.table(x, layer=past), cache)

    step()
    past.max_cache_len = context
    past.position.fill_(context - SEGMENT // 2)  # no border during the measurement
    past.num_tokens.fill_(context - SEGMENT // 2)
    for name, shown in list(past.tensors.items()):
        if name.startswith(("kept", "summaries")):
            past.tensors[name] = shown.new_empty(batch, slots, *shown.shape[2:]).normal_()
    position = past.position.clone()

    def one() -> None:  # always the same place, however often it is measured
        past.position.copy_(position)
        step()

    return bench(one, graph=graph) | {"cache_bytes": past.nbytes}


@torch.inference_mode()
def time_attention_decoding(context: int, batch: int, graph: bool) -> dict:
    """One token of an attention layer with keys and values of `context` tokens."""
    need(batch * context * HEADS * DIM * 4)
    layer = make(Attention(DIM))
    past = tuple(randn(batch, HEADS, context, DIM, dtype=torch.bfloat16) for _ in range(2))
    x = randn(batch, 1, HEADS * DIM, dtype=torch.bfloat16)
    return bench(lambda: layer(x, past), graph=graph) | {"cache_bytes": sum(t.nbytes for t in past)}


def decode_cases() -> Iterator[Case]:
    """Replayed as CUDA graphs, and one point in eager mode."""
    places = [(context, batch, not SMOKE) for context in CONTEXTS for batch in BATCHES]
    for place in [*places, *[(*places[0][:2], False)] * (not SMOKE)]:
        shape = dict(zip(("context", "batch", "graph"), place, strict=True))
        yield Case("decode", "attention", partial(time_attention_decoding, *place), shape)
        for aggregation in ("ssc", "grm", "none"):
            for backend in ("triton", "torch") if place == places[0] else ("triton",):
                run = partial(time_decoding, "linear", aggregation, backend, *place)
                yield Case("decode", f"linear {aggregation}", run, shape | {"backend": backend})


# --------------------------------------------------------------------------------------------------- compiled ahead
def compile_op(name: str, dim: int, dtype: torch.dtype) -> dict:
    """Run an op once on a small input, with its gradients: Triton keeps what it compiles on disk, for all lengths."""
    op = OPS[name](Size(1, 2, SEGMENT, 1, dim, dim, 2, min(TOP_K, 2)))
    results(partial(op.call, "triton"), rounded(op, dtype))
    return {}


def compile_layer(memory: str, aggregation: str, dim: int) -> dict:
    layer = make(layer_of(memory, aggregation, dim=dim, heads=2))
    x = randn(1, 3 * SEGMENT, 2 * dim, dtype=torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    return {}


def compile_step(aggregation: str, length: int) -> dict:
    stepper(*compiled(aggregation, length))[0]()
    return {}


def compile_cases() -> Iterator[Case]:
    """For the cases above, slowest compilations first; one process each, as many at once as there are cores."""
    if SMOKE:
        yield Case("compile", "linear_write", partial(compile_op, "linear_write", DIM, torch.bfloat16))
        return
    for length in LENGTHS:  # its results are kept on disk too
        for aggregation in ("grm", "ssc"):
            run = partial(compile_step, aggregation, length)
            yield Case("compile", f"linear {aggregation}", run, {"length": length, "how": "compiled"})
    for memory, aggregation in (("titans", "grm"), ("dla", "grm"), ("titans", "ssc")):
        yield Case("compile", f"{memory} {aggregation}", partial(compile_layer, memory, aggregation, DEEP_DIM))
    for dim in (DIM, WIDE):
        for name in LINEAR:
            yield Case("compile", name, partial(compile_op, name, dim, torch.bfloat16), {"key": dim})
    for memory, aggregation, dim in (("linear", "ssc", DIM), ("gated_linear", "ssc", DIM), ("swla", "grm", WIDE)):
        yield Case("compile", f"{memory} {aggregation}", partial(compile_layer, memory, aggregation, dim))
    for name in DEEP:
        yield Case("compile", name, partial(compile_op, name, DEEP_DIM, torch.bfloat16), {"key": DEEP_DIM})
    for dim in (64, 48, 96):
        for name in LINEAR:
            yield Case("compile", name, partial(compile_op, name, dim, torch.bfloat16), {"key": dim})


def peak_cases() -> Iterator[Case]:
    yield Case("peaks", "matmul bf16", tensor_peak)
    yield Case("peaks", "copy", memory_peak)


def every_case() -> list[Case]:
    """All cases, in the order in which they run. Compilation has a limit of its own."""
    ahead = [replace(case, limit=90.0) for case in compile_cases()]
    makers = (peak_cases, correctness_cases, op_cases, profile_cases, layer_cases, decode_cases, deep_cases)
    return [*ahead, *(case for make_cases in makers for case in make_cases())]
