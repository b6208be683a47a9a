"""`segment_route`, which chooses the best k memories per token, and `selected_read`, which reads them."""

import pytest
import torch

from helpers import assert_close, randn, with_triton
from mc_transformers.kernels.read.gates import logits_of_chosen
from mc_transformers.kernels.read.selected import segment_route, segment_route_op, selected_read, selected_read_op
from op_inputs import (
    BFLOAT,
    DTYPES,
    HALF,
    LARGE_READS,
    READS,
    SINGLE,
    check,
    check_low_precision,
    choices,
    compare,
    leaves,
    read_inputs,
    results,
    score,
    to_dtype,
    visible_to,
)


# --------------------------------------------------------------------------------------------------------------- route
def route(*inputs, top_k=2, backend="torch"):
    """The logits alone, finite."""
    return segment_route(*inputs, top_k, backend)[1].nan_to_num(neginf=0)


def naive_route(u, summaries, birth, first):
    index = segment_route(u, summaries, birth, first, 2)[0]
    return logits_of_chosen(u, summaries, index).masked_fill(index < 0, 0)


@pytest.mark.parametrize("case", ["plain", "packed", "sub-blocks"])
def test_gradients_of_the_logits(case):
    """Through the logits of what was chosen, gathered row by row."""
    _, u, _, summaries, _, birth, first = read_inputs(**READS[case])
    check(route, naive_route, [u, summaries, birth, first])


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
@pytest.mark.parametrize("case", READS)
def test_route(case, top_k):
    _, u, _, summaries, _, birth, first = read_inputs(**READS[case])
    index, logits = segment_route(u, summaries, birth, first, top_k)
    assert index.shape == logits.shape == (*u.shape[:-1], top_k)
    assert_close(*(x.nan_to_num(neginf=-9) for x in (logits, logits_of_chosen(u, summaries, index))), 1e-12)
    for r, n, w, h in torch.cartesian_prod(*(torch.arange(x) for x in u.shape[:-1])).tolist():
        scores = {i: score(u[r, n, w, h], summaries[r, i, h]).item() for i in visible_to(birth, first, r, n)}
        best = sorted(scores, key=scores.get, reverse=True)[:top_k]
        chosen = [i for i in index[r, n, w, h].tolist() if i >= 0]
        assert sorted(chosen) == sorted(best)


def test_route_block_by_block(monkeypatch):
    _, u, _, summaries, _, birth, first = read_inputs(num=4)
    inputs = [u, summaries, birth, first]
    whole = results(route, inputs)
    monkeypatch.setattr("mc_transformers.kernels.read.selected.ROUTE_BUDGET", 1)
    for part, expected in zip(results(route, inputs), whole, strict=True):
        assert_close(part, expected, 1e-12)


def test_route_of_hidden_memories():
    """NaN in a memory that nobody may see yet, as slots of a cache that were never written may hold."""
    _, u, _, summaries, _, birth, first = read_inputs(cached=3)
    clean = segment_route(u, summaries, birth, first, 3)
    summaries[birth == 2**30] = torch.nan
    assert summaries.isnan().any()
    assert all(map(torch.equal, segment_route(u, summaries, birth, first, 3), clean))


def test_route_opcheck():
    _, u, _, summaries, _, birth, first = read_inputs(rows=1, num=2, width=3, cached=1, summary=2, blocks=2)
    torch.library.opcheck(segment_route_op, (u, summaries, birth, first, 2))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the other one adds integers up
    torch.library.opcheck(segment_route_op, (*leaves([u, summaries]), birth, first, 2), test_utils=checks)


@with_triton
@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
@pytest.mark.parametrize("case", [*READS, "many-memories", "wide-keys"])
def test_triton_route(case, top_k):
    _, u, _, summaries, _, birth, first = read_inputs(**(READS | LARGE_READS)[case])
    for dtype in DTYPES if top_k == 2 else [SINGLE]:
        u, summaries = u.to(dtype), summaries.float()
        expected = segment_route(u.double(), summaries.double(), birth, first, top_k, "torch")[0]
        assert torch.equal(segment_route(u, summaries, birth, first, top_k, "triton")[0], expected)
        if top_k == 2:

            def run(*x, backend):
                return route(*x, birth, first, backend=backend)

            compare(run, [u, summaries], (0,), dtype, rounded=(0, 1))


