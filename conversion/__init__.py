# Copyright 2026 the mc-transformers authors.
"""Checkpoints in and out of the family, Hub repositories, model cards and the command line."""
