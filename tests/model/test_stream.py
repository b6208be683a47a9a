"""A text without an end: what a stream says is what a bounded model says, in constant memory, at any position."""

import copy
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from helpers import assert_close, build, name_of, small_config, tokens
from mc_transformers import MCCache, MCModel, Stream
from mc_transformers.modeling_mc.attention import rotate


SIZE, KEPT = 4, 3
FIELDS = {"segment_size": SIZE, "memory_chunk_size": 2, "num_hidden_layers": 2}
KINDS = [
    {"memory": "gated_linear", "aggregation": "grm"},
    {"memory": "gated_linear", "aggregation": "grm", "cache_eviction": "least_read"},
    {"memory": "titans", "aggregation": "ssc"},
    {"memory": "gated_delta", "aggregation": "residual", "state_init": "checkpoint"},
    {"memory": "lstm", "aggregation": "grm"},
]
ENDLESS = [
    {"memory": "gated_linear", "aggregation": "none"},
    {"memory": "gated_linear", "aggregation": "grm", "segmentation": "logarithmic"},
]


def model_of(fields: dict, dtype: torch.dtype = torch.float64, **more):
    eviction = {name: x for name, x in fields.items() if name == "cache_eviction"}
    others = {name: x for name, x in fields.items() if name not in eviction}
    return build(small_config(**FIELDS | others | more), dtype=dtype), eviction


def stream_of(fields: dict, **options) -> tuple[Stream, torch.nn.Module]:
    """A stream, and the model with its bound."""
    model, eviction = model_of(fields)
    bound = {} if fields in ENDLESS else {"max_cached_segments": KEPT, **eviction}
    return Stream(model, **bound, **options), model_of(fields, **bound)[0]


@pytest.mark.parametrize("fields", KINDS + ENDLESS, ids=name_of)
def test_pieces_of_any_length_are_one_text(fields):
    stream, model = stream_of(fields, rows=2, piece=7)
    ids = tokens(2, 61)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    expected = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    first, second, third, fourth, fifth = ids.split([19, 1, 17, 4, 20], 1)
    found = [stream.score(first), stream.score(second)]
    aside = stream.score(third, keep=False)
    found.append(stream.score(third))
    assert torch.equal(aside, found[-1])
    stream.feed(fourth)
    assert stream.num_tokens == 41
    hidden = stream.hidden_states(fifth, keep=False)
    found.append(stream.score(fifth))
    scores = torch.cat([*found[:-1], expected[:, 36:40].float(), found[-1]], 1)
    assert scores[:, 0].isnan().all()
    assert_close(scores[:, 1:].double(), expected, 1e-6)
    assert_close(hidden, out.hidden_states[-1][:, 41:], 1e-9)
    assert_close(stream.logits, out.logits[:, -1], 1e-9)


@pytest.mark.parametrize("fields", KINDS + ENDLESS, ids=name_of)
def test_next_tokens_are_those_of_generate(fields):
    stream, model = stream_of(fields)
    ids = tokens(1, 30)
    expected = model.generate(ids, max_new_tokens=11, do_sample=False, eos_token_id=None)[:, 30:]
    stream.feed(ids)
    assert torch.equal(stream.next_tokens(11), expected)
    assert torch.equal(stream.next_tokens(5, keep=True), expected[:, :5]) and stream.num_tokens == 35
    assert torch.equal(stream.next_tokens(6), expected[:, 5:])
    stop = expected[0, 6].item()
    assert torch.equal(stream.next_tokens(6, stop=stop), expected[:, 5:7]) or stop == expected[0, 5]
    cold = LogitsProcessorList([TemperatureLogitsWarper(1e-4)])
    assert torch.equal(stream.next_tokens(6, do_sample=True, logits_processor=cold), expected[:, 5:])


def test_the_model_stays_as_it_is_and_shares_its_weights():
    model, _ = model_of({"memory": "linear"})
    stream = Stream(model, max_cached_segments=KEPT, cache_eviction="least_read")
    assert model.config.max_cached_segments is None and model.config.cache_eviction == "oldest"
    assert stream.model.config.max_cached_segments == KEPT
    mine, theirs = (dict(x.named_parameters()) for x in (model, stream.model))
    assert all(theirs[name] is parameter for name, parameter in mine.items()) and mine.keys() == theirs.keys()
    cache = MCCache(model.config)
    model(tokens(1, 10 * SIZE), cache=cache)
    assert cache.num_segments == 10
    assert Stream(stream.model).model is stream.model


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_memory_is_constant(fields):
    stream, _ = stream_of(fields)
    stream.feed(tokens(2 * KEPT * SIZE))
    shapes = [{n: t.shape for n, t in layer.tensors.items()} for layer in stream.cache.memory_layers]
    size = stream.nbytes
    for seed in range(5):
        stream.feed(tokens(37, seed=seed))
        assert stream.nbytes == size and stream.num_segments == KEPT
    assert shapes == [{n: t.shape for n, t in layer.tensors.items()} for layer in stream.cache.memory_layers]
    for layer in stream.cache.memory_layers:  # nothing is a view of something larger
        assert all(t.untyped_storage().nbytes() <= 2 * t.nbytes for t in layer.tensors.values())


