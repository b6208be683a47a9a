"""generate() with the segment-state cache gives what it gives without any cache."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, set_seed

from helpers import SEGMENTATIONS, VOCAB, assert_close, build, family, name_of, small_config, tokens
from mc_transformers import (
    MCCache,
    MCCacheLayer,
    MCForCausalLM,
    MCForQuestionAnswering,
    MCForSequenceClassification,
    MCForTokenClassification,
)
from mc_transformers.modeling_mc.compat import CACHE_NAME


SIZE = 4
PROMPT, NEW = 11, 9  # the answer crosses two or three segment borders
KINDS = family(aggregation=["none", "grm", "ssc"], state_init=["independent"]) + family(
    memory=["swla"], aggregation=["residual", "soup", "mean"], state_init=["checkpoint"]
)


def model_of(**fields):
    """float64, so that close calls between tokens or beams do not depend on the order of sums."""
    config = {"segment_size": SIZE, "memory_chunk_size": 2, "num_hidden_layers": 2, "pad_token_id": 0} | fields
    return build(small_config(**config), dtype=torch.float64)


@pytest.fixture(scope="module", params=KINDS, ids=name_of)
def model(request):
    return model_of(**request.param)


@pytest.fixture(scope="module", params=SEGMENTATIONS)
def linear(request):
    return model_of(aggregation="ssc", segmentation=request.param)


def generate(model, ids, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows at different positions in their segments; the padding is an ordinary token."""
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    mask[0, :6], mask[2, :1] = 0, 0
    return tokens(3, PROMPT), mask


def test_greedy(model):
    ids = tokens(2, PROMPT)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_scores_of_greedy(model):
    """Not only the best token: the logits of every step are those of one plain pass."""
    ids = tokens(2, PROMPT)
    out = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        plain = model(out.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
    assert_close(torch.stack(out.logits, 1), plain.float(), 1e-5)


def test_left_padded_batch(model):
    """Every row as alone, and the same without a cache."""
    ids, mask = left_padded()
    out = generate(model, ids, attention_mask=mask)
    for row in range(3):
        assert torch.equal(out[row, PROMPT:], generate(model, ids[row, mask[row].bool()][None])[0, -NEW:])
    assert torch.equal(out, generate(model, ids, attention_mask=mask, use_cache=False))


@pytest.mark.parametrize("chunk", [1, 3])
def test_prefill_in_chunks(model, chunk):
    ids, mask = left_padded()
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk), expected)


def beams(model, ids, **options):
    return generate(model, ids, **{"num_beams": 4, "num_return_sequences": 4, "length_penalty": 1.0} | options)


def test_beam_search(model):
    ids, mask = left_padded()
    assert torch.equal(beams(model, ids, attention_mask=mask), beams(model, ids, attention_mask=mask, use_cache=False))


def test_beam_search_needs_the_reordered_cache(linear, monkeypatch):
    """The comparison above sees a cache whose rows stay where they are."""
    ids = tokens(3, PROMPT)
    expected = beams(linear, ids)
    monkeypatch.setattr(MCCacheLayer, "reorder_cache", lambda self, beam_idx: None)
    assert not torch.equal(beams(linear, ids), expected)


def test_sampling(linear):
    ids, mask = left_padded()
    drawn = []
    for use_cache in (True, False):
        set_seed(5)
        options = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5, "attention_mask": mask}
        drawn.append(generate(linear, ids, use_cache=use_cache, **options))
    assert drawn[0].shape == (9, PROMPT + NEW)
    assert torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0].tolist()}) > 3


def test_inputs_embeds(linear):
    ids, mask = left_padded()
    embeds = linear.get_input_embeddings()(ids)
    out = linear.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert torch.equal(out, generate(linear, ids, attention_mask=mask)[:, PROMPT:])


def test_a_dynamic_cache_of_the_config_will_do(linear):
    ids = tokens(2, PROMPT)
    cache = DynamicCache(config=linear.config)
    assert torch.equal(generate(linear, ids, cache=cache), generate(linear, ids))
    assert all(isinstance(layer, MCCacheLayer) for layer in cache.layers)
    assert cache.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize("ends", [PROMPT, PROMPT + 1])
