"""The command line: ``python -m lightning_curvadion``. It may import all other packages; none of them imports it."""

from .main import CurvaDionCLI

__all__ = ["CurvaDionCLI"]
