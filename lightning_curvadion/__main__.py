"""``python -m lightning_curvadion``."""

from lightning_curvadion.cli import main

if __name__ == "__main__":
    main()
