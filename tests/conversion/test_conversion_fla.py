"""Models in the layout of flash-linear-attention, against their equations written out."""

import json

import pytest
import torch

from conversion_sources import FLA_KINDS as KINDS
from conversion_sources import IDS, TOKENS, train
from conversion_sources import make_fla as make
from mc_transformers import MCForCausalLM
from mc_transformers.conversion.convert import convert


DELTA = (
    {},
    {"use_gate": False},
    {"use_short_conv": False},
    {"allow_neg_eigval": True},
    {"expand_v": 1.0, "conv_size": 2},
    {"num_v_heads": 6, "norm_eps": 0.01},
    {"tie_word_embeddings": True, "num_v_heads": 4, "allow_neg_eigval": True},
)
VARIANTS = [("linear_attn", {}), ("retnet", {}), *(("gated_deltanet", fields) for fields in DELTA)]


@pytest.mark.parametrize(("kind", "fields"), VARIANTS, ids=str)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_source(tmp_path, kind, fields):
    theirs = make(kind, tmp_path / "source", **fields)
    ours = MCForCausalLM.from_pretrained(convert(tmp_path / "source", tmp_path / "ours")).eval()
    assert (ours(IDS).logits - theirs(IDS)).abs().max() < 1e-4
    ids = IDS
    for _ in range(TOKENS["max_new_tokens"]):
        ids = torch.cat([ids, theirs(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(ours.generate(IDS, **TOKENS | {"eos_token_id": None}), ids)


@pytest.mark.parametrize("aggregation", ["mean", "grm", "ssc"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_and_trains_with_segments(tmp_path, kind, aggregation):
    theirs = make(kind, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", aggregation=aggregation, segment_size=8)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert (ours.eval()(IDS[:, :8]).logits - theirs(IDS[:, :8])).abs().max() < 1e-4
    losses = train(ours)
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_linear_attention_is_the_same_in_independent_segments_that_are_added_up(tmp_path):
    """Rotations and decays apart, the sum of all segments' memories is one endless memory (eq. 13)."""
    theirs = make("linear_attn", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", aggregation="residual", segment_size=8)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (ours(IDS).logits - theirs(IDS)).abs().max() < 1e-4


REFUSED = [
    ("linear_attn", {"feature_map": "elementwise_product"}),
    ("linear_attn", {"norm_q": True}),
    ("linear_attn", {"norm_feature_map": True}),
    ("linear_attn", {"num_kv_heads": 1}),
    ("retnet", {"attn": {"layers": [0]}}),
    ("retnet", {"use_short_conv": True}),
    ("retnet", {"use_output_gate": False}),
    ("retnet", {"feature_map": "relu"}),
    ("gated_deltanet", {"attn": {"layers": [0]}}),
    ("gated_deltanet", {"hidden_act": "relu"}),
    ("gated_deltanet", {"num_v_heads": 3}),
]


@pytest.mark.parametrize(("kind", "fields"), REFUSED, ids=str)
def test_missing_pieces_are_named(tmp_path, kind, fields):
    make(kind, tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=f"this checkpoint has .*{next(iter(fields))}|a feature map"):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_verification_needs_a_source_that_loads(tmp_path):
    make("gated_deltanet", tmp_path / "source")
    with pytest.raises(ValueError, match="--verify-logits: Transformers has no model_type='gated_deltanet'"):
        convert(tmp_path / "source", tmp_path / "ours", verify=True)


def test_default_feature_map_is_not_taken_for_the_identity(tmp_path):
    make("linear_attn", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    del config["feature_map"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="elementwise_product"):
        convert(tmp_path / "source", tmp_path / "ours")
