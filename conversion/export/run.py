# Copyright 2026 the mc-transformers authors.
"""`mc-transformers export`: a folder with two graphs, what they begin with, and what a program must know of them."""

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import __version__ as transformers_version

from ...hub.files import new_folder
from ...hub.loading import load_config, load_model
from ...kernels.shared.inlined import Inlined
from ...modeling_mc.fingerprint import fingerprint
from . import graph, limits
from .onnx_files import save_graphs


FORMAT = 1
MANIFEST, START = "export.json", "start.bin"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
# of the config, what a program that runs the graphs needs or shows
FIELDS = ("memory", "aggregation", "segment_size", "max_cached_segments", "vocab_size", "num_hidden_layers")


def export(
    checkpoint: str,
    output: str | Path,
    to: str = "onnx",
    *,
    weights: str = "float32",
    max_length: int | None = None,
    piece: int = 64,
    reads: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as two graphs with a static cache: `prefill` reads a piece of a prompt, `decode` one token.

    Args:
        checkpoint: a folder or a Hub repository. output: the folder to write, see docs/export.md.
        to: "onnx" or "torch" (`torch.export`). weights: "float32", or "int8" (of ONNX: dynamic quantisation).
        max_length: tokens that the cache has room for; by default the config's `max_position_embeddings`. A cache
            that is bounded anyway takes any number.
        piece: tokens that `prefill` reads at a time. reads: let `decode` say which segments were read.
        overwrite: replace `output` if it exists.

    Returns:
        The folder.

    Raises:
        ImportError: packages are missing or too old. ValueError: a model or a request that no graph can express.
        FileExistsError: `output` is there already.
    """
    limits.check_request(to, weights, piece)
    limits.check_packages(to)
    config = load_config(checkpoint, revision)
    limits.check_config(config)
    max_length = config.max_position_embeddings if max_length is None else max_length
    if max_length < 1:
        raise ValueError(f"export: `max_length`={max_length} is not valid, allowed: whole numbers from 1 on")
    with new_folder(output, overwrite, checkpoint) as folder:
        model = load_model(checkpoint, "float32", revision=revision, head="MCForCausalLM")
        model.config.mc_backend = "torch"
        states = graph.first_states(model, max_length)
        steps = graph.steps(model, states, max_length, piece, reads)
        programs = trace(steps, to, weights)
        if to == "onnx":
            save_graphs(programs, folder)
        else:
            for name, program in programs.items():
                torch.export.save(program, folder / f"{name}{SUFFIX[to]}")
        about = _start(states, folder)
        manifest = _manifest(model, max_length, piece, to) | {"weights": weights, "reads": reads, "states": about}
        for name in TOKENIZER:
            if (Path(checkpoint) / name).is_file():
                shutil.copy(Path(checkpoint) / name, folder / name)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Path(output)


def trace(steps: dict[str, tuple[nn.Module, dict]], to: str, weights: str = "float32") -> dict[str, object]:
    """Programs by name from Transformers' exporters: `onnx_ir.Model`, or `torch.export.ExportedProgram`.

    Args:
        steps: see `graph.steps`. to, weights: see `export`.
    """
    from transformers import exporters

    with torch.no_grad(), Inlined(), _quiet():
        return _trace(exporters, steps, to, weights)


def _trace(exporters, steps, to: str, weights: str) -> dict[str, object]:
    if to == "torch":
        exporter, config = exporters.DynamoExporter(), exporters.DynamoConfig()
    else:
        quantizer = None
        if weights == "int8":
            dynamic = exporters.OnnxRuntimeDynamicConfig(per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
            quantizer = exporters.OnnxRuntimeQuantizer(dynamic)
        exporter, config = exporters.OnnxExporter(), exporters.OnnxConfig(quantizer=quantizer)
    return {name: exporter.export(step, dict(inputs), config).program for name, (step, inputs) in steps.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of exporters, which are about functions that our graphs do not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _start(states: list[dict[str, torch.Tensor]], folder: Path) -> list[dict]:
    """Write what states are before the first token, where it is not zero, and describe them all: name, shape, dtype,
    whether they have a slot per segment, and where in start.bin they begin."""
    found, seen, end = [], set(), 0
    with (folder / START).open("wb") as file:
        for layer, tensors in enumerate(states):
            for name, tensor in tensors.items():
                full = graph.state_name(layer, name)
                if full in seen:
                    continue
                seen.add(full)
                about = {"name": full, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
                about["kept"] = name.startswith(graph.KEPT)
                if bool(tensor.any()):
                    about["start"] = end
                    end += file.write(tensor.cpu().numpy().tobytes())
                found.append(about)
    return found


def _manifest(model: nn.Module, max_length: int, piece: int, to: str) -> dict:
    config, ends = model.config, model.generation_config.eos_token_id
    endless = config.aggregation == "none" or config.max_cached_segments is not None
    return {
        "format": FORMAT,
        "files": {name: f"{name}{SUFFIX[to]}" for name in ("prefill", "decode")},
        "model": {name: getattr(config, name) for name in FIELDS},
        "fingerprint": fingerprint(model.model),
        "eos_token_ids": [ends] if isinstance(ends, int) else list(ends or ()),
        "max_length": None if endless else max_length,
        "piece": piece,
        "made_with": {"torch": torch.__version__, "transformers": transformers_version},
    }
