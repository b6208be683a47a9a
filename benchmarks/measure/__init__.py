# Copyright 2026 the mc-transformers authors.
"""Programs that time, count or train, and write into benchmarks/results."""
