"""The parallel form against the token-by-token reference in float64: values and all gradients."""

import itertools

import pytest
import torch

from helpers import (
    GATE_NAMES,
    MEMORY_NAMES,
    SEGMENTATIONS,
    accepts,
    assert_close,
    build,
    combinations,
    family,
    name_of,
    small_config,
    tokens,
)
from mc_transformers.configuration_mc import CHOICES


SIZE = 8  # segment_size of the small config


def outputs_and_gradients(model, backend, ids, mask=None, **inputs):
    """Logits at real tokens, and the gradients of inputs_embeds and of every parameter."""
    model.config.mc_backend = backend  # one config, shared with every mixer
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **inputs).logits
    if mask is not None:
        logits = logits * mask[..., None]
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(2))
    named = {"inputs_embeds": embeds} | {n: p for n, p in model.named_parameters() if "embed_tokens" not in n}
    gradients = torch.autograd.grad((logits * weights).sum(), named.values(), allow_unused=True)
    return logits.detach(), dict(zip(named, gradients, strict=True))


def check(model, ids, mask=None, **inputs):
    reference, expected = outputs_and_gradients(model, "reference", ids, mask, **inputs)
    logits, gradients = outputs_and_gradients(model, "torch", ids, mask, **inputs)
    assert_close(logits, reference, 1e-10, "logits")
    for name, gradient in expected.items():
        zero = torch.zeros(())
        assert_close(
            zero if gradients[name] is None else gradients[name], zero if gradient is None else gradient, 1e-9, name
        )
    return expected


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 5])
@pytest.mark.parametrize("fields", family(), ids=name_of)
def test_parallel_is_token_by_token(fields, length):
    check(build(small_config(**fields), dtype=torch.float64), tokens(2, length))


@pytest.mark.parametrize("fields", family(aggregation=["grm", "ssc"]), ids=name_of)
def test_parallel_is_token_by_token_over_many_segments(fields):
    """Enough segments for groups of groups under logarithmic segmentation."""
    check(build(small_config(**fields, segment_size=4), dtype=torch.float64), tokens(1, 11 * 4 + 3))


@pytest.mark.parametrize("fields", family(), ids=name_of)
def test_parallel_is_token_by_token_with_padding(fields):
    mask = torch.ones(3, 3 * SIZE + 1, dtype=torch.long)
    mask[0, :5], mask[1, -9:], mask[2, 3:17:2] = 0, 0, 0
    check(build(small_config(**fields), dtype=torch.float64), tokens(*mask.shape), mask)


@pytest.mark.parametrize("fields", family(aggregation=["grm", "ssc"]), ids=name_of)
def test_parallel_is_token_by_token_packed(fields):
    borders = torch.tensor([0, 3, 11, 12, 30])
    check(build(small_config(**fields), dtype=torch.float64), tokens(1, 30), cu_seq_lens_q=borders)


GATES = (
    combinations(
        memory=["linear"],
        aggregation=["grm", "ssc"],
        gate_source=CHOICES["gate_source"],
        gate_function=GATE_NAMES[:2],
        segment_summary=CHOICES["segment_summary"],
        summaries_per_segment=[1, 2],
        segmentation=SEGMENTATIONS,
        head_dim=[8, 12],  # queries can gate summaries of hidden states only if head_dim * heads = hidden_size
    )
    + combinations(  # where logits come from is all the same to what becomes of them
        memory=["linear"],
        aggregation=["grm", "ssc"],
        gate_function=GATE_NAMES[2:],
        summaries_per_segment=[1, 2],
        segmentation=SEGMENTATIONS,
    )
)


@pytest.mark.parametrize("fields", GATES, ids=name_of)
def test_gates(fields):
    check(build(small_config(**fields), dtype=torch.float64), tokens(2, 3 * SIZE + 5))


OPTIONS = {
    "ssc-k1": {"aggregation": "ssc", "num_selected_segments": 1},
    "ssc-k3-subblocks": {"aggregation": "ssc", "num_selected_segments": 3, "summaries_per_segment": 4},
    "ssc-shared-routes": {"aggregation": "ssc", "route_sharing": "model", "num_hidden_layers": 2},
    "soup-sigmoid": {"aggregation": "soup", "gate_function": "sigmoid"},
    "wide-values": {"value_head_dim": 11},
    "one-head": {"num_attention_heads": 1},
    "no-conv": {"conv_kernel_size": 0},
    "conv-2": {"conv_kernel_size": 2},
    "no-qk-norm": {"qk_norm": False},
    "no-output-gate": {"use_output_gate": False},
    "no-head-norm": {"memory_head_norm": False},
    "negative-eigenvalues": {"allow_negative_eigenvalues": True},
    "chunk-2": {"memory_chunk_size": 2, "state_init": "checkpoint"},
    "segment-1": {"segment_size": 1, "memory_chunk_size": 1},
    "segment-is-chunk": {"segment_size": 4, "state_init": "checkpoint"},
    "two-layers": {"num_hidden_layers": 2},
    **{
        f"bounded-{who}-{kind}": {"max_cached_segments": 1, "cache_eviction": who, "aggregation": kind}
        for who in CHOICES["cache_eviction"]
        for kind in ("grm", "ssc")
    },
    "vector-add-weighted": {"vector_read": "add_weighted", "aggregation": "ssc"},
    **{
        f"vector-add-{kind}": {"vector_read": "add", "aggregation": kind}
        for kind in CHOICES["aggregation"]
        if kind not in ("none", "soup")
    },
}


def with_options() -> list:
    """Every option with every memory that takes it."""
    return [
        pytest.param({"aggregation": "grm", "memory": memory} | OPTIONS[option], id=f"{option}-{memory}")
        for option, memory in itertools.product(OPTIONS, MEMORY_NAMES)
        if accepts(**{"aggregation": "grm", "memory": memory} | OPTIONS[option])
    ]


@pytest.mark.parametrize("fields", with_options())
def test_options(fields):
    check(build(small_config(**fields), dtype=torch.float64), tokens(2, 2 * SIZE + 3))


@pytest.mark.parametrize("memory", MEMORY_NAMES)
@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
def test_segments_longer_than_an_inner_chunk(memory, aggregation):
    """Segments of 80 tokens: the linear write cuts them into sub-chunks of 64."""
    fields = {"memory": memory, "aggregation": aggregation, "segment_size": 80, "memory_chunk_size": 16}
    check(build(small_config(**fields), dtype=torch.float64), tokens(1, 165))


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_every_parameter_and_token_has_a_gradient(memory):
    """The comparison above would pass on zeros."""
    model = build(small_config(memory, aggregation="grm"), dtype=torch.float64)
    gradients = check(model, tokens(2, 3 * SIZE + 5))
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 1e-6, name
    assert (gradients["inputs_embeds"].abs().amax(-1) > 1e-9).all()


def test_the_registry_is_covered():
    assert {x["memory"] for x in family()} == set(MEMORY_NAMES)
    assert {x["segmentation"] for x in family()} == set(SEGMENTATIONS)
    plain = [x for x in family() if x["memory"] in ("linear", "retention", "gated_linear", "swla")]
    assert len([x for x in plain if x["segmentation"] == "constant"]) == 4 * (1 + 5 * 2)  # none of these is refused
