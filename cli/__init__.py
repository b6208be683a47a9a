# Copyright 2026 the mc-transformers authors.
"""The command line, `mc-transformers`."""
