"""Signals: what one replica is told, all of them do after the same step, while they can still save one model.

Lightning broadcasts a flag before every batch for SIGTERM, which costs a second collective a step, and another one from
within the signal handler; at the signal of a SLURM requeue the handler itself writes a checkpoint. In a handler the
replicas may be in the middle of something else, each somewhere else. Here the handler only notes what it was told, and
that travels with the 16 bytes of the next agreement.
"""

import logging
import signal
from types import FrameType

import lightning.pytorch as pl

from ..sync.process_group_sync import ProcessGroupSync

log = logging.getLogger(__name__)

# As wishes of a replica: a requeue first, the end may follow.
STOP, REQUEUE = 0.5, 0.75


class StopRequests:
    """Takes the place of Lightning's handlers of SIGTERM and of SLURM's requeue signal while a Trainer fits.

    Args:
        trainer: Whose loop ends.
        sync: What carries the wish to the other replicas.

    Attributes:
        stopping: Whether the replicas agreed to stop.
    """

    def __init__(self, trainer: "pl.Trainer", sync: ProcessGroupSync) -> None:
        self.stopping = False
        self._connector = trainer._signal_connector
        self._trainer = trainer
        self._sync = sync
        self._requeue_signal = 0

    def install(self) -> None:
        """Replace Lightning's parts of the handlers, and nothing else that listens to the signals."""
        replacements = {"_sigterm_notifier_fn": self._note_stop, "_slurm_sigusr_handler_fn": self._note_requeue}
        replaced = []
        for signum in signal.valid_signals():
            handlers = getattr(signal.getsignal(signum), "signal_handlers", [])
            for name, replacement in replacements.items():
                if (lightnings := getattr(self._connector, name, None)) in handlers:
                    handlers[handlers.index(lightnings)] = replacement
                    replaced.append(name)
        loop = self._trainer.fit_loop.epoch_loop
        # Not in a thread that receives no signals: there Lightning's way stays.
        if "_sigterm_notifier_fn" in replaced and hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note_stop(self, signum: int, _: FrameType | None) -> None:
        log.info(f"rank {self._sync.rank}: SIGTERM; all replicas stop after their next step")
        launcher = self._trainer.strategy.launcher
        if not self._sync.agreement.stop_request and launcher is not None:
            launcher.kill(signal.Signals(signum))
        self._sync.agreement.stop_request = max(self._sync.agreement.stop_request, STOP)

    def _note_requeue(self, signum: int, _: FrameType | None) -> None:
        log.info(f"rank {self._sync.rank}: requeue; all replicas save their consensus after their next step")
        self._requeue_signal = signum
        self._sync.agreement.stop_request = REQUEUE

    def heed(self) -> None:
        """Do what some replica was told; every rank calls it after every batch."""
        if self._sync.agreement.agreed_request == REQUEUE:
            self._sync.agreement.stop_request = self._sync.agreement.agreed_request = 0.0
            self._connector._slurm_sigusr_handler_fn(self._requeue_signal, None)  # type: ignore[arg-type]
        elif self._sync.agreement.agreed_request == STOP:
            self.stopping = True
            # The loop ends with this batch.
            self._connector.received_sigterm = True
