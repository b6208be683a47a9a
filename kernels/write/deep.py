"""Write of a deep memory (eq. 30-36), chunk by chunk in closed form, and the online answers of the same tokens.

A memory is two maps W2 `[d, h]` (number 0) and W1 `[h, d]` (number 1), see `deep_common`. All gradients inside a chunk
of c tokens are taken at the maps C that the chunk began with, so token i moves a map along the rank-one `f_i^T g_i`
and what happens inside a chunk is linear. A map and its momentum, if any, are stacked to T `[J * d_in, d_out]`:

    answer of a map    Y = [enter_1 x | ... | enter_J x] T - ((x f^T) * mix) g
    end of the chunk   T' = trans T - [leave_1 f | ... | leave_J f]^T g

The coefficients `enter` and `leave` `[c, J]`, `mix` `[c, c]` and `trans` `[J, J]` of a chunk make DLA or Titans of it.

The op keeps nothing but its inputs: the backward writes the segment once more, one block of rows at a time, so that
its temporaries (maps at the chunk starts, hidden activations) have a fixed bound. Derivation: docs/design.md.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from ..shared.deep import ANSWER, NOTHING, Norm, gelu_backward, gelu_second, per_head
from ..shared.ops import WIDEST_DEEP, budget, choose_backend, compute_dtype, register_op


BUDGET = 2**22
LONGEST_CHUNK = 64  # tokens of an inner chunk that the Triton kernels keep on chip
DENSE = torch.contiguous_format
NUM_OUTPUTS, DIFFERENTIABLE = 7, 15  # outputs of the op, and how many of its leading inputs receive a gradient


def _t(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2)


def _lift(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """`[weight_1 x | ... | weight_J x]` `[G, c, J * d]` from x `[G, c, d]` and weight `[G, c, J]` (None = 1)."""
    return x if weight is None else (weight[..., None] * x[..., None, :]).flatten(-2)


def _unlift(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x and weight from that of `_lift(x, weight)`."""
    if weight is None:
        return grad, None
    parts = grad.unflatten(-1, (weight.shape[-1], -1))
    return (weight[..., None] * parts).sum(-2), (parts * x[..., None, :]).sum(-1)


class _Map:
    """One map during one chunk: its stack T at the start, the tokens' factors f `[G, c, d_in]`, g `[G, c, d_out]`."""

    def __init__(self, stack: torch.Tensor, f: torch.Tensor, g: torch.Tensor) -> None:
        self.stack, self.f, self.g = stack, f, g

    def answer(self, x: torch.Tensor, mix: torch.Tensor, enter: torch.Tensor | None) -> torch.Tensor:
        scores = (x @ _t(self.f)).mul_(mix)
        return (_lift(x, enter) @ self.stack).baddbmm_(scores, self.g, alpha=-1)

    def answer_backward(self, grad, x, mix, enter, grad_stack):
        """Gradients of x, and of f, g, mix and enter; that of the stack is added to `grad_stack`."""
        products = x @ _t(self.f)
        grad_x, grad_enter = _unlift(grad @ _t(self.stack), x, enter)
        grad_scores = (grad @ _t(self.g)).neg_()
        grad_mix, grad_scores = grad_scores * products, grad_scores * mix
        grad_x = torch.baddbmm(grad_x, grad_scores, self.f)
        grad_stack.baddbmm_(_t(_lift(x, enter)), grad)
        return grad_x, (_t(grad_scores) @ x, (_t(products * mix) @ grad).neg_(), grad_mix, grad_enter)

    def end(self, leave: torch.Tensor, trans: torch.Tensor | None, out: torch.Tensor) -> None:
        written = _t(_lift(self.f, leave)), self.g
        if trans is None:
            torch.baddbmm(self.stack, *written, alpha=-1, out=out)
        else:
            parts = self.stack.reshape(len(trans), trans.shape[-1], -1)
            torch.bmm(trans, parts, out=out.view(len(trans), trans.shape[-2], -1))
            out.baddbmm_(*written, alpha=-1)

    def end_backward(self, grad, leave, trans):
        """Gradients of the stack, and of f, g, leave and trans, from that of the stack after the chunk."""
        grad_f, grad_leave = _unlift(self.g @ _t(grad), self.f, leave)
        grad_g, grad_trans = _lift(self.f, leave) @ grad, None
        if trans is not None:
            parts = grad.view(len(trans), trans.shape[-2], -1)
            grad_trans = parts @ _t(self.stack.reshape(len(trans), trans.shape[-1], -1))
            grad = (_t(trans) @ parts).view(self.stack.shape)
        return grad, (grad_f.neg_(), grad_g.neg_(), grad_leave.neg_(), grad_trans)


