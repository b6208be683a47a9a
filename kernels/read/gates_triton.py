"""gates.py on Triton: gates of past memories from u and segment summaries, and their gradients.

A gate is `weigh(logit) / sum`, where `finish` has the sum. These two and `slope` are all that knows gate functions, as
FUNCTION, their names in `GATE_FUNCTIONS`; an entry there says whether they do.

The gates of a block of query segments are written out, segment by segment: `[G, S, T]` in fp32 for T tokens and
G = rows x heads. Deep reads and the backward of `segment_read` take them as given, as plain products that know
nothing of gates; the forward of `segment_read` does without. `query_blocks` bounds their size; nothing is kept.
"""

from collections.abc import Iterator

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
)
from .gates import kept_memories, last_readers, missing_in_triton


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


def gate_config(u: torch.Tensor, summaries: torch.Tensor) -> tuple[int, int, int]:
    """Tile of tokens, warps and stages of the kernels that compute logits, without spilled registers."""
    on, dim = chip(u), power_of_two(u.shape[-1])
    tile, warps, stages = 64, 8 if dim > 128 and on in ("hopper", *OLDER) else 4, 2
    if on == "amd" or (on == "small" and dim > 128):
        stages = 1
    if on == "small" and dim == 128:
        warps = 8
    if on in OLDER and dim * summaries.shape[3] > 128:
        tile = 16 if dim > 128 else 32
    return tile, warps, stages


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
def gate_of(b_logit, b_norm, FUNCTION: tl.constexpr):
    """Gates from logits and what `_gates_kernel` leaves in `norm`."""
    if FUNCTION == "softmax":
        return tl.exp(b_logit - b_norm)
    elif FUNCTION == "relu":
        return tl.maximum(b_logit, 0.0) / b_norm
    else:
        return tl.sigmoid(b_logit)


@triton.jit
def readable(first, kept, row, segment, num, memories):
    """The places from `start` to `end` are the memories that a query segment may read at most: those below `border`
    themselves, the others with `gap` more. Kept memories behind the last that anyone may read have no place."""
    first_memory = tl.load(first + row * num + segment).to(tl.int32)
    border, cached = tl.load(kept + row).to(tl.int32), memories - num
    start = tl.minimum(first_memory, border) + tl.maximum(first_memory - cached, 0)
    return start, border + segment, border, cached - border


@triton.jit
def memory_at(place, border, gap):
    return place + tl.where(place < border, 0, gap)


