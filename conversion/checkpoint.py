# Copyright 2026 the mc-transformers authors.
"""What is converted, whatever it lies in: a config, weights, and the files beside them; a folder of Transformers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..hub.inputs import check_attention, check_extras, read_json
from .reader import open_weights


class Checkpoint(Protocol):
    """A source of a conversion.

    Attributes:
        path: the file or folder. config: config.json of the model as a dictionary.
    """

    path: Path
    config: dict

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs, under the names of the source's format."""

    def copy_extras(self, folder: Path) -> None:
        """Write tokenizer, chat template and generation config into `folder`, where there are any."""

    def load(self, config: PreTrainedConfig | None, names: dict[str, str] | None) -> PreTrainedModel:
        """The source as a model of Transformers, in fp32."""


class Folder:
    """A folder with config.json and weights.

    Raises:
        FileNotFoundError: no config.json. ValueError: it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path / "config.json")

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return open_weights(self.path)

    def copy_extras(self, folder: Path) -> None:
        copy_extras(self.path, folder)

    def load(self, config: PreTrainedConfig | None, names: dict[str, str] | None) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.path, config=config, key_mapping=names, dtype=torch.float32, trust_remote_code=False
        )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, of which only the config has been read so far.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `Folder` and `gguf.GGUFFile`.
    """
    from .gguf import GGUFFile, is_gguf

    return GGUFFile(path) if is_gguf(path) else Folder(path)


def read_config(path: Path) -> dict:
    """A config.json as it is written.

    Raises:
        ValueError: no JSON, or not a dictionary, or it names code that loading would fetch.
    """

    def decode(value: dict) -> object:  # Transformers writes infinity as a dictionary
        return float(value["__float__"]) if set(value) == {"__float__"} else value

    config = read_json(path, decode)
    check_attention(path, config)
    return config


def copy_extras(checkpoint: Path, folder: Path) -> None:
    """Tokenizer, chat templates and generation config, where there are any.

    Raises:
        ValueError: see `check_extras`.
    """
    for extra in check_extras(checkpoint):
        target = folder / extra.relative_to(checkpoint)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(extra.read_bytes())
