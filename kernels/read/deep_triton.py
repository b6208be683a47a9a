"""`deep_read` and `deep_constant_read` on Triton: the gates of `triton_gates` or of a mask, and kernels that take them
as given. With n_ti the (normalised) inner answer of memory i and G_t = sum_i g_ti:

    o_t = G_t (q_t + shift) + scale * sum_i g_ti n_ti         dn_ti = g_ti scale * do_t
    dg_ti = do_t . (q_t + shift) + (scale * do_t) . n_ti      dq_t = G_t do_t + sum_i M_i'(q_t) dr_ti

A program of the first kernels keeps a tile of one query segment's tokens and walks through the memories and, inside,
through blocks of hidden units: hidden activations stay on chip. The backward computes them three times, in both passes
over a memory (r, then the gradient of q) and in the kernel of the maps' gradients, which keeps a block of hidden units
of one memory, walks through the tokens and takes the gradient of r that the other kernel leaves, so no atomics.
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
    tile_of,
    warps_of,
)
from ..shared.triton import LENGTHS, dot_precision, launch, narrow, operand_dtype
from .gates_triton import GateKernels, memory_at, query_blocks, readable


@triton.jit
def _place(begin, count, num, width, heads, BT: tl.constexpr):
    """Group, row and head, query segment (last first), its number in the block, and first slot of this program's tile.
    Whatever grows with the input is a scalar: what is left for blocks of pointers fits 32 bits."""
    tiles = tl.cdiv(width, BT)
    group = tl.cast(tl.program_id(0) // (count * tiles), tl.int64)
    place = tl.program_id(0) % (count * tiles)
    local = count - 1 - place // tiles
    return group, group // heads, group % heads, begin + local, local, place % tiles * BT


@triton.jit(do_not_specialize=LENGTHS)
def _read_kernel(
    q,
    w2,
    w1,
    gates,
    scale,
    shift,
    first,
    kept,
    out,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (row, head) x (query segment, last first; tile of BT tokens)."""
    group, row, head, segment, local, slot = _place(begin, count, num, width, heads, BT)
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = slot + o_t < width, o_d < D
    token = ((row * num + segment) * width + slot) * heads + head
    o_td, m_td = (o_t * heads * D)[:, None] + o_d[None, :], m_t[:, None] & m_d[None, :]
    b_q = tl.load(q + token * D + o_td, mask=m_td, other=0.0)
    b_sum, b_total = tl.zeros((BT, BD), tl.float32), tl.zeros((BT,), tl.float32)
    start, end, border, gap = readable(first, kept, row, segment, num, memories)
    for place in range(start, end):
        i = tl.cast(memory_at(place, border, gap), tl.int64)
        pair = (group * memories + i) * count * width + local * width + slot
        b_gate = tl.load(gates + pair + o_t, mask=m_t, other=0.0)
        o_map = ((row * memories + i) * heads + head) * D * H
        b_r = inner_answers(b_q, w2 + o_map, w1 + o_map, D, H, BD, BH, BT, PRECISION)
        b_n, _ = normalize(b_r, D, BD, NORM)
        b_sum += b_gate[:, None] * b_n
        b_total += b_gate
    b_centre = b_q.to(tl.float32)
    if NORM:
        b_sum *= tl.load(scale + head * D + o_d, mask=m_d, other=0.0)[None, :]
        b_centre += tl.load(shift + head * D + o_d, mask=m_d, other=0.0)[None, :]
    b_sum += b_total[:, None] * b_centre
    tl.store(out + token * D + o_td, narrow(b_sum, out.dtype.element_ty), mask=m_td)


