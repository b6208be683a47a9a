# Copyright 2026 the mc-transformers authors.
"""The GRU as a vector memory: its output is its state."""

from .vector import VectorMemory


class GRUMemory(VectorMemory):
    cell_gates = 3
    num_states = 1
