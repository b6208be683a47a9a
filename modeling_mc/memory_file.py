# Copyright 2026 the mc-transformers authors.
"""A memory as a file: read a long document once, ask questions about it later, in another process."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..configuration_mc import MCConfig


FILE = "memory.safetensors"
FORMAT = 1
# config entries that do not change what a model writes into its memory
IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "mc_backend",
    "transformers_version",
    "trained_as",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_hidden_states",
    "tie_word_embeddings",
}
# Fields that an earlier version did not have: where they have their defaults they do not count, or its files would be
# refused.
LATER_FIELDS = ("online_memory", "online_gate_bias", "cached_answers", "cached_answers_start")
# written as if they were not set, and read both ways: files of earlier versions say how they were set
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLES = 256  # values per parameter that enter the fingerprint


def fingerprints(model: nn.Module) -> tuple[str, str]:
    """Hashes of a model's config and weights: names, shapes and up to 256 evenly spaced values per parameter. The
    first one is written; files of earlier versions may hold the second, in which special tokens count."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in IRRELEVANT}
    for name in LATER_FIELDS:
        if config[name] == MCConfig.__dataclass_fields__[name].default:
            del config[name]
    return _hash(model, config | dict.fromkeys(TOKEN_IDS)), _hash(model, config)


def _hash(model: nn.Module, config: dict) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        place = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(flat[place.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def write(directory: str | os.PathLike, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write `memory.safetensors` into `directory`, under a temporary name until it is complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / (FILE + ".partial")
    try:
        contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"format": "pt", "mc_memory": json.dumps({**meta, "version": FORMAT})})
        os.replace(partial, directory / FILE)
    finally:
        partial.unlink(missing_ok=True)


def read(directory: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the description that `write` stored.

    Raises:
        FileNotFoundError: no memory file in `directory`.
        ValueError: the file is truncated, or something else, or of a newer version.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"`directory`={str(directory)!r} holds no {FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["mc_memory"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is incomplete or not a memory file ({error})") from error
    if meta.get("version") != FORMAT:
        raise ValueError(f"{path} has format version {meta.get('version')}, this version reads {FORMAT}")
    return tensors, meta
