"""gates.py on Triton: gates of past memories from u and segment summaries, and their gradients.

A gate is `weigh(logit) / sum`, where `finish` has the sum. These two and `slope` are all that knows gate functions, as
FUNCTION, their names in `GATE_FUNCTIONS`; an entry there says whether they do.

The gates of a block of query segments are written out, segment by segment: `[G, S, T]` in fp32 for T tokens and
G = rows x heads. Deep reads and the backward of `segment_read` take them as given, as plain products that know
nothing of gates; the forward of `segment_read` does without. `query_blocks` bounds their size; nothing is kept.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from ..shared.triton import LENGTHS, chip, dot, dot_precision, launch, narrow, operand_dtype, power_of_two, split_dot
from .gates import missing_in_triton


ELEMENTS = 2**27  # gates that are held at once, unless fewer tokens than PROGRAMS tiles would be left
PROGRAMS = 512


def query_blocks(num: int, width: int, groups: int, memories: int) -> Iterator[tuple[int, int]]:
    """(first, number of) query segments to do at once."""
    tokens = max(ELEMENTS // (groups * memories), PROGRAMS * 128 // groups)
    step = min(num, max(1, tokens // width))
    for first in range(0, num, step):
        yield first, min(step, num - first)


def triton_name(function: str) -> str:
    """FUNCTION of the kernels.

    Raises:
        ValueError: they do not know the function.
    """
    if missing := missing_in_triton(function):
        raise ValueError(f"`function`={function!r}: {missing}")
    return function


def gate_config(u: torch.Tensor, summaries: torch.Tensor) -> tuple[dict, int, int]:
    """Tile of tokens, warps and stages of the kernels that compute logits, without spilled registers."""
    on, dim = chip(u), power_of_two(u.shape[-1])
    tile, warps = 64, 8 if dim > 128 and on != "amd" else 4
    if on == "ampere" and dim * summaries.shape[3] > 128:
        tile = 16 if dim > 128 else 32
    return {"BT": min(tile, power_of_two(u.shape[2]))}, warps, 1 if on == "amd" else 2


@triton.jit
def weigh(b_logit, b_max, FUNCTION: tl.constexpr):
    """Gates before their division by a sum; b_max, the largest logit, keeps the softmax's finite."""
    if FUNCTION == "softmax":
        return tl.exp(b_logit - b_max)
    elif FUNCTION == "sigmoid":
        return tl.sigmoid(b_logit)
    else:
        tl.static_assert(FUNCTION == "relu")
        return tl.maximum(b_logit, 0.0)


@triton.jit
def finish(b_own, b_sum, FUNCTION: tl.constexpr):
    """Of the online memory's weight and the sum of all weights: what the weight is, and what all are divided by."""
    if FUNCTION == "sigmoid":
        b_sum = tl.full(b_sum.shape, 1.0, tl.float32)
    elif FUNCTION == "relu":
        m_none = b_sum == 0
        b_own, b_sum = tl.where(m_none, 1.0, b_own), tl.where(m_none, 1.0, b_sum)
    return b_own, b_sum


@triton.jit
def slope(b_gate, b_sum, FUNCTION: tl.constexpr):
    """The derivative of a gate by its logit, where the sum stays as it is."""
    if FUNCTION == "softmax":
        return b_gate
    elif FUNCTION == "sigmoid":
        return b_gate * (1 - b_gate)
    else:
        tl.static_assert(FUNCTION == "relu")
        return tl.where(b_gate > 0, 1 / b_sum, 0.0)


