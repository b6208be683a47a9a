"""Checkpoints in and out of the family."""
