"""Bounded, offloaded and quantised memories, memories as files, and joined memories."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StaticCache

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
from mc_transformers import MCCache, MCForCausalLM
from mc_transformers.configuration_mc import CHOICES
from mc_transformers.kernels.step.decode import unpack
from mc_transformers.modeling_mc import cache as mc_cache
from mc_transformers.modeling_mc.cache_layer import MCCacheLayer, MCStaticCacheLayer
from mc_transformers.modeling_mc.compat import CACHE_NAME
from mc_transformers.modeling_mc.memory_file import FILE


AGGREGATIONS = [a for a in CHOICES["aggregation"] if a != "none"]
BOUNDED = combinations(
    memory=["linear", "swla"],
    aggregation=AGGREGATIONS,
    state_init=CHOICES["state_init"],
    cache_eviction=CHOICES["cache_eviction"],
    max_cached_segments=[3],
)


@pytest.mark.parametrize("fields", BOUNDED, ids=name_of)
@torch.no_grad()
def test_bounded_cache_is_the_same_in_one_pass_in_pieces_and_token_by_token(fields: dict) -> None:
    model = build(small_config(**fields), dtype=torch.float64)
    ids, mask = tokens(2, 61), torch.ones(2, 61, dtype=torch.long)
    mask[0, :5], mask[1, -3:] = 0, 0
    model.config.mc_backend = "reference"
    expected = model(ids, attention_mask=mask).logits * mask[..., None]
    model.config.mc_backend = "torch"
    assert_close(model(ids, attention_mask=mask, use_cache=False).logits * mask[..., None], expected, 1e-10)
    for pieces in ([5, 1, 55], [60, 1], [8, 53], [1] * 61):
        cache, out, done = MCCache(config=model.config), [], 0
        for piece in ids.split(pieces, 1):
            done += piece.shape[1]
            out.append(model(piece, attention_mask=mask[:, :done], cache=cache).logits)
        assert_close(torch.cat(out, 1) * mask[..., None], expected, 1e-10, str(pieces[:3]))
        assert cache.num_segments == 3 and cache.layers[0].tensors["kept.0"].shape[1] == 3


@torch.no_grad()
def test_who_leaves_a_full_cache() -> None:
    """ "oldest" forgets the first segment; "least_read" keeps it when it is what the tokens ask for."""
    base = {
        "aggregation": "grm",
        "segment_size": 4,
        "max_cached_segments": 2,
        "gate_source": "query",
        "conv_kernel_size": 0,
        "qk_norm": False,
    }
    kept = {}
    for who in CHOICES["cache_eviction"]:
        model = build(small_config(**base, cache_eviction=who))
        mixer = model.model.layers[0].mixer
        mixer.k_proj.weight.copy_(mixer.q_proj.weight)  # a token asks for segments of tokens like itself
        mixer.k_proj.weight.mul_(3)
        mixer.q_proj.weight.mul_(3)
        cache = MCCache(config=model.config)
        same, other = torch.full((1, 4), 7), torch.full((1, 4), 9)
        first = model(same, cache=cache)[CACHE_NAME].layers[0].tensors["kept.0"][:, 0].clone()
        for piece in (other, same, same, same):
            model(piece, cache=cache)
        stack = cache.layers[0].tensors["kept.0"]
        kept[who] = any(torch.equal(stack[:, i], first) for i in range(2))
    # with these tokens all segments of `same` have the same state, so one of them must be there in both cases
    assert kept["oldest"] and kept["least_read"]
    segments = cache.layers[0].tensors["segment"]
    assert 1 not in segments  # the segment of other tokens was read least


@pytest.mark.parametrize("memory", MEMORY_NAMES)
@torch.no_grad()
def test_offloaded_states_are_exact_and_quantised_ones_close(memory: str) -> None:
    model = build(small_config(memory, aggregation="grm", head_dim=16))
    ids = tokens(1, 45)
    full = model(ids).logits[:, 30:]
    errors = {}
    for name, options in {
        "offload": {"offload_segments": True},
        "bf16": {"state_dtype": torch.bfloat16},
        "int8": {"state_dtype": torch.int8},
        "int4": {"state_dtype": "int4"},
    }.items():
        cache = MCCache(config=model.config, **options)
        model(ids[:, :30], cache=cache)
        out = [model(ids[:, t : t + 1], cache=cache).logits for t in range(30, 45)]
        errors[name] = relative_error(torch.cat(out, 1), full)
        errors[name + " bytes"] = cache.nbytes
    plain = MCCache(config=model.config)
    model(ids, cache=plain)
    assert errors["offload"] < 1e-4 < errors["int8"] < errors["int4"] and errors["int8"] < 0.2 and errors["bf16"] < 0.1
    assert errors["int4 bytes"] < errors["int8 bytes"] < errors["bf16 bytes"] < plain.nbytes


@pytest.mark.parametrize("dtype, top", [(torch.int8, 127), ("int4", 7)])
@pytest.mark.parametrize("memory", ["linear", "titans", "lstm"])
@torch.no_grad()
def test_rounding_of_quantised_states(memory: str, dtype: torch.dtype | str, top: int) -> None:
    """Of a first layer, whose states do not depend on what is read: nothing is off by more than half a step, a step is
    a `top`th of the largest number in a row of a state, which has the code `top`. In one pass and per token."""
    model = build(small_config(memory, segment_size=4), dtype=torch.float64)
    ids = tokens(2, 30)
    exact, coded = MCCache(model.config), MCCache(model.config, state_dtype=dtype)
    for cache in (exact, coded):
        for piece in ids.split([17] + [1] * 13, 1):
            model(piece, cache=cache)
    for i, state in enumerate(exact.layers[0].storage.group("kept")):
        codes, scale = (coded.layers[0].tensors[f"{name}.{i}"][:, :7] for name in ("kept", "scale"))
        state = state[:, :7]  # 7 segments are finished
        largest = state.abs().amax(-1, keepdim=True)
        codes = unpack(codes) if dtype == "int4" else codes
        assert codes.dtype == torch.int8 and (largest > 0).any()
        assert ((codes * scale - state).abs() <= largest / top / 2 * (1 + 1e-6)).all()
        assert (codes.abs().amax(-1, keepdim=True) == torch.where(largest > 0, top, 0)).all()


@pytest.mark.parametrize("dtype", [torch.int8, "int4"])
@torch.no_grad()
def test_quantised_states_are_not_rounded_again(dtype: torch.dtype | str) -> None:
    """Pieces decode and code what is kept anew: a hundred times later codes are what they were, and scales too."""
    model = build(small_config("gated_linear", segment_size=4))
    cache = MCCache(model.config, state_dtype=dtype)
    model(tokens(2, 17), cache=cache)
    before = {name: x.clone() for name, x in cache.layers[0].tensors.items() if name.startswith(("kept.", "scale."))}
    for seed in range(100):
        model(tokens(2, 3, seed=seed), cache=cache)
    for name, first in before.items():
        now = cache.layers[0].tensors[name][:, :4]
        if name.startswith("scale."):
            torch.testing.assert_close(now, first[:, :4], rtol=1e-6, atol=0)
        else:
            assert torch.equal(now, first[:, :4])


@torch.no_grad()
def test_int4_needs_even_widths() -> None:
    with pytest.raises(ValueError, match="width 5 cannot be stored as int4"):
        model = build(small_config(value_head_dim=5))
        model(tokens(1, 20), cache=MCCache(model.config, state_dtype="int4"))
    with pytest.raises(ValueError, match="`state_dtype`=int2"):
        MCCache(model.config, state_dtype="int2")


@torch.no_grad()
def test_offloaded_layers_come_back_when_they_are_needed() -> None:
    """Transformers' own offloading, of whole layers, on a device that only knows where its tensors are. Nothing may
    wait for `prefetch`: its stream is another one."""
    with FakeTensorMode(), torch.device("meta"):
        model = MCForCausalLM(small_config(num_hidden_layers=2))
        cache, ids = MCCache(config=model.config), torch.zeros(2, 20, dtype=torch.int64)
        model(ids, cache=cache)

        def offload() -> None:
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()
                assert {x.device.type for x in layer.tensors.values()} == {"cpu"}

        offload()
        for layer in cache.layers:
            layer.activate_past_recording()
        model(ids[:, :3], cache=cache)
        offload()
        for layer in cache.layers:
            layer.crop(-2)
        assert {x.device.type for layer in cache.layers for x in layer.tensors.values()} == {"meta"}


def test_unknown_state_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dtype"):
        MCCache(config=small_config(), state_dtype=torch.int32)


FILES = combinations(memory=MEMORY_NAMES, segmentation=SEGMENTATIONS) + [
    {"max_cached_segments": 2, "cache_eviction": "least_read"},
    {"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2},
    {"layer_types": ["sliding_attention", "memory_caching"], "num_hidden_layers": 2, "sliding_window": 5},
]


@pytest.mark.parametrize("fields", FILES, ids=name_of)
@torch.no_grad()
def test_memory_file_round_trip_is_bit_equal(fields: dict, tmp_path) -> None:
    model = build(small_config(**fields))
    ids = tokens(2, 37)
    cache = MCCache(config=model.config)
    model(ids[:, :21], cache=cache)
    cache.save_pretrained(tmp_path / "memory")
    loaded = MCCache.from_pretrained(tmp_path / "memory", model)
    assert loaded.num_segments == cache.num_segments and loaded.nbytes == cache.nbytes
    again = model(ids[:, 21:], cache=loaded).logits
    assert torch.equal(again, model(ids[:, 21:], cache=cache).logits)
    assert os.listdir(tmp_path / "memory") == [FILE]


@pytest.mark.parametrize("kind", [MCCache, StaticCache])
@torch.no_grad()
def test_a_cache_that_an_earlier_version_pickled(kind: type) -> None:
    """Its layers held tensors and record themselves, and it named other modules."""
    model = build(small_config())
    ids, options = tokens(2, 37), {"max_cache_len": 40} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    model(ids[:, :21], cache=cache)
    if kind is StaticCache:  # drafts on the way
        cache.activate_past_recording()
        model(ids[:, 21:26] + 1, cache=cache)
    for index, layer in enumerate(cache.layers):
        names = ("tensors", "num_tokens", "kept_dtype", "kept_device", "record_past", "recorded")
        old = vars(layer) | {name: getattr(layer, name) for name in names} | {"snapshot": None}
        if layer.storage.snapshot is not None:
            tensors, num_tokens = layer.storage.snapshot
            old["snapshot"] = {"tensors": tensors, "num_tokens": num_tokens, "initialized": True}
        old["signature"] = {k: v for k, v in layer.signature.items() if k != "online_memory"}
        del old["storage"], old["rollback"]
        cache.layers[index] = type(layer).__new__(type(layer))
        cache.layers[index].__setstate__(old)
    if kind is StaticCache:
        cache.crop(-5)
    assert_close(model(ids[:, 21:], cache=cache).logits, model(ids).logits[:, 21:])
    assert pickle.loads(b"cmc_transformers.modeling_mc.mc_cache\nMCCache\n.") is MCCache
    for name, layer in (("MCCacheLayer", MCCacheLayer), ("MCStaticCacheLayer", MCStaticCacheLayer)):
        assert pickle.loads(f"cmc_transformers.modeling_mc.cache\n{name}\n.".encode()) is layer


@torch.no_grad()
def test_memory_file_of_a_quantised_cache(tmp_path) -> None:
    model = build(small_config())
    cache = MCCache(config=model.config, state_dtype=torch.int8)
    ids = tokens(1, 30)
    model(ids[:, :20], cache=cache)
    cache.save_pretrained(tmp_path)
    loaded = MCCache.from_pretrained(tmp_path, model)
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(model(ids[:, 20:], cache=loaded).logits, model(ids[:, 20:], cache=cache).logits)


@torch.no_grad()
def test_memory_file_refuses_other_models_and_broken_files(tmp_path) -> None:
    model = build(small_config())
    model(tokens(1, 20), cache=(cache := MCCache(config=model.config)))
    cache.save_pretrained(tmp_path)
    for other in (build(small_config(), seed=3), build(small_config(segment_size=4)), build(small_config("swla"))):
        with pytest.raises(ValueError, match="another model"):
            MCCache.from_pretrained(tmp_path, other)
    data = (tmp_path / FILE).read_bytes()
    for broken in (data[: len(data) // 2], data[:5], b"", b"\x80\x04rest of a pickle"):
        (tmp_path / FILE).write_bytes(broken)
        with pytest.raises(ValueError, match="incomplete or not a memory file"):
            MCCache.from_pretrained(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="holds no"):
        MCCache.from_pretrained(tmp_path / "nowhere", model)
    with pytest.raises(ValueError, match="empty cache"):
        MCCache(config=model.config).save_pretrained(tmp_path)


@torch.no_grad()
def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    model = build(small_config())
    model(tokens(1, 20), cache=(cache := MCCache(config=model.config)))
    cache.save_pretrained(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("mc_transformers.modeling_mc.memory_file.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        cache.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before and os.listdir(tmp_path) == [FILE]


def test_memory_file_is_read_by_another_process(tmp_path) -> None:
    model = build(small_config())
    model.save_pretrained(tmp_path / "model")
    ids = tokens(1, 30)
    cache = MCCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :25], cache=cache)
        expected = model(ids).logits[:, 25:]
    # the tokens after the 25th went only into `expected`
    cache.save_pretrained(tmp_path / "memory")
    torch.save((ids, expected), tmp_path / "expected.pt")
    script = """
