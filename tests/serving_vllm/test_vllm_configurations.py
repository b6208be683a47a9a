"""Greedy tokens of vLLM are those of `generate`, for every kind of memory layer."""

import os

import pytest
import torch

from helpers import family, name_of
from vllm_engine import answers, engine, expected, make, prompts


KINDS = [
    {},
    {"memory": "swla", "aggregation": "residual"},
    {"memory": "retention", "aggregation": "mean", "state_init": "checkpoint"},
    {"memory": "gated_linear", "aggregation": "soup", "segmentation": "logarithmic"},
    {"memory": "gated_delta", "aggregation": "ssc", "state_init": "checkpoint", "segmentation": "logarithmic"},
    {"memory": "rwkv7", "aggregation": "none"},
    {"memory": "dla", "aggregation": "grm", "memory_decay": True},
    {"memory": "titans", "aggregation": "soup"},
    {"memory": "titans", "aggregation": "ssc", "segmentation": "logarithmic"},
    {"memory": "lstm", "aggregation": "grm"},
    {"memory": "gru", "aggregation": "ssc", "vector_read": "add"},
    {"max_cached_segments": 3},
    {"memory": "titans", "aggregation": "ssc", "max_cached_segments": 2},
    {"memory": "gated_delta", "max_cached_segments": 3, "cache_eviction": "least_read"},
    {"aggregation": "ssc", "route_sharing": "model"},
    {"memory": "swla", "online_memory": "running"},
    {"aggregation": "ssc", "online_memory": "running", "segmentation": "logarithmic"},
    {"aggregation": "soup", "online_gate_bias": 1.0, "summaries_per_segment": 2},
    {"aggregation": "ssc", "cached_answers": "added", "cached_answers_start": 0.5, "gate_function": "relu"},
    {
        "conv_kernel_size": 0,
        "rope": "all",
        "num_key_heads": 1,
        "segment_summary": "hidden",
        "tie_word_embeddings": True,
    },
    {"intermediate_size": 0, "value_skip": True, "conv_bias": True, "qkv_bias": True, "summaries_per_segment": 4},
]
# all there is takes a quarter of an hour: MC_VLLM_ALL=1
EVERY = family() if os.environ.get("MC_VLLM_ALL") else []
HYBRIDS = {
    "llama": {"layer_types": ["memory_caching", "full_attention"]},
    "grouped": {"layer_types": ["full_attention", "memory_caching"], "num_key_value_heads": 1, "attention_bias": True},
    "sliding": {
        "layer_types": ["memory_caching", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 24,
    },
    "qwen3": {"layer_types": ["sliding_attention", "memory_caching"], "sliding_window": 40, "attention": "qwen3"},
    "post norm": {"layer_types": ["memory_caching", "full_attention"], "attention_norm": "post"},
    "bounded": {"layer_types": ["memory_caching", "full_attention"], "max_cached_segments": 2},
    # vLLM's attention on a CPU takes blocks of 32 tokens at least: four segments
    "short segments": {"layer_types": ["memory_caching", "full_attention"], "segment_size": 8},
    "logarithmic": {"layer_types": ["memory_caching", "full_attention"], "segmentation": "logarithmic"},
}


def check(folder, **fields):
    """A first pass with nothing to share, and a second one that finds what the first has left."""
    model, texts = make(folder, **fields), prompts(1, 5, 8, 17, 17, 40, 64, 71)
    wanted = expected(model, texts)
    with engine(folder) as llm:
        first, second = answers(llm, texts), answers(llm, texts)
    assert first[0] == wanted and second[0] == wanted
    assert first[1] == 0
    blocks = 8 if fields.get("segmentation") == "logarithmic" and "layer_types" in fields else 1  # of eight segments
    assert second[1] >= 64 or blocks * model.config.segment_size > len(texts[-1])  # hits


@pytest.mark.parametrize("fields", KINDS + EVERY, ids=name_of)
def test_tokens_of_generate(tmp_path, fields):
    check(tmp_path, **fields)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids(tmp_path, kind):
    """Memory and attention layers share one table of blocks."""
    check(tmp_path, head_dim=32, **{"segment_size": 32} | HYBRIDS[kind])


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "layer_types": ["memory_caching" if i in (9, 19, 29) else "full_attention" for i in range(30)],
}


@pytest.mark.parametrize("segment", [64, 128])
def test_a_hybrid_of_real_size(tmp_path, segment):
    """SmolLM2-135M's layers, three of them memory: a block is one segment, so that prompts find all they share."""
    model, texts = make(tmp_path, segment_size=segment, **SMOLLM2), prompts(3, 150, 300)
    wanted = expected(model, texts)
    with engine(tmp_path, max_model_len=512, kv_cache_memory_bytes=256 << 20) as llm:
        first, second = answers(llm, texts), answers(llm, texts)
        sizes = llm.apply_model(lambda module: [m.blocks.nbytes for m in module.modules() if hasattr(m, "pool")])
    assert first == (wanted, 0) and second == (wanted, 128 + 256)
    # a state per head in fp32, the means and sums of keys, and the last three tokens of three convolutions
    state, means, tails = 9 * 64 * 64 * 4, 9 * 64 * 4, 3 * 3 * 576 * 4
    assert sizes == [[-(-(state + means + tails) // 64) * 64] * 3]


@pytest.mark.parametrize("fields", [{}, {"memory": "titans", "aggregation": "ssc"}], ids=name_of)
def test_bf16(tmp_path, fields):
    """Half precision breaks ties in another way, so the first tokens of each answer must do."""
    model, texts = make(tmp_path, torch.bfloat16, **fields), prompts(5, 17, 40, 64)
    wanted = expected(model, texts)
    with engine(tmp_path, dtype="bfloat16") as llm:
        found, _ = answers(llm, texts)
    assert sum(a[:8] == b[:8] for a, b in zip(found, wanted, strict=True)) >= 3
