# Copyright 2026 the mc-transformers authors.
"""Repositories of the Hub: what is written into them, what they load from, and facts about a model."""
