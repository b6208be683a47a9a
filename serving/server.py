# Copyright 2026 the mc-transformers authors.
"""One machine, one model: `transformers serve` for the family, with a prefix store behind it, and limits.

The server, its endpoints and its queue are Transformers' own; requests are bounded, and `generate` gets the store.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import server as transformers_server
from transformers.cli.serving.utils import GenerateManager

from ..hub.loading import load_config, load_tokenizer
from ..modeling_mc.prefix_store import PrefixStore


# options of `transformers serve` that are set here, or that the family cannot have
OURS = ("self", "force_model", "non_blocking", "model_timeout")
REFUSED = {"continuous_batching": "its paged cache holds keys and values of attention only; vLLM serves many users"}


@dataclass(frozen=True)
class Limits:
    """The largest request that is answered.

    Attributes:
        prompt_tokens: of a prompt. new_tokens: of an answer. body_bytes: of a request.
    """

    prompt_tokens: int = 2**17
    new_tokens: int = 2**13
    body_bytes: int = 2**23


@dataclass(frozen=True)
class Prefixes:
    """What the prefix store may take, see `PrefixStore`; `max_bytes`=0: there is none."""

    max_bytes: int = 2**30
    folder: str | None = None
    max_folder_bytes: int | None = None


class Manager(GenerateManager):
    """Transformers' manager of `generate` on one thread, with bounds and a prefix store."""

    def __init__(self, limits: Limits, prefixes: Prefixes) -> None:
        super().__init__()
        self.limits, self.prefixes = limits, prefixes
        self.store: tuple[PreTrainedModel, PrefixStore] | None = None

    def store_of(self, model: PreTrainedModel) -> PrefixStore | None:
        """The store of the model that is loaded; a new one if it was loaded anew."""
        if not self.prefixes.max_bytes:
            return None
        if self.store is None or self.store[0] is not model:
            options = (self.prefixes.max_bytes, self.prefixes.folder, self.prefixes.max_folder_bytes)
            self.store = model, PrefixStore(model, *options)
        return self.store[1]

    def _ready(self, model: PreTrainedModel, inputs: dict, settings) -> dict:
        """`inputs` as `generate` gets them.

        Raises:
            HTTPException: 400, more tokens than are allowed, or none.
        """
        asked, new = inputs["input_ids"].shape[-1], settings.max_new_tokens
        for name, value, most in (
            ("the prompt", asked, self.limits.prompt_tokens),
            ("max_tokens", new or 1, self.limits.new_tokens),
        ):
            if not 1 <= value <= most:
                raise HTTPException(400, f"{name} has {value} tokens, allowed: 1 to {most}")
        return {**inputs, "prefix_store": self.store_of(model)}

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        inputs = self._ready(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        inputs = self._ready(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)


class BoundedBodies:
    """ASGI middleware that answers 413 to requests of more than `max_bytes` bytes, also where no length is given."""

    def __init__(self, app: Callable, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        seen = int(said) if said.isdigit() else 0
        body = bytearray()
        while seen <= self.max_bytes:  # as a whole, so that nothing runs on half of it
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.max_bytes or not message.get("more_body"):
                break
        if max(seen, len(body)) > self.max_bytes:
            error = f"the request has more than {self.max_bytes} bytes, which is the most that is allowed"
            return await JSONResponse({"detail": error}, 413)(scope, receive, send)
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> dict:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


def _extend(app: FastAPI, manager: Manager, model_manager, name: str) -> FastAPI:
    """What our server has besides that of Transformers."""
    load = model_manager.load_model_streaming

    def load_ours(wanted: str, *args, **kwargs):
        if wanted != model_manager.process_model_name(name):
            raise HTTPException(400, f"this server has one model, {name!r}, and does not load {wanted!r}")
        return load(wanted, *args, **kwargs)

    model_manager.load_model_streaming = load_ours
    app.add_middleware(BoundedBodies, max_bytes=manager.limits.body_bytes)

    @app.exception_handler(ValueError)
    async def refused(request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.get("/prefixes")
    def prefixes() -> dict:
        return manager.store[1].stats() if manager.store else {}

    return app


@contextmanager
def _building(manager: Manager, name: str, template: str | None) -> Iterator[None]:
    """Inside, the server that `Serve` builds is extended."""
    build = transformers_server.build_server

    def extended(*args, **kwargs) -> FastAPI:
        given = inspect.signature(build).bind(*args, **kwargs).arguments
        models = given["model_manager"]
        given["chat_handler"].generation_state.get_manager = lambda model_id, use_cb=False: manager
        if template is not None:
            loaded = models.load_model_and_processor

            def with_template(*args, **kwargs):
                model, processor = loaded(*args, **kwargs)
                processor.chat_template = template
                return model, processor

            models.load_model_and_processor = with_template
        manager.store_of(models.load_model_and_processor(models.process_model_name(name))[0])  # hashes the weights
        return _extend(build(*args, **kwargs), manager, models, name)

    transformers_server.build_server = extended
    try:
        yield
    finally:
        transformers_server.build_server = build


def options_of_serve() -> dict[str, inspect.Parameter]:
    """What `transformers serve` of the installed version takes, and we pass on."""
    known = inspect.signature(Serve.__init__).parameters
    return {name: p for name, p in known.items() if name not in (*OURS, *REFUSED) and not name.startswith("cb_")}


def serve(
    checkpoint: str,
    limits: Limits | None = None,
    prefixes: Prefixes | None = None,
    chat_template: str | None = None,
    background: bool = False,
    **options,
) -> Serve:
    """Answer the requests of OpenAI's clients for one model, one after the other, until interrupted.

    Endpoints: /v1/chat/completions and /v1/completions, whole and streamed, /v1/models, /health; and /prefixes, what
    the prefix store has done.

    Args:
        checkpoint: a folder or a Hub repository with a tokenizer. limits: of requests. prefixes: of the prefix store.
        chat_template: Jinja, or a file with it; by default the tokenizer's own.
        background: return at once, and serve on a thread until `kill_server()` is called.
        options: of `transformers serve`: `host` ("localhost"), `port` (8000), `device`, `dtype`, `compile`, ...

    Raises:
        ValueError: an option that there is not, or a checkpoint of another family. OSError: no such checkpoint.
    """
    for name, value in options.items():
        if name in REFUSED and value:
            raise ValueError(f"serve: `{name}`={value!r} is not possible: {REFUSED[name]}")
        if name not in options_of_serve():
            raise ValueError(f"serve: no option {name!r}, allowed: {', '.join(options_of_serve())}")
    load_config(checkpoint)
    load_tokenizer(checkpoint)
    if chat_template is not None and Path(chat_template).is_file():
        chat_template = Path(chat_template).read_text("utf-8")
    options = {"device": "cuda" if torch.cuda.is_available() else "cpu"} | options
    manager = Manager(limits or Limits(), prefixes or Prefixes())
    with _building(manager, checkpoint, chat_template):
        return Serve(force_model=checkpoint, non_blocking=background, **options)


def parse(name: str, text: str) -> object:
    """The value of an option of `transformers serve` as written on a command line.

    Raises:
        ValueError: no such option, or not a value of its kind.
    """
    known = options_of_serve()
    if name not in known:
        raise ValueError(f"serve: no option {name!r}, allowed: {', '.join(known)}")
    if "int" in str(known[name].annotation) or "bool" in str(known[name].annotation):
        try:
            return json.loads(text.lower())
        except ValueError:
            raise ValueError(f"serve: `{name}`={text!r} is not valid, allowed: a number, true or false") from None
    return text
