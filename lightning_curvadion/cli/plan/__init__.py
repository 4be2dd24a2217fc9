"""``python -m lightning_curvadion plan``: the bytes, seconds and memory of a run, predicted."""
