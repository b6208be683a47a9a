# Copyright 2026 the mc-transformers authors.
"""The base memories by name. A new one costs its file and one line here."""

from .base import Memory, State, Trace
from .gated_delta import GatedDeltaMemory
from .gated_linear import GatedLinearMemory
from .linear import LinearMemory
from .retention import RetentionMemory
from .swla import SWLAMemory


MEMORIES: dict[str, type[Memory]] = {
    "linear": LinearMemory,
    "retention": RetentionMemory,
    "gated_linear": GatedLinearMemory,
    "swla": SWLAMemory,
    "gated_delta": GatedDeltaMemory,
}

__all__ = ["MEMORIES", "Memory", "State", "Trace"]