def test_no_drift():
    """After any text, a bounded cache says what a fresh pass over all that it can know of says: for L layers of S
    segments each, the last L (S + 1) segments, the convolutions' reach included."""
    stream, model = stream_of(KINDS[0])
    ids = tokens(1, 200 * SIZE + 3)
    stream.feed(ids[:, :-9])
    start = ((ids.shape[1] - 10) // SIZE - 2 * (KEPT + 1)) * SIZE
    with torch.no_grad():
        logits = model(ids[:, start:]).logits
        less = model(ids[:, start + 3 * SIZE :]).logits[:, -1]
    expected = logits[:, -10:-1].log_softmax(-1).gather(-1, ids[:, -9:, None])[..., 0]
    assert_close(stream.score(ids[:, -9:]).double(), expected, 1e-6)
    assert_close(stream.logits, logits[:, -1], 1e-9)
    assert (stream.logits - less).abs().max() > 1e-6  # and not less than that


# ------------------------------------------------------------------------------------------------------ large numbers
def move(stream: Stream, segments: int) -> None:
    """Pretend that the stream has read `segments` segments more before it began; a multiple of its slots."""
    for layer in stream.cache.memory_layers:
        layer.tensors["position"] = layer.tensors["position"] + segments * SIZE
        layer.num_tokens += segments * SIZE
        if "segment" in layer.tensors:
            held = layer.tensors["segment"]
            layer.tensors["segment"] = torch.where(held >= 0, held + segments, held)


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
@pytest.mark.parametrize("power", [30, 31, 32, 38])
def test_positions_and_counters_beyond_31_bits(fields, power, tmp_path):
    """In whole pieces, token by token, and through a file."""
    near, _ = stream_of(fields)
    near.feed(tokens(1, 45))
    far = copy.deepcopy(near)
    move(far, 2**power * KEPT)
    assert far.num_tokens == 2**power * KEPT * SIZE + 45
    ids = tokens(1, 50, seed=5)
    for part in ids.split([21, 1, 1, 1, 1, 1, 24], 1):
        assert_close(far.score(part), near.score(part), 1e-6)
    assert torch.equal(far.next_tokens(9), near.next_tokens(9))
    far.save(tmp_path)
    again = Stream.load(tmp_path, near.model)
    assert again.num_tokens == far.num_tokens and torch.equal(again.next_tokens(9), far.next_tokens(9))


def test_rotary_positions_are_relative_at_any_position():
    q, k, place = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), torch.arange(5)[None]

    def scores(start: int) -> torch.Tensor:
        return torch.einsum("bthd,bshd->bhts", rotate(q, place + start, 10_000.0), rotate(k, place + start, 10_000.0))

    for start in (2**24 + 1, 2**31 + 7, 2**40):
        assert_close(scores(start), scores(0), 1e-5 if start < 2**35 else 1e-3)


def test_gates_received_are_counted_for_ever():
    """A segment that is read all the time: 2^25 tokens in, one more still counts."""
    stream, _ = stream_of(KINDS[1])
    stream.feed(tokens(1, 45))
    layer = stream.cache.memory_layers[0]
    layer.tensors["received"] = layer.tensors["received"] + 2.0**25
    before = layer.tensors["received"].clone()
    stream.feed(tokens(1, 1))
    moved = (layer.tensors["received"] - before).sum().item()
    assert 1e-4 < moved < 1


# -------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("fields", KINDS + ENDLESS, ids=name_of)
def test_saved_and_loaded_it_goes_on_bit_for_bit(fields, tmp_path):
    stream, _ = stream_of(fields, rows=2, state_dtype="int4" if fields in KINDS[::2] else torch.int8)
    stream.feed(tokens(2, 33))
    stream.save(tmp_path)
    given, _ = model_of(fields)
    again = Stream.load(tmp_path, given)
    assert again.num_tokens == 33 and again.rows == 2 and again.nbytes == stream.nbytes
    assert torch.equal(again.score(tokens(2, 20, seed=2)), stream.score(tokens(2, 20, seed=2)))
    cache = MCCache.from_pretrained(tmp_path, stream.model)  # it is a memory file, too
    assert cache.get_seq_length() == 33


