"""`gated_sum`: vectors of past segments, each with a gate per number, added up."""

import torch

from helpers import assert_close, randn
from mc_transformers.kernels.read.vector import gated_sum, gated_sum_op
from op_inputs import leaves


def sum_inputs() -> tuple:
    visible = torch.tensor([[[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 1], [0, 1, 1]]]).bool()
    return randn(2, 3, 2, 2, 3), randn(2, 3, 2, 3), randn(2, 3, 2, 3), visible


def test_values_gradients_registration():
    x, p, h, visible = sum_inputs()
    gates = (x[:, :, :, None] + p[:, None, None]).sigmoid()  # [R, N, W, S, H, d]
    expected = (gates * h[:, None, None] * visible[:, :, None, :, None, None]).sum(3)
    assert_close(gated_sum(x, p, h, visible), expected, 1e-12)
    assert torch.autograd.gradcheck(gated_sum, leaves([x, p, h, visible]))
    torch.library.opcheck(gated_sum_op, tuple(leaves([x, p, h, visible])))


def test_no_gates_are_kept():
    """Between the passes there are its inputs, and nothing of size tokens x memories x width."""
    rows, num, slots, heads, width = 1, 16, 4, 2, 8
    x = randn(rows, num, slots, heads, width)
    p, h = randn(rows, num, heads, width), randn(rows, num, heads, width)
    visible = torch.ones(num, num, dtype=torch.bool).tril(-1)[None]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gated_sum(*leaves([x, p, h]), visible)
    assert 0 < sum(kept) <= x.numel() + p.numel() + h.numel() + visible.numel()
