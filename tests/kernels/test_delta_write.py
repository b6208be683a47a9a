"""`delta_write`: the gated delta rule against the recurrence as published, and the package that may replace it."""

import math

import pytest
import torch
from torch.nn import functional as F

from helpers import assert_close, randn, relative_error
from mc_transformers.kernels.shared.ops import triton_interpreted
from mc_transformers.kernels.write import delta as module
from mc_transformers.kernels.write.delta import delta_write, delta_write_op, fla_write
from mc_transformers.kernels.write.linear import linear_write
from op_inputs import WRITES, check, leaves, to_dtype, write_inputs


def inputs(**sizes) -> list:
    """Unit keys and write strengths up to 2, where the rule neither blows up nor damps mistakes away."""
    q, k, v, log_decay, initial, starts = write_inputs(**sizes)
    log_decay = torch.zeros_like(q[..., 0]) if log_decay is None else log_decay
    return [q, F.normalize(k, dim=-1), v, log_decay, 2 * torch.rand_like(log_decay), initial, starts]


def naive(q, k, v, log_decay, write, initial, starts, carry):
    """S_t = S_{t-1} a_t (1 - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t, with S `[dv, dk]` as the paper has it."""
    rows, num, width, heads, key = q.shape
    answers, ends = [], []
    for r in range(rows):
        for h in range(heads):
            state = q.new_zeros(v.shape[-1], key) if initial is None else initial[r, h].T
            for n in range(num):
                if (n > 0 and not carry) or (starts is not None and starts[r, n]):
                    state = torch.zeros_like(state)
                for w in range(width):
                    at = (r, n, w, h)
                    house = torch.eye(key, dtype=q.dtype) - write[at] * torch.outer(k[at], k[at])
                    state = log_decay[at].exp() * state @ house + write[at] * torch.outer(v[at], k[at])
                    answers.append(state @ q[at])
                ends.append(state.T)
    answers = torch.stack(answers).view(rows, heads, num, width, -1).permute(0, 2, 3, 1, 4)
    return answers, torch.stack(ends).view(rows, heads, num, *ends[0].shape).transpose(1, 2)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("case", WRITES)
def test_values_and_gradients(case, carry):
    check(delta_write, naive, [*inputs(**WRITES[case]), carry])


def test_a_decay_of_zero():
    arguments = inputs()
    arguments[3][:, 1, 2] = -math.inf
    for actual, expected in zip(delta_write(*arguments, True), naive(*arguments, True), strict=True):
        assert_close(actual, expected, 1e-10)


SIZE = {"rows": 1, "num": 2, "width": 3, "heads": 2, "key": 2, "value": 3}
CALLS = {
    "carry": [*inputs(**SIZE), True],
    "starts": [*inputs(**SIZE, starts=True), True],
    "independent": [*inputs(**SIZE, initial=False), False],
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(delta_write, leaves(CALLS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(delta_write_op, tuple(leaves(CALLS[name])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """bf16 inputs are computed in fp32, also inside autocast."""
    low = to_dtype(inputs(width=70), dtype)
    exact = to_dtype(low, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        answers, ends = delta_write(*low, True)
    wanted_answers, wanted_ends = delta_write(*exact, True)
    assert answers.dtype == dtype and ends.dtype == torch.float32
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert relative_error(answers.double(), wanted_answers) < 1e-5 + rounding
    assert relative_error(ends.double(), wanted_ends) < 1e-5


def test_one_key_again_and_again_in_single_precision():
    """The hardest triangular systems: all keys of a segment alike, full write strength, no decay."""
    q, k, v, log_decay, write, _, _ = inputs(rows=1, num=1, width=512, heads=1, key=8, value=8, dtype=torch.float32)
    k = F.normalize(k[:, :, :1] + 1e-3 * k, dim=-1)
    write, log_decay = torch.ones_like(write), torch.zeros_like(log_decay)
    single = delta_write(q, k, v, log_decay, write)
    double = delta_write(*(x.double() for x in (q, k, v, log_decay, write)))
    for actual, expected in zip(single, double, strict=True):
        assert relative_error(actual.double(), expected) < 1e-4


def test_it_replaces_what_linear_attention_adds_up():
    k = F.normalize(randn(1, 1, 1, 1, 4), dim=-1).expand(-1, -1, 2, -1, -1)
    q, v = k, randn(1, 1, 2, 1, 3)
    one = torch.ones(1, 1, 2, 1, dtype=v.dtype)
    assert_close(delta_write(q, k, v, 0 * one, one)[0][:, :, 1], v[:, :, 1], 1e-10)
    assert_close(linear_write(q, k, v)[0][:, :, 1], v.sum(2), 1e-10)


# ----------------------------------------------------------------------------------------------------- the package fla
def stand_in(q, k, v, g, beta, scale, initial_state, output_final_state):
    """The rule of `fla`, `[B, T, H, d]` and a state at the end only, as our op computes it for one segment."""
    assert scale == 1.0 and output_final_state and q.dtype == k.dtype == v.dtype
    answers, ends = delta_write(*(x[:, None] for x in (q, k, v, g, beta)), initial_state, None, True)
    return answers[:, 0], ends[:, 0]


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("case", ["plain", "zero-start", "starts", "one-token"])
def test_fla_gets_its_segments(case, carry, monkeypatch):
    """As a batch, or one after the other; the kernels themselves need a GPU."""
    monkeypatch.setattr(module, "fla_rule", lambda: stand_in)
    arguments = [*inputs(**WRITES[case]), carry]
    if not carry:
        arguments[6] = None
    check(fla_write, delta_write, arguments, 1e-6)  # states in fp32


@pytest.mark.skipif(triton_interpreted() or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("carry", [False, True])
def test_fla_is_the_same_rule(carry):
    pytest.importorskip("fla")
    sizes = {"rows": 2, "num": 3, "width": 100, "heads": 2, "key": 64, "value": 64, "starts": carry}
    arguments = [x.cuda() if torch.is_tensor(x) else x for x in inputs(**sizes, dtype=torch.float32)]
    low = [x.bfloat16() for x in arguments[:3]] + [x.clone() for x in arguments[3:6]]
    results = []
    for function in (fla_write, delta_write):
        trained = [x.detach().clone().requires_grad_() for x in low]
        answers, ends = function(*trained, arguments[6], carry)
        total = (answers.float().sin().sum() + ends.sin().sum()).float()
        results.append((answers, ends, *torch.autograd.grad(total, trained)))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual.double(), expected.double()) < 3e-2
