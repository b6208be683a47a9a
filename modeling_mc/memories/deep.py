# Copyright 2026 the mc-transformers authors.
"""Deep memories: per head a two-layer MLP M(x) = x + LN(gelu(x W2) W1), trained by gradient steps while it reads.

    S_t = b_t S_{t-1} - e_t grad l(C; k_t, v_t)          W_t = a_t W_{t-1} + S_t          (eq. 30-36)

with the gradient taken at the maps C at the start of the inner chunk of `memory_chunk_size` tokens that holds t.
Subclasses choose the loss l, and whether there are momentum b and decay a. Maps are stored as `[d_in, d_out]`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...kernels.read.deep import deep_constant_read, deep_read, deep_selected_read
from ...kernels.shared.deep import ANSWER, NOTHING, Norm, gelu_backward
from ...kernels.write.chunks import Decay
from ...kernels.write.deep import deep_write
from ..segments import SegmentTable, rows_where
from ..tensor_parallel import HeadShare
from .base import Bias, Memory, State, Trace, compute_dtype


PIECE = 16  # inner chunks of one `deep_write`: autograd keeps the maps between two pieces and nothing inside of one
STEP_SIZE = 0.1  # eta_base


def products(log_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of factors f from log f `[..., c]`: `prod_{i < j <= t} f_j` as `[..., t, i]`, and `prod_{j <= t} f_j`."""
    decay = Decay(log_factor, log_factor[..., None])
    return decay.matrix, decay.from_start


class Layout:
    """A segment grid `[R, N, W, ...]` cut into the calls of `deep_write`: B rows each, `steps` segments one after the
    other, and long segments in pieces of PIECE chunks."""

    def __init__(self, rows: int, num: int, width: int, chunk: int, carry: bool) -> None:
        self.rows, self.num, self.width, self.chunk = rows, num, width, chunk
        self.batch, self.steps = (rows, num) if carry else (rows * num, 1)
        self.chunks = -(-width // chunk)
        self.pieces = -(-self.chunks // PIECE)

    def chunked(self, x: torch.Tensor) -> torch.Tensor:
        """`[R, N, W, ...]` to `[B, steps, chunks, chunk, ...]`; zeros where there are too few slots."""
        if spare := self.chunks * self.chunk - self.width:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, spare))
        return x.reshape(self.batch, self.steps, self.chunks, self.chunk, *x.shape[3:])

    def cut(self, x: torch.Tensor | None) -> list[torch.Tensor | None]:
        """`[B, steps, chunks, ...]` to one `[B, chunks of the piece, ...]` per call."""
        if x is None:
            return [None] * (self.steps * self.pieces)
        return [part for step in x.unbind(1) for part in step.split(PIECE, 1)]

    def tokens(self, x: torch.Tensor) -> list[torch.Tensor]:
        """`[R, N, W, ...]` to one `[B, slots of the piece, ...]` per call."""
        return [part.flatten(1, 2) for part in self.cut(self.chunked(x))]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Inverse of `tokens`."""
        steps = [torch.cat(parts[i : i + self.pieces], 1) for i in range(0, len(parts), self.pieces)]
        x = torch.stack(steps, 1)
        return x.view(self.rows, self.num, x.shape[2], *x.shape[3:])[:, :, : self.width]

    def running(self, table: SegmentTable) -> torch.Tensor:
        """Index of the unfinished segment of every sequence, the only one whose C and S are needed; 0 for every row
        where a later call needs all of them."""
        if self.steps > 1 or self.pieces > 1 or self.num == 1:
            return torch.zeros(self.batch, dtype=torch.int64, device=table.valid.device)
        return table.running_index().clamp(max=self.num - 1)

    def ends(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One `[B, H, ...]` (or one per sequence) per step to `[R, N, H, ...]`."""
        if self.steps == 1 and len(parts[0]) == self.rows:
            return parts[0][:, None].expand(-1, self.num, *parts[0].shape[1:])
        return torch.stack(parts, 1).view(self.rows, self.num, *parts[0].shape[1:])


class DeepTrace(Trace):
    """Traces of a deep memory. An answer that was not computed while writing is found by writing once more.

    Args:
        layout: of the grid. calls: inputs of `deep_write` after q, one tuple per call in the order of time.
        loss, backend: see `deep_write`. q: `[R, N, W, H, dk]`. ends: see `Trace`. ready: `(read, x, y)`, the answer
            that is already there.
    """

    def __init__(
        self, layout: Layout, calls: list[tuple], loss: str, backend: str, q: torch.Tensor, ends: State, ready: tuple
    ) -> None:
        self.layout, self.calls, self.loss, self.backend = layout, calls, loss, backend
        self.q, self.ends, self.ready = q, ends, ready

    @property
    def online(self) -> torch.Tensor:
        return self._answer(ANSWER, self.q)

    def read_map(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return self._answer(index, x)

    def _answer(self, read: int, x: torch.Tensor) -> torch.Tensor:
        if read == self.ready[0] and x is self.ready[1]:
            return self.ready[2]
        parts = zip(self.layout.tokens(x), self.calls, strict=True)
        kind = {"loss": self.loss, "read": read, "backend": self.backend}
        return self.layout.join([deep_write(part, *call, **kind)[0] for part, call in parts])


class HeadLayerNorm(nn.Module):
    """Scale and shift `[H, d]` of a layer norm per head. A call gives them, of this rank's heads: it fetches weights
    that are offloaded."""

    share: HeadShare | None = None

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width))
        self.bias = nn.Parameter(torch.empty(num_heads, width))

    def init_weights(self) -> None:
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.share is None:
            return self.weight, self.bias
        return self.share.part(self.weight), self.share.part(self.bias)


