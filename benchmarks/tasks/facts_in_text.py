# Copyright 2026 the mc-transformers authors.
"""Recall in real text: facts that stand somewhere in a document, asked for through a chat template."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


NAMES = ("Ada", "Boris", "Clara", "Derek", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis")
FACT = "\n\nThe locker number of {name} is {number}.\n\n"
QUESTION = "\n\nWhat is the locker number of {name}? Answer with the number alone."


@dataclass
class Trial:
    """A prompt, its tokens as a chat, and the number that a right answer holds."""

    ids: list[int]
    answer: str


def make_trial(tokenizer: PreTrainedTokenizerBase, text: str, length: int, keys: int, seed: int) -> Trial:
    """Text of about `length` tokens with `keys` facts at random places, and the question for one of them.

    Args:
        text: it has `length` tokens or more; a part of it, which begins at a random place, is taken.

    Raises:
        ValueError: it has fewer.
    """
    draw = random.Random(f"{length}-{keys}-{seed}")
    names, numbers = draw.sample(NAMES, keys), draw.sample(range(1000, 10_000), keys)
    facts = [FACT.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)]
    question = QUESTION.format(name=names[0])

    def chat(content: str) -> list[int]:
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    ids = tokenizer(text, verbose=False)["input_ids"]
    room = length - len(chat("".join(facts) + question))
    if room < 1 or len(ids) < room:
        raise ValueError(f"a text of {len(ids)} tokens and {keys} facts do not fill {length} tokens")
    start = draw.randrange(len(ids) - room + 1)
    ids = ids[start : start + room]
    places = sorted(draw.sample(range(room + 1), keys))
    draw.shuffle(facts)
    pieces, before = [], 0
    for place, fact in zip(places, facts, strict=True):
        pieces += [tokenizer.decode(ids[before:place]), fact]
        before = place
    return Trial(chat("".join(pieces) + tokenizer.decode(ids[before:]) + question), str(numbers[0]))
