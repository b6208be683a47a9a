"""Bounded means linear: what a bounded cache, or packed documents, cost per token does not grow with the text."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers import build, small_config, tokens
from mc_transformers.kernels.read import segment, selected


LENGTHS = (384, 1536)  # tokens; segments have 4
BOUNDS = {
    "bounded": {"max_cached_segments": 4},
    "least_read": {"max_cached_segments": 4, "cache_eviction": "least_read"},
    "packed": {},
    "unbounded": {},
}
MODELS = [("linear", kind) for kind in ("grm", "residual", "mean", "ssc")]
MODELS += [("dla", "soup"), ("dla", "residual"), ("lstm", "grm")]
CASES = [(*model, bound) for model in MODELS for bound in ("bounded", "packed")]
CASES += [("linear", "grm", "least_read"), ("linear", "grm", "unbounded")]


def work(model, length: int, packed: bool) -> int:
    """Multiplications and additions of one pass, as torch's profiler counts them inside of every op."""
    options = {}
    if packed:
        borders = torch.arange(0, length + 1, 32, dtype=torch.int32)
        names = ("cu_seq_lens_q", "cu_seq_lens_k")
        options = {"position_ids": torch.arange(length)[None] % 32, **dict.fromkeys(names, borders)}
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as record, torch.no_grad():
        model(tokens(1, length), use_cache=False, **options)
    return sum(event.flops() for event in record.profiler.kineto_results.events())


@pytest.mark.parametrize(("memory", "aggregation", "bound"), CASES)
def test_a_bound_is_what_is_paid_for(monkeypatch, memory, aggregation, bound):
    monkeypatch.setattr(segment, "BUDGET", 2**11)  # blocks of a few segments, as in long texts
    monkeypatch.setattr(selected, "ROUTE_BUDGET", 2**11)
    fields = BOUNDS[bound] | {"aggregation": aggregation, "segment_size": 4, "head_dim": 8, "value_head_dim": 8}
    model = build(small_config(memory, **fields))
    short, long = (work(model, length, bound == "packed") for length in LENGTHS)
    assert long / short < 4.6 if bound != "unbounded" else long / short > 8, (short, long, long / short)
