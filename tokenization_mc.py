# Copyright 2026 the mc-transformers authors.
"""A tokenizer that needs no training: one token per byte."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


PAD, END = "<|pad|>", "<|endoftext|>"
NUM_SPECIAL = 2  # id of a byte = its value + NUM_SPECIAL


def byte_tokenizer(max_length: int = 2**20) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8: for small models, and for text of any language without an unknown token.

    Ids are 0 (padding), 1 (begin and end of a text) and 2..257 (the bytes 0..255), so `vocab_size=258`. Padding is on
    the left. `save_pretrained` writes an ordinary fast tokenizer, which loads without this package.

    Args:
        max_length: tokens from which on the tokenizer warns that a text is long.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("hé")["input_ids"], len(tokenizer)
        ([106, 197, 171], 258)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
