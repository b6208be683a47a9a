"""Train on one text that is longer than memory allows, piece by piece, with the memory carried on.

    python examples/train_long.py
    python examples/train_long.py --files 'books/*.txt' --per_device_train_batch_size 4 --gradient_segments 8 \
        --save_strategy steps --save_steps 100 --output_dir outputs/long
    python examples/train_long.py --save_strategy steps --save_steps 100 --resume_from_checkpoint true

By default the text is a million bytes of the source code of installed packages, one document. The last line says how
much memory the process took: it depends on the piece, and on the states that are kept of the whole text, and not on
the activations of the text. Every option of `TrainingArguments` is an option here too.
"""

import glob
import importlib.util
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

import mc_transformers as mc
from mc_transformers.training import CarriedTrainer


@dataclass
class Options:
    files: str | None = HfArg(default=None, help="a pattern of text files, one document each; else installed sources")
    tokens: int = HfArg(default=1_000_000, help="bytes of the installed sources")
    held_out: int = HfArg(default=20_000, help="bytes behind them (of every file: its last ones) that are evaluated")
    width: int = HfArg(default=64, help="of the model, which has two layers and heads of 32")
    segment_size: int = HfArg(default=256, help="bytes per segment")
    piece_segments: int = HfArg(default=8, help="segments that a row reads in a step")
    gradient_segments: int | None = HfArg(default=None, help="segments that gradients pass; else those of the step")


@dataclass
class Arguments(TrainingArguments):
    output_dir: str = "outputs/long"
    per_device_train_batch_size: int = 1
    num_train_epochs: float = 1
    learning_rate: float = 3e-3
    warmup_steps: float = 20
    logging_steps: float = 25
    save_strategy: str = "no"
    report_to: str = "none"


def installed_source(size: int) -> bytes:
    """The first `size` bytes of the source code of packages that are there anyway."""
    found = b""
    for package in ("transformers", "torch"):
        folder = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(folder.rglob("*.py")):
            found += path.read_bytes()
            if len(found) >= size:
                return found[:size]
    return found


def load(options: Options) -> tuple[list[dict], list[dict]]:
    """Training documents, and what follows each of them: the tokens of `mc.byte_tokenizer` are bytes behind two
    special ones.

    Raises:
        ValueError: `files` names no files.
    """
    if options.files is None:
        texts = [installed_source(options.tokens + options.held_out)]
    else:
        texts = [Path(name).read_bytes() for name in sorted(glob.glob(options.files))]
        if not texts:
            raise ValueError(f"`--files {options.files}` names no files")
    documents = [torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + 2 for text in texts]
    parts = [ids.tensor_split([max(2, len(ids) - options.held_out)]) for ids in documents]
    train, held_out = ([{"input_ids": part} for part in each] for each in zip(*parts, strict=True))
    return train, [text for text in held_out if len(text["input_ids"]) > 1]


def peak_gigabytes() -> float:
    """The most memory that this process had, in 2^30 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Report(TrainerCallback):
    """How much is read, kept and taken, beside every logged loss."""

    def __init__(self, run: CarriedTrainer) -> None:
        self.run = run

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        cache = self.run.carried.cache
        if cache is not None and "loss" in logs:
            print(
                f"token {cache.get_seq_length():,}: {float(logs['loss']):.3f} nats per byte, {cache.num_segments} "
                f"segments in {cache.nbytes / 2**20:.0f} MiB, peak of the process {peak_gigabytes():.2f} GiB"
            )


def main() -> None:
    options, args = HfArgumentParser((Options, Arguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    train, held_out = load(options)
    config = mc.MCConfig(
        vocab_size=258,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=2,
        num_attention_heads=options.width // 32,
        memory="gated_linear",
        aggregation="ssc",
        num_selected_segments=2,
        segment_size=options.segment_size,
        pad_token_id=0,
        eos_token_id=1,
    )
    run = CarriedTrainer(
        mc.MCForCausalLM(config),
        args,
        train_dataset=train,
        eval_dataset=held_out or None,
        piece_segments=options.piece_segments,
        gradient_segments=options.gradient_segments,
    )
    run.add_callback(Report(run))
    resume = args.resume_from_checkpoint
    run.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    if held_out:
        print(f"held out: {run.evaluate()['eval_loss']:.3f} nats per byte")
    run.save_model(str(Path(args.output_dir) / "final"))
    total = sum(len(text["input_ids"]) for text in train)
    print(f"{total:,} tokens, peak of the process {peak_gigabytes():.2f} GiB")


if __name__ == "__main__":
    main()
