"""A byte-level language model of source code: does a memory help late in a document?

Trains on windows of the source of Python's standard library, and measures the loss on held-out files by the position
of the byte in its file, far beyond the length of training. A model that was trained without caching is also read with
caching afterwards (`aggregation="mean"`, no new weights) if `also` says so:

    python -m benchmarks.tasks.language --memory gated_linear --aggregation grm
    python -m benchmarks.tasks.language --memory gated_linear --aggregation none --also mean
"""

import json
import shlex
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import HfArgumentParser, PreTrainedModel

from benchmarks.tasks.experiment import (
    ExperimentConfig,
    OutputConfig,
    Result,
    build_model,
    option,
    save_checkpoint,
    save_json,
    train,
)
from benchmarks.tasks.text import byte_ids, library_texts
from mc_transformers import MCConfig, MCForCausalLM, byte_tokenizer


@dataclass
class LanguageConfig(ExperimentConfig):
    """One run. Every field is a command-line option."""

    memory: str = option("gated_linear", "write rule of the memory")
    segment_size: int = option(64, "tokens per segment")
    layers: int = option(2, "number of layers")
    width: int = option(64, "hidden size")
    heads: int = option(2, "heads per layer")
    mlp_width: int = option(128, "hidden size of the MLP")
    output_gate: bool = option(True, "gate the mixer's output")
    init_std: float = option(0.05, "standard deviation of initial weights")
    steps: int = option(500, "training steps")
    batch: int = option(16, "sequences per step")
    lr: float = option(4e-3, "peak learning rate of AdamW")
    schedule: str = option("cosine", "learning rate schedule, a name of Transformers")
    weight_decay: float = option(0.1, "weight decay of matrices")
    eval_every: int = option(250, "steps between evaluations")
    train_length: int = option(256, "bytes per training sequence, T")
    eval_length: int = option(4096, "bytes of every held-out file, a power of two times T")
    quotes: int = option(0, "bytes of the pieces that a sequence's second half repeats of its first; 0: plain text")
    also: list[str] = field(
        default_factory=list, metadata={"help": "rules to read the trained model with as well: mean, mean/checkpoint"}
    )


def position_losses(
    model: PreTrainedModel, documents: torch.Tensor, first: int, far: torch.Tensor | None = None
) -> dict[str, dict]:
    """Loss by position in the document.

    Args:
        documents: int64 [documents, length + 1]. first: end of the first range; every further one is twice as long.
        far: `far_repeats` of the documents, to tell these bytes from the others.

    Returns:
        per range "a-b" of predicted bytes a <= position < b: "nats" per byte, and "error", the standard error of the
        documents' means; with `far` also the means over these bytes ("repeated") and the others ("new"), and the
        "share" of the first.
    """
    losses = []
    for ids in documents.split(1):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
    loss, ranges, start, end = torch.cat(losses), {}, 0, first
    while start < loss.shape[1]:
        means = loss[:, start:end].mean(1)
        error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else float("nan")
        part = {"nats": means.mean().item(), "error": error}
        if far is not None:
            here, marked = loss[:, start:end], far[:, start:end]
            part |= {"repeated": here[marked].mean().item(), "new": here[~marked].mean().item()}
            part["share"] = marked.float().mean().item()
        ranges[f"{start}-{end}"] = part
        start, end = end, 2 * end
    return ranges


def far_repeats(documents: torch.Tensor, distance: int, n: int = 12) -> torch.Tensor:
    """`[documents, length]` bool: the predicted bytes that follow `n` bytes which the document has had before, all of
    them, and the last time more than `distance` bytes ago: what a model may know from far back."""
    found = torch.zeros(len(documents), documents.shape[1] - 1, dtype=torch.bool)
    for row, ids in enumerate(documents.tolist()):
        seen: dict[tuple[int, ...], int] = {}
        for t in range(n, len(ids)):
            before = tuple(ids[t - n : t])
            found[row, t - 1] = t - seen.get(before, t) > distance
            seen[before] = t
    return found


def quoting(ids: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """`[rows, length + 1]` ids, in which the second half is the first one, cut into pieces of `size` and shuffled.

    Raises:
        ValueError: half the length is no multiple of `size`.
    """
    half = (ids.shape[1] - 1) // 2
    if half % size or 2 * half + 1 != ids.shape[1]:
        raise ValueError(f"`quotes`={size}, allowed: what divides half the length, {half}")
    rows = []
    for row in ids:
        pieces = row[:half].view(-1, size)
        order = torch.randperm(len(pieces), generator=generator)
        rows.append(torch.cat([row[:half], pieces[order].flatten(), row[-1:]]))
    return torch.stack(rows)


def read_otherwise(model: PreTrainedModel, rule: str, segment_size: int) -> PreTrainedModel:
    """The same weights under a read rule that needs none of its own: an aggregation, or aggregation/state_init."""
    aggregation, _, state_init = rule.partition("/")
    fields = model.config.to_dict() | {"aggregation": aggregation, "segment_size": segment_size}
    fields |= {"state_init": state_init} if state_init else {}
    other = MCForCausalLM(MCConfig(**fields)).to(model.device).eval()
    other.load_state_dict(model.state_dict())
    return other


def train_language(config: LanguageConfig, progress: bool = True) -> dict:
    """Trains one model; returns the record of `experiment.train` with the losses by position of every read rule."""
    texts, held_out = library_texts(config.eval_length + 1)
    tokenizer = byte_tokenizer()
    end = torch.tensor([tokenizer.eos_token_id])
    corpus = torch.cat([piece for text in texts for piece in (byte_ids(text), end)])
    documents = torch.stack([byte_ids(text[: config.eval_length + 1]) for text in held_out])
    generator = torch.Generator().manual_seed(config.seed)
    if config.quotes:
        documents = quoting(documents, config.quotes, torch.Generator().manual_seed(0))
    documents = documents.to(config.device)
    model = build_model(config, len(tokenizer), config.eval_length)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(corpus) - config.train_length, (config.batch, 1), generator=generator)
        ids = corpus[starts + torch.arange(config.train_length + 1)]
        ids = quoting(ids, config.quotes, generator) if config.quotes else ids
        return ids[:, :-1], ids[:, 1:]

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        short = documents[:, : config.train_length + 1]
        return {"held_out": position_losses(model, short, config.train_length)[f"0-{config.train_length}"]["nats"]}

    record = train(config, model, draw, evaluate, progress)
    tokens = config.steps * config.batch * config.train_length
    losses = {}
    with torch.no_grad():
        far = far_repeats(documents, config.segment_size).to(config.device)
        losses[config.aggregation] = position_losses(model, documents, config.train_length, far)
        for rule in config.also:
            other = read_otherwise(model, rule, config.train_length)
            losses[rule] = position_losses(other, documents, config.train_length)
    if config.save:
        text = "held-out files of Python's standard library"
        results = [
            Result("cross-entropy", loss["nats"], text, "nats per byte", f"bytes {part} of the file")
            for part, loss in losses[config.aggregation].items()
        ]
        save_checkpoint(config, model, results, tokenizer)
    data = {"training_bytes": len(corpus), "held_out_files": len(documents)}
    return {"losses": losses, "data": data, "tokens_per_second": tokens / record["seconds"]} | record


def main() -> None:
    parser = HfArgumentParser((LanguageConfig, OutputConfig))
    config, out = parser.parse_args_into_dataclasses()
    path = out.path("language")
    record = {"command": shlex.join(["python", *sys.argv])} | train_language(config)
    save_json(record, path)
    print(json.dumps(record["losses"], indent=2))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
