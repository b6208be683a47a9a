"""The MQAR generator of benchmarks/tasks/recall.py against its description, and a few steps of training."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks.tasks.experiment import build_model, query_logits, save_json
from benchmarks.tasks.recall import RecallConfig, mqar_batch, save_plot, train_recall
from mc_transformers import MCForCausalLM


def batch(seed: int = 0, **options):
    arguments = {"batch_size": 64, "seq_len": 64, "num_pairs": 8, "vocab_size": 40} | options
    return mqar_batch(**arguments, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_passes", [1, 2])
def test_pairs_come_first_and_are_distinct(num_passes):
    ids, labels = batch(num_passes=num_passes)
    assert ids.shape == labels.shape == (64, 64)
    assert ids.dtype == labels.dtype == torch.long
    context = 16 * num_passes
    keys, values = ids[:, 0:16:2], ids[:, 1:16:2]
    assert torch.equal(ids[:, :context], ids[:, :16].repeat(1, num_passes))
    assert keys.min() >= 1 and keys.max() <= 40 // 2 - 1
    assert values.min() >= 40 // 2 and values.max() <= 40 - 1
    for drawn in (keys, values):
        assert all(row.unique().numel() == 8 for row in drawn)
    assert (labels[:, :context] == -100).all()


@pytest.mark.parametrize("num_passes", [1, 2])
def test_every_key_is_asked_once_and_labelled_with_its_value(num_passes):
    ids, labels = batch(num_passes=num_passes)
    for row, target in zip(ids, labels, strict=True):
        value_of = dict(zip(row[0:16:2].tolist(), row[1:16:2].tolist(), strict=True))
        positions = (target != -100).nonzero()[:, 0]
        assert sorted(row[positions].tolist()) == sorted(value_of)
        assert (positions % 2 == 0).all()  # the first token of a slot
        assert [value_of[key] for key in row[positions].tolist()] == target[positions].tolist()


def test_filler_is_zero_or_uniform():
    ids, labels = batch(random_non_queries=False)
    filler = (labels == -100) & (torch.arange(64) >= 16)
    assert (ids[filler] == 0).all()
    ids, labels = batch(batch_size=2000)
    filler = (labels == -100) & (torch.arange(64) >= 16)
    counts = ids[filler].bincount(minlength=40).double()
    assert counts.numel() == 40  # keys, values and 0 alike
    expected = counts.sum() / 40
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_slots_follow_the_power_law():
    """Frequencies of the ordered pairs of slots against drawing one after the other with weights i^(a-1)."""
    samples, slots, power_a = 200_000, 4, 0.01
    ids, labels = batch(batch_size=samples, seq_len=12, num_pairs=2, power_a=power_a, random_non_queries=False)
    drawn = torch.stack([(ids[:, 4::2] == ids[:, [p]]).double().argmax(1) for p in (0, 2)])  # slot of key 1, key 2
    frequency = (drawn[0] * slots + drawn[1]).bincount(minlength=slots * slots).view(slots, slots) / samples
    weight = torch.arange(1, slots + 1).double() ** (power_a - 1)
    expected = weight[:, None] * weight[None, :] / (weight.sum() * (weight.sum() - weight))[:, None]
    expected.fill_diagonal_(0)
    sigma = (expected * (1 - expected) / samples).sqrt()
    assert ((frequency - expected).abs() <= 5 * sigma).all()


def test_seed_decides():
    same, other = batch(seed=1), batch(seed=2)
    assert all(torch.equal(x, y) for x, y in zip(batch(seed=1), same, strict=True))
    assert not torch.equal(same[0], other[0])
    state = torch.get_rng_state()
    batch(seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # with its own generator it leaves the global one alone


def test_fullest_sequence():
    ids, labels = batch(seq_len=32, num_pairs=8)  # 4 D = T: every slot holds a query
    assert ((labels != -100).nonzero()[:, 1].view(64, 8) == torch.arange(16, 32, 2)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pairs": 17}, "num_pairs=17"),
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"num_pairs": 8, "num_passes": 4}, "num_pairs=8"),
        ({"num_pairs": 12, "vocab_size": 20}, "keys of vocab_size=20"),
        ({"seq_len": 63}, "must be even"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batch(**options)


SMALL = RecallConfig(
    seq_len=32, pairs=4, vocab=32, width=16, segment_size=8, steps=4, batch=4, warmup=1, test_size=8, eval_every=2
)


def test_queries_are_scored_at_their_own_position():
    model = build_model(SMALL, 32, 32).eval()
    ids, labels = mqar_batch(3, 32, 4, 32)
    with torch.no_grad():
        everywhere = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(query_logits(model, ids, labels), everywhere[labels != -100])


def test_training_is_reproducible_and_writes_its_record(tmp_path, monkeypatch):
    first, second = train_recall(SMALL, progress=False), train_recall(SMALL, progress=False)
    assert first["curve"] == second["curve"]
    assert [point["step"] for point in first["curve"]] == [2, 4]
    assert 0 <= first["accuracy"] <= 1
    assert first["config"] == dataclasses.asdict(SMALL)
    save_json(first, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == first
    pytest.importorskip("matplotlib")
    assert save_plot(first, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not save_plot(first, tmp_path / "other.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.png"]


def test_a_saved_model_generates_with_a_cache(tmp_path):
    """It was trained without one."""
    train_recall(dataclasses.replace(SMALL, save=str(tmp_path / "model")), progress=False)
    loaded = MCForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.use_cache and loaded.generation_config.use_cache
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == 0


def test_pairs_in_bursts():
    """Neighbours stay together; as many runs as bursts at most, the first and last silence may be empty."""
    ids, labels = mqar_batch(40, 128, 12, 64, bursts=4, silence=20, random_non_queries=False)
    lengths = set()
    for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
        context = row[: 2 * 12 + 20]
        places = [place for place, token in enumerate(context) if token]
        pairs = dict(zip([context[p] for p in places[::2]], [context[p] for p in places[1::2]], strict=True))
        assert len(pairs) == 12 and all(b == a + 1 for a, b in zip(places[::2], places[1::2], strict=True))
        breaks = [b - a - 1 for a, b in zip(places, places[1:], strict=False) if b > a + 1]
        assert len(breaks) <= 3 and sum(breaks) <= 20
        lengths |= {*breaks}
        asked = {token: target for token, target in zip(row, targets, strict=True) if target != -100}
        assert asked == pairs
    assert len(lengths) > 5
    with pytest.raises(ValueError, match="bursts=13 and silence=20: 1 to 12 bursts"):
        mqar_batch(1, 128, 12, 64, bursts=13, silence=20)