def test_files_that_are_not_believed(tmp_path):
    stream, model = stream_of(KINDS[0])
    with pytest.raises(ValueError, match="empty cache"):
        stream.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        Stream.load(tmp_path, model)
    with torch.no_grad():
        model(tokens(1, 9), cache=(cache := MCCache(model.config)))
    cache.save_pretrained(tmp_path / "memory")
    with pytest.raises(ValueError, match="of no stream"):
        Stream.load(tmp_path / "memory", model)
    stream.feed(tokens(9))
    stream.save(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        Stream.load(tmp_path, build(small_config(**FIELDS | KINDS[0]), dtype=torch.float64, seed=3))
    stream._state.last = torch.full_like(stream._state.last, torch.inf)
    stream.save(tmp_path)
    with pytest.raises(ValueError, match="stream.hidden"):
        Stream.load(tmp_path, model)


def _read_and_save(folder: str) -> None:
    stream, _ = stream_of(KINDS[0])
    for piece in range(10_000):
        stream.feed(tokens(1, 11, seed=piece))
        stream.save(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_between_two_saves_it_loses_what_came_since(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_read_and_save, args=(str(tmp_path),))
    file = tmp_path / "memory.safetensors"
    process.start()
    try:
        end = time.time() + 60
        while not file.exists() or file.stat().st_size == 0:
            assert time.time() < end and process.is_alive()
            time.sleep(0.002)
        time.sleep(0.2)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    again = Stream.load(tmp_path, model_of(KINDS[0])[0])
    pieces, rest = divmod(again.num_tokens, 11)
    assert pieces >= 1 and rest == 0
    whole, _ = stream_of(KINDS[0])
    for piece in range(pieces):
        whole.feed(tokens(1, 11, seed=piece))
    assert torch.equal(again.logits, whole.logits)
    again.feed(tokens(1, 11, seed=pieces))
    again.save(tmp_path)
    assert Path(file).exists() and Stream.load(tmp_path, again.model).num_tokens == 11 * (pieces + 1)


# ---------------------------------------------------------------------------------------------------------- refusals
def test_what_grows_is_refused():
    model, _ = model_of({"memory": "linear"})
    with pytest.raises(ValueError, match="`max_cached_segments`=None"):
        Stream(model)
    hybrid = {"layer_types": ["memory_caching", "full_attention"], "num_key_value_heads": 2}
    with pytest.raises(ValueError, match="full attention"):
        Stream(model_of({"memory": "linear"}, **hybrid)[0], max_cached_segments=2)
    with pytest.raises(ValueError, match="max_cached_segments"):
        Stream(model, max_cached_segments=0)
    for name in ("rows", "piece"):
        with pytest.raises(ValueError, match=f"`{name}`=0"):
            Stream(model, max_cached_segments=2, **{name: 0})


def test_sliding_attention_may_stand_in_between():
    fields = {"layer_types": ["memory_caching", "sliding_attention"], "num_key_value_heads": 2, "sliding_window": 8}
    model, _ = model_of({"memory": "linear"}, **fields, max_cached_segments=2)
    stream, ids = Stream(model, piece=7), tokens(1, 40)
    stream.feed(ids)
    with torch.no_grad():
        assert_close(stream.logits, model(ids).logits[:, -1], 1e-9)


def test_bad_calls():
    stream, _ = stream_of(KINDS[0])
    for call in (lambda: stream.logits, lambda: stream.next_tokens(3)):
        with pytest.raises(ValueError, match="nothing was read yet"):
            call()
    for ids in (tokens(2, 5), torch.empty(1, 0, dtype=torch.long), torch.randn(1, 5)):
        with pytest.raises(ValueError, match="`ids` must be"):
            stream.feed(ids)
    with pytest.raises(ValueError, match="no scores"):
        stream.score(torch.randn(1, 5, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="`max_new_tokens`=0"):
        stream.next_tokens(0)
    decoder = Stream(build(small_config(**FIELDS), MCModel), max_cached_segments=2)
    decoder.feed(torch.randn(1, 9, 24))
    with pytest.raises(ValueError, match="no head"):
        decoder.score([1, 2])


def test_embeddings_are_read_too():
    stream, model = stream_of(KINDS[0])
    ids = tokens(1, 30)
    stream.feed(model.get_input_embeddings()(ids))
    with torch.no_grad():
        assert_close(stream.logits, model(ids).logits[:, -1], 1e-9)
    stream.reset()
    assert stream.num_tokens == 0
    stream.feed(ids)
    with torch.no_grad():
        assert_close(stream.logits, model(ids).logits[:, -1], 1e-9)
