"""`segment_read`: the gated read of all cached memories."""

import pytest
import torch

from helpers import with_triton
from mc_transformers.kernels.read import segment
from mc_transformers.kernels.read.segment import segment_read, segment_read_op
from op_inputs import (
    BFLOAT,
    HALF,
    LARGE_READS,
    READS,
    SINGLE,
    check,
    check_low_precision,
    compare,
    leaves,
    naive_read,
    read_inputs,
    to_dtype,
)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", READS)
def test_values_and_gradients(case, function):
    check(segment_read, naive_read, [*read_inputs(**READS[case]), function])


@pytest.mark.parametrize("case", ["plain", "packed", "sub-blocks"])
def test_block_by_block(case, monkeypatch):
    """The same with a budget so small that tokens and memories are walked through one by one."""
    monkeypatch.setattr("mc_transformers.kernels.read.segment.BUDGET", 1)
    check(segment_read, naive_read, [*read_inputs(**READS[case]), "softmax"])


def calls() -> dict[str, list]:
    """Small inputs of every kind."""
    torch.manual_seed(0)
    size = {"rows": 1, "num": 2, "width": 3, "heads": 2, "key": 2, "value": 3}
    inputs = read_inputs(**size, cached=1, summary=2, blocks=2)
    return {function: [*inputs, function] for function in ("softmax", "sigmoid")}


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(segment_read, leaves(CALLS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(segment_read_op, tuple(leaves(CALLS[name])))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(name, dtype):
    check_low_precision(segment_read, CALLS[name], dtype)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_hidden_memories_do_not_leak(function):
    """NaN in a memory that nobody may see yet, as slots of a cache that were never written may hold."""
    inputs = read_inputs(cached=3)
    summaries, birth = inputs[3], inputs[5]
    hidden = torch.nonzero(birth == 2**30)
    assert len(hidden)
    clean = segment_read(*inputs, function)
    for r, i in hidden.tolist():
        summaries[r, i] = torch.nan
    for expected, actual in zip(clean, segment_read(*inputs, function), strict=True):
        assert torch.equal(actual, expected)


# -------------------------------------------------------------------------------------------------------------- Triton
@with_triton
@pytest.mark.parametrize(
    "case, function, dtype",
    [
        *((case, "softmax", SINGLE) for case in [*READS, *LARGE_READS]),
        *((case, "sigmoid", BFLOAT) for case in [*READS, *LARGE_READS]),
        *((case, "sigmoid", SINGLE) for case in ("plain", "sub-blocks")),
        *((case, "softmax", BFLOAT) for case in ("plain", "sub-blocks")),
        *((case, "softmax", HALF) for case in ("plain", "wide-keys", "wide-values")),
    ],
    ids=str,
)
def test_triton(case, function, dtype):
    inputs = [*read_inputs(**(READS | LARGE_READS)[case])]
    inputs[2] = inputs[2].to(dtype)  # the read rounds states to the queries' dtype; that is not the kernels' error
    compare(lambda *x, backend: segment_read(*x, function, backend), inputs, (0, 1), dtype, rounded=(1, 2, 3))


@with_triton
@pytest.mark.parametrize("case", ["plain", "packed", "sub-blocks"])
def test_triton_block_by_block(case, monkeypatch):
    """The same with gates of one query segment at a time in the backward."""
    from mc_transformers.kernels.read import gates_triton

    monkeypatch.setattr(gates_triton, "ELEMENTS", 1)
    monkeypatch.setattr(gates_triton, "PROGRAMS", 0)
    inputs = read_inputs(**READS[case])
    compare(lambda *x, backend: segment_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


@with_triton
def test_triton_of_hidden_memories():
    """More than one step's memories in a row, of which a query may read none, first, last and in between."""
    inputs = [*read_inputs(rows=1, num=1, cached=70, width=3, heads=1, summary=70, blocks=2)]
    inputs[1] = inputs[1] / 8  # as in a model: logits of about 1
    birth = inputs[5]
    birth[:] = 2**30
    birth[:, 20:22] = birth[:, 50] = 0
    compare(lambda *x, backend: segment_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


@with_triton
def test_triton_of_large_logits():
    """Nothing overflows, and the online gate may vanish."""
    inputs = [*read_inputs()]
    inputs[1] = inputs[1] * 100
    compare(lambda *x, backend: segment_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


def turned(x: torch.Tensor) -> torch.Tensor:
    """x as a tensor whose memory is in another order than its dimensions, without a gap."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@with_triton
def test_triton_of_turned_inputs():
    inputs = read_inputs()
    assert not turned(inputs[0]).is_contiguous()

    def read(*tensors, backend):
        return segment_read(*map(turned, tensors), "softmax", backend)

    compare(read, inputs, (0, 1), torch.float32)


@with_triton
def test_triton_is_registered():
    """Fake implementation and autograd, with the Triton implementation chosen."""
    inputs = to_dtype(read_inputs(rows=1, num=2, cached=1, width=3, heads=1), torch.float32)
    torch.library.opcheck(segment_read_op, (*leaves(inputs), "softmax", "triton"))


@pytest.mark.parametrize("bound", [4, None])
def test_a_bound_is_what_is_paid_for(bound, monkeypatch):
    """Over N segments of which each may read `bound`, as many (segment, memory) pairs are touched, and not N x N."""
    monkeypatch.setattr("mc_transformers.kernels.read.segment.BUDGET", 1)  # blocks of one query segment
    num = 64
    q, u, states, summaries, logit, birth, first = read_inputs(rows=1, num=num, cached=0, heads=1, width=2)
    if bound:
        first = (torch.arange(num) - bound).clamp(min=0)[None]
    touched = []
    logits = segment.gate_logits
    monkeypatch.setattr(segment, "gate_logits", lambda u, z: touched.append(z.shape[1]) or logits(u, z))
    segment_read(q, u, states, summaries, logit, birth, first)
    assert sum(touched) == (sum(min(n, bound) for n in range(num)) if bound else num * (num - 1) // 2)
