# Copyright 2026 the mc-transformers authors.
"""Recipes of training, for Transformers' Trainer."""

from .schedule import ReadSchedule


__all__ = ["ReadSchedule"]
