"""``python -m lightning_curvadion report``: figures of what runs logged."""
