"""The Triton kernels that keep a running state, in Triton's interpreter, as `test_triton` does it: see there."""

import pytest
import torch
from test_kernels_torch import randn
from test_triton import DTYPES, INTERPRETED, inside, poison, rms_ratio, run_interpreted  # noqa: F401, a fixture
from transformers import StaticCache

from helpers import build, relative_error, small_config, tokens
from mc_transformers import MCCache
from mc_transformers.kernels.step.slot import slot_write, slot_write_op
from mc_transformers.kernels.step.state import state_step, state_step_op


pytest.importorskip("triton")
GROUPS = ("state", "slot", "model")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group):
    run_interpreted(group, __file__)


# ------------------------------------------------------------------------------------------------------ state_step
RULES = {
    "linear": {},
    "write": {"write": True},
    "decay": {"decay": True},
    "gated": {"decay": True, "write": True},
    "swla": {"decay": True, "write": True, "again": True},
    "delta": {"decay": True, "write": True, "delta": True},
    "delta-alone": {"delta": True},
}
WIDTHS = [(1, 9), (130, 20), (20, 130), (3, 1)]


def step_inputs(
    decay=False, write=False, again=False, delta=False, rows=3, heads=2, key=5, value=7, dtype=torch.float32
) -> list:
    """Inputs of `state_step`; one head forgets everything."""
    group = (rows, heads)
    log_decay = -randn(*group).float().square() if decay else None
    if decay:
        log_decay[0, -1] = -torch.inf
    pair = (randn(*group, key).float(), randn(*group, value).float(), randn(*group).float()) if again else None
    return [
        randn(*group, key, value).float(),
        randn(*group, key).to(dtype),
        randn(*group, value).to(dtype),
        log_decay,
        randn(*group).sigmoid().float() if write else None,
        pair,
        delta,
    ]


def double(x):
    return tuple(map(double, x)) if isinstance(x, tuple) else x.double() if torch.is_tensor(x) else x


@inside
@pytest.mark.parametrize(
    "key, value, dtype", [*((5, 7, dtype) for dtype in DTYPES), *((*width, torch.bfloat16) for width in WIDTHS)]
)
@pytest.mark.parametrize("rule", RULES)
def test_state_step(rule, key, value, dtype, poison):  # noqa: F811
    inputs = step_inputs(**RULES[rule], key=key, value=value, dtype=dtype)
    before = inputs[0].clone()
    actual = state_step(*inputs, "triton")
    assert actual.dtype == torch.float32 and torch.equal(inputs[0], before)
    assert rms_ratio(actual, state_step(*map(double, inputs), "torch")) < 1e-6


@inside
def test_state_step_of_views(poison):  # noqa: F811
    """A state that is one number everywhere, as M_0 is, and keys that are a part of something."""
    _, k, v, *rest = step_inputs(decay=True)
    state, k = torch.zeros(()).expand(3, 2, 5, 7), torch.stack([k, randn(3, 2, 5).float()], 1)[:, 0]
    assert not k.is_contiguous()
    expected = state_step(*map(double, (state, k, v, *rest)), "torch")
    assert rms_ratio(state_step(state, k, v, *rest, "triton"), expected) < 1e-6


@inside
def test_state_step_with_a_gradient():
    """The kernel has none: torch runs."""
    inputs = step_inputs(**RULES["swla"])
    inputs[2].requires_grad_()
    state_step(*inputs, "triton").sum().backward()
    assert inputs[2].grad.abs().sum() > 0


@inside
@pytest.mark.parametrize("rule, backend", [("swla", "torch"), ("swla", "triton"), ("delta", "triton")])
def test_state_step_is_registered(rule, backend):
    *inputs, again, delta = step_inputs(**RULES[rule])
    torch.library.opcheck(state_step_op, (*inputs, *(again or [None] * 3), delta, backend))


# ------------------------------------------------------------------------------------------------------ slot_write
def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


SOURCES = {
    "dense": lambda rows, levels, shape: randn(rows, levels, *shape).float(),
    "same-for-all": lambda rows, levels, shape: randn(1, 1, *shape).float(),
    "one-number": lambda rows, levels, shape: torch.tensor(0.5).expand(1, 1, *shape),
    "turned": lambda rows, levels, shape: randn(rows, levels, *shape[::-1]).float().transpose(2, -1),
}
PLACES = {"slots": (3, 1, 4), "levels": (2, 3, 3), "none": (2, 1, 3)}


