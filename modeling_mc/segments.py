# Copyright 2026 the mc-transformers authors.
"""SegmentTable: which token belongs to which segment of which sequence. The only place that knows about padding,
packing, prompts fed in pieces and rows at different positions; everything else works on the segment grid. Where
segments end is asked of `Borders`."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn

from ..kernels.shared.ops import unobserved
from .borders import Borders, Number
from .moment import Moment
from .read_gates import GateLog
from .shards import Shards


def rows_where(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a` where `rows` `[B]` (or `[B, L]`) is set, else `b`."""
    return torch.where(rows.view(*rows.shape, *[1] * (a.dim() - rows.dim())), a, b)


def _each(count: Number) -> Number:
    """Tokens of a segment `[...]` against its slots `[..., W]`."""
    return count if isinstance(count, int) else count[..., None]


def _documents(cu_seq_lens: torch.Tensor | None, seq_idx: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    """`[D + 1]`, tokens before every packed document and in all, from `cu_seq_lens_q` `[D + 1]` or
    document numbers `seq_idx` `[1, T]`."""
    if cu_seq_lens is not None:
        cu_seq_lens = cu_seq_lens.reshape(-1).long()
        if not unobserved():
            values = cu_seq_lens.tolist()
            if len(values) < 2 or values != sorted(values) or (values[0], values[-1]) != (0, num_tokens):
                raise ValueError(f"`cu_seq_lens_q` must rise from 0 to {num_tokens}, all tokens, got {values}")
        return cu_seq_lens
    if seq_idx is None:
        return None
    if seq_idx.shape != (1, num_tokens):
        raise ValueError(f"`seq_idx` must have shape (1, {num_tokens}), one packed row, got {tuple(seq_idx.shape)}")
    ids = seq_idx[0]
    ends = ids.new_tensor([0, ids.numel()], dtype=torch.int64)
    return torch.cat([ends[:1], (ids[1:] != ids[:-1]).nonzero()[:, 0] + 1, ends[1:]])


def refuse_unmarked_packing(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | dict | None) -> None:
    """Positions that restart inside a row mean packed documents, whose borders a recurrent layer must know.

    Raises:
        ValueError: they do, and nothing says where documents end.
    """
    if position_ids is None or attention_mask is not None or unobserved():
        return
    if position_ids.shape[-1] > 1 and bool((position_ids[..., 1:] < position_ids[..., :-1]).any()):
        raise ValueError(
            "`position_ids` restart inside a row, which means packed documents, but their borders are missing: "
            "pass `cu_seq_lens_q` or `seq_idx` (DataCollatorWithFlattening(return_flash_attn_kwargs=True, "
            "return_seq_idx=True)), else the memory of one document leaks into the next"
        )


@dataclass
class SegmentTable:
    """Positions of a batch of tokens in segments, counted from each row's first real token.

    Built once per forward, shared by all layers. R rows (the batch, or 1 for packed documents), T tokens a row, N grid
    segments a row, W slots a segment. Shapes depend on input shapes only.

    Attributes:
        borders: where segments end. factor: how many segments of the model one of this table's is long.
        align: slot 0 of a resumed segment falls on a multiple of this (inner chunk of deep memories).
        position: `[R]` int64, tokens that each row has written before this forward.
        length: `[R]` int64, real tokens of each row in this forward.
        order: `[R, T]` the tokens with padding moved to the end, or None when there is no padding to move.
        slot: `[R, T]` the flat grid slot of every (compact) token, or None when the grid is a plain view.
        token: `[R, N * W]` the compact token in every grid slot (clamped), or None when the grid is a plain view.
        valid: `[R, N, W]` bool, slots that hold a token.
        offset: `[R, N, W]` int64, position of the slot inside its segment.
        count: `[R, N]` int64, tokens of every grid segment once it is finished; a number where all have the same.
        starts: `[R, N]` bool, first grid segment of a packed document, or None.
        document: `[N]` int64, the document of every grid segment; begin: `[D]` int64, the first grid segment of every
            document; cu_seq_lens: `[D + 1]` int64, tokens before every document and in all; all None unless documents
            are packed.
        routes: choices of segments that layers share (route_sharing="model"), by what they were made for.
        gates: where layers leave, by their number, what they read; None = nobody asks.
        moments: where tokens stand that are written one at a time, by their place in this forward.
        first: `[R, N]` int64, the first grid segment of the same sequence.
        shards: the ranks that share each row (context parallel), or None.
        border_loss: scalar, of borders that content chose (`border_rule.rate_loss`), or None.
    """

    borders: Borders
    align: int
    num_tokens: int
    num_segments: int
    width: int
    position: torch.Tensor
    length: torch.Tensor
    order: torch.Tensor | None
    mask: torch.Tensor | None
    slot: torch.Tensor | None
    token: torch.Tensor | None
    valid: torch.Tensor
    offset: torch.Tensor
    count: Number
    starts: torch.Tensor | None
    first: torch.Tensor
    cu_seq_lens: torch.Tensor | None
    document: torch.Tensor | None
    begin: torch.Tensor | None
    resumed: bool
    factor: int = 1
    shards: Shards | None = None
    border_loss: torch.Tensor | None = None
    coarse: dict[int, "SegmentTable"] = field(default_factory=dict, repr=False)
    copies: dict[torch.device, "SegmentTable"] = field(default_factory=dict, repr=False)
    routes: dict = field(default_factory=dict, repr=False)
    gates: dict[int, GateLog] | None = field(default=None, repr=False)
    moments: dict[int, Moment] = field(default_factory=dict, repr=False)

    # ------------------------------------------------------------------------------------------------ construction
    @classmethod
    def build(
        cls,
        batch_size: int,
        num_tokens: int,
        segment_size: int,
        device: torch.device,
        attention_mask: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        align: int = 1,
    ) -> "SegmentTable":
        """Args:
            attention_mask: `[B, T]` of these tokens, nonzero = real; any pattern.
            position: `[B]` int64 tokens already written per row (a cache); None = 0.
            cu_seq_lens: `[D + 1]` borders of packed documents (B = 1). seq_idx: `[1, T]` document numbers.
            align: slot 0 of a resumed segment falls on a multiple of this (inner chunk of deep memories).

        Raises:
            ValueError: no tokens, a mask of another shape, borders that do not cover the tokens, or packed documents
                with a batch of more than one row, padding or a cache.
        """
        if num_tokens == 0:
            raise ValueError("empty sequence: `input_ids` needs at least one token per row, got length 0")
        borders, cu_seq_lens = Borders(segment_size), _documents(cu_seq_lens, seq_idx, num_tokens)
        if cu_seq_lens is not None:
            if batch_size != 1 or position is not None:
                raise ValueError(
                    "packed documents (`cu_seq_lens_q` / `seq_idx`) need a batch of one row and no cache, got "
                    f"batch size {batch_size}{' and a cache' if position is not None else ''}"
                )
            if attention_mask is not None and not unobserved() and not (attention_mask != 0).all():
                raise ValueError("packed documents take no padding: `attention_mask` must be None or have no zeros")
            return cls._build_packed(borders, num_tokens, cu_seq_lens.to(device))

        order = mask = None
        length = torch.full((batch_size,), num_tokens, dtype=torch.int64, device=device)
        if attention_mask is not None:
            if attention_mask.shape != (batch_size, num_tokens):
                raise ValueError(
                    f"`attention_mask` must have shape {(batch_size, num_tokens)} (or cover the cached tokens too), "
                    f"got {tuple(attention_mask.shape)}"
                )
            cls._check_mask_values(attention_mask)
            mask = attention_mask != 0
            if device.type == "cpu" and not unobserved() and bool(mask.all()):
                mask = None  # no padding, where asking costs nothing
            else:
                rank = torch.arange(num_tokens, device=mask.device)  # no two alike: exporters know no stable sort
                order = torch.where(mask, rank, rank + num_tokens).argsort(1)
                length = mask.sum(1)

        return cls._build_rows(borders, num_tokens, align, length, position, order, mask)

    @staticmethod
    def _check_mask_values(mask: torch.Tensor) -> None:
        """A mask of numbers with a fraction may be one that is added to scores, where 0 means a token."""
        if not mask.is_floating_point() or unobserved():
            return
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"`attention_mask` of {mask.dtype} has values other than 0 and 1, allowed: 1 = a token, 0 = padding; "
                "of a mask that is added to scores (0 and -inf) pass `mask == 0`"
            )

    @classmethod
    def _build_rows(
        cls,
        borders: Borders,
        num_tokens: int,
        align: int,
        length: torch.Tensor,
        position: torch.Tensor | None,
        order: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> "SegmentTable":
        resumed, device = position is not None, length.device
        # copied: the first layer changes the counter of a static cache while the table still serves the others
        position = position.clone() if resumed else torch.zeros_like(length)
        before = borders.finished(position)[:, None]
        base = borders.offset(position)[:, None] // align * align  # offset of slot 0 in the first grid segment
        width = min(borders.longest, -(-(num_tokens + (align - 1 if resumed else 0)) // align) * align)
        num = borders.most_begun(num_tokens, anywhere=resumed)

        rank = torch.arange(num, device=device)
        column = torch.arange(width, device=device)
        offset = column + ((rank == 0) * base)[..., None]  # [R, N, W]
        number = before + rank
        count = borders.count(number)
        index = (borders.start(number) - position[:, None])[..., None] + offset
        valid = (index >= 0) & (index < length[:, None, None]) & (offset < _each(count))
        slot = token = None
        if resumed or not isinstance(count, int):
            token = index.clamp(0, num_tokens - 1).flatten(1)
            place = position[:, None] + torch.arange(num_tokens, device=device)
            segment = borders.finished(place) - before
            within = borders.offset(place) - (segment == 0) * base
            slot = (segment * width + within).clamp(max=num * width - 1)
        return cls(
            borders=borders,
            align=align,
            num_tokens=num_tokens,
            num_segments=num,
            width=width,
            position=position,
            length=length,
            order=order,
            mask=mask,
            slot=slot,
            token=token,
            valid=valid,
            offset=offset,
            count=count,
            starts=None,
            first=torch.zeros(len(length), num, dtype=torch.int64, device=device),
            cu_seq_lens=None,
            document=None,
            begin=None,
            resumed=resumed,
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "SegmentTable":
        """The same table on another device, for a model whose layers stand on several."""
        device = torch.device(device)
        if device == self.length.device:
            return self
        if device not in self.copies:
            tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), torch.Tensor)}
            moved = {name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()}
            moved["borders"] = self.borders.to(device, non_blocking)
            self.copies[device] = replace(self, **moved, coarse={}, copies={}, moments={})
        return self.copies[device]

    def coarser(self, factor: int) -> "SegmentTable":
        """The same tokens in segments that are `factor` times as long (one level of logarithmic segmentation)."""
        if factor == 1:
            return self
        if factor not in self.coarse:
            self.coarse[factor] = replace(self.cut(self.borders.coarser(factor)), factor=self.factor * factor)
        return self.coarse[factor]

    def cut(self, borders: Borders) -> "SegmentTable":
        """The same tokens in segments with other borders."""
        if self.cu_seq_lens is not None:
            table = self._build_packed(borders, self.num_tokens, self.cu_seq_lens)
        else:
            position = self.position if self.resumed else None
            rows = (self.length, position, self.order, self.mask)
            table = self._build_rows(borders, self.num_tokens, self.align, *rows)
        return replace(table, shards=self.shards, routes=self.routes)

    @classmethod
    def _build_packed(cls, borders: Borders, num_tokens: int, cu_seq_lens: torch.Tensor) -> "SegmentTable":
        device, documents = cu_seq_lens.device, cu_seq_lens.numel() - 1
        num = borders.most_finished(num_tokens) + documents  # bound: shapes must not depend on the values
        width = min(borders.longest, num_tokens)
        lengths = cu_seq_lens.diff()
        segments = (borders.finished(lengths.clamp(min=1) - 1) + 1) * (lengths > 0)
        cumulative = segments.cumsum(0)
        rank = torch.arange(num, device=device)
        document = torch.searchsorted(cumulative, rank, right=True)
        known = document.clamp(max=documents - 1)
        first = (cumulative - segments)[known]
        within = rank - first
        column = torch.arange(width, device=device)
        inside = borders.of_rows(known)
        count = inside.count(within)
        index = (cu_seq_lens[known] + inside.start(within))[:, None] + column
        valid = (index < cu_seq_lens[known + 1][:, None]) & (document < documents)[:, None]
        valid = valid & (column < _each(count))
        token_range = torch.arange(num_tokens, device=device)
        owner = torch.searchsorted(cu_seq_lens[1:].contiguous(), token_range, right=True).clamp(max=documents - 1)
        place = token_range - cu_seq_lens[owner]
        inside = borders.of_rows(owner)
        slot = ((cumulative - segments)[owner] + inside.finished(place)) * width + inside.offset(place)
        return cls(
            borders=borders,
            align=1,
            num_tokens=num_tokens,
            num_segments=num,
            width=width,
            position=torch.zeros(1, dtype=torch.int64, device=device),
            length=torch.full((1,), num_tokens, dtype=torch.int64, device=device),
            order=None,
            mask=None,
            slot=slot[None],
            token=index.clamp(0, num_tokens - 1).reshape(1, -1),
            valid=valid[None],
            offset=column.expand(1, num, width),
            count=count if isinstance(count, int) else count[None],
            starts=(rank == first)[None],
            first=first[None],
            cu_seq_lens=cu_seq_lens,
            document=known,
            begin=cumulative - segments,
            resumed=False,
        )

    # --------------------------------------------------------------------------------------------- moving tokens
    @staticmethod
    def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`x[r, index[r, i]]` for x `[R, L, ...]` and index `[R, I]`."""
        return x[torch.arange(x.shape[0], device=x.device)[:, None], index]

    def compact(self, x: torch.Tensor) -> torch.Tensor:
        """`[R, T, ...]` with each row's real tokens first, and zeros (also for NaN) where there was padding."""
        if self.order is None:
            return x
        real = torch.arange(self.num_tokens, device=x.device) < self.length[:, None]
        return torch.where(real.view(*real.shape, *[1] * (x.dim() - 2)), self._take(x, self.order), 0)

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `compact`; zero at padding."""
        if self.order is None:
            return x
        x = self._take(x, self.order.argsort(1))
        return torch.where(self.mask.view(*self.mask.shape, *[1] * (x.dim() - 2)), x, 0)

    def to_grid(self, x: torch.Tensor) -> torch.Tensor:
        """Compact tokens `[R, T, ...]` to the segment grid `[R, N, W, ...]`; slots without a token are not cleared."""
        if self.token is not None:
            x = self._take(x, self.token)
        elif (spare := self.num_segments * self.width - self.num_tokens) > 0:
            x = nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, spare))
        return x.reshape(x.shape[0], self.num_segments, self.width, *x.shape[2:])

    def from_grid(self, x: torch.Tensor) -> torch.Tensor:
        """Segment grid `[R, N, W, ...]` to compact tokens `[R, T, ...]`."""
        x = x.flatten(1, 2)
        return x[:, : self.num_tokens] if self.slot is None else self._take(x, self.slot)

    def clear(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Fill the slots of a grid tensor `[R, N, W, ...]` that hold no token."""
        return x.masked_fill(~self.valid.view(*self.valid.shape, *[1] * (x.dim() - 3)), value)

    def convolve(
        self, conv: Callable[[torch.Tensor], torch.Tensor], reach: int, x: torch.Tensor, tail: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal depthwise convolution and SiLU of compact tokens `[R, T, C]`, that never cross a document border.

        Args:
            conv: a `ShortConv` of K taps. reach: K - 1. tail: `[R, K - 1, C]`, what came before; None = zeros.

        Returns:
            `[R, T, C]`, and the new tail: each row's last K - 1 real tokens.
        """
        rows, num_tokens, channels = x.shape
        if self.cu_seq_lens is not None:  # K - 1 zeros in front of every document
            tokens = torch.arange(num_tokens, device=x.device)
            owner = torch.searchsorted(self.cu_seq_lens[1:].contiguous(), tokens, right=True)
            place = tokens + owner * reach
            context = x.new_zeros(rows, num_tokens + (self.cu_seq_lens.numel() - 1) * reach, channels)
            context = context.index_copy(1, place + reach, x)
            return conv(context)[:, place], x.new_zeros(rows, reach, channels)
        if self.shards is not None:
            tail = self.shards.tail(x, reach)
        context = self._behind(x, tail, reach)
        if self.order is None:
            return conv(context), context[:, num_tokens:].clone()
        return conv(context), self._tails(x, tail, reach, self.length[:, None])[:, 0]

    @staticmethod
    def _behind(x: torch.Tensor, tail: torch.Tensor | None, reach: int) -> torch.Tensor:
        """Compact tokens `[R, T, C]` behind the `reach` ones that came before them, zeros if there were none."""
        tail = x.new_zeros(len(x), reach, x.shape[-1]) if tail is None else tail.to(x.dtype)
        return torch.cat([tail, x], 1)

    def _tails(self, x: torch.Tensor, tail: torch.Tensor | None, reach: int, count: torch.Tensor) -> torch.Tensor:
        """The last `reach` of the first `count` `[R, n]` compact tokens: `[R, n, reach, C]`."""
        place = count[..., None] + torch.arange(reach, device=x.device)
        return self._take(self._behind(x, tail, reach), place.flatten(1)).unflatten(1, place.shape[1:])

    def tails(self, x: torch.Tensor, tail: torch.Tensor | None, reach: int) -> torch.Tensor:
        """What a convolution has to know at the end of every grid segment: the last `reach` compact tokens there,
        `[R, N, reach, C]`; of segments that do not end here they mean nothing. x, tail: as in `convolve`."""
        count = self.borders.start(self.number + 1) - self.position[:, None]
        return self._tails(x, tail, reach, count.clamp(0, self.num_tokens))

    # ------------------------------------------------------------------------------------------- segments in time
    def token_position(self) -> torch.Tensor:
        """`[R, T]` int64, position of every compact token in its sequence."""
        steps = torch.arange(self.num_tokens, device=self.position.device)
        if self.cu_seq_lens is None:
            return self.position[:, None] + steps
        owner = torch.searchsorted(self.cu_seq_lens[1:].contiguous(), steps, right=True)
        return (steps - self.cu_seq_lens[owner.clamp(max=self.cu_seq_lens.numel() - 2)])[None]

    def _finished(self, position: torch.Tensor) -> torch.Tensor:
        """`[R]`; of packed documents the first one stands for the row, which has no past."""
        borders = self.borders if self.cu_seq_lens is None else self.borders.of_rows(slice(0, 1))
        return borders.finished(position)

    @property
    def finished_before(self) -> torch.Tensor:
        """`[R]` segments that each row had finished before this forward."""
        return self._finished(self.position)

    @property
    def finished_after(self) -> torch.Tensor:
        return self._finished(self.next_position)

    @property
    def next_position(self) -> torch.Tensor:
        return self.position + self.length

    @property
    def number(self) -> torch.Tensor:
        """`[R, N]` int64, the number of every grid segment in its sequence."""
        return self.finished_before[:, None] + torch.arange(self.num_segments, device=self.first.device) - self.first

    def finishes(self) -> torch.Tensor:
        """`[R, N]` bool, grid segments whose last token is written in this forward."""
        return (self.valid & (self.offset + 1 == _each(self.count))).any(-1)

    def running_index(self) -> torch.Tensor:
        """`[R]` grid segment that is unfinished after this forward; num_segments if the next one has not begun."""
        return self.finished_after - self.finished_before

    def fresh(self, carry: bool) -> torch.Tensor:
        """`[R, N]` bool, grid segments that start from the initial state and not from what was before."""
        if carry:
            return torch.zeros_like(self.first, dtype=torch.bool) if self.starts is None else self.starts
        return (torch.arange(self.num_segments, device=self.first.device) > 0).expand_as(self.first)

    def first_of_level(self, coarse: "SegmentTable") -> torch.Tensor:
        """`[R, N]`: where the sequence of each grid segment begins in the grid of a coarser table."""
        return torch.zeros_like(self.first) if self.cu_seq_lens is None else coarse.begin[self.document][None]
