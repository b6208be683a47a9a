# Copyright 2026 the mc-transformers authors.
"""Recipes of training, for Transformers' Trainer."""

from .carried import CarriedTrainer, DocumentRows
from .schedule import ReadSchedule


__all__ = ["CarriedTrainer", "DocumentRows", "ReadSchedule"]
