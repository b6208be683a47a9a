# Copyright 2026 the mc-transformers authors.
"""One module for each kind of checkpoint that can be converted."""
