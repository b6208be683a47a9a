# Copyright 2026 the mc-transformers authors.
"""`mc-transformers distil`: a Transformer whose chosen layers become memory layers and learn their work."""

import argparse

from ..conversion.distil.options import AGGREGATIONS, MEMORIES, TRAINED
from ..hub import facts
from ..hub.loading import default_device
from .arguments import amount, at_least_two, examples, numbers, part, positive


def layers(text: str) -> str | tuple[int, ...]:
    """auto:N, or whole numbers with commas between them."""
    return text if text.startswith("auto:") else tuple(numbers(text))


def run_distil(args: argparse.Namespace) -> None:
    from ..conversion.distil.options import Options
    from ..conversion.distil.run import distil

    values = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    values["text"], values["held_out"] = tuple(args.text), tuple(args.held_out)
    record = distil(Options(**values))
    rows = [(name, record[f"held_out_{name}"]) for name in ("teacher", "start", "matched", "final")]
    rows = [(name, *(f"{found[key]:.4f}" for key in ("loss", "loss_second_half", "kl"))) for name, found in rows]
    print(facts.table(rows, ("held out", "nats per token", "second half", "KL from the teacher")))
    seconds = sum(record["seconds"].values())
    chosen = ", ".join(map(str, record["layers"]))
    print(f"{args.output}: layers {chosen} are memory layers; {seconds / 60:.1f} minutes; numbers in distil.json")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "distil",
        help="turn attention layers of a Transformer into memory layers that have learned their work",
        description="Starts in closed form, matches every layer's answers, then learns the teacher's logits end to "
        "end. The same call goes on after an interruption. What it needs for that lies in FOLDER-work, which can be "
        "deleted afterwards.",
        **examples(
            "distil outputs/smollm2/attention outputs/hybrid --text outputs/text --minutes 20",
            "distil llama outputs/hybrid --layers 9,19,29 --memory gated_delta --aggregation none --text *.txt",
            "distil llama outputs/hybrid --layers auto:10 --trained lora --device cuda --batch 16 --text corpus",
        ),
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder or GGUF file of a Llama, Qwen2 or Qwen3")
    parser.add_argument("output", metavar="FOLDER", help="where to write the model")
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help="text files, a document each, or folders of .txt")
    add("--held-out", nargs="+", default=[], metavar="FILE", help="documents to measure on (every tenth of --text)")
    add("--layers", type=layers, default="auto:3", metavar="I,J", help="which layers, or auto:N (%(default)s)")
    add("--memory", choices=MEMORIES, default="gated_delta", help="of these layers (%(default)s)")
    add("--aggregation", choices=AGGREGATIONS, default="grm", help="how segments are read (%(default)s)")
    add("--segment-size", type=positive, default=256, help="tokens per segment (%(default)s)")
    add("--window", type=positive, help="the other layers attend to so many tokens (to all)")
    add("--minutes", type=amount, default=20.0, help="of the whole run (%(default)s)")
    add("--match-steps", type=positive, help="steps of matching, at most")
    add("--end-steps", type=positive, help="steps end to end, at most")
    add("--match-share", type=part, default=0.4, help="part of the minutes for matching (%(default)s)")
    add("--length", type=at_least_two, default=1024, help="tokens of a training text (%(default)s)")
    add("--batch", type=positive, default=2, help="texts per step (%(default)s)")
    add("--eval-windows", type=positive, default=8, help="held-out texts that a loss is measured on (%(default)s)")
    add("--trained", choices=TRAINED, default="memory", help="what learns end to end (%(default)s)")
    add("--lora-rank", type=positive, default=16, help="of --trained lora (%(default)s)")
    add("--match-lr", type=amount, default=2e-3, help="peak learning rate of matching (%(default)s)")
    add("--end-lr", type=amount, default=3e-4, help="peak learning rate end to end (%(default)s)")
    add("--top-k", type=positive, default=64, help="logits per token that are kept of the teacher (%(default)s)")
    add("--seed", type=int, default=0, help="of the order of texts (%(default)s)")
    add("--work", metavar="FOLDER", help="what a resumed call needs; several outputs may share it (FOLDER-work)")
    add("--device", default=default_device(), help="device to compute on (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bf16 where that is faster")
    parser.set_defaults(run=run_distil)
