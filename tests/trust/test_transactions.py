"""A cache after a forward that did not end, or that two threads use: refused, or right, never wrong without a word."""

import copy
import ctypes
import pickle
import random
import threading
import time

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers import assert_close, build, small_config, tokens
from mc_transformers import MCCache


class Planted(Exception):
    """An error that a test has planted."""


KINDS = {
    "grm": {},
    "hybrid": {"layer_types": ["memory_caching", "full_attention", "memory_caching"]},
    "least_read": {"max_cached_segments": 2, "cache_eviction": "least_read"},
}


def make(kind: str):
    return build(small_config("gated_linear", num_hidden_layers=3, **KINDS[kind]))


def break_at(module, after: int = 0):
    """Raises in the `after`-th call of a module."""
    calls = iter(range(10**9))

    def hook(*args):
        if next(calls) == after:
            raise Planted

    return module.register_forward_pre_hook(hook)


def uses(model, cache, tmp_path):
    """Everything that goes on from what a cache holds."""
    ids = tokens(1, 3)
    yield lambda: model(ids, cache=cache)
    yield lambda: model.generate(**cache.prompt(ids), cache=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
    yield lambda: cache.save_pretrained(tmp_path, model)
    yield lambda: cache.crop(-1)
    yield lambda: model(ids, cache=copy.deepcopy(cache))
    yield lambda: model(ids, cache=pickle.loads(pickle.dumps(cache)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_error_in_a_forward(kind, tmp_path):
    """Wherever it comes: before anything is written the cache is as it was; later every use is refused."""
    model, ids = make(kind), tokens(1, 30)
    places = [part for layer in model.model.layers for part in (layer, layer.mlp)] + [model.model.norm, model.lm_head]
    for number, place in enumerate(places):
        cache = MCCache(config=model.config)
        model(ids[:, :20], cache=cache)
        handle = break_at(place)
        with pytest.raises(Planted):
            model(ids[:, 20:], cache=cache)
        handle.remove()
        for use in uses(model, cache, tmp_path):
            with pytest.raises(ValueError, match="`cache` is broken: .*reset"):
                use()
        assert not list(tmp_path.iterdir())
        cache.reset()
        assert_close(model(ids, cache=cache).logits, model(ids).logits, 1e-5)
        assert number or not cache.memory_layers[0].transaction.broken


@torch.no_grad()
def test_a_refused_input_leaves_the_cache_as_it_was():
    model, ids = make("grm"), tokens(2, 30)
    cache = MCCache(config=model.config)
    model(ids[:, :20], cache=cache)
    for wrong in ({"input_ids": ids[:1, 20:]}, {"input_ids": ids[:, 20:].float()}, {}):
        with pytest.raises(ValueError):
            model(**wrong, cache=cache)
    with pytest.raises(RuntimeError, match="cannot remove"):
        cache.crop(-1)
    assert_close(model(ids[:, 20:], cache=cache).logits, model(ids).logits[:, 20:], 1e-5)


@torch.no_grad()
def test_an_error_while_tokens_are_taken_back():
    model, ids = make("grm"), tokens(1, 30)
    cache = MCCache(config=model.config)
    for layer in cache.layers:
        layer.activate_past_recording()
    model(ids, cache=cache)
    handle = break_at(model.model.layers[1].mixer.memory)
    with pytest.raises(Planted):
        cache.crop(-3)
    handle.remove()
    with pytest.raises(ValueError, match="`cache` is broken"):
        model(ids[:, 27:], cache=cache)


@torch.no_grad()
def test_layers_at_different_tokens():
    """Whatever has brought them there."""
    model = make("grm")
    cache = MCCache(config=model.config)
    model(tokens(1, 9), cache=cache)
    cache.layers[1].num_tokens += 1
    with pytest.raises(ValueError, match=r"layers have read \[9, 10, 9\] tokens"):
        model(tokens(1, 2), cache=cache)


def interrupt(thread: int) -> None:
    """What Ctrl-C does to the main thread, for any thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


GREEDY = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def generate_interrupted(model, ids: torch.Tensor, seconds: float) -> MCCache:
    """The cache of a `generate` that Ctrl-C stops after so many seconds, or that ends before."""
    cache = MCCache(config=model.config)
    timer = threading.Timer(seconds, interrupt, [threading.get_ident()])
    timer.start()
    try:
        model.generate(ids, cache=cache, **GREEDY)
        timer.cancel()
        time.sleep(0.01)
    except KeyboardInterrupt:
        pass
    timer.join()
    return cache


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_interrupted_at_random_moments(kind):
    """Ctrl-C in `generate`: what the cache says it has read it has, or it is refused."""
    model, ids, moments = make(kind), tokens(1, 12), random.Random(0)
    whole = model.generate(ids, **GREEDY)
    logits, refused = model(whole).logits, 0
    for _ in range(8):
        cache = generate_interrupted(model, ids, moments.uniform(0.0, 0.15))
        seen = int(cache.get_seq_length())
        try:
            found = model(whole[:, seen : seen + 3], cache=cache).logits
        except ValueError as error:
            assert "broken" in str(error)
            refused += 1
            continue
        assert_close(found, logits[:, seen : seen + 3], 1e-4)


@torch.no_grad()
def test_two_threads_on_one_cache():
    """One of two forwards at once is refused, or they come one after the other; copies are independent."""
    model, ids = make("grm"), tokens(1, 40)
    started, go = threading.Event(), threading.Event()

    def wait(*args):
        started.set()
        assert go.wait(20)

    cache = MCCache(config=model.config)
    model(ids[:, :20], cache=cache)
    apart = copy.deepcopy(cache)
    handle, result = model.model.layers[1].register_forward_pre_hook(wait), []
    with_grad_off = torch.no_grad()(lambda: result.append(model(ids[:, 20:], cache=cache).logits))
    thread = threading.Thread(target=with_grad_off)
    thread.start()
    assert started.wait(20)
    handle.remove()
    for use in (lambda: model(ids[:, 20:23], cache=cache), lambda: cache.prompt(ids[:, :2])):
        with pytest.raises(ValueError, match="in use by another forward"):
            use()
    assert_close(model(ids[:, 20:], cache=apart).logits, model(ids).logits[:, 20:], 1e-5)
    go.set()
    thread.join()
    assert_close(result[0], model(ids).logits[:, 20:], 1e-5)
    model(ids[:, :2], cache=cache)  # free again


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
@torch.no_grad()
def test_caches_of_transformers(make_cache):
    model, ids = make("grm"), tokens(1, 30)
    cache = make_cache(config=model.config)
    model(ids[:, :20], cache=cache)
    handle = break_at(model.model.layers[2])
    with pytest.raises(Planted):
        model(ids[:, 20:], cache=cache)
    handle.remove()
    with pytest.raises(ValueError, match="`cache` is broken"):
        model(ids[:, 20:], cache=cache)
    cache.reset()
    assert_close(model(ids, cache=cache).logits, model(ids).logits, 1e-5)
