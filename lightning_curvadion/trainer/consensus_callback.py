"""What of a Trainer must see one model, and when: its callbacks, and the moving averages that some of them keep."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn
from typing_extensions import override


class ConsensusCallback(Callback):
    """Stands before all other callbacks, so that whoever looks at the module from there finds the consensus.

    The strategy's own hooks come after everybody else's, when a callback may have saved, evaluated or replaced the
    weights of its replica already.

    Args:
        meet: The strategy's; told whether to include the optimizers' state.
        heed_signals: The strategy's; called after every batch.
    """

    def __init__(self, meet: Callable[[bool], None], heed_signals: Callable[[], None]) -> None:
        self._meet = meet
        self._heed_signals = heed_signals

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        self._heed_signals()

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Here SWA takes up the weights, and in the end replaces them by their average.
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging) and trainer.current_epoch >= callback.swa_start:
                self._meet(True)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._meet(False)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._meet(True)


def moving_averages(callbacks: Sequence[Callback]) -> dict[str, Tensor]:
    """Averages of the weights that callbacks update after every step (``WeightAveraging``), by name.

    A mean over replicas and an average over steps may change places, so that the mean of the replicas' averages is the
    average that one model would have.
    """
    tensors: dict[str, Tensor] = {}
    for number, callback in enumerate(callbacks):
        model = getattr(callback, "_average_model", None)
        if isinstance(model, nn.Module) and not isinstance(callback, StochasticWeightAveraging):
            kept = [*model.named_parameters(), *model.named_buffers()]
            tensors.update({f"{name} of {type(callback).__name__} {number}": tensor for name, tensor in kept})
    return tensors
