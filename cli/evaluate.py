# Copyright 2026 the mc-transformers authors.
"""Held-out loss of a text file by position: does the model still gain from tokens that are far back?"""

import hashlib
import json
import math
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


FIRST_RANGE = 64  # positions of the first range; every further one is as long as all before it
HEAD_CHUNK = 1024  # positions whose logits exist at the same time


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def position_ranges(length: int) -> list[tuple[int, int]]:
    """Ranges of predicted positions in a block of `length` tokens, doubling; position 0 is not predicted."""
    borders = [1]
    while borders[-1] < length:
        borders.append(min(length, max(FIRST_RANGE, 2 * borders[-1])))
    return list(zip(borders, borders[1:], strict=False))


def blocks_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """`[N, length]` consecutive blocks of the text's tokens; what does not fill a block is left out.

    Raises:
        ValueError: the text does not fill one block.
    """
    ids = tokenizer(text, verbose=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < length:
        remedy = f"--length must be <= {len(ids)}" if len(ids) > 1 else "a text of two tokens or more is needed"
        raise ValueError(f"the text has {len(ids)} tokens and does not fill one block of {length}: {remedy}")
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def position_losses(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 1) -> torch.Tensor:
    """Mean loss in nats of every position 1 .. length - 1 over the blocks `[N, length]`, fp64 `[length - 1]`."""
    total = torch.zeros(blocks.shape[1] - 1, dtype=torch.float64)
    for batch in tqdm(blocks.split(batch_size), desc="eval", unit="batch"):
        batch = batch.to(model.device)
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
        for start in range(0, len(total), HEAD_CHUNK):
            stop = min(start + HEAD_CHUNK, len(total))
            logits = model.lm_head(hidden[:, start:stop]).float().transpose(1, 2)
            losses = F.cross_entropy(logits, batch[:, start + 1 : stop + 1], reduction="none")
            total[start:stop] += losses.double().sum(0).cpu()
    return total / len(blocks)


def evaluate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path, length: int, batch_size: int = 1
) -> dict:
    """The record of `mc-transformers eval`, with a "results" list that model cards read.

    Raises:
        ValueError: the file is not text, or does not fill one block. OSError: there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    blocks = blocks_of(text, tokenizer, length)
    losses = position_losses(model, blocks, batch_size)
    mean = losses.mean().item()
    settings = f"{len(blocks)} blocks of {length} tokens"
    common = {"dataset": Path(path).name, "settings": settings}
    return {
        "text": {"name": Path(path).name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "blocks": len(blocks),
        "length": length,
        "positions": [
            {"first": first, "last": stop - 1, "loss": losses[first - 1 : stop - 1].mean().item()}
            for first, stop in position_ranges(length)
        ],
        "results": [
            {"metric": "loss", "unit": "nats per token", "value": mean, **common},
            {"metric": "perplexity", "unit": "", "value": perplexity(mean), **common},
        ],
    }


def to_json(record: dict) -> str:
    return json.dumps(record, indent=2) + "\n"