class DeepMemory(Memory):
    """State: maps W2, W1; maps C2, C1 at the start of the running inner chunk; with momentum S2, S1; and `[num, H]`
    how many tokens the running chunk holds.

    Class attributes:
        loss: "dot" (-<M(k), v>) or "l2" (|M(k) - v|^2). momentum: whether there is an S.
    """

    num_read = num_maps = 2
    has_triton = True
    loss: str
    momentum: bool

    def __init__(self, config) -> None:
        super().__init__(config)
        hidden = config.memory_expansion * self.key_dim
        self.chunk = config.memory_chunk_size
        # not zero: a memory that starts at zero never learns; and not small: a first step moves the answers by about
        # eta / std^2 of their size
        start = partial(init.normal_, std=self.key_dim**-0.5)
        self.initial_state_0 = Bias((self.num_heads, self.key_dim, hidden), start)
        self.initial_state_1 = Bias((self.num_heads, hidden, self.value_dim), start)
        self.head_norm = HeadLayerNorm(self.num_heads, self.value_dim) if config.memory_head_norm else None

    @classmethod
    def check(cls, config) -> None:
        cls.check_square(config)
        if config.segment_size % config.memory_chunk_size:
            config.refuse("memory_chunk_size", f"a divisor of segment_size={config.segment_size}")

    @property
    def first_read(self) -> int:
        """What `write` answers with: the whole memory, or its first map, from which soup goes on map by map."""
        return 0 if self.config.aggregation == "soup" else ANSWER

    @property
    def norm(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scale and shift `[H, dv]` of the layer norm at the end of a read, or None."""
        return (None, None) if self.head_norm is None else self.head_norm()

    @property
    def align(self) -> int:
        return self.chunk

    def coefficients(
        self, gates: dict[str, torch.Tensor], valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """`mix`, `enter`, `leave` and `trans` of `deep_write` for chunks of c tokens.

        Args:
            gates: `[..., H, c]`, neutral where there is no token. valid: `[..., 1, c]` bool.
        """
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- the state
    def initial_state(self, num: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        learned = (self.initial_state_0, self.initial_state_1)
        maps = tuple(part(dtype).to(device).expand(num, -1, -1, -1) for part in learned)
        momentum = tuple(torch.zeros_like(part) for part in maps) if self.momentum else ()
        return (*maps, *maps, *momentum, torch.zeros(num, self.num_heads, device=device, dtype=dtype))

    # --------------------------------------------------------------------------------------------------- one token
    def step(self, state: State, k, v, gates) -> State:
        w2, w1, c2, c1, *momentum, count = state
        begins = (count == 0)[..., None, None]
        c2, c1 = torch.where(begins, w2, c2), torch.where(begins, w1, c1)
        factors = self._gradients(k.to(w2.dtype), v.to(w2.dtype), c2, c1)
        step = -gates["step"][..., None]
        decay = gates["log_decay"].exp()[..., None, None] if "log_decay" in gates else None
        maps, moved = [], []
        for i, (w, (f, g)) in enumerate(zip((w2, w1), factors, strict=True)):
            f, g = f[..., None], (step * g)[..., None, :]
            if self.momentum:
                moved.append(torch.addcmul(gates["log_momentum"].exp()[..., None, None] * momentum[i], f, g))
                maps.append(moved[i] + w if decay is None else torch.addcmul(moved[i], decay, w))
            else:
                maps.append(torch.addcmul(w if decay is None else decay * w, f, g))
        return (*maps, c2, c1, *moved, (count + 1) % self.chunk)

    def _gradients(self, k, v, c2, c1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Gradients f^T g of the loss of one token, k and v `[..., d]`, with respect to both maps: their (f, g)."""
        z = (k[..., None, :] @ c2)[..., 0, :]
        a = F.gelu(z)
        weight, bias = self.norm
        norm = Norm((a[..., None, :] @ c1)[..., 0, :], weight is not None)
        e = -v if self.loss == "dot" else 2 * (self._answer(k, norm.n) - v)
        d1 = norm.backward(e if weight is None else e * weight.to(e.dtype))
        d2 = gelu_backward((c1 @ d1[..., None])[..., 0], z)
        return [(k, d2), (a, d1)]

    def read(self, state: State, q: torch.Tensor) -> torch.Tensor:
        w2, w1 = state
        x = q.to(w2.dtype)
        return self.finish(x, (F.gelu(x[..., None, :] @ w2) @ w1)[..., 0, :])

    # ------------------------------------------------------------------------------------------------- whole grids
    def write(self, q, k, v, gates, table: SegmentTable, state: State | None, carry: bool) -> Trace:
        layout = Layout(*q.shape[:3], self.chunk, carry)
        read = self.first_read if table.factor == 1 else NOTHING  # longer segments (logarithmic) are only written
        norm = self.norm
        maps = self._start(layout, state, q.device, compute_dtype(q))
        calls, answers, ends, run = [], [], [], layout.running(table)
        for number, (queries, inputs, begun) in enumerate(self._inputs(layout, q, k, v, gates, table)):
            step, piece = number // layout.pieces, number % layout.pieces  # torch.compile lacks divmod of its sizes
            if step > 0 and piece == 0 and table.starts is not None:
                maps = self._restart(maps, table.starts[:, step])
            begun = begun.unflatten(0, (len(run), -1))[torch.arange(len(run), device=q.device), run]
            last = (begun * torch.arange(begun.shape[1], device=q.device)).amax(1)
            calls.append((*inputs, *maps, *norm, run, last))
            kind = {"loss": self.loss, "read": read, "backend": self.backend}
            answer, *end = deep_write(queries, *calls[-1], **kind)
            answers.append(answer)
            if piece > 0:  # without a token in this piece, the running inner chunk is an earlier one
                end[2:4] = (rows_where(begun.any(1), c, old) for c, old in zip(end[2:4], ends.pop()[2:4], strict=True))
            ends.append(end)
            maps = (*end[:2], None, None, *(end[4:] if self.momentum else (None, None)))
        answer = layout.join(answers)
        count = table.valid.sum(-1).to(maps[0].dtype)
        if state is not None:
            count = torch.cat([count[:, :1] + state[-1][:, :1], count[:, 1:]], 1)
        count = (count % self.chunk)[..., None].expand(-1, -1, self.num_heads)
        parts = zip(*(end if self.momentum else end[:4] for end in ends), strict=True)
        ends = (*map(layout.ends, parts), count)
        return DeepTrace(layout, calls, self.loss, self.backend, q, ends, (read, q, answer))

    def _inputs(self, layout: Layout, q, k, v, gates, table) -> Iterator[tuple]:
        """Per call: queries; keys, values and coefficients; which chunks hold a token `[B, chunks]`."""
        valid = layout.chunked(table.valid)
        gates = {name: layout.chunked(gate).movedim(-1, -2) for name, gate in gates.items()}
        coefficients = self.coefficients(gates, valid[..., None, :])
        cut = (layout.tokens(k), layout.tokens(v), *map(layout.cut, coefficients))
        return zip(layout.tokens(q), zip(*cut, strict=True), layout.cut(valid.any(-1)), strict=True)

    def _start(self, layout: Layout, state: State | None, device: torch.device, dtype: torch.dtype) -> tuple:
        """W2, W1, C2, C1, S2, S1 of the first call, `[B, H, ...]`; None for C = W and for S = 0."""
        if state is None:
            return (*self.initial_state(layout.batch, device, dtype)[:2], None, None, None, None)
        *parts, count = state
        begins = (count == 0)[..., None, None]
        parts[2:4] = (torch.where(begins, w, c) for w, c in zip(parts[:2], parts[2:4], strict=True))
        if layout.batch > layout.rows:  # all segments but the first start from M_0
            fresh = self.initial_state(layout.batch - layout.rows, device, dtype)
            fresh = [part.unflatten(0, (layout.rows, -1)) for part in fresh[:-1]]
            parts = [torch.cat([x[:, None], y], 1).flatten(0, 1) for x, y in zip(parts, fresh, strict=True)]
        return tuple(parts) if self.momentum else (*parts, None, None)

    def _restart(self, maps: tuple, rows: torch.Tensor) -> tuple:
        """Maps at the start of a segment, from the initial state in the rows `[B]` where a document begins."""
        fresh = self.initial_state(len(rows), rows.device, maps[0].dtype)
        w2, w1, _, _, *momentum = maps
        momentum = [None if s is None else rows_where(rows, torch.zeros_like(s), s) for s in momentum]
        return (rows_where(rows, fresh[0], w2), rows_where(rows, fresh[1], w1), None, None, *momentum)

    # ------------------------------------------------------------------------------------------------------- reads
    def between(self, index: int, z: torch.Tensor) -> torch.Tensor:
        return F.gelu(z)

    def finish(self, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return self._answer(q, Norm(r, self.head_norm is not None).n)

    def _answer(self, q: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """M(q) from the normalised output n of the maps."""
        weight, bias = self.norm
        return q + (n if weight is None else torch.addcmul(bias.to(n.dtype), n, weight.to(n.dtype)))

    def gated_read(self, q, u, states, summaries, online_logit, birth, first, function):
        gating = (summaries, online_logit, *self.norm, birth, first, function)
        return deep_read(q, u, *states, *gating, self.backend)

    def selected_read(self, q, weights, states, index):
        return deep_selected_read(q, weights, *states, *self.norm, index, self.backend)

    def constant_read(self, q: torch.Tensor, states: State, visible: torch.Tensor) -> torch.Tensor:
        return deep_constant_read(q, *states, *self.norm, visible, self.backend)
