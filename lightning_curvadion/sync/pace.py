r"""Pace: how many steps each replica takes, where fast and slow machines train together.

In a mean a displacement counts for the steps in it. With :math:`w_i` the steps of replica i since the last consensus,
its displacement is multiplied by :math:`n w_i / \sum_j w_j` before the plain mean over n replicas. Every agreement
carries these numbers (``paced_agreement.py``). What quantization keeps back has its weight already.
"""

from collections.abc import Sequence


class Weight:
    r"""What the displacement of this replica counts in a mean; known when the agreement of that step has arrived.

    Attributes:
        factor: :math:`n w_i / \sum_j w_j`.
        stretch: How many times as long the mean displacement is as this replica's, if their steps were equal:
            :math:`\sum_j w_j^2 / (w_i \sum_j w_j)`.

    Example:
        >>> weight = Weight()
        >>> weight.set([2.0, 1.0], rank=0)
        >>> round(weight.factor, 3), round(weight.stretch, 3)
        (1.333, 0.833)
    """

    def __init__(self) -> None:
        self.factor = self.stretch = 1.0

    def set(self, steps: Sequence[float], rank: int) -> None:
        """Take over the steps in the displacements of all replicas."""
        total, own = sum(steps), steps[rank]
        # Nobody has moved where there are no steps.
        if own:
            self.factor = len(steps) * own / total
            self.stretch = sum(one * one for one in steps) / (own * total)


class Pace:
    """The steps of this replica, and of the others as far as it knows.

    Attributes:
        steps: Of this replica so far.
        global_step: Mean of the replicas' steps, as the last agreement that was acted on says.
    """

    def __init__(self) -> None:
        self.steps = self.global_step = 0.0
        self._in_displacement = 0
        self._rank = 0
        # Of each replica, as the last agreement that was read says: its steps, and those in its displacement.
        self._all_steps: Sequence[float] = ()
        self._all_in_displacements: Sequence[float] = ()
        # Whether an agreement is under way, and the weight that it will tell.
        self._under_way = False
        self._awaiting: Weight | None = None

    def step(self) -> None:
        """Count a step of this replica."""
        self.steps += 1
        self._in_displacement += 1

    def restart(self) -> None:
        """Note that displacements start anew."""
        self._in_displacement = 0

    def weight(self) -> Weight:
        """The weight of the displacement that this replica sends now. The next one starts anew."""
        weight = Weight()
        if self._under_way:
            self._awaiting = weight
        elif self._all_in_displacements:
            weight.set(self._all_in_displacements, self._rank)
        self.restart()
        return weight

    def send(self, rank: int) -> tuple[float, float]:
        """What an agreement says of this replica: its steps, and those in its displacement."""
        self._rank, self._under_way = rank, True
        return self.steps, float(self._in_displacement)

    def receive(self, numbers: Sequence[float]) -> None:
        """Note what an agreement says of all replicas: first their steps, then those in their displacements."""
        replicas = len(numbers) // 2
        self._all_steps, self._all_in_displacements = numbers[:replicas], numbers[replicas:]
        self._under_way = False
        if self._awaiting is not None:
            self._awaiting.set(self._all_in_displacements, self._rank)
            self._awaiting = None

    def act(self) -> None:
        """Move the global step on to the agreement that was read, where all replicas act on it."""
        if self._all_steps:
            self.global_step = sum(self._all_steps) / len(self._all_steps)

    def resume(self, global_step: float) -> None:
        """Go on from a global step, on all replicas alike."""
        self.steps = self.global_step = global_step
        self._all_steps = ()
