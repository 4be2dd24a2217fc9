"""What a run would cost on a cluster: ``python -m lightning_curvadion plan``."""