@triton.jit
def block_logits(
    b_u,
    p_summaries,
    o_memory,
    m_memory,
    stride,
    DU: tl.constexpr,
    BU: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits [BT, BN] of u [BT, BU] with the memories o_memory [BN] of one row and head, and which of the BLOCKS means
    of each memory set it. `stride`: elements from one memory to the next."""
    o_u = tl.arange(0, BU)
    p_mean = p_summaries + tl.cast(o_memory, tl.int64)[None, :] * stride + o_u[:, None]  # [BU, BN]
    m_mean = m_memory[None, :] & (o_u < DU)[:, None]
    b_best = split_dot(b_u, tl.load(p_mean, mask=m_mean, other=0.0).to(tl.float32), None, PRECISION)
    b_choice = tl.zeros_like(b_best).to(tl.int32)
    for number in tl.static_range(1, BLOCKS):
        b_mean = tl.load(p_mean + number * DU, mask=m_mean, other=0.0).to(tl.float32)
        b_logit = split_dot(b_u, b_mean, None, PRECISION)
        b_choice = tl.where(b_logit > b_best, number, b_choice)
        b_best = tl.maximum(b_best, b_logit)
    return b_best, b_choice


@triton.jit
def hide(b_logit, o_memory, visible, segment, p_birth, first):
    """Logits [BT, BN] with -inf where a query segment may not read a memory."""
    b_birth = tl.load(p_birth + o_memory, mask=o_memory < visible, other=2147483647)
    m_seen = (o_memory < visible) & (b_birth <= segment) & (o_memory >= first)
    return tl.where(m_seen[None, :], b_logit, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _gates_kernel(
    u,
    summaries,
    online_logit,
    birth,
    first,
    gates,
    online_gate,
    total,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    DU: tl.constexpr,
    BU: tl.constexpr,
    BLOCKS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (row, head) x (query segment of the block, tile of BT tokens)."""
    tiles = tl.cdiv(width, BT)
    group = tl.cast(tl.program_id(0) // (count * tiles), tl.int64)
    place = tl.program_id(0) % (count * tiles)
    local, tile = place // tiles, place % tiles
    segment, row, head = begin + local, group // heads, group % heads
    o_t = tile * BT + tl.arange(0, BT)
    o_u = tl.arange(0, BU)
    m_t = o_t < width
    token = ((row * num + segment) * width + o_t) * heads + head
    b_u = tl.load(u + token[:, None] * DU + o_u[None, :], mask=m_t[:, None] & (o_u < DU)[None, :], other=0.0)
    b_online = tl.load(online_logit + token, mask=m_t, other=0.0).to(tl.float32)
    p_summaries = summaries + (row * memories * heads + head) * BLOCKS * DU
    stride = heads * BLOCKS * DU
    p_birth = birth + row * memories
    first_memory = tl.load(first + row * num + segment)
    visible = memories - num + segment

    b_max, b_sum = b_online, weigh(b_online, b_online, FUNCTION)
    if FUNCTION != "sigmoid":
        for start in range(0, visible, BN):
            o_memory = start + tl.arange(0, BN)
            b_logit, _ = block_logits(
                b_u, p_summaries, o_memory, o_memory < visible, stride, DU, BU, BLOCKS, PRECISION
            )
            b_logit = hide(b_logit, o_memory, visible, segment, p_birth, first_memory)
            if FUNCTION == "softmax":
                b_new = tl.maximum(b_max, tl.max(b_logit, 1))
                b_sum *= tl.exp(b_max - b_new)
                b_max = b_new
            b_sum += tl.sum(weigh(b_logit, b_max[:, None], FUNCTION), 1)
    b_own, b_sum = finish(weigh(b_online, b_max, FUNCTION), b_sum, FUNCTION)
    tl.store(online_gate + token, b_own / b_sum, mask=m_t)
    if FUNCTION == "relu":  # the pull-back needs it
        tl.store(total + token, b_sum, mask=m_t)

    p_gates = gates + group * memories * count * width + local * width + o_t
    for start in range(0, visible, BN):
        o_memory = start + tl.arange(0, BN)
        b_logit, _ = block_logits(b_u, p_summaries, o_memory, o_memory < visible, stride, DU, BU, BLOCKS, PRECISION)
        b_logit = hide(b_logit, o_memory, visible, segment, p_birth, first_memory)
        b_gate = weigh(b_logit, b_max[:, None], FUNCTION) / b_sum[:, None]
        o_gate = tl.cast(o_memory, tl.int64)[None, :] * count * width
        tl.store(p_gates[:, None] + o_gate, b_gate, mask=m_t[:, None] & (o_memory < visible)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _gates_backward_kernel(
    gates,
    grad_gates,
    shared,
    u,
    summaries,
    online_gate,
    total,
    grad_online,
    grad_u,
    grad_logit,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    part_stride,
    token_stride,
    DU: tl.constexpr,
    BU: tl.constexpr,
    BLOCKS: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of u and the online logit. The gradient of the gates, in PARTS that add up, is replaced by that of the
    logits (in the first part). Programs as above."""
    tiles = tl.cdiv(width, BT)
    group = tl.cast(tl.program_id(0) // (count * tiles), tl.int64)
    place = tl.program_id(0) % (count * tiles)
    local, tile = place // tiles, place % tiles
    segment, row, head = begin + local, group // heads, group % heads
    o_t = tile * BT + tl.arange(0, BT)
    o_u = tl.arange(0, BU)
    m_t = o_t < width
    token = ((row * num + segment) * width + o_t) * heads + head
    o_tu, m_tu = token[:, None] * DU + o_u[None, :], m_t[:, None] & (o_u < DU)[None, :]
    p_summaries = summaries + (row * memories * heads + head) * BLOCKS * DU
    stride = heads * BLOCKS * DU

    b_own = tl.load(online_gate + token, mask=m_t, other=0.0)
    b_grad_own = tl.load(grad_online + token, mask=m_t, other=0.0)
    b_shared, b_sum = tl.zeros((BT,), tl.float32), None
    if FUNCTION == "relu":
        b_sum = tl.load(total + token, mask=m_t, other=1.0)
    if FUNCTION != "sigmoid":  # what all gates of a token share through their sum
        b_shared += b_own * b_grad_own
        for part in tl.static_range(PARTS):
            b_shared += tl.load(shared + tl.cast(part, tl.int64) * token_stride + token, mask=m_t, other=0.0)
    b_grad_logit = slope(b_own, b_sum, FUNCTION) * (b_grad_own - b_shared)
    tl.store(grad_logit + token, b_grad_logit.to(grad_logit.dtype.element_ty), mask=m_t)

    if BLOCKS > 1:
        b_u = tl.load(u + o_tu, mask=m_tu, other=0.0)
    b_grad_u = tl.zeros((BT, BU), tl.float32)
    p_token = group * memories * count * width + local * width + o_t
    for start in range(0, memories - num + segment, BN):
        o_memory = start + tl.arange(0, BN)
        m_memory = o_memory < memories - num + segment
        o_gate = p_token[:, None] + tl.cast(o_memory, tl.int64)[None, :] * count * width
        m_gate = m_t[:, None] & m_memory[None, :]
        b_gate = tl.load(gates + o_gate, mask=m_gate, other=0.0)
        b_grad = tl.load(grad_gates + o_gate, mask=m_gate, other=0.0)
        for part in tl.static_range(1, PARTS):
            b_grad += tl.load(grad_gates + tl.cast(part, tl.int64) * part_stride + o_gate, mask=m_gate, other=0.0)
        b_grad = slope(b_gate, None if b_sum is None else b_sum[:, None], FUNCTION) * (b_grad - b_shared[:, None])
        tl.store(grad_gates + o_gate, b_grad, mask=m_gate)
        if BLOCKS > 1:
            _, b_choice = block_logits(b_u, p_summaries, o_memory, m_memory, stride, DU, BU, BLOCKS, PRECISION)
        for number in tl.static_range(BLOCKS):
            o_mean = tl.cast(o_memory, tl.int64)[:, None] * stride + number * DU + o_u[None, :]
            b_mean = tl.load(p_summaries + o_mean, mask=m_memory[:, None] & (o_u < DU)[None, :], other=0.0)
            b_part = b_grad if BLOCKS == 1 else tl.where(b_choice == number, b_grad, 0.0)
            operand = u.dtype.element_ty
            b_grad_u = dot(narrow(b_part, operand), narrow(b_mean.to(tl.float32), operand), b_grad_u, PRECISION)
    tl.store(grad_u + o_tu, narrow(b_grad_u, grad_u.dtype.element_ty), mask=m_tu)


@triton.jit(do_not_specialize=LENGTHS)
def _summaries_backward_kernel(
    grad_logits,
    u,
    summaries,
    grad_summaries,
    begin,
    count,
    num,
    width,
    heads,
    memories,
    DU: tl.constexpr,
    BU: tl.constexpr,
    BLOCKS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one block of query segments gives to the gradient of the summaries. Programs: (row, head) x blocks of
    BN memories x means."""
    blocks = tl.cdiv(memories, BN)
    group = tl.cast(tl.program_id(0) // blocks, tl.int64)
    row, head = group // heads, group % heads
    o_memory = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    m_memory = o_memory < memories
    o_u = tl.arange(0, BU)
    p_summaries = summaries + (row * memories * heads + head) * BLOCKS * DU
    stride = heads * BLOCKS * DU
    # memory i is read from segment i - cached + 1 on, if at all
    earliest = tl.program_id(0) % blocks * BN - (memories - num) + 1
    skip = tl.maximum(earliest - begin, 0) * width // BT * BT
    b_sum = tl.zeros((BN, BU), tl.float32)
    for start in range(skip, count * width, BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < count * width
        token = ((row * num + begin) * width + o_t) * heads + head
        b_u = tl.load(u + token[:, None] * DU + o_u[None, :], mask=m_t[:, None] & (o_u < DU)[None, :], other=0.0)
        m_read = m_t[None, :] & (o_memory[:, None] < (memories - num + begin) + (o_t // width)[None, :])
        o_grad = (group * memories + o_memory)[:, None] * count * width + o_t[None, :]
        b_grad = tl.load(grad_logits + o_grad, mask=m_read, other=0.0)  # [BN, BT]
        if BLOCKS > 1:
            _, b_choice = block_logits(b_u, p_summaries, o_memory, m_memory, stride, DU, BU, BLOCKS, PRECISION)
            b_grad = tl.where(tl.trans(b_choice) == tl.program_id(1), b_grad, 0.0)
        b_sum = dot(narrow(b_grad, u.dtype.element_ty), b_u, b_sum, PRECISION)
    o_sum = tl.cast(o_memory, tl.int64)[:, None] * stride + tl.program_id(1) * DU + o_u[None, :]
    m_sum = m_memory[:, None] & (o_u < DU)[None, :]
    p_sum = grad_summaries + (row * memories * heads + head) * BLOCKS * DU + o_sum
    tl.store(p_sum, tl.load(p_sum, mask=m_sum, other=0.0) + b_sum, mask=m_sum)


class GateKernels:
    """Launches of the kernels above for one call of a read op. Args: as in `segment_read`.

    `block` gives the gates `[G, S, T]` of some query segments, of which entries that no token of a segment may read
    (memory >= cached + segment) are left unwritten.
    """

    def __init__(self, u, summaries, online_logit, birth, first, function: str) -> None:
        self.u = u.to(operand_dtype(u)).contiguous()
        self.summaries, self.online_logit = summaries.contiguous(), online_logit.contiguous()
        self.birth, self.first = birth.contiguous(), first.contiguous()
        self.rows, self.num, self.width, self.heads, self.summary_dim = u.shape
        self.memories, self.groups = summaries.shape[1], u.shape[0] * u.shape[3]
        self.online_gate = torch.empty(online_logit.shape, dtype=torch.float32, device=u.device)
        self.total = torch.empty_like(self.online_gate) if function == "relu" else None
        self.sizes = {"num": self.num, "width": self.width, "heads": self.heads, "memories": self.memories}
        self.meta = {
            "DU": self.summary_dim,
            "BU": power_of_two(self.summary_dim),
            "BLOCKS": summaries.shape[3],
            "FUNCTION": triton_name(function),
            "PRECISION": dot_precision(self.u),
            "BN": min(32, power_of_two(self.memories)),
        }
        self.configs = [gate_config(u, summaries)]

    def blocks(self) -> Iterator[tuple[int, int]]:
        return query_blocks(self.num, self.width, self.groups, self.memories)

    def tiles(self, count: int, blocks: int = 1) -> Callable[[dict], tuple[int]]:
        """Programs for tiles of BT tokens of `count` query segments, times `blocks`."""
        return lambda meta: (self.groups * count * triton.cdiv(self.width, meta["BT"]) * blocks,)

    def block(self, begin: int, count: int) -> torch.Tensor:
        gates = self.u.new_empty(self.groups, self.memories, count * self.width, dtype=torch.float32)
        args = {
            "u": self.u,
            "summaries": self.summaries,
            "online_logit": self.online_logit,
            "birth": self.birth,
            "first": self.first,
            "gates": gates,
            "online_gate": self.online_gate,
            "total": self.total,
            "begin": begin,
            "count": count,
        }
        launch(_gates_kernel, self.tiles(count), args | self.sizes, self.meta, self.configs)
        return gates

    def begin_backward(self, grad_online: torch.Tensor) -> None:
        self.grad_online = grad_online.contiguous()
        self.grad_u, self.grad_logit = torch.empty_like(self.u), torch.empty_like(self.online_logit)
        self.grad_summaries = torch.zeros(self.summaries.shape, dtype=torch.float32, device=self.u.device)

    def block_backward(
        self, begin: int, count: int, gates: torch.Tensor, grad_gates: torch.Tensor, shared: torch.Tensor
    ) -> None:
        """Takes the gradient of the gates `[parts, G, S, T]`, which it overwrites, and per token the sum of gate x its
        gradient `[parts, R, N, W, H]`."""
        args = {
            "gates": gates,
            "grad_gates": grad_gates,
            "shared": shared,
            "u": self.u,
            "summaries": self.summaries,
            "online_gate": self.online_gate,
            "total": self.total,
            "grad_online": self.grad_online,
            "grad_u": self.grad_u,
            "grad_logit": self.grad_logit,
            "begin": begin,
            "count": count,
            "part_stride": gates.numel(),
            "token_stride": self.online_gate.numel(),
        }
        meta = self.meta | {"PARTS": len(grad_gates)}
        launch(_gates_backward_kernel, self.tiles(count), args | self.sizes, meta, self.configs)
        args = {
            "grad_logits": grad_gates,
            "u": self.u,
            "summaries": self.summaries,
            "grad_summaries": self.grad_summaries,
            "begin": begin,
            "count": count,
        }
        meta = {key: value for key, value in self.meta.items() if key != "FUNCTION"}
        grid = (self.groups * triton.cdiv(self.memories, meta["BN"]), meta["BLOCKS"])
        launch(_summaries_backward_kernel, lambda _: grid, args | self.sizes, meta, self.configs)
