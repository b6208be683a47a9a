"""`decode_step`: gates, choice and read for one token per row."""

import itertools

import pytest
import torch

from helpers import with_triton
from mc_transformers.kernels.step.decode import decode_step, decode_step_op
from op_inputs import rms_ratio, token_inputs


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
STORED = [torch.bfloat16, torch.float16, torch.int8]


@with_triton
@pytest.mark.parametrize(
    "case, stored", [*((case, torch.float32) for case in TOKENS), *itertools.product(("grm", "ssc"), STORED)]
)
def test_triton(case, stored):
    inputs, exact = token_inputs(**TOKENS[case], stored=stored)
    out, chosen = decode_step(*inputs, "triton")
    expected, known = decode_step(*exact, "torch")
    assert out.dtype == torch.float32 and rms_ratio(out, expected) < 1e-5
    if known is None:
        assert chosen is None
    else:
        assert torch.equal(chosen.sort(-1).values, known.sort(-1).values)


@with_triton
def test_triton_in_parts(monkeypatch):
    """Several programs share the memories of a row and head, and one program takes them all."""
    from mc_transformers.kernels.step import decode_triton

    inputs, exact = token_inputs(rows=1, memories=37, heads=1)
    expected, _ = decode_step(*exact, "torch")
    for programs in (1, 3, 512):
        monkeypatch.setattr(decode_triton, "PROGRAMS", programs)
        assert rms_ratio(decode_step(*inputs, "triton")[0], expected) < 1e-5


@with_triton
def test_triton_with_a_gradient():
    """The kernels have none: torch runs."""
    inputs, exact = token_inputs(top_k=2)
    inputs[4] = inputs[4].nan_to_num()
    inputs[0].requires_grad_()
    decode_step(*inputs, "triton")[0].sum().backward()
    assert inputs[0].grad.abs().sum() > 0


@with_triton
def test_triton_is_registered():
    for case in ("grm", "ssc", "route"):
        inputs, _ = token_inputs(**TOKENS[case])
        inputs[4] = inputs[4].nan_to_num()
        torch.library.opcheck(decode_step_op, (*inputs, "triton"))
