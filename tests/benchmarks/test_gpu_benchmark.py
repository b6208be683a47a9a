"""benchmarks/measure/gpu.py without a GPU: tiny shapes in Triton's interpreter, every part."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments: str, expect: int = 0) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.measure.gpu", "--smoke", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_part_runs(tmp_path):
    output = tmp_path / "gpu.json"
    assert " 0 incorrect, 0 failed" in run("--output", str(output), "--max-seconds", "10000")
    found = json.loads(output.read_text())
    rows = found["rows"]
    assert {"device", "torch", "triton", "transformers", "commit", "date"} <= set(found["machine"])
    assert not any("error" in row for row in rows)
    left_out = [(row["case"], row["left_out"]) for row in rows if "left_out" in row]
    forward_only = ("segment_route", "decode_step", "state_step", "state_step delta", "slot_write")
    assert left_out == [(op, "it has no gradient") for op in forward_only]
    measured = [row for row in rows if "left_out" not in row]
    counts = Counter(row["part"] for row in measured)
    assert set(counts) == {"peaks", "correctness", "ops", "layer", "decode"}
    for row in measured:
        if row["part"] == "correctness":
            assert row["ok"] is True
        else:
            assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
    assert {row["case"] for row in measured if row["part"] == "decode"} >= {"attention", "linear ssc", "linear grm"}
    assert all(row["cache_bytes"] > 0 for row in measured if row["part"] == "decode")
    assert {"triton", "torch"} <= {row.get("backend") for row in measured if row["part"] == "layer"}
    assert not list(tmp_path.glob("*.partial"))
    checked = [row["case"] for row in rows if row["part"] == "correctness"]
    assert set(checked[: len(set(checked))]) == set(checked)  # where time runs out, every op was checked first

    # what there is no time for is left out and said so; the rest of a file of the same commit stays
    run("--output", str(output), "--only", "ops", "--max-seconds", "0")
    again = json.loads(output.read_text())["rows"]
    kept = [row for row in rows if row["part"] != "ops"]
    assert again[: len(kept)] == kept and len(again) == len(rows)
    assert {row["left_out"] for row in again[len(kept) :]} == {"no time was left"}
