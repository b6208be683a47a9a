"""`recurrence`: torch's fused LSTM and GRU as an op."""

import pytest
import torch

from helpers import assert_close, randn
from mc_transformers.kernels.shared.ops import NAMESPACE
from mc_transformers.kernels.write.recurrent import recurrence, recurrence_torch
from op_inputs import leaves, to_dtype


def recurrence_inputs(lstm: bool, empty: bool) -> list:
    x, gates = randn(2, 4, 3), 4 if lstm else 3
    weights = [randn(gates * 2, 3), randn(gates * 2, 2), randn(gates * 2), randn(gates * 2)]
    slots = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]).bool() if empty else None
    return [x, *weights, randn(2, 2), randn(2, 2) if lstm else None, slots]


RECURRENCES = {"lstm": (True, False), "lstm-with-empty-slots": (True, True), "gru": (False, False)}


@pytest.mark.parametrize("case", RECURRENCES)
def test_op(case):
    """What the compiler gets: registration, and the same gradients as plain autograd."""
    op, inputs = getattr(torch.ops, NAMESPACE).recurrence, recurrence_inputs(*RECURRENCES[case])
    torch.library.opcheck(op.default, tuple(leaves(inputs)))
    assert torch.autograd.gradcheck(op, leaves(inputs))
    found = []
    for function in (op, recurrence_torch):
        trained = leaves(inputs)
        out = function(*trained)
        total = out[0].sin().sum() + out[1].cos().sum()
        floats = [x for x in trained if torch.is_tensor(x) and x.requires_grad]
        found.append((*out, *torch.autograd.grad(total, floats)))
    for actual, expected in zip(*found, strict=True):
        if expected.numel():
            assert_close(actual, expected, 1e-10)


def test_an_empty_slot_leaves_the_cell_exactly_as_it_is():
    for dtype in (torch.float32, torch.bfloat16):
        x, *rest = to_dtype(recurrence_inputs(True, False), dtype)
        weights, (hidden, cell, _) = rest[:4], rest[4:]
        empty = torch.ones(2, 4, dtype=torch.bool)
        assert torch.equal(recurrence(x, weights, hidden, cell, empty)[1], cell.float())
