"""`deep_write` on Triton: one program per row and head walks through the inner chunks; the algebra is in `deep_write`.

The stacks T of both maps are fp32 scratch in global memory, `[row and head, slot, J, ...]`: the forward updates one
slot in place, the backward first writes again and keeps the stack of every chunk start in a slot of its own. A chunk
is passed twice, block of hidden units by block: first for r and with it d1, then for everything else. Products take
fp32 operands. Rows of k and q are loaded again for every block: as operands every warp would hold all of them.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..shared.deep import ANSWER, NOTHING
from ..shared.deep_triton import (
    WHOLE,
    gelu,
    gelu_slope,
    hidden_tokens,
    keys_of,
    load_maps,
    load_mix,
    load_part,
    load_tokens,
    norm_parameters,
    normalize,
    store_maps,
    store_tokens,
)
from ..shared.triton import chip, dot, dot_precision, launch, narrow, power_of_two
from .deep_triton_backward import write_backward_kernel


STACKS = 2**29  # elements of the stacks that are held at once


@triton.jit(do_not_specialize=["first_row", "chunks", "group_size", "slots"])
def _write_kernel(
    q,
    k,
    v,
    mix,
    enter,
    leave,
    trans,
    stack2,
    stack1,
    scale,
    shift,
    run,
    last,
    out,
    c2_end,
    c1_end,
    first_row,
    chunks,
    heads,
    group_size,
    slots,
    step,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    J: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
    READ: tl.constexpr,
    ENTER: tl.constexpr,
    TRANS: tl.constexpr,
    SEPARATE: tl.constexpr,
    ENDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes all chunks; the stack goes from slot i to slot i + `step`. SEPARATE: the maps C of the first chunk are in
    the last slot. ENDS: leaves the C of running rows. Programs: (row, head)."""
    local = tl.cast(tl.program_id(0), tl.int64)
    row, head = first_row + local // heads, local % heads
    m_c = tl.arange(0, BC) < C
    b_scale, b_shift = norm_parameters(scale, shift, head, D, BD, NORM)
    group = row // group_size
    keep = tl.load(run + group) == row % group_size
    kept_chunk = tl.load(last + group)
    for index in range(0, chunks):
        cell = (row * chunks + index) * heads + head
        first = (row * chunks + index) * C * heads + head
        slot = local * slots + index * step
        base = slot
        if SEPARATE:
            base = tl.where(index == 0, local * slots + slots - 1, slot)
        b_k, b_v = load_tokens(k, first, heads, m_c, D, BD, BC), load_tokens(v, first, heads, m_c, D, BD, BC)
        p_c2, p_c1 = stack2 + base * J * D * H, stack1 + base * J * D * H
        _, _, _, b_d1 = keys_of(b_k, b_v, p_c2, p_c1, b_scale, b_shift, D, H, BD, BH, BC, NORM, DOT, PRECISION)
        b_mix = load_mix(mix, cell, m_c, C, BC)
        b_r, b_products = tl.zeros((BC, BD), tl.float32), tl.zeros((BC, BC), tl.float32)
        if READ == WHOLE or READ == 0:
            b_q = load_tokens(q, first, heads, m_c, D, BD, BC)
            b_scores = dot(b_q, tl.trans(b_k), None, PRECISION) * b_mix  # [BC, BC]
        for start in range(0, H, BH):
            b_t2, b_t1 = (), ()
            for part in tl.static_range(J):
                o_part = (slot * J + part) * D * H
                b_part2, b_part1 = load_maps(stack2 + o_part, stack1 + o_part, start, D, H, BD, BH)
                b_t2, b_t1 = b_t2 + (b_part2,), b_t1 + (b_part1,)
            b_c2, b_c1 = b_t2[0], b_t1[0]
            if SEPARATE:
                b_c2, b_c1 = load_maps(p_c2, p_c1, start, D, H, BD, BH)
            b_k = load_tokens(k, first, heads, m_c, D, BD, BC)
            b_z = dot(b_k, b_c2, None, PRECISION)  # [BC, BH]
            b_a = gelu(b_z)
            b_d2 = gelu_slope(b_z) * dot(b_d1, tl.trans(b_c1), None, PRECISION)
            if READ == WHOLE or READ == 0:
                b_hidden = -dot(b_scores, b_d2, None, PRECISION)
                b_q = load_tokens(q, first, heads, m_c, D, BD, BC)
                for part in tl.static_range(J):
                    b_answer = dot(b_q, b_t2[part], None, PRECISION)
                    if ENTER:
                        b_answer *= load_part(enter, cell, part, m_c, J, C, BC)[:, None]
                    b_hidden += b_answer
            if READ == 0:
                p_out, m_out = hidden_tokens(out, first, heads, start, m_c, H, BH, BC)
                tl.store(p_out, narrow(b_hidden, out.dtype.element_ty), mask=m_out)
            if READ == 1:
                p_in, m_in = hidden_tokens(q, first, heads, start, m_c, H, BH, BC)
                b_hidden = tl.load(p_in, mask=m_in, other=0.0).to(tl.float32)
            if READ == WHOLE:
                b_hidden = gelu(b_hidden)
            if READ == WHOLE or READ == 1:
                b_products = dot(b_hidden, tl.trans(b_a), b_products, PRECISION)
                for part in tl.static_range(J):
                    b_answer = dot(b_hidden, b_t1[part], None, PRECISION)
                    if ENTER:
                        b_answer *= load_part(enter, cell, part, m_c, J, C, BC)[:, None]
                    b_r += b_answer
            if ENDS:
                if keep & (index == kept_chunk):
                    o_end = (group * heads + head) * D * H
                    store_maps(c2_end + o_end, c1_end + o_end, b_c2, b_c1, start, D, H, BD, BH)
            tl.debug_barrier()  # all of the block is read before any of it is written
            for part in tl.static_range(J):
                b_leave = load_part(leave, cell, part, m_c, J, C, BC)
                b_next2 = -dot(tl.trans(b_k * b_leave[:, None]), b_d2, None, PRECISION)
                b_next1 = -dot(tl.trans(b_a * b_leave[:, None]), b_d1, None, PRECISION)
                if TRANS:
                    for other in tl.static_range(J):
                        b_factor = tl.load(trans + cell * J * J + part * J + other)
                        b_next2 += b_factor * b_t2[other]
                        b_next1 += b_factor * b_t1[other]
                else:
                    b_next2 += b_t2[part]
                    b_next1 += b_t1[part]
                o_part = ((slot + step) * J + part) * D * H
                store_maps(stack2 + o_part, stack1 + o_part, b_next2, b_next1, start, D, H, BD, BH)
        if READ == WHOLE or READ == 1:
            b_r -= dot(b_products * b_mix, b_d1, None, PRECISION)
        if READ == WHOLE:
            b_n, _ = normalize(b_r, D, BD, NORM)
            b_r = b_q + b_n * b_scale[None, :] + b_shift[None, :]
        if READ == WHOLE or READ == 1:
            store_tokens(out, b_r, first, heads, m_c, D, BD, BC)
        tl.debug_barrier()  # the next chunk reads what other threads have written


