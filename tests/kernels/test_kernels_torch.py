"""Each op of kernels/ against a naive loop that is written from the equations: values, gradients, registration."""

import math

import pytest
import torch

from helpers import assert_close, relative_error
from mc_transformers.kernels.read.segment import segment_read, segment_read_op
from mc_transformers.kernels.read.selected import segment_route, segment_route_op, selected_read, selected_read_op
from mc_transformers.kernels.write.linear import linear_write, linear_write_op


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------- the naive loops
def naive_write(q, k, v, log_decay, initial, starts, carry):
    """eq. 12 with a decay, token by token, head by head."""
    rows, num, width, heads, _ = q.shape
    answers, ends = [], []
    for r in range(rows):
        for h in range(heads):
            state = initial[r, h] if initial is not None else torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype)
            for n in range(num):
                if (n > 0 and not carry) or (starts is not None and starts[r, n]):
                    state = torch.zeros_like(state)
                for w in range(width):
                    decay = 1.0 if log_decay is None else log_decay[r, n, w, h].exp()
                    state = decay * state + torch.outer(k[r, n, w, h], v[r, n, w, h])
                    answers.append(state.T @ q[r, n, w, h])
                ends.append(state)
    answers = torch.stack(answers).view(rows, heads, num, width, -1).permute(0, 2, 3, 1, 4)
    return answers, torch.stack(ends).view(rows, heads, num, *ends[0].shape).transpose(1, 2)


def visible_to(birth, first, r, n):
    return [i for i in range(birth.shape[1]) if birth[r, i] <= n and i >= first[r, n]]


def score(u, means):
    """The largest `<u, mean>` over the sub-blocks of a segment."""
    return (means @ u).max()


def naive_read(q, u, states, summaries, online_logit, birth, first, function):
    """eq. 9 and 10, one token after the other."""
    rows, num, width, heads, _ = q.shape
    answers, online = [], []
    for r, n, w, h in torch.cartesian_prod(*(torch.arange(x) for x in (rows, num, width, heads))).tolist():
        seen = visible_to(birth, first, r, n)
        logits = [score(u[r, n, w, h], summaries[r, i, h]) for i in seen] + [online_logit[r, n, w, h]]
        logits = torch.stack(logits)
        gates = logits.softmax(0) if function == "softmax" else logits.sigmoid()
        answer = torch.zeros(states.shape[-1], dtype=q.dtype)
        for gate, i in zip(gates, seen, strict=False):
            answer = answer + gate * (states[r, i, h].T @ q[r, n, w, h])
        answers.append(answer)
        online.append(gates[-1])
    return torch.stack(answers).view(*q.shape[:-1], -1), torch.stack(online).view(q.shape[:-1])