import sys, torch, mc_transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model").eval()
cache = mc_transformers.MCCache.from_pretrained(sys.argv[1] + "/memory", model)
ids, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    error = (model(ids[:, 25:], cache=cache).logits - expected).abs().max().item()
    text = model.generate(ids, cache=mc_transformers.MCCache.from_pretrained(sys.argv[1] + "/memory", model),
                          max_new_tokens=4, do_sample=False)
assert error < 1e-4 and text.shape[1] == 34, (error, text.shape)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)


@pytest.mark.parametrize("fields", combinations(memory=MEMORY_NAMES, aggregation=AGGREGATIONS), ids=name_of)
@torch.no_grad()
def test_joined_memories_are_exact_in_one_layer(fields: dict) -> None:
    """Without a convolution and with whole segments, one layer cannot tell joined documents from one text."""
    model = build(small_config(**fields, conv_kernel_size=0, summaries_per_segment=2))
    ids = tokens(1, 37)
    caches = [MCCache(config=model.config) for _ in range(2)]
    for piece, cache in zip(ids[:, :30].split([16, 14], 1), caches, strict=True):
        model(piece, cache=cache)
    joined = MCCache.cat(caches, model)
    assert joined.num_segments == 3 and joined.get_seq_length() == 30
    assert_close(model(ids[:, 30:], cache=joined).logits, model(ids).logits[:, 30:])


