# Copyright 2026 the mc-transformers authors.
"""The command `qualify`: whether this GPU's Triton kernels are right and faster, asked before a training does."""

import argparse

import torch

from ..configuration_mc import LAYER_TYPE
from ..hub import facts
from ..hub.loading import default_device, load_config
from .arguments import amount, examples


HALF = ("bfloat16", "float16", "float32")


def run_qualify(args: argparse.Namespace) -> None:
    from ..modeling_mc.memories import MEMORIES
    from ..modeling_mc.qualify import DEVICES, SECONDS, kind_of, qualify

    config = load_config(args.checkpoint, args.revision, presets=True)
    device = torch.device(args.device)
    if device.type not in DEVICES:
        raise ValueError(f"--device {device} always takes torch, allowed: a GPU, as in cuda or cuda:1")
    if LAYER_TYPE not in config.layer_types or not MEMORIES[config.memory].has_triton:
        raise ValueError(f"{args.checkpoint}: memory={config.memory!r} has no Triton kernels")
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    kind, rows = kind_of(config, config.memory_heads), []
    for name in ("training", "inference"):
        found = qualify(kind, getattr(torch, args.dtype), device, name, args.again, args.seconds or SECONDS)
        times = ", ".join(f"{text}: {ratio:.2f} x" for text, ratio in found["speedup"].items())
        rows.append((name, found["why"], times, found["file"]))
    print(facts.table(rows, ("pass", "backend", "faster than torch", "file")))


def add_parser(commands) -> None:
    """Add the command to a command line."""
    parser = commands.add_parser(
        "qualify",
        help="whether the Triton kernels are right and faster on this GPU, which mc_backend='auto' then takes",
        description="Runs one layer of a model in a process of its own with both backends, and keeps the verdict in a "
        "file. A training or a generation does the same when it first meets a kind of layer.",
        **examples("qualify mc-760m", "qualify me/my-model --dtype float32 --again"),
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder, a Hub repository, or a preset (mc-170m, ...)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--dtype", choices=HALF, default="bfloat16", help="of activations (%(default)s)")
    parser.add_argument("--device", default=default_device(), help="device to look at (%(default)s)")
    parser.add_argument("--again", action="store_true", help="also where there is a verdict")
    parser.add_argument("--seconds", type=amount, help="for each pass (120)")
    parser.set_defaults(run=run_qualify)
