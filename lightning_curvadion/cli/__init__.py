"""The command line: ``python -m lightning_curvadion``. Imports all other rooms."""
