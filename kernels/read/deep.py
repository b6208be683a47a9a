"""Reads of finished deep memories: sums over i of g_ti M_i(q_t), M(x) = x + LN(gelu(x W2) W1), see `deep_common`.

Three ways to weigh them: content gates (GRM, eq. 9), a top-k choice with given weights (eq. 17), all alike (eq. 7).
With W_t = sum_i g_ti the answer is `W_t (q_t + shift) + scale * sum_i g_ti n_ti`, n the normalised inner answers. The
hidden activations of a block of (token, memory) pairs live as long as the block; the backward computes them again.
"""

import torch
from torch.nn import functional as F

from ..shared.deep import Norm, gelu_backward, per_head
from ..shared.ops import WIDEST_DEEP, choose_backend, compute_dtype, register_op
from .gates import missing_in_triton
from .segment import BlockGates, Blocks
from .selected import Tiles


class _Inner:
    """n for tokens x `[P, T, d]` in P memories: inner answers, normalised if `norm`."""

    def __init__(self, x: torch.Tensor, w2: torch.Tensor, w1: torch.Tensor, norm: bool) -> None:
        self.x, self.w2, self.w1 = x, w2, w1
        self.z = torch.bmm(x, w2)
        self.hidden = F.gelu(self.z)
        self.norm = Norm(torch.bmm(self.hidden, w1), norm)
        self.n = self.norm.n

    def backward(self, grad_n: torch.Tensor, grad_w2: torch.Tensor, grad_w1: torch.Tensor) -> torch.Tensor:
        """Gradient of x; those of w2 and w1 are added to the arguments."""
        grad_r = self.norm.backward(grad_n)
        grad_w1.baddbmm_(self.hidden.transpose(1, 2), grad_r)
        grad_z = gelu_backward(torch.bmm(grad_r, self.w1.transpose(1, 2)), self.z)
        grad_w2.baddbmm_(self.x.transpose(1, 2), grad_z)
        return torch.bmm(grad_z, self.w2.transpose(1, 2))


class _Reader:
    """Reads of all memories of a batch with given gates, block by block.

    Shapes: G = rows x heads, T tokens and s memories of a block; q `[G, N * W, d]`, maps `[S, G, ...]`.
    """

    def __init__(self, q, w2, w1, scale, shift, first=None) -> None:
        self.dtype = compute_dtype(q)
        self.blocks = Blocks(q, w2.shape[1], w2.shape[-1], first)
        self.q = self.blocks.tokens(q, self.dtype)
        self.w2, self.w1 = (w.to(self.dtype).transpose(0, 1).flatten(1, 2).contiguous() for w in (w2, w1))
        self.has_norm = scale is not None
        self.scale = per_head(scale, self.blocks.rows, self.dtype) if self.has_norm else 1.0
        # what the sum of the gates multiplies
        self.centre = self.q + per_head(shift, self.blocks.rows, self.dtype) if self.has_norm else self.q

    def _inner(self, tokens: slice, read: slice) -> _Inner:
        w2, w1 = self.w2[read], self.w1[read]
        x = self.q[:, tokens].expand(len(w2), -1, -1, -1)
        return _Inner(x.flatten(0, 1), w2.flatten(0, 1), w1.flatten(0, 1), self.has_norm)

    def block(self, tokens: slice, seen: slice, gates: torch.Tensor) -> torch.Tensor:
        """The answers `[G, T, d]` of one block of tokens with gates `[G, T, V]` of the memories `seen`."""
        total = torch.zeros_like(self.q[:, tokens])
        for place, read in self.blocks.reads(seen):
            n = self._inner(tokens, read).n.unflatten(0, (-1, len(gates)))
            total += (n * gates[..., place].permute(2, 0, 1)[..., None]).sum(0)
        return gates.sum(-1, keepdim=True) * self.centre[:, tokens] + self.scale * total

    def begin_backward(self, grad_out: torch.Tensor) -> None:
        self.grad_out = self.blocks.tokens(grad_out, self.dtype)
        self.grad_q, self.grad_w2, self.grad_w1 = (x.new_zeros(x.shape) for x in (self.q, self.w2, self.w1))
        self.grad_scale, self.grad_shift = (torch.zeros_like(self.q[:, 0]) for _ in range(2))

    def block_backward(self, tokens: slice, seen: slice, gates: torch.Tensor) -> torch.Tensor:
        """Gradient `[G, T, V]` of the gates; those of q and of the parameters add up inside."""
        grad = self.grad_out[:, tokens]
        scaled, total = grad * self.scale, torch.zeros_like(grad)
        grad_gates = (grad * self.centre[:, tokens]).sum(-1, keepdim=True).repeat(1, 1, gates.shape[-1])
        grad_q = gates.sum(-1, keepdim=True) * grad
        for place, read in self.blocks.reads(seen):
            inner, weight = self._inner(tokens, read), gates[..., place].permute(2, 0, 1)[..., None]  # [s, G, T, 1]
            n = inner.n.unflatten(0, (-1, len(gates)))
            total += (n * weight).sum(0)
            grad_gates[..., place] += (n * scaled).sum(-1).permute(1, 2, 0)
            maps = self.grad_w2[read].flatten(0, 1), self.grad_w1[read].flatten(0, 1)
            grad_q += inner.backward((weight * scaled).flatten(0, 1), *maps).view_as(n).sum(0)
        self.grad_q[:, tokens] += grad_q
        self.grad_scale += (total * grad).sum(1)
        self.grad_shift += (gates.sum(-1, keepdim=True) * grad).sum(1)
        return grad_gates

    def gradients(self, q, w2, w1, scale, shift) -> tuple[torch.Tensor, ...]:
        """Of q, w2, w1, scale and shift, in their layouts and dtypes."""
        maps = zip((self.grad_w2, self.grad_w1), (w2, w1), strict=True)
        return (
            self.blocks.untokens(self.grad_q, q.dtype),
            *(g.unflatten(1, (len(w), -1)).transpose(0, 1).to(w.dtype).contiguous() for g, w in maps),
            *_norm_gradients(self.grad_scale, self.grad_shift, scale, shift, q),
        )


