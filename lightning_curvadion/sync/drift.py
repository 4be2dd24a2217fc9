"""Drift: the distance of a replica's parameters to the consensus, just before it takes the consensus over."""

import torch
from torch import Tensor


class DriftMeter:
    r"""Measures :math:`\|x_i - \bar x\| / \|\bar x\|` while the parameters :math:`x_i` of a replica become the
    consensus :math:`\bar x`. Both are in memory then, so the measurement sends nothing.

    Example:
        >>> meter = DriftMeter()
        >>> meter.observe(torch.tensor([3.0, 1.0]), consensus=torch.tensor([3.0, 0.0]))
        >>> meter.observe(torch.tensor([4.0]), consensus=torch.tensor([4.0]))
        >>> round(meter.drift, 4)
        0.2
    """

    def __init__(self) -> None:
        # (distance, norm) of each part. They stay on the device, since the drift may never be read.
        self._norms: list[tuple[Tensor, Tensor]] = []

    def start(self) -> None:
        """Begin a new measurement."""
        self._norms = []

    def observe(self, own: Tensor, consensus: Tensor) -> None:
        """Add a part of the parameters.

        Args:
            own: This replica's values, flat.
            consensus: The consensus of the same elements.
        """
        distance = torch.linalg.vector_norm(own - consensus, dtype=torch.float32)
        self._norms.append((distance, torch.linalg.vector_norm(consensus, dtype=torch.float32)))

    @property
    def drift(self) -> float | None:
        """The relative distance; ``None`` where no parameters were synchronised. Reading it waits for the device."""
        if not self._norms:
            return None
        distance, norm = (
            torch.linalg.vector_norm(torch.stack(list(norms))) for norms in zip(*self._norms, strict=True)
        )
        return (distance / norm.clamp_min(torch.finfo(norm.dtype).tiny)).item()
