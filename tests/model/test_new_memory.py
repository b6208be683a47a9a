"""What a new base memory costs: a class and its entry in the registry. Everything else is there at once."""

import pytest
import torch
from test_equations import check
from torch.nn import functional as F

from helpers import assert_close, build, small_config, tokens
from mc_transformers import MCCache, MCConfig, MCForCausalLM
from mc_transformers.modeling_mc.memories import MEMORIES
from mc_transformers.modeling_mc.memories.matrix import MatrixMemory
from mc_transformers.modeling_mc.memories.plain import PlainMemory


class FadingMemory(MatrixMemory):
    """Every token fades by a tenth, and is written with a learned strength."""

    gate_names = ("e",)

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"log_decay": torch.full_like(raw["e"], 0.9).log(), "write": raw["e"].sigmoid()}

    @classmethod
    def check(cls, config) -> None:
        if config.segment_size > 64:
            config.refuse("segment_size", "at most 64, after which all has faded")


class ChannelMemory(PlainMemory):
    """A rule that no kernel knows: every channel of the keys forgets at its own rate, and answers are bounded."""

    gate_names = ("a", "e")
    gate_bias = {"a": 4.0}

    def gate_shape(self, name: str) -> tuple[int, ...]:
        return (self.num_heads, self.key_dim) if name == "a" else (self.num_heads,)

    def gates(self, raw, k, x):
        return {"log_decay": F.logsigmoid(raw["a"]), "write": raw["e"].sigmoid()}

    def initial_state(self, num, device, dtype=torch.float32):
        return (torch.zeros(num, self.num_heads, self.key_dim, self.value_dim, device=device, dtype=dtype),)

    def step(self, state, k, v, gates):
        kept = gates["log_decay"].exp()[..., None] * state[0]
        return (kept + k[..., None] * (gates["write"][..., None] * (v - self.read((kept,), k)))[..., None, :],)

    def read(self, state, q):
        return (q.to(state[0].dtype)[..., None, :] @ state[0])[..., 0, :].tanh()


NEW = {"fading": FadingMemory, "channel": ChannelMemory}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, memory in NEW.items():
        monkeypatch.setitem(MEMORIES, name, memory)


@pytest.mark.parametrize("segmentation", ["constant", "logarithmic"])
@pytest.mark.parametrize("aggregation", ["none", "residual", "grm", "soup", "ssc", "mean"])
@pytest.mark.parametrize("memory", NEW)
def test_it_is_token_by_token_with_every_read_rule(memory, aggregation, segmentation):
    config = small_config(memory, aggregation=aggregation, segmentation=segmentation)
    check(build(config, dtype=torch.float64), tokens(2, 21))


@pytest.mark.parametrize("aggregation", ["none", "mean", "grm", "soup", "ssc"])
def test_a_rule_for_one_token_pads_packs_and_carries(aggregation):
    model = build(small_config("channel", aggregation=aggregation, state_init="checkpoint"), dtype=torch.float64)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :5], mask[1, 3:17:2] = 0, 0
    check(model, tokens(2, 21), mask)
    check(model, tokens(1, 30), cu_seq_lens_q=torch.tensor([0, 3, 11, 12, 30]))
    ids, cache = tokens(1, 30), MCCache(config=model.config)
    with torch.no_grad():
        pieces = [model(part, cache=cache).logits for part in ids.split([7, 2, 9, 1, 11], 1)]
        assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits, 1e-10)


def test_soup_mixes_states_where_answers_are_not_linear_in_them():
    """Then it is another rule than `grm`; the comparison with eq. 15 letter by letter is above."""
    soup, grm = (
        build(small_config("channel", aggregation=kind), dtype=torch.float64)(tokens(1, 30)).logits
        for kind in ("soup", "grm")
    )
    assert_close(soup[:, :8], grm[:, :8], 1e-10)  # one memory
    assert (soup - grm).abs().max() > 1e-3 * grm.abs().max()


@pytest.mark.parametrize("memory", NEW)
def test_it_generates_and_is_saved(memory, tmp_path):
    model, ids = build(small_config(memory)), tokens(1, 19)
    model.save_pretrained(tmp_path)
    loaded = MCForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.memory == memory
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
