"""SIGTERM: a preempted replica stops all of them after the same step, so that they can still save one model.

Lightning broadcasts a flag before every batch for this, which costs a second collective a step, and another one from
within the signal handler, where the replicas may be in the middle of something else. Here the wish to stop travels with
the 16 bytes of the next agreement.
"""

import logging
import signal
from types import FrameType

import lightning.pytorch as pl

from .sync import ProcessGroupSync

log = logging.getLogger(__name__)


class SharedStop:
    """Takes the place of Lightning's SIGTERM handler while a Trainer fits.

    Args:
        trainer: Whose loop ends.
        sync: What carries the wish to the other replicas.
    """

    def __init__(self, trainer: "pl.Trainer", sync: ProcessGroupSync) -> None:
        self._trainer = trainer
        self._sync = sync

    def install(self) -> None:
        """Replace Lightning's part of the handler, and nothing else that listens to the signal."""
        handlers = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
        lightnings = getattr(self._trainer._signal_connector, "_sigterm_notifier_fn", None)
        if lightnings not in handlers:
            return  # not the main thread, or another Lightning
        handlers[handlers.index(lightnings)] = self._note
        loop = self._trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, signum: int, _: FrameType | None) -> None:
        log.info(f"rank {self._sync.rank}: SIGTERM; all replicas stop after their next step")
        launcher = self._trainer.strategy.launcher
        if not self._sync.stop_requested and launcher is not None:
            launcher.kill(signal.Signals(signum))
        self._sync.stop_requested = True

    def after_step(self) -> None:
        """Let the loop end with this batch if the replicas agreed to stop; every rank calls it after every step."""
        if self._sync.stop_agreed:
            self._trainer._signal_connector.received_sigterm = True
