"""`state_step` on Triton. A program holds all dk rows of a block of columns, so that what the decayed state answers to
k is there before the state is written."""

import torch
import triton
import triton.language as tl

from ..shared.triton import launch, power_of_two


@triton.jit
def _state_kernel(
    state,
    k,
    v,
    log_decay,
    write,
    k2,
    v2,
    write2,
    out,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BDK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    WRITE: tl.constexpr,
    AGAIN: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Programs: (row, head) x blocks of DV."""
    group = tl.cast(tl.program_id(0), tl.int64)
    o_k, o_v = tl.arange(0, BDK), tl.program_id(1) * BV + tl.arange(0, BV)
    m_k, m_v = o_k < DK, o_v < DV
    mask = m_k[:, None] & m_v[None, :]
    o_state = group * DK * DV + o_k[:, None] * DV + o_v[None, :]
    b_state = tl.load(state + o_state, mask=mask, other=0.0)  # [BDK, BV]
    b_k = tl.load(k + group * DK + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + group * DV + o_v, mask=m_v, other=0.0).to(tl.float32)
    if DECAY:
        b_state *= tl.exp(tl.load(log_decay + group))
    if DELTA:
        b_v -= tl.sum(b_k[:, None] * b_state, 0)
    if WRITE:
        b_v *= tl.load(write + group)
    b_state += b_k[:, None] * b_v[None, :]
    if AGAIN:
        b_k = tl.load(k2 + group * DK + o_k, mask=m_k, other=0.0)
        b_v = tl.load(v2 + group * DV + o_v, mask=m_v, other=0.0) * tl.load(write2 + group)
        b_state += b_k[:, None] * b_v[None, :]
    tl.store(out + o_state, b_state, mask=mask)


def forward(state, k, v, log_decay, write, k2, v2, write2, delta):
    """See `state_step`."""
    rows, heads, key_dim, value_dim = state.shape
    out = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    given = {"state": state, "k": k, "v": v, "log_decay": log_decay, "write": write, "k2": k2, "v2": v2}
    args = {name: None if x is None else x.contiguous() for name, x in (given | {"write2": write2}).items()}
    block = min(power_of_two(value_dim), max(16, 4096 // power_of_two(key_dim)))
    meta = {
        "DK": key_dim,
        "DV": value_dim,
        "BDK": power_of_two(key_dim),
        "BV": block,
        "DECAY": log_decay is not None,
        "WRITE": write is not None,
        "AGAIN": k2 is not None,
        "DELTA": delta,
    }
    grid = (rows * heads, triton.cdiv(value_dim, block))
    launch(_state_kernel, grid, args | {"out": out}, meta, 4, 1)
    return out
