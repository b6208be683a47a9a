"""Sparse selection: layers that share their choice of segments, and several summaries per segment."""

import pytest
import torch

from helpers import (
    MEMORY_NAMES,
    SEGMENTATIONS,
    assert_close,
    build,
    combinations,
    name_of,
    relative_error,
    small_config,
    tokens,
)
from mc_transformers import MCCache, MCConfig
from mc_transformers.configuration_mc import CHOICES


SHARED = combinations(
    memory=MEMORY_NAMES,
    segmentation=SEGMENTATIONS,
    aggregation=["ssc"],
    route_sharing=["model"],
    num_hidden_layers=[2],
    num_selected_segments=[1],
)


@pytest.mark.parametrize("fields", SHARED, ids=name_of)
@torch.no_grad()
def test_shared_routes_are_the_same_in_parallel_token_by_token_and_in_pieces(fields: dict) -> None:
    model = build(small_config(**fields), dtype=torch.float64)
    ids = tokens(2, 45)
    model.config.mc_backend = "reference"
    expected = model(ids, use_cache=False).logits
    model.config.mc_backend = "torch"
    assert_close(model(ids, use_cache=False).logits, expected, 1e-10)
    cache = MCCache(config=model.config)
    out = [model(piece, cache=cache).logits for piece in ids.split([20, 1, 1, 23], 1)]
    assert_close(torch.cat(out, 1), expected, 1e-10)
    own = build(small_config(**fields | {"route_sharing": "layer"}), dtype=torch.float64)
    assert relative_error(own(ids, use_cache=False).logits, expected) > 1e-3


def test_shared_routes_are_refused_without_a_choice() -> None:
    for fields in ({"aggregation": "grm"}, {"aggregation": "ssc", "max_cached_segments": 4}):
        with pytest.raises(ValueError, match="route_sharing.*allowed: 'layer'"):
            MCConfig(route_sharing="model", **fields)


@pytest.mark.parametrize("memory", MEMORY_NAMES)
@torch.no_grad()
def test_a_sub_block_can_win_the_choice(memory: str) -> None:
    """With m summaries a segment is chosen by its best sub-block, which one mean over the segment would hide."""
    fields = {"aggregation": "ssc", "num_selected_segments": 1}
    one = build(small_config(memory, **fields))
    four = build(small_config(memory, **fields, summaries_per_segment=4))
    ids = tokens(2, 60)
    assert relative_error(one(ids).logits, four(ids).logits) > 1e-4


@torch.no_grad()
def test_gates_without_segment_context_see_where_a_segment_is_and_not_what_it_holds() -> None:
    kept = {}
    for summary in ("position", "keys"):
        model = build(small_config(aggregation="grm", segment_summary=summary))
        for seed in (0, 1):
            cache = MCCache(config=model.config)
            model(tokens(1, 24, seed=seed), cache=cache)
            kept[summary, seed] = cache.layers[0].tensors["summaries"]
    assert torch.equal(kept["position", 0], kept["position", 1])
    assert not torch.equal(kept["keys", 0], kept["keys", 1])
    assert relative_error(kept["position", 0][:, :1], kept["position", 0][:, 1:2]) > 0.01


class Stored:
    """Kept states `[B, S, H, dk, dv]` of a matrix memory."""

    in_pool = False

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states

    def pieces(self) -> list[tuple[slice, tuple[torch.Tensor]]]:
        return [(slice(None), (self.states,))]

    def stored(self, number: int) -> tuple[torch.Tensor, None]:
        return self.states, None


WEIGHED = combinations(
    aggregation=[x for x in CHOICES["aggregation"] if x != "none"], cached_answers=["mixed", "added"]
)


@pytest.mark.parametrize("fields", WEIGHED, ids=name_of)
def test_gates_are_what_answers_are_multiplied_with(fields):
    """`Aggregation.gates` against the answer of one token."""
    config, added = small_config("linear", **fields), fields["cached_answers"] == "added"
    aggregate = build(config, dtype=torch.float64).model.layers[0].mixer.aggregation
    kept, online = torch.randn(2, 5, 2, 8, 6).double(), torch.randn(2, 2, 8, 6).double()
    q, u, logit = (torch.randn(2, 2, *width).double() for width in ((8,), (8,), ()))
    summaries, scale = torch.randn(2, 5, 2, 1, 8).double(), torch.tensor([0.5, 2.0]).double() if added else None
    visible = torch.tensor([[True, True, False, True, True], [False] * 4 + [True]])
    answer = aggregate.mix_token(q, u, (online,), logit, Stored(kept), summaries, visible, {}, 0, scale)
    given = (u[:, None], logit[:, None], summaries) if aggregate.uses_gates else (None, None, None)
    past, own = (x[:, 0].double() for x in aggregate.gates(*given, visible, scale))
    read = torch.einsum("bhk,bshkv->bshv", q, kept)
    expected = (past.expand(-1, 2, -1).transpose(1, 2)[..., None] * read).sum(1)
    expected = expected + own.expand(-1, 2)[..., None] * torch.einsum("bhk,bhkv->bhv", q, online)
    assert_close(answer, expected, 1e-7)  # constant gates are fp32
    assert (past.expand(2, 2, 5).transpose(1, 2)[~visible] == 0).all()
    if config.aggregation == "ssc":
        assert ((past > 0).sum(-1) == torch.tensor([[2], [1]])).all()
