"""Standing at an earlier border of what was read (`MCCache.at_segment`, `rewind`): as if no more had been read."""

import copy

import pytest
import torch

from helpers import MEMORY_NAMES, assert_close, build, combinations, family, name_of, small_config, tokens
from mc_transformers import MCCache


CONSTANT = family(segmentation=["constant"])
HYBRIDS = [
    {"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2},
    {"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2, "attention": "qwen3"},
]
INITS = ["independent", "checkpoint"]
OTHERS = [
    *combinations(memory=MEMORY_NAMES, online_memory=["running"]),
    *combinations(
        memory=["gated_linear", "swla"], state_init=["independent", "checkpoint"], max_cached_segments=[2, 9]
    ),
    {"rope": "all"},
    {"conv_kernel_size": 0},
    {"conv_kernel_size": 0, "memory": "titans", "state_init": "checkpoint"},
    {"num_hidden_layers": 2, "segment_summary": "hidden", "summaries_per_segment": 2},
    {"segment_size": 3, "conv_kernel_size": 6, "memory": "swla", "state_init": "checkpoint"},
    *HYBRIDS,
]


def read(model, ids, pieces, **options) -> MCCache:
    cache = MCCache(config=model.config, keep_borders=True, **options)
    for piece in ids.split(pieces, 1):
        model(piece, cache=cache)
    return cache


@pytest.mark.parametrize("fields", CONSTANT + OTHERS, ids=name_of)
@torch.no_grad()
def test_what_follows_is_as_if_no_more_had_been_read(fields: dict) -> None:
    """Read at once, and in pieces with single tokens over a border; the first cache is as it was afterwards."""
    model = build(small_config(**fields), dtype=torch.float64)
    size = model.config.segment_size
    ids, other = tokens(2, 3 * size + 2), tokens(2, size + 2, seed=9)
    expected = {n: model(torch.cat([ids[:, : n * size], other], 1)).logits[:, n * size :] for n in (1, 2, 3)}
    for pieces in ([3 * size + 2], [size - 1, 1, size - 1, 1, 1, size + 1]):
        cache = read(model, ids, pieces)
        for number, logits in expected.items():
            if model.config.max_cached_segments == 2 and number < 3:
                if number == 1:
                    with pytest.raises(ValueError, match="oldest one left"):
                        cache.at_segment(number)
                continue
            there = cache.at_segment(number)
            assert there.get_seq_length() == number * size
            # token by token, a segment is written that must not come into the first cache
            rest = other.split([1] * (size + 1) + [1], 1) if number == 2 else [other]
            out = torch.cat([model(piece, cache=there).logits for piece in rest], 1)
            assert_close(out, logits, 1e-10, f"{pieces[:3]}, border {number}")
    full = model(torch.cat([ids, other], 1)).logits[:, ids.shape[1] :]
    assert_close(model(other, cache=cache).logits, full, 1e-10, "the cache that others were taken of")


@torch.no_grad()
def test_the_first_cache_goes_on_without_changing_the_other() -> None:
    """Bounded: a slot that both share is taken by another segment in the first."""
    model = build(small_config(max_cached_segments=2), dtype=torch.float64)
    ids = tokens(1, 40)
    cache = read(model, ids[:, :16], [16])
    there = cache.at_segment(2)
    assert there.layers[0].tensors["kept.0"].data_ptr() == cache.layers[0].tensors["kept.0"].data_ptr()
    for t in range(16, 40):
        model(ids[:, t : t + 1], cache=cache)
    assert_close(model(ids[:, 16:], cache=there).logits, model(ids).logits[:, 16:], 1e-10)


@torch.no_grad()
def test_rows_with_padding_stand_side_by_side() -> None:
    model = build(small_config("gated_delta", num_hidden_layers=2), dtype=torch.float64)
    ids, mask = tokens(2, 37), torch.ones(2, 37, dtype=torch.long)
    mask[0, :5] = 0
    for pieces in ([37], [1] * 37, [20, 17]):
        cache = MCCache(config=model.config, keep_borders=True)
        done = 0
        for piece in ids.split(pieces, 1):
            done += piece.shape[1]
            model(piece, attention_mask=mask[:, :done], cache=cache)
        assert cache.rewind(31) == 24 and cache.get_seq_length() == 24
        more = tokens(2, 9, seed=4)
        rows = [torch.cat([ids[0, 5:29], more[0]]), torch.cat([ids[1, :24], more[1]])]
        assert_close(model(more, cache=cache).logits, model(torch.stack(rows)).logits[:, 24:], 1e-10)


@pytest.mark.parametrize("fields", [{}, {"memory": "titans", "state_init": "checkpoint"}, *HYBRIDS], ids=name_of)
@torch.no_grad()
def test_rewind_answers_another_question(fields: dict) -> None:
    """`generate` after a conversation whose last question changes reads from the last border that both share."""
    model = build(small_config(**fields))
    ids, new = tokens(1, 37), {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    cache = MCCache(config=model.config, keep_borders=True)
    first = model.generate(ids, cache=cache, **new)
    for same, other in ((30, tokens(1, 11, seed=5)), (17, tokens(1, 3, seed=6)), (3, tokens(1, 12, seed=7))):
        text = torch.cat([first[:, :same], other], 1)
        assert cache.rewind(same) == same // 8 * 8
        assert torch.equal(model.generate(text, cache=cache, **new), model.generate(text, **new))


@torch.no_grad()
def test_a_sliding_window_stands_where_it_remembers() -> None:
    fields = {"layer_types": ["sliding_attention", "memory_caching"], "num_hidden_layers": 2, "sliding_window": 20}
    model = build(small_config(**fields), dtype=torch.float64)
    ids, other = tokens(1, 43), tokens(1, 9, seed=2)
    cache = read(model, ids[:, :19], [19])
    for number in (1, 2):
        text = torch.cat([ids[:, : 8 * number], other], 1)
        out = model(other, cache=cache.at_segment(number)).logits
        assert_close(out, model(text).logits[:, 8 * number :], 1e-10)
    model(ids[:, 19:], cache=cache)
    with pytest.raises(ValueError, match="sliding window has forgotten the tokens before 24.*from 43 on"):
        cache.at_segment(5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
@torch.no_grad()
def test_rounded_states(dtype: torch.dtype, init: str) -> None:
    """The running state is noted as it was, not taken from the rounded one."""
    model = build(small_config("gated_linear", state_init=init))
    ids, other = tokens(1, 35), tokens(1, 12, seed=2)
    cache, short = (read(model, ids[:, : sum(n)], n, state_dtype=dtype) for n in ([16, 1, 18], [16]))
    there = cache.at_segment(2)
    assert there.layers[0].tensors["kept.0"].dtype == dtype
    assert_close(model(other, cache=there).logits, model(other, cache=short).logits, 1e-5)


@torch.no_grad()
def test_borders_survive_beams_copies_and_crops() -> None:
    model = build(small_config("titans", state_init="checkpoint"), dtype=torch.float64)
    ids, other = tokens(2, 37), tokens(2, 9, seed=3)
    cache = read(model, ids[:, :20], [20])
    cache.activate_past_recording()
    model(tokens(2, 17, seed=8), cache=cache)
    cache.crop(-17)
    for layer in cache.layers:
        layer.record_past = False
    model(ids[:, 20:], cache=cache)
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    text = torch.cat([ids[[1, 0], :24], other], 1)
    assert_close(model(other, cache=cache.at_segment(3).at_segment(3)).logits, model(text).logits[:, 24:], 1e-10)


@torch.no_grad()
def test_what_cannot_be_stood_at(tmp_path) -> None:
    for fields, message in (
        ({"segmentation": "logarithmic"}, "`segmentation`='logarithmic'"),
        ({"max_cached_segments": 2, "cache_eviction": "least_read"}, "`cache_eviction`='least_read'"),
    ):
        model = build(small_config(**fields))
        cache = MCCache(config=model.config)
        model(tokens(1, 20), cache=cache)
        with pytest.raises(ValueError, match=message):
            cache.at_segment(1)
    model = build(small_config(**HYBRIDS[0]))
    cache = MCCache(config=model.config)
    with pytest.raises(ValueError, match="no longer known, or nothing was read"):
        cache.at_segment(0)
    mask = torch.ones(2, 20, dtype=torch.long)
    model(tokens(2, 20), attention_mask=mask, cache=cache)
    for number in (-1, 3, 1.0, True):
        with pytest.raises(ValueError, match=f"`number`={number} is not valid, allowed: 0 to 2"):
            cache.at_segment(number)
    with pytest.raises(ValueError, match="`tokens`=21 is not valid, allowed: 0 to 20"):
        cache.rewind(21)
    with pytest.raises(ValueError, match="border 1 was not noted.*keep_borders=True"):
        cache.at_segment(1)
    for layer in cache.memory_layers:
        layer.keep_borders = True  # from here on only
    model(tokens(2, 9), cache=cache)
    cache.at_segment(3)
    with pytest.raises(ValueError, match="border 2 was not noted"):
        cache.at_segment(2)
    cache.save_pretrained(tmp_path)  # without borders
    loaded = MCCache.from_pretrained(tmp_path, model, keep_borders=True)
    with pytest.raises(ValueError, match="border 3 was not noted"):
        loaded.at_segment(3)
    cache.reset()
    assert cache.at_segment(0).get_seq_length() == 0 and cache.rewind(0) == 0
    mask[0, :4] = 0
    model(tokens(2, 20), attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match="have read padding"):
        cache.at_segment(1)
    assert cache.rewind(5) == 0
