# Copyright 2026 the mc-transformers authors.
"""Serving with vLLM: requests and tokens per second, and bytes that a request holds, beside a Llama of the same size.

    python -m benchmarks.measure.vllm_serving bytes                # computed: needs no vLLM
    .venv-vllm/bin/python -m benchmarks.measure.vllm_serving speed

`speed` starts one server per model, each with the same number of threads, and asks them in turns, `generate` with
padded batches among them, so that a busy machine slows all of them alike: compare ratios. Weights are random: what a
token costs does not depend on them. Writes benchmarks/results/vllm-bytes.json and vllm-speed.json.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure.cpu import machine
from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.configuration_mc import LAYER_TYPE
from mc_transformers.modeling_mc.mixer import MCMixer
from mc_transformers.serving.vllm.blocks import make_blocks


RESULTS = Path(__file__).resolve().parents[1] / "results"
CONTEXTS = (4096, 32768, 131072)
GIB = 2**30
PER_BLOCK = 8  # segments, where each block also holds a running state
ROWS = {  # the preset, with these fields, states of finished segments, and segments that a block is long
    "grm, ssc": ({}, None, 1),
    "grm, ssc, int8 states": ({}, torch.int8, PER_BLOCK),
    "grm, ssc, 16 segments at most": ({"max_cached_segments": 16}, None, 1),
    "grm, logarithmic": ({"segmentation": "logarithmic"}, None, PER_BLOCK),
}
SIZE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
SEGMENT, PROMPT, NEW, LONGEST = 128, (300, 500), 32, 768


# --------------------------------------------------------------------------------------------------------------- bytes
def memory_bytes(config: MCConfig, kept_dtype: torch.dtype | None, per_block: int, num_tokens: int) -> int:
    """Of all layers, for a request of so many tokens."""
    blocks = make_blocks(MCMixer(config, 0), num_tokens, torch.bfloat16, kept_dtype, per_block)
    return config.layer_types.count(LAYER_TYPE) * blocks.request_bytes(num_tokens)


def attention_bytes(config: MCConfig, kv_heads: int, num_tokens: int, block: int = 16) -> int:
    """Keys and values in bf16, in blocks of so many tokens."""
    rounded = -(-num_tokens // block) * block
    return 2 * 2 * config.num_hidden_layers * kv_heads * config.head_dim * rounded


def measure_bytes(options: argparse.Namespace) -> list[dict]:
    config = MCConfig.from_preset(options.preset)
    found = []
    for context in CONTEXTS:
        rows = {
            name: memory_bytes(MCConfig.from_preset(options.preset, **fields), dtype, per_block, context)
            for name, (fields, dtype, per_block) in ROWS.items()
        }
        rows["Llama, bf16"] = attention_bytes(config, config.num_attention_heads, context)
        rows["Llama, bf16, a quarter of the key heads"] = attention_bytes(
            config, config.num_attention_heads // 4, context
        )
        found += [
            {"tokens": context, "model": n, "bytes": b, "requests_per_gib": round(GIB / b, 1)} for n, b in rows.items()
        ]
    return found


# --------------------------------------------------------------------------------------------------------------- speed
def models(folder: Path) -> dict[str, Path]:
    """Models of the same size, saved."""
    torch.manual_seed(0)
    made = {
        "grm": MCForCausalLM(MCConfig(**SIZE, segment_size=SEGMENT)),
        "ssc": MCForCausalLM(MCConfig(**SIZE, segment_size=SEGMENT, aggregation="ssc", num_selected_segments=2)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZE)),
    }
    for name, model in made.items():
        options = {} if name == "llama" else {"with_code": False}
        model.save_pretrained(folder / name, **options)
    return {name: folder / name for name in made}


class Server:
    """vLLM's server for one model, in a process of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.address = folder, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init", "--enforce-eager"]
        command += ["--dtype", "float32", "--max-model-len", str(LONGEST), "--kv-cache-memory-bytes", str(GIB)]
        command += ["--max-num-seqs", "32", "--no-enable-prefix-caching"]  # `generate` has none either
        settings = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
        with (folder / "server.log").open("w") as log:
            environment = os.environ | settings | {"VLLM_NO_USAGE_STATS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait(self, seconds: float = 600) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no server: {(self.folder / 'server.log').read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)

    def ask(self, prompt: list[int]) -> int:
        """Tokens of the answer."""
        body = {"model": str(self.folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        data = json.dumps(body | {"return_token_ids": True}).encode()
        request = urllib.request.Request(f"{self.address}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return len(json.load(answer)["choices"][0]["token_ids"])

    def serve(self, prompts: list[list[int]], clients: int) -> int:
        with ThreadPoolExecutor(clients) as pool:
            return sum(pool.map(self.ask, prompts))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def generate(model: MCForCausalLM, prompts: list[list[int]], clients: int) -> int:
    """Batches of as many rows, padded on the left."""
    made = 0
    for start in range(0, len(prompts), clients):
        part = prompts[start : start + clients]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        made += out[:, width:].numel()
    return made


def measure_speed(options: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(options.threads)
    draw = random.Random(0)
    times: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = models(Path(folder))
        model = MCForCausalLM.from_pretrained(folders["grm"]).eval()
        servers = {name: Server(path, options.threads) for name, path in folders.items()}
        try:
            for server in servers.values():
                server.wait()
            runs = {f"vLLM, {name}": server.serve for name, server in servers.items()}
            runs["generate, grm"] = lambda prompts, clients: generate(model, prompts, clients)
            rounds = [(n, clients) for n in range(-1, options.repeats) for clients in options.clients]
            for number, clients in tqdm(rounds, desc="rounds"):
                lengths = [draw.randint(*PROMPT) for _ in range(max(clients, 4))]
                prompts = [[draw.randrange(SIZE["vocab_size"]) for _ in range(n)] for n in lengths]
                for name, run in runs.items():
                    start = time.perf_counter()
                    made = run(prompts, clients)
                    seconds = time.perf_counter() - start
                    assert made == NEW * len(prompts)
                    if number >= 0:  # the first round warms up
                        times.setdefault((name, clients), []).append(seconds / len(prompts))
        finally:
            for server in servers.values():
                server.stop()
    found = []
    for (name, clients), seconds in times.items():
        base = times["generate, grm", clients]
        found.append(
            {
                "system": name,
                "clients": clients,
                "requests_per_second": round(1 / statistics.median(seconds), 3),
                "tokens_per_second": round(NEW / statistics.median(seconds), 1),
                "times_generate": round(statistics.median(b / s for b, s in zip(base, seconds, strict=True)), 2),
                "seconds_per_request": [round(s, 4) for s in seconds],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bytes", "speed"))
    parser.add_argument("--preset", default="mc-170m", help="sizes of `bytes`")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/vllm-PART.json")
    options = parser.parse_args()
    rows = (measure_bytes if options.part == "bytes" else measure_speed)(options)
    about = {"part": options.part, "segment": SEGMENT, "prompt": PROMPT, "new": NEW, "size": SIZE}
    if options.part == "bytes":
        about = {"part": options.part, "preset": options.preset}
    path = options.output or RESULTS / f"vllm-{options.part}.json"
    partial = path.with_name(f"{path.name}.partial")
    text = json.dumps({"about": about, "machine": machine(options.threads), "rows": rows}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    for row in rows:
        print({name: value for name, value in row.items() if name != "seconds_per_request"})


if __name__ == "__main__":
    main()
