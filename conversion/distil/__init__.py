# Copyright 2026 the mc-transformers authors.
"""Attention layers of a trained Transformer become memory layers, and learn their work from it."""
