# Copyright 2026 the mc-transformers authors.
"""The LSTM as a vector memory: its cell c decides what the output h holds, and h is what is read and cached."""

from .vector import VectorMemory


class LSTMMemory(VectorMemory):
    cell_gates = 4
    num_states = 2