class _Keys:
    """Keys and values of a chunk at the maps that it began with: every token's gradient as rank-one factors."""

    def __init__(self, k, v, bases, scale, shift, loss: str) -> None:
        self.k, self.bases, self.scale, self.loss = k, bases, scale, loss
        self.z = k @ bases[0]
        self.a = F.gelu(self.z)
        self.norm = Norm(self.a @ bases[1], scale is not None)
        branch = self.norm.n if scale is None else torch.addcmul(shift, self.norm.n, scale)
        self.e = -v if loss == "dot" else 2 * (k + branch - v)
        self.weighted = self.e if scale is None else self.e * scale
        self.d1 = self.norm.backward(self.weighted)
        self.p = self.d1 @ _t(bases[1])
        self.d2 = gelu_backward(self.p, self.z)

    def backward(self, grad_a, grad_d1, grad_d2, grad_bases):
        """Gradients of k, v, scale and shift; those of the bases are added to `grad_bases`."""
        grad_p = gelu_backward(grad_d2, self.z)
        grad_d1 = torch.baddbmm(grad_d1, grad_p, self.bases[1])
        grad_bases[1].baddbmm_(_t(grad_p), self.d1)
        grad_e = self.norm.backward(grad_d1)
        grad_r = grad_scale = grad_shift = grad_k = None
        if self.scale is not None:
            grad_r = self.norm.backward_of_backward(grad_d1, self.weighted)
            grad_scale, grad_shift = (self.e * grad_e).sum(-2), torch.zeros_like(self.e[:, 0])
            grad_e = grad_e * self.scale
        grad_v = -grad_e
        if self.loss == "l2":
            grad_k = 2 * grad_e
            grad_v = -grad_k
            grad_n = grad_k
            if self.scale is not None:
                grad_scale, grad_shift = grad_scale + (grad_k * self.norm.n).sum(-2), grad_k.sum(-2)
                grad_n = grad_k * self.scale
            through_norm = self.norm.backward(grad_n)
            grad_r = through_norm if grad_r is None else grad_r + through_norm
        if grad_r is not None:
            grad_a = torch.baddbmm(grad_a, grad_r, _t(self.bases[1]))
            grad_bases[1].baddbmm_(_t(self.a), grad_r)
        grad_z = gelu_backward(grad_a, self.z).addcmul_(gelu_second(self.z) * self.p, grad_d2)
        grad_bases[0].baddbmm_(_t(self.k), grad_z)
        through_map = grad_z @ _t(self.bases[0])
        return through_map if grad_k is None else grad_k + through_map, grad_v, grad_scale, grad_shift


class _Gradients(dict):
    """Sums of gradients by name."""

    def add(self, **grads: torch.Tensor | None) -> None:
        for name, grad in grads.items():
            if grad is not None:
                self[name] = self[name] + grad if name in self else grad


