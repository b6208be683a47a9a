"""The Triton kernels of deep memories in Triton's interpreter, as `test_triton` does it: see there."""

import pytest
import torch
from test_deep_memory import visible_of
from test_kernels_torch import choices, randn, read_inputs
from test_triton import (
    DTYPES,
    INTERPRETED,
    MODELS,
    compare,
    compare_models,
    inside,
    poison,  # noqa: F401, a fixture
    rms_ratio,
    run_interpreted,
)

from helpers import small_config
from mc_transformers.kernels.read.deep import (
    deep_constant_read,
    deep_constant_read_op,
    deep_read,
    deep_read_op,
    deep_selected_read,
    deep_selected_read_op,
)
from mc_transformers.kernels.shared.ops import choose_backend
from mc_transformers.kernels.write.deep import ANSWER, NOTHING, deep_write, deep_write_op


pytest.importorskip("triton")
GROUPS = ("read", "write", "model")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group):
    run_interpreted(group, __file__)


# without the ahead-of-time tracing: that is the same for both implementations, test_deep_memory has it
REGISTERED = ("test_schema", "test_autograd_registration", "test_faketensor")
KINDS = [*((True, dtype) for dtype in DTYPES), (False, torch.float32)]  # with a layer norm, and without


# ----------------------------------------------------------------------------------------------------------- reads
READS = {
    "plain": {"rows": 2, "num": 2, "cached": 1},
    "packed": {"rows": 1, "num": 3, "packed": True, "blocks": 2},
    "one-token": {"rows": 5, "num": 1, "width": 1, "cached": 1},
    "nothing-to-read": {"num": 1, "cached": 0},
    "several-tiles": {"rows": 1, "num": 2, "cached": 0, "width": 67, "heads": 1, "dim": 20, "hidden": 70},
    "as-wide-as-allowed": {"rows": 1, "num": 2, "cached": 0, "width": 5, "heads": 1, "dim": 128, "hidden": 40},
}


def deep_inputs(norm: bool, dim: int = 9, hidden: int = 13, **sizes) -> list:
    """q, u, W2, W1, summaries, logit, scale, shift, birth and first. A norm of very few numbers would be a matter of
    luck: where they are all alike, rounding becomes large."""
    q, u, w2, summaries, logit, birth, first = read_inputs(key=dim, value=hidden, **sizes)
    w2, w1 = w2 / dim**0.5, randn(*w2.shape[:3], hidden, dim)
    heads = q.shape[3]
    norms = (randn(heads, dim) + 1, randn(heads, dim)) if norm else (None, None)
    return [q, u, w2, w1, summaries, logit, *norms, birth, first]


@inside
@pytest.mark.parametrize("norm, dtype", KINDS)
@pytest.mark.parametrize("case", READS)
def test_read(case, norm, dtype, poison):  # noqa: F811
    inputs = deep_inputs(norm, **READS[case])
    inputs[2:4] = (w.to(dtype) for w in inputs[2:4])  # the read rounds maps to the queries' dtype
    function = "sigmoid" if case == "plain" else "softmax"
    compare(lambda *x, backend: deep_read(*x, function, backend), inputs, (0, 1), dtype)


@inside
@pytest.mark.parametrize("norm, dtype", KINDS)
@pytest.mark.parametrize("case", ["packed", "one-token"])
def test_read_of_all(case, norm, dtype, poison):  # noqa: F811
    q, _, w2, w1, _, _, scale, shift, birth, first = deep_inputs(norm, **READS[case])
    inputs = [q, w2.to(dtype), w1.to(dtype), scale, shift, visible_of(birth, first)]
    compare(lambda *x, backend: deep_constant_read(*x, backend), inputs, (0,), dtype)


SELECTED = {
    "plain": {},
    "one-choice": {"num": 2, "width": 3, "heads": 3, "memories": 3, "top_k": 1},
    "several-tiles": {"rows": 1, "num": 4, "width": 40, "heads": 1, "memories": 2, "top_k": 2},
    "wide": {"rows": 1, "num": 1, "width": 9, "heads": 1, "dim": 70, "hidden": 150},
}


