"""The gated delta rule as a memory: its gates, and the package that may replace its op."""

import math

import pytest
import torch

from helpers import build, randn, small_config, tokens
from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.modeling_mc.memories import MEMORIES


@pytest.mark.parametrize("negative", [False, True])
def test_gates_as_published(negative):
    config = small_config("gated_delta", allow_negative_eigenvalues=negative)
    memory = MEMORIES["gated_delta"](config)
    with torch.no_grad():
        memory.A_log.bias.copy_(torch.tensor([0.3, -1.0]))
    raw = {"a": randn(3, 2), "b": 5 * randn(3, 2)}
    gates = memory.gates(raw, randn(3, 2, 8), None)
    for h, rate in enumerate((math.exp(0.3), math.exp(-1.0))):
        for t in range(3):
            a, b = raw["a"][t, h].item(), raw["b"][t, h].item()
            assert gates["log_decay"][t, h].item() == pytest.approx(-rate * math.log1p(math.exp(a)), rel=1e-6)
            assert gates["write"][t, h].item() == pytest.approx((1 + negative) / (1 + math.exp(-b)), rel=1e-6)


def test_decays_at_the_start():
    """One per head between 0.85 and 0.99 a token, so that no head forgets at once and none never."""
    mixer = MCForCausalLM(small_config("gated_delta", num_attention_heads=4)).model.layers[0].mixer
    raw = {"a": mixer.a_bias.bias.detach(), "b": mixer.b_bias.bias.detach()}
    decay = mixer.memory.gates(raw, torch.zeros(4, 8), None)["log_decay"].exp()
    assert len(set(decay.tolist())) == 4
    assert 0.84 < decay.min() < 0.87 and 0.985 < decay.max() < 0.995


def test_the_decay_stays_in_single_precision(tmp_path):
    build(small_config("gated_delta")).save_pretrained(tmp_path)
    model = MCForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = model.model.layers[0].mixer
    assert mixer.memory.A_log.bias.dtype == mixer.a_bias.bias.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    assert model(tokens(1, 20)).logits.isfinite().all()


def test_negative_eigenvalues_are_for_this_memory_only():
    with pytest.raises(ValueError, match="allow_negative_eigenvalues.*True.*'linear'"):
        MCConfig(memory="linear", allow_negative_eigenvalues=True)


def test_fla_is_not_imported_where_it_cannot_be_used():
    memory = MEMORIES["gated_delta"](small_config("gated_delta"))
    assert not memory._use_fla(torch.zeros(1, dtype=torch.bfloat16))
