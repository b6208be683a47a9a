# Copyright 2026 the mc-transformers authors.
"""Segments of prefixes as files: safetensors, with the checksum of memory files, written whole or not at all."""

import os
import warnings
from pathlib import Path

import torch
from torch import nn

from .cache import MCCache
from .memory_file import FILE, reading, write
from .prefix_parts import Parts, take


class PrefixFiles:
    """A folder with one file per segment, in a folder named by the segment's key.

    Attributes:
        folder: created if it is missing. max_bytes: of all files, the ones used longest ago are removed; None = any.
        refused: files that were damaged or of something else.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int | None) -> None:
        self.folder, self.max_bytes, self.refused = Path(folder), max_bytes, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._expected: dict | None = None

    def _place(self, key: bytes) -> Path:
        return self.folder / key.hex()

    def save(self, key: bytes, about: dict, parts: Parts) -> None:
        """Write one segment; `about` (JSON) must be the same when it is loaded. A folder that cannot be written is
        warned about: what is in memory serves without it."""
        if (self._place(key) / FILE).exists():
            return
        tensors = {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}
        try:
            write(self._place(key), tensors, {"prefix": about})
            self._trim()
        except OSError as error:
            warnings.warn(f"PrefixStore: {self.folder} cannot be written ({error})", stacklevel=2)

    def load(self, key: bytes, about: dict, model: nn.Module) -> Parts | None:
        """The segment that was saved, on the devices of `model`; None without a file, or with one that is damaged, of
        something else, or not what a segment of `model` leaves: that is warned about and counted."""
        try:
            with reading(self._place(key)) as file:
                if file.meta.get("prefix") != about:
                    raise ValueError("of another model or text")
                if file.found != self._described(model):
                    raise ValueError("tensors are not those of a segment of this model")
                tensors = file.tensors()
                if any(x.is_floating_point() and not bool(x.isfinite().all()) for x in tensors.values()):
                    raise ValueError("numbers that are not finite")
            os.utime(self._place(key) / FILE)  # used now
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self.refused += 1
            warnings.warn(f"PrefixStore: a file is not used ({error})", stacklevel=2)
            return None
        parts: Parts = [{} for _ in model.layers]
        for name, tensor in tensors.items():
            index, rest = name.split(".", 1)
            parts[int(index)][rest] = tensor.to(next(model.layers[int(index)].parameters()).device)
        return parts

    @torch.no_grad()
    def _described(self, model: nn.Module) -> dict:
        """Dtype and shape by name of what a segment leaves: of one that is read for it, once."""
        if self._expected is None:
            cache = MCCache(config=model.config, keep_borders=True)
            model(torch.zeros(1, model.config.segment_size, dtype=torch.long, device=model.device), cache=cache)
            self._expected = {
                f"{i}.{name}": (x.dtype, tuple(x.shape)) for i, p in enumerate(take(cache, 0)) for name, x in p.items()
            }
        return self._expected

    def _trim(self) -> None:
        if self.max_bytes is None:
            return
        files = []
        for path in self.folder.glob(f"*/{FILE}"):
            try:
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process was faster
                continue
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files)[:-1]:
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            try:
                path.parent.rmdir()
            except OSError:  # being written anew
                pass
            total -= size
