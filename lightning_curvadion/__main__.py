"""``python -m lightning_curvadion``."""

import sys

from lightning_curvadion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
