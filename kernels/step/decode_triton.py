"""`decode_step` on Triton: one kernel for the logits of all finished segments, one that reads.

The second kernel finds the best k again in each of its programs, from 4 bytes per segment, and reads the states of the
chosen ones (or of a part of all) as they are stored. Parts are summed in order: no atomics, and nothing comes back to
the host.
"""

import torch
import triton
import triton.language as tl

from ..read.gates_triton import finish, triton_name, weigh
from ..shared.triton import launch, power_of_two


PROGRAMS = 512  # of a read of all segments: with fewer, several programs share the segments of a row and head


@triton.jit(do_not_specialize=["memories"])
def _logits_kernel(
    u,
    summaries,
    visible,
    logits,
    heads,
    memories,
    DU: tl.constexpr,
    BU: tl.constexpr,
    BLOCKS: tl.constexpr,
    BN: tl.constexpr,
):
    """Logits `[B, H, S]`, -inf for what cannot be read. Programs: (row, head) x blocks of BN memories."""
    group = tl.cast(tl.program_id(0), tl.int64)
    row, head = group // heads, group % heads
    o_n, o_u = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BU)
    m_n = o_n < memories
    mask = m_n[:, None] & (o_u < DU)[None, :]
    b_u = tl.load(u + group * DU + o_u, mask=o_u < DU, other=0.0).to(tl.float32)
    p_mean = summaries + ((row * memories + o_n) * heads + head)[:, None] * BLOCKS * DU + o_u[None, :]
    b_best = tl.full((BN,), float("-inf"), tl.float32)
    for number in tl.static_range(BLOCKS):
        b_mean = tl.load(p_mean + number * DU, mask=mask, other=0.0).to(tl.float32)
        b_best = tl.maximum(b_best, tl.sum(b_mean * b_u[None, :], 1))
    m_seen = tl.load(visible + row * memories + o_n, mask=m_n, other=0) != 0
    tl.store(logits + group * memories + o_n, tl.where(m_seen, b_best, float("-inf")), mask=m_n)


