"""Prompts that begin alike (`PrefixStore`): what a hit gives is what a fresh read gives, or it is no hit."""

import json
import threading

import pytest
import torch

from helpers import MEMORY_NAMES, assert_close, build, combinations, family, name_of, small_config, tokens
from mc_transformers import MCCache, MCConfig, MCForCausalLM, PrefixStore
from mc_transformers.modeling_mc import prefix_store
from mc_transformers.modeling_mc.memory_file import FILE


SIZE = 8
LARGE = 10**8
NEW = {"max_new_tokens": SIZE + 2, "min_new_tokens": SIZE + 2, "do_sample": False}
HYBRIDS = [
    {"layer_types": [kind, "memory_caching"], "num_hidden_layers": 2, "sliding_window": window} | more
    for kind, window, more in (
        ("full_attention", None, {}),
        ("full_attention", None, {"attention": "qwen3", "rope": "all"}),
        ("sliding_attention", 5, {}),
        ("sliding_attention", 20, {"state_init": "checkpoint"}),
        ("full_attention", None, {"layer_types": ["full_attention"] * 2}),
    )
]
KINDS = [
    *family(segmentation=["constant"], memory=["gated_linear", "titans"]),
    {"memory": "swla", "state_init": "checkpoint"},
    *combinations(memory=MEMORY_NAMES),
    *combinations(memory=["swla", "titans"], online_memory=["running"]),
    *combinations(memory=["gated_delta"], state_init=["independent", "checkpoint"], max_cached_segments=[2]),
    {"num_hidden_layers": 2, "segment_summary": "hidden", "summaries_per_segment": 2, "conv_kernel_size": 0},
    {"aggregation": "ssc", "num_hidden_layers": 2, "route_sharing": "model"},
    *HYBRIDS,
]


