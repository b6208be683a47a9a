"""`segment_route` on Triton.

A program keeps the k best logits of a tile of tokens while it walks through the memories, and looks closer at a block
of memories only when one of them beats some token's k-th best.
"""

import torch
import triton
import triton.language as tl

from ..shared.triton import LENGTHS, dot_precision, launch, narrow, operand_dtype, power_of_two
from .gates import kept_memories, last_readers
from .gates_triton import block_logits, gate_config, hide, memory_at, readable, summaries_backward


@triton.jit(do_not_specialize=LENGTHS)
def _route_kernel(
    u,
    summaries,
    birth,
    first,
    kept,
    chosen,
    logits,
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
    start, end, border, gap = readable(first, kept, row, segment, num, memories)
    # the k best so far; places beyond K are never the worst
    b_value = tl.where((o_k < K)[None, :], float("-inf"), float("inf")) + tl.zeros((BT, BK), tl.float32)
    b_index = tl.full((BT, BK), -1, tl.int32)
    for step in range(start, end, BN):
        m_memory = step + tl.arange(0, BN) < end
        o_memory = memory_at(step + tl.arange(0, BN), border, gap)
        b_logit, _ = block_logits(b_u, p_summaries, o_memory, m_memory, heads * BLOCKS * DU, DU, BU, BLOCKS, PRECISION)
        b_logit = hide(b_logit, o_memory, m_memory, segment, birth + row * memories)
        better = tl.max((tl.max(b_logit, 1) > tl.min(b_value, 1)).to(tl.int32), 0)
        while better > 0:
            b_best, b_place = tl.max(b_logit, 1), tl.argmax(b_logit, 1, tie_break_left=True)
            b_worst, b_slot = tl.min(b_value, 1), tl.argmin(b_value, 1)
            m_swap = (b_best > b_worst)[:, None] & (o_k[None, :] == b_slot[:, None])
            b_value = tl.where(m_swap, b_best[:, None], b_value)
            b_index = tl.where(m_swap, memory_at(step + b_place, border, gap)[:, None], b_index)
            b_logit = tl.where(tl.arange(0, BN)[None, :] == b_place[:, None], float("-inf"), b_logit)
            better = tl.max((tl.max(b_logit, 1) > tl.min(b_value, 1)).to(tl.int32), 0)
    b_value = tl.where((o_k < K)[None, :], b_value, float("-inf"))
    for number in tl.static_range(K):  # best first
        b_slot = tl.argmax(b_value, 1)
        m_slot = o_k[None, :] == b_slot[:, None]
        b_memory = tl.max(tl.where(m_slot & (b_value > float("-inf")), b_index, -1), 1)
        tl.store(chosen + token * K + number, b_memory.to(tl.int64), mask=m_t)
        tl.store(logits + token * K + number, tl.max(b_value, 1), mask=m_t)
        b_value = tl.where(m_slot, float("-inf"), b_value)


@triton.jit(do_not_specialize=["tokens", "per_row", "memories"])
def _tokens_backward_kernel(
    grad_logits,
    index,
    u,
    summaries,
    grad_u,
    tokens,
    per_row,
    heads,
    memories,
    DU: tl.constexpr,
    BU: tl.constexpr,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    """Gradient of u, from the summaries of what was chosen. Programs: tiles of BT tokens and heads."""
    token = tl.cast(tl.program_id(0), tl.int64) * BT + tl.arange(0, BT)
    o_u = tl.arange(0, BU)
    m_t = token < tokens
    m_tu = m_t[:, None] & (o_u < DU)[None, :]
    o_tu = token[:, None] * DU + o_u[None, :]
    if BLOCKS > 1:
        b_u = tl.load(u + o_tu, mask=m_tu, other=0.0).to(tl.float32)
    b_grad_u = tl.zeros((BT, BU), tl.float32)
    for number in tl.static_range(K):
        b_memory = tl.load(index + token * K + number, mask=m_t, other=-1)
        m_read = b_memory >= 0
        b_grad = tl.load(grad_logits + token * K + number, mask=m_read, other=0.0)
        p_mean = summaries + ((token // per_row * memories + b_memory) * heads + token % heads) * BLOCKS * DU
        m_mean = m_tu & m_read[:, None]
        b_mean = tl.load(p_mean[:, None] + o_u[None, :], mask=m_mean, other=0.0).to(tl.float32)
        for block in tl.static_range(1, BLOCKS):
            b_other = tl.load(p_mean[:, None] + block * DU + o_u[None, :], mask=m_mean, other=0.0).to(tl.float32)
            m_better = tl.sum(b_u * b_other, 1) > tl.sum(b_u * b_mean, 1)
            b_mean = tl.where(m_better[:, None], b_other, b_mean)
        b_grad_u += b_grad[:, None] * b_mean
    tl.store(grad_u + o_tu, narrow(b_grad_u, grad_u.dtype.element_ty), mask=m_tu)


def _meta(u: torch.Tensor, summaries: torch.Tensor) -> dict[str, int]:
    dim = u.shape[-1]
    return {"DU": dim, "BU": power_of_two(dim), "BLOCKS": summaries.shape[3]}


def forward(u, summaries, birth, first, top_k):
    """See `segment_route`."""
    rows, num, width, heads, _ = u.shape
    u, birth = u.to(operand_dtype(u)).contiguous(), birth.contiguous()
    chosen = torch.empty(*u.shape[:-1], top_k, dtype=torch.int64, device=u.device)
    logits = torch.empty(chosen.shape, dtype=torch.float32, device=u.device)
    args = {
        "u": u,
        "summaries": summaries.contiguous(),
        "birth": birth,
        "first": first.contiguous(),
        "kept": kept_memories(birth, num),
        "chosen": chosen,
        "logits": logits,
        "num": num,
        "width": width,
        "heads": heads,
        "memories": summaries.shape[1],
    }
    tile, *options = gate_config(u, summaries)
    meta = _meta(u, summaries) | {"K": top_k, "BK": power_of_two(top_k, 2), "BT": tile, "BN": 32}
    meta["PRECISION"] = dot_precision(u)
    launch(_route_kernel, (rows * heads * num * triton.cdiv(width, tile),), args, meta, *options)
    return chosen, logits


def backward(grad_index, grad_logits, u, summaries, birth, first, top_k, index):
    """See `segment_route_backward_torch`."""
    _, num, width, heads, _ = u.shape
    dtype, u, summaries = u.dtype, u.to(operand_dtype(u)).contiguous(), summaries.contiguous()
    grad_logits, memories = grad_logits.float().contiguous(), summaries.shape[1]
    grad_u = torch.empty_like(u)
    grad_summaries = torch.zeros(summaries.shape, dtype=torch.float32, device=u.device)
    args = {
        "grad_logits": grad_logits,
        "index": index,
        "u": u,
        "summaries": summaries,
        "grad_u": grad_u,
        "tokens": index.shape[:-1].numel(),
        "per_row": num * width * heads,
        "heads": heads,
        "memories": memories,
    }
    meta = _meta(u, summaries)
    tile = max(8, 4096 // meta["BU"])
    programs = (triton.cdiv(args["tokens"], tile),)
    launch(_tokens_backward_kernel, programs, args, meta | {"K": top_k, "BT": tile}, 4, 1)
    sizes = {"begin": 0, "count": num, "num": num, "width": width, "heads": heads, "memories": memories}
    stop = last_readers(birth.contiguous(), first.contiguous())
    tile, *options = gate_config(u, summaries)
    meta |= {"BT": tile, "BN": 32, "PRECISION": dot_precision(u)}
    summaries_backward(grad_logits, index, u, summaries, stop, grad_summaries, sizes, meta, *options)
    return grad_u.to(dtype), grad_summaries.to(summaries.dtype)
