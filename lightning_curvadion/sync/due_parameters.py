"""The parameters that a sync step sends."""

from dataclasses import dataclass

from torch import Tensor

from .pace import Weight


@dataclass(frozen=True)
class DueParameters:
    """The parameters that a sync step sends, by name.

    Attributes:
        dense: All of their numbers travel.
        sparse: The rows that have moved travel.
        resting: They no longer move, and send what quantization has left of them.
        weight: What their displacements count, where replicas take different numbers of steps.
    """

    dense: dict[str, Tensor]
    sparse: dict[str, Tensor]
    resting: dict[str, Tensor]
    weight: Weight | None

    @property
    def parts(self) -> tuple[dict[str, Tensor], ...]:
        """All of the parameters."""
        return self.dense, self.sparse, self.resting
