"""What a new base memory costs: a class and its entry in the registry. Everything else is there at once."""

import pytest
import torch
from test_equations import check

from helpers import assert_close, build, small_config, tokens
from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.modeling_mc.memories import MEMORIES
from mc_transformers.modeling_mc.memories.matrix import MatrixMemory


class FadingMemory(MatrixMemory):
    """Every token fades by a tenth, and is written with a learned strength."""

    gate_names = ("e",)

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"log_decay": torch.full_like(raw["e"], 0.9).log(), "write": raw["e"].sigmoid()}

    @classmethod
    def check(cls, config) -> None:
        if config.segment_size > 64:
            config.refuse("segment_size", "at most 64, after which all has faded")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MEMORIES, "fading", FadingMemory)


@pytest.mark.parametrize("segmentation", ["constant", "logarithmic"])
@pytest.mark.parametrize("aggregation", ["none", "residual", "grm", "soup", "ssc", "mean"])
def test_it_is_token_by_token_with_every_read_rule(aggregation, segmentation):
    config = small_config("fading", aggregation=aggregation, segmentation=segmentation)
    check(build(config, dtype=torch.float64), tokens(2, 21))


def test_it_generates_and_is_saved(tmp_path):
    model, ids = build(small_config("fading")), tokens(1, 19)
    model.save_pretrained(tmp_path)
    loaded = MCForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.memory == "fading"
    assert_close(loaded(ids).logits, model(ids).logits, 1e-6)
    cached = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))


def test_its_own_rules_and_those_of_others():
    with pytest.raises(ValueError, match="`segment_size`=128.*at most 64"):
        MCConfig(memory="fading", segment_size=128)
    with pytest.raises(ValueError, match="`gate_form`='step'.*'sigmoid' with memory='fading'"):
        MCConfig(memory="fading", segment_size=32, gate_form="step")
    with pytest.raises(ValueError, match="'fading'"):
        MCConfig(memory="faded")
