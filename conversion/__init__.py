# Copyright 2026 the mc-transformers authors.
"""Checkpoints of other architectures and of training runs, into the family and out of it."""
