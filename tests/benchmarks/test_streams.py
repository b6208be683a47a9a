"""The soak and the table of bytes, on a model that a test makes."""

import argparse
import json
import sys

import torch

from benchmarks.measure import state_bytes, stream
from helpers import build, small_config, tokens


def test_soak():
    model = build(small_config("gated_linear", num_hidden_layers=2))
    options = argparse.Namespace(max_cached_segments=3, piece=32)
    found = stream.soak(model, tokens(6000), options)
    assert found["tokens"] == 6000 and found["position_at_the_end"] == 2**31 * 3 * 8 + 6128
    assert found["drift"]["most"] < 1e-5 and found["score_difference_beyond_2_to_31"] == 0
    assert 0 <= found["resident_spread"] < 0.5 and found["resident_mib"]["least"] > 10


def test_drift_is_seen():
    model = build(small_config("gated_linear", num_hidden_layers=2))
    run = stream.Stream(model, max_cached_segments=3)
    ids = tokens(600)
    run.feed(ids)
    assert stream.drift(run, ids) < 1e-5
    layer = run.cache.memory_layers[0]
    layer.tensors["kept.0"] = layer.tensors["kept.0"] * 1.01
    run.feed(ids[:1])
    assert stream.drift(run, torch.cat([ids, ids[:1]])) > 1e-4


def test_bytes_of_states(tmp_path, monkeypatch, capsys):
    model = build(small_config("gated_linear", vocab_size=258, num_hidden_layers=2))
    model.save_pretrained(tmp_path / "model", with_code=False)
    output = tmp_path / "found.json"
    words = ["--checkpoint", str(tmp_path / "model"), "--length", "1100", "--files", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["state_bytes", *words])
    state_bytes.main()
    rows = json.loads(output.read_text())["rows"]
    assert [(row["segments"], row["dtype"]) for row in rows[:5]] == [
        (None, "fp32"),
        (None, "bf16"),
        (None, "int8"),
        (None, "int4"),
        (16, "fp32"),
    ]
    sizes = [row["state_bytes"] for row in rows]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] and sizes[4] < sizes[0] / 8
    assert abs(rows[2]["nats"] - rows[0]["nats"]) < 0.05
