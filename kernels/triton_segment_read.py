"""`segment_read` on Triton: the gates of `triton_gates`, and products that take them as given.

    o_t = sum_i g_ti S_i^T q_t    dq_t = sum_i g_ti S_i do_t    dg_ti = q_t^T S_i do_t    dS_i = sum_t g_ti q_t do_t^T

In the first two, a program keeps a tile of one query segment's tokens and walks through the memories that it may read:
every product is taken whole and then weighed in fp32. In the last one it keeps (a block of) one memory's gradient and
walks through the tokens. No atomics. Widths are summed over in NK blocks of BK, so that 96 = 3 * 32 needs no padding.
"""

import torch
import triton
import triton.language as tl

from .triton_common import dot, dot_precision, launch, narrow, operand_dtype, power_of_two, split_width
from .triton_gates import Gates


@triton.jit
def load_blocks(p_rows, m_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUMBER: tl.constexpr):
    """Rows of `WIDTH` elements, pointers [BT], as NUMBER blocks [BT, BLOCK]."""
    blocks = ()
    for number in tl.static_range(NUMBER):
        o_block = number * BLOCK + tl.arange(0, BLOCK)
        mask = m_rows[:, None] & (o_block < WIDTH)[None, :]
        blocks = blocks + (tl.load(p_rows[:, None] + o_block[None, :], mask=mask, other=0.0),)
    return blocks


