# Copyright 2026 the mc-transformers authors.
"""Safetensors in shards, written as the tensors come."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB.

    Raises:
        ValueError: something else.
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if not match:
        raise ValueError(f"max_shard_size={text!r} is not a size, allowed: a whole number with KB, MB or GB")
    return int(match[1]) * UNITS[match[2]]


class ShardWriter:
    """Holds at most one shard in memory; `close` gives the files their names, which hold the number of shards."""

    def __init__(self, folder: Path, max_shard_size: str = "5GB") -> None:
        self.folder, self.limit = Path(folder), parse_size(max_shard_size)
        self.waiting: dict[str, torch.Tensor] = {}
        self.size = self.total = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One more tensor, which must own its memory.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        if self.waiting and self.size + tensor.nbytes > self.limit:
            self._flush()
        self.waiting[name] = tensor.contiguous()
        self.size += tensor.nbytes

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}"

    def _flush(self) -> None:
        try:
            save_file(self.waiting, self._path(len(self.shards)), {"format": "pt"})
        except SafetensorError as error:  # of a full disk too
            raise OSError(f"the weights cannot be written to {self.folder} ({error})") from error
        self.shards.append(list(self.waiting))
        self.total += self.size
        self.waiting, self.size = {}, 0

    def close(self) -> None:
        """Write what is left, and the index if there is more than one shard."""
        if self.waiting:
            self._flush()
        count = len(self.shards)
        if count == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        places = {}
        for number, names in enumerate(self.shards):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._path(number).rename(self.folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
