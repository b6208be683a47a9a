# Copyright 2026 the mc-transformers authors.
"""What parsers of the command line share: kinds of values, and help that ends with examples."""

import argparse
from collections.abc import Callable


PROGRAM = "mc-transformers"


def examples(*lines: str) -> dict:
    """Arguments of a parser whose help ends with example calls."""
    text = "\n".join(f"  {PROGRAM} {line}" for line in lines)
    return {"epilog": f"examples:\n{text}", "formatter_class": argparse.RawDescriptionHelpFormatter}


def _number(kind: type, allowed: str, accept: Callable[[float], bool]) -> Callable[[str], float]:
    """A type of arguments whose error says what is allowed."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not valid, allowed: {allowed}")
        return value

    return parse


positive = _number(int, "a whole number from 1 on", lambda x: x >= 1)
count = _number(int, "a whole number from 0 on", lambda x: x >= 0)
at_least_two = _number(int, "a whole number from 2 on", lambda x: x >= 2)
amount = _number(float, "a number above 0", lambda x: 0 < x < float("inf"))
heat = _number(float, "a number from 0 on", lambda x: 0 <= x < float("inf"))
part = _number(float, "a number between 0 and 1", lambda x: 0 < x < 1)
share = _number(float, "a number above 0, up to 1", lambda x: 0 < x <= 1)


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid, allowed: whole numbers as in 1,3,5") from None