@torch.no_grad()
def test_joined_memories_of_quantised_caches() -> None:
    """What is joined is decoded: nothing may be scaled a second time."""
    model = build(small_config(conv_kernel_size=0))
    ids = tokens(1, 37)
    caches = [MCCache(config=model.config, state_dtype=torch.int8) for _ in range(2)]
    for piece, cache in zip(ids[:, :30].split([16, 14], 1), caches, strict=True):
        model(piece, cache=cache)
    joined = MCCache.cat(caches, model)
    assert_close(model(ids[:, 30:], cache=joined).logits, model(ids).logits[:, 30:], 0.1)


@torch.no_grad()
def test_joined_memories_of_offloaded_caches(monkeypatch) -> None:
    """States in host memory, the rest on another device, by tensors that know only where they are."""
    model = build(small_config())
    config, mixer = model.config, model.model.layers[0].mixer
    monkeypatch.setattr(mc_cache, "int", lambda position: 21, raising=False)
    caches = [MCCache(config=config, offload_segments=True) for _ in range(2)]
    with FakeTensorMode():
        for cache in caches:
            layer = cache.layers[0]
            layer.signature = mixer.cache_signature
            sums = (config.memory_heads, config.summaries_per_segment, config.summary_dim)
            mixer.history.begin(layer, 1, sums, torch.device("meta"), torch.float32)
            mixer.history.grow(layer, 21)
            layer.lazy_initialization(layer.tensors["state.0"])
        joined = MCCache.cat(caches, model)
    assert {x.device.type for x in joined.layers[0].tensors.values()} == {"meta"}


