"""Travel: the sum of the learning rates of the steps in a displacement. It says which momentum made it."""

import math
from collections.abc import Iterable

from torch import Tensor

from ..optim.curvadion import CurvaDion


class Travel:
    """The travel of each parameter since its displacement began."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, float] = {}
        # Of displacements whose mean has not arrived: it may be given up.
        self._sent: dict[CurvaDion, dict[Tensor, float]] = {}

    def add(self, optimizer: CurvaDion) -> None:
        """Count the learning rates of the step that comes."""
        for group, parameter in optimizer.members():
            if parameter.requires_grad:
                self._sums[parameter] = self._sums.get(parameter, 0.0) + group["lr"]

    def of(self, parameter: Tensor) -> float:
        """The travel of a parameter."""
        return self._sums.get(parameter, 0.0)

    def restart(self, parameters: Iterable[Tensor]) -> None:
        """Displacements start anew."""
        for parameter in parameters:
            self._sums.pop(parameter, None)

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Let the next mean say nothing of momenta: this replica has not walked as long as the others."""
        self._sums.update(dict.fromkeys(parameters, math.inf))

    def send(self, optimizer: CurvaDion, parameters: Iterable[Tensor]) -> None:
        """Displacements are on their way, and start anew if their mean arrives."""
        sent = self._sent.setdefault(optimizer, {})
        sent.update((parameter, self._sums.pop(parameter, 0.0)) for parameter in parameters)

    def arrived(self, optimizer: CurvaDion) -> None:
        """The mean of all that an optimizer has sent has arrived."""
        self._sent.pop(optimizer, None)

    def give_up(self) -> None:
        """What is under way will not arrive: the displacements are what they were, and what has been walked since."""
        for sent in self._sent.values():
            for parameter, travel in sent.items():
                self._sums[parameter] = self.of(parameter) + travel
        self._sent.clear()
