"""One set of weights under several read rules, and k that falls during training."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import MEMORY_NAMES, accepts, assert_close, build, small_config, tokens
from mc_transformers import MCCache, MCForCausalLM
from mc_transformers.hub.facts import architecture
from mc_transformers.training import ReadSchedule


SIZE = 8


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_read_as_is_the_model_of_that_config(memory, tmp_path):
    ids = tokens(2, 4 * SIZE + 3)
    model = build(small_config(memory, aggregation="grm"), dtype=torch.float64)
    dense = model(ids).logits
    for aggregation in ("ssc", "soup"):
        if not accepts(memory=memory, aggregation=aggregation):
            continue
        other = build(small_config(memory, aggregation=aggregation, num_selected_segments=1), dtype=torch.float64)
        other.load_state_dict(model.state_dict())
        assert model.read_as(aggregation, num_selected_segments=1) is model
        assert (model.config.aggregation, model.config.trained_as) == (aggregation, "grm")
        assert_close(model(ids).logits, other(ids).logits, 1e-12)
        out = [m.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0) for m in (model, other)]
        assert torch.equal(*out)
        model.config.mc_backend = "reference"
        assert_close(model(ids).logits, other(ids).logits, 1e-10)
        model.config.mc_backend = "auto"
    assert not torch.allclose(model.read_as("ssc", num_selected_segments=1)(ids).logits, dense)
    model.save_pretrained(tmp_path)
    loaded = MCForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (loaded.config.aggregation, loaded.config.trained_as) == ("ssc", "grm")
    assert_close(loaded(ids).logits, model(ids).logits, 1e-12)
    back = loaded.read_as("grm")
    assert back.config.trained_as is None
    assert_close(back(ids).logits, dense, 1e-12)


def test_facts_say_what_a_model_was_trained_as():
    model = build(small_config("linear", aggregation="grm")).read_as("ssc")
    assert "trained_as" in str(architecture(model.config))


def test_a_cache_of_another_rule_is_refused():
    model = build(small_config("linear", aggregation="grm"))
    cache = MCCache(config=model.config)
    model(tokens(1, 20), cache=cache)
    model.read_as("ssc")
    with pytest.raises(ValueError, match="aggregation='grm', here 'ssc'"):
        model(tokens(1, 2), cache=cache)


@pytest.mark.parametrize("have, want", [("grm", "none"), ("ssc", "residual"), ("residual", "grm"), ("none", "mean")])
def test_refused_rules(have, want):
    model = build(small_config("linear", aggregation=have))
    with pytest.raises(ValueError, match=f"`aggregation`='{want}' is not possible .* allowed: "):
        model.read_as(want)
    assert model.config.aggregation == have


# ----------------------------------------------------------------------------------------------------------- schedule
def test_schedule_falls_from_all_to_k():
    schedule = ReadSchedule(num_segments=16, part=0.5)
    found = [schedule.selected(step, 20, 2) for step in range(20)]
    assert found[0] == 16 and found[10:] == [2] * 10
    assert found == sorted(found, reverse=True) and len(set(found)) > 5
    assert ReadSchedule(4).selected(0, 10, 8) == 8


@pytest.mark.parametrize("segments, part", [(0, 0.3), (4, 0.0), (4, 2)])
def test_schedule_refuses(segments, part):
    with pytest.raises(ValueError, match="ReadSchedule: .* is not valid, allowed"):
        ReadSchedule(segments, part)


def train(folder, model, steps, callback, resume=False, seen=None):
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 5 * SIZE)]
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=3, seed=1
    )
    if seen is not None:
        mixer = model.model.layers[0].mixer
        mixer.register_forward_pre_hook(lambda *_: seen.append(mixer.aggregation.top_k))
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_schedule_in_a_trainer(tmp_path):
    """Dense at first, sparse at the end; the config, and so every checkpoint, has the last k; resuming goes on."""
    config, seen = small_config("linear", aggregation="ssc", num_selected_segments=1), []
    model = build(config)
    train(tmp_path, model, 8, ReadSchedule(num_segments=4, part=0.75), seen=seen)
    assert seen[0] == 4 and seen[-2:] == [1, 1] and seen == sorted(seen, reverse=True)
    assert model.model.layers[0].mixer.aggregation.top_k == 1
    assert MCForCausalLM.from_pretrained(tmp_path / "checkpoint-3").config.num_selected_segments == 1
    again, resumed = [], build(config)
    train(tmp_path, resumed, 8, ReadSchedule(num_segments=4, part=0.75), str(tmp_path / "checkpoint-3"), seen=again)
    assert again == seen[3:]
    with pytest.raises(ValueError, match="ReadSchedule: `aggregation`='grm'"):
        train(tmp_path / "other", build(small_config("linear")), 1, ReadSchedule(4))
