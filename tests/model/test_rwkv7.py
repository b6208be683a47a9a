"""RWKV-7's write rule against the formulas as published; that it reads by every rule is in test_equations.py."""

import math

import pytest
import torch

from helpers import assert_close, build, randn, small_config, tokens
from mc_transformers import MCForCausalLM
from mc_transformers.modeling_mc.memories import MEMORIES
from mc_transformers.modeling_mc.segments import SegmentTable


@pytest.fixture
def memory():
    memory = MEMORIES["rwkv7"](small_config("rwkv7")).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(0.5 * randn(*parameter.shape))
    return memory


def published(memory, q, k, v, raw, x, h):
    """One head, token by token, S `[dv, dk]`: w, a, kk and k as in the code of the authors, without what surrounds
    the rule."""
    down, _, up = memory.decay
    w_0, xi, alpha = (part.bias[h] for part in (memory.w_0, memory.xi, memory.alpha))
    state, answers = q.new_zeros(v.shape[-1], k.shape[-1]), []
    for t in range(len(x)):
        low_rank = up.weight.unflatten(0, (memory.num_heads, -1))[h] @ torch.tanh(down.weight @ x[t])
        w = torch.exp(-torch.sigmoid(w_0 + low_rank) / math.e**0.5)
        a = torch.sigmoid(raw[t, h])
        kk = k[t, h] * xi
        kk = kk / kk.norm()
        key = k[t, h] + k[t, h] * (a - 1) * alpha
        state = state * w - torch.outer(state @ kk, kk * a) + torch.outer(v[t, h], key)
        answers.append(state @ q[t, h])
    return torch.stack(answers), state


def test_the_rule_is_the_published_one(memory):
    length, heads, keys, values = 9, memory.num_heads, memory.key_dim, memory.value_dim
    q, k, raw = (randn(length, heads, keys) for _ in range(3))
    v, x = randn(length, heads, values), randn(length, memory.config.hidden_size)
    table = SegmentTable.build(1, length, segment_size=16, device=x.device)
    gates = {name: gate[None, None] for name, gate in memory.gates({"b": raw}, k, x).items()}
    trace = memory.write(q[None, None], k[None, None], v[None, None], gates, table, None, False)
    for h in range(heads):
        answers, state = published(memory, q, k, v, raw, x, h)
        assert_close(trace.online[0, 0, :, h], answers, 1e-10)
        assert_close(trace.ends[0][0, 0, h], state.T, 1e-10)


def test_decays_at_the_start():
    """Per channel, from slow to fast; and the learning rate is 1/2."""
    torch.manual_seed(0)
    config = small_config("rwkv7", hidden_size=256, num_attention_heads=4, head_dim=64)
    mixer = MCForCausalLM(config).model.layers[0].mixer
    x, k = torch.zeros(256), torch.ones(4, 64)
    gates = mixer.memory.gates({"b": mixer.b_bias.bias.detach()}, k, x)
    lost = 1 - gates["log_decay"].exp()
    assert lost.shape == (4, 64) and 0.0009 < lost.min() < 0.002 and 0.08 < lost.max() < 0.11
    assert_close(gates["place"], -gates["cleared"] / 2, 1e-6)


def test_what_stays_in_single_precision(tmp_path):
    build(small_config("rwkv7")).save_pretrained(tmp_path)
    model = MCForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    fp32 = {name.split("mixer.")[1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {"b_bias.bias", "memory.w_0.bias", "memory.xi.bias", "memory.alpha.bias"}
    assert model(tokens(1, 20)).logits.isfinite().all()
