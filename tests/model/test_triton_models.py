"""Whole models on the Triton kernels, in Triton's interpreter, against the same models on torch."""

import importlib

import pytest
import torch
from transformers import StaticCache

import mc_transformers as mc
from helpers import build, relative_error, small_config, tokens, with_triton
from mc_transformers import MCCache, MCConfig


pytestmark = with_triton


# -------------------------------------------------------------------------------------------------------- a whole text
def compare_models(config: MCConfig, length: int = 27) -> None:
    """Logits, all gradients and generated tokens, with padding; padding that is NaN changes nothing."""
    model = build(config)
    ids, padding = tokens(2, length), length // 3
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    found = []
    for backend in ("torch", "triton"):
        model.config.mc_backend = backend
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids).masked_fill(mask[..., None] == 0, float("nan"))
            padded = model(inputs_embeds=embedded, attention_mask=mask).logits[:, padding:]
        assert relative_error(padded, out.logits[:, padding:].detach()) < 1e-5
        generated = model.generate(
            ids[:, :-7], attention_mask=mask[:, :-7], max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        found.append((out.logits.detach(), grads, generated))
    (logits, grads, generated), (logits_t, grads_t, generated_t) = found
    assert relative_error(logits_t, logits) < 1e-5
    assert len(grads) == len(grads_t) > 5
    assert max(relative_error(t, g) for t, g in zip(grads_t, grads, strict=True)) < 1e-4
    assert torch.equal(generated_t, generated)


MODELS = {
    "grm": ("linear", {}),
    "ssc": ("swla", {"aggregation": "ssc"}),
    "none": ("swla", {"aggregation": "none"}),
    "checkpoint": ("swla", {"state_init": "checkpoint"}),
    "logarithmic": ("linear", {"segmentation": "logarithmic"}),
    "sub-blocks": ("linear", {"aggregation": "soup", "gate_function": "sigmoid", "summaries_per_segment": 2}),
    "relu": ("gated_linear", {"gate_function": "relu"}),
}
DEEP_MODELS = {
    "checkpoint": ("titans", {"state_init": "checkpoint"}),
    "sub-blocks": ("dla", MODELS["sub-blocks"][1]),
    "ssc": ("titans", {"aggregation": "ssc"}),
}


@pytest.mark.parametrize("case", MODELS)
def test_training_and_generation(case):
    memory, fields = MODELS[case]
    compare_models(small_config(memory, **{"aggregation": "grm"} | fields))


@pytest.mark.parametrize("case", DEEP_MODELS)
def test_training_and_generation_with_deep_memories(case):
    memory, fields = DEEP_MODELS[case]
    compare_models(small_config(memory, num_attention_heads=1, **{"aggregation": "grm"} | fields), length=17)


def test_one_graph():
    """torch.compile sees through the ops, and the choice survives into the backward."""
    model = build(small_config("linear", aggregation="ssc"))
    model.config.mc_backend = "triton"
    ids = tokens(1, 19)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    actual = compiled(ids, use_cache=False).last_hidden_state
    assert relative_error(actual.detach(), model.model(ids, use_cache=False).last_hidden_state.detach()) < 1e-5
    actual.sum().backward()


# ------------------------------------------------------------------------------------------------------------- warm-up
@pytest.fixture
def launched(monkeypatch):
    """What the compiler sees of every launch: kernel, constants, and which arguments there are in which dtype."""
    found = set()
    for name in ("step.decode", "read.gates", "write.linear", "read.segment", "read.route", "read.selected"):
        module = importlib.import_module(f"mc_transformers.kernels.{name}_triton")
        launch = module.launch

        def record(kernel, grid, args, meta, configs, *rest, launch=launch):
            kinds = {key: str(getattr(value, "dtype", None)) for key, value in args.items()}
            found.add((kernel.__name__, str(sorted(meta.items())), str(sorted(kinds.items())), str(configs)))
            launch(kernel, grid, args, meta, configs, *rest)

        monkeypatch.setattr(module, "launch", record)
    return found


@pytest.mark.parametrize("aggregation", ["grm", "ssc", "none"])
def test_warmup(aggregation, launched):
    """Training, prompts of any length and decoding meet only kernels that are warm."""
    model = build(small_config("gated_linear", aggregation=aggregation, mc_backend="triton"))
    random = torch.get_rng_state()
    (line,) = mc.warmup(model)
    assert line.startswith(f"gated_linear {aggregation} on cpu")
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
    warm = set(launched)
    model(tokens(2, 37), labels=tokens(2, 37)).loss.backward()
    model.generate(tokens(2, 21), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert len(warm) > 5 and launched == warm


# ------------------------------------------------------------------------------------------------------------ decoding
DECODED = {
    "grm": {"aggregation": "grm"},
    "soup": {"aggregation": "soup"},
    "ssc": {"aggregation": "ssc"},
    "shared-routes": {"aggregation": "ssc", "route_sharing": "model", "num_hidden_layers": 2},
    "bounded": {"aggregation": "grm", "max_cached_segments": 2},
    "logarithmic": {"aggregation": "ssc", "segmentation": "logarithmic"},
}


@pytest.mark.parametrize(
    "case, stored", [*((case, None) for case in DECODED), ("grm", torch.bfloat16), ("ssc", torch.int8)]
)
def test_decode_step(case, stored, monkeypatch):
    """Logits of tokens fed one by one, rows at different places, over a border of segments."""
    from mc_transformers.kernels.step import decode_triton

    ran, forward = [], decode_triton.forward
    monkeypatch.setattr(decode_triton, "forward", lambda *x: ran.append(1) or forward(*x))
    model = build(small_config("gated_linear", **DECODED[case]))
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    for backend in ("torch", "triton"):
        model.config.mc_backend = backend
        cache, logits = MCCache(config=model.config, state_dtype=stored), []
        with torch.no_grad():
            model(ids[:, :20], attention_mask=mask[:, :20], cache=cache)
            for t in range(20, 24):
                logits.append(model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits)
        found.append(torch.cat(logits, 1))
    assert len(ran) == 4 * model.config.num_hidden_layers
    # a state that comes out differently in the last bit may be rounded to another number
    assert relative_error(found[1], found[0]) < (1e-5 if stored is None else 1e-2)


SMALL = {"segment_size": 4, "memory_chunk_size": 2, "num_attention_heads": 1}
STATES = {
    "linear-ssc": ({"memory": "linear", "aggregation": "ssc"}, None),
    "retention-none": ({"memory": "retention", "aggregation": "none"}, None),
    "gated_linear-bf16": ({"memory": "gated_linear"}, torch.bfloat16),
    "gated_linear-int8": ({"memory": "gated_linear"}, torch.int8),
    "gated_linear-residual": ({"memory": "gated_linear", "aggregation": "residual"}, None),
    "swla": ({"memory": "swla", "value_skip": True, "conv_kernel_size": 0}, None),
    "swla-checkpoint": ({"memory": "swla", "state_init": "checkpoint"}, torch.bfloat16),
    "swla-logarithmic": ({"memory": "swla", "segmentation": "logarithmic"}, torch.float16),
    "gated_delta": ({"memory": "gated_delta"}, torch.bfloat16),
    "oldest": ({"memory": "linear", "max_cached_segments": 2}, torch.bfloat16),
    "least_read": ({"memory": "linear", "max_cached_segments": 2, "cache_eviction": "least_read"}, None),
    "titans": ({"memory": "titans", "aggregation": "ssc"}, torch.bfloat16),
}


@pytest.fixture
def launches(monkeypatch) -> dict[str, int]:
    """How often each of the two kernels ran."""
    from mc_transformers.kernels.step import slot_triton, state_triton

    counts = {}
    for name, module in {"state_step": state_triton, "slot_write": slot_triton}.items():
        forward = module.forward
        counts[name] = 0

        def counted(*args, forward=forward, name=name):
            counts[name] += 1
            return forward(*args)

        monkeypatch.setattr(module, "forward", counted)
    return counts


@pytest.mark.parametrize("case, static", [*((case, False) for case in STATES), ("swla", True), ("oldest", True)])
@torch.no_grad()
def test_decoding_changes_the_cache_alike(case, static, launches):
    """Logits and everything in the cache: rows at different places, tokens that are padding, a border of segments."""
    fields, stored = STATES[case]
    model = build(small_config(**SMALL | fields))
    ids, mask = tokens(3, 18), torch.ones(3, 18, dtype=torch.long)
    mask[0, :3] = mask[1, 14] = mask[1, 16] = mask[2, 15] = 0
    found = []
    for backend in ("torch", "triton"):
        model.config.mc_backend = "torch"
        cache = StaticCache(config=model.config, max_cache_len=24) if static else MCCache(config=model.config)
        for layer in cache.layers:
            layer.kept_dtype = stored
        logits = [model(ids[:, :12], attention_mask=mask[:, :12], cache=cache).logits]
        model.config.mc_backend = backend
        for t in range(12, 18):
            seen = {} if t == 17 else {"attention_mask": mask[:, : t + 1]}  # the last one without a mask
            logits.append(model(ids[:, t : t + 1], cache=cache, **seen).logits)
        found.append((torch.cat(logits, 1), {n: x.clone() for n, x in cache.layers[0].tensors.items()}))
        assert (launches["slot_write"] > 0) == (backend == "triton")
    assert launches["state_step"] == (0 if fields["memory"] == "titans" else 6)
    (expected, left), (actual, left_t) = found
    # a state that comes out differently in the last bit may be rounded to another number
    tolerance = 1e-5 if stored is None else 1e-2
    assert relative_error(actual, expected) < tolerance
    assert left.keys() == left_t.keys()
    for name, x in left.items():
        assert left_t[name].dtype == x.dtype and relative_error(left_t[name].double(), x.double()) < tolerance, name


@pytest.mark.parametrize(
    "memory, cache", [("linear", None), ("gated_linear", "static"), ("swla", None), ("gated_delta", "static")]
)
def test_generation(memory, cache):
    model = build(small_config(memory, max_cached_segments=2, **SMALL))
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    model.config.mc_backend = "triton"
    assert torch.equal(expected, model.generate(ids, **options, cache_implementation=cache))


@torch.no_grad()
def test_a_snapshot_is_left_alone():
    """Tokens that are taken back while a cache records leave no trace in what it held before."""
    model = build(small_config("swla", **SMALL))
    ids = tokens(1, 14)
    full = model(ids).logits
    cache = MCCache(config=model.config)
    model(ids[:, :6], cache=cache)
    cache.activate_past_recording()
    model.config.mc_backend = "triton"
    for t in range(6, 11):
        model((ids[:, t : t + 1] + 3) % 60, cache=cache)
    model.config.mc_backend = "torch"
    cache.crop(-5)
    assert relative_error(model(ids[:, 6:], cache=cache).logits, full[:, 6:]) < 1e-5


@torch.no_grad()
def test_decoding_in_one_graph(launches):
    """The ops that change tensors are seen as such, over borders of segments, with a static cache."""
    torch._dynamo.reset()
    model = build(small_config("gated_linear", aggregation="ssc", **SMALL))
    ids = tokens(1, 12)
    full = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(ids[:, :6], cache=cache)
    model.config.mc_backend = "triton"
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = [step(ids[:, t : t + 1], cache=cache, position_ids=torch.tensor([[t]])).logits for t in range(6, 12)]
    assert relative_error(torch.cat(out, 1), full[:, 6:]) < 1e-5
    assert launches["state_step"] >= 6 and launches["slot_write"] >= 24
