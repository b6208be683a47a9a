"""`mc-transformers serve` and `chat`: what OpenAI's clients get is what `generate` gives (`make test-serve`)."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from helpers import VOCAB, build, small_config
from mc_transformers import byte_tokenizer
from mc_transformers.cli.main import main


MISSING = [name for name in ("fastapi", "uvicorn", "openai", "rich") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing: pip install -e '.[serve]'")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SYSTEM = "You answer questions about a text that is longer than a segment. "
SERVE_BY_HAND = "import mc_transformers; from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says letters only: a stream of single bytes is no text of its own."""
    assert VOCAB < 258
    model, place = build(small_config("gated_delta", vocab_size=258)), tmp_path_factory.mktemp("served") / "model"
    letters = set(range(2 + ord("a"), 2 + ord("z") + 1))
    model.generation_config.suppress_tokens = [i for i in range(258) if i not in letters]
    model.save_pretrained(place)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder):
    from mc_transformers.serving.chat import wait
    from mc_transformers.serving.server import Limits, Prefixes, serve

    port = free_port()
    limits, prefixes = Limits(prompt_tokens=400, new_tokens=2000, body_bytes=5000), Prefixes(10**8)
    running = serve(str(folder), limits=limits, prefixes=prefixes, background=True, host="localhost", port=port)
    wait(running)
    yield port
    running.kill_server()


def request(port: int, path: str, body: dict | None = None, **options) -> tuple[int, str]:
    connection = http.client.HTTPConnection("localhost", port, timeout=120)
    data = None if body is None else options.pop("data", json.dumps(body).encode())
    headers = {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, data, headers, **options)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def streamed(text: str) -> str:
    """The answer in the events of a stream, of either endpoint."""
    found = []
    for line in text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                found.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
    return "".join(found)


def expected(folder, prompt: str, new: int) -> str:
    from mc_transformers import MCForCausalLM

    model, tokenizer = MCForCausalLM.from_pretrained(folder).eval(), byte_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


def test_eight_streams_at_once_are_those_of_generate(folder, server) -> None:
    """All begin alike, so the store is asked, too; chats and completions."""
    questions = [f"Question {number}?" for number in range(8)]
    plain = [
        {"prompt": SYSTEM + question, "max_tokens": 20, "temperature": 0, "stream": True} for question in questions
    ]
    chats = [
        {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]}
        | {"max_tokens": 20, "temperature": 0, "stream": True}
        for question in questions
    ]
    for path, bodies, prompts in (
        ("/v1/completions", plain, [SYSTEM + question for question in questions]),
        ("/v1/chat/completions", chats, [f"system: {SYSTEM}\nuser: {question}\nassistant:" for question in questions]),
    ):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body, path=path: request(server, path, body), bodies))
        assert {status for status, _ in answers} == {200}
        assert [streamed(text) for _, text in answers] == [expected(folder, prompt, 20) for prompt in prompts]
    found = json.loads(request(server, "/prefixes")[1])
    assert found["hits"] >= 14 and found["tokens_saved"] >= 14 * 56 and found["bytes"] > 0


