"""`deep_read`, `deep_constant_read`, `deep_selected_read`: cached networks answer, gated, all alike, or the best k."""

from collections.abc import Iterable

import pytest
import torch
from torch.nn import functional as F

from helpers import assert_close, randn, with_triton
from mc_transformers.kernels.read.deep import (
    deep_constant_read,
    deep_constant_read_op,
    deep_read,
    deep_read_op,
    deep_selected_read,
    deep_selected_read_op,
)
from mc_transformers.kernels.shared.ops import choose_backend
from op_inputs import BFLOAT, HALF, SINGLE, choices, compare, leaves, read_inputs, to_dtype


def deep_read_arguments(norm: bool, **sizes) -> list:
    """q, u, W2, W1, summaries, logit, scale, shift, birth and first."""
    q, u, states, summaries, logit, birth, first = read_inputs(rows=2, heads=2, key=3, value=4, **sizes)
    w1 = randn(*states.shape[:3], 4, 3)
    return [q, u, states, w1, summaries, logit, *((randn(2, 3), randn(2, 3)) if norm else (None, None)), birth, first]


def naive_answers(q, w2, w1, scale, shift) -> torch.Tensor:
    """M_i(q_t) `[R, N, W, H, S, d]`."""
    r = torch.einsum("rnwhd,rshde->rnwhse", q, w2)
    r = torch.einsum("rnwhse,rshed->rnwhsd", F.gelu(r), w1)
    if scale is not None:
        r = F.layer_norm(r, r.shape[-1:], eps=1e-6) * scale[:, None] + shift[:, None]
    return q[..., None, :] + r


def visible_of(birth, first) -> torch.Tensor:
    """`[R, N, S]`."""
    rank, slot = torch.arange(first.shape[1]), torch.arange(birth.shape[1])
    return (birth[:, None] <= rank[:, None]) & (slot >= first[..., None])


def gradcheck(op, inputs: list, *rest) -> None:
    assert torch.autograd.gradcheck(lambda *x: op(*x, *rest), leaves(inputs), fast_mode=True)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("sizes", [{}, {"blocks": 2, "packed": True}, {"cached": 0, "num": 1}], ids=str)
def test_gated_read(sizes, norm, function):
    arguments = deep_read_arguments(norm, **sizes)
    q, u, w2, w1, summaries, logit, scale, shift, birth, first = arguments
    scores = torch.einsum("rnwhd,rshmd->rnwhsm", u, summaries).amax(-1)
    scores = scores.masked_fill(~visible_of(birth, first)[:, :, None, None], float("-inf"))
    every = torch.cat([scores, logit[..., None]], -1)
    gates = every.softmax(-1) if function == "softmax" else every.sigmoid()
    past = (gates[..., :-1, None] * naive_answers(q, w2, w1, scale, shift)).sum(-2)
    out, online = deep_read(*arguments, function)
    assert_close(out, past, 1e-10)
    assert_close(online, gates[..., -1], 1e-10)
    gradcheck(deep_read, arguments, function)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_constant_read(norm):
    q, _, w2, w1, _, _, scale, shift, birth, first = deep_read_arguments(norm, packed=True)
    visible = visible_of(birth, first)
    expected = (naive_answers(q, w2, w1, scale, shift) * visible[:, :, None, None, :, None]).sum(-2)
    assert_close(deep_constant_read(q, w2, w1, scale, shift, visible), expected, 1e-10)
    gradcheck(deep_constant_read, [q, w2, w1, scale, shift, visible])


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_selected_read(norm):
    q, _, w2, w1, _, _, scale, shift, *_ = deep_read_arguments(norm)
    index = torch.randint(-1, w2.shape[1], (*q.shape[:-1], 3))
    weights = torch.rand(index.shape, dtype=torch.float64) * (index >= 0)
    every = naive_answers(q, w2, w1, scale, shift)
    chosen = every.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, q.shape[-1]))
    assert_close(
        deep_selected_read(q, weights, w2, w1, scale, shift, index), (weights[..., None] * chosen).sum(-2), 1e-10
    )
    keep = (index >= 0).double()  # a weight without a memory has no gradient that means anything
    gradcheck(lambda q, w, *x: deep_selected_read(q, w * keep, *x, index), [q, weights, w2, w1, scale, shift])


def test_opcheck():
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    q, u, w2, w1, summaries, logit, scale, shift, birth, first = deep_read_arguments(True)
    index = torch.zeros(*q.shape[:-1], 1, dtype=torch.int64)
    calls = (
        (deep_read_op, q, u, w2, w1, summaries, logit, scale, shift, birth, first, "softmax"),
        (deep_constant_read_op, q, w2, w1, scale, shift, visible_of(birth, first)),
        (deep_selected_read_op, q, randn(*index.shape), w2, w1, scale, shift, index),
    )
    for op, *inputs in calls:
        torch.library.opcheck(op, tuple(leaves(inputs)))


