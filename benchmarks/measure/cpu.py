# Copyright 2026 the mc-transformers authors.
"""Time and memory of one layer on a CPU, beside attention and beside other packages; time per token when decoding.

    python -m benchmarks.measure.cpu                                # everything, under 10 minutes on two quiet cores
    python -m benchmarks.measure.cpu --only decode                  # one part: layer, memory or decode
    python -m benchmarks.measure.cpu --cases linear --lengths 512 2048

Rows of other packages appear where these are installed, and are left out where not:

    pip install --no-deps memory-caching==0.1.0
    pip install titans-pytorch==0.5.5

All cases of one length run in turns in one process, so that a busy machine slows all of them alike: compare ratios.
Peak memory is that of a process of its own per case. Processes are forked: Linux or macOS.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from mc_transformers import MCCache, MCConfig, MCModel, MemoryCaching


WIDTH, HEADS, SEGMENT, TOP_K = 256, 4, 64, 2
LENGTHS = (512, 1024, 2048, 4096, 8192)
CONTEXTS = (1024, 16384)
PARTS = ("layer", "memory", "decode")
PASSES = ("forward", "forward+backward")
OTHERS = {"memory-caching": "memory_caching", "titans-pytorch": "titans_pytorch"}  # distribution: module


def ours(memory: str, aggregation: str, **fields) -> MemoryCaching:
    """A memory layer as a model has it, convolutions, norms and output gate included."""
    common = {"segment_size": SEGMENT, "num_selected_segments": TOP_K}
    return MemoryCaching(WIDTH, HEADS, memory=memory, aggregation=aggregation, **common, **fields)


class Attention(nn.Module):
    """Four projections around torch's causal scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def memory_caching_layer(memory: str, aggregation: str) -> nn.Module:
    """The package's layer with the same memory, aggregation, sizes and start of segments; Titans with descent."""
    import memory_caching as package

    hidden = 4 * WIDTH // HEADS  # our memory_expansion
    dla = package.DLAConfig(memory_width=hidden, inner_update_mode="differentiable")
    titans = package.TitansConfig(
        memory_width=hidden, inner_update_mode="differentiable", update_convention="gradient_descent"
    )
    config = package.MCConfig(
        d_model=WIDTH,
        num_heads=HEADS,
        backend=memory,
        aggregation=aggregation,
        segment_size=SEGMENT,
        state_init_mode="restart",
        ssc_top_k=TOP_K,
        dla=dla,
        titans=titans,
    )
    backends = {
        "linear": package.LinearMemoryBackend,
        "dla": lambda: package.DLABackend(dla),
        "titans": lambda: package.TitansBackend(titans),
    }
    return package.MemoryCachingLayer(config=config, backend=backends[memory]())


class TitansPytorch(nn.Module):
    """The package's NeuralMemory with our inner chunk; it caches nothing."""

    def __init__(self) -> None:
        super().__init__()
        from titans_pytorch import NeuralMemory

        self.memory = NeuralMemory(dim=WIDTH, chunk_size=16, dim_head=WIDTH // HEADS, heads=HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(x)[0]


CASES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    **{f"linear {a}": lambda a=a: ours("linear", a) for a in ("none", "grm", "ssc")},
    "linear log-linear++": lambda: ours("linear", "grm", segmentation="logarithmic"),
    "linear grm, bare": lambda: ours("linear", "grm", conv_kernel_size=0, qk_norm=False, use_output_gate=False),
    "dla grm": lambda: ours("dla", "grm"),
    "titans ssc": lambda: ours("titans", "ssc"),
    "memory-caching: linear grm": lambda: memory_caching_layer("linear", "grm"),
    "memory-caching: dla grm": lambda: memory_caching_layer("dla", "grm"),
    "memory-caching: titans ssc": lambda: memory_caching_layer("titans", "ssc"),
    "titans-pytorch: NeuralMemory": TitansPytorch,
}
DECODE_CASES = {
    **{f"linear {a}": ("linear", a, "memory_caching") for a in ("none", "grm", "ssc")},
    "titans ssc": ("titans", "ssc", "memory_caching"),
    "attention": ("linear", "none", "full_attention"),
}


# ------------------------------------------------------------------------------------------------------ measuring
def _run(layer: nn.Module, length: int, backward: bool) -> float:
    """Seconds of one pass; what it built is freed after the clock has stopped."""
    layer.zero_grad(set_to_none=True)
    x = torch.randn(1, length, WIDTH, requires_grad=backward)
    gc.collect()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = layer(x)
    if backward:
        out.sum().backward()
    return time.perf_counter() - start