@triton.jit(do_not_specialize=LENGTHS)
def _read_backward_kernel(
    grad_out,
    q,
    w2,
    w1,
    gates,
    scale,
    shift,
    first,
    kept,
    grad_q,
    grad_gates,
    shared,
    grad_r,
    grad_norm,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Also leaves the gradient of r `[G, S, T, D]`, of every token the sum of gate x its gradient in `shared`, and of
    every program what it gives to scale and shift. Programs as above."""
    group, row, head, segment, local, slot = _place(begin, count, num, width, heads, BT)
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = slot + o_t < width, o_d < D
    token = ((row * num + segment) * width + slot) * heads + head
    o_td, m_td = (o_t * heads * D)[:, None] + o_d[None, :], m_t[:, None] & m_d[None, :]
    o_pair = (o_t * D)[:, None] + o_d[None, :]
    b_q = tl.load(q + token * D + o_td, mask=m_td, other=0.0)
    b_scaled = tl.load(grad_out + token * D + o_td, mask=m_td, other=0.0).to(tl.float32)
    b_common = tl.sum(b_scaled * b_q.to(tl.float32), 1)
    if NORM:
        b_common += tl.sum(b_scaled * tl.load(shift + head * D + o_d, mask=m_d, other=0.0)[None, :], 1)
        b_scaled *= tl.load(scale + head * D + o_d, mask=m_d, other=0.0)[None, :]
    b_grad_q, b_sum = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
    b_total, b_shared = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    start, end, border, gap = readable(first, kept, row, segment, num, memories)
    for place in range(start, end):
        i = tl.cast(memory_at(place, border, gap), tl.int64)
        pair = (group * memories + i) * count * width + local * width + slot
        b_gate = tl.load(gates + pair + o_t, mask=m_t, other=0.0)
        o_map = ((row * memories + i) * heads + head) * D * H
        b_r = inner_answers(b_q, w2 + o_map, w1 + o_map, D, H, BD, BH, BT, PRECISION)
        b_n, b_rstd = normalize(b_r, D, BD, NORM)
        b_grad_gate = b_common + tl.sum(b_scaled * b_n, 1)
        tl.store(grad_gates + pair + o_t, b_grad_gate, mask=m_t)
        b_shared += b_gate * b_grad_gate
        b_total += b_gate
        if NORM:
            b_sum += b_gate[:, None] * b_n
        b_grad_r = normalize_backward(b_gate[:, None] * b_scaled, b_n, b_rstd, D, BD, NORM)
        b_grad_r = narrow(b_grad_r, b_q.dtype)
        tl.store(grad_r + pair * D + o_pair, b_grad_r, mask=m_td)
        b_grad_q = inner_backward(b_q, b_grad_r, w2 + o_map, w1 + o_map, b_grad_q, D, H, BD, BH, PRECISION)
    b_go = tl.load(grad_out + token * D + o_td, mask=m_td, other=0.0).to(tl.float32)  # again: not kept on chip
    b_all = b_total[:, None] * b_go
    tl.store(grad_q + token * D + o_td, narrow(b_grad_q + b_all, grad_q.dtype.element_ty), mask=m_td)
    tl.store(shared + token + o_t * heads, b_shared, mask=m_t)
    if NORM:
        p_norm = grad_norm + tl.cast(tl.program_id(0), tl.int64) * 2 * D + o_d
        tl.store(p_norm, tl.sum(b_sum * b_go, 0), mask=m_d)
        tl.store(p_norm + D, tl.sum(b_all, 0), mask=m_d)


@triton.jit(do_not_specialize=LENGTHS)
def _maps_backward_kernel(
    q,
    grad_r,
    w2,
    w1,
    stop,
    grad_w2,
    grad_w1,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one block of query segments gives. Programs: (row, head) x (memory, block of BH hidden units)."""
    blocks = (H + BH - 1) // BH
    group = tl.cast(tl.program_id(0) // (memories * blocks), tl.int64)
    place = tl.program_id(0) % (memories * blocks)
    memory, start_h = place // blocks, place % blocks * BH
    row, head, i = group // heads, group % heads, tl.cast(memory, tl.int64)
    o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BD), start_h + tl.arange(0, BH)
    m_d, m_h = o_d < D, o_h < H
    o_map = ((row * memories + i) * heads + head) * D * H
    b_w2, b_w1 = load_maps(w2 + o_map, w1 + o_map, start_h, D, H, BD, BH)
    p_w2, m_w2 = grad_w2 + o_map + o_d[:, None] * H + o_h[None, :], m_d[:, None] & m_h[None, :]
    p_w1, m_w1 = grad_w1 + o_map + o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
    b_grad_w2 = tl.load(p_w2, mask=m_w2, other=0.0)
    b_grad_w1 = tl.load(p_w1, mask=m_w1, other=0.0)
    earliest = memory - (memories - num) + 1  # the first query segment that may read this memory
    end = (tl.load(stop + row * memories + memory).to(tl.int32) - begin) * width
    for start in range(tl.maximum(earliest - begin, 0) * width, tl.minimum(end, count * width), BT):
        m_td = (start + o_t < tl.minimum(end, count * width))[:, None] & m_d[None, :]
        token = ((row * num + begin) * width + start) * heads + head
        b_q = tl.load(q + token * D + (o_t * heads * D)[:, None] + o_d[None, :], mask=m_td, other=0.0)
        pair = (group * memories + i) * count * width + start
        b_grad_r = tl.load(grad_r + pair * D + (o_t * D)[:, None] + o_d[None, :], mask=m_td, other=0.0)
        b_grad_w2, b_grad_w1 = maps_backward(b_q, b_grad_r, b_w2, b_w1, b_grad_w2, b_grad_w1, PRECISION)
    tl.store(p_w2, b_grad_w2, mask=m_w2)
    tl.store(p_w1, b_grad_w1, mask=m_w1)


class DeepRead:
    """Launches of the kernels above for one call. Tensors are contiguous and of the operand dtype."""

    def __init__(self, q, w2, w1, scale, shift, first, kept, stop) -> None:
        dtype = operand_dtype(q, w2, w1) if q.dtype == torch.float32 else q.dtype
        self.q, self.w2, self.w1 = (x.to(dtype).contiguous() for x in (q, w2, w1))
        self.scale, self.shift = (None if x is None else x.float().contiguous() for x in (scale, shift))
        self.first, self.kept, self.stop = first.contiguous(), kept, stop
        self.rows, self.num, self.width, self.heads, self.dim = q.shape
        self.memories, self.groups = w2.shape[1], self.rows * self.heads
        self.sizes = {"num": self.num, "width": self.width, "heads": self.heads, "memories": self.memories}
        self.has_norm = scale is not None
        self.meta = sizes_of(self.w2) | {"PRECISION": dot_precision(self.q)}
        self.tile = tile_of(self.w2)
        self.meta["BT"], self.warps = self.tile, warps_of(self.w2)
        self.tiles = triton.cdiv(self.width, self.tile)

    def _args(self, gates: torch.Tensor, begin: int, count: int) -> dict:
        return self.sizes | {
            "q": self.q,
            "w2": self.w2,
            "w1": self.w1,
            "gates": gates,
            "scale": self.scale,
            "shift": self.shift,
            "first": self.first,
            "kept": self.kept,
            "begin": begin,
            "count": count,
        }

    def read(self, out: torch.Tensor, gates: torch.Tensor, begin: int, count: int) -> None:
        args = self._args(gates, begin, count) | {"out": out}
        grid = (self.groups * count * self.tiles,)
        launch(_read_kernel, grid, args, self.meta | {"NORM": self.has_norm}, self.warps, 2)

    def begin_backward(self, grad_out: torch.Tensor) -> None:
        self.grad_out, self.grad_q = grad_out.to(self.q.dtype).contiguous(), torch.empty_like(self.q)
        self.grad_w2, self.grad_w1 = (torch.zeros_like(w, dtype=torch.float32) for w in (self.w2, self.w1))
        norm = (self.heads, self.dim) if self.has_norm else 0
        self.grad_scale, self.grad_shift = (self.grad_w2.new_zeros(norm) for _ in range(2))

    def blocks(self):
        """As `GateKernels.blocks`, but so that the gradients of r of a block have about the same bound."""
        return query_blocks(self.num, self.width, self.groups, self.memories * self.dim)

    def backward(self, gates: torch.Tensor, begin: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of the gates `[1, G, S, T]`, and per token the sum of gate x its gradient `[1, R, N, W, H]`."""
        grad_gates = torch.empty_like(gates)
        shared = gates.new_empty(self.q.shape[:-1])
        grad_r = self.q.new_empty(*gates.shape, self.dim)
        programs = self.groups * count * self.tiles
        grad_norm = gates.new_empty(programs, 2, self.dim) if self.has_norm else None
        args = self._args(gates, begin, count) | {
            "grad_out": self.grad_out,
            "grad_q": self.grad_q,
            "grad_gates": grad_gates,
            "shared": shared,
            "grad_r": grad_r,
            "grad_norm": grad_norm,
        }
        meta = self.meta | backward_sizes(self.w2)
        # with 4 warps it spills
        launch(_read_backward_kernel, (programs,), args, meta | {"NORM": self.has_norm}, 8, 2)
        if self.has_norm:
            per_head = grad_norm.view(self.rows, self.heads, -1, 2, self.dim).sum((0, 2))
            self.grad_scale += per_head[:, 0]
            self.grad_shift += per_head[:, 1]
        args = self.sizes | {
            "q": self.q,
            "grad_r": grad_r,
            "w2": self.w2,
            "w1": self.w1,
            "stop": self.stop,
            "grad_w2": self.grad_w2,
            "grad_w1": self.grad_w1,
            "begin": begin,
            "count": count,
        }
        grid = (self.groups * self.memories * triton.cdiv(meta["H"], meta["BH"]),)
        launch(_maps_backward_kernel, grid, args, meta, self.warps, 2)
        return grad_gates[None], shared[None]

    def gradients(self, q, w2, w1, scale, shift) -> tuple[torch.Tensor, ...]:
        """Of q, w2, w1, scale and shift (empty tensors without a norm)."""
        return (
            self.grad_q.to(q.dtype),
            self.grad_w2.to(w2.dtype),
            self.grad_w1.to(w1.dtype),
            self.grad_scale.to((q if scale is None else scale).dtype),
            self.grad_shift.to((q if shift is None else shift).dtype),
        )


def forward(q, u, w2, w1, summaries, online_logit, scale, shift, birth, first, function):
    """See `deep_read`."""
    gates = GateKernels(u, summaries, online_logit, birth, first, function)
    read = DeepRead(q, w2, w1, scale, shift, first, gates.kept, gates.stop)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for begin, count in gates.blocks():
        read.read(out, gates.block(begin, count), begin, count)
    return out, gates.online_gate


def backward(grad_out, grad_online, q, u, w2, w1, summaries, online_logit, scale, shift, birth, first, function):
    """See `deep_read_backward_torch`."""
    gates = GateKernels(u, summaries, online_logit, birth, first, function)
    read = DeepRead(q, w2, w1, scale, shift, first, gates.kept, gates.stop)
    read.begin_backward(grad_out)
    gates.begin_backward(grad_online)
    for begin, count in read.blocks():
        weights = gates.block(begin, count)
        gates.block_backward(begin, count, weights, *read.backward(weights, begin, count))
    grad_q, grad_w2, grad_w1, grad_scale, grad_shift = read.gradients(q, w2, w1, scale, shift)
    return (
        grad_q,
        gates.grad_u.to(u.dtype),
        grad_w2,
        grad_w1,
        gates.grad_summaries.to(summaries.dtype),
        gates.grad_logit,
        grad_scale,
        grad_shift,
    )
