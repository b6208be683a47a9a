# Copyright 2026 the mc-transformers authors.
"""What the language models of the study `language` cost: training, reading a long document, memory.

    python -m benchmarks.measure.language_cost

Every model takes its turn in every round of one run; peak memory is that of a process of its own. Weights are as they
start: what a step costs does not depend on them. Writes benchmarks/results/language-cost.json.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.measure.cpu import in_process, machine
from benchmarks.measure.study import language
from benchmarks.tasks.experiment import build_model, cache_bytes
from benchmarks.tasks.language import LanguageConfig


ROOT = Path(__file__).resolve().parents[2]


VOCAB = 256


def cells() -> dict[str, LanguageConfig]:
    return {cell.name: LanguageConfig(**next(cell.runs([0]))) for cell in language()}


def training_step(config: LanguageConfig) -> Callable[[], None]:
    """Forward and backward of one batch of the study."""
    model = build_model(config, VOCAB, config.eval_length).train()
    ids = torch.randint(VOCAB, (config.batch, config.train_length))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()

    return step


def reading(config: LanguageConfig) -> Callable[[], None]:
    """Forward of one document of the study's evaluation."""
    model = build_model(config, VOCAB, config.eval_length).eval()
    ids = torch.randint(VOCAB, (1, config.eval_length))

    def step() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return step


WORK = {
    "training": (training_step, lambda config: config.batch * config.train_length),
    "reading": (reading, lambda config: config.eval_length),
}


def peak_memory(work: str, name: str) -> float:
    """MiB that the work adds to what the process held with the model and its batch."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    step = WORK[work][0](cells()[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def kept_bytes(name: str) -> int:
    """Bytes of the cache after a document of the study's evaluation."""
    config = cells()[name]
    model = build_model(config, VOCAB, config.eval_length).eval()
    return cache_bytes(model, torch.randint(VOCAB, (1, config.eval_length)))


def measure(rounds: int, threads: int) -> dict:
    """Rows of all models: median tokens per second and peak MiB of both kinds of work, and bytes of the cache."""
    configs = cells()
    # memory first: a forked process starts with what this one holds
    rows = {name: {"model": name, "cache_bytes": in_process(threads, kept_bytes, name)} for name in tqdm(configs)}
    for name in tqdm(configs, desc="memory"):
        for work in WORK:
            rows[name][f"{work}_peak_mib"] = round(in_process(threads, peak_memory, work, name), 1)
    torch.set_num_threads(threads)
    for work, (make, tokens) in WORK.items():
        steps, taken = {name: make(config) for name, config in configs.items()}, {name: [] for name in configs}
        for turn in tqdm(range(rounds + 1), desc=work):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if turn:  # the first one warms up
                    taken[name].append(time.perf_counter() - start)
        for name, seconds in taken.items():
            rows[name][f"{work}_tokens_per_second"] = round(tokens(configs[name]) / statistics.median(seconds))
    return {"machine": machine(threads), "rounds": rounds, "models": list(rows.values())}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "language-cost.json")
    options = parser.parse_args(arguments)
    results = measure(options.rounds, options.threads)
    partial = options.output.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.output)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
