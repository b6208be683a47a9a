"""vLLM's own server and worker processes with models of the family: tensor parallel, streams, many clients at once."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_engine import NEW, expected, make, prompts


START = 240  # seconds that a server may take
RANKS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, texts, new = json.load(sys.stdin)
    llm = LLM(folder, tensor_parallel_size=2, distributed_executor_backend="mp", skip_tokenizer_init=True,
              enforce_eager=True, kv_cache_memory_bytes=32 << 20, max_model_len=256, dtype="float32")
    options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for _ in range(2):
        out = llm.generate([{"prompt_token_ids": text} for text in texts], options, use_tqdm=False)
    found = [list(o.outputs[0].token_ids) for o in out]
    print("FOUND" + json.dumps([found, sum(o.num_cached_tokens for o in out)]))
"""
TENSOR_PARALLEL = {
    "grm": {"num_key_heads": 2},
    "titans ssc": {"memory": "titans", "aggregation": "ssc", "tie_word_embeddings": True},
    "rwkv7": {"memory": "rwkv7", "output_norm": "gated"},
    "hybrid": {
        "layer_types": ["memory_caching", "full_attention"],
        "segment_size": 32,
        "head_dim": 32,
        "mlp_bias": True,
    },
}


@pytest.mark.parametrize("kind", TENSOR_PARALLEL)
def test_tensor_parallel(tmp_path, kind):
    """Two workers with half of the heads each, and hits in a second pass."""
    model, texts = make(tmp_path, **TENSOR_PARALLEL[kind]), prompts(1, 17, 40, 71)
    wanted = expected(model, texts)
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = subprocess.run(
        [sys.executable, str(tmp_path / "ranks.py")],
        input=json.dumps([str(tmp_path), texts, NEW]),
        capture_output=True,
        text=True,
        env=environment,
        timeout=START,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, run.stderr[-3000:]
    found, hits = json.loads(lines[0].removeprefix("FOUND"))
    assert found == wanted and hits > 0


@contextmanager
def server(folder: Path, *options: str):
    """vLLM's OpenAI server; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init", "--enforce-eager"]
    command += ["--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START
        while True:
            assert process.poll() is None and time.monotonic() < end, (folder / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def post(address: str, **body) -> urllib.request.Request:
    fields = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}
    data = json.dumps(fields | body).encode()
    return urllib.request.Request(f"{address}/v1/completions", data, {"Content-Type": "application/json"})


def ask(address: str, text: list[int], model: str) -> list[int]:
    with urllib.request.urlopen(post(address, prompt=text, model=model), timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def stream(address: str, text: list[int], model: str) -> list[list[int]]:
    """The tokens of every event."""
    with urllib.request.urlopen(post(address, prompt=text, model=model, stream=True), timeout=120) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return [choice["token_ids"] for choice in choices if choice.get("token_ids")]


async def leave_in_the_middle(address: str, text: list[int], model: str) -> None:
    """A client that asks for a long answer as a stream, and is gone after its first bytes."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = post(address, prompt=text, model=model, stream=True, max_tokens=180)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(request.data)}\r\n\r\n".encode() + request.data)
    await writer.drain()
    while b"data: " not in await reader.readline():
        pass
    writer.transport.abort()


def metrics(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{"))


BAD = [
    {"prompt": [1] * 300},
    {"prompt": []},
    {"prompt": [1, 2], "max_tokens": -1},
    {"prompt": [1, 2], "temperature": -3},
    {"prompt": [1, 2], "model": "no such model"},
    {"prompt": {"a": 1}},
]


def test_server(tmp_path):
    """Streams, 64 clients at once, clients that leave, requests that cannot be served; what comes after is right."""
    model, texts = make(tmp_path, memory="gated_linear"), prompts(*[1 + 31 * i % 90 for i in range(64)])
    wanted, name = expected(model, texts), str(tmp_path)
    with server(tmp_path, "--max-num-seqs", "16") as address:
        parts = stream(address, texts[5], name)
        assert len(parts) > 3 and sum(parts, []) == wanted[5]
        with ThreadPoolExecutor(64) as clients:
            assert list(clients.map(lambda text: ask(address, text, name), texts)) == wanted
        for text in texts[:5]:
            asyncio.run(leave_in_the_middle(address, text, name))
        for body in BAD:
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(post(address, **{"model": name} | body), timeout=60)
            assert 400 <= refused.value.code < 500 and json.load(refused.value)["error"]["message"]
        end = time.monotonic() + 30
        while metrics(address, "num_requests_running"):  # of those that left
            assert time.monotonic() < end
            time.sleep(0.2)
        with ThreadPoolExecutor(8) as clients:
            assert list(clients.map(lambda text: ask(address, text, name), texts[:8])) == wanted[:8]
        assert metrics(address, "kv_cache_usage_perc") == 0
