# Copyright 2026 the mc-transformers authors.
"""Text that every Python installation carries: the source of its standard library.

Several MB of long documents, in which names and idioms come back.
"""

import sysconfig
import zlib
from pathlib import Path

import torch

from mc_transformers.tokenization_mc import NUM_SPECIAL


def library_texts(least: int) -> tuple[list[bytes], list[bytes]]:
    """Source of every top-level module of the standard library as (training documents, held-out documents).

    A checksum of the name decides, about one module in six is held out; held-out documents shorter than `least` bytes
    are left out. The text depends on the version of Python.
    """
    train, held_out = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_bytes()
        if zlib.crc32(path.stem.encode()) % 6 != 0:
            train.append(text)
        elif len(text) >= least:
            held_out.append(text)
    return train, held_out


def byte_ids(text: bytes) -> torch.Tensor:
    """int64 [bytes]: the ids that `byte_tokenizer` gives to the text."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + NUM_SPECIAL
