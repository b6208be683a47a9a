"""Sparse selective caching (eq. 16, 17): top-k routing, and the read of just the chosen memories.

The read is grouped: (token, memory) pairs are sorted by memory and cut into tiles of one memory each, so that a memory
is fetched once per tile and k products per token are computed, whatever the number of segments.
"""

from collections.abc import Iterator

import torch

from ..shared.ops import budget, choose_backend, compute_dtype, register_op
from .gates import HIDDEN, first_readable, gate_logits, gate_logits_backward, hidden_memories, largest


ROUTE_BUDGET = 2**19  # elements of one block of scores, tokens x segments


class _Routes:
    """Blocks of query segments, with the memories that they may see at most."""

    def __init__(self, u, summaries, birth, first, top_k: int) -> None:
        self.rows, self.num, self.width, self.heads, _ = u.shape
        self.birth, self.first, self.memories = birth, first, summaries.shape[1]
        self.groups, self.top_k = self.rows * self.heads, min(top_k, self.memories)
        self.u = self.tokens(u, compute_dtype(u))
        self.summaries = summaries.to(self.u.dtype).movedim(2, 1).flatten(0, 1)  # [G, S, m, d]

    def tokens(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[R, N, W, H, d]` to `[G, N, W, d]`."""
        return x.to(dtype).movedim(3, 1).reshape(self.groups, self.num, self.width, -1)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.rows, self.heads, self.num, self.width, -1).movedim(1, 3).contiguous()

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        readable, old = first_readable(self.first), self.memories - self.num
        widest = max((old + n + 1 - low for n, low in enumerate(readable)), default=self.memories)
        step = max(1, budget(self.u.device, ROUTE_BUDGET) // max(1, self.groups * self.width * widest))
        for start in range(0, self.num, step):
            stop = min(start + step, self.num)
            visible = max(self.top_k, old + stop)  # later memories are hidden from all of this block
            yield slice(start, stop), slice(max(0, min(visible - self.top_k, *readable[start:stop])), visible)

    def hidden(self, segments: slice, seen: slice) -> torch.Tensor:
        return hidden_memories(self.birth, self.first, segments, seen).repeat_interleave(self.heads, 0)[:, :, None]


def segment_route_torch(
    u: torch.Tensor, summaries: torch.Tensor, birth: torch.Tensor, first: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `segment_route`."""
    routes = _Routes(u, summaries, birth, first, top_k)
    chosen = torch.empty(*routes.u.shape[:-1], top_k, dtype=torch.int64, device=u.device)
    best = routes.u.new_empty(chosen.shape)
    for segments, seen in routes.blocks():
        logits, _ = gate_logits(routes.u[:, segments].flatten(1, 2), routes.summaries[:, seen])
        logits = logits.unflatten(1, (-1, routes.width)).masked_fill_(routes.hidden(segments, seen), HIDDEN)
        best[:, segments], index = largest(logits, top_k)
        chosen[:, segments] = torch.where(index < 0, index, index + seen.start)
    return routes.join(chosen), routes.join(best)


def segment_route_backward_torch(
    grad_index: torch.Tensor | None,
    grad_logits: torch.Tensor,
    u: torch.Tensor,
    summaries: torch.Tensor,
    birth: torch.Tensor,
    first: torch.Tensor,
    top_k: int,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of u and summaries: products with gradients of all logits, which are zero where nothing was chosen."""
    routes = _Routes(u, summaries, birth, first, top_k)
    chosen, grad = routes.tokens(index, index.dtype), routes.tokens(grad_logits, routes.u.dtype)
    grad_u, grad_summaries = torch.empty_like(routes.u), torch.zeros_like(routes.summaries)
    for segments, seen in routes.blocks():
        tokens, read = routes.u[:, segments].flatten(1, 2), routes.summaries[:, seen]
        choice = gate_logits(tokens, read)[1] if read.shape[2] > 1 else None
        place, count = chosen[:, segments].flatten(1, 2), seen.stop - seen.start
        place = torch.where(place < 0, count, place - seen.start)  # behind the last: what was not chosen
        every = tokens.new_zeros(*place.shape[:2], count + 1)
        every = every.scatter_(-1, place, grad[:, segments].flatten(1, 2))[..., :count]
        block, grad_read = gate_logits_backward(every, choice, tokens, read)
        grad_u[:, segments] = block.view_as(grad_u[:, segments])
        grad_summaries[:, seen] += grad_read
    grad_summaries = grad_summaries.view(routes.rows, routes.heads, *grad_summaries.shape[1:]).transpose(1, 2)
    return routes.join(grad_u).to(u.dtype), grad_summaries.to(summaries.dtype).contiguous()


def _fake_route(u, summaries, birth, first, top_k):
    shape = (*u.shape[:-1], top_k)
    return u.new_empty(shape, dtype=torch.int64), u.new_empty(shape, dtype=compute_dtype(u))


segment_route_op = register_op(
    "segment_route",
    segment_route_torch,
    segment_route_backward_torch,
    _fake_route,
    lambda grad_index, grad_logits, u, summaries, *rest: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, summaries)
    ),
    differentiable=2,
    triton="read.route_triton",
    keeps=1,
)


def segment_route(
    u: torch.Tensor,
    summaries: torch.Tensor,
    birth: torch.Tensor,
    first: torch.Tensor,
    top_k: int,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k past segments that score highest, per token and head (eq. 16), and their scores.

    Args: as in `segment_read`; top_k >= 1.

    Returns:
        `[R, N, W, H, k]` int64, indices into the S memories, -1 where fewer are visible; and their logits, -inf there,
        in fp32 (float64 for float64), differentiable with respect to u and summaries.
    """
    backend = choose_backend(backend, "segment_route", u, u.shape[-1])
    return segment_route_op(u, summaries, birth, first, top_k, backend)


class Tiles:
    """(token, choice) pairs sorted by memory, cut into tiles of at most `size` pairs that share one memory; None: as
    many as memories have on average.

    The last tile belongs to nobody: pairs without a memory find their answer there, which is zero.
    """

    def __init__(self, index: torch.Tensor, num_memories: int, size: int | None = None) -> None:
        rows, num, width, heads, self.top_k = index.shape
        device, exporting = index.device, torch.compiler.is_compiling()
        row = torch.arange(rows, device=device).view(-1, 1, 1, 1, 1)
        head = torch.arange(heads, device=device).view(-1, 1)
        groups = rows * num_memories * heads
        key = torch.where(index < 0, groups, (row * num_memories + index) * heads + head).flatten()
        key, pair = key.sort(stable=not exporting)  # exporters know no stable one; answers are the same
        counts = torch.searchsorted(key, torch.arange(groups + 1, device=device)).diff()
        average = key.numel() // max(1, groups)
        self.size = size or max(16, min(256, 1 << max(average - 1, 1).bit_length()))
        tiles = (counts + self.size - 1) // self.size
        last_tile, last_pair = tiles.cumsum(0), counts.cumsum(0)
        self.borders = torch.cat([last_tile.new_zeros(1), last_tile])  # memory i has the tiles borders[i : i + 1]
        # on a GPU the number of tiles stays an upper bound: reading it back would stall the queue
        counted = device.type == "cpu" and not exporting
        self.num = 1 + (int(last_tile[-1]) if counted else key.numel() // self.size + groups)
        tile = torch.arange(self.num, device=device)
        self.memory = torch.searchsorted(last_tile, tile, right=True).clamp(max=groups - 1)
        known = key.clamp(max=groups - 1)
        rank = torch.arange(len(key), device=device) - (last_pair - counts)[known]  # of a pair in its memory
        slot = torch.where(key < groups, (last_tile - tiles)[known] * self.size + rank, self.num * self.size - 1)
        self.place = torch.empty_like(slot).index_copy_(0, pair, slot)
        source = torch.full_like(tile, -1).repeat_interleave(self.size).index_copy_(0, slot, pair)
        source[-1] = -1
        self.filled, self.source = source >= 0, source.clamp(min=0)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """One row per token and head `[P, d]` to `[tiles, size, d]`; any row where there is no pair."""
        return x.index_select(0, self.source // self.top_k).view(self.num, self.size, x.shape[-1])

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """A number per pair `[P, k]` to `[tiles, size, 1]`; zero where there is no pair."""
        return (weights.flatten()[self.source] * self.filled).view(self.num, self.size, 1)

    def scatter(self, y: torch.Tensor) -> torch.Tensor:
        """`[tiles, size, d]`, whose last tile is cleared, to one row per pair `[P, k, d]`."""
        y[-1] = 0
        return y.flatten(0, 1).index_select(0, self.place).view(-1, self.top_k, y.shape[-1])


def selected_read_torch(
    q: torch.Tensor, weights: torch.Tensor, states: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """See `selected_read`."""
    dtype, tiles = compute_dtype(q), Tiles(index, states.shape[1])
    flat = states.to(dtype).flatten(0, 2)
    answers = tiles.scatter(tiles.gather(q.to(dtype).flatten(0, 3)) @ flat.index_select(0, tiles.memory))
    out = answers.mul_(weights.to(dtype).flatten(0, 3)[..., None]).sum(1)
    return out.view(*q.shape[:-1], states.shape[-1]).to(q.dtype)


def selected_read_backward_torch(
    grad_out: torch.Tensor, q: torch.Tensor, weights: torch.Tensor, states: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, weights and states."""
    dtype, tiles = compute_dtype(q), Tiles(index, states.shape[1])
    flat = states.to(dtype).flatten(0, 2)
    chosen = flat.index_select(0, tiles.memory)
    flat_q, flat_w = q.to(dtype).flatten(0, 3), weights.to(dtype).flatten(0, 3)
    grads = tiles.gather(grad_out.to(dtype).flatten(0, 3))
    back = tiles.scatter(grads @ chosen.transpose(-1, -2))  # S_i do_t, one row per pair
    grad_w = (back * flat_q[:, None]).sum(-1)
    grad_q = back.mul_(flat_w[..., None]).sum(1)
    weighted = tiles.gather(flat_q).mul_(tiles.spread(flat_w))
    grad_states = torch.zeros_like(flat).index_add_(0, tiles.memory, weighted.transpose(-1, -2) @ grads)
    return (
        grad_q.view_as(q).to(q.dtype),
        grad_w.view_as(weights).to(weights.dtype),
        grad_states.view_as(states).to(states.dtype),
    )


selected_read_op = register_op(
    "selected_read",
    selected_read_torch,
    selected_read_backward_torch,
    lambda q, weights, states, index: q.new_empty(*q.shape[:-1], states.shape[-1]),
    lambda grad, q, weights, states, index: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, weights, states)
    ),
    differentiable=3,
    triton="read.selected_triton",
)


def selected_read(
    q: torch.Tensor, weights: torch.Tensor, states: torch.Tensor, index: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """`sum_c weights_tc S_{index_tc}^T q_t` over the k chosen memories of every token and head.

    Args:
        q: `[R, N, W, H, dk]`. weights: `[R, N, W, H, k]`, 0 where index is -1. states: `[R, S, H, dk, dv]`.
        index: `[R, N, W, H, k]` int64 into the S memories, or -1.
        backend: "auto", "triton" or "torch", see `choose_backend`.

    Returns:
        `[R, N, W, H, dv]` in q's dtype, differentiable with respect to q, weights and states.
    """
    backend = choose_backend(backend, "selected_read", q, *states.shape[-2:])
    return selected_read_op(q, weights, states, index, backend)