# ---------------------------------------------------------------------------------------------------------------- read
def naive_selected(q, weights, states, index):
    out = []
    for r, n, w, h in torch.cartesian_prod(*(torch.arange(x) for x in q.shape[:-1])).tolist():
        answer = torch.zeros(states.shape[-1], dtype=q.dtype)
        for weight, i in zip(weights[r, n, w, h], index[r, n, w, h].tolist(), strict=True):
            if i >= 0:
                answer = answer + weight * (states[r, i, h].T @ q[r, n, w, h])
        out.append(answer)
    return torch.stack(out).view(*q.shape[:-1], -1)


SELECTED = {
    "plain": {},
    "k1": {"top_k": 1},
    "all": {"top_k": 5},
    "one-token": {"num": 1, "width": 1},
    "several-tiles": {"rows": 1, "num": 4, "width": 29, "heads": 1, "memories": 2},  # more than one tile per memory
}


@pytest.mark.parametrize("key, value", [(3, 4), (5, 1)])
@pytest.mark.parametrize("case", SELECTED)
def test_values_and_gradients(case, key, value):
    weights, index = choices(**SELECTED[case])
    states = randn(index.shape[0], SELECTED[case].get("memories", 5), index.shape[3], key, value)
    check(selected_read, naive_selected, [randn(*index.shape[:-1], key), weights, states, index])


def test_a_read_of_nothing():
    """The first segment of a prompt: no memory is chosen anywhere."""
    index = torch.full((1, 1, 4, 2, 1), -1)
    weights, states = torch.zeros(index.shape, dtype=torch.float64), randn(1, 1, 2, 3, 4)
    check(selected_read, naive_selected, [randn(1, 1, 4, 2, 3), weights, states, index])


def small_call() -> list:
    torch.manual_seed(0)
    weights, index = choices(1, 2, 3, 2, 3, 2)
    return [randn(1, 2, 3, 2, 2), weights, randn(1, 3, 2, 2, 3), index]


def test_gradcheck():
    assert torch.autograd.gradcheck(selected_read, leaves(small_call()))


def test_opcheck():
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(selected_read_op, tuple(leaves(small_call())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    check_low_precision(selected_read, small_call(), dtype)


TRITON_SELECTED = {
    "plain": {},
    "one-choice": {"num": 2, "width": 7, "heads": 3, "memories": 3, "top_k": 1},
    "several-tiles": {"rows": 1, "num": 4, "width": 40, "heads": 1, "memories": 2, "top_k": 2},
    "one-token": {"rows": 2, "num": 1, "width": 1},
}
WIDTHS = [(3, 4), (150, 20), (20, 150), (1, 9)]


@with_triton
@pytest.mark.parametrize(
    "case, key, value, dtype",
    [
        *((case, *widths, SINGLE) for case in TRITON_SELECTED for widths in WIDTHS),
        *(("plain", *widths, BFLOAT) for widths in WIDTHS),
        *((case, 3, 4, BFLOAT) for case in TRITON_SELECTED if case != "plain"),
        *(("plain", *widths, HALF) for widths in WIDTHS[:2]),
    ],
    ids=str,
)
def test_triton(case, key, value, dtype):
    weights, index = choices(**TRITON_SELECTED[case])
    rows, _, _, heads, _ = index.shape
    q = randn(*index.shape[:-1], key)
    states = randn(rows, TRITON_SELECTED[case].get("memories", 5), heads, key, value).to(dtype)

    def read(*x, backend):
        return selected_read(*x, index, backend)

    compare(read, [q, weights, states], (0,), dtype, rounded=(2,))


@with_triton
def test_triton_is_registered():
    """Fake implementation and autograd, with the Triton implementation chosen."""
    weights, index = choices(rows=1, num=2, width=3, heads=1, memories=3)
    inputs = to_dtype([randn(1, 2, 3, 1, 3), weights, randn(1, 3, 1, 3, 4), index], torch.float32)
    torch.library.opcheck(selected_read_op, (*leaves(inputs), "triton"))