@triton.jit
def hide(b_logit, o_memory, m_memory, segment, p_birth):
    """Logits [BT, BN] with -inf where a query segment may not read a memory."""
    b_birth = tl.load(p_birth + o_memory, mask=m_memory, other=2147483647)
    return tl.where((m_memory & (b_birth <= segment))[None, :], b_logit, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _gates_kernel(
    u,
    summaries,
    online_logit,
    birth,
    first,
    kept,
    gates,
    online_gate,
    norm,
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
    WRITE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online gates and, in `norm`, what every gate of a token shares: the logarithm of the softmax's sum, or the
    sum of the positive parts. WRITE: and the gates. Programs: (row, head) x (query segment of the block, tile of BT
    tokens)."""
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
    start, end, border, gap = readable(first, kept, row, segment, num, memories)

    b_max, b_sum = b_online, weigh(b_online, b_online, FUNCTION)
    if FUNCTION != "sigmoid":
        for place in range(start, end, BN):
            m_memory = place + tl.arange(0, BN) < end
            o_memory = memory_at(place + tl.arange(0, BN), border, gap)
            b_logit, _ = block_logits(b_u, p_summaries, o_memory, m_memory, stride, DU, BU, BLOCKS, PRECISION)
            b_logit = hide(b_logit, o_memory, m_memory, segment, p_birth)
            if FUNCTION == "softmax":
                b_new = tl.maximum(b_max, tl.max(b_logit, 1))
                b_sum *= tl.exp(b_max - b_new)
                b_max = b_new
            b_sum += tl.sum(weigh(b_logit, b_max[:, None], FUNCTION), 1)
    b_own, b_sum = finish(weigh(b_online, b_max, FUNCTION), b_sum, FUNCTION)
    tl.store(online_gate + token, b_own / b_sum, mask=m_t)
    b_norm = b_max + tl.log(b_sum) if FUNCTION == "softmax" else b_sum
    tl.store(norm + token, b_norm, mask=m_t)

    if WRITE:
        p_gates = gates + group * memories * count * width + local * width + o_t
        for place in range(start, end, BN):
            m_memory = place + tl.arange(0, BN) < end
            o_memory = memory_at(place + tl.arange(0, BN), border, gap)
            b_logit, _ = block_logits(b_u, p_summaries, o_memory, m_memory, stride, DU, BU, BLOCKS, PRECISION)
            b_gate = gate_of(hide(b_logit, o_memory, m_memory, segment, p_birth), b_norm[:, None], FUNCTION)
            o_gate = tl.cast(o_memory, tl.int64)[None, :] * count * width
            tl.store(p_gates[:, None] + o_gate, b_gate, mask=m_t[:, None] & m_memory[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _gates_backward_kernel(
    gates,
    grad_gates,
    shared,
    u,
    summaries,
    online_gate,
    norm,
    first,
    kept,
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
        b_sum = tl.load(norm + token, mask=m_t, other=1.0)
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
    start, end, border, gap = readable(first, kept, row, segment, num, memories)
    for place in range(start, end, BN):
        m_memory = place + tl.arange(0, BN) < end
        o_memory = memory_at(place + tl.arange(0, BN), border, gap)
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
    index,
    u,
    summaries,
    stop,
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
    TOP_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one block of query segments gives to the gradient of the summaries, from that of the logits of all
    memories `[G, S, T]`, or (TOP_K) of those in `index` `[R, N, W, H, k]`. Programs: (row, head) x blocks of BN
    memories x means."""
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
    b_stop = (tl.load(stop + row * memories + o_memory, mask=m_memory, other=0).to(tl.int32) - begin) * width
    b_sum = tl.zeros((BN, BU), tl.float32)
    for start in range(skip, tl.minimum(count * width, tl.max(b_stop, 0)), BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < count * width
        token = ((row * num + begin) * width + o_t) * heads + head
        b_u = tl.load(u + token[:, None] * DU + o_u[None, :], mask=m_t[:, None] & (o_u < DU)[None, :], other=0.0)
        if TOP_K > 0:
            b_grad = tl.zeros((BN, BT), tl.float32)
            for number in tl.static_range(TOP_K):
                b_index = tl.load(index + token * TOP_K + number, mask=m_t, other=-1)
                b_part = tl.load(grad_logits + token * TOP_K + number, mask=b_index >= 0, other=0.0)
                b_grad += tl.where(o_memory[:, None] == b_index[None, :], b_part[None, :], 0.0)
        else:
            m_read = o_memory[:, None] < (memories - num + begin) + (o_t // width)[None, :]
            m_read = m_read & m_t[None, :] & (o_t[None, :] < b_stop[:, None])
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
        self.kept, self.stop = kept_memories(self.birth, u.shape[1]), last_readers(self.birth, self.first)
        self.online_gate, self.norm = (
            torch.empty(online_logit.shape, dtype=torch.float32, device=u.device) for _ in range(2)
        )
        self.sizes = {"num": self.num, "width": self.width, "heads": self.heads, "memories": self.memories}
        self.meta = {
            "DU": self.summary_dim,
            "BU": power_of_two(self.summary_dim),
            "BLOCKS": summaries.shape[3],
            "FUNCTION": triton_name(function),
            "PRECISION": dot_precision(self.u),
            "BN": 32,
        }
        self.meta["BT"], *self.options = gate_config(u, summaries)

    def blocks(self) -> Iterator[tuple[int, int]]:
        return query_blocks(self.num, self.width, self.groups, self.memories)

    def tiles(self, count: int, tile: int, blocks: int = 1) -> tuple[int]:
        """Programs for tiles of tokens of `count` query segments, times `blocks`."""
        return (self.groups * count * triton.cdiv(self.width, tile) * blocks,)

    def shared(self) -> None:
        """Fills `norm` and `online_gate` alone."""
        self._run(None, 0, self.num)

    def block(self, begin: int, count: int) -> torch.Tensor:
        gates = self.u.new_empty(self.groups, self.memories, count * self.width, dtype=torch.float32)
        self._run(gates, begin, count)
        return gates

    def _run(self, gates: torch.Tensor | None, begin: int, count: int) -> None:
        args = {
            "u": self.u,
            "summaries": self.summaries,
            "online_logit": self.online_logit,
            "birth": self.birth,
            "first": self.first,
            "kept": self.kept,
            "gates": gates,
            "online_gate": self.online_gate,
            "norm": self.norm,
            "begin": begin,
            "count": count,
        }
        meta = self.meta | {"WRITE": gates is not None}
        launch(_gates_kernel, self.tiles(count, meta["BT"]), args | self.sizes, meta, *self.options)

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
            "norm": self.norm,
            "first": self.first,
            "kept": self.kept,
            "grad_online": self.grad_online,
            "grad_u": self.grad_u,
            "grad_logit": self.grad_logit,
            "begin": begin,
            "count": count,
            "part_stride": gates.numel(),
            "token_stride": self.online_gate.numel(),
        }
        meta = self.meta | {"PARTS": len(grad_gates)}
        launch(_gates_backward_kernel, self.tiles(count, meta["BT"]), args | self.sizes, meta, *self.options)
        meta = {key: value for key, value in self.meta.items() if key != "FUNCTION"}
        args = {"begin": begin, "count": count} | self.sizes
        summaries_backward(
            grad_gates, None, self.u, self.summaries, self.stop, self.grad_summaries, args, meta, *self.options
        )


def summaries_backward(grad_logits, index, u, summaries, stop, grad_summaries, args, meta, warps, stages) -> None:
    """Adds to the gradient of the summaries, see `_summaries_backward_kernel`."""
    args = args | {
        "grad_logits": grad_logits,
        "index": index,
        "u": u,
        "summaries": summaries,
        "stop": stop,
        "grad_summaries": grad_summaries,
    }
    meta = meta | {"TOP_K": 0 if index is None else index.shape[-1]}
    grid = (u.shape[0] * u.shape[3] * triton.cdiv(summaries.shape[1], meta["BN"]), meta["BLOCKS"])
    launch(_summaries_backward_kernel, grid, args, meta, warps, stages)
