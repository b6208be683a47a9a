# Copyright 2026 the mc-transformers authors.
"""What is converted, whatever it lies in: a config, weights, and the files beside them; a folder of Transformers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .reader import open_weights


COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)


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
        return AutoModelForCausalLM.from_pretrained(self.path, config=config, key_mapping=names, dtype=torch.float32)


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
        ValueError: no JSON, or not a dictionary.
    """

    def decode(value: dict) -> object:  # Transformers writes infinity as a dictionary
        return float(value["__float__"]) if set(value) == {"__float__"} else value

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=decode)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a dictionary, as a config does")
    return found


def copy_extras(checkpoint: Path, folder: Path) -> None:
    """Tokenizer and generation config, where there are any."""
    for extra in [*(checkpoint / name for name in COPIED), *checkpoint.glob("additional_chat_templates/*.jinja")]:
        if extra.is_file():
            target = folder / extra.relative_to(checkpoint)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(extra.read_bytes())
