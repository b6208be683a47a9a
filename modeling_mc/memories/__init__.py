# Copyright 2026 the mc-transformers authors.
"""The base memories by name. A new one costs its file and one line here."""

from .base import Bias, Memory, State, Trace, mix_answers
from .dla import DLAMemory
from .gated_delta import GatedDeltaMemory
from .gated_linear import GatedLinearMemory
from .gru import GRUMemory
from .linear import LinearMemory
from .lstm import LSTMMemory
from .retention import RetentionMemory
from .rwkv7 import RWKV7Memory
from .swla import SWLAMemory
from .titans import TitansMemory


MEMORIES: dict[str, type[Memory]] = {
    "linear": LinearMemory,
    "retention": RetentionMemory,
    "gated_linear": GatedLinearMemory,
    "swla": SWLAMemory,
    "gated_delta": GatedDeltaMemory,
    "rwkv7": RWKV7Memory,
    "lstm": LSTMMemory,
    "gru": GRUMemory,
    "dla": DLAMemory,
    "titans": TitansMemory,
}

__all__ = ["MEMORIES", "Bias", "Memory", "State", "Trace", "mix_answers"]
