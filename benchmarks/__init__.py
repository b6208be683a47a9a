# Copyright 2026 the mc-transformers authors.
"""Tasks, measurements and the pages made of them. Not installed: run from the repository root."""
