# Copyright 2026 the mc-transformers authors.
"""One layer on both backends, on random input: are the Triton kernels right and faster? Asked by `qualify.py`."""

import json
import sys
import time
from collections.abc import Callable

import torch

from .cache import MCCache
from .layer import config_of_layer
from .mixer import MCMixer


LONG = 8192  # tokens of the longer text that is timed
REPEATS = 5
Found = dict[str, torch.Tensor]


def tolerance(dtype: torch.dtype, name: str) -> float:
    """RMS of the difference / RMS up to which a tensor is the same."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return (1e-3 if exact else 1e-2) * (2 if name.startswith("gradient") else 1)


def layer_of(fields: dict, dtype: torch.dtype, device: torch.device) -> MCMixer:
    """A layer of a kind, with weights that have an effect."""
    config = config_of_layer("qualify", fields, fields, num_hidden_layers=1)
    mixer = MCMixer(config, 0).to(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if parameter.dim() == 1 or name.endswith("_bias.bias"):  # norms, gates: around what they start at
                parameter.copy_(noise / 4 + (1.0 if "norm" in name else 2.0))
            else:
                parameter.copy_(noise * (3 if "u_proj" in name else 1) * parameter.shape[-1] ** -0.5)
    return mixer


def text(mixer: MCMixer, rows: int, num_tokens: int, seed: int) -> torch.Tensor:
    weight = mixer.k_proj.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    shape = (rows, num_tokens, mixer.config.hidden_size)
    return torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_(generator=generator)


def train(mixer: MCMixer, x: torch.Tensor, cu_seq_lens: torch.Tensor | None = None) -> Found:
    """A forward and a backward."""
    x = x.detach().requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    with torch.enable_grad():
        out = mixer(x, mixer.table(x, cu_seq_lens=cu_seq_lens))
        weights = torch.linspace(-1, 1, out.shape[1], device=x.device)[None, :, None]
        grads = torch.autograd.grad(
            (out.float() * (out.float().detach() + weights)).sum(), [x, *parameters], allow_unused=True
        )
    found = {f"gradient of {name}": grad for name, grad in zip(("input", *names), grads, strict=True)}
    return {"output": out.detach()} | {name: grad for name, grad in found.items() if grad is not None}


@torch.no_grad()
def infer(mixer: MCMixer, pieces: list[torch.Tensor]) -> Found:
    """Pieces of a text one after the other, with a cache; what they answer, and what they leave."""
    cache = MCCache(config=mixer.config)
    out = []
    for x in pieces:
        layer = cache.layers[0] if cache.layers[0].is_initialized else None
        out.append(mixer(x, mixer.table(x, layer=layer), cache))
    kept = {f"cache {name}": x for name, x in cache.layers[0].tensors.items() if x.is_floating_point()}
    return {f"output {number}": x for number, x in enumerate(out)} | kept


def cases(mixer: MCMixer, training: bool) -> dict[str, Callable[[], Found]]:
    """Whole and ragged segments, packed documents; a prompt, its continuation, and single tokens."""
    size = mixer.config.segment_size
    if not training:
        x = text(mixer, 2, 4 * size + size // 2 + 3, 1)
        return {"inference": lambda: infer(mixer, list(x.split([3 * size + size // 2, size + 1, 1, 1], 1)))}
    whole, ragged = text(mixer, 2, 3 * size, 2), text(mixer, 1, 3 * size + size // 2 + 1, 3)
    borders = torch.tensor([0, size + size // 2 + 1, 3 * size + size // 2 + 1], device=whole.device)
    return {
        "whole segments": lambda: train(mixer, whole),
        "a ragged end": lambda: train(mixer, ragged),
        "packed documents": lambda: train(mixer, ragged, borders),
    }


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference / RMS; infinite where a number is not finite."""
    if not bool(actual.isfinite().all()):
        return float("inf")
    size = expected.float().square().mean().sqrt().item()
    error = (actual.float() - expected.float()).square().mean().sqrt().item()
    return error / size if size > 1e-12 else error


def compare(mixer: MCMixer, training: bool) -> dict:
    """`right`, the largest `error`, and `where` it is or what is wrong."""
    worst, where, right = 0.0, "", True
    for case, run in cases(mixer, training).items():
        mixer.config.mc_backend = "torch"
        expected = run()
        mixer.config.mc_backend = "triton"
        actual, once_more = run(), run()
        for name, tensor in actual.items():
            error, place = difference(tensor, expected[name]), f"{case}: {name}"
            fits = error < tolerance(mixer.k_proj.weight.dtype, name)
            if fits and not torch.equal(tensor, once_more[name]):
                error, fits, place = float("inf"), False, f"{place} (differs from run to run)"
            if (not fits and right) or (fits == right and error > worst):
                worst, where = error, place
            right = right and fits
    return {"right": right, "error": worst, "where": where}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return sorted(once() for _ in range(REPEATS))[REPEATS // 2]


def speed(mixer: MCMixer, training: bool) -> dict[str, float]:
    """How many times as fast as torch, by text."""
    size, device = mixer.config.segment_size, mixer.k_proj.weight.device
    runs: dict[str, Callable[[], object]] = {}
    for num_tokens in (2 * size, max(1, LONG // size) * size):
        x = text(mixer, 1, num_tokens, 4)
        if training:
            runs[f"{num_tokens} tokens"] = lambda x=x: train(mixer, x)
        else:
            runs[f"{num_tokens} tokens"] = lambda x=x: infer(mixer, [x])
    if not training:
        first = text(mixer, 1, 4 * size, 5)
        runs["8 single tokens"] = lambda: infer(mixer, [first, *first[:, :8].split(1, 1)])
    found = {}
    for name, run in runs.items():
        times = {}
        for backend in ("torch", "triton"):
            mixer.config.mc_backend = backend
            times[backend] = seconds(run, device)
        found[name] = times["torch"] / times["triton"]
    return found


def look(fields: dict, dtype: torch.dtype, device: torch.device, training: bool, timed: bool) -> dict:
    """What `qualify` wants to know of a layer kind.

    Args:
        fields: of `MCConfig`. timed: also how fast; where the kernels are wrong that is not asked.

    Returns:
        `right` (bool), `error` (float), `where` (str) and `speedup` (float by text).
    """
    mixer = layer_of(fields, dtype, device)
    found = compare(mixer, training) | {"speedup": {}}
    if found["right"] and timed:
        found["speedup"] = speed(mixer, training)
    return found


def answer() -> None:
    """What the other process does: a request on stdin, what it has seen as the last line of stdout."""
    request = json.loads(sys.stdin.read())
    key = request["key"]
    if key["precision"] is not None:
        torch.backends.cuda.matmul.fp32_precision = key["precision"]
    dtype, device = getattr(torch, key["dtype"]), torch.device(request["device"])
    try:
        seen = look(key["kind"], dtype, device, key["pass"] == "training", request["timed"]) | {"kept": True}
    except torch.OutOfMemoryError:
        seen = {"problem": "no memory for a look", "kept": False}
    except torch.AcceleratorError as error:  # the GPU belongs to one process alone, or the kernels broke it
        passing = any(words in str(error) for words in ("unavailable", "out of memory"))
        seen = {"problem": f"{type(error).__name__}: {error}"[:300], "kept": not passing}
    except Exception as error:
        seen = {"problem": f"{type(error).__name__}: {error}"[:300], "kept": True}
    print("\n" + json.dumps(seen), flush=True)
