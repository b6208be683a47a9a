"""The Triton kernels in Triton's interpreter, on the CPU, against the torch implementation in float64.

Triton chooses between compiler and interpreter when it is imported, and a process of the suite imports many things. So
the suite runs this file once per group in a process of its own, and the tests proper exist only there.
"""

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from test_kernels_torch import READS, choices, randn, read_inputs, write_inputs

import mc_transformers as mc
from helpers import build, relative_error, small_config, tokens
from mc_transformers import MCCache, MCConfig
from mc_transformers.kernels.read.segment import segment_read, segment_read_op
from mc_transformers.kernels.read.selected import segment_route, selected_read, selected_read_op
from mc_transformers.kernels.shared.ops import choose_backend
from mc_transformers.kernels.step.decode import decode_step, decode_step_op
from mc_transformers.kernels.write.linear import linear_write, linear_write_op


pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
GROUPS = ("linear_write", "segment_read", "selected", "decode", "model", "whole")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
DTYPES = list(TOLERANCE)


def run_interpreted(group: str, file: str) -> None:
    """The tests of one group of a file, in a process with Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"test_{group}", file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " failed" not in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group):
    run_interpreted(group, __file__)


# ------------------------------------------------------------------------------------------------------ comparison
def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(error) / RMS(expected); the result must be finite, and zero where zero is expected."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    size = expected.double().pow(2).mean().sqrt()
    error = (actual.double() - expected.double()).pow(2).mean().sqrt()
    return (error / size).item() if size > 1e-12 else error.item()


def results(op, inputs, cotangents) -> list[torch.Tensor]:
    """Outputs, and gradients of all float inputs."""
    inputs = [
        x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs
    ]
    trained = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((x * c.to(x.dtype)).sum() for x, c in zip(outputs, cotangents, strict=True))
    total = total + 0 * sum(x.sum() for x in trained)  # also where an input has no effect
    return [*outputs, *torch.autograd.grad(total, trained)]


@pytest.fixture
def poison(monkeypatch):
    """Memory that a kernel must write comes full of NaN."""

    def empty(make):
        def poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, empty(getattr(owner, name)))


def compare(op, inputs, half: tuple[int, ...], dtype: torch.dtype) -> None:
    """Triton on `inputs`, of which those at the places `half` have `dtype`, against torch on the same in float64."""
    rounded = [
        x.to(dtype if place in half else torch.float32) if torch.is_tensor(x) and x.is_floating_point() else x
        for place, x in enumerate(inputs)
    ]
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in rounded]
    outputs = op(*exact, backend="torch")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # gradients that arrive have the dtype of the outputs
    cotangents = [randn(*outputs[0].shape).to(dtype).double(), *(randn(*x.shape) for x in outputs[1:])]
    expected = results(lambda *x: op(*x, backend="torch"), exact, cotangents)
    actual = results(lambda *x: op(*x, backend="triton"), rounded, cotangents)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        ratio = rms_ratio(a, e)
        assert ratio < TOLERANCE[dtype], f"output or gradient {number}: {ratio:.1e}"


# ---------------------------------------------------------------------------------------------------- linear_write
WRITES = {
    "one-token": {"rows": 2, "num": 1, "width": 1},
    "below-a-sub-chunk": {"rows": 1, "num": 2, "width": 63, "heads": 1, "key": 20, "value": 17},
    "a-sub-chunk": {"rows": 1, "num": 2, "width": 64, "heads": 1},
    "above-a-sub-chunk": {"rows": 1, "num": 2, "width": 65, "heads": 2, "starts": True},
    "no-decay": {"decay": False},
    "no-decay-no-start": {"decay": False, "initial": False},
    "starts": {"num": 4, "starts": True},
    "wide-values": {"rows": 1, "num": 1, "width": 33, "heads": 1, "key": 16, "value": 70},
    "wide-keys": {"rows": 1, "num": 2, "width": 18, "heads": 1, "key": 130, "value": 40},
}


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("case", WRITES)
def test_linear_write(case, carry, dtype, poison):
    compare(lambda *x, backend: linear_write(*x, carry, backend), write_inputs(**WRITES[case]), (0, 1, 2), dtype)


@inside
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("width", [32, 37])
def test_linear_write_in_pieces(width, carry, monkeypatch, poison):
    """A segment that is longer than a unit is cut into pieces."""
    from mc_transformers.kernels.write import linear_triton as triton_linear_write

    monkeypatch.setattr(triton_linear_write, "LONGEST", 16)
    monkeypatch.setattr(triton_linear_write, "PIECE", 16)
    inputs = write_inputs(num=3, width=width, heads=1, starts=carry)
    compare(lambda *x, backend: linear_write(*x, carry, backend), inputs, (0, 1, 2), torch.float32)


@inside
def test_linear_write_with_a_decay_of_zero(poison):
    q, k, v, log_decay, initial, starts = (x if x is None else x.float() for x in write_inputs(width=20))
    log_decay[:, 1, 2] = -torch.inf
    exact = [x if x is None else x.double() for x in (q, k, v, log_decay, initial, starts)]
    actual = linear_write(q, k, v, log_decay, initial, starts, True, "triton")
    for a, e in zip(actual, linear_write(*exact, True, "torch"), strict=True):
        assert rms_ratio(a, e) < 1e-5


@inside
def test_linear_write_mixed_dtypes():
    """Normalised queries and keys come in fp32 out of an autocast region, values in half precision."""
    inputs = write_inputs(width=20)
    compare(lambda *x, backend: linear_write(*x, False, backend), inputs, (0,), torch.float32)
    actual = linear_write(*(x.float() for x in inputs[:2]), inputs[2].bfloat16(), *[None] * 3, False, "triton")[0]
    expected = linear_write(*inputs[:2], inputs[2].bfloat16().double(), *[None] * 3, False, "torch")[0]
    assert actual.dtype == torch.float32 and rms_ratio(actual, expected) < 1e-2


# ---------------------------------------------------------------------------------------------------- segment_read
MORE_READS = {
    "many-memories": {"rows": 1, "num": 3, "cached": 37, "width": 5, "heads": 1},
    "long-segments": {"rows": 1, "num": 2, "cached": 1, "width": 70, "heads": 1, "key": 20, "value": 33},
    "vectors": {"rows": 1, "num": 3, "width": 5, "key": 1, "value": 9},
    "wide-keys": {"rows": 1, "num": 2, "cached": 1, "width": 5, "heads": 1, "key": 150, "value": 9, "summary": 40},
    "wide-values": {"rows": 1, "num": 2, "cached": 1, "width": 5, "heads": 1, "key": 9, "value": 150},
    "blocks-of-16": {"rows": 2, "num": 3, "cached": 1, "width": 5, "key": 96, "value": 48},
    "many-packed": {"rows": 1, "num": 36, "cached": 0, "width": 1, "heads": 1, "packed": True},
}


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", [*READS, *MORE_READS])
def test_segment_read(case, function, dtype, poison):
    inputs = [*read_inputs(**(READS | MORE_READS)[case])]
    inputs[2] = inputs[2].to(dtype)  # the read rounds states to the queries' dtype; that is not the kernels' error
    compare(lambda *x, backend: segment_read(*x, function, backend), inputs, (0, 1), dtype)


@inside
@pytest.mark.parametrize("case", ["plain", "packed", "sub-blocks"])
def test_segment_read_block_by_block(case, monkeypatch, poison):
    """The same with gates of one query segment at a time in the backward."""
    from mc_transformers.kernels.read import gates_triton as triton_gates

    monkeypatch.setattr(triton_gates, "ELEMENTS", 1)
    monkeypatch.setattr(triton_gates, "PROGRAMS", 0)
    inputs = read_inputs(**READS[case])
    compare(lambda *x, backend: segment_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


@inside
def test_segment_read_of_hidden_memories(poison):
    """More than one step's memories in a row, of which a query may read none, first, last and in between."""
    inputs = [*read_inputs(rows=1, num=1, cached=70, width=3, heads=1, summary=70, blocks=2)]
    inputs[1] = inputs[1] / 8  # as in a model: logits of about 1
    birth = inputs[5]
    birth[:] = 2**30
    birth[:, 20:22] = birth[:, 50] = 0
    compare(lambda *x, backend: segment_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


@inside
def test_segment_read_of_large_logits(poison):
    """Nothing overflows, and the online gate may vanish."""
    inputs = [*read_inputs()]
    inputs[1] = inputs[1] * 100
    compare(lambda *x, backend: segment_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


def turned(x: torch.Tensor) -> torch.Tensor:
    """x as a tensor whose memory is in another order than its dimensions, without a gap."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@inside
def test_segment_read_of_turned_inputs(poison):
    inputs = read_inputs()
    assert not turned(inputs[0]).is_contiguous()

    def read(*tensors, backend):
        return segment_read(*map(turned, tensors), "softmax", backend)

    compare(read, inputs, (0, 1), torch.float32)


# ------------------------------------------------------------------------------------- segment_route, selected_read
@inside
@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
@pytest.mark.parametrize("case", [*READS, "many-memories", "wide-keys"])
def test_selected_route(case, top_k):
    _, u, _, summaries, _, birth, first = read_inputs(**(READS | MORE_READS)[case])
    for dtype in DTYPES:
        u, summaries = u.to(dtype), summaries.float()
        expected = segment_route(u.double(), summaries.double(), birth, first, top_k, "torch")
        assert torch.equal(segment_route(u, summaries, birth, first, top_k, "triton"), expected)


SELECTED = {
    "plain": {},
    "one-choice": {"num": 2, "width": 7, "heads": 3, "memories": 3, "top_k": 1},
    "several-tiles": {"rows": 1, "num": 4, "width": 40, "heads": 1, "memories": 2, "top_k": 2},
    "one-token": {"rows": 2, "num": 1, "width": 1},
}


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key, value", [(3, 4), (1, 9), (150, 20), (20, 150)])
@pytest.mark.parametrize("case", SELECTED)
def test_selected_read(case, key, value, dtype, poison):
    weights, index = choices(**SELECTED[case])
    rows, _, _, heads, _ = index.shape
    q = randn(*index.shape[:-1], key)
    states = randn(rows, SELECTED[case].get("memories", 5), heads, key, value).to(dtype)
    compare(lambda q, w, s, backend: selected_read(q, w, s, index, backend), [q, weights, states], (0,), dtype)


@inside
def test_selected_ops_are_registered():
    """Fake implementations and autograd of all ops, with the Triton implementation chosen."""
    write = [x if x is None else x.float() for x in write_inputs(rows=1, num=2, width=3, heads=1)]
    read = [x.float() if x.is_floating_point() else x for x in read_inputs(rows=1, num=2, cached=1, width=3, heads=1)]
    weights, index = choices(rows=1, num=2, width=3, heads=1, memories=3)
    calls = {
        linear_write_op: (*write, True),
        segment_read_op: (*read, "softmax"),
        selected_read_op: (read[0], weights.float(), read[2], index),
    }
    for op, inputs in calls.items():
        inputs = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
        torch.library.opcheck(op, (*inputs, "triton"))


# ----------------------------------------------------------------------------------------------------- decode_step
TOKENS = {
    "grm": {},
    "sigmoid": {"function": "sigmoid"},
    "sub-blocks": {"blocks": 3},
    "one-memory": {"memories": 1},
    "many-memories": {"rows": 1, "memories": 150, "heads": 1},
    "wide": {"rows": 1, "key": 130, "value": 70},
    "narrow": {"key": 1, "value": 9, "summary": 3},
    "ssc": {"top_k": 2},
    "ssc-sigmoid": {"top_k": 2, "function": "sigmoid", "blocks": 2},
    "ssc-of-many": {"rows": 1, "memories": 150, "heads": 1, "top_k": 4},
    "ssc-wants-more": {"top_k": 9},
    "ssc-wide": {"rows": 1, "key": 150, "value": 40, "top_k": 3},
    "route": {"top_k": 2, "given": True},
}


def token_inputs(
    rows=2,
    memories=6,
    heads=2,
    key=5,
    value=7,
    summary=4,
    blocks=1,
    top_k=0,
    function="softmax",
    given=False,
    stored=torch.float32,
):
    """Inputs of `decode_step` in which a row reads nothing and what cannot be read is NaN; and the same in float64."""
    q, u = randn(rows, heads, key).float(), randn(rows, heads, summary).to(DTYPES[memories % 3])
    online, logit = randn(rows, heads, key, value).float(), randn(rows, heads).float()
    states, scale = randn(rows, memories, heads, key, value), None
    visible = torch.rand(rows, memories) < 0.6
    visible[-1] = rows == 1
    if stored == torch.int8:
        scale = states.abs().amax(-1, keepdim=True).float() / 127
        states = states / scale
    states = states.round().to(stored) if stored == torch.int8 else states.to(stored)
    summaries = randn(rows, memories, heads, blocks, summary).float()
    index = torch.rand(rows, heads, memories).argsort(-1)[..., :top_k] if given else None
    rest = (visible, index, top_k, function)
    exact = [x if x is None else x.double() for x in (q, u, online, logit, states, scale, summaries)]
    if scale is None:
        exact[4] = exact[4] * visible[..., None, None, None]
        states[~visible] = torch.nan
    else:
        exact[4] = states
        scale[~visible] = torch.nan
        exact[5] = scale.double().nan_to_num()
    return [q, u, online, logit, states, scale, summaries, *rest], [*exact, *rest]


STORED = [torch.bfloat16, torch.float16, torch.int8]


@inside
@pytest.mark.parametrize(
    "case, stored", [*((case, torch.float32) for case in TOKENS), *itertools.product(("grm", "ssc"), STORED)]
)
def test_decode_step(case, stored, poison):
    inputs, exact = token_inputs(**TOKENS[case], stored=stored)
    out, chosen = decode_step(*inputs, "triton")
    expected, known = decode_step(*exact, "torch")
    assert out.dtype == torch.float32 and rms_ratio(out, expected) < 1e-5
    if known is None:
        assert chosen is None
    else:
        assert torch.equal(chosen.sort(-1).values, known.sort(-1).values)


@inside
def test_decode_step_in_parts(monkeypatch, poison):
    """Several programs share the memories of a row and head, and one program takes them all."""
    from mc_transformers.kernels.step import decode_triton as triton_decode_step

    inputs, exact = token_inputs(rows=1, memories=37, heads=1)
    expected, _ = decode_step(*exact, "torch")
    for programs in (1, 3, 512):
        monkeypatch.setattr(triton_decode_step, "PROGRAMS", programs)
        assert rms_ratio(decode_step(*inputs, "triton")[0], expected) < 1e-5


@inside
def test_decode_step_with_a_gradient():
    """The kernels have none: torch runs."""
    inputs, exact = token_inputs(top_k=2)
    inputs[4] = inputs[4].nan_to_num()
    inputs[0].requires_grad_()
    decode_step(*inputs, "triton")[0].sum().backward()
    assert inputs[0].grad.abs().sum() > 0


@inside
def test_decode_step_is_registered():
    for case in ("grm", "ssc", "route"):
        inputs, _ = token_inputs(**TOKENS[case])
        inputs[4] = inputs[4].nan_to_num()
        torch.library.opcheck(decode_step_op, (*inputs, "triton"))


DECODED = {
    "grm": {"aggregation": "grm"},
    "soup": {"aggregation": "soup"},
    "ssc": {"aggregation": "ssc"},
    "shared-routes": {"aggregation": "ssc", "route_sharing": "model", "num_hidden_layers": 2},
    "bounded": {"aggregation": "grm", "max_cached_segments": 2},
    "logarithmic": {"aggregation": "ssc", "segmentation": "logarithmic"},
}


@inside
@pytest.mark.parametrize(
    "case, stored", [*((case, None) for case in DECODED), ("grm", torch.bfloat16), ("ssc", torch.int8)]
)
def test_decode_in_a_model(case, stored, monkeypatch):
    """Logits of tokens fed one by one, rows at different places, over a border of segments."""
    from mc_transformers.kernels.step import decode_triton as triton_decode_step

    ran, forward = [], triton_decode_step.forward
    monkeypatch.setattr(triton_decode_step, "forward", lambda *x: ran.append(1) or forward(*x))
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


# ------------------------------------------------------------------------------------------------------- the model
MODELS = {
    "grm": {"aggregation": "grm"},
    "ssc": {"aggregation": "ssc"},
    "none": {"aggregation": "none"},
    "checkpoint": {"aggregation": "grm", "state_init": "checkpoint"},
    "logarithmic": {"aggregation": "grm", "segmentation": "logarithmic"},
    "sub-blocks": {"aggregation": "soup", "gate_function": "sigmoid", "summaries_per_segment": 2},
}


@inside
@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("memory", ["linear", "swla"])
def test_model(memory, case):
    compare_models(small_config(memory, **MODELS[case]))


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


@inside
@pytest.mark.parametrize("aggregation", ["grm", "ssc", "none"])
def test_whole_warmup(aggregation, launched):
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


@inside
def test_whole_graph():
    """torch.compile sees through the ops, and the choice survives into the backward."""
    model = build(small_config("linear", aggregation="ssc"))
    model.config.mc_backend = "triton"
    ids = tokens(1, 19)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    actual = compiled(ids, use_cache=False).last_hidden_state
    assert relative_error(actual.detach(), model.model(ids, use_cache=False).last_hidden_state.detach()) < 1e-5
    actual.sum().backward()


# -------------------------------------------------------------------------------------------- choosing the backend
@pytest.mark.skipif(INTERPRETED, reason="about a process where Triton compiles")
def test_triton_that_cannot_be_had_is_an_error():
    x = torch.zeros(1)
    assert choose_backend("auto", "op", x, 64) == choose_backend("torch", "op", x, 64) == "torch"
    with pytest.raises(ValueError, match="'triton' is not possible for `op`: Triton has no device 'cpu'"):
        choose_backend("triton", "op", x, 64)
    with pytest.raises(ValueError, match="mc_backend"):
        MCConfig(memory="gru", mc_backend="triton")
    with pytest.raises(ValueError, match="not possible for `linear_write`"):
        build(small_config("linear", mc_backend="triton"))(tokens(1, 4))


@inside
def test_whole_choice():
    x = torch.zeros(1)
    assert choose_backend("auto", "op", x, 64) == "torch"
    assert choose_backend("triton", "op", x, 64) == "triton"
    for wrong, width, reason in ((x.double(), 64, "dtype is torch.float64"), (x, 257, "257 wide, allowed: up to 256")):
        with pytest.raises(ValueError, match=reason):
            choose_backend("triton", "op", wrong, width)


@pytest.mark.skipif(INTERPRETED, reason="about a process where Triton compiles")
def test_nothing_to_warm_up(caplog):
    for backend in ("auto", "torch"):
        assert mc.warmup(build(small_config("linear", mc_backend=backend))) == []
        assert f"linear grm on cpu runs torch (`mc_backend`='{backend}'): nothing to compile" in caplog.text
    assert mc.warmup(build(small_config("gru", vector_read="add"))) == []  # which has no queries
    with pytest.raises(ValueError, match="`model`=Linear has no memory layers"):
        mc.warmup(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not possible for `warmup`"):
        mc.warmup(build(small_config("linear", mc_backend="triton")))


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_importing_the_package_does_not_import_the_kernels():
    code = (
        "import sys, mc_transformers as mc; mc.MCForCausalLM; "
        "print([m for m in sys.modules if m.startswith('mc_transformers.kernels') and 'triton' in m])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
