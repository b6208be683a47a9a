# Copyright 2026 the mc-transformers authors.
"""Context parallel training: one long sequence over several ranks, each with a run of whole segments.

With independent segments a rank needs from the ones before it only their finished memories: one gather per layer, and
the last few tokens for the convolutions. `with context_parallel(group):` is all that a forward has to stand in;
`shard_batch` cuts the batch. Docs and an example of a training step: docs/scaling.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..configuration_mc import LAYER_TYPE, MCConfig
from .borders import Borders
from .shards import Shards


IGNORED = -100  # label that the loss leaves out


_active: Shards | None = None


def active_shards() -> Shards | None:
    """The ranks that share the sequences of the next forward, or None."""
    return _active


@contextmanager
def context_parallel(group: "dist.ProcessGroup | None" = None) -> Iterator[Shards]:
    """Forwards in this block take the tokens of one rank: run number `rank` of sequences that the ranks of `group`
    (None = all) share. Every rank must hold the same number of tokens, a multiple of `segment_size`.

    The backward pass may come after the block. Gradients of parameters are this rank's share: sum them over the group.

    Raises:
        ValueError: (in the forward) a model whose segments depend on each other, or inputs with a cache, a mask or
            packed documents.
    """
    global _active
    outer, _active = _active, Shards(group, dist.get_rank(group), dist.get_world_size(group))
    try:
        yield _active
    finally:
        _active = outer


def check_shards(config: MCConfig, num_tokens: int, **given) -> None:
    """Refuse what cannot be split over ranks.

    Args:
        given: by name, inputs that must be absent.

    Raises:
        ValueError: see `context_parallel`.
    """
    needed = {
        "layer_types": (set(config.layer_types) == {LAYER_TYPE}, f"only {LAYER_TYPE!r}"),
        "aggregation": (config.aggregation != "none", "any but 'none', which is one endless segment"),
        "online_memory": (config.online_memory == "segment", "'segment'"),
        "state_init": (config.state_init == "independent", "'independent'"),
        "segmentation": (config.segmentation == "constant", "'constant'"),
        "cache_eviction": (config.max_cached_segments is None or config.cache_eviction == "oldest", "'oldest'"),
        "rope": (config.rope != "all", "'attention'"),
        "mc_backend": (config.mc_backend != "reference", "any but 'reference'"),
    }
    for field, (fits, allowed) in needed.items():
        if not fits:
            value = getattr(config, field)
            raise ValueError(f"context_parallel: `{field}`={value!r} is not valid, allowed: {allowed}")
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"context_parallel: `{name}` is not possible when ranks share a sequence, leave it out")
    if Borders.of(config).offset(num_tokens):
        raise ValueError(
            f"context_parallel: {num_tokens} tokens on this rank, allowed: a multiple of "
            f"segment_size={config.segment_size} (`shard_batch` cuts a batch so)"
        )


def shard_batch(batch: dict, config: MCConfig, group: "dist.ProcessGroup | None" = None) -> dict:
    """This rank's part of a batch that every rank of `group` holds as a whole.

    Args:
        batch: `input_ids` `[B, T]`; optional `labels` `[B, T]` (-100 = ignored) and `attention_mask` (right padding).

    Returns:
        Arguments of `MCForCausalLM.forward`: `input_ids` `[B, T']` padded at the end to whole segments on every rank,
        `use_cache=False`, and with labels the labels of the next tokens and `num_items_in_batch` of the whole batch:
        the sum of the ranks' losses is the loss of the batch.

    Raises:
        ValueError: padding that is not at the end of the rows, or keys that cannot be split.
    """
    if unknown := set(batch) - {"input_ids", "labels", "attention_mask"}:
        raise ValueError(f"shard_batch: {sorted(unknown)} cannot be split, allowed: input_ids, labels, attention_mask")
    mask = batch.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("shard_batch: `attention_mask` has padding before a token, allowed: only at the end of a row")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ids, labels = batch["input_ids"], batch.get("labels")
    borders = Borders.of(config)
    run = borders.start(borders.coarser(size).most_begun(ids.shape[1]))
    mine = slice(rank * run, (rank + 1) * run)

    def cut(x: torch.Tensor, fill: int) -> torch.Tensor:
        return F.pad(x, (0, size * run - x.shape[1]), value=fill)[:, mine].contiguous()

    part = {"input_ids": cut(ids, config.pad_token_id or 0), "use_cache": False}
    if labels is not None:
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        part["labels"] = part["shift_labels"] = cut(following, IGNORED)
        part["num_items_in_batch"] = (following != IGNORED).sum()
    return part
