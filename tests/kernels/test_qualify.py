"""`mc_backend="auto"`: Triton where it is right and faster. The CPU, with Triton's interpreter, is the GPU here."""

import fcntl
import json
import logging
import multiprocessing
import os
import sys
import time

import pytest
import torch

import mc_transformers as mc
from helpers import assert_close, build, small_config, tokens, with_triton
from mc_transformers.cli.main import main
from mc_transformers.kernels.read import segment_triton
from mc_transformers.kernels.shared.ops import NAMESPACE, choose_backend
from mc_transformers.modeling_mc import qualify, trial


pytestmark = with_triton
CPU = torch.device("cpu")
SMALL_LAYER = {"segment_size": 4, "num_attention_heads": 1, "head_dim": 16, "value_head_dim": 16, "hidden_size": 16}
RIGHT = {"right": True, "error": 1e-4, "where": "x", "speedup": {"16 tokens": 4.0, "8192 tokens": 1.0}, "kept": True}


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """The CPU as a device where kernels are tried, and a folder for verdicts."""
    torch.use_deterministic_algorithms(False)  # which this folder's conftest.py asks for
    monkeypatch.setattr(qualify, "DEVICES", {"cpu"})
    monkeypatch.setattr(qualify, "_known", {})
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qualified"


class Looks:
    """In the place of `qualify._look`: counts, and sees what it is told to."""

    def __init__(self, monkeypatch, **seen):
        self.keys, self.seen = [], RIGHT | seen
        monkeypatch.setattr(qualify, "_look", self)

    def __call__(self, key, device, deterministic, seconds):
        self.keys.append(key)
        return self.seen | ({"speedup": {}} if deterministic else {})


def kind(**fields) -> str:
    config = small_config(hidden_size=16, num_attention_heads=1, head_dim=16, **fields)
    return qualify.kind_of(config, 1)


def chosen(model) -> str:
    return model.model.layers[0].mixer.memory.chosen


