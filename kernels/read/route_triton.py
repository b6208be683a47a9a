"""`segment_route` on Triton.

A program keeps the k best logits of a tile of tokens while it walks through the memories, and looks closer at a block
of memories only when one of them beats some token's k-th best.
"""

import torch
import triton
import triton.language as tl

from ..shared.triton import LENGTHS, dot_precision, launch, operand_dtype, power_of_two
from .gates_triton import block_logits, gate_config, hide


@triton.jit(do_not_specialize=LENGTHS)
def _route_kernel(
    u,
    summaries,
    birth,
    first,
    chosen,
    num,
    width,
    heads,
    memories,
    DU: tl.constexpr,
    BU: tl.constexpr,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (row, head) x (query segment, tile of BT tokens). Ties go to the earlier memory."""
    tiles = tl.cdiv(width, BT)
    group = tl.cast(tl.program_id(0) // (num * tiles), tl.int64)
    place = tl.program_id(0) % (num * tiles)
    segment, tile, row, head = place // tiles, place % tiles, group // heads, group % heads
    o_t = tile * BT + tl.arange(0, BT)
    o_u, o_k = tl.arange(0, BU), tl.arange(0, BK)
    m_t = o_t < width
    token = ((row * num + segment) * width + o_t) * heads + head
    b_u = tl.load(u + token[:, None] * DU + o_u[None, :], mask=m_t[:, None] & (o_u < DU)[None, :], other=0.0)
    p_summaries = summaries + (row * memories * heads + head) * BLOCKS * DU
    first_memory, visible = tl.load(first + row * num + segment), memories - num + segment
    # the k best so far; places beyond K are never the worst
    b_value = tl.where((o_k < K)[None, :], float("-inf"), float("inf")) + tl.zeros((BT, BK), tl.float32)
    b_index = tl.full((BT, BK), -1, tl.int32)
    for start in range(0, visible, BN):
        o_memory = start + tl.arange(0, BN)
        b_logit, _ = block_logits(
            b_u, p_summaries, o_memory, o_memory < visible, heads * BLOCKS * DU, DU, BU, BLOCKS, PRECISION
        )
        b_logit = hide(b_logit, o_memory, visible, segment, birth + row * memories, first_memory)
        better = tl.max((tl.max(b_logit, 1) > tl.min(b_value, 1)).to(tl.int32), 0)
        while better > 0:
            b_best, b_place = tl.max(b_logit, 1), tl.argmax(b_logit, 1, tie_break_left=True)
            b_worst, b_slot = tl.min(b_value, 1), tl.argmin(b_value, 1)
            m_swap = (b_best > b_worst)[:, None] & (o_k[None, :] == b_slot[:, None])
            b_value = tl.where(m_swap, b_best[:, None], b_value)
            b_index = tl.where(m_swap, (start + b_place)[:, None], b_index)
            b_logit = tl.where(tl.arange(0, BN)[None, :] == b_place[:, None], float("-inf"), b_logit)
            better = tl.max((tl.max(b_logit, 1) > tl.min(b_value, 1)).to(tl.int32), 0)
    b_value = tl.where((o_k < K)[None, :], b_value, float("-inf"))
    for number in tl.static_range(K):  # best first
        b_slot = tl.argmax(b_value, 1)
        m_slot = o_k[None, :] == b_slot[:, None]
        b_memory = tl.max(tl.where(m_slot & (b_value > float("-inf")), b_index, -1), 1)
        tl.store(chosen + token * K + number, b_memory.to(tl.int64), mask=m_t)
        b_value = tl.where(m_slot, float("-inf"), b_value)


def forward(u, summaries, birth, first, top_k):
    """See `segment_route`."""
    rows, num, width, heads, dim = u.shape
    memories, blocks = summaries.shape[1], summaries.shape[3]
    u = u.to(operand_dtype(u)).contiguous()
    top_k = min(top_k, memories)
    chosen = torch.empty(*u.shape[:-1], top_k, dtype=torch.int64, device=u.device)
    args = {
        "u": u,
        "summaries": summaries.contiguous(),
        "birth": birth.contiguous(),
        "first": first.contiguous(),
        "chosen": chosen,
        "num": num,
        "width": width,
        "heads": heads,
        "memories": memories,
    }
    meta = {
        "DU": dim,
        "BU": power_of_two(dim),
        "BLOCKS": blocks,
        "K": top_k,
        "BK": power_of_two(top_k, 2),
        "BN": min(32, power_of_two(memories)),
        "PRECISION": dot_precision(u),
    }
    config = gate_config(u, summaries)
    programs = rows * heads * num * triton.cdiv(width, config[0]["BT"])
    launch(_route_kernel, lambda _: (programs,), args, meta, [config])
    return chosen
