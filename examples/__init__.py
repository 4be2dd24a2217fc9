"""Examples, importable from a clone: ``python -m lightning_curvadion fit --config configs/byte_gpt.yaml``."""
