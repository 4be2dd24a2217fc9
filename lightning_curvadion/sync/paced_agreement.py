"""The paced agreement: fast and slow machines together.

A replica never waits for an agreement. At each step it looks whether the one under way has arrived. If not, the step is
a local one that sends nothing. If it has, the replica acts on it and starts the next, with the maximum of its signals
since it started the last. An agreement arrives once the slowest replica has started it: so they come at its pace, and
a replica twice as fast takes two steps for each.

All replicas act on the same agreements in the same order, and decide by nothing else. So they take the same branch at
the same agreement, though at different steps of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from .agreement import Agreed, Agreement
from .collectives import Collectives
from .errors import UnevenBatchesError
from .pace import Pace


class PacedAgreement(Agreement):
    """Agreements that no step waits for. One sends 16 bytes more for each replica.

    Args:
        collectives: Of the process group.
        pace: Counts the steps.
    """

    def __init__(self, collectives: Collectives, pace: Pace) -> None:
        super().__init__(collectives, lag=1)
        self._pace = pace
        # The maximum of the signals, and of the drift, since the last agreement was started.
        self._signal: Tensor | None = None
        self._drift: Tensor | None = None
        # When the device had measured the last step.
        self._measured: torch.cuda.Event | None = None

    def message(self, signal: Tensor, drift: Tensor | None = None) -> Tensor:  # noqa: D102
        rank, replicas = self._collectives.rank, self._collectives.world_size
        # Each replica fills in its own, so that the maximum holds all. A copy of a list would make the host wait.
        numbers = signal.new_zeros(2, replicas)
        for row, number in zip(numbers, self._pace.send(), strict=True):
            row[rank].fill_(number)
        return torch.cat([super().message(signal, drift), numbers.view(-1)])

    def start(self, optimizer: CurvaDion, signal: Tensor, drift: Tensor | None = None) -> None:
        """Count a step, and start an agreement if none is under way."""
        self._pace.step()
        self._stay_near_the_device(signal.device)
        # A request is in the agreement even if it is withdrawn before that starts.
        signal = torch.stack([signal[0], signal[1].clamp(min=self.stop_request)])
        self._signal = signal if self._signal is None else torch.maximum(self._signal, signal)
        if drift is not None:
            self._drift = drift if self._drift is None else torch.maximum(self._drift, drift)
        if not self._pending.get(optimizer) and not self.arrived(optimizer):
            super().start(optimizer, self._signal, self._drift)
            self._signal = self._drift = None

    def take(self, optimizer: CurvaDion) -> Agreed:
        """What the replicas have agreed on, if it has arrived; :attr:`acted` says whether.

        Raises:
            UnevenBatchesError: Another rank has reached a consensus, or ended its loop.
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        pending = self._pending.get(optimizer)
        self.acted = bool(
            self.arrived(optimizer) or (pending and (self._collectives.world_size == 1 or pending[0].has_arrived()))
        )
        if not self.acted:
            self.agreed_to_settle, self.agreed_request = False, 0.0
            return Agreed()
        agreed = super().take(optimizer)
        self._pace.act()
        return agreed

    def prepare_consensus(self, optimizer: CurvaDion) -> None:
        """Verify that all replicas reach a consensus after the same agreement, and tell them its weights.

        Raises:
            UnevenBatchesError: Another rank takes a step.
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        if self._collectives.world_size > 1:
            self.read(optimizer)
            self.verify_no_step(next(iter(optimizer.members()))[1].device)

    def _agreed(self, numbers: Sequence[float]) -> Agreed:
        end = 2 + self.carries_drift
        self._pace.receive(numbers[end:])
        return super()._agreed(numbers[:end])

    def _stay_near_the_device(self, device: torch.device) -> None:
        """Let the host be a step ahead of the device at most: an agreement arrives when the device has sent it."""
        if device.type == "cuda" and torch.cuda.is_available():
            if self._measured is not None:
                self._measured.synchronize()
            self._measured = torch.cuda.Event()
            self._measured.record()

    def _uneven_batches(self, stepping: bool) -> UnevenBatchesError:
        own, others = ("takes a step", "does not") if stepping else ("reaches a consensus", "takes a step")
        return UnevenBatchesError(
            "Let sync.global_step say where all replicas reach a consensus or end their loop, as in `while"
            f" sync.global_step < total`: {self._collectives.places[self._collectives.rank]} {own} at global step"
            f" {self._pace.global_step:g}, and another rank {others}."
        )