def selected_inputs(norm: bool, dim: int = 9, hidden: int = 13, memories: int = 5, **sizes) -> list:
    weights, index = choices(memories=memories, **sizes)
    rows, _, _, heads, _ = index.shape
    w2, w1 = randn(rows, memories, heads, dim, hidden) / dim**0.5, randn(rows, memories, heads, hidden, dim)
    norms = (randn(heads, dim) + 1, randn(heads, dim)) if norm else (None, None)
    return [randn(*index.shape[:-1], dim), weights, w2, w1, *norms, index]


@inside
@pytest.mark.parametrize("norm, dtype", KINDS)
@pytest.mark.parametrize("case", SELECTED)
def test_read_selected(case, norm, dtype, poison):  # noqa: F811
    inputs = selected_inputs(norm, **SELECTED[case])
    inputs[2:4] = (w.to(dtype) for w in inputs[2:4])
    keep = inputs[-1] >= 0  # a weight without a memory has no gradient that means anything
    compare(lambda q, w, *x, backend: deep_selected_read(q, w * keep, *x, backend), inputs, (0,), dtype)


@inside
def test_read_block_by_block(monkeypatch, poison):  # noqa: F811
    """The same with gates of one query segment at a time."""
    from mc_transformers.kernels.read import gates_triton as triton_gates

    monkeypatch.setattr(triton_gates, "ELEMENTS", 1)
    monkeypatch.setattr(triton_gates, "PROGRAMS", 0)
    inputs = deep_inputs(True, **READS["packed"])
    compare(lambda *x, backend: deep_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


@inside
def test_read_ops_are_registered():
    """Fake implementations and autograd, with the Triton implementation chosen."""
    inputs = deep_inputs(True, rows=1, num=2, cached=1, width=3, heads=1)
    inputs = [x.float().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.library.opcheck(deep_read_op, (*inputs, "softmax", "triton"), test_utils=REGISTERED)
    every = (inputs[0], *inputs[2:4], *inputs[6:8], visible_of(*inputs[8:]))
    torch.library.opcheck(deep_constant_read_op, (*every, "triton"), test_utils=REGISTERED)
    chosen = [x.float().requires_grad_() if x.is_floating_point() else x for x in selected_inputs(True, rows=1, num=1)]
    torch.library.opcheck(deep_selected_read_op, (*chosen, "triton"), test_utils=REGISTERED)


@inside
def test_read_refuses_what_no_kernel_can_do():
    wide = [x.float() if x.is_floating_point() else x for x in deep_inputs(True, dim=129, num=1, cached=1)]
    with pytest.raises(ValueError, match="129 wide, allowed: up to 128"):
        deep_read(*wide, "softmax", "triton")
    assert choose_backend("auto", "deep_read", wide[0], 129, widest=128) == "torch"


# ---------------------------------------------------------------------------------------------------------- writes
WRITES = {  # sizes and flags of `write_inputs`, loss, read
    "dla": ({"parts": 1, "gated": False}, "dot", ANSWER),
    "dla-decay": ({"parts": 1, "chunk": 4}, "dot", ANSWER),
    "titans": ({"chunks": 3}, "l2", ANSWER),
    "resumed": ({"heads": 2, "resumed": True, "run": [1]}, "l2", ANSWER),
    "one-chunk-of-one-token": ({"rows": 5, "chunks": 1, "chunk": 1, "resumed": True, "run": [0] * 5}, "l2", ANSWER),
    "long-chunk": ({"rows": 1, "chunk": 19, "run": [0]}, "l2", ANSWER),
    "wide": ({"rows": 1, "dim": 70, "hidden": 40, "run": [0]}, "l2", ANSWER),
    "first-map": ({"resumed": True}, "l2", 0),
    "second-map": ({"resumed": True}, "l2", 1),
    "first-map-ungated": ({"parts": 1, "gated": False}, "dot", 0),
    "no-answers": ({"resumed": True}, "l2", NOTHING),
}


def write_inputs(
    norm: bool,
    read: int,
    rows=2,
    chunks=2,
    chunk=5,
    heads=1,
    dim=9,
    hidden=19,
    parts=2,
    gated=True,
    resumed=False,
    run=(0, 0),
) -> list:
    """All of `deep_write` but loss and read: rows before the norm have everyday size, and a step moves maps a little,
    so that fp32 itself is exact enough to be compared with."""
    tokens, cells = (rows, chunks * chunk, heads), (rows, chunks, heads)
    maps = [randn(rows, heads, dim, hidden) / dim**0.5, randn(rows, heads, hidden, dim)]
    bases = [w + 0.1 * randn(*w.shape) if resumed else None for w in maps]
    momentum = [0.1 * randn(*w.shape) if resumed and parts > 1 else None for w in maps]
    enter, leave = 0.5 + 0.5 * torch.rand(*cells, chunk, parts), 0.03 * torch.rand(*cells, chunk, parts)
    return [
        randn(*tokens, hidden if read == 1 else dim),
        randn(*tokens, dim),
        randn(*tokens, dim),
        (0.03 * randn(*cells, chunk, chunk)).tril(),
        enter.double() if gated else None,
        leave.double(),
        torch.rand(*cells, parts, parts).double().triu() if gated else None,
        *maps,
        *bases,
        *momentum,
        *((0.3 * randn(heads, dim) + 1, randn(heads, dim)) if norm else (None, None)),
        torch.tensor(run),
        torch.tensor([chunks - 1, 0, 0, 0, 0][: len(run)]),
    ]


def write_of(case: str):
    """The op of one case with its non-empty outputs, and how to draw inputs."""
    fields, loss, read = WRITES[case]

    def op(*inputs, backend):
        return tuple(x for x in deep_write(*inputs, loss=loss, read=read, backend=backend) if x.numel())

    return op, lambda norm: write_inputs(norm, read, **fields)


@inside
@pytest.mark.parametrize(
    ("case", "norm"), [*((case, True) for case in WRITES), ("dla", False), ("resumed", False), ("second-map", False)]
)
def test_write(case, norm, poison):  # noqa: F811
    """Answers, all ends and all gradients."""
    op, draw = write_of(case)
    compare(op, draw(norm), (0, 1, 2), torch.float32)


@inside
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["titans", "second-map"])
def test_write_half(case, dtype, poison):  # noqa: F811
    op, draw = write_of(case)
    compare(op, draw(True), (0, 1, 2), dtype)


@inside
def test_write_some_rows_at_a_time(monkeypatch, poison):  # noqa: F811
    """The backward of one row after the other, of which only one leaves C and S."""
    from mc_transformers.kernels.write import deep_triton as triton_deep_write

    monkeypatch.setattr(triton_deep_write, "STACKS", 1)
    op, draw = write_of("resumed")
    compare(op, draw(True), (0, 1, 2), torch.float32)


@inside
def test_write_without_the_gradients_of_ends():
    """Those of ends that nothing used are not there."""
    _, loss, read = WRITES["resumed"]
    inputs = write_of("resumed")[1](True)
    found = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        given = [x.to(dtype).requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
        answer = deep_write(*given, loss=loss, read=read, backend=backend)[0]
        trained = [x for x in given if x is not None and x.requires_grad]
        found.append(torch.autograd.grad(answer.square().sum(), trained))
    for expected, actual in zip(*found, strict=True):
        assert rms_ratio(actual, expected) < 1e-5


@inside
def test_write_is_registered():
    """Fake implementation and autograd, with the Triton implementation chosen."""
    inputs = write_inputs(True, ANSWER, rows=1, chunks=1, chunk=2, run=[0])
    inputs = [x.float().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    torch.library.opcheck(deep_write_op, (*inputs, "l2", ANSWER, "triton"), test_utils=REGISTERED)


@inside
def test_write_refuses_what_no_kernel_can_do():
    wrong = ({"dim": 129}, "129 wide, allowed: up to 128"), ({"chunk": 65}, "`memory_chunk_size` is 65")
    for fields, reason in wrong:
        inputs = write_inputs(True, ANSWER, rows=1, chunks=1, run=[0], **fields)
        inputs = [x.float() if x is not None and x.is_floating_point() else x for x in inputs]
        with pytest.raises(ValueError, match=reason):
            deep_write(*inputs, loss="l2", read=ANSWER, backend="triton")
        deep_write(*inputs, loss="l2", read=ANSWER)


# ------------------------------------------------------------------------------------------------------- the model
@inside
@pytest.mark.parametrize(("memory", "case"), [("titans", "checkpoint"), ("dla", "sub-blocks"), ("titans", "ssc")])
def test_model(memory, case):
    compare_models(small_config(memory, num_attention_heads=1, **MODELS[case]), length=17)
