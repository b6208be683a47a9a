"""The programs behind docs/results.md: data, position-wise losses, and studies that can be interrupted."""

import json

import pytest
import torch

from benchmarks.measure import language_cost, study
from benchmarks.tasks.experiment import build_model
from benchmarks.tasks.language import (
    LanguageConfig,
    far_repeats,
    position_losses,
    quoting,
    read_otherwise,
    train_language,
)
from benchmarks.tasks.needle import ASK, FIRST_DIGIT, MARK, NeedleConfig, needle_batch, train_needle
from benchmarks.tasks.recall import RecallConfig, train_recall


TINY = {"width": 16, "heads": 1, "layers": 1, "mlp_width": 0, "segment_size": 8, "steps": 2, "batch": 2, "warmup": 1}


@pytest.mark.parametrize("kind,digits", [(1, 7), (2, 7), (3, 32)])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0, None])
def test_the_needle_holds_the_answer(kind, digits, depth):
    ids, labels = needle_batch(5, 90, kind, depth=depth)
    assert ids.shape == labels.shape == (5, 90)
    for row, target in zip(ids, labels, strict=True):
        (place,) = (row == MARK).nonzero()[0].tolist()
        needle = row[place + 1 : place + 2 + digits]
        assert torch.equal(needle[1:], target[target != -100])
        assert row[-digits - 1] == ASK and row[-digits] == needle[0]
        assert torch.equal(row[-digits + 1 :], needle[1:-1])
        assert (needle[1:] >= FIRST_DIGIT).all()
        haystack = 90 - 2 * (digits + 2) + 1
        assert depth is None or place == round(depth * haystack)


def test_a_haystack_of_lines_repeats():
    ids, _ = needle_batch(1, 200, 1, depth=1.0)
    torch.testing.assert_close(ids[0, :24], ids[0, 24:48])


def test_haystacks_of_lines_may_end_anywhere():
    def ends(any_phase):
        ids, _ = needle_batch(64, 200, 1, depth=0.0, any_phase=any_phase, generator=torch.Generator().manual_seed(0))
        return len(ids[:, -10].unique())

    assert ends(any_phase=False) == 1 and ends(any_phase=True) > 12


@pytest.mark.parametrize("length,kind", [(90, 4), (10, 1)])
def test_impossible_needles_are_refused(length, kind):
    with pytest.raises(ValueError, match="allowed"):
        needle_batch(1, length, kind)


def test_needle_measures_every_length_and_place():
    rules = {"aggregation": "none", "also": ["mean"]}
    config = NeedleConfig(**TINY, **rules, train_length=32, times=[1, 2], depths=3, samples=2)
    record = train_needle(config, progress=False)
    assert {rule: {n: len(p) for n, p in rows.items()} for rule, rows in record["heat"].items()} == {
        "none": {"32": 3, "64": 3},
        "mean": {"32": 3, "64": 3},
    }


def test_losses_by_position_are_those_of_the_model():
    model = build_model(LanguageConfig(**TINY), 258, 64).eval()
    ids = torch.randint(258, (3, 33))
    with torch.no_grad():
        ranges = position_losses(model, ids, 8)
        whole = model(input_ids=ids, labels=ids).loss
    assert list(ranges) == ["0-8", "8-16", "16-32"]
    mean = sum(part["nats"] * n for part, n in zip(ranges.values(), (8, 8, 16), strict=True)) / 32
    assert mean == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("memory,rule", [("linear", "mean"), ("linear", "mean/checkpoint"), ("gated_linear", "mean")])
def test_a_model_without_caching_is_read_with_it(memory, rule):
    """The mean of the memories changes what comes after the first segment, and nothing before; and nothing at all
    where the states of independent segments add up to the state without caching."""
    change = {"aggregation": "none", "memory": memory, "options": '{"rms_norm_eps": 1e-12}'}
    model = build_model(LanguageConfig(**TINY | change), 258, 64).eval()
    other = read_otherwise(model, rule, 16)
    ids = torch.randint(258, (1, 48))
    with torch.no_grad():
        plain, mean = (reader(input_ids=ids, use_cache=False).logits for reader in (model, other))
    torch.testing.assert_close(plain[:, :16], mean[:, :16])
    if (memory, rule) == ("linear", "mean"):
        torch.testing.assert_close(plain, mean)
    else:
        assert (plain[:, 16:] - mean[:, 16:]).abs().max() > 1e-3


