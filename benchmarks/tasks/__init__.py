# Copyright 2026 the mc-transformers authors.
"""What models are trained on to be compared."""