def logits_of(model, ids, mask=None, **options) -> torch.Tensor:
    """The logits of the tokens that `generate` adds."""
    out = model.generate(ids, attention_mask=mask, **NEW, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_a_hit_is_a_fresh_read(fields: dict) -> None:
    """Another end, a longer text, a prefix, and prompts that end at a border or a token beside it."""
    model = build(small_config(**fields), dtype=torch.float64)
    store, ids = PrefixStore(model, LARGE), tokens(1, 45)
    assert_close(logits_of(model, ids, prefix_store=store), logits_of(model, ids), 1e-9, "a miss")
    saved = 0
    for same, more in ((45, 0), (44, 7), (24, 0), (25, 0), (9, 3)):
        text = torch.cat([ids[:, :same], tokens(1, more, seed=same)], 1)
        expected = logits_of(model, text)
        assert_close(logits_of(model, text, prefix_store=store), expected, 1e-9, f"{same} + {more}")
        saved += min(same, text.shape[1] - 1, 40) // SIZE * SIZE
        assert store.stats()["tokens_saved"] == saved
    assert store.stats()["hits"] == 5 and store.stats()["misses"] == 1 and store.stats()["evictions"] == 0


@pytest.mark.parametrize("fields", [{}, {"memory": "titans", "state_init": "checkpoint"}, *HYBRIDS], ids=name_of)
def test_rows_of_a_batch_and_padding(fields: dict) -> None:
    """Rows of unlike length, one of a single token; the second finds what the first has stored."""
    model = build(small_config(**fields), dtype=torch.float64)
    store, ids = PrefixStore(model, LARGE), tokens(1, 45).repeat(4, 1)
    ids[1, 30:] = tokens(1, 15, seed=7)
    mask = torch.ones(4, 45, dtype=torch.long)
    for row, length in ((2, 20), (3, 1)):
        ids[row] = ids[0].roll(45 - length)
        mask[row, : 45 - length] = 0
    for _ in range(2):
        assert_close(logits_of(model, ids, mask, prefix_store=store), logits_of(model, ids, mask), 1e-9)
    assert store.stats()["tokens_saved"] == 24 + 16 + 40 + 40 + 16
    pads = ids[:1].clone()
    pads[0, :6] = 60
    for more in ({}, {"num_beams": 3}):
        options = {"pad_token_id": 60, **NEW, **more}
        assert torch.equal(model.generate(pads, **options, prefix_store=store), model.generate(pads, **options))
    drawn = []
    for options in ({}, {"prefix_store": store}):
        torch.manual_seed(0)
        drawn.append(model.generate(ids[:1], num_return_sequences=2, do_sample=True, max_new_tokens=8, **options))
    assert torch.equal(*drawn)


def test_the_cache_of_the_caller_goes_on() -> None:
    model = build(small_config())
    store, ids = PrefixStore(model, LARGE), tokens(1, 30)
    for _ in range(2):
        cache = MCCache(config=model.config)
        first = model.generate(ids, cache=cache, prefix_store=store, **NEW)
        more = torch.cat([first, tokens(1, 5, seed=3)], 1)
        assert torch.equal(model.generate(more, cache=cache, **NEW), model.generate(more, **NEW))
    with pytest.raises(ValueError, match="`cache` has read something already"):
        model.generate(more, cache=cache, prefix_store=store, **NEW)
    assert store.stats()["hits"] == 1


@pytest.mark.parametrize(
    "fields, options",
    [
        ({"segmentation": "logarithmic"}, {}),
        ({"max_cached_segments": 2, "cache_eviction": "least_read"}, {}),
        ({"state_init": "checkpoint"}, {"state_dtype": torch.int8}),
        ({}, {"offload_segments": True}),
        ({}, {"cache_implementation": "static"}),
        ({}, {"use_cache": False}),
        ({}, {"prompt_lookup_num_tokens": 3}),
        ({}, {"middle": True}),
    ],
    ids=str,
)
def test_what_cannot_be_exact_is_a_counted_miss(fields: dict, options: dict) -> None:
    model = build(small_config(**fields))
    store, ids, options = PrefixStore(model, LARGE), tokens(1, 30), dict(options)
    if options.pop("middle", False):
        options["attention_mask"] = torch.ones(1, 30, dtype=torch.long)
        options["attention_mask"][0, 4] = 0
    cache = {k: options.pop(k) for k in ("state_dtype", "offload_segments") if k in options}
    for _ in range(2):
        mine = [{"cache": MCCache(config=model.config, **cache)} if cache else {} for _ in range(2)]
        out = model.generate(ids, prefix_store=store, **options, **NEW, **mine[0])
        assert torch.equal(out, model.generate(ids, **options, **NEW, **mine[1]))
    found = store.stats()
    assert (found["hits"], found["misses"], found["unsupported"], found["segments"]) == (0, 2, 2, 0)


def test_the_least_recently_used_leave_first() -> None:
    model = build(small_config())
    store = PrefixStore(model, LARGE)
    texts = [tokens(1, 33, seed=seed) for seed in range(4)]
    model.generate(texts[0], prefix_store=store, **NEW)
    one = store.stats()["bytes"]
    assert one > 0 and store.stats()["segments"] == 4
    store = PrefixStore(model, 2 * one + one // 2)
    for text in (texts[0], texts[1], texts[0][:, :17], texts[2]):
        model.generate(text, prefix_store=store, **NEW)
        assert store.stats()["bytes"] <= store.max_bytes
    assert store.stats()["evictions"] == 2 and store.stats()["segments"] == 10
    before = store.stats()["tokens_saved"]
    for text, saved in ((texts[2], 32), (texts[0], 16), (texts[1], 16)):  # first the end of the first has left
        model.generate(text, prefix_store=store, **NEW)
        assert store.stats()["tokens_saved"] - before == saved
        before = store.stats()["tokens_saved"]
    small = PrefixStore(model, one // 2)  # not enough for one prompt: its beginning is kept
    for _ in range(2):
        assert torch.equal(model.generate(texts[0], prefix_store=small, **NEW), model.generate(texts[0], **NEW))
    assert small.stats()["tokens_saved"] == 16 and small.stats()["segments"] == 2
    small.clear()
    assert small.stats()["bytes"] == 0


def test_a_collision_is_no_hit(monkeypatch) -> None:
    """All segments under one hash, and all that lie equally deep."""
    model = build(small_config())
    for weak in (lambda parent, ids: b"same", lambda parent, ids: parent[:1] + b"."):
        monkeypatch.setattr(prefix_store, "_hash", weak)
        store = PrefixStore(model, LARGE)
        for seed in range(4):
            ids = tokens(1, 33, seed=seed)
            assert torch.equal(model.generate(ids, prefix_store=store, **NEW), model.generate(ids, **NEW))
        ids[:, :SIZE] = tokens(1, 33, seed=0)[:, :SIZE]  # the first segment is known, and others lie behind its key
        assert torch.equal(model.generate(ids, prefix_store=store, **NEW), model.generate(ids, **NEW))
        assert store.stats()["collisions"] >= 3


def test_another_model_and_other_weights() -> None:
    model, other = build(small_config()), build(small_config(), seed=5)
    store, ids = PrefixStore(model, LARGE), tokens(1, 30)
    model.generate(ids, prefix_store=store, **NEW)
    with pytest.raises(ValueError, match="`prefix_store` was made for another model"):
        other.generate(ids, prefix_store=store, **NEW)
    with torch.no_grad():
        model.model.layers[0].mixer.k_proj.weight.mul_(-1)
    assert torch.equal(model.generate(ids, prefix_store=store, **NEW), model.generate(ids, **NEW))
    assert store.stats()["hits"] == 0
    model.read_as("ssc", 1)
    assert torch.equal(model.generate(ids, prefix_store=store, **NEW), model.generate(ids, **NEW))
    assert store.stats()["hits"] == 0
    model.half().float()  # other values, and the bytes of their dtype
    model.generate(ids, prefix_store=store, **NEW)
    assert store.stats()["hits"] == 0
    for value in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="`max_bytes`=.* is not valid"):
            PrefixStore(model, value)
    with pytest.raises(ValueError, match="must be a model of this family"):
        PrefixStore(torch.nn.Linear(2, 2), 1)


def test_adapters_that_are_switched_off() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(small_config()), peft.LoraConfig(target_modules=["k_proj", "o_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    store, ids = PrefixStore(model.base_model.model, LARGE), tokens(1, 30)
    with_adapter = model.generate(input_ids=ids, prefix_store=store, **NEW)
    assert torch.equal(with_adapter, model.generate(input_ids=ids, **NEW)) and store.stats()["segments"] == 3
    with model.disable_adapter():
        expected = model.generate(input_ids=ids, **NEW)
        assert not torch.equal(expected, with_adapter)
        assert torch.equal(model.generate(input_ids=ids, prefix_store=store, **NEW), expected)


@pytest.mark.parametrize("fields", [{}, HYBRIDS[2]], ids=name_of)
def test_a_folder_serves_the_next_process(fields: dict, tmp_path) -> None:
    model = build(small_config(**fields))
    ids = tokens(1, 33)
    model.generate(ids, prefix_store=PrefixStore(model, LARGE, tmp_path), **NEW)
    files = sorted(tmp_path.rglob("*"))
    assert [x.name for x in files if x.is_file()] == [FILE] * 4
    store = PrefixStore(model, LARGE, tmp_path)
    text = torch.cat([ids[:, :30], tokens(1, 9, seed=2)], 1)
    assert torch.equal(model.generate(text, prefix_store=store, **NEW), model.generate(text, **NEW))
    assert store.stats()["tokens_saved"] == 24 and store.stats()["segments"] == 4
    other = build(small_config(**fields), seed=3)
    for name in (x.parent for x in files if x.is_file()):  # other weights, whose keys are other names
        assert name.name not in {f"{k.hex()}" for k in PrefixStore(other, LARGE, tmp_path)._known}
    theirs = PrefixStore(other, LARGE, tmp_path)
    assert torch.equal(other.generate(ids, prefix_store=theirs, **NEW), other.generate(ids, **NEW))
    assert theirs.stats()["hits"] == 0


def test_damaged_files_are_no_hits(tmp_path) -> None:
    model, other = build(small_config()), build(small_config(), seed=3)
    ids = tokens(1, 33)
    for folder, someone in (("a", model), ("b", other)):
        someone.generate(ids, prefix_store=PrefixStore(someone, LARGE, tmp_path / folder), **NEW)
    mine, theirs = (sorted((tmp_path / folder).glob(f"*/{FILE}")) for folder in "ab")
    expected = model.generate(ids, **NEW)
    whole = {path: path.read_bytes() for path in mine}

    def damaged(data: bytes) -> None:
        for path in mine:
            path.write_bytes(data if data else theirs[0].read_bytes())
        store = PrefixStore(model, LARGE, tmp_path / "a")
        with pytest.warns(UserWarning, match="a file is not used"):
            assert torch.equal(model.generate(ids, prefix_store=store, **NEW), expected)
        assert store.stats()["hits"] == 0 and store.stats()["refused"] == 1

    some = whole[mine[0]]
    flipped = some[:-9] + bytes([some[-9] ^ 1]) + some[-8:]
    for data in (b"", some[: len(some) // 2], b"\x80\x04rest of a pickle", flipped):
        damaged(data)
    for path in mine:  # a file of the same model under the name of another segment
        path.write_bytes(whole[mine[(mine.index(path) + 1) % len(mine)]])
    store = PrefixStore(model, LARGE, tmp_path / "a")
    with pytest.warns(UserWarning, match="of another model or text"):
        assert torch.equal(model.generate(ids, prefix_store=store, **NEW), expected)


def test_a_folder_of_bounded_size(tmp_path) -> None:
    model = build(small_config())
    model.generate(tokens(1, 17), prefix_store=PrefixStore(model, LARGE, tmp_path), **NEW)
    one = next(tmp_path.rglob(FILE)).stat().st_size
    store = PrefixStore(model, LARGE, tmp_path, max_folder_bytes=4 * one)
    for seed in range(5):
        model.generate(tokens(1, 17, seed=seed), prefix_store=store, **NEW)
        assert sum(path.stat().st_size for path in tmp_path.rglob(FILE)) <= 4 * one
    assert store.stats()["segments"] == 10


@pytest.mark.parametrize("fields", [{}, {"state_init": "checkpoint", "memory": "titans"}], ids=name_of)
def test_wrong_states_are_seen(fields: dict) -> None:
    """What the tests above would miss if hits did not matter: states zeroed, and rows that take each other's."""
    model = build(small_config(**fields))
    store, ids = PrefixStore(model, LARGE), tokens(2, 30)
    expected = model.generate(ids, **NEW)
    assert torch.equal(model.generate(ids, prefix_store=store, **NEW), expected)
    assert torch.equal(model.generate(ids, prefix_store=store, **NEW), expected)
    begins = [row[:SIZE].numpy().tobytes() for row in ids]
    first = [next(x for x in store._known.values() if x.parent is None and x.ids == begin) for begin in begins]
    first[0].parts, first[1].parts = first[1].parts, first[0].parts
    assert not torch.equal(model.generate(ids, prefix_store=store, **NEW), expected)
    for prefix in store._known.values():
        for part in prefix.parts:
            for name, tensor in part.items():
                tensor.mul_(not name.startswith("kept."))
    assert not torch.equal(model.generate(ids, prefix_store=store, **NEW), expected)


def test_threads_share_a_store() -> None:
    """A small one, so that segments leave while others put theirs together."""
    model = build(small_config())
    texts = [torch.cat([tokens(1, 20), tokens(1, 14, seed=seed)], 1) for seed in range(6)]
    expected = [model.generate(text, **NEW) for text in texts]
    store, wrong = PrefixStore(model, 12_000), []

    def ask(number: int) -> None:
        for turn in range(6):
            index = (number + turn) % 6
            if not torch.equal(model.generate(texts[index], prefix_store=store, **NEW), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.stats()
    assert not wrong and found["hits"] + found["misses"] == 18 and found["evictions"] and found["hits"]


def test_models_with_their_segments_longer_than_prompts() -> None:
    config = MCConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = MCForCausalLM(config).eval()
    store = PrefixStore(model, LARGE)
    for length in (1, 2, 50):
        ids = tokens(1, length)
        assert torch.equal(model.generate(ids, prefix_store=store, **NEW), model.generate(ids, **NEW))
    assert store.stats()["misses"] == 3 and json.dumps(store.stats())
