"""The room of gates: every function's value and derivative, the logits and the choice, and names that are refused."""

import pytest
import torch

from helpers import GATE_NAMES, assert_close, randn, with_triton
from mc_transformers import MCConfig
from mc_transformers.kernels.read.deep import deep_read, deep_read_op
from mc_transformers.kernels.read.gates import (
    CONSTANT,
    GATE_FUNCTIONS,
    HIDDEN,
    GateFunction,
    apply_gates,
    choose_best,
    content_gates,
    gate_logits,
    gate_logits_backward,
    grid_gates,
    logits_of_chosen,
    token_gates,
)
from mc_transformers.kernels.read.segment import segment_read, segment_read_op
from mc_transformers.kernels.step.decode import decode_step, decode_step_op
from op_inputs import READS, check, compare, naive_read, read_inputs, rms_ratio, to_dtype, token_inputs, visible_to


ALL_NAMES = list(GATE_FUNCTIONS)
IN_TRITON = [name for name, function in GATE_FUNCTIONS.items() if function.triton]


# ------------------------------------------------------------------------------------------------------ the functions
def by_hand(logits: torch.Tensor, name: str) -> torch.Tensor:
    """Gates `[S + 1]` of one token, number by number; the online logit is the last."""
    numbers = logits.tolist()
    if name == "softmax":
        weights = [torch.tensor(x).exp().item() for x in numbers]
    elif name == "relu":
        weights = [max(x, 0.0) for x in numbers]
        if not any(weights):
            return torch.tensor([0.0] * (len(numbers) - 1) + [1.0])
    else:
        each = {"sigmoid": lambda x: 1 / (1 + torch.tensor(-x).exp().item()), CONSTANT: lambda x: float(x > HIDDEN)}
        return torch.tensor([each[name](x) for x in numbers])
    return torch.tensor([weight / sum(weights) for weight in weights])


ROWS = {  # the online logit is the last
    "mixed": [0.7, -1.2, 2.0, 0.3],
    "hidden": [HIDDEN, 1.5, HIDDEN, -0.4],
    "all-negative": [-0.7, HIDDEN, -2.0, -0.1],
    "only-online": [HIDDEN, HIDDEN, HIDDEN, 0.9],
    "only-past": [0.2, -0.5, HIDDEN, -3.0],
}


@pytest.mark.parametrize("name", ALL_NAMES)
def test_values(name):
    logits = torch.tensor(list(ROWS.values()), dtype=torch.float64)
    past, online = apply_gates(logits[:, :-1], logits[:, -1], name)
    expected = torch.stack([by_hand(row, name) for row in logits]).double()
    assert_close(past, expected[:, :-1], 1e-6)
    assert_close(online, expected[:, -1], 1e-6)
    assert (past[logits[:, :-1] == HIDDEN] == 0).all()


def test_relu_gates_that_are_all_shut_leave_the_online_memory_alone():
    for total in (-1.0, 0.0):
        past, online = apply_gates(torch.full((2, 3), total), torch.full((2,), total), "relu")
        assert (past == 0).all() and (online == 1).all()
    past, online = apply_gates(torch.full((2, 0), 1.0), torch.tensor([-1.0, 3.0]), "relu")  # nothing is kept yet
    assert past.shape == (2, 0) and (online == 1).all()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_pull_backs(name):
    """The derivative that the ops use is that of autograd and of differences, and shuts out what is hidden."""
    logits, function = torch.tensor(list(ROWS.values()), dtype=torch.float64), GATE_FUNCTIONS[name]
    seen = logits > HIDDEN
    with torch.enable_grad():
        leaf = logits.masked_fill(~seen, 0).requires_grad_()
        gates = function.value(leaf.masked_fill(~seen, HIDDEN))
        grad = randn(*gates.shape)
        if name != CONSTANT:
            (expected,) = torch.autograd.grad(gates, leaf, grad)
            torch.autograd.gradcheck(lambda x: function.value(x.masked_fill(~seen, HIDDEN)), leaf)
        else:
            expected = torch.zeros_like(grad)
    actual = function.pull_back(logits, gates.detach(), grad)
    assert_close(actual, expected, 1e-12)
    assert actual.isfinite().all() and (actual[~seen] == 0).all()


# ------------------------------------------------------------------------------------------------ logits and a choice
@pytest.mark.parametrize("blocks", [1, 3])
def test_logits(blocks):
    u, summaries = randn(2, 3, 4, 5).requires_grad_(), randn(2, 3, 6, blocks, 5).requires_grad_()
    logits, choice = gate_logits(u, summaries)
    assert_close(logits.detach(), torch.einsum("...td,...smd->...tsm", u, summaries).amax(-1).detach(), 1e-12)
    grad = randn(*logits.shape)
    actual = gate_logits_backward(grad, choice, u.detach(), summaries.detach())
    for found, expected in zip(actual, torch.autograd.grad(logits, (u, summaries), grad), strict=True):
        assert_close(found, expected, 1e-12)


