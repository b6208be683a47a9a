# Copyright 2026 the mc-transformers authors.
"""The command line `mc-transformers`: one function per command, and one line on stderr when a command fails."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from huggingface_hub import get_token

from . import info
from .loading import DTYPES, default_device, load_config, load_model, load_tokenizer


PROGRAM = "mc-transformers"
DESCRIPTION = "Memory Caching models (arXiv 2602.24281): inspect, run, evaluate, convert and publish checkpoints."


# ----------------------------------------------------------------------------------------------------------- commands
def run_env(args: argparse.Namespace) -> None:
    print(info.environment())


def run_info(args: argparse.Namespace) -> None:
    print(info.describe(load_config(args.checkpoint, args.revision, presets=True)))


def run_generate(args: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer, set_seed

    from ..modeling_mc.cache import MCCache

    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    tokenizer = load_tokenizer(args.checkpoint, args.revision)
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt has no tokens: give --prompt or text on stdin")
    model = load_model(args.checkpoint, args.dtype, args.device, args.revision, head="MCForCausalLM")
    set_seed(args.seed)
    cache = MCCache(config=model.config)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    length = inputs["input_ids"].shape[1]
    start = time.perf_counter()
    output = model.generate(
        inputs["input_ids"].to(model.device),
        attention_mask=torch.ones_like(inputs["input_ids"]).to(model.device),
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=args.skip_prompt, skip_special_tokens=True),
        **sampling,
    )
    seconds, new = time.perf_counter() - start, output.shape[1] - length
    print(
        f"[{length} + {new} tokens in {seconds:.1f} s; cache: {cache.num_segments} finished segments, "
        f"{info.human_bytes(cache.nbytes)}]",
        file=sys.stderr,
    )


def run_eval(args: argparse.Namespace) -> None:
    from . import evaluate
    from .files import write_file

    tokenizer = load_tokenizer(args.checkpoint, args.revision)
    model = load_model(args.checkpoint, args.dtype, args.device, args.revision, head="MCForCausalLM")
    record = evaluate.evaluate_text(model, tokenizer, args.text, args.length, args.batch_size)
    record = {"checkpoint": args.checkpoint, **record}
    rows = [(f"{x['first']} - {x['last']}", f"{x['loss']:.4f}", f"{evaluate.perplexity(x['loss']):.3f}")
            for x in record["positions"]]  # fmt: skip
    loss, perplexity = (result["value"] for result in record["results"])
    rows.append(("all", f"{loss:.4f}", f"{perplexity:.3f}"))
    print(info.table(rows, ("position", "loss (nats per token)", "perplexity")))
    if args.output:
        write_file(args.output, evaluate.to_json(record))
        print(f"written to {args.output}")


# ------------------------------------------------------------------------------------------------------------- parser
def _examples(*lines: str) -> dict:
    """Arguments of a parser whose help ends with example calls."""
    text = "\n".join(f"  {PROGRAM} {line}" for line in lines)
    return {"epilog": f"examples:\n{text}", "formatter_class": argparse.RawDescriptionHelpFormatter}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _add_checkpoint(parser: argparse.ArgumentParser, what: str = "a folder or a Hub repository") -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=what)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")


def _add_compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (auto: as saved)")
    parser.add_argument("--device", default=default_device(), help="device to compute on (%(default)s)")


def _generate_parser(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text, printed while it is written",
        **_examples(
            'generate outputs/demo/model --prompt "The with statement"',
            "generate me/my-model --temperature 0 --max-new-tokens 400 < prompt.txt",
        ),
    )
    _add_checkpoint(parser)
    parser.add_argument("--prompt", help="the text to continue (default: stdin)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among this probability mass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--skip-prompt", action="store_true", help="print the continuation only")
    _add_compute(parser)
    parser.set_defaults(run=run_generate)


def _eval_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="held-out loss and perplexity of a text, by position",
        **_examples(
            "eval outputs/demo/model held_out.txt --length 2048",
            "eval me/my-model book.txt --length 16384 --dtype bfloat16 --output book.json",
        ),
    )
    _add_checkpoint(parser)
    parser.add_argument("text", metavar="TEXT", help="a file of UTF-8 text")
    parser.add_argument("--length", type=positive, default=2048, help="tokens per block (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=1, help="blocks at a time (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write the numbers as JSON, which model cards read")
    _add_compute(parser)
    parser.set_defaults(run=run_eval)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        **_examples("env", "info mc-170m", 'generate outputs/demo/model --prompt "The with statement"'),
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    env = commands.add_parser("env", help="versions, devices, and the backend of every op", **_examples("env"))
    env.set_defaults(run=run_env)
    about = commands.add_parser(
        "info",
        help="parameters, kind of memory, and the cache's size beside keys and values",
        **_examples("info outputs/demo/model", "info mc-760m"),
    )
    _add_checkpoint(about, "a folder, a Hub repository, or the name of a preset (mc-170m, ...)")
    about.set_defaults(run=run_info)
    _generate_parser(commands)
    _eval_parser(commands)
    return parser


def one_line(error: BaseException) -> str:
    """What went wrong, on one line, without any token."""
    text = " ".join(str(error).split()) or "no further message"
    if not isinstance(error, (ValueError, OSError, RuntimeError)):
        text = f"{type(error).__name__}: {text}"
    token = get_token()
    return text.replace(token, "***") if token else text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 after one line on stderr (MC_TRACEBACK=1 shows where it happened)."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print(f"{PROGRAM} {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("MC_TRACEBACK"):
            raise
        print(f"{PROGRAM} {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
