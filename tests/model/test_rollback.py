"""Rolling a cache back (speculative decoding), static caches and compiled decoding."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from helpers import MEMORY_NAMES, SEGMENTATIONS, assert_close, build, combinations, name_of, small_config, tokens
from mc_transformers import MCCache
from mc_transformers.configuration_mc import CHOICES
from mc_transformers.modeling_mc.compat import CACHE_NAME


KINDS = combinations(memory=MEMORY_NAMES, segmentation=SEGMENTATIONS, aggregation=["grm", "ssc"])
HYBRIDS = [
    {"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2},
    {"layer_types": ["sliding_attention", "memory_caching"], "num_hidden_layers": 2, "sliding_window": 5},
]
BOUNDED = [{"max_cached_segments": 2, "cache_eviction": who} for who in CHOICES["cache_eviction"]]
VARIANTS = [{"memory": "swla", "state_init": "checkpoint"}, {"aggregation": "residual"}, {"aggregation": "none"}]
VERSION = Version(transformers.__version__)
IS_OLD = VERSION < Version("5.23")
OLD = pytest.mark.skipif(
    IS_OLD,
    reason="sliding-window layers of older versions, 5.16 at least, return more than their mask covers when recording",
)
ALL = [*KINDS, HYBRIDS[0], pytest.param(HYBRIDS[1], marks=OLD), *BOUNDED, *VARIANTS]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield


@pytest.mark.parametrize("fields", ALL, ids=name_of)
@torch.no_grad()
def test_crop_leaves_no_trace(fields: dict) -> None:
    """Tokens that are taken back leave nothing: before, at and across segment borders, in two forwards, from empty."""
    model = build(small_config(**fields))
    ids = tokens(2, 37)
    full = model(ids).logits
    for before, recorded, removed in [(20, 7, 3), (20, 7, 7), (15, 6, 5), (16, 1, 1), (0, 20, 13)]:
        cache = MCCache(config=model.config)
        if before:
            model(ids[:, :before], cache=cache)
        cache.activate_past_recording()
        draft = ids[:, before : before + recorded].clone()
        kept = recorded - removed
        draft[:, kept:] = (draft[:, kept:] + 5) % 60
        model(draft[:, :1], cache=cache)
        if recorded > 1:
            model(draft[:, 1:], cache=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == before + kept
        rest = model(ids[:, before + kept :], cache=cache).logits
        assert_close(rest, full[:, before + kept :], what=f"{before}, {recorded} - {removed}")


@torch.no_grad()
def test_crop_of_padded_rows_and_repeated_rounds() -> None:
    model = build(small_config(segment_size=4))
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    full = model(ids, attention_mask=mask).logits
    cache = MCCache(config=model.config)
    cache.activate_past_recording()
    done = 0
    for size in (9, 5, 6, 5, 8):
        draft = ids[:, done : done + size].clone()
        draft[:, 3:] = (draft[:, 3:] + 7) % 60
        seen = torch.cat([mask[:, : done + 3], torch.ones(2, size - 3, dtype=torch.long)], 1)
        model(draft, attention_mask=seen, cache=cache)
        cache.crop(-(size - 3))
        done += 3
    rest = model(ids[:, done:], attention_mask=mask, cache=cache).logits
    assert_close(rest, full[:, done:])


@pytest.mark.parametrize("fields", [{}, {"segmentation": "logarithmic"}, *BOUNDED], ids=name_of)
@torch.no_grad()
def test_a_record_costs_one_copy_of_what_is_kept(fields: dict) -> None:
    """Tokens decoded one by one while recording: the snapshot stays as it was, and is copied once, not every token."""
    model = build(small_config(**fields))
    ids = tokens(2, 40)
    full = model(ids).logits
    cache = MCCache(config=model.config)
    model(ids[:, :20], cache=cache)
    cache.activate_past_recording()
    kept = []
    for t in range(20, 36):
        model((ids[:, t : t + 1] + 5) % 60, cache=cache)
        kept.append(cache.layers[0].tensors["kept.0"])
    assert len({id(stack) for stack in kept}) < len(kept) // 2
    cache.crop(-16)
    assert_close(model(ids[:, 20:], cache=cache).logits, full[:, 20:], what="after the crop")


@torch.no_grad()
def test_crop_without_a_record_is_refused() -> None:
    model = build(small_config())
    cache = model(tokens(1, 9), use_cache=True)[CACHE_NAME]
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


@pytest.mark.parametrize("fields", [{}, {"aggregation": "ssc", "memory": "swla"}, *HYBRIDS], ids=name_of)
def test_speculative_decoding_gives_the_greedy_tokens(fields: dict) -> None:
    model = build(small_config(**fields))
    ids, length = tokens(1, 21), {"max_new_tokens": 24, "do_sample": False}
    greedy = model.generate(ids, **length)
    assert torch.equal(greedy, model.generate(ids, **length, prompt_lookup_num_tokens=4))
    small = build(small_config(num_hidden_layers=1, hidden_size=16), seed=1)
    assert torch.equal(greedy, model.generate(ids, **length, assistant_model=small))
    llama = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    target = AutoModelForCausalLM.from_config(llama).eval()
    expected = target.generate(ids, **length)
    assert torch.equal(expected, target.generate(ids, **length, assistant_model=small))


@pytest.mark.skipif(VERSION < Version("5.24"), reason="Transformers refuses this before 5.24")
@pytest.mark.parametrize("fields", [{"memory": "titans", "aggregation": "soup"}, {"memory": "gru"}], ids=name_of)
def test_speculative_decoding_with_a_static_cache(fields: dict) -> None:
    model = build(small_config(**fields))
    ids, options = tokens(1, 21), {"max_new_tokens": 24, "do_sample": False}
    greedy = model.generate(ids, **options)
    small = build(small_config(num_hidden_layers=1, hidden_size=16), seed=1)
    for drafts in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": small}):
        assert torch.equal(greedy, model.generate(ids, **options, **drafts, cache_implementation="static"))


def test_speculative_decoding_begins_with_an_empty_cache() -> None:
    """Transformers hands over the whole text at first, whatever the cache has read."""
    model = build(small_config())
    ids, cache = tokens(1, 21), MCCache(config=model.config)
    for option in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": model}):
        with torch.no_grad():
            model(ids[:, :15], cache=cache)
        with pytest.raises(ValueError, match="empty cache"):
            model.generate(ids, cache=cache, max_new_tokens=4, **option)
        cache.reset()
        model.generate(ids, cache=cache, max_new_tokens=4, **option)
        cache.reset()


def test_nothing_is_recorded_after_speculative_decoding() -> None:
    """A conversation that goes on with the same cache, without drafts, would keep the input of every token."""
    model = build(small_config())
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(tokens(1, 21), **options, prompt_lookup_num_tokens=4)
    model.generate(out.sequences, **options, cache=out[CACHE_NAME])
    assert not any(layer.record_past or layer.recorded for layer in out[CACHE_NAME].layers)


@pytest.mark.skipif(IS_OLD, reason="5.16 at least takes early drafts back without having asked to record")
@pytest.mark.parametrize("fields", [{}, {"layer_types": ["full_attention", "memory_caching"]}], ids=name_of)
def test_drafts_by_an_early_exit(fields: dict) -> None:
    """Drafts of the first layer alone change no token, and leave the model as it was."""
    model = build(small_config(num_hidden_layers=2, **fields))
    ids, length = tokens(1, 21), {"max_new_tokens": 24, "do_sample": False}
    greedy = model.generate(ids, **length)
    assert torch.equal(greedy, model.generate(ids, **length, assistant_early_exit=1))
    assert torch.equal(greedy, model.generate(ids, **length))


@pytest.mark.parametrize("fields", KINDS[::3] + HYBRIDS + BOUNDED + VARIANTS + [{"rope": "all"}], ids=name_of)
@torch.no_grad()
def test_static_cache_generates_the_same(fields: dict) -> None:
    model = build(small_config(**{"num_hidden_layers": 2} | fields))
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = 0
    length = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **length)
    assert torch.equal(expected, model.generate(ids, **length, cache_implementation="static"))
    assert torch.equal(expected, model.generate(ids, **length, cache_implementation="static", prefill_chunk_size=5))


@pytest.mark.parametrize("fields", KINDS[1::4] + HYBRIDS[:1] + BOUNDED + VARIANTS[1:], ids=name_of)
@torch.no_grad()
def test_compiled_decoding_never_recompiles(fields: dict) -> None:
    """One graph for every position: segment borders, new segments and new levels change no shape and no branch."""
    model = build(small_config(**fields))
    ids = tokens(1, 37)
    full = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(ids[:, :6], cache=cache)
    addresses = {
        name: t.data_ptr() for layer in cache.layers if hasattr(layer, "tensors") for name, t in layer.tensors.items()
    }
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    out = [step(ids[:, t : t + 1], cache=cache, position_ids=torch.tensor([[t]])).logits for t in range(6, 37)]
    assert counter.frame_count == 1
    assert addresses == {
        name: t.data_ptr() for layer in cache.layers if hasattr(layer, "tensors") for name, t in layer.tensors.items()
    }
    assert_close(torch.cat(out, 1), full[:, 6:])


# how many tokens a static cache for 20 tokens can take: slots and levels are for 2 segments of 8 tokens
ENDS = [
    ({"memory": "swla"}, 24),
    ({"memory": "dla"}, 24),
    ({"aggregation": "residual"}, 24),
    ({"memory": "titans", "segmentation": "logarithmic"}, 32),
    *((fields, 50) for fields in [*BOUNDED, {"aggregation": "none"}]),
]
STATIC = [{"memory": "swla"}, {"memory": "dla"}, {"memory": "titans", "segmentation": "logarithmic"}, *BOUNDED]


def addresses(cache: StaticCache) -> list[dict[str, int]]:
    return [{name: t.data_ptr() for name, t in layer.tensors.items()} for layer in cache.layers]


@pytest.mark.parametrize("fields", STATIC, ids=name_of)
@torch.no_grad()
def test_static_cache_can_be_reset_and_cropped(fields: dict) -> None:
    model = build(small_config(**{"num_hidden_layers": 2} | fields))
    ids = tokens(2, 30)
    full = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(tokens(2, 19, seed=5), cache=cache)
    before = addresses(cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert_close(model(ids[:, :15], cache=cache).logits, full[:, :15])
    assert addresses(cache) == before
    cache.activate_past_recording()
    model((ids[:, 15:22] + 3) % 60, cache=cache)
    cache.crop(-7)
    assert_close(model(ids[:, 15:], cache=cache).logits, full[:, 15:])


@pytest.mark.parametrize("fields, end", ENDS, ids=str)
@torch.no_grad()
def test_static_cache_beyond_its_length(fields: dict, end: int) -> None:
    """It goes on as long as it has slots for segments, and never overwrites one that is still to be read."""
    model = build(small_config(**fields))
    ids = tokens(1, 50)
    full, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=20)
    out = [model(ids[:, :15], cache=cache).logits]
    out += [model(ids[:, t : t + 1], cache=cache).logits for t in range(15, end - 1)]
    assert_close(torch.cat(out, 1), full[:, : end - 1])
    if end < 50:
        with pytest.raises(ValueError, match="room for the segments of 20 tokens.*max_cache_len"):
            model(ids[:, end - 1 : end], cache=cache)


def test_static_cache_leaves_inference_mode() -> None:
    """Filled, even made, in inference mode; reset and filled again outside of it."""
    model = build(small_config(num_hidden_layers=2))
    ids = tokens(2, 30)
    with torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(tokens(2, 19, seed=5), cache=cache)
    cache.reset()
    with torch.no_grad():
        model(ids[:, :15], cache=cache)
        assert_close(model(ids[:, 15:], cache=cache).logits, model(ids).logits[:, 15:])


@pytest.mark.parametrize("fields", STATIC, ids=name_of)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_plain_caches_roll_back_to_nothing(kind: type, fields: dict) -> None:
    """They record from the start, so that the snapshot is an empty cache."""
    model = build(small_config(**fields))
    ids = tokens(1, 20)
    cache = kind(config=model.config, **({"max_cache_len": 20} if kind is StaticCache else {}))
    cache.activate_past_recording()
    model(ids, cache=cache)
    cache.crop(-9)
    assert_close(model(ids[:, 11:], cache=cache).logits, model(ids).logits[:, 11:])
