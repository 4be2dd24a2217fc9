"""Stop requests: a signal that one rank receives takes effect on all ranks after the same step.

Lightning broadcasts a flag before every batch for SIGTERM, a second collective a step, and broadcasts again inside the
signal handler. Its handler of SLURM's requeue signal writes a checkpoint. In a handler the ranks may each be at another
collective. Here the handler only records the request, which travels in the 16 bytes of the next agreement.
"""

import logging
import signal
from collections.abc import Callable
from types import FrameType

import lightning.pytorch as pl
from typing_extensions import override

from ..sync.agreement import Agreement
from ..sync.process_group_sync import ProcessGroupSync
from .lightning_internals import disable_sigterm_broadcast, replace_signal_handlers, requeue_job, stop_after_batch

log = logging.getLogger(__name__)

# The agreement takes the largest request: a requeue comes first, the stop may follow. One replica may leave alone.
LEAVE, STOP, REQUEUE = 0.4, 0.5, 0.75


class StopRequests:
    """Takes the place of Lightning's handlers of SIGTERM and of SLURM's requeue signal while a Trainer fits.

    Args:
        trainer: Its loop ends.
        sync: Its agreement carries the request to the other ranks.

    Attributes:
        stopping: Whether the ranks have agreed to stop.
    """

    # What SIGTERM asks for, and in words.
    _stop, _what_ends = STOP, "all ranks stop"

    def __init__(self, trainer: "pl.Trainer", sync: ProcessGroupSync) -> None:
        self.stopping = False
        self._trainer = trainer
        self._rank = trainer.global_rank
        self._sync = sync
        self._requeue_signal = 0
        self._received_sigterm = False

    @property
    def _agreement(self) -> Agreement:
        # Of the present process group.
        return self._sync.agreement

    def install(self) -> None:
        """Replace Lightning's handlers, and no other handlers of these signals."""
        if replace_signal_handlers(self._trainer, self._request_stop, self._request_requeue):
            disable_sigterm_broadcast(self._trainer)

    def _request_stop(self, signum: int, _: FrameType | None) -> None:
        log.info(f"rank {self._rank}: SIGTERM; {self._what_ends} after the next step")
        launcher = self._trainer.strategy.launcher
        if not self._agreement.stop_request and launcher is not None:
            launcher.kill(signal.Signals(signum))
        self._received_sigterm = True
        self._agreement.stop_request = max(self._agreement.stop_request, self._stop)

    def _request_requeue(self, signum: int, _: FrameType | None) -> None:
        log.info(f"rank {self._rank}: requeue; all ranks save their consensus after their next step")
        self._requeue_signal = signum
        self._agreement.stop_request = REQUEUE

    def act_on_agreed_request(self) -> None:
        """Do what the ranks have agreed on; every rank calls it after every batch."""
        if self._agreement.agreed_request == REQUEUE:
            # SLURM may have sent SIGTERM too before the ranks agreed: the stop follows the requeue.
            self._agreement.stop_request = STOP if self._received_sigterm else 0.0
            self._agreement.agreed_request = 0.0
            requeue_job(self._trainer, self._requeue_signal)
        elif self._agreement.agreed_request == STOP:
            self.stopping = True
            stop_after_batch(self._trainer)


class LeaveRequests(StopRequests):
    """SIGTERM lets the replica that receives it leave, and the others train on.

    Args:
        trainer: Its loop ends.
        sync: Its agreement carries the request to the others.
        interrupt: Called in the signal handler: a replica that waits for others leaves at once.
        leave: Called on all replicas, with whether this one leaves.
    """

    _stop, _what_ends = LEAVE, "it leaves"

    def __init__(
        self,
        trainer: "pl.Trainer",
        sync: ProcessGroupSync,
        interrupt: Callable[[], None],
        leave: Callable[[bool], None],
    ) -> None:
        super().__init__(trainer, sync)
        self._interrupt, self._leave = interrupt, leave

    @override
    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        super()._request_stop(signum, frame)
        self._interrupt()

    @override
    def act_on_agreed_request(self) -> None:
        super().act_on_agreed_request()
        if self._agreement.agreed_request == LEAVE:
            self._agreement.agreed_request = 0.0
            self._leave(self._received_sigterm)
            if self._received_sigterm:
                stop_after_batch(self._trainer)