@triton.jit
def _best(p_logits, memories, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """The K largest logits [BK] and their memories, -1 where fewer can be read; behind them +inf and -1."""
    o_k = tl.arange(0, BK)
    b_value = tl.where(o_k < K, float("-inf"), float("inf"))
    b_index = tl.full((BK,), -1, tl.int32)
    for start in range(0, memories, BN):
        o_n = start + tl.arange(0, BN)
        b_logit = tl.load(p_logits + o_n, mask=o_n < memories, other=float("-inf"))
        better = (tl.max(b_logit, 0) > tl.min(b_value, 0)).to(tl.int32)
        while better > 0:
            b_place, b_slot = tl.argmax(b_logit, 0, tie_break_left=True), tl.argmin(b_value, 0)
            m_slot, m_place = o_k == b_slot, tl.arange(0, BN) == b_place
            b_value = tl.where(m_slot, tl.max(b_logit, 0), b_value)
            b_index = tl.where(m_slot, start + b_place, b_index)
            b_logit = tl.where(m_place, float("-inf"), b_logit)
            better = (tl.max(b_logit, 0) > tl.min(b_value, 0)).to(tl.int32)
    return b_value, b_index


@triton.jit
def _weighed(
    b_memory,
    b_logit,
    b_max,
    b_sum,
    b_q,
    states,
    scale,
    first,
    heads,
    o_k,
    o_v,
    DK: tl.constexpr,
    DV: tl.constexpr,
    FUNCTION: tl.constexpr,
    SCALED: tl.constexpr,
):
    """What one memory [1] adds to the answer, key by key [BDK, BV]."""
    b_weight = weigh(b_logit, b_max, FUNCTION) / b_sum  # [1]
    m_read = b_logit > float("-inf")  # what is not read is not fetched, and may hold anything
    slot = first + tl.maximum(b_memory, 0).to(tl.int64) * heads
    o_state = o_k[:, None] * DV + o_v[None, :]
    mask = ((o_k < DK) & m_read)[:, None] & (o_v < DV)[None, :]
    b_state = tl.load(states + (slot * DK * DV)[:, None] + o_state, mask=mask, other=0.0).to(tl.float32)
    b_key = b_weight * b_q
    if SCALED:
        b_key *= tl.load(scale + slot * DK + o_k, mask=(o_k < DK) & m_read, other=0.0).to(tl.float32)
    return b_key[:, None] * b_state


@triton.jit(do_not_specialize=["memories", "part"])
def _token_kernel(
    q,
    online,
    online_logit,
    states,
    scale,
    logits,
    given,
    out,
    chosen,
    heads,
    memories,
    part,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BDK: tl.constexpr,
    BV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    FUNCTION: tl.constexpr,
    SCALED: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """K > 0: only the best K (GIVEN: those), which are left in `chosen`. K = 0: programs of the last dimension take
    `part` memories each, and leave sums that add up. Programs: (row, head) x blocks of DV x parts."""
    group = tl.cast(tl.program_id(0), tl.int64)
    row, head = group // heads, group % heads
    o_k, o_v = tl.arange(0, BDK), tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < DK
    mask = m_k[:, None] & (o_v < DV)[None, :]
    o_state = o_k[:, None] * DV + o_v[None, :]
    b_q = tl.load(q + group * DK + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_online = tl.load(online_logit + group).to(tl.float32)
    p_logits = logits + group * memories
    # the gates that are needed: their logits, their largest and the sum that they are divided by
    o_c = tl.arange(0, BK)
    if K > 0:
        if GIVEN:
            b_index = tl.load(given + group * K + o_c, mask=o_c < K, other=-1).to(tl.int32)
            b_value = tl.load(p_logits + b_index, mask=b_index >= 0, other=float("-inf"))
        else:
            m_chosen = (o_c < K) & (tl.program_id(1) + tl.arange(0, 1) == 0)
            b_value, b_index = _best(p_logits, memories, K, BK, BN)
            tl.store(chosen + group * K + o_c, b_index.to(tl.int64), mask=m_chosen)
            b_value = tl.where(o_c < K, b_value, float("-inf"))
        b_max = tl.maximum(tl.max(b_value, 0), b_online)
        b_sum = tl.sum(weigh(b_value, b_max, FUNCTION), 0)
    else:
        b_top = tl.full((BN,), float("-inf"), tl.float32)
        for start in range(0, memories, BN):
            o_n = start + tl.arange(0, BN)
            b_top = tl.maximum(b_top, tl.load(p_logits + o_n, mask=o_n < memories, other=float("-inf")))
        b_max = tl.maximum(tl.max(b_top, 0), b_online)
        b_total = tl.zeros((BN,), tl.float32)
        for start in range(0, memories, BN):
            o_n = start + tl.arange(0, BN)
            b_logit = tl.load(p_logits + o_n, mask=o_n < memories, other=float("-inf"))
            b_total += weigh(b_logit, b_max, FUNCTION)
        b_sum = tl.sum(b_total, 0)
        first = tl.program_id(2) * part
        last = tl.minimum(first + part, memories)

    b_own = weigh(b_online, b_max, FUNCTION)
    b_own, b_sum = finish(b_own, b_own + b_sum, FUNCTION)
    m_first = mask & (tl.program_id(2) + tl.arange(0, 1) == 0)[:, None]
    b_state = tl.load(online + group * DK * DV + o_state, mask=m_first, other=0.0).to(tl.float32)
    b_out = (b_own / b_sum * b_q)[:, None] * b_state  # [BDK, BV], summed over keys at the end
    slot = row * memories * heads + head
    if K > 0:
        for place in tl.static_range(K):  # unrolled: the loads do not wait for each other
            b_memory = tl.max(tl.where(o_c == place, b_index, -1), 0, keep_dims=True)
            b_logit = tl.max(tl.where(o_c == place, b_value, float("-inf")), 0, keep_dims=True)
            b_out += _weighed(
                b_memory, b_logit, b_max, b_sum, b_q, states, scale, slot, heads, o_k, o_v, DK, DV, FUNCTION, SCALED
            )
    else:
        for place in range(first, last):
            b_memory = place + tl.arange(0, 1)
            b_logit = tl.load(p_logits + b_memory)
            b_out += _weighed(
                b_memory, b_logit, b_max, b_sum, b_q, states, scale, slot, heads, o_k, o_v, DK, DV, FUNCTION, SCALED
            )
    p_out = out + (tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(0) + group) * DV + o_v
    tl.store(p_out, tl.sum(b_out, 0), mask=o_v < DV)


def forward(q, u, online, online_logit, states, scale, summaries, visible, index, top_k, function):
    """See `decode_step`."""
    rows, heads, key_dim = q.shape
    value_dim, memories, device = online.shape[-1], states.shape[1], q.device
    groups, dim, blocks = rows * heads, u.shape[-1], summaries.shape[3]
    top_k = index.shape[-1] if index is not None and top_k else top_k
    logits = torch.empty(rows, heads, memories, dtype=torch.float32, device=device)
    args = {
        "u": u.contiguous(),
        "summaries": summaries.contiguous(),
        "visible": visible.contiguous().view(torch.int8),
        "logits": logits,
        "heads": heads,
        "memories": memories,
    }
    meta = {"DU": dim, "BU": power_of_two(dim), "BLOCKS": blocks, "BN": max(8, 4096 // power_of_two(dim))}
    launch(_logits_kernel, (groups, triton.cdiv(memories, meta["BN"])), args, meta, 4, 1)

    block = min(power_of_two(value_dim), max(16, 4096 // power_of_two(key_dim)))
    programs = groups * triton.cdiv(value_dim, block)
    parts = 1 if top_k else max(1, min(PROGRAMS // programs, triton.cdiv(memories, 4)))
    part = triton.cdiv(memories, parts)
    parts = triton.cdiv(memories, part)
    out = torch.empty(parts, rows, heads, value_dim, dtype=online.dtype, device=device)
    choose = top_k > 0 and index is None
    chosen = torch.empty((rows, heads, top_k) if choose else (0,), dtype=torch.int64, device=device)
    args = {
        "q": q.contiguous(),
        "online": online.contiguous(),
        "online_logit": online_logit.contiguous(),
        "states": states.contiguous(),
        "scale": None if scale is None else scale.contiguous(),
        "logits": logits,
        "given": None if index is None else index.contiguous(),
        "out": out,
        "chosen": chosen if choose else None,
        "heads": heads,
        "memories": memories,
        "part": part,
    }
    meta = {
        "DK": key_dim,
        "DV": value_dim,
        "BDK": power_of_two(key_dim),
        "BV": block,
        "K": top_k,
        "BK": power_of_two(top_k, 2),
        "BN": 1024,
        "FUNCTION": triton_name(function),
        "SCALED": scale is not None,
        "GIVEN": index is not None,
    }
    grid = (groups, triton.cdiv(value_dim, block), parts)
    launch(_token_kernel, grid, args, meta, 4, 2)
    return out[0] if parts == 1 else out.sum(0), chosen