def _norm_gradients(grad_scale, grad_shift, scale, shift, q) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients `[H, d]` from those per row and head `[R * H, d]`; empty tensors without a norm."""
    if scale is None:
        return q.new_empty(0), q.new_empty(0)
    return tuple(
        grad.view(-1, *like.shape).sum(0).to(like.dtype) for grad, like in ((grad_scale, scale), (grad_shift, shift))
    )


def _like(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Fake gradients."""
    empty = inputs[0].new_empty(0)
    return tuple(empty if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


# --------------------------------------------------------------------------------------------------- content gates
def deep_read_torch(
    q: torch.Tensor,
    u: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    summaries: torch.Tensor,
    online_logit: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    birth: torch.Tensor,
    first: torch.Tensor,
    function: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deep_read`."""
    reader = _Reader(q, w2, w1, scale, shift, first)
    blocks = reader.blocks
    weights = BlockGates(blocks, u, summaries, online_logit, birth, first, function, reader.dtype)
    out, online_gate = torch.zeros_like(reader.q), torch.empty_like(weights.online_logit)
    for segments, tokens, seen in blocks.queries():
        gates, online_gate[:, tokens] = weights.block(segments, tokens, seen)
        out[:, tokens] = reader.block(tokens, seen, gates)
    return blocks.untokens(out, q.dtype), blocks.untokens(online_gate, reader.dtype)


def deep_read_backward_torch(
    grad_out: torch.Tensor,
    grad_online: torch.Tensor,
    q: torch.Tensor,
    u: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    summaries: torch.Tensor,
    online_logit: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    birth: torch.Tensor,
    first: torch.Tensor,
    function: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """Gradients of q ... shift (empty tensors without a norm)."""
    reader = _Reader(q, w2, w1, scale, shift, first)
    blocks = reader.blocks
    weights = BlockGates(blocks, u, summaries, online_logit, birth, first, function, reader.dtype)
    reader.begin_backward(grad_out)
    weights.begin_backward(blocks.tokens(grad_online, reader.dtype))
    for segments, tokens, seen in blocks.queries():
        gates, _ = weights.block(segments, tokens, seen)
        weights.block_backward(tokens, seen, reader.block_backward(tokens, seen, gates))
    grad_q, grad_w2, grad_w1, grad_scale, grad_shift = reader.gradients(q, w2, w1, scale, shift)
    grad_u, grad_summaries, grad_logit = weights.gradients(u, summaries, online_logit)
    return grad_q, grad_u, grad_w2, grad_w1, grad_summaries, grad_logit, grad_scale, grad_shift


deep_read_op = register_op(
    "deep_read",
    deep_read_torch,
    deep_read_backward_torch,
    lambda q, *rest: (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:-1], dtype=compute_dtype(q)),
    ),
    lambda *args: _like(*args[2:10]),
    differentiable=8,
    triton="read.deep_triton",
)


def deep_read(
    q: torch.Tensor,
    u: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    summaries: torch.Tensor,
    online_logit: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    birth: torch.Tensor,
    first: torch.Tensor,
    function: str = "softmax",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all finished deep memories with content gates (eq. 9).

    Args:
        w2, w1: `[R, S, H, d, h]` and `[R, S, H, h, d]`, S = cached + N. scale, shift: `[H, d]` of LN, or None without.
        q, u, summaries, online_logit, birth, first, function: see `segment.segment_read`.
        backend: "auto", "triton" or "torch", see `choose_backend`; Triton has heads up to WIDEST_DEEP wide.

    Returns:
        the gated sum over the past `[R, N, W, H, d]` in q's dtype, and the online gate `[R, N, W, H]` in fp32.

    Raises:
        ValueError: an unknown gate function, or "triton" is not available.
    """
    widths, missing = (q.shape[-1], u.shape[-1]), missing_in_triton(function)
    backend = choose_backend(backend, "deep_read", q, *widths, widest=WIDEST_DEEP, missing=missing)
    return deep_read_op(q, u, w2, w1, summaries, online_logit, scale, shift, birth, first, function, backend)


# ------------------------------------------------------------------------------------------------------- all alike
def _visible_gates(reader: _Reader, visible: torch.Tensor, segments: slice, seen: slice) -> torch.Tensor:
    """`[G, T, V]`, 1 for those of the memories `seen` that a token may read."""
    gates = visible[:, segments, seen].to(reader.dtype)
    return gates.repeat_interleave(reader.blocks.heads, 0).repeat_interleave(reader.blocks.width, 1)


def deep_constant_read_torch(
    q: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    visible: torch.Tensor,
) -> torch.Tensor:
    """See `deep_constant_read`."""
    reader = _Reader(q, w2, w1, scale, shift)
    out = torch.zeros_like(reader.q)
    for segments, tokens, seen in reader.blocks.queries():
        out[:, tokens] = reader.block(tokens, seen, _visible_gates(reader, visible, segments, seen))
    return reader.blocks.untokens(out, q.dtype)


def deep_constant_read_backward_torch(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    visible: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q ... shift (empty tensors without a norm)."""
    reader = _Reader(q, w2, w1, scale, shift)
    reader.begin_backward(grad_out)
    for segments, tokens, seen in reader.blocks.queries():
        reader.block_backward(tokens, seen, _visible_gates(reader, visible, segments, seen))
    return reader.gradients(q, w2, w1, scale, shift)


deep_constant_read_op = register_op(
    "deep_constant_read",
    deep_constant_read_torch,
    deep_constant_read_backward_torch,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
    lambda *args: _like(*args[1:6]),
    differentiable=5,
    triton="read.deep_constant_triton",
)


def deep_constant_read(
    q: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    visible: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """The sum of the answers of all visible memories (eq. 7).

    Args:
        q: `[R, N, W, H, d]`. w2, w1, scale, shift: see `deep_read`. visible: `[R, N, S]` bool; the end state of grid
            segment n is memory S - N + n, which only later segments may see. backend: see `deep_read`.

    Returns:
        `[R, N, W, H, d]` in q's dtype.
    """
    backend = choose_backend(backend, "deep_constant_read", q, q.shape[-1], widest=WIDEST_DEEP)
    return deep_constant_read_op(q, w2, w1, scale, shift, visible, backend)


# ---------------------------------------------------------------------------------------------------- top-k choice
TILE_BUDGET = 2**22  # elements of the largest temporary of one block of tiles


class _TileReader:
    """Reads of chosen memories, one tile of (token, choice) pairs per memory, some tiles at a time."""

    def __init__(self, q, weights, w2, w1, scale, shift, index) -> None:
        self.dtype, self.has_norm = compute_dtype(q), scale is not None
        self.tiles = Tiles(index, w2.shape[1])
        self.w2, self.w1 = (w.to(self.dtype).flatten(0, 2) for w in (w2, w1))
        self.q, self.weights = (x.to(self.dtype).flatten(0, 3) for x in (q, weights))
        self.x = self.tiles.gather(self.q)
        # one scale and shift per token and head
        self.norm = [None if x is None else x.to(self.dtype).repeat(len(self.q) // len(x), 1) for x in (scale, shift)]
        self.scale, self.centre = (self.norm[0], self.q + self.norm[1]) if self.has_norm else (1.0, self.q)

    def steps(self):
        """Tiles of one step, and their n."""
        per_tile = max(self.tiles.size * self.w2.shape[-1], self.w2[0].numel())
        size = max(1, TILE_BUDGET // per_tile)
        for start in range(0, self.tiles.num, size):
            step = slice(start, start + size)
            memory = self.tiles.memory[step]
            yield step, memory, _Inner(self.x[step], self.w2[memory], self.w1[memory], self.has_norm)

    def mix(self, n: torch.Tensor) -> torch.Tensor:
        """Answers `[P, d]` from n of all pairs `[P, k, d]`."""
        return self.weights.sum(-1, keepdim=True) * self.centre + self.scale * (self.weights[:, None] @ n)[:, 0]


def deep_selected_read_torch(
    q: torch.Tensor,
    weights: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    index: torch.Tensor,
) -> torch.Tensor:
    """See `deep_selected_read`."""
    reader = _TileReader(q, weights, w2, w1, scale, shift, index)
    n = torch.empty_like(reader.x)
    for step, _, inner in reader.steps():
        n[step] = inner.n
    return reader.mix(reader.tiles.scatter(n)).view(q.shape).to(q.dtype)


def deep_selected_read_backward_torch(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    weights: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, weights, w2, w1, scale and shift (empty tensors without a norm)."""
    reader = _TileReader(q, weights, w2, w1, scale, shift, index)
    tiles, grad = reader.tiles, grad_out.to(reader.dtype).flatten(0, 3)
    grad_n = tiles.gather(grad * reader.scale).mul_(tiles.spread(reader.weights))
    n, grad_x = torch.empty_like(reader.x), torch.empty_like(reader.x)
    grad_w2, grad_w1 = torch.zeros_like(reader.w2), torch.zeros_like(reader.w1)
    for step, memory, inner in reader.steps():
        n[step] = inner.n
        maps = torch.zeros_like(inner.w2), torch.zeros_like(inner.w1)
        grad_x[step] = inner.backward(grad_n[step], *maps)
        for grad_map, found in zip((grad_w2, grad_w1), maps, strict=True):
            grad_map.index_add_(0, memory, found)
    n = tiles.scatter(n)
    total = reader.weights.sum(-1, keepdim=True)
    grad_weights = (n @ (grad * reader.scale)[..., None])[..., 0] + (grad * reader.centre).sum(-1, keepdim=True)
    grad_q = total * grad + tiles.scatter(grad_x).sum(1)
    grad_scale = grad * (reader.weights[:, None] @ n)[:, 0]
    heads = q.shape[3]
    norm = (x.view(-1, heads, x.shape[-1]).sum(0) for x in (grad_scale, total * grad))
    return (
        grad_q.view(q.shape).to(q.dtype),
        grad_weights.view(weights.shape).to(weights.dtype),
        grad_w2.view(w2.shape).to(w2.dtype),
        grad_w1.view(w1.shape).to(w1.dtype),
        *_norm_gradients(*norm, scale, shift, q),
    )


deep_selected_read_op = register_op(
    "deep_selected_read",
    deep_selected_read_torch,
    deep_selected_read_backward_torch,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
    lambda *args: _like(*args[1:7]),
    differentiable=6,
    triton="read.deep_selected_triton",
)


def deep_selected_read(
    q: torch.Tensor,
    weights: torch.Tensor,
    w2: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    index: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """`sum_c weights_tc M_{index_tc}(q_t)` over the k chosen memories of every token and head (eq. 17).

    Args:
        q: `[R, N, W, H, d]`. weights: `[R, N, W, H, k]`, 0 where index is -1. w2, w1, scale, shift: see `deep_read`.
        index: `[R, N, W, H, k]` int64 into the S memories, or -1. backend: see `deep_read`.

    Returns:
        `[R, N, W, H, d]` in q's dtype, differentiable with respect to everything but index.
    """
    backend = choose_backend(backend, "deep_selected_read", q, q.shape[-1], widest=WIDEST_DEEP)
    return deep_selected_read_op(q, weights, w2, w1, scale, shift, index, backend)
