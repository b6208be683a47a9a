# Copyright 2026 the mc-transformers authors.
"""Serving with vLLM: requests and tokens per second, and bytes that a request holds, beside a Llama of the same size.

    python -m benchmarks.measure.vllm_serving bytes                # computed: needs no vLLM
    .venv-vllm/bin/python -m benchmarks.measure.vllm_serving speed

`speed` starts one server per model, each with the same number of threads, and asks them in turns, `generate` with
padded batches among them, so that a busy machine slows all of them alike: compare ratios. Weights are random: what a
token costs does not depend on them. Every round is written at once, and a later call goes on behind it. Writes
benchmarks/results/vllm-bytes.json and vllm-speed.json.
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


def measure_speed(options: argparse.Namespace, path: Path) -> None:
    """Go on with the rounds that `path` lacks, until `options.minutes` are over, and write each at once."""
    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    about = {"segment": SEGMENT, "prompt": PROMPT, "new": NEW, "size": SIZE, "threads": options.threads}
    rounds = json.loads(path.read_text())["rounds"] if path.exists() else []
    done = {(r["number"], r["clients"]) for r in rounds}
    wanted = [(n, c) for n in range(options.repeats) for c in options.clients if (n, c) not in done]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:
        folders = models(Path(folder))
        model = MCForCausalLM.from_pretrained(folders["grm"]).eval()
        servers = {name: Server(path, options.threads) for name, path in folders.items()}
        try:
            for server in servers.values():
                server.wait()
            runs = {f"vLLM, {name}": server.serve for name, server in servers.items()}
            runs["generate, grm"] = lambda prompts, clients: generate(model, prompts, clients)
            for run in runs.values():
                run(prompts_of(-1, 8), 8)  # warms up
            for number, clients in tqdm(wanted, desc="rounds"):
                if time.monotonic() > end:
                    break
                prompts, seconds = prompts_of(number, clients), {}
                for name, run in runs.items():
                    start = time.perf_counter()
                    made = run(prompts, clients)
                    seconds[name] = round((time.perf_counter() - start) / len(prompts), 4)
                    assert made == NEW * len(prompts)
                rounds.append({"number": number, "clients": clients, "seconds_per_request": seconds})
                found = {"about": about, "machine": machine(options.threads)}
                write(path, found | {"rows": summary(rounds), "rounds": rounds})
        finally:
            for server in servers.values():
                server.stop()


def prompts_of(number: int, clients: int) -> list[list[int]]:
    """Of a round: at least four."""
    draw = random.Random(1000 * number + clients)
    lengths = [draw.randint(*PROMPT) for _ in range(max(clients, 4))]
    return [[draw.randrange(SIZE["vocab_size"]) for _ in range(n)] for n in lengths]


def summary(rounds: list[dict]) -> list[dict]:
    """Medians by system and number of clients; ratios to `generate` within a round."""
    found = []
    for clients in sorted({r["clients"] for r in rounds}):
        times = [r["seconds_per_request"] for r in rounds if r["clients"] == clients]
        for name in times[0]:
            rate = 1 / statistics.median(t[name] for t in times)
            ratios = sorted(t["generate, grm"] / t[name] for t in times)
            found.append(
                {
                    "system": name,
                    "clients": clients,
                    "rounds": len(times),
                    "requests_per_second": round(rate, 3),
                    "tokens_per_second": round(NEW * rate, 1),
                    "times_generate": round(statistics.median(ratios), 2),
                    "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
                }
            )
    return found


def write(path: Path, result: dict) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bytes", "speed"))
    parser.add_argument("--preset", default="mc-170m", help="sizes of `bytes`")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="begin no round of `speed` after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/vllm-PART.json")
    options = parser.parse_args()
    path = options.output or RESULTS / f"vllm-{options.part}.json"
    if options.part == "bytes":
        about = {"part": options.part, "preset": options.preset}
        write(path, {"about": about, "machine": machine(options.threads), "rows": measure_bytes(options)})
    else:
        measure_speed(options, path)
    for row in json.loads(path.read_text())["rows"]:
        print(row)


if __name__ == "__main__":
    main()
