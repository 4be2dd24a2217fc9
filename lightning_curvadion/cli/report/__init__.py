"""What a run has logged, as pictures: ``python -m lightning_curvadion report``."""
