# Copyright 2026 the mc-transformers authors.
"""What differs between versions of Transformers: the name of a cache."""

import functools
import inspect
from collections.abc import Callable

from transformers.modeling_outputs import BaseModelOutputWithPast


# What this version of Transformers calls a cache, in its arguments and outputs: `past_key_values` before 5.24.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def rename_cache(arguments: dict, name: str) -> dict:
    """`arguments` with a cache under `name`, whichever of its two names it has.

    Raises:
        ValueError: two caches.
    """
    given = {key: arguments[key] for key in ("cache", "past_key_values") if key in arguments}
    if not given:
        return arguments
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) > 1:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give only one of them")
    others = {key: value for key, value in arguments.items() if key not in given}
    return others | {name: caches[0] if caches else None}


def cache_by_any_name(forward: Callable) -> Callable:
    """Decorates a method with an argument `cache`: it may be called `past_key_values`, too, and its signature, which
    Transformers reads, has the name of the version."""

    @functools.wraps(forward)
    def renamed(self, *args, **kwargs):
        return forward(self, *args, **rename_cache(kwargs, "cache"))

    signature = inspect.signature(forward)
    parameters = [p.replace(name=CACHE_NAME) if p.name == "cache" else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)
    return renamed
