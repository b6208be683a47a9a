# Copyright 2026 the mc-transformers authors.
"""Linear attention as a memory: S_t = S_{t-1} + k_t v_t^T (eq. 12), identity feature map, no normaliser."""

from .matrix import MatrixMemory


class LinearMemory(MatrixMemory):
    scalar_decay = True