def test_the_choice():
    logits = torch.tensor([[0.1, 3.0, HIDDEN, 2.0], [HIDDEN, HIDDEN, HIDDEN, -5.0]])
    assert choose_best(logits, 2).tolist() == [[1, 3], [3, -1]]
    assert choose_best(logits, 9)[0].tolist() == [1, 3, 0, *[-1] * 6]
    u, summaries = randn(1, 2, 3, 2, 5), randn(1, 4, 2, 2, 5)  # [R, N, W, H, d], [R, S, H, m, d]
    every = torch.einsum("rnwhd,rshmd->rnwhsm", u, summaries).amax(-1)
    index = choose_best(every, 2)
    index[..., 1] = -1
    chosen = logits_of_chosen(u, summaries, index)
    assert_close(chosen[..., 0], every.amax(-1), 1e-12)
    assert (chosen[..., 1] == HIDDEN).all()


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("top_k", [0, 2, 9])
def test_gates_of_tokens(name, top_k):
    """Of some tokens at once, of one, and of a grid: the same gates."""
    u, online_logit, summaries = randn(2, 3, 2, 5), randn(2, 3, 2), randn(2, 4, 2, 2, 5)
    visible = torch.tensor([[True, False, True, True], [False] * 4])
    past, online, index = content_gates(u, online_logit, summaries, visible, None, top_k, name)
    assert (index is None) == (top_k == 0)
    for t in range(3):
        given = None if index is None else index[:, t]
        for choice in (None, given):
            found = token_gates(u[:, t], online_logit[:, t], summaries, visible, choice, top_k, name)
            assert torch.equal(found[0], past[:, t]) and torch.equal(found[1], online[:, t])
    if not top_k:
        birth = torch.where(visible, 0, 2**30)
        whole = grid_gates(u[:, None], summaries, online_logit[:, None], birth, birth.new_zeros(2, 1), name)
        assert_close(whole[0][:, 0], past, 1e-12)
        assert_close(whole[1][:, 0], online, 1e-12)


# -------------------------------------------------------------------------------------------------------- in the ops
def naive_gated(name):
    def read(q, u, states, summaries, online_logit, birth, first):
        """eq. 9 and 10 with this gate function, from plain sums that autograd looks through."""
        logits = torch.einsum("rnwhd,rshmd->rnwhsm", u, summaries).amax(-1)
        seen = torch.zeros(*q.shape[:2], birth.shape[1], dtype=torch.bool)
        for r in range(len(q)):
            for n in range(q.shape[1]):
                seen[r, n, visible_to(birth, first, r, n)] = True
        past, online = apply_gates(logits.masked_fill(~seen[:, :, None, None], HIDDEN), online_logit, name)
        return torch.einsum("rnwhs,rnwhk,rshkv->rnwhv", past, q, states), online

    return read


@pytest.mark.parametrize("case", [case for case in READS if "one-segment" not in case])  # whose gradients are zero
def test_segment_read_with_relu(case):
    """The others are in the op's own tests."""
    inputs = read_inputs(**READS[case])
    check(lambda *x: segment_read(*x, "relu"), naive_gated("relu"), [*inputs])


def test_the_oracle_of_relu_is_that_of_the_others():
    inputs = read_inputs()
    for name in ("softmax", "sigmoid"):
        for found, expected in zip(naive_gated(name)(*inputs), naive_read(*inputs, name), strict=True):
            assert_close(found, expected, 1e-12)


def deep_inputs(rows=1, num=3, cached=1, width=4, heads=2, dim=9) -> list:
    q, u, _, summaries, online_logit, birth, first = read_inputs(rows, num, cached, width, heads, dim, dim, 4, 2)
    w2, w1 = randn(rows, cached + num, heads, dim, 13) / dim**0.5, randn(rows, cached + num, heads, 13, dim)
    return [q, u, w2, w1, summaries, online_logit, randn(heads, dim), randn(heads, dim), birth, first]


def test_deep_read_with_relu():
    def naive(q, u, w2, w1, summaries, online_logit, scale, shift, birth, first):
        past, online = grid_gates(u, summaries, online_logit, birth, first, "relu")
        hidden = torch.nn.functional.gelu(torch.einsum("rnwhd,rshdk->rnwhsk", q, w2))
        normed = torch.nn.functional.layer_norm(
            torch.einsum("rnwhsk,rshkd->rnwhsd", hidden, w1), q.shape[-1:], eps=1e-6
        )
        answers = q[..., None, :] + normed * scale[:, None] + shift[:, None]
        return (past[..., None] * answers).sum(-2), online

    check(lambda *x: deep_read(*x, "relu"), naive, deep_inputs(), 1e-8)


