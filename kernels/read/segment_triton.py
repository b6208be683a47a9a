"""`segment_read` on Triton: a read with the gates fused in, and a backward that takes the gates of
gates_triton.py as given.

    o_t = sum_i g_ti S_i^T q_t    dq_t = sum_i g_ti S_i do_t    dg_ti = q_t^T S_i do_t    dS_i = sum_t g_ti q_t do_t^T

In the first two, a program keeps a tile of one query segment's tokens and walks through the memories that it may read:
every product is taken whole and then weighed in fp32, in the read by exp(logit - maximum so far), as flash attention
does with its values. In the last one it keeps (a block of) one memory's gradient and walks through the tokens. No
atomics. Widths are summed over in NK blocks of BK, so that 96 = 3 * 32 needs no padding.
"""

import torch
import triton
import triton.language as tl

from ..shared.triton import (
    LENGTHS,
    OLDER,
    chip,
    dot,
    dot_precision,
    launch,
    narrow,
    operand_dtype,
    power_of_two,
    split_dot,
    split_width,
)
from .gates_triton import GateKernels, gate_of, hide, memory_at, readable


@triton.jit
def load_blocks(p_rows, m_rows, width, BLOCK: tl.constexpr, NUMBER: tl.constexpr):
    """Rows of `width` elements, pointers [BT], as NUMBER blocks [BT, BLOCK]."""
    blocks = ()
    for number in tl.static_range(NUMBER):
        o_block = number * BLOCK + tl.arange(0, BLOCK)
        mask = m_rows[:, None] & (o_block < width)[None, :]
        blocks = blocks + (tl.load(p_rows[:, None] + o_block[None, :], mask=mask, other=0.0),)
    return blocks


