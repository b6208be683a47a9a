# Copyright 2026 the mc-transformers authors.
"""The Triton kernels on a GPU: are they right, and how fast are they. One run, under 8 minutes.

    python -m benchmarks.measure.gpu                            # everything, into results/gpu.json
    python -m benchmarks.measure.gpu --only correctness ops     # some parts; the rest stays if it is of this commit
    TRITON_INTERPRET=1 python -m benchmarks.measure.gpu --smoke --output /tmp/smoke.json   # tiny, without a GPU

Parts, in this order: `peaks` (what this GPU does at most), `correctness` (every op and its gradients against torch in
float64), `ops`, `layer` (training and prefill of one layer, beside attention) and `decode` (one token of one layer,
with a cache of random states). Times are medians of `triton.testing.do_bench` with the 20 % and 80 % quantiles, bf16.

The file is rewritten after every case. A case that fails is recorded with its error and the rest goes on; if the error
leaves the GPU unusable, the program starts itself again and goes on with the next case. Cases for which there is no
time or memory are recorded as left out. Rows of flash-linear-attention appear where it is installed.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.measure.gpu_ops import DEEP, DEVICE, OPS, TOLERANCE, Op, Size, check, randn, rounded, unit
from mc_transformers import MemoryCaching, make_cache
from mc_transformers.kernels.shared.ops import WIDEST_DEEP
from mc_transformers.modeling_mc.cache_layer import MCStaticCacheLayer
from mc_transformers.modeling_mc.memories import MEMORIES as KINDS


SMOKE = "--smoke" in sys.argv
PARTS = ("peaks", "correctness", "ops", "layer", "decode")
SHARE = {"peaks": 0.05, "correctness": 0.35, "ops": 0.45, "layer": 0.8, "decode": 1.0}  # of the time, when a part ends

HEADS, DIM, SEGMENT, TOP_K = (1, 16, 16, 2) if SMOKE else (16, 128, 256, 4)
DEEP_DIM = 16 if SMOKE else 64
TOKENS = 32 if SMOKE else 2**17  # of a batch of the layer part, whatever the length
LENGTHS = (32,) if SMOKE else (2**14, 2**17, 2**16, 2**11)  # the most important ones first
CONTEXTS = (48,) if SMOKE else (2**12, 2**17, 2**20, 2**14, 2**16)
BATCHES = (2,) if SMOKE else (1, 32)
OP_LENGTH = 32 if SMOKE else 2**14


class LeftOut(Exception):
    """A case that cannot run here, with the reason."""


@dataclass
class Case:
    part: str
    name: str
    run: Callable[[], dict]
    fields: dict = field(default_factory=dict)

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
    """Ragged and whole shapes; all dtypes at one width, all preset widths in bf16. One shape of every op, then the
    next: what has to be compiled may take longer than there is time."""
    ragged = Size(1, 2, 13, 1, 16, 24, 1) if SMOKE else Size(2, 5, 200, 2, 64, 48)
    sizes = [(ragged, dtype) for dtype in TOLERANCE if not SMOKE or dtype != torch.float16]
    sizes += [(Size(2, 6, 256, 4, d, d, 5, 4), torch.bfloat16) for d in (128, 64, 48, 96, 256) if not SMOKE]
    for size, dtype in sizes:
        for name, build in OPS.items():
            if name in DEEP and size.dim > WIDEST_DEEP:
                continue
            shape = {"dtype": str(dtype).removeprefix("torch."), "key": size.dim, "value": size.value}
            shape["width"] = size.width
            yield Case("correctness", name, lambda b=build, s=size, t=dtype: check(b, s, t), shape)


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


def op_cases() -> Iterator[Case]:
    """d = 128 (deep memories 64), C = 256, L = 16384; rows of fla's kernels for the same sums without a cache."""
    for name, build in OPS.items():
        dim = DEEP_DIM if name in DEEP else DIM
        for backward in (False, True):
            kind = {"pass": "forward+backward" if backward else "forward", "head_dim": dim}
            yield Case("ops", name, lambda b=build, d=dim, back=backward: time_op(b, d, back), kind)
    if importlib.util.find_spec("fla"):
        for name in FLA:
            for backward in (False, True):
                kind = {"pass": "forward+backward" if backward else "forward"}
                yield Case("ops", f"fla {name}", lambda n=name, back=backward: time_fla(n, back), kind)


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
    q, k, v = (unit(randn(*shape, DIM, dtype=torch.bfloat16)).requires_grad_(backward) for _ in range(3))
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
def layer_of(memory: str, aggregation: str, backend: str, dim: int) -> MemoryCaching:
    """A memory layer as a model has it, convolutions, norms and output gate included."""
    return MemoryCaching(
        HEADS * dim,
        HEADS,
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

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(HEADS * dim, HEADS * dim, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.projections[:3])
        if past is not None:  # the new token has its place at the end
            past[0][:, :, -1:], past[1][:, :, -1:] = k, v
            k, v = past
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.projections[3](out.transpose(1, 2).flatten(2))


def make(layer: nn.Module) -> nn.Module:
    return layer.to(DEVICE, torch.bfloat16)


def time_layer(build: Callable[[], nn.Module], dim: int, length: int, backward: bool) -> dict:
    layer = make(build())
    x = randn(TOKENS // length, length, HEADS * dim, dtype=torch.bfloat16).requires_grad_(backward)
    grad = torch.randn_like(x) if backward else None

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = layer(x)
        if backward:
            out.backward(grad)

    begin = peak_memory(True)
    run()
    found = {"peak_mib": (peak_memory() - begin) / 2**20}
    return found | bench(run, [x, *layer.parameters()])


def peak_memory(reset: bool = False) -> int:
    if SMOKE:
        return 0
    if reset:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


LAYERS = (
    ("linear", "grm"),
    ("linear", "ssc"),
    ("linear", "none"),
    ("gated_linear", "ssc"),
    ("dla", "grm"),
    ("titans", "grm"),
    ("titans", "ssc"),
)[:: 6 if SMOKE else 1]


def layer_cases() -> Iterator[Case]:
    for length in LENGTHS:
        for backward in (True, False):
            shape = {"length": length, "pass": "forward+backward" if backward else "forward"}
            for dim in sorted({DIM, DEEP_DIM}):
                yield Case(
                    "layer",
                    "attention",
                    lambda d=dim, n=length, b=backward: time_layer(lambda: Attention(d), d, n, b),
                    shape | {"head_dim": dim},
                )
            for memory, aggregation in LAYERS:
                dim = DEEP_DIM if memory in ("dla", "titans") else DIM
                for backend in ("triton", "torch"):
                    if backend == "triton" and not KINDS[memory].has_triton:
                        continue
                    if backend == "torch" and KINDS[memory].has_triton and length != LENGTHS[0]:
                        continue
                    kind = (memory, aggregation, backend, dim)
                    yield Case(
                        "layer",
                        f"{memory} {aggregation}",
                        lambda k=kind, n=length, b=backward: time_layer(lambda: layer_of(*k), k[-1], n, b),
                        shape | {"head_dim": dim, "backend": backend},
                    )


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
    kinds = [("linear", a, b) for a in ("ssc", "grm", "none") for b in ("triton", "torch")]
    for context in CONTEXTS:
        for batch in BATCHES:
            for graph in (False,) if SMOKE else (True, False):
                shape = {"context": context, "batch": batch, "graph": graph}
                place = (context, batch, graph)
                yield Case("decode", "attention", lambda p=place: time_attention_decoding(*p), shape)
                for memory, aggregation, backend in kinds:
                    kind = (memory, aggregation, backend)
                    yield Case(
                        "decode",
                        f"{memory} {aggregation}",
                        lambda k=kind, p=place: time_decoding(*k, *p),
                        shape | {"backend": backend},
                    )


def every_case() -> list[Case]:
    peaks = [Case("peaks", "matmul bf16", tensor_peak), Case("peaks", "copy", memory_peak)]
    return [*peaks, *correctness_cases(), *op_cases(), *layer_cases(), *decode_cases()]


# ------------------------------------------------------------------------------------------------------ all of it
def machine() -> dict:
    """What the numbers depend on; no name of a host or a user."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        code = ("../../kernels", "../../modeling_mc")
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode
    except OSError:  # no git
        commit, changed = "unknown", 0
    packages = ("torch", "triton", "transformers", "flash-linear-attention")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = "cpu, interpreted" if SMOKE else torch.cuda.get_device_name()
    return {
        "device": device,
        **versions,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }


def save(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = ",\n".join(json.dumps(row) for row in found["rows"])
    partial.write_text(f'{{"machine": {json.dumps(found["machine"])},\n"rows": [\n{lines}\n]}}\n')
    partial.replace(path)


def run_case(case: Case) -> dict:
    """The row of a case: what it found, or why there is nothing."""
    torch.manual_seed(0)
    try:
        return case.key | case.run()
    except LeftOut as reason:
        return case.key | {"left_out": str(reason)}
    except torch.OutOfMemoryError:
        return case.key | {"left_out": "out of memory"}
    except Exception as error:  # one case that fails must not end the run
        return case.key | {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()


def usable() -> bool:
    """Whether the device still works after an error."""
    try:
        if not SMOKE:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return True
    except RuntimeError:
        return False


def measure(options: argparse.Namespace) -> list[dict]:
    cases = [c for c in every_case() if c.part in options.only and options.cases in c.name]
    names = [c.key for c in cases]
    found = {"machine": machine(), "rows": []}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if options.resume_from:  # started again in the middle of a run
            found["rows"] = known["rows"]
        elif known["machine"] | {"date": ""} == found["machine"] | {"date": ""}:
            found["rows"] = [r for r in known["rows"] if not any(key.items() <= r.items() for key in names)]
    started = options.resume_from or time.time()
    done = [key for key in names if options.resume_from and any(key.items() <= r.items() for r in found["rows"])]
    with tqdm([c for c in cases if c.key not in done]) as progress:
        for case in progress:
            progress.set_postfix_str(" ".join(map(str, case.key.values())))
            if time.time() - started > options.max_seconds * SHARE[case.part]:
                row = case.key | {"left_out": "no time was left"}
            else:
                row = run_case(case)
            found["rows"].append(row)
            save(options.output, found)
            if "error" in row:
                tqdm.write(f"{row}")
                if not usable():
                    arguments = [a for a in sys.argv[1:] if not a.startswith("--resume-from")]
                    os.execv(sys.executable, [sys.executable, __file__, *arguments, f"--resume-from={started}"])
    return [r for r in found["rows"] if any(key.items() <= r.items() for key in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--max-seconds", type=float, default=450)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "gpu.json")
    parser.add_argument("--resume-from", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if SMOKE != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--smoke needs TRITON_INTERPRET=1, and only --smoke can be measured with it")
    rows = measure(options)
    wrong = [r for r in rows if r["part"] == "correctness" and not r.get("ok")]
    failed, left_out = sum("error" in r for r in rows), sum("left_out" in r for r in rows)
    print(f"{len(rows)} cases, {len(wrong)} incorrect, {failed} failed, {left_out} left out: {options.output}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