# ------------------------------------------------------------------------------------------------------------ refused
def calls(name: str) -> dict:
    """Every op that takes a gate function: itself, what users call, and the arguments of both."""
    token = (randn(2, 2, 3), randn(2, 2, 4), randn(2, 2, 3, 3), randn(2, 2), randn(2, 5, 2, 3, 3), None)
    token += (randn(2, 5, 2, 1, 4), torch.ones(2, 5, dtype=torch.bool), None, 0, name)
    inputs = {
        "segment_read": (segment_read, segment_read_op, [*read_inputs(), name]),
        "deep_read": (deep_read, deep_read_op, [*deep_inputs(), name]),
        "decode_step": (decode_step, decode_step_op, token),
    }
    return {
        op: (function, registered, to_dtype(given, torch.float32))
        for op, (function, registered, given) in inputs.items()
    }


@pytest.mark.parametrize("op", calls("softmax"))
def test_unknown_names_are_refused(op):
    function, registered, inputs = calls("nonsense")[op]
    for call in (function, registered):
        with pytest.raises(ValueError, match="`function`='nonsense'.*allowed: 'softmax', 'sigmoid', 'relu'"):
            call(*inputs, "torch")
    with pytest.raises(ValueError, match="`function`='nonsense'"):
        function(*inputs, "triton")


def test_unknown_names_are_refused_where_gates_are_made():
    u, online_logit, summaries = randn(1, 3, 2, 5), randn(1, 3, 2), randn(1, 4, 2, 2, 5)
    visible = torch.ones(1, 4, dtype=torch.bool)
    for call in (
        lambda: apply_gates(randn(1, 2), randn(1), "nonsense"),
        lambda: content_gates(u, online_logit, summaries, visible, None, 2, "nonsense"),
        lambda: token_gates(u[:, 0], online_logit[:, 0], summaries, visible, None, 0, "nonsense"),
    ):
        with pytest.raises(ValueError, match="'nonsense'.*allowed"):
            call()


@pytest.fixture
def without_kernel(monkeypatch):
    monkeypatch.setitem(GATE_FUNCTIONS, "plain", GateFunction(*GATE_FUNCTIONS["sigmoid"][:2]))


@pytest.mark.parametrize("name", ["plain", CONSTANT])
@pytest.mark.parametrize("op", calls("softmax"))
def test_a_function_without_a_kernel_is_refused_by_name(op, name, without_kernel):
    function, _, inputs = calls(name)[op]
    function(*inputs, "torch")
    message = f"`mc_backend`='triton' is not possible for `{op}`: .*gate function '{name}', only 'softmax', 'sigmoid'"
    with pytest.raises(ValueError, match=message):
        function(*inputs, "triton")


def test_a_config_refuses_what_triton_lacks(without_kernel):
    MCConfig(gate_function="plain")
    with pytest.raises(ValueError, match="`gate_function`='plain'.*'softmax', 'sigmoid', 'relu' with mc_backend='tri"):
        MCConfig(gate_function="plain", mc_backend="triton")


# -------------------------------------------------------------------------------------------------------------- Triton
@with_triton
@pytest.mark.parametrize("name", ["nonsense", "plain", CONSTANT])
@pytest.mark.parametrize("op", calls("softmax"))
def test_triton_ops_refuse(op, name, without_kernel):
    function, registered, inputs = calls(name)[op]
    for call in (function, registered):
        with pytest.raises(ValueError, match=name):
            call(*inputs, "triton")


@with_triton
@pytest.mark.parametrize("case", ["plain", "sub-blocks", "packed", "shut"])
def test_triton_segment_read_with_relu(case):
    inputs = read_inputs(**READS.get(case, {}))
    if case == "shut":  # some tokens have no positive logit: those of their segment, and the online one
        inputs[3].abs_()
        inputs[1].abs_()[:, :, ::2] *= -1
        inputs[4].abs_()[:, :, ::2] *= -1
    dtypes = (torch.float32, torch.bfloat16) if case == "plain" else (torch.float32,)
    for dtype in dtypes:
        tensors = [*inputs]
        tensors[2] = tensors[2].to(dtype)
        compare(lambda *x, backend: segment_read(*x, "relu", backend), tensors, (0, 1), dtype, rounded=(1, 2, 3))


@with_triton
def test_triton_deep_read_with_relu():
    compare(lambda *x, backend: deep_read(*x, "relu", backend), deep_inputs(), (0, 1), torch.float32)


@with_triton
@pytest.mark.parametrize("fields", [{}, {"memories": 40}, {"top_k": 2}, {"top_k": 2, "given": True}, {"blocks": 2}])
def test_triton_decode_step_with_relu(fields):
    inputs, exact = token_inputs(**fields, function="relu")
    for sign in (1, -1):  # the second time most rows have no positive logit
        for x in (inputs, exact):
            x[1], x[3], x[6] = sign * x[1].abs(), sign * x[3].abs(), x[6].abs()
        out, _ = decode_step(*inputs, "triton")
        assert rms_ratio(out, decode_step(*exact, "torch")[0]) < 1e-5


def test_every_function_that_has_kernels_is_tested_there():
    assert {"softmax", "sigmoid", "relu"} == {*IN_TRITON} == {*GATE_NAMES}
