# Copyright 2026 the mc-transformers authors.
"""Compiling a model's Triton kernels before they are needed."""

import logging
import time

import torch
from torch import nn

from ..kernels.shared.ops import choose_backend
from .cache import MCCache
from .mixer import MCMixer
from .qualify import FUSED, auto_backend


SEGMENTS = 8  # of the text that kernels are compiled, and their variants timed, with
logger = logging.getLogger(__name__)


def warmup(model: nn.Module, training: bool = True, state_dtype: torch.dtype | None = None) -> list[str]:
    """Compile the Triton kernels that `model` needs, so that no step of a training and no token has to wait for them.

    A layer of every kind runs on random tokens: forward and backward, a prompt, its continuation and one token more.
    Triton keeps kernels on disk, so a second process starts fast. With `mc_backend="auto"` it is found out first
    whether they are right and faster here; compiled models only look that up. What is not covered: texts
    shorter than a segment.
    Weights, gradients and random numbers stay as they are.

    Args:
        model: of this family, also wrapped (PEFT), on the device and in the dtype in which it will run.
        training: also the backward; without it only what `generate()` needs.
        state_dtype: of the `MCCache` that will be used.

    Returns:
        what was warmed up, one line per kind of layer; empty where the kernels are torch's (`mc_backend`, the device),
        which needs no warm-up and is logged.

    Raises:
        ValueError: `model` has no memory layer, or its `mc_backend` is "triton" and not available here.
    """
    mixers: dict[tuple, MCMixer] = {}
    for module in model.modules():
        if isinstance(module, MCMixer):
            mixers.setdefault((id(module.config), module.k_proj.weight.device), module)
    if not mixers:
        raise ValueError(f"warmup: `model`={type(model).__name__} has no memory layers, allowed: a model with some")
    done = []
    for (_, device), mixer in mixers.items():
        kind, config = f"{mixer.config.memory} {mixer.config.aggregation} on {device}", mixer.config
        example = torch.empty(0, dtype=getattr(model, "dtype", torch.float32), device=device)
        widths = (mixer.memory.key_dim, mixer.memory.value_dim)
        if choose_backend(_asked(mixer, example, training), "warmup", example, *widths) == "torch":
            logger.warning("warmup: %s runs torch (`mc_backend`=%r): nothing to compile", kind, config.mc_backend)
            continue
        start = time.perf_counter()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _run(mixer, example, training, state_dtype)
        done.append(f"{kind}: {time.perf_counter() - start:.1f} s")
    return done


def _asked(mixer: MCMixer, example: torch.Tensor, training: bool) -> str:
    """The backend that the ops are asked for, in one of the passes at least; "auto" is decided now."""
    chosen = mixer.config.mc_backend
    if chosen != "auto":
        return chosen
    with torch.enable_grad():
        trained = [auto_backend(mixer.memory, mixer.kind, example.detach().requires_grad_())] if training else []
    found = [auto_backend(mixer.memory, mixer.kind, example), *trained]
    return FUSED if FUSED in found else chosen


def _run(mixer: MCMixer, example: torch.Tensor, training: bool, state_dtype: torch.dtype | None) -> None:
    size = mixer.config.segment_size
    x = example.new_empty(1, SEGMENTS * size, mixer.config.hidden_size).normal_()
    trained = [p for p in mixer.parameters() if p.requires_grad]
    if training:
        with torch.enable_grad():
            out = mixer(x.requires_grad_(), mixer.table(x))
            torch.autograd.grad(out.float().pow(2).sum(), [x, *trained], allow_unused=True)
    with torch.no_grad():
        cache = MCCache(config=mixer.config, state_dtype=state_dtype)
        mixer(x, mixer.table(x), cache)
        for num_tokens in (2 * size, 1):
            part = x[:, :num_tokens]
            # the mask of one token: rows that are padding take one kernel more
            mask = torch.ones(1, 1, dtype=torch.bool, device=x.device) if num_tokens == 1 else None
            mixer(part, mixer.table(part, mask, cache.layers[mixer.layer_idx]), cache)
