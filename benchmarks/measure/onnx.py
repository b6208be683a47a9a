# Copyright 2026 the mc-transformers authors.
"""An exported model in ONNX Runtime beside the same model in torch: bytes, start-up, and ms per token.

    python -m benchmarks.measure.onnx            # about six minutes on two quiet cores, most of it the exports

Models of 6 layers of width 256 with random weights, in segments of 64 tokens. All ways to decode take turns, a token
each, after the same text. Start-up is that of a process of its own, from its first line to the first token, with
libraries and weights on a warm disk. Writes benchmarks/results/onnx.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from benchmarks.measure.cpu import HEADS, SEGMENT, TOP_K, WIDTH, machine
from mc_transformers import MCCache, MCConfig, MCForCausalLM
from mc_transformers.conversion.export.run import export


ROOT = Path(__file__).resolve().parents[2]
LAYERS, VOCAB, ROOM = 6, 4096, 8192
CASES = (("gated_linear", "grm"), ("gated_linear", "ssc"))
CONTEXTS = (1000, 8000)
TORCH = """
import sys, time
start = time.perf_counter()
import torch
from mc_transformers import MCCache, MCForCausalLM
model = MCForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.inference_mode():
    model(torch.ones(1, 1, dtype=torch.long), cache=MCCache(config=model.config))
print(time.perf_counter() - start)
"""
ONNX = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, sys.argv[2])
from onnx_model import OnnxModel
model = OnnxModel(sys.argv[1])
model.read(model.empty(), [1])
print(time.perf_counter() - start)
"""


def start_up(code: str, folder: Path, repeats: int = 3) -> float:
    """Seconds, the median of some processes."""
    command = [sys.executable, "-c", code, str(folder), str(ROOT / "examples" / "onnx_chat")]
    return statistics.median(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)
    )


def make(folder: Path) -> None:
    """Models and their exports, those that are not there yet."""
    for memory, aggregation in CASES:
        place = folder / f"{memory}-{aggregation}"
        if not (place / "model").exists():
            torch.manual_seed(0)
            config = MCConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                memory=memory,
                aggregation=aggregation,
                segment_size=SEGMENT,
                num_selected_segments=TOP_K,
                max_position_embeddings=ROOM + 512,
            )
            MCForCausalLM(config).save_pretrained(place / "model")
        for weights in ("float32", "int8"):
            if not (place / weights).exists():
                start = time.perf_counter()
                export(str(place / "model"), place / weights, weights=weights)
                print(f"{place / weights}: exported in {time.perf_counter() - start:.0f} s", flush=True)


@torch.inference_mode()
def measure(place: Path, tokens: int, load) -> dict:
    """Of one model."""
    model = MCForCausalLM.from_pretrained(place / "model").eval()
    runs = {name: load(place / name) for name in ("float32", "int8")}
    cache, memories = MCCache(config=model.config), {name: run.empty() for name, run in runs.items()}
    found, text = {}, torch.randint(2, VOCAB, (1, max(CONTEXTS)), generator=torch.Generator().manual_seed(1))
    before, prefill = 0, {}
    for context in CONTEXTS:
        piece = text[:, before:context]
        start = time.perf_counter()
        for part in piece.split(1024, 1):
            logits = model(part, cache=cache, logits_to_keep=1).logits[0, -1]
        prefill["torch"] = (time.perf_counter() - start) / piece.shape[1]
        differences = {}
        for name, run in runs.items():
            start = time.perf_counter()
            answer = run.read(memories[name], piece[0].tolist())
            prefill[name] = (time.perf_counter() - start) / piece.shape[1]
            differences[name] = float(np.abs(answer - logits.numpy()).max())
        times = {name: [] for name in ("torch", *runs)}
        for token in range(2, 2 + tokens):
            start = time.perf_counter()
            model(torch.tensor([[token]]), cache=cache)
            times["torch"].append(time.perf_counter() - start)
            for name, run in runs.items():
                start = time.perf_counter()
                run.read(memories[name], [token])
                times[name].append(time.perf_counter() - start)
        before = context
        found[str(context)] = {
            name: {
                "ms_per_token": round(1000 * statistics.median(each), 2),
                "quartiles": [round(1000 * x, 2) for x in statistics.quantiles(each, n=4)[::2]],
                "prefill_ms_per_token": round(1000 * prefill[name], 3),
                "largest_difference_of_logits": differences.get(name),
            }
            for name, each in times.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "onnx", help="of models and exports")
    parser.add_argument("--tokens", type=int, default=40, help="that are timed after each context (%(default)s)")
    parser.add_argument("--only-export", action="store_true", help="make models and exports, and measure nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "onnx.json")
    args = parser.parse_args()
    make(args.folder)
    if args.only_export:
        return
    sys.path.insert(0, str(ROOT / "examples" / "onnx_chat"))
    from onnx_model import OnnxModel

    record = {"machine": machine(torch.get_num_threads()), "onnxruntime": onnxruntime.__version__, "models": {}}
    for memory, aggregation in CASES:
        place = args.folder / f"{memory}-{aggregation}"
        sizes = {
            name: sum(file.stat().st_size for file in (place / name).iterdir())
            for name in ("model", "float32", "int8")
        }
        seconds = {"torch": start_up(TORCH, place / "model")}
        seconds |= {name: start_up(ONNX, place / name) for name in ("float32", "int8")}
        found = measure(place, args.tokens, lambda folder: OnnxModel(folder, torch.get_num_threads()))
        record["models"][f"{memory}/{aggregation}"] = {"bytes": sizes, "start_up_s": seconds, "after": found}
        print(json.dumps(record["models"][f"{memory}/{aggregation}"]), flush=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
