"""PacedStrategy: replicas that may take different numbers of steps, and where they may meet."""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
from typing_extensions import override

from ..sync.collectives import count_together
from ..sync.process_group_sync import ProcessGroupSync
from .elastic_strategy import ElasticStrategy
from .lightning_internals import trainer_of
from .paced_loop import PacedLoop, claim_samples

T = TypeVar("T")


class PacedStrategy(ElasticStrategy):
    """An :class:`ElasticStrategy` whose replicas may take different numbers of steps.

    Args:
        heterogeneous: Whether they may.
        **arguments: Of ``ElasticStrategy``.

    Raises:
        MisconfigurationException: Arguments that do not fit together.
    """

    def __init__(self, heterogeneous: bool, **arguments: Any) -> None:
        super().__init__(heterogeneous=heterogeneous, **arguments)
        self._heterogeneous = heterogeneous
        self._paced: PacedLoop | None = None

    def _begin_paces(self, trainer: "pl.Trainer", sync: ProcessGroupSync) -> None:
        self._paced = PacedLoop(trainer, sync) if self._heterogeneous else None

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        trainer = trainer_of(self.lightning_module)
        if not self._heterogeneous or trainer is None or not trainer.training:
            return dataloader
        return claim_samples(dataloader, self.world_size, count_together)

    @override
    def _begin_training(self) -> None:
        super()._begin_training()
        if self._paced is not None:
            self._paced.begin_training()

    @override
    def _begin_batch(self) -> None:
        super()._begin_batch()
        if self._paced is not None:
            self._paced.begin_batch()

    def _end_paced_batch(self, sync: ProcessGroupSync) -> None:
        if self._paced is not None:
            self._paced.end_batch()
            if sync.agreement.agreed_request:
                self._paced.meet()

    def _meet(self) -> None:
        """Note that all replicas are after the same agreement, or that this one runs no collective any more."""
        if self._paced is not None:
            self._paced.meet()

    @override
    def _jointly(self, operation: Callable[[], T], what: str = "a consensus") -> T:
        if self._paced is not None:
            self._paced.verify_meeting(what)
        return super()._jointly(operation, what)
