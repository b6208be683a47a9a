# Copyright 2026 the mc-transformers authors.
"""Where `MCCache` once stood: caches that were pickled then look for it here."""

from .cache import MCCache as MCCache
