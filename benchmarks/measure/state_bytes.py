# Copyright 2026 the mc-transformers authors.
"""Loss against the bytes of a cache: how kept states are stored, and how many.

    python -m benchmarks.measure.state_bytes                # about two minutes on a CPU

Held-out source files are read side by side in pieces of a segment, so that every kept state is read as it is stored.
The loss is that of the bytes behind the first 1024.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.measure.cpu import machine
from benchmarks.measure.stream import CHECKPOINT
from benchmarks.tasks.text import byte_ids, library_texts
from mc_transformers import MCCache, MCForCausalLM


DTYPES = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8, "int4": "int4"}
BOUNDS = (None, 16, 4)
SKIPPED = 1024


@torch.inference_mode()
def measure(model: MCForCausalLM, ids: torch.Tensor, dtype: torch.dtype | str | None) -> dict:
    """Mean loss in nats of tokens `[B, T]` behind the first 1024, and bytes of the cache per row at their end."""
    cache, total, count, piece = MCCache(model.config, state_dtype=dtype), 0.0, 0, model.config.segment_size
    for start in range(0, ids.shape[1] - 1, piece):
        labels = ids[:, start + 1 : start + 1 + piece]
        logits = model(ids[:, start : start + piece], cache=cache).logits[:, : labels.shape[1]]
        if start >= SKIPPED:
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += labels.numel()
    kept = sum(
        t.nbytes for x in cache.memory_layers for n, t in x.tensors.items() if n.startswith(("kept.", "scale."))
    )
    return {"nats": total / count, "bytes": cache.nbytes // len(ids), "state_bytes": kept // len(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="of a model of bytes")
    parser.add_argument("--length", type=int, default=4096, help="bytes that are read of every file")
    parser.add_argument("--files", type=int, default=16, help="held-out files")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/state_bytes.json"), help="the record")
    options = parser.parse_args()
    texts = library_texts(options.length)[1][: options.files]
    ids = torch.stack([byte_ids(text)[: options.length] for text in texts])
    cells = [(bound, name) for bound in BOUNDS for name in DTYPES]
    rows = []
    for bound, name in tqdm(cells, desc="reading", unit="cell"):
        model = MCForCausalLM.from_pretrained(options.checkpoint, max_cached_segments=bound).eval()
        rows.append({"segments": bound, "dtype": name, **measure(model, ids, DTYPES[name])})
        print(rows[-1], flush=True)
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | str)}
    record = {"rows": rows, "settings": settings, "machine": machine(torch.get_num_threads())}
    partial = options.output.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, options.output)


if __name__ == "__main__":
    main()
