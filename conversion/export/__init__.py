# Copyright 2026 the mc-transformers authors.
"""Models as two graphs, for programs that know neither PyTorch nor this package (`mc-transformers export`)."""