def test_language_trains_and_reports_both_readings():
    config = LanguageConfig(**TINY, train_length=64, eval_length=128, aggregation="none", also=["mean"])
    record = train_language(config, progress=False)
    assert set(record["losses"]) == {"none", "mean"} and record["data"]["held_out_files"] > 5
    assert list(record["losses"]["none"]) == ["0-64", "64-128"]


def test_every_study_is_a_list_of_different_runs():
    for name, cells in study.STUDIES.items():
        runs = [study.key(cell.name, settings) for cell in cells() for settings in cell.runs(None)]
        assert len(runs) == len(set(runs)) > 10, name
        for cell in cells():
            study.TASKS[cell.task][0](**next(cell.runs(None)))
        build_model(study.TASKS[cells()[-1].task][0](**next(cells()[-1].runs(None)) | {"device": "cpu"}), 8, 64)


def test_a_study_for_a_gpu_runs_nothing_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "runs.jsonl"
    with pytest.raises(SystemExit, match="'mqar_512' needs a GPU"):
        study.main(["mqar_512", "--output", str(path)])
    assert not path.exists()


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch, capsys):
    """Whole lines are kept, a line cut off is run again, a failure is recorded and not repeated."""
    small = {"memory": "linear", "seq_len": 32, "pairs": 4, "vocab": 32, "test_size": 4} | TINY
    bad = study.Cell("bad", "recall", {"pairs": 999}, (1.0,), seeds=1)
    cells = [study.Cell("good", "recall", small, (1e-2,), seeds=2), bad]
    monkeypatch.setitem(study.STUDIES, "mqar", lambda: cells)
    path = tmp_path / "runs.jsonl"
    arguments = ["mqar", "--output", str(path)]
    study.main(arguments)
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["cell"] for r in records] == ["good", "bad", "good"] and "pairs=999" in records[1]["error"]
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    study.main(arguments)
    again = path.read_text().splitlines()
    assert again[:2] == lines[:2] and json.loads(again[-1])["curve"] == records[2]["curve"]
    capsys.readouterr()
    study.main([*arguments, "--list"])
    assert "3 of 3" in capsys.readouterr().out


def test_the_cost_of_language_models_is_measured_for_each_of_them(tmp_path, monkeypatch):
    small = TINY | {"train_length": 32, "eval_length": 64}
    cells = [study.Cell(name, "language", small | {"aggregation": name}, (1e-2,)) for name in ("none", "grm")]
    monkeypatch.setattr(language_cost, "language", lambda: cells)
    monkeypatch.setattr(language_cost, "in_process", lambda threads, function, *args: function(*args))
    path = tmp_path / "cost.json"
    language_cost.main(["--rounds", "1", "--threads", "1", "--output", str(path)])
    none, grm = json.loads(path.read_text())["models"]
    assert grm["cache_bytes"] > none["cache_bytes"] > 0
    assert all(value >= 0 for row in (none, grm) for key, value in row.items() if key != "model")


def test_bytes_that_repeat_what_is_far_back():
    """A predicted byte counts if the n bytes before it stood together before, and not nearer than the distance."""
    ids = torch.tensor([[1, 2, 3, 9, 9, 9, 1, 2, 3, 9, 1, 2, 3, 4]])
    far = far_repeats(ids, distance=5, n=3)
    # what follows "1 2 3" and "2 3 9" the second time, 6 bytes after the first; the third time comes after 4 bytes
    assert far[0].nonzero().flatten().tolist() == [8, 9]
    assert far_repeats(ids, distance=3, n=3)[0].nonzero().flatten().tolist() == [8, 9, 11, 12]


def test_a_text_that_quotes_itself():
    ids = torch.arange(2 * 17).view(2, 17)
    quoted = quoting(ids, 4, torch.Generator().manual_seed(0))
    assert torch.equal(quoted[:, :8], ids[:, :8]) and torch.equal(quoted[:, 16], ids[:, 16])
    assert torch.equal(quoted[:, 8:16].view(2, 2, 4).sort(1).values, ids[:, :8].view(2, 2, 4))
    with pytest.raises(ValueError, match="`quotes`=3, allowed: what divides half the length, 8"):
        quoting(ids, 3, torch.Generator())


def test_dense_training_read_sparsely():
    settings = {"steps": 4, "eval_every": 4, "test_size": 8, "batch": 4, "seq_len": 64, "pairs": 8, "vocab": 64}
    sparse = RecallConfig(**settings, aggregation="ssc", k=1, dense_part=0.5, read_as=[1, 3])
    record = train_recall(sparse, progress=False)
    assert set(record["read_as"]) == {"1", "3"} and record["accuracy"] == record["read_as"]["1"]
