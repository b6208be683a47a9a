"""The gated delta rule: its op against the recurrence as published, its gates, and the package that may replace it."""

import math

import pytest
import torch
from test_kernels_torch import WRITES, check, leaves, randn, write_inputs
from torch.nn import functional as F

from helpers import assert_close, build, relative_error, small_config, tokens
from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.kernels.write import delta as module
from mc_transformers.kernels.write.delta import delta_write, delta_write_op, fla_write
from mc_transformers.kernels.write.linear import linear_write
from mc_transformers.modeling_mc.memories import MEMORIES


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


# ----------------------------------------------------------------------------------------------------------- the op
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
    assert torch.autograd.gradcheck(delta_write, leaves(CALLS[name], True))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(delta_write_op, tuple(leaves(CALLS[name], True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """bf16 inputs are computed in fp32, also inside autocast."""
    low = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs(width=70)]
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in low]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        answers, ends = delta_write(*low, True)
    wanted_answers, wanted_ends = delta_write(*exact, True)
    assert answers.dtype == dtype and ends.dtype == torch.float32
    assert relative_error(answers.double(), wanted_answers) < (1e-5 if dtype == torch.float32 else 5e-3)
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


# -------------------------------------------------------------------------------------------------------- the gates
@pytest.mark.parametrize("negative", [False, True])
def test_gates_as_published(negative):
    config = small_config("gated_delta", allow_negative_eigenvalues=negative)
    memory = MEMORIES["gated_delta"](config)
    with torch.no_grad():
        memory.A_log.bias.copy_(torch.tensor([0.3, -1.0]))
    raw = {"a": randn(3, 2), "b": 5 * randn(3, 2)}
    gates = memory.gates(raw, randn(3, 2, 8), None)
    for h, rate in enumerate((math.exp(0.3), math.exp(-1.0))):
        for t in range(3):
            a, b = raw["a"][t, h].item(), raw["b"][t, h].item()
            assert gates["log_decay"][t, h].item() == pytest.approx(-rate * math.log1p(math.exp(a)), rel=1e-6)
            assert gates["write"][t, h].item() == pytest.approx((1 + negative) / (1 + math.exp(-b)), rel=1e-6)


def test_decays_at_the_start():
    """One per head between 0.85 and 0.99 a token, so that no head forgets at once and none never."""
    mixer = MCForCausalLM(small_config("gated_delta", num_attention_heads=4)).model.layers[0].mixer
    raw = {"a": mixer.a_bias.bias.detach(), "b": mixer.b_bias.bias.detach()}
    decay = mixer.memory.gates(raw, torch.zeros(4, 8), None)["log_decay"].exp()
    assert len(set(decay.tolist())) == 4
    assert 0.84 < decay.min() < 0.87 and 0.985 < decay.max() < 0.995


def test_the_decay_stays_in_single_precision(tmp_path):
    build(small_config("gated_delta")).save_pretrained(tmp_path)
    model = MCForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = model.model.layers[0].mixer
    assert mixer.memory.A_log.bias.dtype == mixer.a_bias.bias.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    assert model(tokens(1, 20)).logits.isfinite().all()


def test_negative_eigenvalues_are_for_this_memory_only():
    with pytest.raises(ValueError, match="allow_negative_eigenvalues.*True.*'linear'"):
        MCConfig(memory="linear", allow_negative_eigenvalues=True)


# -------------------------------------------------------------------------------------------------- the package fla
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels of fla need a GPU")
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


def test_fla_is_not_imported_where_it_cannot_be_used():
    memory = MEMORIES["gated_delta"](small_config("gated_delta"))
    assert not memory._use_fla(torch.zeros(1, dtype=torch.bfloat16))
