# Copyright 2026 the mc-transformers authors.
"""A memory as a file: read a long document once, ask questions about it later, in another process."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


FILE = "memory.safetensors"
FORMAT = 2  # 1: fingerprints of samples, and no checksum
FORMATS = (1, FORMAT)
PREFIX = ".mc-memory-"  # of the folder in which a file is written until it is complete
LEFT_OVER = 24 * 3600  # seconds after which such a folder can only be what a killed process left
# of safetensors, as it names them
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}

Described = dict[str, tuple[torch.dtype | str, tuple[int, ...]]]  # dtype and shape by name; str: none that we write


def write(directory: str | os.PathLike, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write `memory.safetensors` into `directory`. Whatever happens, and whoever writes there at the same time, the
    name leads to the old file or to a new one.

    Raises:
        OSError: it cannot be written: no permission, no space.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(directory)
    # a folder, because safetensors writes under a temporary name of its own first
    temporary = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    try:
        contiguous = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        meta = {**meta, "version": FORMAT}
        meta["checksum"] = _checksum(contiguous, meta)
        try:
            save_file(contiguous, temporary / FILE, metadata={"format": "pt", "mc_memory": json.dumps(meta)})
        except SafetensorError as error:
            raise OSError(f"{directory / FILE} could not be written ({error})") from error
        os.replace(temporary / FILE, directory / FILE)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_left_overs(directory: Path) -> None:
    for path in directory.glob(PREFIX + "*"):
        try:
            if path.is_dir() and not path.is_symlink() and time.time() - path.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:  # another process was faster
            continue


class MemoryFile:
    """An open file: what it says of itself; its tensors are read by `tensors`, for the one who believes it.

    Attributes:
        meta: the description that `write` stored. found: dtype and shape of every tensor.
    """

    def __init__(self, file) -> None:
        self._file = file
        self.meta = _meta(file.metadata() or {})
        parts = {name: file.get_slice(name) for name in file.keys()}
        self.found: Described = {
            name: (DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
            for name, part in parts.items()
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name. Raises: ValueError: the checksum differs."""
        tensors = {name: self._file.get_tensor(name) for name in self.found}
        if self.meta["version"] > 1 and self.meta.get("checksum") != _checksum(tensors, self.meta):
            raise ValueError("damaged, the checksum differs")
        return tensors


@contextmanager
def reading(directory: str | os.PathLike) -> Iterator[MemoryFile]:
    """The memory file in `directory`. A ValueError in the block, of who does not believe it, gets its name.

    Raises:
        FileNotFoundError: no memory file in `directory`. PermissionError: it may not be read.
        ValueError: the file is incomplete, or something else, or of a newer version.
    """
    path = Path(directory) / FILE
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"`directory`={str(directory)!r} holds no {FILE}")
    with open(path, "rb") as opened:
        # safetensors opens twice by name; another process may put a new file there in between
        name = f"/dev/fd/{opened.fileno()}"
        try:
            with safe_open(name if os.path.exists(name) else path, framework="pt") as file:
                yield MemoryFile(file)
        except SafetensorError as error:
            raise ValueError(f"{path} is incomplete or not a memory file ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _meta(metadata: dict[str, str]) -> dict:
    try:
        meta = json.loads(metadata["mc_memory"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"incomplete or not a memory file (no readable entry 'mc_memory': {error})") from error
    version = meta.get("version") if isinstance(meta, dict) else None
    if type(version) is not int or version not in FORMATS:
        raise ValueError(f"format version {str(version)[:40]}, this version reads {FORMATS}")
    return meta


def _checksum(tensors: dict[str, torch.Tensor], meta: dict) -> str:
    """Of everything that a file says, for damage by accident."""
    meta = {name: value for name, value in meta.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.cpu().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