def time_layers(names: list[str], length: int, backward: bool, repeats: int, max_seconds: float) -> dict:
    """Median and minimum milliseconds of every case, in turns; a slow case gets fewer turns."""
    torch.manual_seed(0)
    layers = {name: CASES[name]() for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):  # the first one warms up, unless it is all there is time for
        for name, layer in layers.items():
            if sum(taken[name]) < max_seconds / 3:
                taken[name].append(_run(layer, length, backward))
                if turn == 1:
                    del taken[name][0]
    rows = {name: [1e3 * t for t in times] for name, times in taken.items()}
    return {name: {"ms": statistics.median(ms), "min_ms": min(ms), "repeats": len(ms)} for name, ms in rows.items()}


def peak_memory(name: str, length: int) -> float:
    """MiB that forward and backward add to what the process held before."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    torch.manual_seed(0)
    layer = CASES[name]()
    _run(layer, SEGMENT, True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _run(layer, length, True)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


@torch.inference_mode()
def time_decoding(name: str, tokens: int) -> dict[str, float]:
    """Median milliseconds per token of a one-layer model, and bytes of the cache, after every length of context."""
    memory, aggregation, kind = DECODE_CASES[name]
    torch.manual_seed(0)
    config = MCConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        segment_size=SEGMENT,
        num_selected_segments=TOP_K,
        memory=memory,
        aggregation=aggregation,
        layer_types=[kind],
        vocab_size=256,
        intermediate_size=512,
    )
    model = MCModel(config).eval()
    caches = {}
    for context in CONTEXTS:
        past = MCCache(config=model.config)
        for start in range(0, context, 1024):
            ids = torch.randint(256, (1, min(1024, context - start)))
            model(ids, cache=past)
        caches[context] = past
    taken: dict[int, list[float]] = {context: [] for context in CONTEXTS}
    for step in range(tokens + 8):
        for context in CONTEXTS[:: -1 if step % 2 else 1]:  # a busy scheduler may favour the first or the second
            ids = torch.randint(256, (1, 1))
            start = time.perf_counter()
            model(ids, cache=caches[context])
            if step >= 8:
                taken[context].append(1e3 * (time.perf_counter() - start))
    return {
        **{f"ms after {context}": statistics.median(t) for context, t in taken.items()},
        **{f"bytes after {context}": past.nbytes for context, past in caches.items()},
    }


def _child(connection, threads: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    try:
        connection.send((function(*args), None))
    except Exception as error:  # reported in the parent, which names the case
        connection.send((None, f"{type(error).__name__}: {error}"))


def in_process(threads: int, function: Callable, *args):
    """`function(*args)` in a fresh forked process.

    Raises:
        RuntimeError: the process failed or was killed.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, threads, function, args))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        result, error = None, "the process was killed"
    process.join()
    if error is not None:
        raise RuntimeError(f"{function.__name__}{args}: {error}")
    return result


