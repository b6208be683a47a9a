# Copyright 2026 the mc-transformers authors.
"""Commands that answer: `serve`, `chat`, and `ui`, the page that shows a memory."""

import argparse
import re
import sys
from importlib.util import find_spec

from ..hub.loading import DTYPES, default_device, load_model, load_tokenizer
from .arguments import count, examples, positive


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NEEDED = {"serve": ("fastapi", "uvicorn", "openai", "rich"), "ui": ("gradio",)}  # by extra


def size(text: str) -> int:
    """Bytes, as in 500MB; 0 = none."""
    found = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid, allowed: bytes as in 0, 800000 or 500MB")
    return int(found[1]) * UNITS[found[2]]


def _check_extra(extra: str) -> None:
    if missing := [name for name in NEEDED[extra] if find_spec(name) is None]:
        raise ImportError(f"{', '.join(missing)} is missing: pip install 'mc-transformers[{extra}]'")


def _common(args: argparse.Namespace) -> dict:
    """Arguments of `serve` and `chat`."""
    from ..serving.server import Limits, Prefixes, parse

    options = {"device": args.device, "dtype": args.dtype, "log_level": args.log_level}
    for option in args.option:
        name, _, value = option.partition("=")
        name = name.replace("-", "_")
        options[name] = parse(name, value)
    return {
        "limits": Limits(args.max_prompt_tokens, args.max_new_tokens, args.max_request_bytes),
        "prefixes": Prefixes(args.prefix_bytes, args.prefix_folder, args.prefix_folder_bytes),
        "chat_template": args.chat_template,
        **options,
    }


def run_serve(args: argparse.Namespace) -> None:
    _check_extra("serve")
    from ..serving.server import serve

    common = _common(args)
    print(f"{args.checkpoint}: http://{args.host}:{args.port}/v1, until Ctrl-C", file=sys.stderr, flush=True)
    serve(args.checkpoint, host=args.host, port=args.port, **common)


def run_chat(args: argparse.Namespace) -> None:
    _check_extra("serve")
    from ..serving.chat import chat

    chat(args.checkpoint, args.flags, args.system, **_common(args))


def run_ui(args: argparse.Namespace) -> None:
    _check_extra("ui")
    from ..serving.page import launch

    tokenizer = load_tokenizer(args.checkpoint, args.revision)
    model = load_model(args.checkpoint, args.dtype, args.device, args.revision, head="MCForCausalLM")
    launch(model, tokenizer, server_name=args.host, server_port=args.port)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a Hub repository, with a tokenizer")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (auto: as saved)")
    parser.add_argument("--device", default=default_device(), help="device to compute on (%(default)s)")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja of a chat (default: the tokenizer's)")
    parser.add_argument("--max-prompt-tokens", type=positive, default=2**17, help="longer ones: 400 (%(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, default=2**13, help="of one answer (%(default)s)")
    parser.add_argument("--max-request-bytes", type=size, default=2**23, help="larger ones: 413 (%(default)s)")
    parser.add_argument(
        "--prefix-bytes", type=size, default=10**9, help="for beginnings of prompts; 0: remember none (%(default)s)"
    )
    parser.add_argument("--prefix-folder", metavar="FOLDER", help="keep them as files, too")
    parser.add_argument("--prefix-folder-bytes", type=size, metavar="SIZE", help="of these files (no limit)")
    parser.add_argument("--log-level", default="warning", help="of Transformers (%(default)s)")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="any other option of `transformers serve`, as in compile=true or default_seed=0",
    )


def add_parsers(commands) -> None:
    """Add the commands to a command line."""
    serve = commands.add_parser(
        "serve",
        help="answer OpenAI's clients on this machine, one request after the other (extra `serve`)",
        description="`transformers serve` for one model, with a store of prefixes; for many users there is vLLM.",
        **examples(
            "serve outputs/demo/model",
            "serve me/my-model --port 8080 --prefix-bytes 4GB --prefix-folder prefixes",
            "serve me/my-model --option default_seed=0 --option enable_cors=true",
        ),
    )
    _add_serving(serve)
    serve.add_argument("--host", default="localhost", help="address to listen on (%(default)s)")
    serve.add_argument("--port", type=count, default=8000, help="(%(default)s)")
    serve.set_defaults(run=run_serve)
    chat = commands.add_parser(
        "chat",
        help="talk to a model in the terminal (extra `serve`)",
        **examples("chat me/my-model", "chat me/my-model max_new_tokens=400 do_sample=false --system 'Be brief.'"),
    )
    _add_serving(chat)
    chat.add_argument("flags", nargs="*", metavar="FLAG=VALUE", help="of `generate`")
    chat.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    chat.set_defaults(run=run_chat)
    page = commands.add_parser(
        "ui",
        help="a page that shows which parts of a text an answer was read from (extra `ui`)",
        **examples("ui outputs/demo/model", "ui me/my-model --port 7861"),
    )
    _add_common(page)
    page.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    page.add_argument("--port", type=count, default=7860, help="(%(default)s)")
    page.set_defaults(run=run_ui)
