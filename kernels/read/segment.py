"""Gated read of every cached memory: the past part of GRM (eq. 9, 10) for matrix memories, gate and read in one pass.

    o_t = sum_i g_ti S_i^T q_t ,   g_t = softmax over (past segments i, online) of <u_t, summary_i>

The softmax includes the online memory's logit; the op returns the past part and the gate that is left for the online
answer. Gates are recomputed in the backward: nothing of size tokens x segments is kept between the two passes.
"""

import torch

from ..shared.ops import budget, choose_backend, compute_dtype, register_op


BUDGET = 2**19  # elements of the largest temporary, tokens x segments x head width, of one block


def gate_logits(u: torch.Tensor, summaries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`<u_t, summary_i>` `[G, T, N]` from u `[G, T, d]` and summaries `[G, N, m, d]`; the maximum over the m sub-block
    means of a segment, and its index (None for m = 1)."""
    groups, segments, blocks, width = summaries.shape
    logits = u @ summaries.reshape(groups, segments * blocks, width).transpose(-1, -2)
    if blocks == 1:
        return logits, None
    best = logits.view(groups, u.shape[1], segments, blocks).max(-1)
    return best.values, best.indices


class Blocks:
    """Row and head as one batch dimension, and the (query segments) x (read segments) blocks to walk through.

    Args:
        q: `[R, N, W, H, dk]`. num_memories: S. pair_width: elements that one (token, memory) pair needs.
    """

    def __init__(self, q: torch.Tensor, num_memories: int, pair_width: int) -> None:
        self.rows, self.num, self.width, self.heads, _ = q.shape
        self.cached = num_memories - self.num
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

    def queries(self) -> list[tuple[slice, slice, int]]:
        """For every block of query segments: the segments, their tokens, how many memories they can see at most."""
        blocks = []
        for start in range(0, self.num, self.query_step):
            stop = min(start + self.query_step, self.num)
            tokens = slice(start * self.width, stop * self.width)
            blocks.append((slice(start, stop), tokens, self.cached + stop - 1))
        return blocks

    def reads(self, visible: int) -> list[slice]:
        return [slice(i, min(i + self.read_step, visible)) for i in range(0, visible, self.read_step)]


class Gates:
    """Content gates over past memories and the online one, for one block of tokens at a time, and their gradients.

    Args: see `segment_read`.
    """

    def __init__(self, blocks: Blocks, u, summaries, online_logit, birth, first, function: str, dtype) -> None:
        self.blocks, self.birth, self.first, self.function = blocks, birth, first, function
        self.u, self.online_logit = blocks.tokens(u, dtype), blocks.tokens(online_logit, dtype)
        self.summaries = blocks.memories(summaries, dtype)

    def block(self, segments: slice, tokens: slice, visible: int):
        """Gates of past memories `[G, T, V]`, of the online one `[G, T]`, which sub-block mean set each logit."""
        blocks = self.blocks
        logits, choice = gate_logits(self.u[:, tokens], self.summaries[:, :visible])
        rank = torch.arange(segments.start, segments.stop, device=logits.device)
        slot = torch.arange(visible, device=logits.device)
        hidden = (self.birth[:, None, :visible] > rank[:, None]) | (slot < self.first[:, segments, None])
        hidden = hidden.repeat_interleave(blocks.heads, 0).repeat_interleave(blocks.width, 1)
        logits = logits.masked_fill(hidden, float("-inf"))
        online = self.online_logit[:, tokens]
        if self.function == "sigmoid":
            return logits.sigmoid(), online.sigmoid(), choice
        gates = torch.cat([logits, online[..., None]], -1).softmax(-1)
        return gates[..., :-1], gates[..., -1], choice

    def begin_backward(self, grad_out, out, grad_online, online) -> None:
        """Takes outputs of the read and their gradients, `[G, N * W, ...]`."""
        self.grad_u, self.grad_summaries = torch.zeros_like(self.u), torch.zeros_like(self.summaries)
        if self.function == "sigmoid":
            self.shared = None
            self.grad_logit = grad_online * online * (1 - online)
        else:  # the softmax pull-back's common term: the sum of gate x its gradient
            self.shared = (grad_out * out).sum(-1) + grad_online * online
            self.grad_logit = online * (grad_online - self.shared)

    def block_backward(self, tokens: slice, gates, choice, grad_gates) -> None:
        """Adds what the gradient `[G, T, V]` of one block's gates gives to those of u and the summaries."""
        if self.shared is None:
            grad_logits = grad_gates * gates * (1 - gates)
        else:
            grad_logits = gates * (grad_gates - self.shared[:, tokens, None])
        visible = grad_logits.shape[-1]
        if choice is not None:
            spread = grad_logits.new_zeros(*grad_logits.shape, self.summaries.shape[2])
            grad_logits = spread.scatter_(-1, choice[..., None], grad_logits[..., None])
        grad_logits = grad_logits.reshape(*grad_logits.shape[:2], -1)  # [G, T, V * m]
        self.grad_u[:, tokens] = grad_logits @ self.summaries[:, :visible].flatten(1, 2)
        grad_z = grad_logits.transpose(-1, -2) @ self.u[:, tokens]
        self.grad_summaries[:, :visible] += grad_z.view(-1, visible, *self.summaries.shape[2:])

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
    dtype, blocks = compute_dtype(q), Blocks(q, states.shape[1], q.shape[-1])
    gates_of = Gates(blocks, u, summaries, online_logit, birth, first, function, dtype)
    qg, sg = blocks.tokens(q, dtype), blocks.memories(states, dtype)
    out = qg.new_zeros(*qg.shape[:-1], states.shape[-1])
    online_gate = qg.new_empty(qg.shape[:-1])
    for segments, tokens, visible in blocks.queries():
        gates, online_gate[:, tokens], _ = gates_of.block(segments, tokens, visible)
        for read in blocks.reads(visible):
            mixed = (gates[..., read, None] * qg[:, tokens, None]).flatten(-2)
            out[:, tokens] += mixed @ sg[:, read].flatten(1, 2)
    return blocks.untokens(out, q.dtype), blocks.untokens(online_gate, dtype)


def segment_read_backward_torch(
    grad_out: torch.Tensor,
    grad_online: torch.Tensor,
    saved_out: torch.Tensor,
    saved_online: torch.Tensor,
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
    dtype, blocks = compute_dtype(q), Blocks(q, states.shape[1], q.shape[-1])
    gates_of = Gates(blocks, u, summaries, online_logit, birth, first, function, dtype)
    qg, go, gg, out, online = (blocks.tokens(x, dtype) for x in (q, grad_out, grad_online, saved_out, saved_online))
    sg = blocks.memories(states, dtype)
    grad_q, grad_states = torch.zeros_like(qg), torch.zeros_like(sg)
    gates_of.begin_backward(go, out, gg, online)
    for segments, tokens, visible in blocks.queries():
        if visible == 0:
            continue
        gates, _, choice = gates_of.block(segments, tokens, visible)
        grad_gates = torch.empty_like(gates)
        for read in blocks.reads(visible):
            back = torch.einsum("gtv,gskv->gtsk", go[:, tokens], sg[:, read])
            # products and sums: as matrix products the many tiny matrices would be slow
            grad_gates[..., read] = (back * qg[:, tokens, None]).sum(-1)
            grad_q[:, tokens] += back.mul_(gates[..., read, None]).sum(-2)
            mixed = (gates[..., read, None] * qg[:, tokens, None]).flatten(-2)
            grad_states[:, read] += (mixed.transpose(-1, -2) @ go[:, tokens]).view_as(sg[:, read])
        gates_of.block_backward(tokens, gates, choice, grad_gates)
    grad_u, grad_summaries, grad_logit = gates_of.gradients(u, summaries, online_logit)
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


def _fake_backward(
    grad_out, grad_online, saved_out, saved_online, q, u, states, summaries, online_logit, birth, first, function
):
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
        function: "softmax" over the visible memories and the online one, or "sigmoid", each gate on its own.
        backend: "auto", "triton" or "torch", see `choose_backend`.

    Returns:
        the gated sum over the past `[R, N, W, H, dv]` in q's dtype, and the online gate `[R, N, W, H]` in fp32.
    """
    backend = choose_backend(backend, "segment_read", q, *states.shape[-2:], u.shape[-1])
    return segment_read_op(q, u, states, summaries, online_logit, birth, first, function, backend)