class DeepWrite:
    """The launch of the kernel above for rows of one call, and its stacks."""

    def __init__(self, inputs: dict) -> None:
        self.inputs = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        self.coefficients = {
            name: None if inputs[name] is None else self.inputs[name].float()
            for name in ("mix", "enter", "leave", "trans", "scale", "shift")
        }
        q, mix, w2 = (self.inputs[name] for name in ("q", "mix", "w2"))
        self.rows, self.chunks, self.heads, self.chunk = mix.shape[:4]
        self.parts, (self.dim, self.hidden) = inputs["leave"].shape[-1], w2.shape[2:]
        self.separate = inputs["c2"] is not None
        half = any(self.inputs[name].dtype != torch.float32 for name in "qkv")
        precision = dot_precision(q)
        self.meta = {
            "D": self.dim,
            "H": self.hidden,
            "BD": power_of_two(self.dim),
            "BH": 16,
            "C": self.chunk,
            "BC": power_of_two(self.chunk),
            "J": self.parts,
            "NORM": inputs["scale"] is not None,
            "DOT": inputs["loss"] == "dot",
            "READ": inputs["read"],
            "ENTER": inputs["enter"] is not None,
            "TRANS": inputs["trans"] is not None,
            "SEPARATE": self.separate,
            "PRECISION": "tf32" if half and chip(q) != "amd" else precision,
        }
        self.warps = 8 if self.dim > 64 or self.chunk > 16 else 4

    def sizes(self, first_row: int, slots: int) -> dict[str, int]:
        return {
            "first_row": first_row,
            "chunks": self.chunks,
            "heads": self.heads,
            "group_size": self.rows // len(self.inputs["run"]),
            "slots": slots,
        }

    def tensors(self) -> dict:
        names = ("q", "k", "v", "run", "last")
        return {name: self.inputs[name] for name in names} | self.coefficients

    def stacks(self, rows: slice, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of W2 and W1 `[rows, H, slots, J, ...]` in fp32, with the start in slot 0 and the first C in the last."""
        slots = steps + 1 + self.separate
        stacks = []
        for number in "21":
            w, s, c = (self.inputs[name + number] for name in "wsc")
            shape = (rows.stop - rows.start, self.heads, slots, self.parts, *w.shape[2:])
            stack = w.new_empty(shape, dtype=torch.float32)
            stack[:, :, 0, 0] = w[rows]
            if self.parts > 1:
                stack[:, :, 0, 1] = 0.0 if s is None else s[rows]
            if self.separate:
                stack[:, :, -1, 0] = c[rows]
            stacks.append(stack)
        return tuple(stacks)

    def run(self, rows: slice, stacks, steps: int, outputs: tuple | None) -> None:
        """Write; `outputs`: the answers, and the C of running rows, if they are asked for."""
        args = self.tensors() | self.sizes(rows.start, stacks[0].shape[2]) | {"step": 1 if steps else 0}
        args |= dict(zip(("stack2", "stack1"), stacks, strict=True))
        args |= dict(zip(("out", "c2_end", "c1_end"), outputs or (None, None, None), strict=True))
        meta = self.meta | {"ENDS": outputs is not None}
        if outputs is None:
            meta["READ"] = NOTHING
        grid = ((rows.stop - rows.start) * self.heads,)
        launch(_write_kernel, grid, args, meta, self.warps, 1)

    def blocks(self, slots: int) -> Iterator[slice]:
        """Rows that are done at once, with stacks of so many slots."""
        maps = 2 * self.parts * self.dim * self.hidden
        count = max(1, STACKS // (self.heads * slots * maps))
        for start in range(0, self.rows, count):
            yield slice(start, min(start + count, self.rows))

    def end_gradients(self, rows: slice, grad_w: torch.Tensor | None, grad_s: torch.Tensor | None, w: torch.Tensor):
        """Gradient `[rows, H, J (+ 1 for C), ...]` of the last stack."""
        shape = (rows.stop - rows.start, self.heads, self.parts + self.separate, *w.shape[2:])
        grad = torch.zeros(shape, dtype=torch.float32, device=w.device)
        if grad_w is not None:
            grad[:, :, 0] = grad_w[rows]
        if self.parts > 1 and grad_s is not None:
            row, size = torch.arange(rows.start, rows.stop, device=w.device), self.rows // len(grad_s)
            group = row // size
            running = self.inputs["run"][group] == row % size
            grad[:, :, 1] = grad_s[group] * running.view(-1, 1, 1, 1)
        return grad

    def backward(self, grad_out: torch.Tensor, ends: tuple, grads: dict) -> None:
        """Writes all gradients; `ends`: those of W2, W1, C2, C1, S2, S1, each may be None."""
        w, running = [self.inputs[name] for name in ("w2", "w1")], len(self.inputs["run"])
        bases = [
            torch.zeros(running, *x.shape[1:], dtype=torch.float32, device=x.device) if grad is None else grad
            for grad, x in zip(ends[2:4], w, strict=True)
        ]
        for rows in self.blocks(self.chunks + 2):
            stacks = self.stacks(rows, self.chunks)
            self.run(rows, stacks, self.chunks, None)
            grad_stacks = [self.end_gradients(rows, *ends[i::4], w[i]) for i in range(2)]
            programs = (rows.stop - rows.start) * self.heads
            norm = stacks[0].new_empty(programs, 2, self.dim)
            args = (
                self.tensors()
                | self.sizes(rows.start, stacks[0].shape[2])
                | {
                    "stack2": stacks[0],
                    "stack1": stacks[1],
                    "grad_out": grad_out,
                    "grad_c2_end": bases[0],
                    "grad_c1_end": bases[1],
                    "grad_stack2": grad_stacks[0],
                    "grad_stack1": grad_stacks[1],
                    "kept": norm.new_empty(programs, 5, self.meta["BC"], self.hidden),
                    "grad_norm": norm,
                }
            )
            args |= {f"grad_{name}": grads[name] for name in ("q", "k", "v", "mix", "enter", "leave", "trans")}
            launch(write_backward_kernel, (programs,), args, self.meta, self.warps, 1)
            for number, grad in zip("21", grad_stacks, strict=True):
                for name, part in (("w", 0), ("s", 1), ("c", -1)):
                    if self.inputs[name + number] is not None:
                        grads[name + number][rows] = grad[:, :, part]
            if self.meta["NORM"]:
                for part, name in enumerate(("scale", "shift")):
                    grads[name] += norm.view(-1, self.heads, 2, self.dim)[:, :, part].sum(0)


def forward(q, k, v, mix, enter, leave, trans, w2, w1, c2, c1, s2, s1, scale, shift, run, last, loss, read):
    """See `deep_write`."""
    write = DeepWrite(dict(locals()))
    groups, maps = len(run), [(*w.shape[1:],) for w in (w2, w1)]
    width = {ANSWER: q.shape[-1], NOTHING: 0, 0: w2.shape[-1], 1: w1.shape[-1]}[read]
    out = q.new_empty(*q.shape[:-1], width)
    bases, momentum, ends = (
        [torch.empty(count, *shape if count else (), dtype=torch.float32, device=q.device) for shape in maps]
        for count in (groups, groups if write.parts > 1 else 0, len(q))
    )
    running = torch.arange(groups, device=q.device) * (len(q) // groups) + run
    for rows in write.blocks(1 + write.separate):
        stacks = write.stacks(rows, 0)
        write.run(rows, stacks, 0, (out, *bases))
        here = ((running >= rows.start) & (running < rows.stop)).view(-1, 1, 1, 1)
        local = (running - rows.start).clamp(0, rows.stop - rows.start - 1)
        for stack, end, last_s in zip(stacks, ends, momentum, strict=True):
            end[rows] = stack[:, :, 0, 0]
            if write.parts > 1:
                last_s.copy_(torch.where(here, stack[local, :, 0, 1], last_s))
    return out, *ends, *bases, *momentum


def backward(
    grad_out,
    grad_w2_end,
    grad_w1_end,
    grad_c2_end,
    grad_c1_end,
    grad_s2_end,
    grad_s1_end,
    q,
    k,
    v,
    mix,
    enter,
    leave,
    trans,
    w2,
    w1,
    c2,
    c1,
    s2,
    s1,
    scale,
    shift,
    run,
    last,
    loss,
    read,
):
    """See `deep_write_backward_torch`."""
    inputs = dict(list(locals().items())[7:])
    ends = grad_w2_end, grad_w1_end, grad_c2_end, grad_c1_end, grad_s2_end, grad_s1_end
    leading = {name: x for name, x in inputs.items() if name not in ("run", "last", "loss", "read")}
    grads = {
        name: None if x is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for name, x in leading.items()
    }
    for name in ("scale", "shift", *(("q",) if read == NOTHING else ())):
        if grads[name] is not None:
            grads[name].zero_()
    DeepWrite(inputs).backward(grad_out.contiguous(), ends, grads)
    return tuple(q.new_empty(0) if x is None else grads[name].to(x.dtype) for name, x in leading.items())