# -------------------------------------------------------------------------------------------------------------- Triton
TRITON_READS = {
    "plain": {"rows": 2, "num": 2, "cached": 1},
    "packed": {"rows": 1, "num": 3, "packed": True, "blocks": 2},
    "one-token": {"rows": 5, "num": 1, "width": 1, "cached": 1},
    "nothing-to-read": {"num": 1, "cached": 0},
    "several-tiles": {"rows": 1, "num": 2, "cached": 0, "width": 67, "heads": 1, "dim": 20, "hidden": 70},
    "as-wide-as-allowed": {"rows": 1, "num": 2, "cached": 0, "width": 5, "heads": 1, "dim": 128, "hidden": 40},
}


def kinds(cases: Iterable[str], half: str) -> list[tuple[str, bool, torch.dtype]]:
    """Every case with a layer norm in two dtypes and without one; one of them in fp16 too."""
    every = [(True, SINGLE), (True, BFLOAT), (False, SINGLE)]
    return [*((case, *kind) for case in cases for kind in every), (half, True, HALF)]


def deep_inputs(norm: bool, dim: int = 9, hidden: int = 13, **sizes) -> list:
    """q, u, W2, W1, summaries, logit, scale, shift, birth and first. A norm of very few numbers would be a matter of
    luck: where they are all alike, rounding becomes large."""
    q, u, w2, summaries, logit, birth, first = read_inputs(key=dim, value=hidden, **sizes)
    w2, w1 = w2 / dim**0.5, randn(*w2.shape[:3], hidden, dim)
    heads = q.shape[3]
    norms = (randn(heads, dim) + 1, randn(heads, dim)) if norm else (None, None)
    return [q, u, w2, w1, summaries, logit, *norms, birth, first]


@with_triton
@pytest.mark.parametrize("case, norm, dtype", kinds(TRITON_READS, half="plain"), ids=str)
def test_triton(case, norm, dtype):
    inputs = deep_inputs(norm, **TRITON_READS[case])
    inputs[2:4] = (w.to(dtype) for w in inputs[2:4])  # the read rounds maps to the queries' dtype
    function = "sigmoid" if case == "plain" else "softmax"
    compare(lambda *x, backend: deep_read(*x, function, backend), inputs, (0, 1), dtype, rounded=(1, 2, 3, 4, 5, 6))


@with_triton
@pytest.mark.parametrize("case, norm, dtype", kinds(["packed", "one-token"], half="packed"), ids=str)
def test_triton_constant_read(case, norm, dtype):
    q, _, w2, w1, _, _, scale, shift, birth, first = deep_inputs(norm, **TRITON_READS[case])
    inputs = [q, w2.to(dtype), w1.to(dtype), scale, shift, visible_of(birth, first)]
    compare(lambda *x, backend: deep_constant_read(*x, backend), inputs, (0,), dtype, rounded=(1, 2, 3))


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


@with_triton
@pytest.mark.parametrize("case, norm, dtype", kinds(SELECTED, half="plain"), ids=str)
def test_triton_selected_read(case, norm, dtype):
    inputs = selected_inputs(norm, **SELECTED[case])
    inputs[2:4] = (w.to(dtype) for w in inputs[2:4])
    keep = inputs[-1] >= 0  # a weight without a memory has no gradient that means anything

    def read(q, weights, *x, backend):
        return deep_selected_read(q, weights * keep, *x, backend)

    compare(read, inputs, (0,), dtype, rounded=(0, 1, 2, 3, 4))


@with_triton
def test_triton_block_by_block(monkeypatch):
    """The same with gates of one query segment at a time."""
    from mc_transformers.kernels.read import gates_triton

    monkeypatch.setattr(gates_triton, "ELEMENTS", 1)
    monkeypatch.setattr(gates_triton, "PROGRAMS", 0)
    inputs = deep_inputs(True, **TRITON_READS["packed"])
    compare(lambda *x, backend: deep_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


# without the ahead-of-time tracing: that is the same for both implementations
REGISTERED = ("test_schema", "test_autograd_registration", "test_faketensor")


@with_triton
def test_triton_is_registered():
    """Fake implementations and autograd, with the Triton implementation chosen."""
    inputs = leaves(to_dtype(deep_inputs(True, rows=1, num=2, cached=1, width=3, heads=1), torch.float32))
    torch.library.opcheck(deep_read_op, (*inputs, "softmax", "triton"), test_utils=REGISTERED)
    every = (inputs[0], *inputs[2:4], *inputs[6:8], visible_of(*inputs[8:]))
    torch.library.opcheck(deep_constant_read_op, (*every, "triton"), test_utils=REGISTERED)
    chosen = leaves(to_dtype(selected_inputs(True, rows=1, num=1), torch.float32))
    torch.library.opcheck(deep_selected_read_op, (*chosen, "triton"), test_utils=REGISTERED)


@with_triton
def test_triton_refuses_what_no_kernel_can_do():
    wide = to_dtype(deep_inputs(True, dim=129, num=1, cached=1), torch.float32)
    with pytest.raises(ValueError, match="129 wide, allowed: up to 128"):
        deep_read(*wide, "softmax", "triton")
    assert choose_backend("auto", "deep_read", wide[0], 129, widest=128) == "torch"
