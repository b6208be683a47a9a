"""`selected_read` on Triton, through `Tiles`: pairs of a token and a chosen memory, sorted by memory.

A program multiplies one tile of pairs with their one memory. Every pair writes a row of its own and a second kernel
sums the k rows of a token, so there are no atomics and the order of every sum is fixed.
"""

import torch
import triton
import triton.language as tl

from ..shared.triton import chip, dot, dot_precision, launch, narrow, operand_dtype, power_of_two, split_width
from .segment_triton import load_blocks
from .selected import Tiles


@triton.jit(do_not_specialize=["num_pairs"])
def _tile_kernel(
    rows,
    other,
    weights,
    states,
    memory,
    source,
    out,
    products,
    num_pairs,
    DX: tl.constexpr,
    DY: tl.constexpr,
    BX: tl.constexpr,
    NX: tl.constexpr,
    BY: tl.constexpr,
    BT: tl.constexpr,
    TOP_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out[pair] = weight * S^T row` of width DY for a tile of pairs (TRANSPOSED: `weight * S row`). PRODUCTS also
    gives `products[block, pair] = other . S row`. Programs: (tile, block of DY)."""
    blocks = (DY + BY - 1) // BY
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_y = block * BY + tl.arange(0, BY)
    m_y = o_y < DY
    pair = tl.load(source + tl.cast(tile, tl.int64) * BT + tl.arange(0, BT))  # -1 where there is none
    m_pair = pair >= 0
    if tl.max(pair, 0) < 0:
        return
    token = tl.maximum(pair, 0) // TOP_K
    b_rows = load_blocks(rows + token * DX, m_pair, DX, BX, NX)
    p_state = states + tl.load(memory + tile) * DX * DY
    b_answer = tl.zeros((BT, BY), tl.float32)
    for number in tl.static_range(NX):
        o_x = number * BX + tl.arange(0, BX)
        if TRANSPOSED:
            o_state = o_y[None, :] * DX + o_x[:, None]
        else:
            o_state = o_x[:, None] * DY + o_y[None, :]
        b_state = tl.load(p_state + o_state, mask=(o_x < DX)[:, None] & m_y[None, :], other=0.0)  # [BX, BY]
        b_answer = dot(b_rows[number], b_state, b_answer, PRECISION)
    m_out = m_pair[:, None] & m_y[None, :]
    if PRODUCTS:
        b_other = tl.load(other + token[:, None] * DY + o_y[None, :], mask=m_out, other=0.0).to(tl.float32)
        p_product = products + tl.cast(block, tl.int64) * num_pairs + pair
        tl.store(p_product, tl.sum(b_other * b_answer, 1), mask=m_pair)
    b_answer *= tl.load(weights + tl.maximum(pair, 0), mask=m_pair, other=0.0)[:, None]
    tl.store(out + pair[:, None] * DY + o_y[None, :], narrow(b_answer, out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_kernel(pairs, index, out, num_tokens, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """`out[token] = sum of its K pairs` that have a memory. Programs: tiles of BT tokens."""
    token = tl.cast(tl.program_id(0), tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = token < num_tokens
    m_d = (o_d < D)[None, :]
    b_sum = tl.zeros((BT, BD), tl.float32)
    for number in tl.static_range(K):
        m_pair = m_t & (tl.load(index + token * K + number, mask=m_t, other=-1) >= 0)
        p_pair = pairs + (token * K + number)[:, None] * D + o_d[None, :]
        b_sum += tl.load(p_pair, mask=m_pair[:, None] & m_d, other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * D + o_d[None, :], narrow(b_sum, out.dtype.element_ty), mask=m_t[:, None] & m_d)


def sum_rows(pairs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`[R, N, W, H, d]`, of every token the sum of the rows `[R * N * W * H * k, d]` of those of its pairs that have a
    memory (index `[R, N, W, H, k]`)."""
    width, top_k, tokens = pairs.shape[-1], index.shape[-1], index.shape[:-1].numel()
    total = pairs.new_empty(*index.shape[:-1], width)
    args = {"pairs": pairs, "index": index, "out": total, "num_tokens": tokens}
    meta = {"K": top_k, "D": width, "BD": power_of_two(width), "BT": 16}
    launch(_sum_kernel, (triton.cdiv(tokens, 16),), args, meta, 4, 1)
    return total


@triton.jit
def _selected_states_kernel(
    q,
    grad_out,
    weights,
    borders,
    source,
    grad_states,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one memory from all of its tiles, in order. Programs: (memory, block of DK, block of DV)."""
    k_blocks, v_blocks = (DK + BK - 1) // BK, (DV + BV - 1) // BV
    memory, block = tl.program_id(0) // (k_blocks * v_blocks), tl.program_id(0) % (k_blocks * v_blocks)
    o_k = block // v_blocks * BK + tl.arange(0, BK)
    o_v = block % v_blocks * BV + tl.arange(0, BV)
    m_k, m_v = o_k < DK, o_v < DV
    b_sum = tl.zeros((BK, BV), tl.float32)
    first_tile, last_tile = tl.load(borders + memory), tl.load(borders + memory + 1)
    for tile in range(first_tile, last_tile):
        pair = tl.load(source + tl.cast(tile, tl.int64) * BT + tl.arange(0, BT))
        m_pair = pair >= 0
        token = tl.maximum(pair, 0) // TOP_K
        b_weight = tl.load(weights + tl.maximum(pair, 0), mask=m_pair, other=0.0)
        b_q = tl.load(q + token[:, None] * DK + o_k[None, :], mask=m_pair[:, None] & m_k[None, :], other=0.0)
        b_go = tl.load(grad_out + token[:, None] * DV + o_v[None, :], mask=m_pair[:, None] & m_v[None, :], other=0.0)
        b_go = narrow(b_weight[:, None] * b_go.to(tl.float32), grad_out.dtype.element_ty)
        b_sum = dot(tl.trans(b_q), b_go, b_sum, PRECISION)
    o_state = tl.cast(memory, tl.int64) * DK * DV + o_k[:, None] * DV + o_v[None, :]
    tl.store(grad_states + o_state, b_sum, mask=m_k[:, None] & m_v[None, :])


class _Pairs:
    """Launches of the kernels above for one call: contiguous operands of one dtype, and the pairs in tiles."""

    def __init__(self, q, weights, states, index) -> None:
        dtype = operand_dtype(q, states) if q.dtype == torch.float32 else q.dtype
        self.q, self.states = q.to(dtype).contiguous(), states.to(dtype).contiguous()
        self.weights, self.index = weights.float().contiguous(), index.contiguous()
        on = chip(q)
        later = on in ("hopper", "blackwell")
        self.tiles = Tiles(index, states.shape[1], 32 if dtype == torch.float32 else 128 if later else 64)
        self.source = torch.where(self.tiles.filled, self.tiles.source, -1)
        self.precision = dot_precision(self.q)
        self.largest = 64 if on == "amd" else 128
        self.warps, self.stages = 8 if self.tiles.size == 128 else 4, 1 if on == "amd" else 2

    def answers(self, rows: torch.Tensor, out_dim: int, transposed: bool, other: torch.Tensor | None = None):
        """Rows `[R, N, W, H, out_dim]` of tokens, summed over their pairs; and `other . S row` of every pair."""
        dim = rows.shape[-1]
        block, split = min(power_of_two(out_dim), self.largest), split_width(dim, 64)
        blocks = triton.cdiv(out_dim, block)
        out = rows.new_empty(self.index.numel(), out_dim)
        # pairs without a memory are in no tile
        products = None if other is None else self.weights.new_zeros(blocks, *self.index.shape)
        args = {
            "rows": rows,
            "other": other,
            "weights": self.weights,
            "states": self.states,
            "memory": self.tiles.memory,
            "source": self.source,
            "out": out,
            "products": products,
            "num_pairs": self.index.numel(),
        }
        meta = {
            "DX": dim,
            "DY": out_dim,
            "BX": split,
            "NX": triton.cdiv(dim, split),
            "BY": block,
            "BT": self.tiles.size,
            "TOP_K": self.index.shape[-1],
            "TRANSPOSED": transposed,
            "PRODUCTS": other is not None,
            "PRECISION": self.precision,
        }
        launch(_tile_kernel, (self.tiles.num * blocks,), args, meta, self.warps, self.stages)
        return sum_rows(out, self.index), None if products is None else products.sum(0)

    def states_gradient(self, grad_out: torch.Tensor) -> torch.Tensor:
        grad = torch.empty(self.states.shape, dtype=torch.float32, device=grad_out.device)
        key, value = grad.shape[-2:]
        meta = {
            "DK": key,
            "DV": value,
            "BK": min(power_of_two(key), 128),
            "BV": min(power_of_two(value), self.largest),
            "BT": self.tiles.size,
            "TOP_K": self.index.shape[-1],
            "PRECISION": self.precision,
        }
        args = {
            "q": self.q,
            "grad_out": grad_out,
            "weights": self.weights,
            "borders": self.tiles.borders,
            "source": self.source,
            "grad_states": grad,
        }
        programs = grad.shape[:3].numel() * triton.cdiv(key, meta["BK"]) * triton.cdiv(value, meta["BV"])
        warps = 8 if meta["BK"] * meta["BV"] > 64 * 64 else 4
        launch(_selected_states_kernel, (programs,), args, meta, warps, self.stages)
        return grad


def forward(q, weights, states, index):
    """See `selected_read`."""
    pairs = _Pairs(q, weights, states, index)
    return pairs.answers(pairs.q, states.shape[-1], False)[0].to(q.dtype)


def backward(grad_out, q, weights, states, index):
    """See `selected_read_backward_torch`."""
    pairs = _Pairs(q, weights, states, index)
    grad_out = grad_out.to(pairs.q.dtype).contiguous()
    grad_q, grad_weights = pairs.answers(grad_out, q.shape[-1], True, pairs.q)
    grad_states = pairs.states_gradient(grad_out)
    return grad_q.to(q.dtype), grad_weights.to(weights.dtype), grad_states.to(states.dtype)