def naive_selected(q, weights, states, index):
    out = []
    for r, n, w, h in torch.cartesian_prod(*(torch.arange(x) for x in q.shape[:-1])).tolist():
        answer = torch.zeros(states.shape[-1], dtype=q.dtype)
        for weight, i in zip(weights[r, n, w, h], index[r, n, w, h].tolist(), strict=True):
            if i >= 0:
                answer = answer + weight * (states[r, i, h].T @ q[r, n, w, h])
        out.append(answer)
    return torch.stack(out).view(*q.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------------- the inputs
def write_inputs(rows=2, num=3, width=5, heads=2, key=3, value=4, decay=True, initial=True, starts=False, dtype=None):
    dtype = dtype or torch.float64
    shape = (rows, num, width, heads)
    return (
        randn(*shape, key, dtype=dtype),
        randn(*shape, key, dtype=dtype),
        randn(*shape, value, dtype=dtype),
        torch.nn.functional.logsigmoid(randn(*shape) + 2).to(dtype) if decay else None,
        randn(rows, heads, key, value, dtype=dtype) if initial else None,
        (torch.arange(num) % 2 == 1).expand(rows, -1).contiguous() if starts else None,
    )


def read_inputs(rows=2, num=3, cached=2, width=5, heads=2, key=3, value=4, summary=5, blocks=1, packed=False):
    memories = cached + num
    # rows with different numbers of kept memories; new ones are born one segment later
    birth = torch.cat([torch.zeros(rows, cached), torch.arange(1, num + 1).expand(rows, -1)], 1).long()
    if cached:
        birth[0, 0] = 2**30
    first = torch.zeros(rows, num, dtype=torch.long)
    if packed:
        first[:, num // 2 :] = num // 2
    return (
        randn(rows, num, width, heads, key),
        randn(rows, num, width, heads, summary),
        randn(rows, memories, heads, key, value),
        randn(rows, memories, heads, blocks, summary),
        randn(rows, num, width, heads),
        birth,
        first,
    )


def choices(rows=2, num=3, width=5, heads=2, memories=5, top_k=2):
    """Distinct memories per token and head, -1 for the ones that are missing, with weight 0."""
    index = torch.rand(rows, num, width, heads, memories).argsort(-1)[..., :top_k].contiguous()
    index[:, 0, :, :, -1] = -1
    index[:, 0, :2] = -1
    return randn(*index.shape) * (index >= 0), index


def check(op, naive, inputs, tolerance=1e-10):
    """Values, and the gradients of all float inputs under random gradients of all outputs."""
    inputs = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    trained = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    results = []
    for function in (op, naive):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(3)
        total = sum((x * randn(*x.shape)).sum() for x in outputs) + 0 * sum(x.sum() for x in trained)
        results.append((*outputs, *torch.autograd.grad(total, trained, materialize_grads=True)))
    for number, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(actual, expected, tolerance, f"output or gradient {number}")


WRITES = {
    "plain": {},
    "no-decay": {"decay": False},
    "zero-start": {"initial": False},
    "starts": {"starts": True},
    "nothing": {"decay": False, "initial": False},
    "odd": {"rows": 1, "num": 2, "width": 7, "heads": 3, "key": 5, "value": 1},
    "one-token": {"rows": 3, "num": 1, "width": 1},
    "sub-chunks": {"rows": 1, "num": 2, "width": 131, "heads": 1},
    "whole-sub-chunks": {"rows": 1, "num": 2, "width": 128, "heads": 1, "starts": True},
}


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("case", WRITES)
def test_linear_write(case, carry):
    check(linear_write, naive_write, [*write_inputs(**WRITES[case]), carry])


def test_linear_write_with_a_decay_of_zero():
    q, k, v, log_decay, initial, starts = write_inputs()
    log_decay[:, 1, 2] = -math.inf
    expected = naive_write(q, k, v, log_decay, initial, starts, True)
    for actual, wanted in zip(linear_write(q, k, v, log_decay, initial, starts, True), expected, strict=True):
        assert_close(actual, wanted, 1e-10)


READS = {
    "plain": {},
    "nothing-kept": {"cached": 0},
    "sub-blocks": {"blocks": 3},
    "packed": {"num": 4, "cached": 0, "packed": True},
    "one-segment": {"num": 1, "cached": 0},
    "one-segment-sub-blocks": {"num": 1, "cached": 0, "blocks": 2},
    "one-token": {"num": 1, "width": 1, "cached": 4},
    "odd": {"rows": 1, "num": 5, "width": 3, "heads": 3, "key": 7, "value": 1, "summary": 2},
}


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", READS)
def test_segment_read(case, function):
    check(segment_read, naive_read, [*read_inputs(**READS[case]), function])


@pytest.mark.parametrize("case", ["plain", "packed", "sub-blocks"])
def test_segment_read_block_by_block(case, monkeypatch):
    """The same with a budget so small that tokens and memories are walked through one by one."""
    monkeypatch.setattr("mc_transformers.kernels.read.segment.BUDGET", 1)
    check(segment_read, naive_read, [*read_inputs(**READS[case]), "softmax"])


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
@pytest.mark.parametrize("case", READS)
def test_segment_route(case, top_k):
    _, u, _, summaries, _, birth, first = read_inputs(**READS[case])
    index = segment_route(u, summaries, birth, first, top_k)
    assert index.shape == (*u.shape[:-1], min(top_k, summaries.shape[1]))
    for r, n, w, h in torch.cartesian_prod(*(torch.arange(x) for x in u.shape[:-1])).tolist():
        scores = {i: score(u[r, n, w, h], summaries[r, i, h]).item() for i in visible_to(birth, first, r, n)}
        best = sorted(scores, key=scores.get, reverse=True)[:top_k]
        chosen = [i for i in index[r, n, w, h].tolist() if i >= 0]
        assert sorted(chosen) == sorted(best)


def test_segment_route_block_by_block(monkeypatch):
    _, u, _, summaries, _, birth, first = read_inputs(num=4)
    whole = segment_route(u, summaries, birth, first, 2)
    monkeypatch.setattr("mc_transformers.kernels.read.selected.ROUTE_BUDGET", 1)
    assert torch.equal(segment_route(u, summaries, birth, first, 2), whole)


SELECTED = {
    "plain": {},
    "k1": {"top_k": 1},
    "all": {"top_k": 5},
    "one-token": {"num": 1, "width": 1},
    "several-tiles": {"rows": 1, "num": 4, "width": 29, "heads": 1, "memories": 2},  # more than one tile per memory
}


@pytest.mark.parametrize("key, value", [(3, 4), (5, 1)])
@pytest.mark.parametrize("case", SELECTED)
def test_selected_read(case, key, value):
    weights, index = choices(**SELECTED[case])
    states = randn(index.shape[0], SELECTED[case].get("memories", 5), index.shape[3], key, value)
    check(selected_read, naive_selected, [randn(*index.shape[:-1], key), weights, states, index])


def test_selected_read_of_nothing():
    """The first segment of a prompt: no memory is chosen anywhere."""
    index = torch.full((1, 1, 4, 2, 1), -1)
    weights, states = torch.zeros(index.shape, dtype=torch.float64), randn(1, 1, 2, 3, 4)
    check(selected_read, naive_selected, [randn(1, 1, 4, 2, 3), weights, states, index])


# ------------------------------------------------------------------------------------------------ gradcheck, opcheck
def small_calls() -> dict:
    """One small call of every op: function, op, inputs."""
    torch.manual_seed(0)
    size = {"rows": 1, "num": 2, "width": 3, "heads": 2, "key": 2, "value": 3}
    write = write_inputs(**size)
    read = read_inputs(**size, cached=1, summary=2, blocks=2)
    weights, index = choices(1, 2, 3, 2, 3, 2)
    select = (randn(1, 2, 3, 2, 2), weights, randn(1, 3, 2, 2, 3), index)
    return {
        "linear_write": (linear_write, linear_write_op, (*write, True)),
        "linear_write-starts": (linear_write, linear_write_op, (*write_inputs(**size, starts=True), True)),
        "linear_write-independent": (linear_write, linear_write_op, (*write_inputs(**size, initial=False), False)),
        "linear_write-no-decay": (linear_write, linear_write_op, (*write_inputs(**size, decay=False), False)),
        "segment_read": (segment_read, segment_read_op, (*read, "softmax")),
        "segment_read-sigmoid": (segment_read, segment_read_op, (*read, "sigmoid")),
        "selected_read": (selected_read, selected_read_op, select),
        "segment_route": (segment_route, segment_route_op, (read[1], read[3], read[5], read[6], 2)),
    }


CALLS = small_calls()


def leaves(inputs, grad: bool) -> list:
    floats = [torch.is_tensor(x) and x.is_floating_point() for x in inputs]
    return [x.detach().clone().requires_grad_(grad) if f else x for x, f in zip(inputs, floats, strict=True)]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "segment_route"])
