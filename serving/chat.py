# Copyright 2026 the mc-transformers authors.
"""A conversation in the terminal: Transformers' chat, with a server of its own behind it."""

import socket
import time

from huggingface_hub import constants
from transformers.cli.chat import Chat

from .server import Limits, Prefixes, serve


PATIENCE = 30.0  # seconds for the server to open its port


def chat(
    checkpoint: str,
    flags: list[str] | None = None,
    system: str | None = None,
    limits: Limits | None = None,
    prefixes: Prefixes | None = None,
    chat_template: str | None = None,
    **options,
) -> None:
    """Talk to a model until `!exit`; a turn reads what is new only.

    Args:
        checkpoint: a folder or a Hub repository with a tokenizer. flags: of `generate`, `max_new_tokens=200`.
        system: what the conversation begins with. The others: as of `serve`, which see for the errors.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"limits": limits, "prefixes": prefixes, "chat_template": chat_template}
    running = serve(checkpoint, **common, background=True, port=port, **options)
    offline = constants.HF_HUB_OFFLINE
    try:
        wait(running)
        constants.HF_HUB_OFFLINE = False  # the Hub's client would not even ask this machine
        Chat(checkpoint, f"http://localhost:{port}", list(flags or ()), system_prompt=system)
    except EOFError:  # the end of what was piped in
        pass
    finally:
        constants.HF_HUB_OFFLINE = offline
        running.kill_server()


def wait(running) -> None:
    """Until a server in the background answers.

    Raises:
        RuntimeError: it does not.
    """
    end = time.monotonic() + PATIENCE
    while not running.server.started:
        if time.monotonic() > end or not running._thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.05)
