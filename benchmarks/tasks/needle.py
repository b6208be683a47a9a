"""A needle in a haystack (S-NIAH of RULER, in small): one fact, anywhere in a long text, and a question at its end.

The haystack is 1: a fixed line of tokens, over and over; 2 and 3: tokens drawn with Zipf frequencies. The needle is a
marker, a key and a value of 7 digits (1 and 2) or 32 hexadecimal digits (3). Trained at one length with the needle
anywhere, evaluated at several lengths and depths:

    python -m benchmarks.tasks.needle --kind 2 --memory linear --aggregation ssc
"""

import shlex
import sys
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, PreTrainedModel

from benchmarks.tasks.experiment import (
    ExperimentConfig,
    OutputConfig,
    build_model,
    option,
    query_logits,
    save_json,
    train,
)
from benchmarks.tasks.language import read_otherwise


MARK, ASK = 0, 1
KEYS, DIGITS, FILLERS = 64, 16, 128  # number of ids of each kind, in this order after MARK and ASK
FIRST_DIGIT, FIRST_FILLER = 2 + KEYS, 2 + KEYS + DIGITS
VOCAB = FIRST_FILLER + FILLERS
LINE = 24  # tokens of the line that haystack 1 repeats


@dataclass
class NeedleConfig(ExperimentConfig):
    """One run. Every field is a command-line option."""

    kind: int = option(2, "haystack and value, 1, 2 or 3, as in S-NIAH-1, -2, -3")
    segment_size: int = option(32, "tokens per segment")
    width: int = option(32, "hidden size")
    lr: float = option(1e-2, "peak learning rate of AdamW")
    steps: int = option(600, "training steps")
    eval_every: int = option(200, "steps between evaluations")
    train_length: int = option(128, "tokens per training sequence")
    times: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "lengths of evaluation, in training lengths"}
    )
    depths: int = option(8, "places of the needle in evaluation, from the start to the end of the haystack")
    samples: int = option(32, "sequences per length and place")
    any_phase: bool = option(False, "haystack 1 begins anywhere in its line, else at its start, so that it ends alike")
    also: list[str] = field(
        default_factory=list, metadata={"help": "rules to read the trained model with as well: mean, mean/checkpoint"}
    )


def needle_batch(
    batch_size: int,
    length: int,
    kind: int,
    *,
    depth: float | None = None,
    any_phase: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences `haystack needle haystack ASK key value`, the value's last digit left out.

    Args:
        depth: place of the needle, 0 = first, 1 = last in the haystack; None = uniform, one for each row.
        any_phase: haystack 1 begins anywhere in its line. Else all haystacks of one length end with the same token.

    Returns:
        input_ids and labels, int64 [batch_size, length]. Labels stand at the question's key and at the value's digits
        (each the next digit), -100 elsewhere.

    Raises:
        ValueError: an unknown kind, or a length that leaves no room for a haystack.
    """
    if kind not in (1, 2, 3):
        raise ValueError(f"kind={kind}, allowed: 1, 2, 3")
    digits, base = (32, 16) if kind == 3 else (7, 10)
    haystack = length - 2 * (digits + 2) + 1
    if haystack < 1:
        raise ValueError(f"length={length} has no room for a needle and a question, allowed: > {length - haystack}")
    shape = (batch_size, haystack)
    if kind == 1:
        first = torch.randint(LINE, (batch_size, 1), generator=generator) if any_phase else 0
        filler = ((first + torch.arange(haystack)) % LINE).expand(shape)
    else:
        zipf = 1 / torch.arange(1, FILLERS + 1, dtype=torch.float64)
        filler = torch.multinomial(zipf.expand(batch_size, -1), haystack, replacement=True, generator=generator)
    key = 2 + torch.randint(KEYS, (batch_size, 1), generator=generator)
    value = FIRST_DIGIT + torch.randint(base, (batch_size, digits), generator=generator)
    if depth is None:
        place = torch.randint(haystack + 1, (batch_size, 1), generator=generator)
    else:
        place = torch.full((batch_size, 1), round(depth * haystack))
    needle = torch.cat([torch.full_like(key, MARK), key, value], 1)
    # every token's place: those of the haystack after the needle move by its length
    slots = torch.arange(haystack).expand(shape)
    slots = torch.cat([slots + needle.shape[1] * (slots >= place), place + torch.arange(needle.shape[1])], 1)
    text = torch.empty_like(slots).scatter(1, slots, torch.cat([FIRST_FILLER + filler, needle], 1))
    input_ids = torch.cat([text, torch.full_like(key, ASK), key, value[:, :-1]], 1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -digits:] = value
    return input_ids, labels


@torch.no_grad()
def accuracy(model: PreTrainedModel, config: NeedleConfig, length: int, depth: float, seed: int = 1_000_003) -> float:
    """Share of values that greedy decoding would get right in full: every digit, given the right ones before it."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = needle_batch(
        config.samples, length, config.kind, depth=depth, any_phase=config.any_phase, generator=generator
    )
    ids, labels = ids.to(config.device), labels.to(config.device)
    right = query_logits(model, ids, labels).argmax(-1) == labels[labels != -100]
    return right.view(config.samples, -1).all(1).float().mean().item()


def heat(model: PreTrainedModel, config: NeedleConfig) -> dict[str, list[float]]:
    """Accuracy by length (key) and place (list, from the start)."""
    places = [i / max(config.depths - 1, 1) for i in range(config.depths)]
    lengths = [times * config.train_length for times in config.times]
    return {str(length): [accuracy(model, config, length, place) for place in places] for length in lengths}


def train_needle(config: NeedleConfig, progress: bool = True) -> dict:
    """Trains one model; returns the record of `experiment.train` with the accuracies of every read rule."""
    generator = torch.Generator().manual_seed(config.seed)
    model = build_model(config, VOCAB, config.train_length * max(config.times))
    record = train(
        config,
        model,
        draw=lambda: needle_batch(
            config.batch, config.train_length, config.kind, any_phase=config.any_phase, generator=generator
        ),
        evaluate=lambda: {"accuracy": accuracy(model, config, config.train_length, 0.5)},
        progress=progress,
    )
    rules = {config.aggregation: model}
    rules |= {rule: read_otherwise(model, rule, config.train_length) for rule in config.also}
    return {"heat": {rule: heat(reader, config) for rule, reader in rules.items()}} | record


def main() -> None:
    config, out = HfArgumentParser((NeedleConfig, OutputConfig)).parse_args_into_dataclasses()
    path = out.path("needle")
    record = {"command": shlex.join(["python", *sys.argv])} | train_needle(config)
    save_json(record, path)
    for rule, lengths in record["heat"].items():
        for length, places in lengths.items():
            print(f"{rule}, {length} tokens:", " ".join(f"{share:.2f}" for share in places))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
