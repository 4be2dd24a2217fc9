"""The callback that reaches consensus before any other callback looks at the module, and averages moving averages."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor
from typing_extensions import override

from .lightning_internals import averaged_model


class ConsensusCallback(Callback):
    """Stands before all other callbacks, so that each of them finds the consensus in the module.

    The strategy's own hooks run after those of the callbacks, when a callback may already have saved, evaluated or
    replaced the weights of its replica.

    Args:
        reach_consensus: The strategy's; the argument says whether to include the optimizers' state.
        end_batch: Called after every batch.
        verify_no_step: Called at the end of every epoch, which a rank with fewer batches reaches before the others.
        note_failure: Called with an exception before other callbacks handle it.
        begin_epoch: Called before the first batch of every epoch.
        begin_batch: Called before every batch.
        begin_validation_batch: Called before every batch of a validation.
    """

    def __init__(
        self,
        reach_consensus: Callable[[bool], None],
        end_batch: Callable[[], None],
        verify_no_step: Callable[[], None],
        note_failure: Callable[[BaseException], None],
        begin_epoch: Callable[[], None],
        begin_batch: Callable[[], None],
        begin_validation_batch: Callable[[], None],
    ) -> None:
        self._reach_consensus = reach_consensus
        self._end_batch = end_batch
        self._verify_no_step = verify_no_step
        self._note_failure = note_failure
        self._begin_epoch = begin_epoch
        self._begin_batch = begin_batch
        self._begin_validation_batch = begin_validation_batch

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", *_: Any) -> None:
        self._begin_batch()

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        self._end_batch()

    @override
    def on_validation_batch_start(self, trainer: "pl.Trainer", *_: Any) -> None:
        self._begin_validation_batch()

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._begin_epoch()
        # Here SWA takes up the weights, and in the end replaces them by their average.
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging) and trainer.current_epoch >= callback.swa_start:
                self._reach_consensus(True)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._reach_consensus(False)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._verify_no_step()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._note_failure(exception)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._reach_consensus(True)


def moving_averages(callbacks: Sequence[Callback]) -> dict[str, Tensor]:
    """Averages of the weights that callbacks update after every step (``WeightAveraging``), by name.

    A mean over replicas and an average over steps commute. The mean of the replicas' averages is therefore the average
    that one model would have.
    """
    tensors: dict[str, Tensor] = {}
    for number, callback in enumerate(callbacks):
        model = averaged_model(callback)
        if model is not None and not isinstance(callback, StochasticWeightAveraging):
            named = [*model.named_parameters(), *model.named_buffers()]
            tensors.update({f"{name} of {type(callback).__name__} {number}": tensor for name, tensor in named})
    return tensors
