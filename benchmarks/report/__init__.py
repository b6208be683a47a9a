# Copyright 2026 the mc-transformers authors.
"""Pages and figures made from benchmarks/results."""
