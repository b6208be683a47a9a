"""`linear_write`: linear attention with a decay, over segments."""

import math

import pytest
import torch

from helpers import assert_close, with_triton
from mc_transformers.kernels.write.linear import linear_write, linear_write_op
from op_inputs import (
    BFLOAT,
    HALF,
    SINGLE,
    WRITES,
    check,
    check_low_precision,
    compare,
    leaves,
    rms_ratio,
    to_dtype,
    write_inputs,
)


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


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("case", WRITES)
def test_values_and_gradients(case, carry):
    check(linear_write, naive_write, [*write_inputs(**WRITES[case]), carry])


def test_a_decay_of_zero():
    q, k, v, log_decay, initial, starts = write_inputs()
    log_decay[:, 1, 2] = -math.inf
    expected = naive_write(q, k, v, log_decay, initial, starts, True)
    for actual, wanted in zip(linear_write(q, k, v, log_decay, initial, starts, True), expected, strict=True):
        assert_close(actual, wanted, 1e-10)


def calls() -> dict[str, list]:
    """Small inputs of every kind."""
    torch.manual_seed(0)
    size = {"rows": 1, "num": 2, "width": 3, "heads": 2, "key": 2, "value": 3}
    return {
        "carry": [*write_inputs(**size), True],
        "starts": [*write_inputs(**size, starts=True), True],
        "independent": [*write_inputs(**size, initial=False), False],
        "no-decay": [*write_inputs(**size, decay=False), False],
    }


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(linear_write, leaves(CALLS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(linear_write_op, tuple(leaves(CALLS[name])))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(name, dtype):
    check_low_precision(linear_write, CALLS[name], dtype)


# -------------------------------------------------------------------------------------------------------------- Triton
TRITON_WRITES = {
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


@with_triton
@pytest.mark.parametrize(
    "case, carry, dtype",
    [
        *((case, carry, SINGLE) for case in TRITON_WRITES for carry in (False, True)),
        *((case, True, BFLOAT) for case in TRITON_WRITES),
        *((case, False, dtype) for case in ("starts", "wide-keys") for dtype in (HALF, BFLOAT)),
    ],
    ids=str,
)
def test_triton(case, carry, dtype):
    compare(
        lambda *x, backend: linear_write(*x, carry, backend), write_inputs(**TRITON_WRITES[case]), (0, 1, 2), dtype
    )


@with_triton
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("width", [32, 37])
def test_triton_in_pieces(width, carry, monkeypatch):
    """A segment that is longer than a unit is cut into pieces."""
    from mc_transformers.kernels.write import linear_triton

    monkeypatch.setattr(linear_triton, "LONGEST", 16)
    monkeypatch.setattr(linear_triton, "PIECE", 16)
    inputs = write_inputs(num=3, width=width, heads=1, starts=carry)
    compare(lambda *x, backend: linear_write(*x, carry, backend), inputs, (0, 1, 2), torch.float32)


@with_triton
def test_triton_with_a_decay_of_zero():
    q, k, v, log_decay, initial, starts = to_dtype(write_inputs(width=20), torch.float32)
    log_decay[:, 1, 2] = -torch.inf
    exact = to_dtype((q, k, v, log_decay, initial, starts), torch.float64)
    actual = linear_write(q, k, v, log_decay, initial, starts, True, "triton")
    for a, e in zip(actual, linear_write(*exact, True, "torch"), strict=True):
        assert rms_ratio(a, e) < 1e-5


@with_triton
def test_triton_with_mixed_dtypes():
    """Normalised queries and keys come in fp32 out of an autocast region, values in half precision."""
    inputs = write_inputs(width=20)
    compare(lambda *x, backend: linear_write(*x, False, backend), inputs, (0,), torch.float32)
    actual = linear_write(*(x.float() for x in inputs[:2]), inputs[2].bfloat16(), *[None] * 3, False, "triton")[0]
    expected = linear_write(*inputs[:2], inputs[2].bfloat16().double(), *[None] * 3, False, "torch")[0]
    assert actual.dtype == torch.float32 and rms_ratio(actual, expected) < 1e-2


@with_triton
def test_triton_is_registered():
    """Fake implementation and autograd, with the Triton implementation chosen."""
    inputs = to_dtype(write_inputs(rows=1, num=2, width=3, heads=1), torch.float32)
    torch.library.opcheck(linear_write_op, (*leaves(inputs), True, "triton"))
