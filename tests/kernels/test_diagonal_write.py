"""`diagonal_write`, with a decay per channel and a probe: the recurrence as published, and the edge of fp32."""

import pytest
import torch
from torch.nn import functional as F

from helpers import randn, relative_error
from mc_transformers.kernels.write.diagonal import diagonal_write, diagonal_write_op
from mc_transformers.kernels.write.linear import linear_write
from op_inputs import WRITES, check, leaves, write_inputs


FLOOR = -0.6065306597126334


def inputs(carry: bool, floor: float = FLOOR, **sizes) -> list:
    """Decays down to the floor and unit probes that clear up to all of what they find."""
    q, k, v, _, initial, starts = write_inputs(**sizes)
    probe = F.normalize(randn(*q.shape), dim=-1).to(q.dtype)
    place = -torch.rand_like(probe) * probe
    return [q, k, v, floor * torch.rand_like(q), probe, place, floor, initial, starts, carry]


def naive(q, k, v, log_decay, probe, place, floor, initial, starts, carry):
    """S_t = S_{t-1} (diag(w_t) + c_t^T b_t) + v_t^T k_t, y_t = S_t q_t, with S `[dv, dk]` as the paper has it."""
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
                    change = torch.diag(log_decay[at].exp()) + torch.outer(probe[at], place[at])
                    state = state @ change + torch.outer(v[at], k[at])
                    answers.append(state @ q[at])
                ends.append(state.T)
    answers = torch.stack(answers).view(rows, heads, num, width, -1).permute(0, 2, 3, 1, 4)
    return answers, torch.stack(ends).view(rows, heads, num, *ends[0].shape).transpose(1, 2)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("case", [case for case in WRITES if case not in ("no-decay", "nothing")])
def test_values_and_gradients(case, carry):
    check(diagonal_write, naive, inputs(carry, **WRITES[case]))


def test_without_probes_and_with_equal_decays_it_is_the_linear_write():
    q, k, v, log_decay, initial, starts = write_inputs(width=70)
    zero, floor = torch.zeros_like(k), 1.01 * log_decay.min().item()

    def diagonal(q, k, v, log_decay, *rest):
        return diagonal_write(q, k, v, log_decay[..., None].expand_as(k), zero, zero, floor, *rest)

    check(diagonal, linear_write, [q, k, v, log_decay, initial, starts, True])


@pytest.mark.parametrize("floor", [0.0, 1.0, -100.0])
def test_a_floor_that_cannot_be(floor):
    with pytest.raises(ValueError, match=f"diagonal_write: `floor`={floor}.*allowed"):
        diagonal_write(*inputs(True, floor, **SIZE))


SIZE = {"rows": 1, "num": 2, "width": 3, "heads": 2, "key": 2, "value": 3}
CALLS = {"starts": inputs(True, **SIZE, starts=True), "independent": inputs(False, **SIZE, initial=False)}


@pytest.mark.parametrize("name", CALLS)
def test_registration_and_second_opinion_on_gradients(name):
    arguments = leaves(CALLS[name], True)
    assert torch.autograd.gradcheck(diagonal_write, arguments)
    *tensors, floor, initial, starts, carry = arguments
    torch.library.opcheck(diagonal_write_op, (*tensors, initial, starts, carry, floor))


@pytest.mark.parametrize("floor", [FLOOR, -5.0, -80.0])
def test_the_fastest_decay_in_every_token_in_single_precision(floor):
    """Sub-chunks of 64 tokens would need exp(-64 floor), which fp32 has not got for -5; and keys all alike are the
    hardest systems."""
    single = inputs(True, floor, rows=1, num=2, width=200, heads=1, key=8, value=8, dtype=torch.float32)
    single[3] = torch.full_like(single[3], floor)
    single[4] = F.normalize(single[4][:, :, :1] + 1e-3 * single[4], dim=-1)
    single[5] = -single[4]
    single = leaves(single, True)
    double = [x.detach().double().requires_grad_() if torch.is_tensor(x) else x for x in single]
    weights, results = randn(*single[2].shape), []
    for arguments in (single, double):
        answers, ends = diagonal_write(*arguments)
        trained = [x for x in arguments if torch.is_tensor(x)]
        if floor == -80.0:  # a decay of 1e-35 has no gradient to speak of
            trained.pop(3)
        gradients = torch.autograd.grad((answers * weights.to(answers.dtype)).sum() + ends.sum(), trained)
        results.append((answers, ends, *gradients))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual.double(), expected) < 1e-4


def test_half_precision_is_computed_in_fp32():
    low = [x.bfloat16() if torch.is_tensor(x) else x for x in inputs(True, width=70)]
    low[3:6] = [x.float() for x in low[3:6]]
    exact = [x.double() if torch.is_tensor(x) else x for x in low]
    with torch.autocast("cpu", torch.bfloat16):
        answers, ends = diagonal_write(*low)
    wanted_answers, wanted_ends = diagonal_write(*exact)
    assert answers.dtype == torch.bfloat16 and ends.dtype == torch.float32
    assert relative_error(answers.double(), wanted_answers) < 5e-3
    assert relative_error(ends.double(), wanted_ends) < 1e-5
