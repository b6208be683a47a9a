"""Text that every Python installation carries, and a byte-level tokenizer for it.

Three corpora: the language reference that `help()` shows (`pydoc_data.topics`, about 460 kB of English), the source
code of some modules of the standard library, which looks different enough to be worth an adapter, and the source of
all of its top-level modules (several MB): long documents, in which names and idioms come back.
"""

import importlib
import inspect
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


PAD, END = "<|pad|>", "<|endoftext|>"
NUM_SPECIAL = 2  # id of a byte = its value + NUM_SPECIAL
SOURCE_TRAIN = ("argparse", "ast", "configparser", "csv", "fractions", "inspect", "shutil", "tarfile", "typing")
SOURCE_HELD_OUT = ("statistics", "textwrap")


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8: ids 0 (padding), 1 (end of text), 2..257 (the bytes 0..255)."""
    vocab = {PAD: 0, END: 1} | {char: byte + NUM_SPECIAL for byte, char in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=END,
        model_max_length=max_length,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_alphabet() -> list[str]:
    """The character by which ByteLevel stands for each byte: itself where printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def reference_texts() -> tuple[list[str], list[str]]:
    """The language reference as (training documents, held-out documents), split by topic.

    A checksum of a topic's name decides, so that a topic stays on its side in every version of Python. Long topics
    repeat short ones word for word (`compound` contains `if`): paragraphs of a held-out topic are cut out of training.
    """
    held_out = [text for name, text in sorted(topics.items()) if zlib.crc32(name.encode()) % 10 == 0]
    seen = {_words(paragraph) for text in held_out for paragraph in text.split("\n\n")}
    train = []
    for name, text in sorted(topics.items()):
        if zlib.crc32(name.encode()) % 10 != 0:
            kept = [p for p in text.split("\n\n") if _words(p) not in seen]
            train.append("\n\n".join(kept))
    return train, held_out


def source_texts() -> tuple[list[str], list[str]]:
    """Source code of modules of the standard library as (training documents, held-out documents)."""
    train, held_out = (
        [inspect.getsource(importlib.import_module(name)) for name in names]
        for names in (SOURCE_TRAIN, SOURCE_HELD_OUT)
    )
    return train, held_out


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


def _words(paragraph: str) -> tuple[str, ...]:
    """The paragraph regardless of line breaks and indentation, which differ between copies of it."""
    return tuple(paragraph.split())


class Blocks(torch.utils.data.Dataset):
    """Documents joined by the end-of-text token and cut into blocks of `length` tokens, `stride` tokens apart."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int, stride: int | None = None):
        ids = [i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]
        if len(ids) < length:
            raise ValueError(f"{len(ids)} tokens of text do not fill one block of {length}")
        self.blocks = torch.tensor(ids).unfold(0, length, stride or length)  # [num_blocks, length]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}
