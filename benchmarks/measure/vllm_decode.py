# Copyright 2026 the mc-transformers authors.
"""What a decoded token costs one memory layer in vLLM's pool of blocks: states read where they lie, and copied out.

    python -m benchmarks.measure.vllm_decode            # a minute on a CPU; needs no vLLM

Requests of one length whose blocks lie at random in the pool take one token each, with the blocks of the plugin
(`mc_transformers.serving.vllm.blocks`), as its layers do in a step of the scheduler. "copied" lays the states of all
finished segments side by side first, as is done for pieces of prompts. Both take their turns at the same pool. Writes
benchmarks/results/vllm-decode.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measure.cpu import machine
from mc_transformers import MCConfig
from mc_transformers.modeling_mc.mixer import MCMixer
from mc_transformers.modeling_mc.storage import Storage
from mc_transformers.serving.vllm.blocks import Blocks, OneLayer, make_blocks


RESULTS = Path(__file__).resolve().parents[1] / "results"
WIDTH, HEADS, SEGMENT, TOP_K = 256, 4, 128, 2
RULES, ROWS, CONTEXTS = ("grm", "ssc"), (8, 32), (4096, 32768)


class Copied:
    """Of blocks: every call has the states of its finished segments side by side."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __enter__(self) -> None:
        self.blocks._storage = lambda pool, call: Storage()

    def __exit__(self, *error: object) -> None:
        del self.blocks._storage


@torch.inference_mode()
def seconds_of_steps(mixer: MCMixer, rows: int, context: int, repeats: int) -> dict[str, list[float]]:
    """Of one token for each of so many requests, by the way that states are read."""
    blocks, width = make_blocks(mixer, context + SEGMENT, torch.float32), context // SEGMENT + 1
    pool = blocks.views(torch.zeros(rows * width, blocks.nbytes, dtype=torch.int8))
    for part in pool.values():
        part.normal_()
    tables = torch.randperm(rows * width).view(rows, width)
    found: dict[str, list[float]] = {"in the pool": [], "copied": []}
    for number in range(-1, repeats):
        x, answers = torch.randn(rows, WIDTH), []
        for name, times in found.items():
            start = time.perf_counter()
            (call,) = blocks.planner(True).calls(list(range(rows + 1)), [context + 2 + number] * rows, tables)
            if name == "copied":
                with Copied(blocks):
                    layer = blocks.load(pool, call)
            else:
                layer = blocks.load(pool, call)
            answers.append(mixer(call.gather(x), call.table, OneLayer(0, layer)))
            if name == "copied":  # the second one writes
                blocks.save(pool, call, layer)
            if number >= 0:  # the first round warms up
                times.append(time.perf_counter() - start)
        torch.testing.assert_close(*answers)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "vllm-decode.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = {"width": WIDTH, "heads": HEADS, "segment": SEGMENT, "top_k": TOP_K, "repeats": options.repeats}
    result = {"about": about, "machine": machine(options.threads), "rows": []}
    cases = [(rule, rows, context) for rule in RULES for rows in options.rows for context in options.contexts]
    for rule, rows, context in tqdm(cases):
        config = MCConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            segment_size=SEGMENT,
            aggregation=rule,
            num_selected_segments=TOP_K,
        )
        times = seconds_of_steps(MCMixer(config, 0).eval(), rows, context, options.repeats)
        row = {"rule": rule, "requests": rows, "tokens": context}
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            row[name] = {"ms": round(1e3 * middle, 2), "spread_ms": [round(1e3 * f(seconds), 2) for f in (min, max)]}
        row["times_faster"] = round(statistics.median(b / a for a, b in zip(*times.values(), strict=True)), 1)
        result["rows"].append(row)
        tqdm.write(str(row))
    partial = options.output.with_name(f"{options.output.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.output)


if __name__ == "__main__":
    main()
