"""The Triton kernels of deep memories in Triton's interpreter, as `test_triton` does it: see there."""

import os
import subprocess
import sys

import pytest
import torch
from test_deep_memory import visible_of
from test_kernels_torch import choices, randn, read_inputs
from test_triton import DTYPES, compare, inside, poison  # noqa: F401, a fixture

from mc_transformers.kernels.common import choose_backend
from mc_transformers.kernels.deep_read import (
    deep_constant_read,
    deep_constant_read_op,
    deep_read,
    deep_read_op,
    deep_selected_read,
    deep_selected_read_op,
)


pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GROUPS = ("read",)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"test_{group}", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " failed" not in run.stdout


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
    from mc_transformers.kernels import triton_gates

    monkeypatch.setattr(triton_gates, "ELEMENTS", 1)
    monkeypatch.setattr(triton_gates, "PROGRAMS", 0)
    inputs = deep_inputs(True, **READS["packed"])
    compare(lambda *x, backend: deep_read(*x, "softmax", backend), inputs, (0, 1), torch.float32)


@inside
def test_read_ops_are_registered():
    """Fake implementations and autograd, with the Triton implementation chosen."""
    inputs = deep_inputs(True, rows=1, num=2, cached=1, width=3, heads=1)
    inputs = [x.float().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.library.opcheck(deep_read_op, (*inputs, "softmax", "triton"))
    every = (inputs[0], *inputs[2:4], *inputs[6:8], visible_of(*inputs[8:]))
    torch.library.opcheck(deep_constant_read_op, (*every, "triton"))
    chosen = [x.float().requires_grad_() if x.is_floating_point() else x for x in selected_inputs(True, rows=1, num=1)]
    torch.library.opcheck(deep_selected_read_op, (*chosen, "triton"))


@inside
def test_read_refuses_what_no_kernel_can_do():
    wide = [x.float() if x.is_floating_point() else x for x in deep_inputs(True, dim=129, num=1, cached=1)]
    with pytest.raises(ValueError, match="129 wide, allowed: up to 128"):
        deep_read(*wide, "softmax", "triton")
    assert choose_backend("auto", "deep_read", wide[0], 129, widest=128) == "torch"
