# Copyright 2026 the mc-transformers authors.
"""Serving: models of the family behind an interface for many users."""
