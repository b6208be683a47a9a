# Copyright 2026 the mc-transformers authors.
"""Weights of a checkpoint, one tensor at a time, whatever file they lie in; nothing in a file is ever executed."""

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..hub.inputs import check_inside, read_index
from .sharded import INDEX, read_sharded


class Weights:
    """Names and tensors of a checkpoint, in the order of its files.

    Args:
        loaders: per file its path, and a function that gives (name, tensor) pairs one after the other.
    """

    def __init__(self, loaders: list[tuple[Path, Callable[[], Iterator[tuple[str, torch.Tensor]]]]]) -> None:
        self._loaders = loaders

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for path, load in self._loaders:
            try:
                yield from load()
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or cut off ({error})") from error


def _safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def _pickled(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds code, which is not run, or is damaged: save a plain state dict") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off ({str(error).splitlines()[0]})") from error
    for key in NESTED:  # training scripts store more beside the weights
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
        raise ValueError(f"{path} is not a state dict: a dictionary of names and tensors is needed")
    yield from found.items()


NESTED = ("state_dict", "model")
LAYOUTS = (("model", "safetensors", _safetensors), ("pytorch_model", "bin", _pickled))


def open_weights(path: str | Path) -> Weights:
    """Weights of a file, or of a folder: safetensors before pickled state dicts, with or without shards, and what
    `torch.distributed.checkpoint` writes, also one folder deeper, where accelerate and the Trainer put it.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing. ValueError: a damaged index.
    """
    path = Path(path)
    if path.is_file():
        return Weights([(path, partial(_safetensors if path.suffix == ".safetensors" else _pickled, path))])
    for stem, suffix, load in LAYOUTS:
        index, single = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        names = [single.name] if single.exists() else []
        if index.exists():
            names = read_index(index)
        check_inside(path, names, index.name if index.exists() else "")
        if names:
            return Weights([(path / name, partial(load, path / name)) for name in names])
    for folder in (path, *sorted(path.glob("pytorch_model_fsdp_*")), path / "model"):
        if (folder / INDEX).is_file():
            return Weights([(folder, partial(read_sharded, folder))])
    raise FileNotFoundError(
        f"{path} holds no model.safetensors, no pytorch_model.bin (nor an index of shards) and no {INDEX}"
    )
