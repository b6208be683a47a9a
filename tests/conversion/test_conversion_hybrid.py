"""Hybrids of gated delta rule and attention, of Transformers' own classes, converted."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from conversion_sources import IDS, SIZES, TOKENS, make_kind, train
from mc_transformers import MCForCausalLM
from mc_transformers.conversion.convert import convert


HYBRID = SIZES | {
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
QWEN = HYBRID | {"head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
KINDS = {
    "olmo": (OlmoHybridForCausalLM, OlmoHybridConfig, HYBRID | {"rope_parameters": ROPE | {"rope_theta": None}}),
    "olmo rotary": (OlmoHybridForCausalLM, OlmoHybridConfig, HYBRID | {"rope_parameters": ROPE}),
    "olmo positive": (OlmoHybridForCausalLM, OlmoHybridConfig, HYBRID | {"linear_allow_neg_eigval": False}),
    "qwen3.5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, QWEN),
    "qwen3.5 tied": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, QWEN | {"tie_word_embeddings": True}),
    "qwen3-next": (Qwen3NextForCausalLM, Qwen3NextConfig, QWEN | {"mlp_only_layers": [0, 1, 2]}),
}


@pytest.fixture
def make(tmp_path):
    return partial(make_kind, KINDS, tmp_path / "source")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_source(tmp_path, make, kind):
    theirs = make(kind)
    convert(tmp_path / "source", tmp_path / "ours", verify=True)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (ours(IDS).logits - theirs(IDS).logits).abs().max() < 1e-4
    assert torch.equal(ours.generate(IDS, **TOKENS), theirs.generate(IDS, **TOKENS))
    assert ours.config.rope == ("none" if kind == "olmo" else "attention")


@pytest.mark.parametrize("aggregation", ["mean", "grm", "ssc"])
@pytest.mark.parametrize("kind", ["olmo", "qwen3.5", "qwen3-next"])
def test_it_runs_and_trains_with_segments(tmp_path, make, kind, aggregation):
    theirs = make(kind)
    convert(tmp_path / "source", tmp_path / "ours", aggregation=aggregation, segment_size=8)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert (ours.eval()(IDS[:, :8]).logits - theirs(IDS[:, :8]).logits).abs().max() < 1e-4
    losses = train(ours)
    assert losses[-1] < losses[0]


def test_mixture_of_experts_is_refused(tmp_path, make):
    make(
        "qwen3-next",
        mlp_only_layers=[],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    with pytest.raises(ValueError, match="mixture of experts.*num_experts"):
        convert(tmp_path / "source", tmp_path / "ours")


def test_weights_that_transformers_ignores_are_left_out(tmp_path, make):
    make("qwen3.5")
    file = tmp_path / "source" / "model.safetensors"
    save_file(load_file(file) | {"mtp.layers.0.x": torch.zeros(2)}, file, {"format": "pt"})
    convert(tmp_path / "source", tmp_path / "ours", verify=True)


def test_both_layouts_of_olmo(tmp_path, make):
    """As Transformers saves it, and with the names that it has in memory."""
    theirs = make("olmo")
    convert(tmp_path / "source", tmp_path / "file")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "config.json").write_text((tmp_path / "source" / "config.json").read_text())
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(weights, tmp_path / "memory" / "model.safetensors", {"format": "pt"})
    assert set(weights) != set(load_file(tmp_path / "source" / "model.safetensors"))
    convert(tmp_path / "memory", tmp_path / "ours")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("file", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_scaled_rotary_positions_are_refused(tmp_path, make):
    make("qwen3.5")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_type.*linear"):
        convert(tmp_path / "source", tmp_path / "ours")