def test_gradcheck(name):
    function, _, inputs = CALLS[name]
    assert torch.autograd.gradcheck(function, leaves(inputs, True))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    _, op, inputs = CALLS[name]
    torch.library.opcheck(op, tuple(leaves(inputs, name != "segment_route")))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "segment_route"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(name, dtype):
    """fp32 within 1e-5 of float64; bf16 inputs are computed in fp32, so only the output's rounding is left."""
    function, _, inputs = CALLS[name]
    low = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in low]
    actual, expected = function(*low), function(*exact)
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert actual[0].dtype == dtype
    for got, wanted in zip(actual, expected, strict=True):
        assert relative_error(got.double(), wanted) < (1e-5 if got.dtype == torch.float32 else 5e-3)
    assert all(x.dtype == torch.float32 for x in actual[1:])  # states and gates


def test_hidden_memories_do_not_leak():
    """NaN in a memory that nobody may see yet, as slots of a cache that were never written may hold."""
    q, u, states, summaries, logit, birth, first = read_inputs(cached=3)
    hidden = torch.nonzero(birth == 2**30)
    assert len(hidden)
    clean = segment_read(q, u, states, summaries, logit, birth, first, "softmax")
    for r, i in hidden.tolist():
        summaries[r, i] = torch.nan
    for function in ("softmax", "sigmoid"):
        dirty = segment_read(q, u, states, summaries, logit, birth, first, function)
        assert all(x.isfinite().all() for x in dirty)
    dirty = segment_read(q, u, states, summaries, logit, birth, first, "softmax")
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    clean = segment_route(u, summaries.nan_to_num(), birth, first, 3)
    assert torch.equal(segment_route(u, summaries, birth, first, 3), clean)