def test_conversation_goes_on_from_a_returned_cache(model, ends):
    """Prompt, answer, more tokens, answer: the second call reads only what is new."""
    ids = tokens(2, ends)
    first = generate(model, ids, return_dict_in_generate=True)
    assert isinstance(first[CACHE_NAME].layers[0], MCCacheLayer)
    longer = torch.cat([first.sequences, tokens(2, 7, seed=5)], 1)
    again = generate(model, longer, cache=first[CACHE_NAME])
    assert torch.equal(again, generate(model, longer, use_cache=False))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_has_two_names(linear, name):
    """That of Transformers since 5.24 and the one before it, in every version."""
    ids = tokens(1, PROMPT)
    cache = MCCache(config=linear.config)
    assert torch.equal(generate(linear, ids, **{name: cache}), generate(linear, ids))
    assert cache.get_seq_length() == PROMPT + NEW - 1
    for head in (MCForCausalLM, MCForSequenceClassification, MCForTokenClassification, MCForQuestionAnswering):
        model = head(linear.config).eval()
        cache = MCCache(config=model.config)
        with torch.no_grad():
            model(ids, **{name: cache})
            assert cache.get_seq_length() == PROMPT
            assert model.model(ids[:, :3], **{name: cache})[CACHE_NAME] is cache
        assert cache.get_seq_length() == PROMPT + 3


def test_two_caches_are_refused(linear):
    caches = {name: MCCache(config=linear.config) for name in ("cache", "past_key_values")}
    for call in (linear, linear.model, linear.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(tokens(1, PROMPT), **caches)


def test_a_cache_that_has_read_the_whole_prompt_is_refused(linear):
    """Transformers would read the prompt once more."""
    ids = tokens(1, PROMPT)
    cache = MCCache(config=linear.config)
    with torch.no_grad():
        linear(ids, cache=cache)
    for options in ({}, {"prefill_chunk_size": 3}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="at least one more"):
            generate(linear, ids, cache=cache, **options)
    with pytest.raises(ValueError, match="at least one more"):
        generate(linear, ids[:, -2:], cache=cache)  # only what is new
    assert cache.get_seq_length() == PROMPT


def test_a_prompt_cache_serves_several_answers(linear):
    """One prefilled row, repeated for a batch of questions."""
    prompt, questions = tokens(1, PROMPT), tokens(3, 5, seed=8)
    cache = MCCache(config=linear.config)
    with torch.no_grad():
        linear(prompt, cache=cache)
    cache.batch_repeat_interleave(3)
    ids = torch.cat([prompt.expand(3, -1), questions], 1)
    assert torch.equal(generate(linear, ids, cache=cache), generate(linear, ids, use_cache=False))


def test_hybrid():
    layers = {"num_hidden_layers": 3, "layer_types": ["memory_caching", "full_attention", "sliding_attention"]}
    model = model_of(**layers, sliding_window=3, num_key_value_heads=1)
    ids, mask = left_padded()
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 3}):
        with_cache = generate(model, ids, attention_mask=mask, **options)
        options.pop("prefill_chunk_size", None)
        assert torch.equal(with_cache, generate(model, ids, attention_mask=mask, use_cache=False, **options))


# ------------------------------------------------------------------------------------------------- what a cache holds
def feed(model, length: int, rows: int = 1) -> MCCache:
    cache = MCCache(config=model.config)
    with torch.no_grad():
        model(tokens(rows, length), cache=cache)
    return cache


@pytest.mark.parametrize("fields", family(aggregation=["none", "grm"], state_init=["independent"]), ids=name_of)
def test_memory_grows_by_a_state_per_segment_not_per_token(fields):
    model = model_of(**fields)
    sizes = [feed(model, SIZE * n).nbytes for n in range(1, 18)]
    for offset in range(1, SIZE):
        assert feed(model, SIZE * 8 + offset).nbytes == sizes[7]  # within a segment: nothing
    growth = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]
    if fields["aggregation"] == "none":
        assert set(growth) == {0}
    elif fields["segmentation"] == "constant":
        assert len(set(growth)) == 1 and growth[0] > 0
    else:  # one more level when the number of segments doubles
        assert [n + 2 for n, x in enumerate(growth) if x > 0] == [2, 4, 8, 16]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_num_segments_and_nbytes(linear, one_by_one):
    cache = MCCache(config=linear.config)
    with torch.no_grad():
        for piece in tokens(2, 3 * SIZE + 1).split(1 if one_by_one else 100, dim=1):
            linear(piece, cache=cache)
    assert cache.get_seq_length() == 3 * SIZE + 1
    assert cache.num_segments == (3 if linear.config.segmentation == "constant" else 2)  # 3 = 2 + 1
    held = sum(t.nbytes for layer in cache.layers for t in layer.tensors.values())
    assert cache.nbytes == held > 0
    assert MCCache(config=linear.config).nbytes == MCCache(config=linear.config).num_segments == 0


