"""The agreement: the one all-reduce of a local step, after which all replicas take the same branch.

With a lag it is read some steps after it was started, when it has arrived long ago: nobody waits for it. All replicas
read the same numbers at the same step, so they still take the same branch.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from .collectives import Collectives
from .errors import ReplicaLostError, UnevenBatchesError
from .pending_numbers import PendingNumbers

# A process group of gloo has two threads, and so runs two collectives at a time.
_AT_A_TIME = 2
# In place of a gradient code, below all codes. From a rank that takes no step: above all stop requests.
_NO_STEP = 0.9
# From a rank whose parameters were set to something else: below all stop requests, and repeated until it is agreed on.
_SETTLE = 0.25


class Agreed(NamedTuple):
    """The element-wise maximum over the replicas of what they measured in one step.

    Attributes:
        rmmc: The largest RMMC; 0 where there was no such step.
        code: The largest code of an unusable gradient, from 1 on, or below that the largest request.
        drift: The largest drift, 0 where no trigger watches it.
    """

    rmmc: float = 0.0
    code: float = 0.0
    drift: float = 0.0


class Agreement:
    """An all-reduce of two numbers: the RMMC, and the code of an unusable gradient or a stop request.

    Where a trigger watches the drift it has a third number.

    Args:
        collectives: Of the process group.
        lag: How many steps after it was started an agreement is acted on.

    Attributes:
        stop_request: A number in (0.25, 0.9) that asks all replicas for something, such as to stop; 0 for nothing. A
            signal handler may set it: it travels with the next agreement of a step.
        agreed_request: The largest stop request of any replica that the last step acted on; the same on all of them.
        settle_request: Whether this replica asks all to settle their parameters.
        agreed_to_settle: Whether all replicas settle now; the same on all of them.
        acted: Whether the last step acted on an agreement, if only on one with nothing in it.
        carries_drift: Whether every agreement has the third number: the same on all replicas and for all optimizers of
            a hook, since a rank that takes no step cannot know whose step another one takes.
    """

    def __init__(self, collectives: Collectives, lag: int = 0) -> None:
        self._groups = [collectives]
        self._lag = lag
        self._steps = 0
        # Of the last steps of each optimizer, those that it has not acted on yet, oldest first.
        self._pending: dict[CurvaDion, deque[PendingNumbers]] = {}
        self._arrived: dict[CurvaDion, deque[Agreed]] = {}
        # How many of them were sent before the replicas last settled, and may ask for it once more.
        self._sent_before_settling: dict[CurvaDion, int] = {}
        self.stop_request = self.agreed_request = 0.0
        self.settle_request = self.agreed_to_settle = False
        self.acted = True
        self.carries_drift = False

    def use_several_groups(self) -> None:
        """Let as many agreements be under way under gloo as the lag says; every rank calls it."""
        if self._groups[0].backend == "gloo":
            while _AT_A_TIME * len(self._groups) < self._lag:
                self._groups.append(self._groups[0].in_group_of_its_own())

    @property
    def _collectives(self) -> Collectives:
        """Those of the next agreement."""
        return self._groups[self._steps % len(self._groups)]

    def message(self, signal: Tensor, drift: Tensor | None = None) -> Tensor:
        """What is sent: the signal, and the drift where agreements carry it.

        Args:
            signal: Float64, shape (2,).
            drift: Float64, shape (1,); ``None`` where there is none, which counts as 0.
        """
        if not self.carries_drift:
            return signal.clone()
        return torch.cat([signal, signal.new_zeros(1) if drift is None else drift])

    def start(self, optimizer: CurvaDion, signal: Tensor, drift: Tensor | None = None) -> None:
        """Start the all-reduce of a step.

        Args:
            optimizer: Takes the step.
            signal: RMMC and gradient code, float64, shape (2,). Codes start at 1, so that an unusable gradient
                outranks a request.
            drift: This replica's, see :meth:`message`.

        Raises:
            ReplicaLostError: Another rank has ended.
        """
        message = self.message(signal, drift)
        if request := self.stop_request or _SETTLE * self.settle_request:
            message[1].clamp_(min=request)
        pending = self._pending.setdefault(optimizer, deque())
        pending.append(self._collectives.start_all_reduce_max(message, "the RMMC all-reduce"))
        self._steps += 1

    def take(self, optimizer: CurvaDion) -> Agreed:
        """What the replicas agreed on as many steps ago as the lag says, to act on it now.

        Raises:
            UnevenBatchesError: Another rank took no step then.
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        pending, arrived = self._pending.get(optimizer, deque()), self._arrived.setdefault(optimizer, deque())
        if not arrived and len(pending) >= max(1, self._lag):
            self._read_oldest(optimizer)
        started = len(pending) + len(arrived)
        agreed = arrived.popleft() if arrived and started >= self._lag else Agreed()
        stale = self._sent_before_settling.get(optimizer, 0)
        self.agreed_to_settle = agreed.code == _SETTLE and not stale
        left = len(pending) + len(arrived)
        self._sent_before_settling[optimizer] = left if self.agreed_to_settle else max(0, stale - 1)
        self.agreed_request = _request_of(agreed)
        return agreed

    def confirm(self, optimizer: CurvaDion) -> float:
        """Act on all that the replicas have agreed on so far but for RMMC and drift, the present step included.

        Returns:
            The largest code of an unusable gradient, or below 1.

        Raises:
            UnevenBatchesError, ReplicaLostError: As :meth:`take`.
        """
        agreed = self.read(optimizer)
        stale = self._sent_before_settling.pop(optimizer, 0)
        self.agreed_to_settle = any(one.code == _SETTLE for one in agreed[stale:])
        self.agreed_request = max([self.agreed_request, *map(_request_of, agreed)])
        self.resume(optimizer, (one._replace(code=0.0) for one in agreed))
        return max((one.code for one in agreed), default=0.0)

    def take_unusable(self, optimizer: CurvaDion) -> float:
        """The largest code of an unusable gradient in the last steps, or below 1. The next steps act on the rest.

        Raises:
            UnevenBatchesError, ReplicaLostError: As :meth:`take`.
        """
        agreed = self.read(optimizer)
        self.resume(optimizer, (one._replace(code=0.0) if one.code >= 1 else one for one in agreed))
        return max((one.code for one in agreed), default=0.0)

    def read(self, optimizer: CurvaDion) -> list[Agreed]:
        """Wait for all that is under way. It communicates nothing between replicas: any may call it alone.

        Returns:
            What the next steps will act on, oldest first.

        Raises:
            UnevenBatchesError, ReplicaLostError: As :meth:`take`.
        """
        while self._pending.get(optimizer):
            self._read_oldest(optimizer)
        return self.arrived(optimizer)

    def arrived(self, optimizer: CurvaDion) -> list[Agreed]:
        """Of what the next steps will act on, what this replica has read already, oldest first."""
        return list(self._arrived.get(optimizer, ()))

    def prepare_consensus(self, optimizer: CurvaDion) -> None:
        """Called before a consensus outside of a step: all replicas have taken the same steps."""

    def abandon(self) -> None:
        """Wait no more for what is under way: after a failure it may never arrive."""
        self._pending.clear()

    def _read_oldest(self, optimizer: CurvaDion) -> None:
        try:
            agreed = self._agreed(self._pending[optimizer].popleft().read())
        except ReplicaLostError:
            # The state can still be saved.
            self.abandon()
            raise
        if agreed.code == _NO_STEP:
            raise self._uneven_batches(stepping=True)
        self._arrived.setdefault(optimizer, deque()).append(agreed)

    def _agreed(self, numbers: Sequence[float]) -> Agreed:
        """What an agreement says."""
        return Agreed(*numbers)

    def resume(self, optimizer: CurvaDion, agreed: Iterable[Agreed]) -> None:
        """Let the next steps of an optimizer act on what was agreed on before, as where a state is loaded."""
        agreed = deque(agreed)
        # Others may still wait for what this replica has sent, but it needs none of it.
        self._pending.pop(optimizer, None)
        self._arrived[optimizer] = agreed

    def verify_no_step(self, device: torch.device) -> None:
        """Verify that no other rank takes a step now, before a collective that its agreement would not match.

        Sends as much as an agreement; nothing among fewer than two replicas.

        Args:
            device: Of the collectives.

        Raises:
            UnevenBatchesError: Another rank takes a step.
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        if self._collectives.world_size == 1:
            return
        for optimizer in list(self._pending):
            self.read(optimizer)
        signal = torch.tensor([-1.0, _NO_STEP], dtype=torch.float64, device=device)
        pending = self._collectives.start_all_reduce_max(self.message(signal), "the RMMC all-reduce")
        # RMMC is never negative: somebody has sent one.
        if self._agreed(pending.read()).rmmc >= 0:
            raise self._uneven_batches(stepping=False)

    def _uneven_batches(self, stepping: bool) -> UnevenBatchesError:
        position = "takes step {}" if stepping else "ended after {} steps"
        if self._lag > 1:
            # Ranks that step have started agreements since, which nothing but an agreement would match.
            place = self._collectives.places[self._collectives.rank]
            positions = [f"{place} {position.format(self._steps)}, and another rank does not"]
        else:
            ranks = self._collectives.all_gather_object(position.format(self._steps))
            positions = [f"rank {rank} {own}" for rank, own in enumerate(ranks)]
        return UnevenBatchesError(
            "Give every rank the same number of batches, with a DistributedSampler, an IterableDataset of equal length"
            f" on every rank, or limit_train_batches: {', '.join(positions)}."
        )


def _request_of(agreed: Agreed) -> float:
    return agreed.code if _SETTLE < agreed.code < 1 else 0.0
