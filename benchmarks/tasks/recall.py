"""Multi-query associative recall (MQAR): how many key-value pairs can a memory hold?

A sequence starts with D pairs `k1 v1 k2 v2 ...`; later every key comes up once more, and the model has to answer with
its value there. Trains a small model from scratch on fresh sequences, and writes the accuracy on a fixed test set as
JSON and PNG:

    python -m benchmarks.tasks.recall --memory linear --aggregation grm --pairs 32 --steps 1500
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, PreTrainedModel

from benchmarks.tasks.experiment import (
    ExperimentConfig,
    OutputConfig,
    Result,
    build_model,
    option,
    query_logits,
    save_checkpoint,
    save_json,
    train,
)
from mc_transformers import MCCache


@dataclass
class RecallConfig(ExperimentConfig):
    """One run of the task. Every field is a command-line option."""

    seq_len: int = option(256, "tokens per sequence, T")
    pairs: int = option(32, "key-value pairs per sequence, D")
    vocab: int = option(512, "vocabulary: keys come from its lower, values from its upper half")
    power_a: float = option(0.01, "exponent of the gaps between pairs and queries: slot i has weight i^(a-1)")
    random_non_queries: bool = option(True, "fill the positions between queries with random tokens instead of zeros")
    bursts: int = option(0, "bursts of uneven lengths in which the pairs come, zeros in between; 0 = all at once")
    silence: int = option(0, "zeros before, between and behind bursts, in all")
    test_size: int = option(512, "sequences in the test set")
    read_as: list[int] = field(
        default_factory=list, metadata={"help": "k of 'ssc' to read the trained model with as well"}
    )
    test_seed: int = option(1_000_003, "seed of the test set, the same for every run")


def mqar_batch(
    batch_size: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int,
    *,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    num_passes: int = 1,
    bursts: int = 0,
    silence: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of the MQAR task of Arora et al. (2024), all of a batch at once.

    Keys are distinct ids of 1..V/2-1, values distinct ids of V/2..V-1. The pairs fill the first 2·D positions (or
    `num_passes` times as many, to show them more often); the rest is cut into two-token slots. Every key is asked for
    at the first position of a slot of its own; slots are drawn without replacement with weights i^(a-1), i = 1, 2, ...
    With `bursts` the pairs stand in so many groups, and `silence` zeros before, between and behind them: where a group
    ends and how long each silence is is drawn for every sequence.

    Returns:
        input_ids [batch_size, seq_len] and labels [batch_size, seq_len], both int64. The label stands **at** the query
        and is the value, -100 elsewhere: it is not shifted, as the value never follows in the input.
    """
    context = 2 * num_pairs * num_passes + silence
    num_slots = (seq_len - context) // 2
    num_keys = vocab_size // 2 - 1
    if seq_len % 2 or vocab_size % 2:
        raise ValueError(f"seq_len and vocab_size must be even, not {seq_len} and {vocab_size}")
    if not 1 <= num_pairs <= num_slots:
        raise ValueError(f"num_pairs={num_pairs} does not fit: seq_len={seq_len} leaves {num_slots} slots for queries")
    if (bursts or silence) and (num_passes > 1 or silence % 2 or not 1 <= bursts <= num_pairs):
        raise ValueError(f"bursts={bursts} and silence={silence}: 1 to {num_pairs} bursts, an even silence, one pass")
    if num_pairs > num_keys:
        raise ValueError(f"num_pairs={num_pairs} is more than the {num_keys} keys of vocab_size={vocab_size}")

    def draw(num_items: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """num_pairs of 0..num_items-1 per row, without replacement, in the order of drawing (Gumbel top-k): [B, D]."""
        uniform = torch.rand(batch_size, num_items, generator=generator, dtype=torch.float64)
        scores = -(-uniform.clamp_min(1e-300).log()).log()
        if weights is not None:
            scores = scores + weights.log()
        return scores.topk(num_pairs, dim=1).indices

    keys = 1 + draw(num_keys)
    values = vocab_size // 2 + draw(vocab_size // 2)
    slots = draw(num_slots, torch.arange(1, num_slots + 1, dtype=torch.float64) ** (power_a - 1))
    queries = context + 2 * slots

    fill = torch.zeros(batch_size, seq_len, dtype=torch.long)
    if random_non_queries:
        fill.random_(0, vocab_size, generator=generator)
    input_ids = fill.scatter(1, queries, keys)
    pairs = torch.stack([keys, values], dim=2).flatten(1).repeat(1, num_passes)
    place = torch.arange(pairs.shape[1]).expand_as(pairs)
    if bursts:
        ends = 1 + torch.rand(batch_size, num_pairs - 1, generator=generator).topk(bursts - 1).indices  # pairs before
        waits = (torch.rand(batch_size, bursts, generator=generator).sort(1).values * (silence + 1)).long()
        burst = (torch.arange(num_pairs)[:, None] >= ends.sort(1).values[:, None]).sum(-1)
        place = place + waits.gather(1, burst).repeat_interleave(2, 1)
    input_ids[:, :context] = 0
    input_ids.scatter_(1, place, pairs)
    labels = torch.full_like(input_ids, -100).scatter(1, queries, values)
    return input_ids, labels


@torch.no_grad()
def accuracy(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, batch_size: int = 64) -> float:
    """Share of all queries answered with their value."""
    correct = 0
    for ids, targets in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        correct += (query_logits(model, ids, targets).argmax(-1) == targets[targets != -100]).sum().item()
    return correct / (labels != -100).sum().item()


def style(config: RecallConfig) -> dict:
    """What of a config says how `mqar_batch` lays out its sequences."""
    return {name: getattr(config, name) for name in ("power_a", "random_non_queries", "bursts", "silence")}


@torch.no_grad()
def kept_segments(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Finished segments per sequence `[B, T]`, mean over the batch."""
    cache = MCCache(config=model.config)
    model(input_ids=input_ids, cache=cache, use_cache=True)
    number = cache.memory_layers[0].tensors.get("cut.number") if cache.memory_layers else None
    return float(cache.num_segments if number is None else number.double().mean())


def draw_test(config: RecallConfig, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The test set of a run, the same for every seed of the run."""
    generator = torch.Generator().manual_seed(config.test_seed)
    return mqar_batch(config.test_size, seq_len, config.pairs, config.vocab, **style(config), generator=generator)


def train_recall(config: RecallConfig, progress: bool = True) -> dict:
    """Trains one model; returns the record of `experiment.train` with the final accuracy."""
    data = (config.seq_len, config.pairs, config.vocab)
    test = [x.to(config.device) for x in draw_test(config, config.seq_len)]
    generator = torch.Generator().manual_seed(config.seed)
    model = build_model(config, config.vocab, config.seq_len)
    record = train(
        config,
        model,
        draw=lambda: mqar_batch(config.batch, *data, **style(config), generator=generator),
        evaluate=lambda: {"accuracy": accuracy(model, *test)},
        progress=progress,
    )
    if config.save:
        results = []
        for times in (1, 4):
            length = times * config.seq_len
            share = accuracy(model, *(x.to(config.device) for x in draw_test(config, length)))
            results.append(Result("accuracy", share, f"MQAR, {config.pairs} pairs in {length} tokens"))
        save_checkpoint(config, model, results, None)
    sparse = {str(k): accuracy(model.read_as("ssc", k), *test) for k in config.read_as}
    found = {"accuracy": record["curve"][-1]["accuracy"], "segments": kept_segments(model, test[0]), "read_as": sparse}
    return {"task": "mqar"} | found | record


def save_plot(record: dict, path: Path) -> bool:
    """Accuracy against training steps as a PNG. Without matplotlib nothing is written, and False returned."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    config = record["config"]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([p["step"] for p in record["curve"]], [p["accuracy"] for p in record["curve"]], marker=".")
    axes.set(xlabel="training step", ylabel="accuracy over all queries", ylim=(0, 1.02))
    pairs = f"{config['pairs']} pairs in {config['seq_len']} tokens"
    axes.set_title(f"{config['memory']}, {config['aggregation']}: {pairs}")
    axes.grid(alpha=0.3)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)
    os.replace(partial, path)
    return True


def main() -> None:
    config, out = HfArgumentParser((RecallConfig, OutputConfig)).parse_args_into_dataclasses()
    path = out.path("recall")
    record = {"command": shlex.join(["python", *sys.argv])} | train_recall(config)
    save_json(record, path)
    drawn = save_plot(record, path.with_suffix(".png"))
    print(f"accuracy {record['accuracy']:.3f} after {config.steps} steps, {record['seconds']} s")
    print(f"written: {path}", path.with_suffix(".png") if drawn else "(no plot: matplotlib is not installed)")


if __name__ == "__main__":
    main()