class _Chunk:
    """One chunk of G = rows x heads independent memories, from the stacks and bases (one per map) at its start."""

    def __init__(self, block: "_Block", index: int, stacks: list[torch.Tensor], bases: list[torch.Tensor]) -> None:
        parts = stacks[0].shape[1] // bases[0].shape[1]
        self.scale, self.shift, self.read = block.scale, block.shift, block.read
        self.q, self.mix, self.leave = block.q[index], block.mix[index], block.leave[index]
        self.enter = None if block.enter is None else block.enter[index][..., :parts]
        self.trans = None if block.trans is None else block.trans[index][..., :parts]
        self.keys = _Keys(block.k[index], block.v[index], bases, block.scale, block.shift, block.loss)
        self.maps = _Map(stacks[0], self.keys.k, self.keys.d2), _Map(stacks[1], self.keys.a, self.keys.d1)

    def _read(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return self.maps[number].answer(x, self.mix, self.enter)

    def answer(self) -> torch.Tensor:
        if self.read == NOTHING:
            return self.q[..., :0]
        if self.read != ANSWER:
            return self._read(self.read, self.q)
        norm = Norm(self._read(1, F.gelu(self._read(0, self.q))), self.scale is not None)
        return self.q + (norm.n if self.scale is None else torch.addcmul(self.shift, norm.n, self.scale))

    def end(self, out: list[torch.Tensor]) -> None:
        for part, stack in zip(self.maps, out, strict=True):
            part.end(self.leave, self.trans, stack)

    def backward(self, grad_out, grad_stacks, separate_bases: bool):
        """Gradients of everything but maps, by name, and those of the stacks and (if they are others) of the bases.

        Args:
            grad_out: `[G, c, d]`, of the answers.
            grad_stacks: of the stacks after the chunk, None where zero; may be overwritten.
        """
        total, stacks = _Gradients(), []
        for number, (part, grad) in enumerate(zip(self.maps, grad_stacks, strict=True)):
            if grad is None:
                stacks.append(part.stack.new_zeros(part.stack.shape))
                continue
            stack, rest = part.end_backward(grad, self.leave, self.trans)
            stacks.append(stack)
            total.add(**dict(zip((f"f{number}", f"g{number}", "leave", "trans"), rest, strict=True)))

        def read_backward(number: int, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            grad_x, rest = self.maps[number].answer_backward(grad, x, self.mix, self.enter, stacks[number])
            total.add(**dict(zip((f"f{number}", f"g{number}", "mix", "enter"), rest, strict=True)))
            return grad_x

        if self.read >= 0:
            total.add(q=read_backward(self.read, grad_out, self.q))
        elif self.read == ANSWER:
            z = self._read(0, self.q)
            hidden = F.gelu(z)
            norm, grad_n = Norm(self._read(1, hidden), self.scale is not None), grad_out
            if self.scale is not None:
                total.add(scale=(grad_out * norm.n).sum(-2), shift=grad_out.sum(-2))
                grad_n = grad_out * self.scale
            grad_hidden = read_backward(1, norm.backward(grad_n), hidden)
            total.add(q=grad_out + read_backward(0, gelu_backward(grad_hidden, z), self.q))

        if separate_bases:
            bases = [torch.zeros_like(base) for base in self.keys.bases]
        else:
            bases = [stack[:, : base.shape[1]] for stack, base in zip(stacks, self.keys.bases, strict=True)]
        like = {"f1": self.keys.a, "g1": self.keys.d1, "g0": self.keys.d2}
        inner = [total.pop(name) if name in total else torch.zeros_like(x) for name, x in like.items()]
        total.add(**dict(zip(("k", "v", "scale", "shift"), self.keys.backward(*inner, bases), strict=True)))
        total.add(k=total.pop("f0", None))
        return total, stacks, bases


class _Block:
    """Some rows of the op's inputs, chunk by chunk and with row and head as one dimension."""

    def __init__(self, rows: slice, dtype: torch.dtype, inputs: dict) -> None:
        self.rows, self.dtype = rows, dtype
        self.loss, self.read = inputs["loss"], inputs["read"]
        self.num_chunks, self.heads, self.chunk = inputs["mix"].shape[1:4]
        self.q, self.k, self.v = (self._tokens(inputs[name]) for name in "qkv")
        self.mix, self.enter, self.leave, self.trans = (
            None if inputs[name] is None else inputs[name][rows].to(dtype).transpose(0, 1).flatten(1, 2)
            for name in ("mix", "enter", "leave", "trans")
        )
        self.total_rows, self.num_rows = len(inputs["q"]), rows.stop - rows.start
        self.scale, self.shift = (per_head(inputs[name], self.num_rows, dtype) for name in ("scale", "shift"))
        start = [[self._maps(inputs[name + number]) for name in "ws"] for number in "21"]
        self.bases = [self._maps(inputs[name]) for name in ("c2", "c1")]
        self.widths = [part.shape[1] for part, _ in start]
        total = self.leave.shape[-1]
        self.stacks = [
            part.new_empty(self.num_chunks + 1, len(part), total * part.shape[1], part.shape[2]) for part, _ in start
        ]
        self.start_parts = 1 if start[0][1] is None else total
        for stack, parts, width in zip(self.stacks, start, self.widths, strict=True):
            for i in range(self.start_parts):
                stack[0, :, i * width : (i + 1) * width] = parts[i]

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, W, H, d]` to `[M, G, c, d]`."""
        x = x[self.rows].to(self.dtype).unflatten(1, (self.num_chunks, self.chunk))
        return x.permute(1, 0, 3, 2, 4).flatten(1, 2)

    def _maps(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[self.rows].to(self.dtype).flatten(0, 1)

    def _at(self, index: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Stacks and bases at the start of a chunk."""
        parts = self.start_parts if index == 0 else self.leave.shape[-1]
        stacks = [stack[index, :, : parts * width] for stack, width in zip(self.stacks, self.widths, strict=True)]
        if index == 0 and self.bases[0] is not None:
            return stacks, self.bases
        return stacks, [stack[:, :width] for stack, width in zip(stacks, self.widths, strict=True)]

    def write(self):
        """Walk through the chunks, which leaves the stacks of every chunk start and of the end in `self.stacks`."""
        for index in range(self.num_chunks):
            chunk = _Chunk(self, index, *self._at(index))
            chunk.end([stack[index + 1] for stack in self.stacks])
            yield index, chunk

    def rejoin(self, x: torch.Tensor) -> torch.Tensor:
        """`[G, ...]` to `[rows, H, ...]`."""
        return x.unflatten(0, (self.num_rows, self.heads))

    def _running(self, run: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """The groups of rows that this block touches, their running rows counted in the block, and which it holds."""
        size = self.total_rows // len(run)
        groups = slice(self.rows.start // size, -(-self.rows.stop // size))
        row = torch.arange(groups.start, groups.stop, device=run.device) * size + run[groups] - self.rows.start
        return groups, row.clamp(0, self.num_rows - 1), (row >= 0) & (row < self.num_rows)

    def leave_ends(self, ends: list[torch.Tensor], run: torch.Tensor, last: torch.Tensor) -> None:
        """Write this block's end states (W2, W1, and C2, C1, S2, S1 of running rows) after `write`."""
        groups, row, here = self._running(run)
        here, last = here.view(-1, 1, 1, 1), last[groups]
        for number, (stack, width) in enumerate(zip(self.stacks, self.widths, strict=True)):
            ends[number][self.rows] = self.rejoin(stack[-1, :, :width])
            base = stack.unflatten(1, (self.num_rows, self.heads))[last, row, :, :width]
            if self.bases[number] is not None:
                base = torch.where((last == 0).view(-1, 1, 1, 1), self.rejoin(self.bases[number])[row], base)
            ends[2 + number][groups] = torch.where(here, base, ends[2 + number][groups])
            if stack.shape[2] > width:
                momentum = self.rejoin(stack[-1, :, width:])[row]
                ends[4 + number][groups] = torch.where(here, momentum, ends[4 + number][groups])

    def _add_running(self, total: torch.Tensor, grad: torch.Tensor, run: torch.Tensor, chosen: torch.Tensor) -> None:
        """Add gradients `[groups, H, ...]` of running rows, where `chosen` `[groups]`, to those of all rows."""
        groups, row, here = self._running(run)
        grad = grad[groups].to(self.dtype) * (here & chosen[groups]).view(-1, 1, 1, 1)
        total += torch.zeros_like(self.rejoin(total)).index_add_(0, row, grad).flatten(0, 1)

    def _end_gradients(self, ends: tuple, run: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradients of the last stacks from those of the parts W and S of every map, None where all are zero."""
        grads = []
        for stack, width, (grad_w, grad_s, _) in zip(self.stacks, self.widths, ends, strict=True):
            if grad_w is None and grad_s is None:
                grads.append(None)
                continue
            grad = torch.zeros_like(stack[0])
            if grad_w is not None:
                grad[:, :width] = self._maps(grad_w)
            if grad_s is not None and grad_s.numel():
                self._add_running(grad[:, width:], grad_s, run, torch.ones_like(run, dtype=torch.bool))
            grads.append(grad)
        return grads

    def backward(
        self, grad_out: torch.Tensor, ends: tuple, run: torch.Tensor, last: torch.Tensor, grads: dict
    ) -> None:
        """Write this block's part of every gradient into `grads`, in the layout of the op's inputs."""
        chunks = [chunk for _, chunk in self.write()]
        grad_out = self._tokens(grad_out)
        stacks = self._end_gradients(ends, run)
        for index in reversed(range(self.num_chunks)):
            separate = index == 0 and self.bases[0] is not None
            found, stacks, bases = chunks.pop().backward(grad_out[index], stacks, separate)
            for name in set("qkv") & found.keys():
                place = grads[name][self.rows].unflatten(1, (self.num_chunks, self.chunk))
                place[:, index] = self.rejoin(found[name]).transpose(1, 2)
            for name in {"mix", "enter", "leave", "trans"} & found.keys():
                grads[name][self.rows, index, ..., : found[name].shape[-1]] = self.rejoin(found[name])
            for name in {"scale", "shift"} & found.keys():
                grads[name] += self.rejoin(found[name]).sum(0)
            for base, (_, _, grad) in zip(bases, ends, strict=True):
                if grad is not None:
                    self._add_running(base, grad, run, last == index)
            if separate:
                for name, base in zip(("c2", "c1"), bases, strict=True):
                    grads[name][self.rows] = self.rejoin(base)
        for number, (stack, width) in enumerate(zip(stacks, self.widths, strict=True)):
            grads[f"w{2 - number}"][self.rows] = self.rejoin(stack[:, :width])
            if self.start_parts > 1:
                grads[f"s{2 - number}"][self.rows] = self.rejoin(stack[:, width:])


def _blocks(inputs: dict, kept: int) -> Iterator[_Block]:
    """The rows in blocks of bounded size; `kept`: hidden activations per token of one chunk that live at a time."""
    q, mix, w2, leave = (inputs[name] for name in ("q", "mix", "w2", "leave"))
    maps, hidden = 2 * leave.shape[-1] * (mix.shape[1] + 1) * w2[0].numel(), w2.shape[-1]
    per_row = maps + kept * mix.shape[-1] * mix.shape[2] * hidden
    step = max(1, budget(q.device, BUDGET) // per_row)
    for start in range(0, len(q), step):
        yield _Block(slice(start, min(start + step, len(q))), compute_dtype(q), inputs)


def deep_write_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mix: torch.Tensor,
    enter: torch.Tensor | None,
    leave: torch.Tensor,
    trans: torch.Tensor | None,
    w2: torch.Tensor,
    w1: torch.Tensor,
    c2: torch.Tensor | None,
    c1: torch.Tensor | None,
    s2: torch.Tensor | None,
    s1: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    run: torch.Tensor,
    last: torch.Tensor,
    loss: str,
    read: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `deep_write`."""
    inputs = dict(locals())
    outputs = _fake(**inputs)
    out, *ends = outputs
    for block in _blocks(inputs, kept=1):
        answers = out[block.rows].unflatten(1, (block.num_chunks, block.chunk))
        for index, chunk in block.write():
            answers[:, index] = block.rejoin(chunk.answer()).transpose(1, 2)
        block.leave_ends(ends, run, last)
    return outputs


def deep_write_backward_torch(
    grad_out: torch.Tensor,
    grad_w2_end: torch.Tensor | None,
    grad_w1_end: torch.Tensor | None,
    grad_c2_end: torch.Tensor | None,
    grad_c1_end: torch.Tensor | None,
    grad_s2_end: torch.Tensor | None,
    grad_s1_end: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mix: torch.Tensor,
    enter: torch.Tensor | None,
    leave: torch.Tensor,
    trans: torch.Tensor | None,
    w2: torch.Tensor,
    w1: torch.Tensor,
    c2: torch.Tensor | None,
    c1: torch.Tensor | None,
    s2: torch.Tensor | None,
    s1: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    run: torch.Tensor,
    last: torch.Tensor,
    loss: str,
    read: int,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Gradients of q ... shift (empty tensors where the input is None)."""
    inputs = dict(list(locals().items())[NUM_OUTPUTS:])
    ends = ((grad_w2_end, grad_s2_end, grad_c2_end), (grad_w1_end, grad_s1_end, grad_c1_end))
    leading = list(inputs.items())[:DIFFERENTIABLE]
    grads = {name: q.new_empty(0) if x is None else torch.zeros_like(x, memory_format=DENSE) for name, x in leading}
    for block in _blocks(inputs, kept=12 * mix.shape[1]):
        block.backward(grad_out, ends, run, last, grads)
    return tuple(grads.values())


def _fake(q, k, v, mix, enter, leave, trans, w2, w1, c2, c1, s2, s1, scale, shift, run, last, loss, read):
    dtype = compute_dtype(q)
    width = {ANSWER: q.shape[-1], NOTHING: 0, 0: w2.shape[-1], 1: w1.shape[-1]}[read]
    ends = [w.new_empty(w.shape, dtype=dtype) for w in (w2, w1)]
    running = [(len(run), *w.shape[1:]) for w in (w2, w1)]
    ends += [w2.new_empty(shape, dtype=dtype) for shape in running]
    ends += [w2.new_empty(shape if leave.shape[-1] > 1 else 0, dtype=dtype) for shape in running]
    return q.new_empty(*q.shape[:-1], width), *ends


def _fake_backward(*args):
    leading = args[NUM_OUTPUTS:][:DIFFERENTIABLE]
    empty = leading[0].new_empty(0)
    return tuple(empty if x is None else torch.empty_like(x, memory_format=DENSE) for x in leading)


deep_write_op = register_op(
    "deep_write",
    deep_write_torch,
    deep_write_backward_torch,
    _fake,
    _fake_backward,
    differentiable=DIFFERENTIABLE,
    triton="write.deep_triton",
)


def deep_write(
    *inputs: torch.Tensor | None, loss: str, read: int, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write M inner chunks of c tokens into B rows of deep memories, and answer the same tokens (eq. 30-36).

    Args:
        inputs: what follows up to `last`, in this order (c2, c1, s2, s1 after w2, w1).
        q, k, v: `[B, M * c, H, d]`; q is what `read` asks for.
        mix, enter, leave, trans: the coefficients `[B, M, H, ...]` of every chunk, see above: `[c, c]`, `[c, J]`,
            `[c, J]` and `[J, J]`, J = 2 with momentum, else 1. None for enter and trans: all 1, the identity.
        w2, w1: maps at the start, `[B, H, d, h]` and `[B, H, h, d]`. c2, c1: those at the start of the first chunk, if
            part of it was written before, else None. s2, s1: momentum, or None for 0.
        scale, shift: `[H, d]` of the layer norm, or None without one.
        run: `[groups]` int64: B / groups rows in turn form a group; the one of them that leaves C and S.
        last: `[groups]` int64: the chunk of that row whose C is left.
        loss: "dot" (-<M(k), v>) or "l2" (|M(k) - v|^2).
        read: ANSWER, NOTHING, or the number of the one map to apply: 0 to q, or 1 to hidden activations in q's place.
        backend: "auto", "triton" or "torch", see `choose_backend`; Triton has heads up to WIDEST_DEEP wide and chunks
            up to LONGEST_CHUNK tokens long.

    Returns:
        answers `[B, M * c, H, d]` in q's dtype (`[..., h]` of map 0, `[..., 0]` of NOTHING), and in fp32 the maps at
        the end like w2 and w1, and those of C and of S (empty without momentum) `[groups, H, ...]` of running rows.
    """
    q, k, _, mix = inputs[:4]
    backend = choose_backend(backend, "deep_write", q, k.shape[-1], widest=WIDEST_DEEP)
    if backend == "triton" and mix.shape[-1] > LONGEST_CHUNK:
        raise ValueError(
            f"`mc_backend`='triton' is not possible for `deep_write`: `memory_chunk_size` is {mix.shape[-1]}, "
            f"allowed: up to {LONGEST_CHUNK}; allowed here: 'torch', 'auto'"
        )
    return deep_write_op(*inputs, loss, read, backend)
