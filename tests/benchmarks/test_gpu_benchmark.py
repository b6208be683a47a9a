"""benchmarks/measure/gpu.py without a GPU: tiny shapes in Triton's interpreter, every part, and cases that hang."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest


pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def command_of_the_readme() -> str:
    """The one command that needs no git, no network and no installation."""
    lines = (ROOT / "benchmarks" / "README.md").read_text().splitlines()
    (line,) = [line.strip() for line in lines if "--minutes 9" in line and line.startswith("    ")]
    return line


@pytest.fixture
def gpu(monkeypatch):
    """The program as it is with --smoke, which it reads when it is imported, as tests of the documentation do too."""
    names = ("benchmarks.measure.gpu", "benchmarks.measure.gpu_cases")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke"])
    yield importlib.import_module(names[0])
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def test_every_part_runs_by_the_command_of_the_readme(tmp_path, monkeypatch, gpu):
    """From a copy without git; a second run of a part, which has no time, keeps the rest."""
    copy, output = tmp_path / "copy", tmp_path / "gpu.json"
    copy.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "site", "outputs"):
            (copy / path.name).symlink_to(path)
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "COMMIT": "abc123", "OUT": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    command = f"{command_of_the_readme()} --smoke --minutes 100"
    done = subprocess.run(command, shell=True, cwd=copy, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0 and " 0 incorrect, 0 failed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(output.read_text())
    rows = found["rows"]
    assert {"device", "torch", "triton", "transformers", "date"} <= set(found["machine"])
    assert found["machine"]["commit"] == "abc123"
    left_out = [(row["case"], row["left_out"]) for row in rows if "left_out" in row]
    forward_only = ("segment_route", "decode_step", "state_step", "state_step delta", "slot_write")
    assert left_out == [(op, "it has no gradient") for op in forward_only]
    measured = [row for row in rows if "left_out" not in row]
    counts = Counter(row["part"] for row in measured)
    assert set(counts) == {"compile", "peaks", "correctness", "ops", "profile", "layer", "decode", "deep"}
    for row in measured:
        if row["part"] == "correctness":
            assert row["ok"] is True
        elif row["part"] == "profile":
            assert len(row["kernels"]) == 20 and row["kernels"][0][1] >= row["kernels"][-1][1]
        elif row["part"] != "compile":
            assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
    of = {part: [row for row in measured if row["part"] == part] for part in counts}
    assert {row["case"] for row in of["decode"]} == {"attention", "linear ssc", "linear grm", "linear none"}
    assert all(row["cache_bytes"] > 0 for row in of["decode"])
    assert {row.get("how") for row in of["layer"]} == {None, "compiled", "packed"}
    assert {"attention flash", "attention cudnn", "swla grm"} <= {row["case"] for row in of["layer"]}
    assert {"attention flash", "attention cudnn", "linear_write independent", "segment_read packed"} <= {
        row["case"] for row in of["ops"]
    }
    assert {"triton", "torch"} == {row["backend"] for row in of["deep"] if "backend" in row}
    assert not list(tmp_path.glob("*.partial"))

    about = {name: value for name, value in found["machine"].items() if name not in ("commit", "date")}
    monkeypatch.setattr(gpu.Worker, "start", lambda worker: setattr(worker, "machine", about))
    options = {"only": ["ops"], "cases": "", "minutes": 0, "processes": 1, "commit": "abc123", "output": output}
    gpu.measure(argparse.Namespace(**options))
    again = json.loads(output.read_text())["rows"]
    kept = [row for row in rows if row["part"] != "ops"]
    assert again[: len(kept)] == kept and len(again) == len(rows)
    assert {row["left_out"] for row in again[len(kept) :]} == {"no time was left"}


FAKE = """
import json, os, sys, time
def say(found): print("mc-result " + json.dumps(found), flush=True)
say({"device": "fake"})
for line in sys.stdin:
    if line == "1\\n": time.sleep(60)
    if line == "2\\n": os.abort()
    print("noise", flush=True)
    say({"row": {"pid": os.getpid(), "number": int(line)}, "usable": line != "4\\n"})
"""


def test_a_case_that_hangs_or_kills_its_process_ends_alone(gpu):
    worker = gpu.Worker([sys.executable, "-S", "-c", FAKE])
    case = gpu.Case("ops", "name", lambda: {}, {"pass": "forward"}, limit=1.0)
    start = time.monotonic()
    rows = [worker.run(number, case, 100.0) for number in range(7)]
    assert time.monotonic() - start < 20 and worker.machine == {"device": "fake"}
    assert rows[1] == case.key | {"error": "killed after 1 s", "seconds": pytest.approx(1.0, abs=0.5)}
    assert rows[2]["error"] == "the process ended with -6" and case.key.items() <= rows[2].items()
    first, second, third = ({rows[n]["pid"] for n in numbers} for numbers in ((0,), (3, 4), (5, 6)))
    assert len(first | second | third) == 3 and len(second) == len(third) == 1  # a new process only where it is needed
    late = worker.run(1, case, 0.2)  # what is left of a part's time is a limit too
    assert late["error"].startswith("killed after 0")
    worker.stop()