def test_a_segment_costs_what_the_equations_say(linear):
    """Bytes of one finished segment: a dk x dv state and a descriptor per head and layer, in fp32 (here float64)."""
    per_head = 8 * 6 + 8
    slots = {"constant": 1, "logarithmic": 2}[linear.config.segmentation]  # a level: its running state, its slot
    assert feed(linear, 2 * SIZE).nbytes - feed(linear, SIZE).nbytes == slots * 2 * 2 * per_head * 8


def test_reset_select_and_repeat(linear):
    """A cache follows its rows, and is as new after reset."""
    ids, more = tokens(3, PROMPT), tokens(3, 6, seed=4)
    with torch.no_grad():
        expected = linear(torch.cat([ids, more], 1), use_cache=False).logits[:, PROMPT:]
        cache = feed_ids(linear, ids)
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert_close(linear(more[[2, 0]], cache=cache).logits, expected[[2, 0]], 1e-10)
        cache = feed_ids(linear, ids)
        cache.batch_repeat_interleave(2)
        assert_close(linear(more.repeat_interleave(2, 0), cache=cache).logits, expected.repeat_interleave(2, 0), 1e-10)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
        whole = linear(torch.cat([ids, more], 1), cache=cache).logits[:, PROMPT:]
        assert_close(whole, expected, 1e-10)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_by_itself(linear, duplicate, tmp_path):
    ids, more = tokens(2, PROMPT), tokens(2, 6, seed=4)
    with torch.no_grad():
        expected = linear(torch.cat([ids, more], 1), use_cache=False).logits[:, PROMPT:]
        cache = feed_ids(linear, ids)
        other = duplicate(cache)
        linear(tokens(2, 9, seed=7), cache=cache)
        assert_close(linear(more, cache=other).logits, expected, 1e-10)
    other.save_pretrained(tmp_path)


def feed_ids(model, ids) -> MCCache:
    cache = MCCache(config=model.config)
    model(ids, cache=cache)
    return cache


# ----------------------------------------------------------------------------------------------------------- refusals
OTHERS = {
    "memory": {"memory": "retention"},
    "aggregation": {"aggregation": "grm"},
    "state_init": {"state_init": "checkpoint"},
    "segment_size": {"segment_size": 2 * SIZE},
    "summaries_per_segment": {"summaries_per_segment": 2},
    "gate_source": {"gate_source": "query"},
    "heads": {"num_attention_heads": 1},
    "key_dim": {"head_dim": 4},
    "value_dim": {"value_head_dim": 4},
    "conv_kernel_size": {"conv_kernel_size": 2},
}


@pytest.mark.parametrize("field", OTHERS)
def test_the_cache_of_another_model_is_refused(linear, field):
    cache = feed(linear, PROMPT)
    other = model_of(**{"aggregation": "ssc", "segmentation": linear.config.segmentation} | OTHERS[field])
    with pytest.raises(ValueError, match=f"another model.*{field}"):
        other(tokens(1, 3), cache=cache)


def test_the_cache_of_another_batch_is_refused(linear):
    cache = feed(linear, PROMPT, rows=2)
    with pytest.raises(ValueError, match="2 rows.* 3"):
        linear(tokens(3, 1), cache=cache)
    with pytest.raises(ValueError, match="2 rows.* 1"):
        generate(linear, tokens(1, PROMPT + 3), cache=cache)


def test_end_of_text_stops_a_row(linear):
    """Finished rows are padded and do not disturb the others."""
    ids = tokens(3, PROMPT)
    free = generate(linear, ids)
    stop = int(free[0, PROMPT + 2])
    out = generate(linear, ids, eos_token_id=stop)
    for row in range(3):
        answer = free[row, PROMPT:].tolist()
        length = answer.index(stop) + 1 if stop in answer else NEW
        assert out[row, PROMPT : PROMPT + length].tolist() == answer[:length]
        assert (out[row, PROMPT + length :] == 0).all()
    assert VOCAB > stop
