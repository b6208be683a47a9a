"""Pieces of the model that converted checkpoints need, one way of running it against the others."""

import pytest
import torch

from helpers import assert_close, build, small_config, tokens
from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.modeling_mc.compat import CACHE_NAME


HYBRID = {"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2, "memory": "gated_delta"}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
KINDS = {
    "step gates": {
        "memory": "gated_linear",
        "gate_form": "step",
        "value_skip": True,
        "conv_bias": True,
        "output_norm": "gated",
        "num_attention_heads": 4,
        "num_key_heads": 2,
        "intermediate_size": 0,
        "qk_norm": False,
    },
    "rotary keys": {"memory": "retention", "rope": "all", "conv_kernel_size": 0, "qk_norm": False},
    "own heads": {
        "memory": "gated_delta",
        "num_memory_heads": 4,
        "num_key_heads": 2,
        "key_head_dim": 6,
        "value_head_dim": 10,
        "qk_norm_eps": 1e-6,
        "output_norm_eps": 1e-5,
    },
    "biases": {"memory": "gated_delta", "qkv_bias": True},
    "no norm": {"memory": "linear", "output_norm": "none", "use_output_gate": False},
    "norms behind": HYBRID | {"attention": "olmo_hybrid", "attention_norm": "post", "rope": "none"},
    "gated attention": HYBRID | {"attention": "qwen3_next", "rope_parameters": PARTIAL},
}
kinds = pytest.mark.parametrize("kind", KINDS)
aggregations = pytest.mark.parametrize("aggregation", ["none", "grm", "ssc"])


def model_of(kind: str, aggregation: str, **fields):
    return build(small_config(**KINDS[kind] | fields, aggregation=aggregation))


@kinds
@aggregations
@torch.no_grad()
def test_parallel_is_token_by_token(kind, aggregation):
    model, slow = model_of(kind, aggregation), model_of(kind, aggregation, mc_backend="reference")
    slow.load_state_dict(model.state_dict())
    assert_close(model(tokens(2, 29)).logits, slow(tokens(2, 29)).logits)


@kinds
@aggregations
@torch.no_grad()
def test_pieces_padding_and_decoding(kind, aggregation):
    model, ids = model_of(kind, aggregation), tokens(2, 29)
    whole = model(ids).logits
    first = model(ids[:, :11], use_cache=True)
    assert_close(model(ids[:, 11:], cache=first[CACHE_NAME]).logits, whole[:, 11:])
    padded = torch.cat([ids[:, :5], ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    assert_close(model(padded, attention_mask=mask).logits[:, 5:], whole)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["step gates", "rotary keys", "own heads", "biases", "no norm"])
@torch.no_grad()
def test_packed_documents_stay_apart(kind):
    model, ids = model_of(kind, "grm"), tokens(1, 30)
    packed = model(ids, cu_seq_lens_q=torch.tensor([0, 13, 30])).logits
    assert_close(packed, torch.cat([model(ids[:, :13]).logits, model(ids[:, 13:]).logits], 1))


def test_new_models_start_as_they_should():
    model = MCForCausalLM(small_config(**KINDS["gated attention"]))
    norms = {name: p for name, p in model.named_parameters() if "q_norm" in name or "k_norm" in name}
    assert norms and all(p.abs().max() == 0 for p in norms.values())  # they scale by 1 + weight
    step = MCForCausalLM(small_config(**KINDS["step gates"]))
    assert all(p.min() == 1 for name, p in step.named_parameters() if name.endswith(("o_norm.weight", "skip.bias")))


def test_half_precision_keeps_decay_rates_and_skips(tmp_path):
    MCForCausalLM(small_config(**KINDS["step gates"])).save_pretrained(tmp_path)
    loaded = MCForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    fp32 = {name.split("mixer.")[1] for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {"a_bias.bias", "memory.A_log.bias", "skip.bias"}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_heads": 3},
        {"gate_form": "step", "memory": "linear"},
        {"conv_bias": True, "conv_kernel_size": 0},
        {"rope": "none", "layer_types": ["full_attention"]},
        {"rope": "all", "key_head_dim": 7},
        {"intermediate_size": -1},
        {"qk_norm_eps": 0.0},
        {"output_norm": "layer"},
        {"attention": "mistral"},
        {"num_memory_heads": 0},
        {"rope": "all", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_bad_values_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        MCConfig(**{"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2} | fields)
