# Copyright 2026 the mc-transformers authors.
"""A soak: millions of tokens through a bounded cache. Memory of the process, and drift of what it says.

    python -m benchmarks.measure.stream                     # 2 million bytes of source code, some minutes on a CPU
    python -m benchmarks.measure.stream --tokens 20000000 --max_cached_segments 64

The resident memory of the process is read (Linux) after every hundredth of the text; the first tenth is warm-up. It
must stay within one percent from then on. After every tenth the next token's logits are compared with those of a fresh
pass over all that a bounded cache can know of: for L layers of S segments, the last L (S + 1) segments. At the end the
counters are moved beyond 2^31 tokens, the stream is saved, loaded, and must go on as one that was not moved.
"""

import argparse
import copy
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measure.cpu import machine
from benchmarks.tasks.text import byte_ids, library_texts
from mc_transformers import MCForCausalLM, Stream


CHECKPOINT = "model_cards/checkpoints/python-source"


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def move(stream: Stream, segments: int) -> None:
    """Pretend that the stream read `segments` segments more before its first; a multiple of its slots."""
    for layer in stream.cache.memory_layers:
        tokens = segments * stream.model.config.segment_size
        layer.tensors["position"] = layer.tensors["position"] + tokens
        layer.num_tokens += tokens


@torch.inference_mode()
def drift(stream: Stream, read: torch.Tensor) -> float:
    """Largest difference of the next logits to those of a fresh pass over what the stream can know of, relative to the
    largest logit. `read`: all tokens `[n]`."""
    config = stream.model.config
    segments = (len(read) - 1) // config.segment_size - config.num_hidden_layers * (config.max_cached_segments + 1)
    fresh = stream.model(read[None, max(0, segments) * config.segment_size :], logits_to_keep=1, use_cache=False)
    return ((stream.logits - fresh.logits[:, -1]).abs().max() / fresh.logits.abs().max()).item()


def soak(model: MCForCausalLM, ids: torch.Tensor, options: argparse.Namespace) -> dict:
    """The record of a run over tokens `[n]`."""
    stream = Stream(model, max_cached_segments=options.max_cached_segments, piece=options.piece)
    resident, drifts, begin, bar = [], [], time.time(), tqdm(total=len(ids), unit="token", unit_scale=True)
    for number, part in enumerate(ids.tensor_split(100), 1):
        stream.feed(part)
        bar.update(len(part))
        if number % 10 == 0:
            drifts.append(drift(stream, ids[: stream.num_tokens]))
        if number >= 10:
            resident.append(resident_bytes())
    bar.close()
    seconds, size, following = time.time() - begin, stream.nbytes, ids[: 4 * options.piece]
    far = copy.copy(stream)
    far._state = copy.deepcopy(stream._state)
    move(far, 2**31 * options.max_cached_segments)
    with tempfile.TemporaryDirectory() as folder:
        far.save(folder)
        far = Stream.load(folder, model, piece=options.piece)
    moved, here = far.score(following), stream.score(following)
    return {
        "tokens": len(ids),
        "resident_mib": {"first": resident[0] / 2**20, "least": min(resident) / 2**20, "most": max(resident) / 2**20},
        "resident_spread": max(resident) / min(resident) - 1,
        "drift": {"most": max(drifts), "last": drifts[-1]},
        "stream_bytes": size,
        "tokens_per_second": len(ids) / seconds,
        "position_at_the_end": far.num_tokens,
        "score_difference_beyond_2_to_31": (moved - here).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="bytes; the text begins anew where it ends")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="of a model of bytes")
    parser.add_argument("--max_cached_segments", type=int, default=16, help="segments kept per layer")
    parser.add_argument("--piece", type=int, default=1024, help="tokens read at a time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/stream.json"), help="the record")
    options = parser.parse_args()
    text = torch.cat([byte_ids(document) for document in library_texts(1)[0]])
    ids = text.repeat(-(-options.tokens // len(text)))[: options.tokens].clone()
    del text
    record = soak(MCForCausalLM.from_pretrained(options.checkpoint).eval(), ids, options)
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | str)}
    record |= {"settings": settings, "machine": machine(torch.get_num_threads())}
    partial = options.output.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, options.output)
    print(json.dumps(record, indent=2))
    if record["resident_spread"] > 0.01 or record["drift"]["most"] > 1e-4:
        raise SystemExit("memory is not flat, or the stream drifts")


if __name__ == "__main__":
    main()
