# Copyright 2026 the mc-transformers authors.
"""Text as tokens: every document once, in one memory-mapped file, and windows of it in a fixed random order."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ...hub.files import new_folder


def find_documents(places: Sequence[str]) -> list[Path]:
    """Files, and all .txt files in folders, in the order of their names.

    Raises:
        FileNotFoundError: no such file, or a folder without any.
    """
    found = []
    for place in map(Path, places):
        files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"{place} is neither a file nor a folder with .txt files")
        found += files
    return list(dict.fromkeys(found))


def split_documents(text: Sequence[str], held_out: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Documents to train on, and those that are held out.

    Raises:
        FileNotFoundError: see `find_documents`. ValueError: one document, and none held out; or nothing to train on.
    """
    train, apart = find_documents(text), find_documents(held_out)
    if not held_out:
        if len(train) < 2:
            raise ValueError(f"`text` is one document, {train[0]}: give two or more, or name some to hold out")
        apart = [path for path in train if zlib.crc32(path.name.encode()) % 10 == 0] or train[-1:]
    train = [path for path in train if path not in apart]
    if not train:
        raise ValueError("`text` has no document left to train on: all are held out")
    return train, apart


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: it is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error


class Corpus:
    """Tokens of documents, one behind the other, each with an end-of-text token in front, cut into windows.

    Args:
        folder: as `build` has written it. length: tokens of a window. seed: of their order.

    Raises:
        ValueError: the text does not fill one window.
    """

    def __init__(self, folder: Path, length: int, seed: int) -> None:
        facts = json.loads((folder / "facts.json").read_text())
        self.tokens = np.memmap(folder / "tokens.bin", facts["dtype"], "r") if facts["tokens"] else np.empty(0)
        self.length, count = length, len(self.tokens) // length
        if not count:
            raise ValueError(f"the text has {len(self.tokens)} tokens and does not fill one window of {length}")
        self.order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    @staticmethod
    def build(folder: Path, paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict:
        """Write the tokens of documents, unless they are there already; returns how many, and of what text.

        Raises:
            ValueError: a file that is not UTF-8; other documents than those of an earlier call.
        """
        digest = hashlib.sha256()
        for path in paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        sha256 = digest.hexdigest()
        if folder.exists():
            facts = json.loads((folder / "facts.json").read_text())
            if facts["sha256"] != sha256:
                raise ValueError(f"{folder} holds the tokens of other texts: name another folder of work")
            return facts
        dtype, count = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32), 0
        first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        with new_folder(folder) as new:
            with (new / "tokens.bin").open("wb") as file:
                for path in tqdm(paths, desc=f"tokens of {folder.name}", unit="text"):
                    ids = np.asarray(first + tokenizer(read_text(path), verbose=False)["input_ids"], dtype)
                    file.write(ids.tobytes())
                    count += len(ids)
            facts = {"sha256": sha256, "dtype": dtype.name, "documents": len(paths), "tokens": count}
            (new / "facts.json").write_text(json.dumps(facts))
        return facts

    def window(self, number: int) -> torch.Tensor:
        """`[length]` int64: window `number` of the random order, which begins anew at its end."""
        start = self.order[number % len(self.order)] * self.length
        return torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))

    def batch(self, numbers: Sequence[int], device: str) -> torch.Tensor:
        """`[len(numbers), length]` of `window`."""
        return torch.stack([self.window(number) for number in numbers]).to(device)