def test_a_look_finds_kernels_right_or_wrong(monkeypatch):
    fields = json.loads(kind(segment_size=4, value_head_dim=16))
    seen = trial.look(fields, torch.float32, CPU, False, False)
    assert seen["right"] and seen["error"] < 1e-5 and seen["speedup"] == {}
    forward = segment_triton.forward

    def planted(*args):
        out, *others = forward(*args)
        return (out * 1.01, *others)

    monkeypatch.setattr(segment_triton, "forward", planted)
    monkeypatch.setattr(trial, "speed", None)  # nothing that is wrong is timed
    seen = trial.look(fields, torch.float32, CPU, False, True)
    assert not seen["right"] and seen["error"] > 1e-3 and "inference: output 0" in seen["where"]
    assert trial.difference(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    values = iter(range(100))  # a race: every run gives something else, within the tolerance
    monkeypatch.setattr(
        segment_triton, "forward", lambda *args: (forward(*args)[0] + 1e-6 * next(values), *forward(*args)[1:])
    )
    seen = trial.look(fields, torch.float32, CPU, False, False)
    assert not seen["right"] and "differs from run to run" in seen["where"]


def test_speed_is_a_ratio_of_times(monkeypatch):
    mixer = trial.layer_of(json.loads(kind(segment_size=4)), torch.float32, CPU)
    monkeypatch.setattr(trial, "seconds", lambda run, device: 6.0 if mixer.config.mc_backend == "torch" else 2.0)
    assert trial.speed(mixer, True) == {"8 tokens": 3.0, "8192 tokens": 3.0}
    assert list(trial.speed(mixer, False)) == ["8 tokens", "8192 tokens", "8 single tokens"]


def test_a_process_of_its_own_from_end_to_end(monkeypatch, gpu, caplog):
    """Everything, in the interpreter: a model asks, a process looks, a file is kept and believed."""
    monkeypatch.setattr(qualify, "ENOUGH", 0.0)  # the interpreter is slow
    model = build(small_config(**SMALL_LAYER))
    monkeypatch.setattr(qualify.torch, "are_deterministic_algorithms_enabled", lambda: True)  # no timing
    expected = build(small_config(**SMALL_LAYER, mc_backend="torch"))
    ids = tokens(1, 9)
    with torch.no_grad(), caplog.at_level(logging.WARNING, NAMESPACE):
        assert_close(model(ids).logits, expected(ids).logits, 1e-5)
    assert chosen(model) == "qualified"
    (file,) = gpu.glob("*.json")
    found = json.loads(file.read_text())
    assert found["verdict"]["fused"] and found["verdict"]["error"] < 1e-5 and found["key"]["pass"] == "inference"
    (line,) = [record.getMessage() for record in caplog.records if record.name == NAMESPACE]
    assert "linear grm, inference, float32 on cpu: Triton, differs by" in line and str(file) in line
    assert not list(gpu.glob("*.partial"))


@pytest.mark.parametrize(
    "seen, fused, why",
    [
        ({}, True, "Triton 2.00 times as fast"),
        ({"speedup": {"a": 1.04, "b": 1.0}}, False, "torch: Triton is right, but 1.02 times as fast"),
        ({"right": False, "error": float("inf"), "speedup": {}}, False, "torch: Triton is wrong in `x`"),
        ({"problem": "RuntimeError: out of resource"}, False, "torch: RuntimeError: out of resource"),
    ],
)
def test_verdicts(monkeypatch, gpu, seen, fused, why):
    looks = Looks(monkeypatch, **seen)
    found = qualify.qualify(kind(), torch.bfloat16, CPU, "training")
    assert found["fused"] == fused and why in found["why"]
    assert qualify.qualify(kind(), torch.bfloat16, CPU, "training")["why"] == found["why"] and len(looks.keys) == 1
    qualify.qualify(kind(), torch.bfloat16, CPU, "training", again=True)
    assert len(looks.keys) == 2


def test_what_a_verdict_depends_on(monkeypatch, gpu):
    looks = Looks(monkeypatch)

    def ask(fields=None, dtype=torch.bfloat16, name="training"):
        return qualify.qualify(kind(**fields or {}), dtype, CPU, name)

    ask()
    for other in ({"fields": {"aggregation": "ssc"}}, {"dtype": torch.float32}, {"name": "inference"}):
        ask(**other)
    assert len(looks.keys) == 4 == len(list(gpu.glob("*.json")))
    ask()
    ask(fields={"conv_kernel_size": 0, "rms_norm_eps": 1e-3})  # no kernel knows of these
    assert len(looks.keys) == 4
    for name, value in (
        ("_source", lambda: "edited"),
        ("_key", lambda *a, key=qualify._key: key(*a) | {"chip": ["B200"]}),
    ):
        with monkeypatch.context() as other:
            other.setattr(qualify, name, value)
            ask()
    assert len(looks.keys) == 6
    for file in gpu.glob("*.json"):
        file.write_text(file.read_text()[:-20])  # damaged
    ask()
    assert len(looks.keys) == 7
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    ask()  # a timing is there, and nobody asks for it
    assert len(looks.keys) == 7
    assert "not timed, deterministic" in ask(fields={"memory": "swla"})["why"]


def test_crash_hang_and_a_process_that_does_not_start(gpu):
    def problem(code: str, seconds: float = 20.0) -> dict:
        return qualify._look({}, "cpu", False, seconds, lambda: [sys.executable, "-S", "-c", code])

    crash = problem("import os, sys; print('illegal memory access', file=sys.stderr, flush=True); os.abort()")
    assert "ended with -6 (illegal memory access)" in crash["problem"] and crash["kept"]
    start = time.monotonic()
    assert "did not end within" in problem("import time; time.sleep(60)", 0.3)["problem"]
    assert time.monotonic() - start < 10
    missing = qualify._look({}, "cpu", False, 1.0, lambda: ["/nowhere/python"])
    assert "no process could be started" in missing["problem"] and not missing["kept"]
    noise = problem("print('warning'); print('{\"right\": true}')")
    assert noise == {"right": True}


def _ask(barrier, queue):
    def look(key, device, deterministic, seconds):
        time.sleep(0.3)
        queue.put("look")
        return RIGHT

    qualify._look = look
    barrier.wait()
    queue.put(qualify.qualify(kind(), torch.bfloat16, CPU, "training")["fused"])


def test_two_processes_at_once(gpu):
    """One looks, the other waits and reads."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_ask, args=(barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=30) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert sorted(map(str, found)) == ["True", "True", "look"]


def test_a_process_that_still_looks(monkeypatch, gpu):
    """Nobody waits for ever: torch, and nothing is written."""
    looks = Looks(monkeypatch)

    def ask():
        return qualify.qualify(kind(), torch.bfloat16, CPU, "training", seconds=-29.8)

    assert ask()["fused"]
    (file,) = gpu.glob("*.json")
    file.unlink()
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is still looking" in ask()["why"]
    assert not file.exists() and len(looks.keys) == 1


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    looks = Looks(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "file"))  # also for root, who may write everywhere
    model = build(small_config())
    with torch.no_grad():
        model(tokens(1, 9))
        model(tokens(1, 9))
    assert chosen(model) == "qualified" and len(looks.keys) == 1
    assert "not kept, the next process looks again" in caplog.text


def test_who_asks_and_who_does_not(monkeypatch, gpu, capsys):
    looks, ids = Looks(monkeypatch), tokens(1, 9)
    model = build(small_config(segment_size=4)).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(ids, use_cache=False).logits.isfinite().all() and not looks.keys  # looks up, and nothing is known
    monkeypatch.setenv("MC_QUALIFY", "0")
    model(ids, labels=ids).loss.backward()
    assert chosen(model) == "auto" and not looks.keys
    monkeypatch.delenv("MC_QUALIFY")
    for other in (small_config("gru"), small_config(mc_backend="torch")):
        build(other)(ids)
    build(small_config(), dtype=torch.float64)(ids)
    assert not looks.keys
    model(ids, labels=ids).loss.backward()  # training
    assert chosen(model) == "qualified" and [key["pass"] for key in looks.keys] == ["training"]
    torch._dynamo.reset()
    asked = []
    monkeypatch.setattr(
        "mc_transformers.kernels.write.linear.choose_backend", lambda *a: asked.append(a[0]) or "torch"
    )
    compiled(ids, use_cache=False)
    assert "qualified" in asked and len(looks.keys) == 1
    asked.clear()
    mc.warmup(build(small_config(segment_size=4)), training=False)
    assert [key["pass"] for key in looks.keys] == ["training", "inference"] and set(asked) == {"qualified"}


def test_qualified_ops_take_torch_where_triton_cannot():
    x = torch.zeros(1)
    assert choose_backend("qualified", "op", x, 64) == "triton"
    assert choose_backend("qualified", "op", x, 257) == choose_backend("qualified", "op", x.double(), 64) == "torch"
    assert choose_backend("qualified", "op", x, 64, missing="4 bits") == "torch"


def test_the_command(monkeypatch, gpu, capsys):
    looks = Looks(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert main(["qualify", "mc-170m", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2.00 times as fast") == 2 and "8192 tokens: 1.00 x" in printed and str(gpu) in printed
    assert {key["pass"] for key in looks.keys} == {"training", "inference"} and os.listdir(gpu)
    monkeypatch.setattr(qualify, "DEVICES", {"cuda"})
    assert main(["qualify", "mc-170m", "--device", "cpu"]) == 1
    assert "--device cpu always takes torch" in capsys.readouterr().err
