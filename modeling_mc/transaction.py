# Copyright 2026 the mc-transformers authors.
"""A forward ends, or the cache that it was writing into is refused from then on.

A forward writes one layer after the other. An error or a Ctrl-C on its way leaves some layers ahead of others, and
a second forward at the same time mixes two texts: both would give wrong answers without a word.
"""

import functools
import threading
from collections.abc import Callable

import torch


BROKEN = (
    "`cache` is broken: a forward that was writing into it did not end (an error or an interruption), so its layers "
    "stand at different tokens. Call `cache.reset()` and read the text again, or go on from a copy or a file of before"
)
GUARD = threading.Lock()  # one for all: a cache made inside a compiled graph cannot make a lock
IN_USE = "`cache` is in use by another forward: give every thread a cache of its own (`copy.deepcopy(cache)`)"


class Transaction:
    """What happens to a cache right now; its memory layers share one.

    Attributes:
        broken: a forward has not ended.
    """

    def __init__(self, broken: bool = False) -> None:
        self.broken, self._writing = broken, False
        self._owner, self._depth = None, 0

    def __reduce__(self) -> tuple:
        return Transaction, (self.broken or self._writing,)

    def check(self) -> None:
        """Refuse a cache that cannot be used now.

        Raises:
            ValueError: a forward into it did not end, or is still running in another thread.
        """
        if self.broken:
            raise ValueError(BROKEN)
        if self._owner not in (None, threading.get_ident()):
            raise ValueError(IN_USE)

    def __enter__(self) -> "Transaction":
        """Begin a forward, or one inside of it (the decoder inside a model with a head)."""
        me = threading.get_ident()
        with GUARD:
            self.check()
            self._owner = me
        self._depth += 1
        return self

    def write(self) -> None:
        """From here on an error leaves layers at different tokens."""
        self._writing = self._owner is not None

    def __exit__(self, kind: type | None, *error) -> None:
        self._depth -= 1
        if self._depth:
            return
        self.broken = kind is not None and self._writing
        self._writing, self._owner = False, None


def transaction_of(cache: object) -> Transaction | None:
    """The one of a cache's memory layers, which they share from now on; None without such layers."""
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "transaction")]
    for layer in layers[1:]:
        if layer.transaction is not layers[0].transaction:
            layers[0].transaction.broken |= layer.transaction.broken
            layer.transaction = layers[0].transaction
    return layers[0].transaction if layers else None


def one_forward(forward: Callable) -> Callable:
    """Decorates `forward(self, input_ids, attention_mask, position_ids, cache, ...)`: it has its cache for itself."""

    @functools.wraps(forward)
    def alone(self, *args, **kwargs):
        cache = args[3] if len(args) > 3 else kwargs.get("cache")
        transaction = None if cache is None or torch.compiler.is_compiling() else transaction_of(cache)
        if transaction is None:
            return forward(self, *args, **kwargs)
        with transaction:
            return forward(self, *args, **kwargs)

    return alone