@triton.jit
def _logits(
    b_u,
    p_u,
    m_t,
    p_summaries,
    o_memory,
    m_memory,
    stride,
    DU: tl.constexpr,
    BU: tl.constexpr,
    NU: tl.constexpr,
    BLOCKS: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The logits of `block_logits` in NU blocks of BU, of which (unless b_u holds all of u) only one is on chip."""
    b_logit = None
    for number in tl.static_range(BLOCKS):
        b_mean_logit = tl.zeros((m_t.shape[0], o_memory.shape[0]), tl.float32)
        p_mean = p_summaries + tl.cast(o_memory, tl.int64) * stride + number * DU
        for piece in tl.static_range(NU):
            o_u = piece * BU + tl.arange(0, BU)
            if HOLD:
                b_piece = b_u[piece]
            else:
                b_piece = tl.load(p_u[:, None] + o_u[None, :], mask=m_t[:, None] & (o_u < DU)[None, :], other=0.0)
            m_mean = m_memory[None, :] & (o_u < DU)[:, None]
            b_mean = tl.load(p_mean[None, :] + o_u[:, None], mask=m_mean, other=0.0).to(tl.float32)  # [BU, BN]
            b_mean_logit = split_dot(b_piece, b_mean, b_mean_logit, PRECISION)
        b_logit = b_mean_logit if number == 0 else tl.maximum(b_logit, b_mean_logit)
    return b_logit


@triton.jit(do_not_specialize=LENGTHS)
def _read_kernel(
    q,
    u,
    states,
    summaries,
    norm,
    birth,
    first,
    kept,
    out,
    num,
    width,
    heads,
    memories,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    DU: tl.constexpr,
    BU: tl.constexpr,
    NU: tl.constexpr,
    BLOCKS: tl.constexpr,
    HOLD: tl.constexpr,
    FUNCTION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every BN-th step takes the gates of the next BN memories: one loop, as two nested ones take more registers.
    Programs: (row, head) x (query segment, last first; tile of BT tokens; block of DV)."""
    tiles, blocks = tl.cdiv(width, BT), (DV + BV - 1) // BV
    group = tl.cast(tl.program_id(0) // (num * tiles * blocks), tl.int64)
    place = tl.program_id(0) % (num * tiles * blocks)
    block, tile, segment = place % blocks, place // blocks % tiles, num - 1 - place // blocks // tiles
    row, head = group // heads, group % heads
    o_t = tile * BT + tl.arange(0, BT)
    o_v = block * BV + tl.arange(0, BV)
    m_t, m_v = o_t < width, o_v < DV
    token = ((row * num + segment) * width + o_t) * heads + head
    b_q = load_blocks(q + token * DK, m_t, DK, BK, NK)
    p_u = u + token * DU
    b_u = load_blocks(p_u, m_t, DU, BU, NU) if HOLD else None
    b_norm = tl.load(norm + token, mask=m_t, other=1.0)
    p_summaries = summaries + (row * memories * heads + head) * BLOCKS * DU
    stride = heads * BLOCKS * DU
    o_n = tl.arange(0, BN)
    b_gates, b_out = tl.zeros((BT, BN), tl.float32), tl.zeros((BT, BV), tl.float32)
    start, end, border, gap = readable(first, kept, row, segment, num, memories)
    for place in range(start, end):
        column = (place - start) % BN
        if column == 0:
            m_memory = place + o_n < end
            o_memory = memory_at(place + o_n, border, gap)
            b_logit = _logits(
                b_u, p_u, m_t, p_summaries, o_memory, m_memory, stride, DU, BU, NU, BLOCKS, HOLD, PRECISION
            )
            b_logit = hide(b_logit, o_memory, m_memory, segment, birth + row * memories)
            b_gates = gate_of(b_logit, b_norm[:, None], FUNCTION)
        b_gate = tl.sum(tl.where((o_n == column)[None, :], b_gates, 0.0), 1)
        p_state = states + ((row * memories + memory_at(place, border, gap)) * heads + head) * DK * DV
        for number in tl.static_range(NK):
            o_k = number * BK + tl.arange(0, BK)
            mask = (o_k < DK)[:, None] & m_v[None, :]
            b_state = tl.load(p_state + o_k[:, None] * DV + o_v[None, :], mask=mask, other=0.0)  # [BK, BV]
            b_weighed = narrow(b_q[number].to(tl.float32) * b_gate[:, None], b_q[number].dtype)
            b_out = dot(b_weighed, b_state, b_out, PRECISION)
    p_out = out + token[:, None] * DV + o_v[None, :]
    tl.store(p_out, narrow(b_out, out.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _read_backward_kernel(
    grad_out,
    q,
    states,
    gates,
    first,
    kept,
    grad_q,
    grad_gates,
    shared,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    part_stride,
    token_stride,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Also leaves the sum of gate x its gradient of every token in `shared`. A part is NK blocks of BK; what it gives
    to the gates is a part, too. Programs: (row, head) x (query segment, last first; tile of BT tokens; part)."""
    tiles = tl.cdiv(width, BT)
    group = tl.cast(tl.program_id(0) // (count * tiles * PARTS), tl.int64)
    place = tl.program_id(0) % (count * tiles * PARTS)
    part, tile, local = tl.cast(place % PARTS, tl.int64), place // PARTS % tiles, count - 1 - place // PARTS // tiles
    segment, row, head = begin + local, group // heads, group % heads
    o_t = tile * BT + tl.arange(0, BT)
    m_t = o_t < width
    token = ((row * num + segment) * width + o_t) * heads + head
    first_key = part * NK * BK
    b_q = load_blocks(q + token * DK + first_key, m_t, DK - first_key, BK, NK)
    b_go = load_blocks(grad_out + token * DV, m_t, DV, BV, NV)
    b_grad = ()
    for _ in tl.static_range(NK):
        b_grad = b_grad + (tl.zeros((BT, BK), tl.float32),)
    b_shared = tl.zeros((BT,), tl.float32)
    start, end, border, gap = readable(first, kept, row, segment, num, memories)
    p_token = group * memories * count * width + local * width + o_t
    grad_gates += part * part_stride
    for place in range(start, end):
        i = tl.cast(memory_at(place, border, gap), tl.int64)
        o_gate = p_token + i * count * width
        b_gate = tl.load(gates + o_gate, mask=m_t, other=0.0)
        b_grad_gate = tl.zeros((BT,), tl.float32)
        p_state = states + ((row * memories + i) * heads + head) * DK * DV
        b_next = ()
        for number in tl.static_range(NK):
            o_k = first_key + number * BK + tl.arange(0, BK)
            b_back = tl.zeros((BT, BK), tl.float32)
            for piece in tl.static_range(NV):
                o_v = piece * BV + tl.arange(0, BV)
                mask = (o_v < DV)[:, None] & (o_k < DK)[None, :]
                b_state = tl.load(p_state + o_k[None, :] * DV + o_v[:, None], mask=mask, other=0.0)  # [BV, BK]
                b_back = dot(b_go[piece], b_state, b_back, PRECISION)
            b_grad_gate += tl.sum(b_q[number].to(tl.float32) * b_back, 1)
            b_next = b_next + (b_grad[number] + b_gate[:, None] * b_back,)
        b_grad = b_next
        b_shared += b_gate * b_grad_gate
        tl.store(grad_gates + o_gate, b_grad_gate, mask=m_t)
    tl.store(shared + part * token_stride + token, b_shared, mask=m_t)
    for number in tl.static_range(NK):
        o_k = first_key + number * BK + tl.arange(0, BK)
        p_grad = grad_q + token[:, None] * DK + o_k[None, :]
        tl.store(p_grad, narrow(b_grad[number], grad_q.dtype.element_ty), mask=m_t[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _states_backward_kernel(
    grad_out,
    q,
    gates,
    stop,
    grad_states,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    NM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one block of query segments gives to NM memories that share what is loaded of tokens. Programs:
    (row, head) x (NM memories, block of DK, block of DV)."""
    k_blocks, v_blocks = (DK + BK - 1) // BK, (DV + BV - 1) // BV
    blocks = tl.cdiv(memories, NM) * k_blocks * v_blocks
    group = tl.cast(tl.program_id(0) // blocks, tl.int64)
    place = tl.program_id(0) % blocks
    first, block = place // (k_blocks * v_blocks) * NM, place % (k_blocks * v_blocks)
    row, head = group // heads, group % heads
    o_k = block // v_blocks * BK + tl.arange(0, BK)
    o_v = block % v_blocks * BV + tl.arange(0, BV)
    m_k, m_v = o_k < DK, o_v < DV
    p_states = grad_states + ((row * memories + first) * heads + head) * DK * DV + o_k[:, None] * DV + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    p_gates = gates + (group * memories + first) * count * width
    b_sums, begins, stops, last = (), (), (), 0
    for number in tl.static_range(NM):
        m_here = (first + number + tl.arange(0, 1) < memories)[:, None]
        p_state = p_states + tl.cast(number, tl.int64) * heads * DK * DV
        b_sums = b_sums + (tl.load(p_state, mask=m_state & m_here, other=0.0),)
        # tokens of the first query segment that may read this memory, and of the one behind the last
        here = tl.load(stop + row * memories + tl.minimum(first + number, memories - 1)).to(tl.int32)
        here = (tl.where(first + number < memories, here, 0) - begin) * width
        begins = begins + (tl.maximum(first + number - (memories - num) + 1 - begin, 0) * width,)
        stops, last = stops + (tl.minimum(here, count * width),), tl.maximum(last, here)
    for start in range(begins[0], tl.minimum(last, count * width), BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < count * width
        token = ((row * num + begin) * width + o_t) * heads + head
        b_q = tl.load(q + token[None, :] * DK + o_k[:, None], mask=m_t[None, :] & m_k[:, None], other=0.0)  # [BK, BT]
        b_go = tl.load(grad_out + token[:, None] * DV + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=0.0)
        b_next = ()
        for number in tl.static_range(NM):
            m_read = (o_t >= begins[number]) & (o_t < stops[number])
            b_gate = tl.load(p_gates + tl.cast(number, tl.int64) * count * width + o_t, mask=m_read, other=0.0)
            b_weighed = narrow(b_q.to(tl.float32) * b_gate[None, :], b_q.dtype)
            b_next = b_next + (dot(b_weighed, b_go, b_sums[number], PRECISION),)
        b_sums = b_next
    for number in tl.static_range(NM):
        p_state = p_states + tl.cast(number, tl.int64) * heads * DK * DV
        tl.store(p_state, b_sums[number], mask=m_state & (first + number + tl.arange(0, 1) < memories)[:, None])


class _Read:
    """Launches of the kernels above for one call. Tensors are contiguous and of the operand dtype."""

    def __init__(self, q, states, gates: GateKernels) -> None:
        self.gates = gates
        dtype = operand_dtype(q, states) if q.dtype == torch.float32 else q.dtype
        self.q, self.states = q.to(dtype).contiguous(), states.to(dtype).contiguous()
        self.key_dim, self.value_dim = states.shape[-2:]
        self.meta = {"DK": self.key_dim, "DV": self.value_dim, "PRECISION": dot_precision(self.q)}
        self.on = chip(q)
        self.wide = max(self.key_dim, self.value_dim) > 128

    def _config(self, tile: int, warps: int, stages: int) -> tuple[int, int, int]:
        """The same tile, warps and stages, or what fits."""
        if self.on == "amd":
            tile, warps, stages = 64, 4, 1 if self.wide else 2  # with two stages the wide ones need more than 64 KiB
        return (32, 4, stages) if torch.float32 in (self.q.dtype, self.gates.u.dtype) else (tile, warps, stages)

    def read(self, out: torch.Tensor) -> None:
        """Writes the answers; `gates.shared` has run."""
        gates, wide = self.gates, self.wide
        value_block = min(power_of_two(self.value_dim), 64 if self.on == "amd" and wide else 128)
        key_block = split_width(self.key_dim, 128 if self.on == "hopper" and not wide else 64)
        block = split_width(gates.summary_dim, 64 if not wide else 16 if self.on == "hopper" else 32)
        meta = self.meta | {
            "BK": key_block,
            "NK": triton.cdiv(self.key_dim, key_block),
            "BV": value_block,
            "DU": gates.summary_dim,
            "BU": block,
            "NU": triton.cdiv(gates.summary_dim, block),
            "BLOCKS": gates.meta["BLOCKS"],
            "FUNCTION": gates.meta["FUNCTION"],
            "HOLD": self.on in ("hopper", "blackwell") and not wide,
            "BN": 16,
        }
        args = {
            "q": self.q,
            "u": gates.u,
            "states": self.states,
            "summaries": gates.summaries,
            "norm": gates.norm,
            "birth": gates.birth,
            "first": gates.first,
            "kept": gates.kept,
            "out": out,
        }
        if self.on in OLDER:
            config = (32, 4, 1 if self.on == "small" else 2) if wide else (128, 8, 2)
        else:  # two programs on a chip: one takes gates while the other multiplies
            config = (64, 4, 2)
        meta["BT"], *options = self._config(*config)
        grid = gates.tiles(gates.num, meta["BT"], triton.cdiv(self.value_dim, value_block))
        launch(_read_kernel, grid, args | gates.sizes, meta, *options)

    def backward(self, grad_q, grad_states, grad_out, gates, begin: int, count: int):
        """Writes to grad_q, adds to grad_states; the gradient of the gates in parts, and per token the sum of gate x
        its gradient."""
        parts = triton.cdiv(self.key_dim, 128)
        key_block, value_block = split_width(min(self.key_dim, 128)), split_width(self.value_dim)
        grad_gates = gates.new_empty(parts, *gates.shape)
        shared = gates.new_empty(parts, *self.q.shape[:-1])
        meta = self.meta | {
            "BK": key_block,
            "NK": triton.cdiv(min(self.key_dim, 128), key_block),
            "PARTS": parts,
            "BV": value_block,
            "NV": triton.cdiv(self.value_dim, value_block),
        }
        args = {
            "grad_out": grad_out,
            "q": self.q,
            "states": self.states,
            "gates": gates,
            "first": self.gates.first,
            "kept": self.gates.kept,
            "grad_q": grad_q,
            "grad_gates": grad_gates,
            "shared": shared,
            "begin": begin,
            "count": count,
            "part_stride": gates.numel(),
            "token_stride": self.q.shape[:-1].numel(),
        }
        meta["BT"], *options = self._config(64, 8, 2 if self.wide else 3)
        grid = self.gates.tiles(count, meta["BT"], parts)
        launch(_read_backward_kernel, grid, args | self.gates.sizes, meta, *options)
        meta = self.meta | {"BK": min(power_of_two(self.key_dim), 128), "BV": min(power_of_two(self.value_dim), 128)}
        meta["NM"] = 2 if self.on in ("hopper", "blackwell") and not self.wide else 1
        blocks = triton.cdiv(self.key_dim, meta["BK"]) * triton.cdiv(self.value_dim, meta["BV"])
        args = {
            "grad_out": grad_out,
            "q": self.q,
            "gates": gates,
            "stop": self.gates.stop,
            "grad_states": grad_states,
            "begin": begin,
            "count": count,
        }
        grid = (self.gates.groups * triton.cdiv(self.gates.memories, meta["NM"]) * blocks,)
        meta["BT"], *options = self._config(64, 8, 3)
        launch(_states_backward_kernel, grid, args | self.gates.sizes, meta, *options)
        return grad_gates, shared


def forward(q, u, states, summaries, online_logit, birth, first, function):
    """See `segment_read`."""
    gates = GateKernels(u, summaries, online_logit, birth, first, function)
    read = _Read(q, states, gates)
    out = torch.empty(*q.shape[:-1], states.shape[-1], dtype=q.dtype, device=q.device)
    gates.shared()
    read.read(out)
    return out, gates.online_gate


def backward(grad_out, grad_online, q, u, states, summaries, online_logit, birth, first, function):
    """See `segment_read_backward_torch`."""
    gates = GateKernels(u, summaries, online_logit, birth, first, function)
    read = _Read(q, states, gates)
    grad_out = grad_out.to(read.q.dtype).contiguous()
    gates.begin_backward(grad_online)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # contiguous, whatever q is
    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=q.device)
    for begin, count in gates.blocks():
        weights = gates.block(begin, count)
        grads = read.backward(grad_q, grad_states, grad_out, weights, begin, count)
        gates.block_backward(begin, count, weights, *grads)
    return (
        grad_q,
        gates.grad_u.to(u.dtype),
        grad_states.to(states.dtype),
        gates.grad_summaries.to(summaries.dtype),
        gates.grad_logit,
    )
