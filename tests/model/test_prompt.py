"""Asking a memory: `cache.prompt` gives `generate` a question, as if the whole text stood before it."""

import pytest
import torch

from helpers import build, name_of, small_config, tokens
from mc_transformers import MCCache


HYBRID = {"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2}
KINDS = [
    {"memory": "gated_linear", "aggregation": "ssc"},
    {"memory": "titans", "state_init": "checkpoint"},
    {"segmentation": "logarithmic"},
    HYBRID,
    HYBRID | {"layer_types": ["sliding_attention", "memory_caching"], "sliding_window": 5},
    HYBRID | {"layer_types": ["full_attention"] * 2},
]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def left_padded(lengths: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids, width = tokens(len(lengths), max(lengths), seed=seed), max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_the_answer_is_that_of_the_whole_text(fields: dict) -> None:
    """Two rows, questions of unlike length, and then a second question to what has grown by the first answer."""
    model = build(small_config(**fields))
    document, (first, mask) = tokens(2, 27), left_padded([5, 3])
    second, cache = tokens(2, 4, seed=3), MCCache(config=model.config)
    model(document, cache=cache)
    prompt = cache.prompt(first, mask)
    assert [tuple(x.shape) for x in prompt.values()] == [(2, 32)] * 2
    out = model.generate(**prompt, cache=cache, **NEW)
    text, known = torch.cat([document, first], 1), torch.cat([torch.ones_like(document), mask], 1)
    expected = model.generate(text, attention_mask=known, **NEW)
    assert torch.equal(out[:, 32:], expected[:, 32:])
    assert not torch.equal(out[:, 32:], model.generate(first, attention_mask=mask, **NEW)[:, 5:])  # it was read

    known = torch.cat([known, torch.ones_like(expected[:, 32:-1]), torch.ones_like(second)], 1)
    text = torch.cat([expected[:, :-1], second], 1)  # the last token was written and not read
    again = model.generate(**cache.prompt(second, known if "layer_types" in fields else None), cache=cache, **NEW)
    assert torch.equal(again[:, -6:], model.generate(text, attention_mask=known, **NEW)[:, -6:])


def test_every_kind_of_cache(tmp_path) -> None:
    """One of a file, one of joined documents, rows repeated for several questions; the dictionary of a
    tokenizer; and an empty one, which leaves the text as it is."""
    model, document, question = build(small_config("gated_linear")), tokens(1, 27), tokens(1, 5, seed=2)
    expected = model.generate(torch.cat([document, question], 1), **NEW)[:, 32:]
    cache = MCCache(config=model.config)
    model(document, cache=cache)
    cache.save_pretrained(tmp_path)
    loaded = MCCache.from_pretrained(tmp_path, model)
    joined, repeated = MCCache.cat([loaded], model), MCCache.from_pretrained(tmp_path, model)
    for some in (cache, loaded, joined):
        encoded = {"input_ids": question, "attention_mask": torch.ones_like(question)}
        answer = model.generate(**some.prompt(**encoded), cache=some, **NEW)
        assert torch.equal(answer[:, 32:], expected)
    repeated.batch_repeat_interleave(3)
    questions = torch.cat([question, tokens(2, 5, seed=4)])
    answers = model.generate(**repeated.prompt(questions.int()), cache=repeated, **NEW)
    assert torch.equal(answers[:1, 32:], expected)
    empty = MCCache(config=model.config)
    prompt = empty.prompt(question)
    assert torch.equal(prompt["input_ids"], question) and bool((prompt["attention_mask"] == 1).all())
    assert torch.equal(model.generate(**prompt, cache=empty, **NEW), model.generate(question, **NEW))


def test_what_cannot_be_asked() -> None:
    model = build(small_config(**HYBRID))
    (document, mask), cache, ids = left_padded([20, 11]), MCCache(config=model.config), tokens(2, 4)
    model(document, attention_mask=mask, cache=cache)
    for wrong, message in (
        (ids[:, :0], r"rows, tokens.*got \(2, 0\)"),
        (ids[0], r"got \(4,\) of torch.int64"),
        (ids.float(), "got .* of torch.float32"),
        ([1, 2], "got list"),
        (ids[:1], "1 rows and the cache 2.*batch_repeat_interleave"),
    ):
        with pytest.raises(ValueError, match=f"`input_ids`.*{message}"):
            cache.prompt(wrong)
    for wrong, message in (
        (torch.ones(2, 5), r"shape \(2, 4\) or, with what was read, \(2, 24\), got \(2, 5\)"),
        (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "ends with padding"),
        (None, "new tokens only.*mask of all 24 tokens"),
    ):
        with pytest.raises(ValueError, match=f"`attention_mask`.*{message}"):
            cache.prompt(ids, wrong)
    whole = torch.cat([mask, torch.ones_like(ids)], 1)
    out = model.generate(**cache.prompt(ids, whole), cache=cache, **NEW)
    expected = model.generate(torch.cat([document, ids], 1), attention_mask=whole, **NEW)
    assert torch.equal(out[:, 24:], expected[:, 24:])
    plain = build(small_config())  # memory layers alone count each row's real tokens, and need no mask of the document
    cache = MCCache(config=plain.config)
    plain(document, attention_mask=mask, cache=cache)
    out = plain.generate(**cache.prompt(ids), cache=cache, **NEW)
    expected = plain.generate(torch.cat([document, ids], 1), attention_mask=whole, **NEW)
    assert torch.equal(out[:, 24:], expected[:, 24:])