@triton.jit
def _read_kernel(
    q, states, gates, first, out,
    begin, count, num, width, heads, memories,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: (row, head) x (query segment, last first; tile of BT tokens; block of DV)."""
    tiles, blocks = tl.cdiv(width, BT), (DV + BV - 1) // BV
    group = tl.cast(tl.program_id(0) // (count * tiles * blocks), tl.int64)
    place = tl.program_id(0) % (count * tiles * blocks)
    block, tile, local = place % blocks, place // blocks % tiles, count - 1 - place // blocks // tiles
    segment, row, head = begin + local, group // heads, group % heads
    o_t = tile * BT + tl.arange(0, BT)
    o_v = block * BV + tl.arange(0, BV)
    m_t, m_v = o_t < width, o_v < DV
    token = ((row * num + segment) * width + o_t) * heads + head
    b_q = load_blocks(q + token * DK, m_t, DK, BK, NK)
    b_out = tl.zeros((BT, BV), tl.float32)
    first_memory, visible = tl.load(first + row * num + segment), memories - num + segment
    for memory in range(first_memory, visible):
        i = tl.cast(memory, tl.int64)
        b_gate = tl.load(gates + (group * memories + i) * count * width + local * width + o_t, mask=m_t, other=0.0)
        p_state = states + ((row * memories + i) * heads + head) * DK * DV
        b_answer = tl.zeros((BT, BV), tl.float32)
        for number in tl.static_range(NK):
            o_k = number * BK + tl.arange(0, BK)
            mask = (o_k < DK)[:, None] & m_v[None, :]
            b_state = tl.load(p_state + o_k[:, None] * DV + o_v[None, :], mask=mask, other=0.0)  # [BK, BV]
            b_answer = dot(b_q[number], b_state, b_answer, PRECISION)
        b_out += b_gate[:, None] * b_answer
    p_out = out + token[:, None] * DV + o_v[None, :]
    tl.store(p_out, narrow(b_out, out.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])


@triton.jit
def _read_backward_kernel(
    grad_out, q, states, gates, first, grad_q, grad_gates, shared,
    begin, count, num, width, heads, memories,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Also leaves the sum of gate x its gradient of every token in `shared`. Programs: (row, head) x (query segment,
    last first; tile of BT tokens)."""
    tiles = tl.cdiv(width, BT)
    group = tl.cast(tl.program_id(0) // (count * tiles), tl.int64)
    place = tl.program_id(0) % (count * tiles)
    tile, local = place % tiles, count - 1 - place // tiles
    segment, row, head = begin + local, group // heads, group % heads
    o_t = tile * BT + tl.arange(0, BT)
    m_t = o_t < width
    token = ((row * num + segment) * width + o_t) * heads + head
    b_q = load_blocks(q + token * DK, m_t, DK, BK, NK)
    b_go = load_blocks(grad_out + token * DV, m_t, DV, BV, NV)
    b_grad = ()
    for _ in tl.static_range(NK):
        b_grad = b_grad + (tl.zeros((BT, BK), tl.float32),)
    b_shared = tl.zeros((BT,), tl.float32)
    first_memory, visible = tl.load(first + row * num + segment), memories - num + segment
    p_token = group * memories * count * width + local * width + o_t
    for memory in range(0, first_memory):  # the gradient of hidden memories' gates is read, too
        o_gate = p_token + tl.cast(memory, tl.int64) * count * width
        tl.store(grad_gates + o_gate, tl.zeros((BT,), tl.float32), mask=m_t)
    for memory in range(first_memory, visible):
        i = tl.cast(memory, tl.int64)
        o_gate = p_token + i * count * width
        b_gate = tl.load(gates + o_gate, mask=m_t, other=0.0)
        b_grad_gate = tl.zeros((BT,), tl.float32)
        p_state = states + ((row * memories + i) * heads + head) * DK * DV
        b_next = ()
        for number in tl.static_range(NK):
            o_k = number * BK + tl.arange(0, BK)
            b_back = tl.zeros((BT, BK), tl.float32)
            for part in tl.static_range(NV):
                o_v = part * BV + tl.arange(0, BV)
                mask = (o_v < DV)[:, None] & (o_k < DK)[None, :]
                b_state = tl.load(p_state + o_k[None, :] * DV + o_v[:, None], mask=mask, other=0.0)  # [BV, BK]
                b_back = dot(b_go[part], b_state, b_back, PRECISION)
            b_grad_gate += tl.sum(b_q[number].to(tl.float32) * b_back, 1)
            b_next = b_next + (b_grad[number] + b_gate[:, None] * b_back,)
        b_grad = b_next
        b_shared += b_gate * b_grad_gate
        tl.store(grad_gates + o_gate, b_grad_gate, mask=m_t)
    tl.store(shared + token, b_shared, mask=m_t)
    for number in tl.static_range(NK):
        o_k = number * BK + tl.arange(0, BK)
        p_grad = grad_q + token[:, None] * DK + o_k[None, :]
        tl.store(p_grad, narrow(b_grad[number], grad_q.dtype.element_ty), mask=m_t[:, None] & (o_k < DK)[None, :])


@triton.jit
def _states_backward_kernel(
    grad_out, q, gates, grad_states,
    begin, count, num, width, heads, memories,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one block of query segments gives. Programs: (row, head) x (memory, block of DK, block of DV)."""
    k_blocks, v_blocks = (DK + BK - 1) // BK, (DV + BV - 1) // BV
    blocks = k_blocks * v_blocks
    group = tl.cast(tl.program_id(0) // (memories * blocks), tl.int64)
    place = tl.program_id(0) % (memories * blocks)
    memory, block = place // blocks, place % blocks
    row, head = group // heads, group % heads
    o_k = block // v_blocks * BK + tl.arange(0, BK)
    o_v = block % v_blocks * BV + tl.arange(0, BV)
    m_k, m_v = o_k < DK, o_v < DV
    i = tl.cast(memory, tl.int64)
    o_state = ((row * memories + i) * heads + head) * DK * DV + o_k[:, None] * DV + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    b_sum = tl.load(grad_states + o_state, mask=m_state, other=0.0)
    p_gates = gates + (group * memories + i) * count * width
    earliest = memory - (memories - num) + 1  # the first query segment that may read this memory
    for start in range(tl.maximum(earliest - begin, 0) * width, count * width, BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < count * width
        token = ((row * num + begin) * width + o_t) * heads + head
        b_gate = tl.load(p_gates + o_t, mask=m_t, other=0.0)
        b_q = tl.load(q + token[:, None] * DK + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_go = tl.load(grad_out + token[:, None] * DV + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=0.0)
        b_go = narrow(b_gate[:, None] * b_go.to(tl.float32), grad_out.dtype.element_ty)
        b_sum = dot(tl.trans(b_q), b_go, b_sum, PRECISION)
    tl.store(grad_states + o_state, b_sum, mask=m_state)


class _Read:
    """Launches of the kernels above for one call. Tensors are contiguous and of the operand dtype."""

    def __init__(self, q, states, gates: Gates) -> None:
        self.gates = gates
        dtype = operand_dtype(q, states) if q.dtype == torch.float32 else q.dtype
        self.q, self.states = q.to(dtype).contiguous(), states.to(dtype).contiguous()
        self.key_dim, self.value_dim = states.shape[-2:]
        self.sizes = gates.sizes
        self.meta = {"DK": self.key_dim, "DV": self.value_dim, "PRECISION": dot_precision(self.q)}
        self.tile = min(power_of_two(gates.width), 32 if dtype == torch.float32 else 128)

    def _grid(self, count: int, tile: int, blocks: int = 1) -> tuple[int]:
        return (self.gates.groups * count * triton.cdiv(self.gates.width, tile) * blocks,)

    def _blocks(self, begin: int, count: int) -> dict:
        return {"begin": begin, "count": count} | self.sizes

    def read(self, out: torch.Tensor, gates: torch.Tensor, begin: int, count: int) -> None:
        key_block = split_width(self.key_dim)
        block = min(power_of_two(self.value_dim), 128)
        meta = self.meta | {"BK": key_block, "NK": triton.cdiv(self.key_dim, key_block), "BV": block, "BT": self.tile}
        args = {"q": self.q, "states": self.states, "gates": gates, "first": self.gates.first, "out": out}
        grid = self._grid(count, self.tile, triton.cdiv(self.value_dim, block))
        launch(_read_kernel, grid, args | self._blocks(begin, count), meta, CONFIGS)

    def backward(self, grads, grad_out, gates, begin: int, count: int) -> torch.Tensor:
        """Writes to grad_q, adds to grad_states; the gradient of the gates."""
        grad_q, grad_states = grads
        grad_gates = torch.empty_like(gates)
        key_block, value_block = split_width(self.key_dim), split_width(self.value_dim)
        tile = min(self.tile, 64)
        meta = self.meta | {
            "BK": key_block, "NK": triton.cdiv(self.key_dim, key_block),
            "BV": value_block, "NV": triton.cdiv(self.value_dim, value_block), "BT": tile,
        }  # fmt: skip
        args = {
            "grad_out": grad_out, "q": self.q, "states": self.states, "gates": gates, "first": self.gates.first,
            "grad_q": grad_q, "grad_gates": grad_gates, "shared": self.gates.shared,
        }  # fmt: skip
        launch(_read_backward_kernel, self._grid(count, tile), args | self._blocks(begin, count), meta, CONFIGS)
        meta = self.meta | {
            "BK": min(power_of_two(self.key_dim), 128), "BV": min(power_of_two(self.value_dim), 128), "BT": tile
        }  # fmt: skip
        blocks = triton.cdiv(self.key_dim, meta["BK"]) * triton.cdiv(self.value_dim, meta["BV"])
        args = {"grad_out": grad_out, "q": self.q, "gates": gates, "grad_states": grad_states}
        grid = (self.gates.groups * self.gates.memories * blocks,)
        launch(_states_backward_kernel, grid, args | self._blocks(begin, count), meta, CONFIGS, ("grad_states",))
        return grad_gates


CONFIGS = [{"num_warps": 8, "num_stages": 3}]


def forward(q, u, states, summaries, online_logit, birth, first, function):
    """See `segment_read`."""
    gates = Gates(u, summaries, online_logit, birth, first, function)
    read = _Read(q, states, gates)
    out = torch.empty(*q.shape[:-1], states.shape[-1], dtype=q.dtype, device=q.device)
    for begin, count in gates.blocks():
        read.read(out, gates.block(begin, count), begin, count)
    return out, gates.online_gate


def backward(
    grad_out, grad_online, saved_out, saved_online, q, u, states, summaries, online_logit, birth, first, function
):
    """See `segment_read_backward_torch`."""
    gates = Gates(u, summaries, online_logit, birth, first, function)
    read = _Read(q, states, gates)
    grad_out = grad_out.to(read.q.dtype).contiguous()
    gates.begin_backward(grad_online)
    grad_q, grad_states = torch.empty_like(q), torch.zeros(states.shape, dtype=torch.float32, device=q.device)
    for begin, count in gates.blocks():
        weights = gates.block(begin, count)
        grad_gates = read.backward((grad_q, grad_states), grad_out, weights, begin, count)
        gates.block_backward(begin, count, weights, grad_gates)
    return (
        grad_q,
        gates.grad_u.to(u.dtype),
        grad_states.to(states.dtype),
        gates.grad_summaries.to(summaries.dtype),
        gates.grad_logit,
    )
