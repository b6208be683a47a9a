# Copyright 2026 the mc-transformers authors.
"""The command line `mc-transformers`: one function per command, and one line on stderr when a command fails."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..configuration_mc import CHOICES
from ..hub import facts
from ..hub.inputs import short
from ..hub.loading import DTYPES, default_device, load_config, load_model, load_tokenizer
from ..hub.publish import hide_tokens
from ..modeling_mc.memories import MEMORIES
from .arguments import PROGRAM, at_least_two, count, examples, heat, numbers, positive, share
from .distil import add_parser as add_distil_parser
from .export import add_parser as add_export_parser
from .qualify import add_parser as add_qualify_parser
from .serving import add_parsers as add_serving_parsers


PIECE = 4096  # tokens of a prompt that are read at a time
DESCRIPTION = "Memory Caching models (arXiv 2602.24281): inspect, run, evaluate, convert and publish checkpoints."


# ----------------------------------------------------------------------------------------------------------- commands
def run_env(args: argparse.Namespace) -> None:
    print(facts.environment())


def run_info(args: argparse.Namespace) -> None:
    print(facts.describe(load_config(args.checkpoint, args.revision, presets=True)))


def run_generate(args: argparse.Namespace) -> None:
    from transformers import TextStreamer, set_seed

    from .. import MCCache
    from ..modeling_mc.memory_file import FILE as MEMORY_FILE

    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    if args.memory is not None:
        _check_memory(Path(args.memory), args.keep_memory)
    elif args.keep_memory:
        raise ValueError("--keep-memory has no meaning without --memory")
    tokenizer = load_tokenizer(args.checkpoint, args.revision)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    if not ids.numel():
        raise ValueError("the prompt has no tokens: give --prompt or text on stdin")
    model = load_model(args.checkpoint, args.dtype, args.device, args.revision, head="MCForCausalLM")
    set_seed(args.seed)
    remembered = args.memory is not None and (Path(args.memory) / MEMORY_FILE).exists()
    cache = MCCache.from_pretrained(args.memory, model) if remembered else MCCache(config=model.config)
    seen = int(cache.get_seq_length())
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    inputs = cache.prompt(ids.to(model.device))
    if not args.skip_prompt:
        print(prompt, end="", flush=True)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        cache=cache,
        use_cache=True,  # a generation config that says no would have every token read again and again
        max_new_tokens=args.max_new_tokens,
        prefill_chunk_size=None if seen else PIECE,  # older Transformers would read what is remembered again
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    seconds, new = time.perf_counter() - start, output.shape[1] - seen - ids.shape[1]
    before = f"{seen} remembered + " if seen else ""
    print(
        f"[{before}{ids.shape[1]} + {new} tokens in {seconds:.1f} s; cache: {cache.num_segments} finished "
        f"segments, {facts.human_bytes(cache.nbytes)}]",
        file=sys.stderr,
    )
    if args.memory is not None and not args.keep_memory:
        cache.save_pretrained(args.memory, model)


def _check_memory(folder: Path, keep: bool) -> None:
    """Before anything is read, which may take long.

    Raises:
        NotADirectoryError, PermissionError: the memory could not be written. FileNotFoundError: there is none to keep.
    """
    from ..modeling_mc.memory_file import FILE

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--memory {folder} is not a folder")
    if keep and not (folder / FILE).is_file():
        raise FileNotFoundError(f"--memory {folder} holds no {FILE} that --keep-memory could keep")
    if not keep:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def run_eval(args: argparse.Namespace) -> None:
    from ..hub.files import write_file
    from . import evaluate

    if args.output:  # before the work
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        if Path(args.output).is_dir():
            raise IsADirectoryError(f"--output {args.output} is a folder: give the name of a file")
    tokenizer = load_tokenizer(args.checkpoint, args.revision)
    model = load_model(args.checkpoint, args.dtype, args.device, args.revision, head="MCForCausalLM")
    record = evaluate.evaluate_text(model, tokenizer, args.text, args.length, args.batch_size)
    record = {"checkpoint": args.checkpoint, **record}
    rows = [
        (f"{x['first']} - {x['last']}", f"{x['loss']:.4f}", f"{evaluate.perplexity(x['loss']):.3f}")
        for x in record["positions"]
    ]
    loss, perplexity = (result["value"] for result in record["results"])
    rows.append(("all", f"{loss:.4f}", f"{perplexity:.3f}"))
    print(facts.table(rows, ("position", "loss (nats per token)", "perplexity")))
    if args.output:
        write_file(args.output, evaluate.to_json(record))
        print(f"written to {args.output}")


def _card_arguments(args: argparse.Namespace) -> dict:
    """What `_add_card` has added, read."""
    from ..hub.card import Metadata, read_results

    metadata = Metadata(args.license, args.language, args.base_model, args.datasets, args.tags)
    return {"metadata": metadata, "results": [result for path in args.results for result in read_results(path)]}


def run_bundle(args: argparse.Namespace) -> None:
    from ..hub.bundle import bundle
    from ..hub.space import space

    output = (space if args.space else bundle)(
        args.checkpoint,
        args.output,
        repo_id=args.repo_id,
        revision=args.revision,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        verify=not args.no_verify,
        **_card_arguments(args),
    )
    checked = "not checked" if args.no_verify else "loaded alone: the same logits and tokens"
    print(f"{output}: {len(list(output.iterdir()))} files, {checked}")


def run_publish(args: argparse.Namespace) -> None:
    from ..hub.publish import publish

    files, commit = publish(
        args.checkpoint,
        args.repo_id,
        dry_run=args.dry_run,
        max_shard_size=args.max_shard_size,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        replace_card=args.replace_card,
        commit_message=args.message,
        **_card_arguments(args),
    )
    print(facts.table([(name, facts.human_bytes(size)) for name, size in files.items()], ("file", "size")))
    total = facts.human_bytes(sum(files.values()))
    if commit is None:
        print(f"dry run: {len(files)} files, {total}, checked; nothing was uploaded")
    else:
        print(f"{len(files)} files, {total}: {commit.pr_url or commit.commit_url}")


def _is_ours(args: argparse.Namespace) -> bool:
    """Whether a checkpoint is of this family: its config says so, or a training run has left none beside it."""
    from ..conversion.checkpoint import read_config
    from ..conversion.gguf import is_gguf

    if is_gguf(args.checkpoint):
        if args.config is not None:
            raise ValueError("--config is for training runs; a GGUF file holds its config")
        return False
    if args.source is not None or args.config is not None:
        return args.source in (None, "training")
    place = Path(args.checkpoint) / "config.json"
    return not place.is_file() or read_config(place).get("model_type") == "mc"


def run_convert(args: argparse.Namespace) -> None:
    from ..conversion import convert, training

    if args.state_dict:
        output = training.to_state_dict(args.checkpoint, args.output, args.dtype, args.overwrite)
        print(f"{output}: a plain state dict")
        return
    names = ("aggregation", "segment_size", "state_init", "num_selected_segments", "memory")
    fields = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    common = {"dtype": args.dtype, "max_shard_size": args.max_shard_size, "overwrite": args.overwrite, **fields}
    if not Path(args.checkpoint).exists():
        raise FileNotFoundError(f"{args.checkpoint} does not exist (download a Hub repository first)")
    if _is_ours(args):
        if args.verify_logits or args.layers:
            option = "--verify-logits" if args.verify_logits else "--layers"
            raise ValueError(f"{option} is for checkpoints of other architectures, and this is one of the family")
        output = training.from_training(args.checkpoint, args.output, args.config, **common)
    else:
        output = convert.convert(
            args.checkpoint, args.output, args.source, verify=args.verify_logits, layers=args.layers, **common
        )
    print(f"{output}: converted" + (", the logits are those of the source" if args.verify_logits else ""))


# ------------------------------------------------------------------------------------------------------------- parser
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
        **examples(
            'generate outputs/demo/model --prompt "The with statement"',
            "generate me/my-model --temperature 0 --max-new-tokens 400 < prompt.txt",
            "generate me/my-model --memory notes --max-new-tokens 1 < book.txt",
            'generate me/my-model --memory notes --keep-memory --prompt "Who"',
        ),
    )
    _add_checkpoint(parser)
    parser.add_argument("--prompt", help="the text to continue (default: stdin)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=heat, default=0.8, help="0 = always the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=count, default=50, help="sample among the k likeliest, 0 = all (%(default)s)")
    parser.add_argument("--top-p", type=share, default=1.0, help="sample among this probability mass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument(
        "--memory", metavar="FOLDER", help="go on from the memory in this folder, if there is one, and write it there"
    )
    parser.add_argument("--keep-memory", action="store_true", help="do not write to the folder of --memory")
    parser.add_argument("--skip-prompt", action="store_true", help="print the continuation only")
    _add_compute(parser)
    parser.set_defaults(run=run_generate)


def _eval_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="held-out loss and perplexity of a text, by position",
        **examples(
            "eval outputs/demo/model held_out.txt --length 2048",
            "eval me/my-model book.txt --length 16384 --dtype bfloat16 --output book.json",
        ),
    )
    _add_checkpoint(parser)
    parser.add_argument("text", metavar="TEXT", help="a file of UTF-8 text")
    parser.add_argument("--length", type=at_least_two, default=2048, help="tokens per block (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=1, help="blocks at a time (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write the numbers as JSON, which model cards read")
    _add_compute(parser)
    parser.set_defaults(run=run_eval)


def _add_card(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model card")
    group.add_argument("--license", metavar="ID", help="of the weights, for example apache-2.0")
    group.add_argument("--language", nargs="+", metavar="CODE", help="for example en")
    group.add_argument("--base-model", metavar="REPO", help="the model that this one was made from")
    group.add_argument("--datasets", nargs="+", metavar="REPO", help="what it was trained on")
    group.add_argument("--tags", nargs="+", metavar="TAG", default=[])
    group.add_argument(
        "--results", nargs="+", metavar="FILE", default=[], help="JSON of `eval --output`: the only source of scores"
    )


def _bundle_parser(commands) -> None:
    parser = commands.add_parser(
        "bundle",
        help="write a folder that loads with trust_remote_code=True where this package is not installed",
        **examples(
            "bundle outputs/demo/model outputs/demo/bundle --repo-id me/my-model",
            "bundle checkpoint-500 out --results eval.json --license apache-2.0 --language en",
            "bundle outputs/demo/model outputs/demo/space --space",
        ),
    )
    _add_checkpoint(parser)
    parser.add_argument("output", metavar="FOLDER", help="where to write")
    parser.add_argument("--repo-id", metavar="REPO", help="the name that the card gives (default: the folder's)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--no-verify", action="store_true", help="do not load the result in a process of its own")
    parser.add_argument("--space", action="store_true", help="a Space: the bundle in its folder `model`, and a page")
    _add_card(parser)
    parser.set_defaults(run=run_bundle)


def _publish_parser(commands) -> None:
    parser = commands.add_parser(
        "publish",
        help="bundle a checkpoint, check the bundle, and upload it to the Hub",
        **examples(
            "publish outputs/demo/model me/my-model --private --dry-run",
            "publish outputs/demo/model me/my-model --tag v1 --results eval.json",
            "publish outputs/demo/model someone/model --create-pr",
        ),
        description="The token is taken from HF_TOKEN or `hf auth login`. After an interruption call it again: what "
        "was sent is not sent again.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a Hub repository")
    parser.add_argument("repo_id", metavar="REPO", help="the repository, created if it is missing")
    parser.add_argument("--private", action="store_true", help="create a private one; a public one is refused")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--revision", metavar="NAME", help="branch (created if missing), or refs/pr/N")
    parser.add_argument("--tag", help="name for the new commit")
    parser.add_argument("--message", default="Upload model", help="commit message (%(default)s)")
    parser.add_argument("--replace-card", action="store_true", help="also where the repository has a card already")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="bundle and check, upload nothing")
    _add_card(parser)
    parser.set_defaults(run=run_publish)


def _convert_parser(commands) -> None:
    from ..conversion.sources import SOURCES

    parser = commands.add_parser(
        "convert",
        help="turn a checkpoint of another architecture, or of a training run, into a model folder",
        description="Strict: a weight that is missing or left over is an error. From another architecture and "
        "without --aggregation the result is the source itself, one endless segment.",
        **examples(
            "convert mamba2-130m outputs/converted --verify-logits",
            "convert mamba2-130m outputs/converted --aggregation grm --segment-size 256 --dtype bfloat16",
            "convert run/checkpoint-500/pytorch_model_fsdp_0 outputs/model --config run/config.json",
            "convert outputs/model model.pt --state-dict",
            "convert llama outputs/hybrid --layers 1,3,5 --memory gated_delta --aggregation grm",
            "convert SmolLM2-135M-Instruct.Q4_1.gguf outputs/smollm2 --verify-logits",
        ),
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a folder with config.json and weights, or a GGUF file; of a training run also a "
        "torch.distributed.checkpoint folder, or a file with a state dict",
    )
    parser.add_argument("output", metavar="FOLDER", help="where to write")
    kinds = ", ".join([*SOURCES, "training"])
    parser.add_argument("--from", dest="source", metavar="KIND", help=f"{kinds} (default: as config.json says)")
    parser.add_argument("--config", metavar="FILE", help="config.json of a training run (beside the weights)")
    parser.add_argument("--state-dict", action="store_true", help="write a model of this family as one plain .pt file")
    parser.add_argument(
        "--layers", type=numbers, metavar="I,J", help="layers of a Transformer that become memory layers (none)"
    )
    parser.add_argument("--memory", choices=list(MEMORIES), help="of these layers (gated_linear)")
    parser.add_argument("--aggregation", choices=CHOICES["aggregation"], help="how segments are read (none)")
    parser.add_argument("--segment-size", type=positive, help="tokens per segment (256)")
    parser.add_argument("--state-init", choices=CHOICES["state_init"], help="where a segment starts (independent)")
    parser.add_argument("--num-selected-segments", type=positive, help="k of ssc (4)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--verify-logits", action="store_true", help="load source and result and compare in fp32")
    parser.set_defaults(run=run_convert)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        super().error(short(hide_tokens(message), 2000))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        **examples("env", "info mc-170m", 'generate outputs/demo/model --prompt "The with statement"'),
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    env = commands.add_parser("env", help="versions, devices, and the backend of every op", **examples("env"))
    env.set_defaults(run=run_env)
    about = commands.add_parser(
        "info",
        help="parameters, kind of memory, and the cache's size beside keys and values",
        **examples("info outputs/demo/model", "info mc-760m"),
    )
    _add_checkpoint(about, "a folder, a Hub repository, or the name of a preset (mc-170m, ...)")
    about.set_defaults(run=run_info)
    _generate_parser(commands)
    _eval_parser(commands)
    _bundle_parser(commands)
    _publish_parser(commands)
    _convert_parser(commands)
    add_distil_parser(commands)
    add_export_parser(commands)
    add_serving_parsers(commands)
    add_qualify_parser(commands)
    return parser


def one_line(error: BaseException, argument: str) -> str:
    """What went wrong, on one line, without any token; of an error that was not foreseen, with what was read."""
    text = short(" ".join(str(error).split()), 2000) or "no further message"
    if isinstance(error, MemoryError):
        text = f"{argument} needs more memory than there is"
    elif not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) or isinstance(error, RecursionError):
        text = f"{argument} is damaged, or holds values of a wrong kind ({text}); MC_TRACEBACK=1 shows where"
    return hide_tokens(text)


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
        print(
            f"{PROGRAM} {args.command}: error: {one_line(error, getattr(args, 'checkpoint', args.command))}",
            file=sys.stderr,
        )
        return 1
    return 0