def place_of(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and rows `[B, L]`; the slot of a row that is not written may be anything."""
    rows, levels, slots = PLACES[case]
    chosen = torch.arange(rows * levels).view(rows, levels) % 3 != 1
    slot = torch.rand(rows, slots).argsort(1)[:, :levels]
    return slot.where(chosen | (levels > 1), 99), chosen & (case != "none")


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", PLACES)
def test_slot_write(case, source, dtype, monkeypatch):
    """Everything that is not written keeps its bits, whatever they are; nothing of other rows is read."""
    from mc_transformers.kernels.step import slot_triton as triton_slot_write

    monkeypatch.setattr(triton_slot_write, "BLOCK", 32)
    (rows, levels, slots), shape = PLACES[case], (2, 5, 7)
    slot, chosen = place_of(case)
    given = SOURCES[source](rows, levels, shape)
    target = torch.randint(-(2**15), 2**15, (rows, slots, *shape)).to(torch.int16)  # some of them NaN
    target = target.view(torch.int16).to(torch.int32).mul(65537).view(torch.float32).to(dtype)
    expected, kept = target.clone(), target.clone()
    for row, level in chosen.nonzero().tolist():
        expected[row, slot[row, level]] = given.expand(rows, levels, *shape)[row, level].to(dtype)
    same = slot_write(target, given, slot, chosen, False, "triton")
    assert torch.equal(bits(target), bits(kept)) and torch.equal(bits(same), bits(expected))
    if source == "dense":
        given[~chosen] = torch.nan
    assert slot_write(target, given, slot, chosen, True, "triton") is target
    assert torch.equal(bits(target), bits(expected))


@inside
@pytest.mark.parametrize("source", SOURCES)
def test_slot_write_level_by_level(source):
    """Without slots: every level in its own place."""
    target, chosen = randn(2, 3, 5, 7).float(), torch.tensor([[True, False, True], [False] * 3])
    given = SOURCES[source](2, 3, (5, 7))
    expected = slot_write(target, given, None, chosen, True, "torch")
    assert not torch.equal(target, expected)
    assert slot_write(target, given, None, chosen, True, "triton") is target and torch.equal(target, expected)


@inside
def test_slot_write_with_a_gradient():
    """The kernel has none and changes its input: torch runs."""
    slot, chosen = place_of("slots")
    target, source = randn(3, 4, 5).float(), randn(3, 1, 5).float().requires_grad_()
    before = target.clone()
    slot_write(target, source, slot, chosen, False, "triton").sum().backward()
    assert torch.equal(source.grad[:, 0, 0], chosen[:, 0].float()) and torch.equal(target, before)


@inside
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_slot_write_is_registered(backend):
    slot, chosen = place_of("slots")
    slot = slot.clamp(max=3)
    torch.library.opcheck(slot_write_op, (randn(3, 4, 5).bfloat16(), randn(3, 1, 5).float(), slot, chosen, backend))
    square = (randn(3, 1, 5).float(), randn(3, 1, 5).float(), None, chosen, backend)
    torch.library.opcheck(slot_write_op, square)


# ----------------------------------------------------------------------------------------------------- in a model
SMALL = {"segment_size": 4, "memory_chunk_size": 2, "num_attention_heads": 1}
DECODED = {
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
    from mc_transformers.kernels.step import slot_triton as triton_slot_write
    from mc_transformers.kernels.step import state_triton as triton_state_step

    counts = {}
    for name, module in {"state_step": triton_state_step, "slot_write": triton_slot_write}.items():
        forward = module.forward
        counts[name] = 0

        def counted(*args, forward=forward, name=name):
            counts[name] += 1
            return forward(*args)

        monkeypatch.setattr(module, "forward", counted)
    return counts


@inside
@pytest.mark.parametrize("case, static", [*((case, False) for case in DECODED), ("swla", True), ("oldest", True)])
@torch.no_grad()
def test_model_decodes_the_same(case, static, launches):
    """Logits and everything in the cache: rows at different places, tokens that are padding, a border of segments."""
    fields, stored = DECODED[case]
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


@inside
@pytest.mark.parametrize(
    "memory, cache", [("linear", None), ("gated_linear", "static"), ("swla", None), ("gated_delta", "static")]
)
def test_model_generates_the_same(memory, cache):
    model = build(small_config(memory, max_cached_segments=2, **SMALL))
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    model.config.mc_backend = "triton"
    assert torch.equal(expected, model.generate(ids, **options, cache_implementation=cache))


@inside
@torch.no_grad()
def test_model_leaves_a_snapshot_alone():
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


@inside
@torch.no_grad()
def test_model_compiles_into_one_graph(launches):
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