def test_whole_answers_and_a_conversation(folder, server) -> None:
    message = [{"role": "user", "content": "Who?"}]
    status, text = request(server, "/v1/chat/completions", {"messages": message, "max_tokens": 9, "temperature": 0})
    content = json.loads(text)["choices"][0]["message"]["content"]
    assert status == 200 and content == expected(folder, "user: Who?\nassistant:", 9)
    before = json.loads(request(server, "/prefixes")[1])["tokens_saved"]
    message += [{"role": "assistant", "content": content}, {"role": "user", "content": "And then?"}]
    status, text = request(server, "/v1/chat/completions", {"messages": message, "max_tokens": 9, "temperature": 0})
    prompt = f"user: Who?\nassistant: {content}\nuser: And then?\nassistant:"
    assert json.loads(text)["choices"][0]["message"]["content"] == expected(folder, prompt, 9)
    assert json.loads(request(server, "/prefixes")[1])["tokens_saved"] > before
    assert json.loads(request(server, "/v1/models")[1])["data"]


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/v1/completions", {"prompt": "x" * 401}, 400, "the prompt has 401 tokens, allowed: 1 to 400"),
        ("/v1/completions", {"prompt": "x" * 401, "stream": True}, 400, "the prompt has 401 tokens"),
        (
            "/v1/completions",
            {"prompt": "x", "max_tokens": 2001},
            400,
            "max_tokens has 2001 tokens, allowed: 1 to 2000",
        ),
        ("/v1/completions", {"prompt": ""}, 400, "the prompt has 0 tokens"),
        ("/v1/completions", {"prompt": "x" * 6000}, 413, "more than 5000 bytes"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 400, "other"),
        ("/load_model", {"model": "me/other"}, 400, "does not load"),
    ],
)
def test_requests_that_are_refused(server, path: str, body: dict, status: int, message: str) -> None:
    found, text = request(server, path, body)
    assert found == status and message in text
    assert request(server, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


def test_a_body_without_a_length_is_bounded(server) -> None:
    pieces = iter([b'{"prompt": "'] + [b"x" * 1000] * 9)
    status, text = request(server, "/v1/completions", {}, data=pieces, encode_chunked=True)
    assert status == 413 and "5000 bytes" in text


def test_a_client_that_leaves_in_the_middle(server) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "temperature": 0, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("localhost", server), timeout=60) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert b"200 OK" in connection.recv(200)
    start = time.monotonic()
    assert request(server, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
    assert time.monotonic() - start < 15  # of an answer that takes longer


def test_options(folder) -> None:
    from mc_transformers.serving.server import options_of_serve, parse, serve

    assert {"host", "port", "compile", "default_seed"} <= set(options_of_serve())
    assert parse("compile", "true") is True and parse("default_seed", "3") == 3 and parse("device", "cpu") == "cpu"
    with pytest.raises(ValueError, match="`compile`='perhaps' is not valid"):
        parse("compile", "perhaps")
    with pytest.raises(ValueError, match="no option 'colour'"):
        serve(str(folder), colour="red")
    with pytest.raises(ValueError, match="`continuous_batching`=True is not possible"):
        serve(str(folder), continuous_batching=True)
    with pytest.raises(OSError, match="neither a folder"):
        serve(str(folder.parent / "nothing"))


def until_it_answers(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            if request(port, "/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(process.communicate(timeout=10))


@pytest.mark.parametrize("by_hand", [False, True])
def test_from_the_command_line(folder, by_hand: bool) -> None:
    """Ours, and `transformers serve` itself once the package was imported. Both listen on this machine only."""
    port, command = free_port(), [sys.executable]
    command += ["-c", SERVE_BY_HAND] if by_hand else ["-m", "mc_transformers"]
    command += ["serve", str(folder), "--port", str(port), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **pipes)
    try:
        until_it_answers(port, process)
        body = {"prompt": "Who?", "max_tokens": 9, "temperature": 0}
        status, text = request(port, "/v1/completions", body)
        assert status == 200 and json.loads(text)["choices"][0]["text"] == expected(folder, "Who?", 9)
        if not by_hand:
            assert json.loads(request(port, "/prefixes")[1])["misses"] == 1
        outside = socket.socket()
        outside.settimeout(2)
        address = next((i[4][0] for i in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1")
        if not address.startswith("127."):
            with pytest.raises(OSError):
                outside.connect((address, port))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_chat(folder) -> None:
    command = [sys.executable, "-m", "mc_transformers", "chat", str(folder), "max_new_tokens=6", "do_sample=false"]
    run = subprocess.run(
        command,
        input="Hello\n!exit\n",
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"NO_COLOR": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert expected(folder, "user: Hello\nassistant:", 6) in run.stdout.replace("\n", "")


def test_a_missing_extra_is_named(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("mc_transformers.cli.serving.find_spec", lambda name: None)
    for command, extra in (("serve", "serve"), ("chat", "serve"), ("ui", "ui")):
        assert main([command, str(folder)]) == 1
        assert f"pip install 'mc-transformers[{extra}]'" in capsys.readouterr().err
