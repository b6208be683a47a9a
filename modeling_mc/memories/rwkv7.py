# Copyright 2026 the mc-transformers authors.
"""RWKV-7's write rule (arXiv 2503.14456): a delta rule with a decay and a learning rate per channel of the keys.

    S_t = diag(w_t) S_{t-1} - (a_t * n_t) (S_{t-1}^T n_t)^T + m_t v_t^T                M(q) = S^T q
    w_t = exp(-exp(-1/2) sigmoid(w_0 + tanh(x_t A) B))     the decay, above 0.545, through a low rank
    a_t = sigmoid(W_b x_t + b_b)                           the learning rate
    n_t = (xi * k_t) / |xi * k_t|                          the key that is cleared
    m_t = k_t * (1 + alpha * (a_t - 1))                    the key that is written

The paper has S transposed, k^ for n, k~ for m and a low rank in a_t too. Left out is what surrounds its rule: token
shift (the mixer convolves), the first layer's values in later layers, and the bonus of the token that is read.
"""

from functools import partial

import torch
from torch import nn
from transformers import initialization as init

from ...kernels.write.diagonal import diagonal_write
from ..norms import unit
from ..tensor_parallel import HeadLinear
from .base import Bias, State, Trace
from .matrix import MatrixMemory


FLOOR = -0.6065306597126334  # -exp(-1/2): of log w


class RWKV7Memory(MatrixMemory):
    gate_names = ("b",)
    has_triton = False  # `diagonal_write` has none
    shared_by_heads = ("decay.0",)

    def __init__(self, config) -> None:
        super().__init__(config)
        width, shape = config.hidden_size, self.gate_shape("b")
        rank = 32 * max(1, round(1.8 * width**0.5 / 32))  # as in published models
        low_rank = nn.Linear(width, rank, bias=False), nn.Tanh(), HeadLinear(rank, shape.numel(), bias=False)
        self.decay = nn.Sequential(*low_rank)
        self.w_0 = Bias(shape, partial(init.uniform_, a=-6.5, b=-1.5))  # from 0.1% to 10% forgotten in a token
        self.xi, self.alpha = Bias(shape, partial(init.constant_, val=0.85)), Bias(shape, init.ones_)

    def gate_shape(self, name: str) -> torch.Size:
        return torch.Size((self.num_heads, self.key_dim))

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rate, k, dtype = raw["b"].sigmoid(), k.to(raw["b"].dtype), raw["b"].dtype
        decay = FLOOR * (self.w_0(dtype) + self.decay(x).to(dtype).view_as(k)).sigmoid()
        cleared, written = unit(self.xi(dtype) * k, None), k * (1 + self.alpha(dtype) * (rate - 1))
        return {"log_decay": decay, "cleared": cleared, "place": -rate * cleared, "written": written}

    def write(self, q, k, v, gates, table, state: State | None, carry: bool) -> Trace:
        rule = (gates["log_decay"], gates["cleared"], gates["place"], FLOOR, state and state[0])
        online, ends = diagonal_write(q, gates["written"], v, *rule, table.starts if carry else None, carry)
        return Trace(online, (ends,))

    def step(self, state: State, k, v, gates) -> State:
        answer, kept = self.read(state, gates["cleared"]), gates["log_decay"].exp()[..., None] * state[0]
        kept = kept + gates["place"][..., None] * answer[..., None, :]
        return (kept + gates["written"][..., None] * v.to(kept.dtype)[..., None, :],)