@torch.no_grad()
def test_joined_memories_count_an_unfinished_document_as_a_segment() -> None:
    model = build(small_config(aggregation="residual", conv_kernel_size=0))
    caches = [MCCache(config=model.config) for _ in range(2)]
    pieces = tokens(1, 25).split([11, 14], 1)
    for piece, cache in zip(pieces, caches, strict=True):
        model(piece, cache=cache)
    joined = MCCache.cat(caches, model)
    assert joined.num_segments == 3  # 8 + 3 tokens, then 8, and 6 in the running segment
    kept = joined.layers[0].tensors["kept.0"]
    assert torch.equal(kept[:, 1], caches[0].layers[0].tensors["state.0"][:, 0])
    model(tokens(1, 9, seed=4), cache=joined)
    assert joined.num_segments == 4


def filled(model) -> MCCache:
    cache = MCCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 19), cache=cache)
    return cache


@pytest.mark.parametrize("fields", [{}, {"layer_types": ["memory_caching", "full_attention"]}], ids=name_of)
def test_an_empty_memory_is_no_file(fields: dict, tmp_path) -> None:
    model = build(small_config(num_hidden_layers=2, **fields))
    forgotten = filled(model)
    forgotten.reset()
    for cache in (MCCache(config=model.config), MCCache(), forgotten):
        with pytest.raises(ValueError, match="empty cache"):
            cache.save_pretrained(tmp_path, model)
    assert not any(tmp_path.iterdir())


def test_a_model_that_was_refused_does_not_own_the_memory(tmp_path) -> None:
    model, other = build(small_config()), build(small_config("swla"))
    cache = filled(model)
    with pytest.raises(ValueError, match="another model"):
        other(tokens(1, 3), cache=cache)
    cache.save_pretrained(tmp_path)
    MCCache.from_pretrained(tmp_path, model)


def test_empty_memories_cannot_be_joined() -> None:
    model = build(small_config())
    for empty in (MCCache(config=model.config), MCCache()):
        with pytest.raises(ValueError, match="filled caches"):
            MCCache.cat([filled(model), empty], model)


@pytest.mark.parametrize(
    "fields",
    [
        {"state_init": "checkpoint"},
        {"aggregation": "none"},
        {"segmentation": "logarithmic"},
        {"max_cached_segments": 2},
    ],
    ids=name_of,
)
def test_joining_is_refused_where_it_means_nothing(fields: dict) -> None:
    model = build(small_config(**fields))
    with pytest.raises(ValueError, match="MCCache.cat"):
        MCCache.cat([MCCache(config=model.config)], model)
