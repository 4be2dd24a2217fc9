"""Drift: how far a replica had gone from the others when it met them again."""

import torch
from torch import Tensor


class DriftMeter:
    r"""Measures :math:`\|x_i - \bar x\| / \|\bar x\|` while the parameters :math:`x_i` of a replica become the
    consensus :math:`\bar x`: both are at hand then, and nothing is sent for it.

    Example:
        >>> meter = DriftMeter()
        >>> meter.observe(torch.tensor([3.0, 1.0]), consensus=torch.tensor([3.0, 0.0]))
        >>> meter.observe(torch.tensor([4.0]), consensus=torch.tensor([4.0]))
        >>> round(meter.drift, 4)
        0.2
    """

    def __init__(self) -> None:
        # (distance, norm) of each part; on the device, since nobody may be asking.
        self._parts: list[tuple[Tensor, Tensor]] = []

    def start(self) -> None:
        """Forget the meeting before."""
        self._parts = []

    def observe(self, own: Tensor, consensus: Tensor) -> None:
        """A part of the parameters, before and after; flat, of equal length."""
        apart = torch.linalg.vector_norm(own - consensus, dtype=torch.float32)
        self._parts.append((apart, torch.linalg.vector_norm(consensus, dtype=torch.float32)))

    @property
    def drift(self) -> float | None:
        """Of the last meeting; ``None`` where parameters have not met."""
        if not self._parts:
            return None
        apart, norm = (torch.linalg.vector_norm(torch.stack(list(norms))) for norms in zip(*self._parts, strict=True))
        return (apart / norm.clamp_min(torch.finfo(norm.dtype).tiny)).item()
