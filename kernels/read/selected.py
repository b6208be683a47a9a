"""Sparse selective caching (eq. 16, 17): top-k routing, and the read of just the chosen memories.

The read is grouped: (token, memory) pairs are sorted by memory and cut into tiles of one memory each, so that a memory
is fetched once per tile and k products per token are computed, whatever the number of segments.
"""

import torch

from ..shared.ops import budget, choose_backend, compute_dtype, register_op
from .gates import HIDDEN, choose_best, first_readable, gate_logits, hidden_memories


ROUTE_BUDGET = 2**19  # elements of one block of scores, tokens x segments


def segment_route_torch(
    u: torch.Tensor, summaries: torch.Tensor, birth: torch.Tensor, first: torch.Tensor, top_k: int
) -> torch.Tensor:
    """See `segment_route`."""
    rows, num, width, heads, _ = u.shape
    memories = summaries.shape[1]
    groups, top_k = rows * heads, min(top_k, memories)
    ug = u.to(compute_dtype(u)).movedim(3, 1).reshape(groups, num, width, -1)
    zg = summaries.to(ug.dtype).movedim(2, 1).reshape(groups, memories, *summaries.shape[3:])
    chosen = torch.empty(groups, num, width, top_k, dtype=torch.int64, device=u.device)
    readable = first_readable(first)
    widest = max((memories - num + n + 1 - low for n, low in enumerate(readable)), default=memories)
    step = max(1, budget(u.device, ROUTE_BUDGET) // max(1, groups * width * widest))
    for start in range(0, num, step):
        stop = min(start + step, num)
        visible = max(top_k, memories - num + stop)  # later memories are hidden from all of this block
        seen = slice(max(0, min(visible - top_k, *readable[start:stop])), visible)
        logits, _ = gate_logits(ug[:, start:stop].flatten(1, 2), zg[:, seen])
        hidden = hidden_memories(birth, first, slice(start, stop), seen).repeat_interleave(heads, 0)[:, :, None]
        logits = logits.view(groups, stop - start, width, -1).masked_fill_(hidden, HIDDEN)
        best = choose_best(logits, top_k)
        chosen[:, start:stop] = torch.where(best < 0, best, best + seen.start)
    return chosen.view(rows, heads, num, width, top_k).movedim(1, 3).contiguous()


segment_route_op = register_op(
    "segment_route",
    segment_route_torch,
    fake=lambda u, summaries, birth, first, top_k: u.new_empty(
        *u.shape[:-1], min(top_k, summaries.shape[1]), dtype=torch.int64
    ),
    triton="read.route_triton",
)


def segment_route(
    u: torch.Tensor,
    summaries: torch.Tensor,
    birth: torch.Tensor,
    first: torch.Tensor,
    top_k: int,
    backend: str = "auto",
) -> torch.Tensor:
    """The k past segments that score highest, per token and head (eq. 16); no gradient.

    Args: as in `segment_read`; top_k >= 1.

    Returns:
        `[R, N, W, H, min(top_k, S)]` int64, indices into the S memories, -1 where fewer are visible.
    """
    backend = choose_backend(backend, "segment_route", u, u.shape[-1])
    return segment_route_op(u.detach(), summaries.detach(), birth, first, top_k, backend)


class Tiles:
    """(token, choice) pairs sorted by memory, cut into tiles of at most `size` pairs that share one memory.

    The last tile belongs to nobody: pairs without a memory find their answer there, which is zero.
    """

    def __init__(self, index: torch.Tensor, num_memories: int, largest: int = 256) -> None:
        rows, num, width, heads, self.top_k = index.shape
        device, exporting = index.device, torch.compiler.is_compiling()
        row = torch.arange(rows, device=device).view(-1, 1, 1, 1, 1)
        head = torch.arange(heads, device=device).view(-1, 1)
        groups = rows * num_memories * heads
        key = torch.where(index < 0, groups, (row * num_memories + index) * heads + head).flatten()
        key, pair = key.sort(stable=not exporting)  # exporters know no stable one; answers are the same
        counts = torch.searchsorted(key, torch.arange(groups + 1, device=device)).diff()
        average = key.numel() // max(1, groups)
        self.size = max(16, min(largest, 1 << max(average - 1, 1).bit_length()))
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
