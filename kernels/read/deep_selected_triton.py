"""`deep_selected_read` on Triton, through `Tiles`: pairs of a token and a chosen memory, sorted by memory.

A program computes one memory's answers for one tile of pairs. As in `triton_selected_read`, every pair writes a row of
its own and `sum_rows` adds the k rows of a token: no atomics. What a tile knows of the gradients of the maps (that of
r, per slot) and of the scale (a row per tile) is summed memory by memory, in the order of the tiles.
"""

import torch
import triton
import triton.language as tl

from ..shared.deep_triton import (
    backward_sizes,
    inner_answers,
    inner_backward,
    load_maps,
    maps_backward,
    normalize,
    normalize_backward,
    sizes_of,
    warps_of,
)
from ..shared.triton import chip, dot_precision, launch, narrow, operand_dtype
from .selected import Tiles
from .selected_triton import sum_rows


@triton.jit
def _tile_kernel(
    q,
    weights,
    w2,
    w1,
    scale,
    shift,
    memory,
    source,
    out,
    heads,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out[pair] = weight * M(q)`. Programs: tiles."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    pair = tl.load(source + tl.cast(tl.program_id(0), tl.int64) * BT + tl.arange(0, BT))  # -1 where there is none
    m_pair = pair >= 0
    m_pd = m_pair[:, None] & m_d[None, :]
    if tl.max(pair, 0) < 0:
        return
    token = tl.maximum(pair, 0) // TOP_K
    i = tl.load(memory + tl.program_id(0))
    b_q = tl.load(q + token[:, None] * D + o_d[None, :], mask=m_pd, other=0.0)
    b_r = inner_answers(b_q, w2 + i * D * H, w1 + i * D * H, D, H, BD, BH, BT, PRECISION)
    b_answer, _ = normalize(b_r, D, BD, NORM)
    if NORM:
        o_norm = i % heads * D + o_d
        b_answer *= tl.load(scale + o_norm, mask=m_d, other=0.0)[None, :]
        b_answer += tl.load(shift + o_norm, mask=m_d, other=0.0)[None, :]
    b_weight = tl.load(weights + tl.maximum(pair, 0), mask=m_pair, other=0.0)
    b_answer = b_weight[:, None] * (b_answer + b_q.to(tl.float32))
    tl.store(out + pair[:, None] * D + o_d[None, :], narrow(b_answer, out.dtype.element_ty), mask=m_pd)


@triton.jit
def _tile_backward_kernel(
    grad_out,
    q,
    weights,
    w2,
    w1,
    scale,
    shift,
    memory,
    source,
    grad_rows,
    grad_weights,
    grad_r,
    grad_scale,
    heads,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q and weights (a row per pair), of r (per slot) and of the scale (per tile). Programs: tiles."""
    tile = tl.cast(tl.program_id(0), tl.int64)
    o_d, slot = tl.arange(0, BD), tile * BT + tl.arange(0, BT)
    m_d = o_d < D
    pair = tl.load(source + slot)
    m_pair = pair >= 0
    m_pd = m_pair[:, None] & m_d[None, :]
    if tl.max(pair, 0) < 0:
        return
    token = tl.maximum(pair, 0) // TOP_K
    i = tl.load(memory + tile)
    p_w2, p_w1 = w2 + i * D * H, w1 + i * D * H
    b_q = tl.load(q + token[:, None] * D + o_d[None, :], mask=m_pd, other=0.0)
    b_go = tl.load(grad_out + token[:, None] * D + o_d[None, :], mask=m_pd, other=0.0).to(tl.float32)
    b_weight = tl.load(weights + tl.maximum(pair, 0), mask=m_pair, other=0.0)
    b_r = inner_answers(b_q, p_w2, p_w1, D, H, BD, BH, BT, PRECISION)
    b_n, b_rstd = normalize(b_r, D, BD, NORM)
    b_answer, b_grad_n = b_n, b_weight[:, None] * b_go
    b_grad_q = b_grad_n
    if NORM:
        o_norm = i % heads * D + o_d
        tl.store(grad_scale + tile * D + o_d, tl.sum(b_grad_n * b_n, 0), mask=m_d)
        b_scale = tl.load(scale + o_norm, mask=m_d, other=0.0)[None, :]
        b_answer = b_answer * b_scale + tl.load(shift + o_norm, mask=m_d, other=0.0)[None, :]
        b_grad_n *= b_scale
    tl.store(grad_weights + pair, tl.sum(b_go * (b_answer + b_q.to(tl.float32)), 1), mask=m_pair)
    b_grad_r = narrow(normalize_backward(b_grad_n, b_n, b_rstd, D, BD, NORM), b_q.dtype)
    tl.store(grad_r + slot[:, None] * D + o_d[None, :], b_grad_r, mask=m_d[None, :])
    b_grad_q = inner_backward(b_q, b_grad_r, p_w2, p_w1, b_grad_q, D, H, BD, BH, PRECISION)
    tl.store(grad_rows + pair[:, None] * D + o_d[None, :], narrow(b_grad_q, grad_rows.dtype.element_ty), mask=m_pd)


@triton.jit
def _maps_backward_kernel(
    q,
    w2,
    w1,
    borders,
    source,
    grad_r,
    tile_scale,
    grad_w2,
    grad_w1,
    grad_scale,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one memory from all of its tiles, in order. Programs: (memory, block of BH hidden units)."""
    blocks = (H + BH - 1) // BH
    memory, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_d, o_h = tl.arange(0, BD), block * BH + tl.arange(0, BH)
    m_d, m_h = o_d < D, o_h < H
    o_map = tl.cast(memory, tl.int64) * D * H
    b_w2, b_w1 = load_maps(w2 + o_map, w1 + o_map, block * BH, D, H, BD, BH)
    b_grad_w2, b_grad_w1 = tl.zeros((BD, BH), tl.float32), tl.zeros((BH, BD), tl.float32)
    b_scale = tl.zeros((BD,), tl.float32)
    for number in range(tl.load(borders + memory), tl.load(borders + memory + 1)):
        tile = tl.cast(number, tl.int64)
        slot = tile * BT + tl.arange(0, BT)
        pair = tl.load(source + slot)
        token = tl.maximum(pair, 0) // TOP_K
        m_pd = (pair >= 0)[:, None] & m_d[None, :]
        b_q = tl.load(q + token[:, None] * D + o_d[None, :], mask=m_pd, other=0.0)
        b_grad_r = tl.load(grad_r + slot[:, None] * D + o_d[None, :], mask=m_pd, other=0.0)
        b_grad_w2, b_grad_w1 = maps_backward(b_q, b_grad_r, b_w2, b_w1, b_grad_w2, b_grad_w1, PRECISION)
        if NORM:
            b_scale += tl.load(tile_scale + tile * D + o_d, mask=m_d, other=0.0)
    tl.store(grad_w2 + o_map + o_d[:, None] * H + o_h[None, :], b_grad_w2, mask=m_d[:, None] & m_h[None, :])
    tl.store(grad_w1 + o_map + o_h[:, None] * D + o_d[None, :], b_grad_w1, mask=m_h[:, None] & m_d[None, :])
    if NORM:
        if block == 0:
            tl.store(grad_scale + tl.cast(memory, tl.int64) * D + o_d, b_scale, mask=m_d)


class _Pairs:
    """Launches of the kernels above for one call: contiguous operands of one dtype, and the pairs in tiles."""

    def __init__(self, q, weights, w2, w1, scale, shift, index) -> None:
        dtype = operand_dtype(q, w2, w1) if q.dtype == torch.float32 else q.dtype
        self.q, self.w2, self.w1 = (x.to(dtype).contiguous() for x in (q, w2, w1))
        self.weights, self.index = weights.float().contiguous(), index.contiguous()
        scale, shift = (None if x is None else x.float().contiguous() for x in (scale, shift))
        self.tiles = Tiles(index, w2.shape[1], 32 if dtype == torch.float32 or chip(q) == "amd" else 64)
        self.source = torch.where(self.tiles.filled, self.tiles.source, -1)
        self.heads, self.dim = q.shape[3:]
        self.has_norm = scale is not None
        self.meta = sizes_of(self.w2) | {
            "BT": self.tiles.size,
            "TOP_K": index.shape[-1],
            "NORM": self.has_norm,
            "PRECISION": dot_precision(self.q),
        }
        self.warps = warps_of(self.w2)
        self.args = {
            "q": self.q,
            "weights": self.weights,
            "w2": self.w2,
            "w1": self.w1,
            "scale": scale,
            "shift": shift,
            "memory": self.tiles.memory,
            "source": self.source,
            "heads": self.heads,
        }

    def answers(self) -> torch.Tensor:
        rows = self.q.new_empty(self.index.numel(), self.dim)
        launch(_tile_kernel, (self.tiles.num,), self.args | {"out": rows}, self.meta, self.warps, 2)
        return sum_rows(rows, self.index)

    def backward(self, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of q, weights, w2, w1 and the scale, in fp32 but for q's."""
        grad_out = grad_out.to(self.q.dtype).contiguous()
        rows = self.q.new_empty(self.index.numel(), self.dim)
        grad_weights = torch.zeros_like(self.weights)  # pairs without a memory are in no tile
        grad_r = self.q.new_empty(self.source.numel(), self.dim)
        tile_scale = self.weights.new_empty(self.tiles.num, self.dim) if self.has_norm else None
        args = self.args | {
            "grad_out": grad_out,
            "grad_rows": rows,
            "grad_weights": grad_weights,
            "grad_r": grad_r,
            "grad_scale": tile_scale,
        }
        meta = self.meta | backward_sizes(self.w2)
        launch(_tile_backward_kernel, (self.tiles.num,), args, meta, self.warps, 2)
        grad_w2, grad_w1 = (torch.empty_like(w, dtype=torch.float32) for w in (self.w2, self.w1))
        grad_scale = self.weights.new_empty(*self.w2.shape[:3], self.dim) if self.has_norm else None
        args = {
            "q": self.q,
            "w2": self.w2,
            "w1": self.w1,
            "borders": self.tiles.borders,
            "source": self.source,
            "grad_r": grad_r,
            "tile_scale": tile_scale,
            "grad_w2": grad_w2,
            "grad_w1": grad_w1,
            "grad_scale": grad_scale,
        }
        grid = (self.w2.shape[:3].numel() * triton.cdiv(meta["H"], meta["BH"]),)
        launch(_maps_backward_kernel, grid, args, meta, self.warps, 2)
        return sum_rows(rows, self.index), grad_weights, grad_w2, grad_w1, grad_scale


def forward(q, weights, w2, w1, scale, shift, index):
    """See `deep_selected_read`."""
    return _Pairs(q, weights, w2, w1, scale, shift, index).answers().to(q.dtype)


def backward(grad_out, q, weights, w2, w1, scale, shift, index):
    """See `deep_selected_read_backward_torch`."""
    pairs = _Pairs(q, weights, w2, w1, scale, shift, index)
    grad_q, grad_weights, grad_w2, grad_w1, grad_scale = pairs.backward(grad_out)
    if scale is None:
        norm = q.new_empty(0), q.new_empty(0)
    else:
        total = pairs.weights.sum(-1, keepdim=True)
        norm = grad_scale.sum((0, 1)).to(scale.dtype), (total * grad_out.float()).sum((0, 1, 2)).to(shift.dtype)
    return (grad_q.to(q.dtype), grad_weights.to(weights.dtype), grad_w2.to(w2.dtype), grad_w1.to(w1.dtype), *norm)
