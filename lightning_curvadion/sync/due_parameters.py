"""The parameters that a sync step sends."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DueParameters:
    """The parameters that a sync step sends, by name.

    Attributes:
        dense: All of their numbers travel.
        sparse: The rows that have moved travel.
        resting: They no longer move, and send what quantization has left of them.
    """

    dense: dict[str, Tensor]
    sparse: dict[str, Tensor]
    resting: dict[str, Tensor]
