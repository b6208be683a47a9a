# Copyright 2026 the mc-transformers authors.
"""Time to the first token of a long prompt, with and without a beginning that was read before.

    python -m benchmarks.measure.prefix generate             # `generate(prefix_store=...)`, three minutes on a CPU
    .venv-vllm/bin/python -m benchmarks.measure.prefix vllm

Every repeat draws a beginning and two tails. In turns: the prompt without a store; with one that does not know the
beginning and keeps it; with another tail, which is a hit. In vLLM the first is left out, as its pool always keeps what
it reads. Weights are random: what a token costs does not depend on them. Both parts go into
benchmarks/results/prefix.json, each result at once.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measure.cpu import machine
from mc_transformers import MCConfig, MCForCausalLM, PrefixStore


RESULTS = Path(__file__).resolve().parents[1] / "results"
SIZE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 16384,
}
PROMPT, BEGINNING = 8192, 7373  # tokens: 90 %, of which a hit is what its whole segments are
CASES = {
    f"{rule}, segments of {size}": {"aggregation": rule, "segment_size": size}
    for size in (64, 128)
    for rule in ("grm", "ssc")
}

Run = Callable[[list[int]], tuple[int, int]]  # a prompt to its first token, and how many of its tokens were known


@contextmanager
def in_generate(model: MCForCausalLM) -> Iterator[dict[str, Run]]:
    store = PrefixStore(model, max_bytes=4 << 30)

    def ask(prompt: list[int], **options: object) -> tuple[int, int]:
        saved, ids = store.stats()["tokens_saved"], torch.tensor([prompt])
        settings = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)
        return int(out[0, -1]), store.stats()["tokens_saved"] - saved

    def stored(prompt: list[int]) -> tuple[int, int]:
        return ask(prompt, prefix_store=store)

    yield {"without": ask, "miss": stored, "hit": stored}


@contextmanager
def in_vllm(model: MCForCausalLM) -> Iterator[dict[str, Run]]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, with_code=False)
        llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            kv_cache_memory_bytes=1 << 30,
            max_model_len=PROMPT + 64,
            max_num_batched_tokens=2048,
        )
        settings = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

        def ask(prompt: list[int]) -> tuple[int, int]:
            (out,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
            return out.outputs[0].token_ids[0], out.num_cached_tokens

        try:
            yield {"miss": ask, "hit": ask}
        finally:
            llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()


SYSTEMS = {"generate": in_generate, "vllm": in_vllm}


def measure(system: str, case: str, repeats: int) -> dict:
    """Seconds to the first token, by what was known of the prompt."""
    torch.manual_seed(0)
    model = MCForCausalLM(MCConfig(**SIZE, **CASES[case], num_selected_segments=2)).eval()
    draw, seconds = random.Random(0), {}
    whole_segments = BEGINNING // model.config.segment_size * model.config.segment_size

    def tokens(count: int) -> list[int]:
        return [draw.randrange(SIZE["vocab_size"]) for _ in range(count)]

    with SYSTEMS[system](model) as runs:
        for number in tqdm(range(-1, repeats), desc=f"{system}, {case}"):
            beginning, (first, second) = tokens(BEGINNING), (tokens(PROMPT - BEGINNING) for _ in range(2))
            said = {}
            for name, run in runs.items():
                start = time.perf_counter()
                said[name], known = run(beginning + (first if name == "miss" else second))
                if number >= 0:  # the first round warms up
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
                assert known == (whole_segments if name == "hit" else 0)
            assert said["hit"] == said.get("without", said["hit"])
    base = seconds.get("without", seconds["miss"])
    saved = [1 - hit / whole for hit, whole in zip(seconds["hit"], base, strict=True)]
    return {
        "system": system,
        "case": case,
        "known": whole_segments,
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "saved": round(statistics.median(saved), 3),
        "saved_spread": [round(min(saved), 3), round(max(saved), 3)],
        "all_seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "prefix.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {"size": SIZE, "prompt": PROMPT, "beginning": BEGINNING}
    for case in options.cases:
        row = measure(options.system, case, options.repeats) | {"machine": machine(options.threads)}
        found = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
        key = (options.system, case)
        rows = [*(r for r in found["rows"] if (r["system"], r["case"]) != key), row]
        partial = options.output.with_name(f"{options.output.name}.partial")
        partial.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.output)
        print({name: value for name, value in row.items() if name not in ("all_seconds", "machine")}, flush=True)


if __name__ == "__main__":
    main()
