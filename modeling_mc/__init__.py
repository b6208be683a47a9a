# Copyright 2026 the mc-transformers authors.
"""The model family: segment table, memories, aggregation, cache, mixer, model."""
