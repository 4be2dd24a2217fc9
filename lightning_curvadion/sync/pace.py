r"""Pace: how many steps each replica takes, where fast and slow machines train together.

In a mean a displacement counts for the steps in it. Let :math:`w_i` be the steps of replica i since the last consensus.
Its displacement is multiplied by :math:`n w_i / \sum_j w_j` before the plain mean over n replicas. Every agreement
carries these numbers (``paced_agreement.py``).

A mean in the background is sent before its agreement has arrived. Then only :math:`w_i` is known, and all replicas
divide by S, the least that the sum can be: the steps that the last agreement told of, and one more of each replica.
They send :math:`s_i = (n w_i / S)\, d_i + e_i`, with :math:`e_i` the error-feedback residual. When the mean is taken
over, the sum is known, and so is :math:`g = S / \sum_j w_j \le 1`. The anchor then moves by g times the mean. Of
:math:`g (n w_i / S)\, d_i + e_i`, what replica i owed, g times what it sent has arrived. The residual is what is left,

.. math:: e_i \leftarrow g\, (s_i - \mathrm{sent}_i) + (1 - g)\, e_i .
"""

from collections.abc import Sequence


class Weight:
    r"""What the displacement of this replica counts in a mean.

    Attributes:
        factor: :math:`n w_i / S`, by which the displacement is multiplied.
        correction: g, by which the mean is; known when the agreement of that step has arrived.
        stretch: How many times as long the mean displacement is as this replica's, if their steps were equal:
            :math:`\sum_j w_j^2 / (w_i \sum_j w_j)`; known then, too.

    Args:
        own: Steps in the displacement of this replica.
        replicas: Number of them.
        least: S.

    Example:
        >>> weight = Weight(own=2, replicas=2, least=2.0)
        >>> weight.settle([2.0, 1.0])
        >>> weight.factor, round(weight.correction, 3), round(weight.stretch, 3)
        (2.0, 0.667, 0.833)
    """

    def __init__(self, own: float, replicas: int, least: float) -> None:
        self._own, self._least = own, least
        # Nobody has moved where there are no steps.
        self.factor = replicas * own / least if own else 1.0
        self.correction = self.stretch = 1.0

    def settle(self, steps: Sequence[float]) -> None:
        """Take over the steps in the displacements of all replicas."""
        if self._own:
            self.correction = self._least / sum(steps)
            self.stretch = sum(one * one for one in steps) / (self._own * sum(steps))


class Pace:
    """The steps of this replica, and of the others as far as it knows.

    Attributes:
        steps: Of this replica so far.
        global_step: Mean of the replicas' steps, as the last agreement that was acted on says.
    """

    def __init__(self) -> None:
        self.steps = self.global_step = 0.0
        self._in_displacement = 0
        # Of each replica, as the last agreement that was read says: its steps, and those in its displacement.
        self._all_steps: Sequence[float] = ()
        self._all_in_displacements: Sequence[float] = ()
        # Steps of all replicas together when displacements last started.
        self._start: float | None = None
        # Whether an agreement is under way, and the weight that it will settle.
        self._under_way = False
        self._unsettled: Weight | None = None

    def step(self) -> None:
        """Count a step of this replica."""
        self.steps += 1
        self._in_displacement += 1

    def restart(self) -> None:
        """Note that displacements start anew."""
        self._in_displacement = 0

    def weight(self) -> Weight:
        """The weight of the displacement that this replica sends now. The next one starts anew."""
        own, replicas = float(self._in_displacement), len(self._all_steps)
        if self._under_way:
            # Of what agreements say alone, and so the same on all replicas.
            since_start = sum(self._all_steps) - (self._start or 0.0)
            weight = self._unsettled = Weight(own, replicas, since_start + replicas)
        else:
            weight = Weight(own, replicas, sum(self._all_in_displacements))
            weight.settle(self._all_in_displacements)
            self._start = sum(self._all_steps)
        self.restart()
        return weight

    def send(self) -> tuple[float, float]:
        """What an agreement says of this replica: its steps, and those in its displacement."""
        self._under_way = True
        return self.steps, float(self._in_displacement)

    def receive(self, numbers: Sequence[float]) -> None:
        """Note what an agreement says of all replicas: first their steps, then those in their displacements."""
        replicas = len(numbers) // 2
        self._all_steps, self._all_in_displacements = numbers[:replicas], numbers[replicas:]
        if self._start is None:
            self._start = sum(self._all_steps) - sum(self._all_in_displacements)
        self._under_way = False
        if self._unsettled is not None:
            self._unsettled.settle(self._all_in_displacements)
            self._unsettled, self._start = None, sum(self._all_steps)

    def act(self) -> None:
        """Move the global step on to the agreement that was read, where all replicas act on it."""
        if self._all_steps:
            self.global_step = sum(self._all_steps) / len(self._all_steps)

    def resume(self, global_step: float) -> None:
        """Go on from a global step, on all replicas alike."""
        self.steps = self.global_step = global_step
        self._all_steps, self._start = (), None
