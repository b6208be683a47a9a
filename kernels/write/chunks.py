"""Sub-chunks of segments: what the writes of all matrix memories share.

Whatever the rule, a matrix memory adds one outer product per token, S_t = a_t S_{t-1} + k_t u_t^T. Inside a sub-chunk
of at most CHUNK slots every pair of tokens meets in one score matrix, and between sub-chunks only the state passes.
Given the u_t, answers and gradients are the same for every rule. Derivation: docs/design.md.
"""

from collections.abc import Callable

import torch

from ..shared.ops import running_sum


CHUNK = 64  # slots per sub-chunk: the score matrix of a sub-chunk is CHUNK x CHUNK


class Chunks:
    """The grid `[R, N, W, H, d]` cut into `[R, H, M, C, d]`, M = N * P sub-chunks of C slots (at most `size`), and the
    scans over them.

    A scan goes through the P sub-chunks of all segments at once when segments are independent, and through all M
    sub-chunks when each segment starts from the last state (`carry`), except at `starts` `[R, N]`, where it is zero.
    """

    def __init__(self, grid: torch.Tensor, starts: torch.Tensor | None, carry: bool, size: int = CHUNK) -> None:
        self.num_segments, self.width = grid.shape[1:3]
        self.starts = starts
        self.size = min(size, self.width)
        self.per_segment = -(-self.width // self.size)
        self.padding = self.per_segment * self.size - self.width
        self.num = self.num_segments * self.per_segment
        # (sub-chunks, their segments, place inside the segment) of every step of a scan
        if carry:
            self.steps = [
                (slice(m, m + 1), slice(m // self.per_segment, m // self.per_segment + 1), m % self.per_segment)
                for m in range(self.num)
            ]
        else:
            self.steps = [(slice(p, None, self.per_segment), slice(None), p) for p in range(self.per_segment)]

    def cut(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.to(dtype).movedim(3, 1)  # [R, H, N, W, ...]
        if self.padding:
            x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 4) + (0, self.padding))
        return x.reshape(*x.shape[:2], self.num, self.size, *x.shape[4:])

    def join(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.reshape(*x.shape[:2], self.num_segments, self.per_segment * self.size, *x.shape[4:])
        return x[:, :, :, : self.width].movedim(1, 3).to(dtype).contiguous()

    def _reset(self, state: torch.Tensor, segments: slice) -> torch.Tensor:
        return state if self.starts is None else state.masked_fill(self.starts[:, None, segments, None, None], 0.0)

    def scan(
        self, advance: Callable, initial: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """State before every sub-chunk `[R, H, M, dk, dv]` and after every segment `[R, N, H, dk, dv]`.

        Args:
            advance: `(sub-chunks, state)` to the state after them. initial: `[R, H, dk, dv]` or None.
            k, v: the cut keys and values, which give shape and dtype.
        """
        before = k.new_empty(*k.shape[:2], self.num, k.shape[-1], v.shape[-1])
        ends = k.new_empty(*k.shape[:2], self.num_segments, k.shape[-1], v.shape[-1])
        state = torch.zeros_like(before[:, :, self.steps[0][0]])
        if initial is not None:
            state[:, :, 0] = initial
        for chunks, segments, place in self.steps:
            if place == 0:
                state = self._reset(state, segments)
            before[:, :, chunks] = state
            state = advance(chunks, state)
            if place == self.per_segment - 1:
                ends[:, :, segments] = state
        return before, ends.transpose(1, 2).contiguous()

    def scan_backward(
        self, retreat: Callable, grad_ends: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of the state after every sub-chunk `[R, H, M, dk, dv]` and of the initial state `[R, H, dk, dv]`.

        Args:
            retreat: `(sub-chunks, gradient of the state after them)` to that of the state before them.
            grad_ends: `[R, N, H, dk, dv]`, gradient of the states after the segments.
        """
        grad_ends = grad_ends.to(dtype).transpose(1, 2)
        after = grad_ends.new_empty(*grad_ends.shape[:2], self.num, *grad_ends.shape[3:])
        grad = torch.zeros_like(after[:, :, self.steps[0][0]])
        for chunks, segments, place in reversed(self.steps):
            if place == self.per_segment - 1:
                grad = grad + grad_ends[:, :, segments]
            after[:, :, chunks] = grad
            grad = retreat(chunks, grad)
            if place == 0:
                grad = self._reset(grad, segments)
        return after, grad[:, :, 0]


def decay_matrix(log_decay: torch.Tensor) -> torch.Tensor:
    """`D[t, i] = prod_{i < j <= t} a_j` for i <= t, else 0, `[..., C, C]` from log a `[..., C]`.

    A masked cumulative sum of logs and never a difference of two sums, so that a decay of exactly 0 is allowed.
    """
    size = log_decay.shape[-1]
    mask = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    terms = log_decay[..., :, None].expand(*log_decay.shape, size).masked_fill(~mask.tril(-1), 0.0)
    return running_sum(terms, -2).exp().masked_fill(~mask.tril(), 0.0)


class Decay:
    """Decay products inside sub-chunks, from log a `[R, H, M, C]`, or None for a = 1."""

    def __init__(self, log_decay: torch.Tensor | None, example: torch.Tensor) -> None:
        self.given = log_decay is not None
        if self.given:
            self.matrix, self.from_start = decay_matrix(log_decay), running_sum(log_decay, -1).exp()
        else:
            self.matrix = example.new_ones(example.shape[-2], example.shape[-2]).tril()

    def since_start(self, x: torch.Tensor) -> torch.Tensor:
        """x `[R, H, M, C, d]`, slot t times prod_{j <= t} a_j."""
        return x * self.from_start[..., None] if self.given else x

    def to_end(self, x: torch.Tensor) -> torch.Tensor:
        """x `[R, H, M, C, d]`, slot t times prod_{j > t} a_j."""
        return x * self.matrix[..., -1, :, None] if self.given else x

    def over(self, chunks: slice, state: torch.Tensor) -> torch.Tensor:
        """States `[R, H, m, dk, dv]` times the decay of whole sub-chunks."""
        return state * self.from_start[:, :, chunks, -1, None, None] if self.given else state

    def backward(self, grad_matrix: torch.Tensor, grad_from_start: torch.Tensor) -> torch.Tensor:
        """Gradient of log a from those of `matrix` and of the products since the start."""
        weighted = (grad_matrix * self.matrix).tril(-1)
        from_t_on = running_sum(weighted.flip(-2), -2).flip(
            -2
        )  # sum over t >= j; entry (t, i) holds log a_j, i < j <= t
        return from_t_on.tril(-1).sum(-1) + running_sum((grad_from_start * self.from_start).flip(-1), -1).flip(-1)


def answer_chunks(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, decay: Decay, before: torch.Tensor
) -> torch.Tensor:
    """S_t^T q_t of every slot, from q, k, u `[R, H, M, C, d]` and the states before the sub-chunks."""
    return ((q @ k.transpose(-1, -2)).mul_(decay.matrix) @ u).add_(decay.since_start(q @ before))


def answer_chunks_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    u: torch.Tensor,
    decay: Decay,
    before: torch.Tensor,
    after: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, u, decay matrix and decay since the start, through the answers and the states handed on; the
    last two are None without a decay.

    Args:
        grad: of the answers `[R, H, M, C, dv]`. before: the states before the sub-chunks. after: gradients of the
            states after them, both `[R, H, M, dk, dv]`.
    """
    scores, products = q @ k.transpose(-1, -2), grad @ u.transpose(-1, -2)
    grad_late_k, grad_early_q = u @ after.transpose(-1, -2), grad @ before.transpose(-1, -2)
    grad_matrix = grad_from_start = None
    if decay.given:
        grad_matrix = products * scores
        grad_matrix[..., -1, :] += (grad_late_k * k).sum(-1)
        grad_from_start = (grad_early_q * q).sum(-1)
        grad_from_start[..., -1] += (after * before).sum((-1, -2))
    grad_scores, scores = products.mul_(decay.matrix), scores.mul_(decay.matrix)
    grad_q = (grad_scores @ k).add_(decay.since_start(grad_early_q))
    grad_k = (grad_scores.transpose(-1, -2) @ q).add_(decay.to_end(grad_late_k))
    grad_u = (scores.transpose(-1, -2) @ grad).add_(decay.to_end(k) @ after)
    return grad_q, grad_k, grad_u, grad_matrix, grad_from_start
