# Copyright 2026 the mc-transformers authors.
"""Borders that content chooses: which tokens end a segment, decided from the tokens up to each of them.

One decision for all layers, from the model's embeddings: their bits are the same however a text arrives and whatever a
layer in between rounds, so the same text has the same borders in one pass, in pieces and token by token.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..kernels.shared.ops import autocast_off, compute_dtype, unobserved
from .borders import NEVER, Bounds, Decided
from .segments import SegmentTable


UNITS = 2**20  # of a budget: whole numbers, so that sums are the same in any order
CUT = "cut."  # prefix of what caches hold for the next decision


@dataclass
class MCOutputWithPast(BaseModelOutputWithPast):
    """And `border_loss`, a scalar, with segmentation="content": how far the rate of borders is from the wanted one."""

    border_loss: torch.FloatTensor | None = None


@dataclass
class MCCausalLMOutputWithPast(CausalLMOutputWithPast):
    """And `border_loss`, as of `MCOutputWithPast`."""

    border_loss: torch.FloatTensor | None = None


def check_stages(layers: nn.ModuleList) -> None:
    """Refuse a stage of a pipeline: what it is given are no embeddings.

    Raises:
        ValueError: some of the layers are elsewhere.
    """
    if not all(hasattr(layer, "layer_type") for layer in layers):
        raise ValueError(
            "`segmentation`='content' is not possible in stages of a pipeline, allowed: 'constant' or 'logarithmic'"
        )


def rate_loss(rate: torch.Tensor, wish: torch.Tensor, length: float) -> torch.Tensor:
    """H-Net's loss (arXiv 2507.07955, eq. 10), which pulls from both sides: N/(N-1) ((N-1) F G + (1-F)(1-G)).

    It is 1 where F = G = 1/N; above that rate it lowers the wishes, below it raises them.

    Args:
        rate: F, borders per token, a scalar. wish: G, the mean wish for one, a scalar that has a gradient.
        length: N > 1, wanted tokens per segment.
    """
    return length / (length - 1) * ((length - 1) * rate * wish + (1 - rate) * (1 - wish))


class BorderRule(nn.Module):
    """Which tokens end their segment (segmentation="content").

    With q_t = unit(W_q x_t) and k_t = unit(W_k x_t) of the embeddings x, a token ends its segment of at least
    `least_segment_size` tokens

    * "dissimilarity": if p_t = (1 - <q_t, k_{t-1}>) / 2 >= 0.5 (H-Net; here the token that differs is the last of its
      segment, since a border must be known once a token is written);
    * "budget": if the sum of sigmoid(<w, x_t> + b) |q_t - k_{t-1}| over its segment, strength times error of a memory
      that holds the token before, is at least `border_budget`;

    and in any case if it is token number `segment_size` of it. W_q = W_k = 1, w = b = 0 at the start.
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.config, self.bounds, width = config, Bounds.of(config), config.hidden_size
        self.query = nn.Parameter(torch.empty(width, width))
        self.key = nn.Parameter(torch.empty(width, width))
        if config.border_rule == "budget":
            self.strength = nn.Parameter(torch.empty(width))
            self.strength_bias = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Neighbours are compared as they are, and every strength is one half."""
        for matrix in (self.query, self.key):
            init.copy_(matrix, torch.eye(len(matrix), device=matrix.device))
        for name in ("strength", "strength_bias"):
            if hasattr(self, name):
                init.zeros_(getattr(self, name))

    @staticmethod
    def blank(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What a cache holds before the first token, `[rows, ...]`: number and first position of the segment that goes
        on, k of the last token `[rows, width]`, and the units that were spent in the segment."""
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        key = torch.zeros(rows, width, dtype=dtype, device=device)
        return {f"{CUT}number": zero, f"{CUT}begin": zero, f"{CUT}key": key, f"{CUT}spent": zero}

    def forward(self, x: torch.Tensor, table: SegmentTable, held: dict[str, torch.Tensor]) -> SegmentTable:
        """The table of the same tokens in the segments that they choose.

        Args:
            x: `[B, T, hidden]`, embeddings. table: of these tokens, with any borders. held: tensors of a cache layer.
        """
        home, table = table.length.device, table.to(x.device)
        x = table.compact(x)
        dtype = compute_dtype(x)
        past = {
            name: held.get(name, new).to(x.device, copy=True)
            for name, new in self.blank(len(x), x.shape[-1], x.device, dtype).items()
        }
        with autocast_off(x.device):
            wish, cost, key = self._wishes(x.to(dtype), table, past)
        real = torch.arange(table.num_tokens, device=x.device) < table.length[:, None]
        with torch.no_grad():
            alone = table.num_tokens == 1 or self.config.mc_backend == "reference"
            ended = real & (self._one_by_one if alone else self._all_at_once)(cost, table, past)
            borders = self._borders(ended, cost, key, table, past)
        total = real.sum().clamp(min=1).to(dtype)
        loss = rate_loss(ended.sum() / total, (wish * real).sum() / total, self.config.mean_segment_size)
        return replace(table.cut(borders), border_loss=loss).to(home)

    def _wishes(
        self, x: torch.Tensor, table: SegmentTable, past: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For compact tokens x `[R, T, hidden]`: the wish for a border `[R, T]` from 0 to 1; units `[R, T]` int64,
        `UNITS` of which bring one (with "dissimilarity" those of one token alone); and k `[R, T, hidden]`."""
        q = F.normalize(F.linear(x, self.query.to(x.dtype)), dim=-1)
        key = F.normalize(F.linear(x, self.key.to(x.dtype)), dim=-1)
        begun = table.token_position() > 0  # else there is no token before
        before = torch.cat([past[f"{CUT}key"][:, None].to(x.dtype), key[:, :-1]], 1) * begun[..., None]
        if self.config.border_rule == "dissimilarity":
            wish = (1 - (q * before).sum(-1)) / 2 * begun
            return wish, (wish >= 0.5).long() * UNITS, key
        strength = torch.sigmoid(x @ self.strength.to(x.dtype) + self.strength_bias.to(x.dtype))
        share = strength * torch.linalg.vector_norm(q - before, dim=-1) / self.config.border_budget
        return share.clamp(max=1), (share.detach().double() * UNITS).round().long(), key

    @staticmethod
    def _stops(table: SegmentTable) -> torch.Tensor:
        """`[R, T]` int64, where in its row the sequence of every token ends; padding stands alone."""
        step = torch.arange(table.num_tokens, device=table.length.device)[None]
        if table.cu_seq_lens is None:
            return torch.where(step < table.length[:, None], table.length[:, None], step + 1)
        owner = torch.searchsorted(table.cu_seq_lens[1:].contiguous(), step, right=True)
        return table.cu_seq_lens[owner.clamp(max=table.cu_seq_lens.numel() - 2) + 1]

    def _one_by_one(self, cost: torch.Tensor, table: SegmentTable, past: dict) -> torch.Tensor:
        """Tokens `[R, T]` bool that end a segment, one after the other: decoding, and the specification."""
        offset, spent, ended = table.position - past[f"{CUT}begin"], past[f"{CUT}spent"], []
        for t, place in enumerate(table.token_position().unbind(1)):
            offset, spent = torch.where(place == 0, 0, offset), torch.where(place == 0, 0, spent)
            here = cost[:, t]
            spent = here if self.config.border_rule == "dissimilarity" else spent + here
            end = (spent >= UNITS) & (offset + 1 >= self.bounds.least) | (offset + 1 >= self.bounds.longest)
            ended.append(end)
            offset, spent = torch.where(end, 0, offset + 1), torch.where(end, 0, spent)
        return torch.stack(ended, 1)

    def _all_at_once(self, cost: torch.Tensor, table: SegmentTable, past: dict) -> torch.Tensor:
        """The same without a loop: where a segment would end is looked up for every token that it may begin with, and
        the beginnings that come true are found by doubling."""
        least, longest, device = self.bounds.least, self.bounds.longest, cost.device
        stop = self._stops(table)
        ahead = longest - 1 if table.resumed else 0  # room for the tokens of a segment that goes on
        total = ahead + table.num_tokens
        step = torch.arange(total, device=device)
        cost, stop = F.pad(cost, (ahead, 0)), F.pad(stop + ahead, (ahead, 0))
        if ahead:
            cost[:, ahead - 1] = past[f"{CUT}spent"]
            stop[:, :ahead] = ahead + table.length[:, None]
        earliest = (step + least - 1).expand_as(cost)
        if self.config.border_rule == "dissimilarity":
            place = torch.where(cost >= UNITS, step, total)
            following = F.pad(place.flip(1).cummin(1).values.flip(1), (0, 1), value=total)
            end = following.gather(1, earliest.clamp(max=total))
        else:
            spent = cost.cumsum(1)
            end = torch.searchsorted(spent, spent - cost + UNITS).maximum(earliest)
        end = end.minimum(step + longest - 1)
        true, following = end < stop, F.pad((end + 1).minimum(stop), (0, 1), value=total)
        most = self.bounds.most_begun(table.num_tokens, anywhere=True)
        most += 0 if table.cu_seq_lens is None else table.cu_seq_lens.numel()
        first = ahead - (table.position - past[f"{CUT}begin"]) if ahead else torch.zeros_like(table.position)
        number, begins = torch.arange(most, device=device), first[:, None].expand(-1, most)
        for bit in range(most.bit_length()):
            begins = torch.where(number >> bit & 1 == 1, following.gather(1, begins), begins)
            following = following.gather(1, following)
        end, true = F.pad(end, (0, 1), value=total), F.pad(true, (0, 1))
        place = torch.where(true.gather(1, begins), end.gather(1, begins), total)
        ended = torch.zeros(len(cost), total + 1, dtype=torch.bool, device=device).scatter(1, place, True)
        return ended[:, ahead:total]

    def _borders(
        self, ended: torch.Tensor, cost: torch.Tensor, key: torch.Tensor, table: SegmentTable, past: dict
    ) -> Decided:
        """From tokens `[R, T]` that end a segment, their units `[R, T]` and k `[R, T, hidden]`."""
        rows, num_tokens = ended.shape
        device, packed = ended.device, table.cu_seq_lens is not None
        before = F.pad(ended.long().cumsum(1), (1, 0))
        most = self.bounds.most_begun(num_tokens, anywhere=True)
        step = torch.arange(num_tokens, device=device)
        ends = torch.full((rows, most + 1), NEVER, device=device)
        rank = torch.where(ended, before[:, :-1], most)
        ends = ends.scatter(1, rank, torch.where(ended, step + 1, NEVER))
        number, begin, length = past[f"{CUT}number"], past[f"{CUT}begin"], table.length[:, None]
        every, last = before[:, -1:], (table.length - 1).clamp(min=0)
        stop = torch.where(every > 0, ends.gather(1, (every - 1).clamp(min=0)), 0)  # behind the last border
        spent = torch.where((step >= stop) & (step < length), cost, 0).sum(1)
        spent = spent + torch.where(every[:, 0] > 0, 0, past[f"{CUT}spent"])
        row = torch.arange(rows, device=device)
        left = {
            f"{CUT}number": number + every[:, 0],
            f"{CUT}begin": torch.where(every > 0, table.position[:, None] + stop, begin[:, None])[:, 0],
            f"{CUT}key": torch.where(length > 0, key[row, last], past[f"{CUT}key"]),
            f"{CUT}spent": spent if self.config.border_rule == "budget" else torch.zeros_like(spent),
        }
        read_back = device.type == "cpu" and not packed and not unobserved()
        sequences = table.cu_seq_lens[:-1] if packed else torch.zeros_like(table.position)
        zero = torch.zeros_like(sequences)
        return Decided(
            size=self.bounds.longest,
            shortest=self.bounds.least,
            ends=ends,
            before=before,
            row=zero if packed else row,
            place=sequences,
            position=zero if packed else table.position,
            number=zero if packed else number,
            begin=zero if packed else begin,
            after=left,
            most=int(every.max()) + 1 if read_back else None,
        )
