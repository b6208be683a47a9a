# Copyright 2026 the mc-transformers authors.
"""`python -m mc_transformers`, the same as the command `mc-transformers`."""

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.exit(main())
