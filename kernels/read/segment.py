"""Gated read of every cached memory: the past part of GRM (eq. 9, 10) for matrix memories, gate and read in one pass.

    o_t = sum_i g_ti S_i^T q_t ,   g_t = softmax over (past segments i, online) of <u_t, summary_i>

The softmax includes the online memory's logit; the op returns the past part and the gate that is left for the online
answer. Gates are recomputed in the backward: nothing of size tokens x segments is kept between the two passes.
"""

import torch

from ..shared.ops import budget, choose_backend, compute_dtype, register_op
from .gates import (
    HIDDEN,
    first_readable,
    gate_function,
    gate_logits,
    gate_logits_backward,
    hidden_memories,
    missing_in_triton,
)


BUDGET = 2**19  # elements of the largest temporary, tokens x segments x head width, of one block


class Blocks:
    """Row and head as one batch dimension, and the (query segments) x (read segments) blocks to walk through.

    Args:
        q: `[R, N, W, H, dk]`. num_memories: S. pair_width: elements that one (token, memory) pair needs.
        first: `[R, N]`, see `segment_read`; None = 0.
    """

    def __init__(self, q: torch.Tensor, num_memories: int, pair_width: int, first: torch.Tensor | None = None) -> None:
        self.rows, self.num, self.width, self.heads, _ = q.shape
        self.cached = num_memories - self.num
        self.first = [0] * self.num if first is None else first_readable(first)
        self.groups = self.rows * self.heads
        per_pair = max(1, self.groups * self.width * pair_width)
        elements = budget(q.device, BUDGET)
        self.query_step = max(1, min(self.num, elements // (per_pair * 8)))
        self.read_step = max(1, elements // (per_pair * self.query_step))

    def tokens(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[R, N, W, H, ...]` to `[G, N * W, ...]`."""
        return x.to(dtype).movedim(3, 1).reshape(self.groups, self.num * self.width, *x.shape[4:]).contiguous()

    def memories(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[R, S, H, ...]` to `[G, S, ...]`."""
        return x.to(dtype).movedim(2, 1).reshape(self.groups, x.shape[1], *x.shape[3:])

    def untokens(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.view(self.rows, self.heads, self.num, self.width, *x.shape[2:])
        return x.movedim(1, 3).to(dtype).contiguous()

    def unmemories(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.view(self.rows, self.heads, *x.shape[1:]).movedim(1, 2).to(dtype).contiguous()

    def queries(self) -> list[tuple[slice, slice, slice]]:
        """For every block of query segments: the segments, their tokens, the memories that they can see at most."""
        blocks = []
        for start in range(0, self.num, self.query_step):
            stop = min(start + self.query_step, self.num)
            tokens = slice(start * self.width, stop * self.width)
            end = self.cached + stop - 1
            blocks.append((slice(start, stop), tokens, slice(min(end, *self.first[start:stop]), end)))
        return blocks

    def reads(self, seen: slice) -> list[tuple[slice, slice]]:
        """Blocks of the memories `seen`, counted from its start and from the first of all."""
        starts = range(seen.start, seen.stop, self.read_step)
        blocks = [slice(i, min(i + self.read_step, seen.stop)) for i in starts]
        return [(slice(b.start - seen.start, b.stop - seen.start), b) for b in blocks]


class BlockGates:
    """Gates of one block of tokens at a time, and their gradients. Args: see `segment_read`."""

    def __init__(self, blocks: Blocks, u, summaries, online_logit, birth, first, function: str, dtype) -> None:
        self.blocks, self.birth, self.first, self.function = blocks, birth, first, gate_function(function)
        self.u, self.online_logit = blocks.tokens(u, dtype), blocks.tokens(online_logit, dtype)
        self.summaries = blocks.memories(summaries, dtype)

    def block(self, segments: slice, tokens: slice, seen: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates of the V memories `seen` `[G, T, V]` and of the online one `[G, T]`."""
        blocks = self.blocks
        logits, self.choice = gate_logits(self.u[:, tokens], self.summaries[:, seen])
        hidden = hidden_memories(self.birth, self.first, segments, seen)
        logits = logits.masked_fill(
            hidden.repeat_interleave(blocks.heads, 0).repeat_interleave(blocks.width, 1), HIDDEN
        )
        self.logits = torch.cat([logits, self.online_logit[:, tokens, None]], -1)
        self.gates = self.function.value(self.logits)
        return self.gates[..., :-1], self.gates[..., -1]

    def begin_backward(self, grad_online: torch.Tensor) -> None:
        """Takes the gradient of all online gates `[G, N * W]`."""
        self.grad_online, self.grad_logit = grad_online, torch.empty_like(self.online_logit)
        self.grad_u, self.grad_summaries = torch.empty_like(self.u), torch.zeros_like(self.summaries)

    def block_backward(self, tokens: slice, seen: slice, grad_gates: torch.Tensor) -> None:
        """Takes the gradient `[G, T, V]` of the gates that `block` gave last."""
        grad = torch.cat([grad_gates, self.grad_online[:, tokens, None]], -1)
        grad = self.function.pull_back(self.logits, self.gates, grad)
        self.grad_logit[:, tokens] = grad[..., -1]
        read = self.summaries[:, seen]
        self.grad_u[:, tokens], grad_read = gate_logits_backward(grad[..., :-1], self.choice, self.u[:, tokens], read)
        self.grad_summaries[:, seen] += grad_read

    def gradients(self, u, summaries, online_logit) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of u, summaries and online_logit, in their layouts and dtypes."""
        return (
            self.blocks.untokens(self.grad_u, u.dtype),
            self.blocks.unmemories(self.grad_summaries, summaries.dtype),
            self.blocks.untokens(self.grad_logit, online_logit.dtype),
        )


def segment_read_torch(
    q: torch.Tensor,
    u: torch.Tensor,
    states: torch.Tensor,
    summaries: torch.Tensor,
    online_logit: torch.Tensor,
    birth: torch.Tensor,
    first: torch.Tensor,
    function: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `segment_read`."""
    dtype, blocks = compute_dtype(q), Blocks(q, states.shape[1], q.shape[-1], first)
    weights = BlockGates(blocks, u, summaries, online_logit, birth, first, function, dtype)
    qg, sg = blocks.tokens(q, dtype), blocks.memories(states, dtype)
    out = qg.new_zeros(*qg.shape[:-1], states.shape[-1])
    online_gate = qg.new_empty(qg.shape[:-1])
    for segments, tokens, seen in blocks.queries():
        gates, online_gate[:, tokens] = weights.block(segments, tokens, seen)
        for place, read in blocks.reads(seen):
            mixed = (gates[..., place, None] * qg[:, tokens, None]).flatten(-2)
            out[:, tokens] += mixed @ sg[:, read].flatten(1, 2)
    return blocks.untokens(out, q.dtype), blocks.untokens(online_gate, dtype)


def segment_read_backward_torch(
    grad_out: torch.Tensor,
    grad_online: torch.Tensor,
    q: torch.Tensor,
    u: torch.Tensor,
    states: torch.Tensor,
    summaries: torch.Tensor,
    online_logit: torch.Tensor,
    birth: torch.Tensor,
    first: torch.Tensor,
    function: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, u, states, summaries and online_logit."""
    dtype, blocks = compute_dtype(q), Blocks(q, states.shape[1], q.shape[-1], first)
    weights = BlockGates(blocks, u, summaries, online_logit, birth, first, function, dtype)
    qg, go, sg = blocks.tokens(q, dtype), blocks.tokens(grad_out, dtype), blocks.memories(states, dtype)
    grad_q, grad_states = torch.zeros_like(qg), torch.zeros_like(sg)
    weights.begin_backward(blocks.tokens(grad_online, dtype))
    for segments, tokens, seen in blocks.queries():
        gates, _ = weights.block(segments, tokens, seen)
        grad_gates = torch.empty_like(gates)
        for place, read in blocks.reads(seen):
            back = torch.einsum("gtv,gskv->gtsk", go[:, tokens], sg[:, read])
            # products and sums: as matrix products the many tiny matrices would be slow
            grad_gates[..., place] = (back * qg[:, tokens, None]).sum(-1)
            grad_q[:, tokens] += back.mul_(gates[..., place, None]).sum(-2)
            mixed = (gates[..., place, None] * qg[:, tokens, None]).flatten(-2)
            grad_states[:, read] += (mixed.transpose(-1, -2) @ go[:, tokens]).view_as(sg[:, read])
        weights.block_backward(tokens, seen, grad_gates)
    grad_u, grad_summaries, grad_logit = weights.gradients(u, summaries, online_logit)
    return (
        blocks.untokens(grad_q, q.dtype),
        grad_u,
        blocks.unmemories(grad_states, states.dtype),
        grad_summaries,
        grad_logit,
    )


def _fake(q, u, states, summaries, online_logit, birth, first, function):
    out = q.new_empty(*q.shape[:-1], states.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


def _fake_backward(grad_out, grad_online, q, u, states, summaries, online_logit, birth, first, function):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, u, states, summaries, online_logit)
    )


segment_read_op = register_op(
    "segment_read",
    segment_read_torch,
    segment_read_backward_torch,
    _fake,
    _fake_backward,
    differentiable=5,
    triton="read.segment_triton",
)


def segment_read(
    q: torch.Tensor,
    u: torch.Tensor,
    states: torch.Tensor,
    summaries: torch.Tensor,
    online_logit: torch.Tensor,
    birth: torch.Tensor,
    first: torch.Tensor,
    function: str = "softmax",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all finished segments' memories with content gates.

    Args:
        q: `[R, N, W, H, dk]` queries in the segment grid. u: `[R, N, W, H, du]` what the gates are computed from.
        states: `[R, S, H, dk, dv]`, S = cached + N: memories kept from earlier, then the end states of this grid.
        summaries: `[R, S, H, m, du]`, descriptors of the same segments, m sub-block means each.
        online_logit: `[R, N, W, H]`, logit of the online memory.
        birth: `[R, S]` integer: memory i is visible to grid segments j >= birth (0 = from the start).
        first: `[R, N]` integer: the first memory that grid segment j may see (documents packed in one row).
        function: what turns logits into gates, a name of `gates.GATE_FUNCTIONS`.
        backend: "auto", "triton" or "torch", see `choose_backend`.

    Returns:
        the gated sum over the past `[R, N, W, H, dv]` in q's dtype, and the online gate `[R, N, W, H]` in fp32.

    Raises:
        ValueError: an unknown gate function, or "triton" is not available.
    """
    widths, missing = (*states.shape[-2:], u.shape[-1]), missing_in_triton(function)
    backend = choose_backend(backend, "segment_read", q, *widths, missing=missing)
    return segment_read_op(q, u, states, summaries, online_logit, birth, first, function, backend)