# ------------------------------------------------------------------------------------------------------ all of it
def machine(threads: int) -> dict:
    """What the numbers depend on; no name of a host or a user."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    packages = ["torch", "transformers", "memory-caching", "titans-pytorch"]
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(OTHERS.get(p, p))}
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../../kernels", "../../modeling_mc"]).returncode
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "python": platform.python_version(),
        **versions,
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load before the run": round(os.getloadavg()[0], 2),
    }


def missing_package(name: str) -> str | None:
    """The package that a case needs and that is not installed."""
    package = name.split(":")[0] if ":" in name else None
    return package if package and importlib.util.find_spec(OTHERS[package]) is None else None


def measure(options: argparse.Namespace) -> dict:
    names = [n for n in CASES if any(part in n for part in options.cases) and not missing_package(n)]
    results: dict = {"machine": machine(options.threads), "layer": [], "memory": [], "decode": []}
    skipped = results["left_out"] = {}
    rate = {name: 0.0 for name in names}  # seconds / length^2 of the last pass: a bound for the next, longer one
    decoded = [n for n in DECODE_CASES if any(part in n for part in options.cases)]
    jobs = {"layer": len(options.lengths) * len(PASSES), "memory": len(options.lengths) * len(names)}
    jobs["decode"] = len(decoded)
    with tqdm(total=sum(jobs[part] for part in options.only)) as bar:
        for length in sorted(options.lengths):
            able = [n for n in names if rate[n] * length**2 < options.max_seconds]
            skipped.update({f"{n}, {length}": "too slow" for n in names if n not in able})
            for kind in PASSES if "layer" in options.only else ():
                bar.set_description(f"{kind} {length}")
                times = in_process(
                    options.threads, time_layers, able, length, kind == PASSES[1], options.repeats, options.max_seconds
                )
                for name, row in times.items():
                    results["layer"].append({"case": name, "length": length, "pass": kind} | row)
                    rate[name] = row["ms"] / 1e3 / length**2
                bar.update()
            for name in names if "memory" in options.only else ():
                bar.set_description(f"memory {length}")
                if name in able:
                    row = {"case": name, "length": length}
                    results["memory"].append(row | {"mib": in_process(options.threads, peak_memory, name, length)})
                bar.update()
        for name in decoded if "decode" in options.only else ():
            bar.set_description("decode")
            row = in_process(options.threads, time_decoding, name, options.tokens)
            results["decode"].append({"case": name} | row)
            bar.update()
    skipped.update({n: f"{p} is not installed" for n in CASES if (p := missing_package(n))})
    results["ratios"] = ratios(results)
    return results


def ratios(results: dict) -> dict[str, float]:
    """The numbers that the project promises, as far as they were measured."""
    time_of = {(r["case"], r["length"]): r["ms"] for r in results["layer"] if r["pass"] == PASSES[1]}
    mib_of = {(r["case"], r["length"]): r["mib"] for r in results["memory"]}
    pairs = [
        *(
            (f"memory-caching: {ours.removesuffix(', bare')}", ours, f" (at least {least})", " (at least 2)")
            for ours, least in (("linear grm", 30), ("linear grm, bare", 30), ("dla grm", 15), ("titans ssc", 15))
        ),
        ("titans-pytorch: NeuralMemory", "titans ssc", "", ""),
    ]
    found = {}
    for theirs, ours, least_time, least_memory in pairs:
        for what, table, target in (("time", time_of, least_time), ("memory", mib_of, least_memory)):
            if {(ours, 2048), (theirs, 2048)} <= set(table):
                ratio = table[theirs, 2048] / table[ours, 2048]
                found[f"{what}: {theirs} / {ours} at 2048{target}"] = ratio
    for length in sorted({length for _, length in time_of if length >= 4096}):
        if {("linear ssc", length), ("attention", length)} <= set(time_of):
            ratio = time_of["linear ssc", length] / time_of["attention", length]
            found[f"time: linear ssc / attention at {length} (at most 1)"] = ratio
    for row in results["decode"]:
        short, long = (row[f"ms after {context}"] for context in CONTEXTS)
        promise = " (at most 1.2)" if row["case"] == "linear ssc" else ""
        found[f"decoding: {row['case']}, ms per token after {CONTEXTS[1]} / {CONTEXTS[0]}{promise}"] = long / short
    return found


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = []
    for title, rows, value in (
        *((f"ms, {kind}", [r for r in results["layer"] if r["pass"] == kind], "ms") for kind in PASSES),
        ("peak MiB, forward+backward", results["memory"], "mib"),
    ):
        if not rows:
            continue
        lengths = sorted({r["length"] for r in rows})
        lines += ["", f"| {title} | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---:|" * len(lengths)]
        cells = {(r["case"], r["length"]): f"{r[value]:.0f}" for r in rows}
        for case in dict.fromkeys(r["case"] for r in rows):
            lines.append(f"| {case} | " + " | ".join(cells.get((case, n), "") for n in lengths) + " |")
    if results["decode"]:
        lines += ["", "| decoding | " + " | ".join(f"ms/token after {c}" for c in CONTEXTS) + " | "]
        lines[-1] += " | ".join(f"KiB of cache after {c}" for c in CONTEXTS) + " |"
        lines.append("|---|" + "---:|" * 2 * len(CONTEXTS))
        for row in results["decode"]:
            cells = [f"{row[f'ms after {c}']:.2f}" for c in CONTEXTS]
            cells += [f"{row[f'bytes after {c}'] / 1024:.0f}" for c in CONTEXTS]
            lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    if results["ratios"]:
        lines += ["", "| ratio | |", "|---|---:|"]
        lines += [f"| {name} | {ratio:.2f} |" for name, ratio in results["ratios"].items()]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of names: " + "; ".join(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens per context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-seconds", type=float, default=30, help="about the longest that one pass may take")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "cpu.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    results = measure(options)
    print(table(results))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written_by = "<!-- written by benchmarks/measure/cpu.py -->\n"
    about = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    left_out = "".join(f"* {name}: {why}\n" for name, why in results["left_out"].items())
    page = f"{written_by}\n{about}\n{table(results)}\n" + (f"\nLeft out:\n\n{left_out}" if left_out else "")
    for path, text in (
        (options.output, json.dumps(results, indent=1) + "\n"),
        (options.output.with_suffix(".md"), page),
    ):
        partial = path.with_suffix(".part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


if __name__ == "__main__":
    main()
