"""`state_step`: one more token in the running state of a matrix memory."""

import pytest
import torch

from helpers import randn, with_triton
from mc_transformers.kernels.step.state import state_step, state_step_op
from op_inputs import DTYPES, rms_ratio


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


@with_triton
@pytest.mark.parametrize(
    "key, value, dtype", [*((5, 7, dtype) for dtype in DTYPES), *((*width, torch.bfloat16) for width in WIDTHS)]
)
@pytest.mark.parametrize("rule", RULES)
def test_triton(rule, key, value, dtype):
    inputs = step_inputs(**RULES[rule], key=key, value=value, dtype=dtype)
    before = inputs[0].clone()
    actual = state_step(*inputs, "triton")
    assert actual.dtype == torch.float32 and torch.equal(inputs[0], before)
    assert rms_ratio(actual, state_step(*map(double, inputs), "torch")) < 1e-6


@with_triton
def test_triton_of_views():
    """A state that is one number everywhere, as M_0 is, and keys that are a part of something."""
    _, k, v, *rest = step_inputs(decay=True)
    state, k = torch.zeros(()).expand(3, 2, 5, 7), torch.stack([k, randn(3, 2, 5).float()], 1)[:, 0]
    assert not k.is_contiguous()
    expected = state_step(*map(double, (state, k, v, *rest)), "torch")
    assert rms_ratio(state_step(state, k, v, *rest, "triton"), expected) < 1e-6


@with_triton
def test_triton_with_a_gradient():
    """The kernel has none: torch runs."""
    inputs = step_inputs(**RULES["swla"])
    inputs[2].requires_grad_()
    state_step(*inputs, "triton").sum().backward()
    assert inputs[2].grad.abs().sum() > 0


@with_triton
@pytest.mark.parametrize("rule, backend", [("swla", "torch"), ("swla", "triton"), ("delta", "triton")])
def test_opcheck(rule, backend):
    *inputs, again, delta = step_inputs(**RULES[rule])
    torch.library.opcheck(state_step_op, (*inputs, *(again or [None] * 3), delta, backend))
