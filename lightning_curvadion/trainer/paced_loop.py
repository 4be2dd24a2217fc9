"""PacedLoop: a Trainer's loop on replicas that take different numbers of steps.

An epoch has as many steps as on equal replicas, in the mean. It ends on all of them after the same agreement, when
``sync.global_step`` has come so far: so validations and checkpoints at its end are those of one model. Learning-rate
schedulers that step with every batch follow the global step too. Replicas claim their samples from one order.
"""

import sys
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from ..sync.process_group_sync import ProcessGroupSync
from .lightning_internals import end_epoch_after_batch, leave_epoch_open, saves_within_epochs, with_sampler

# So many batches a replica claims at a time: a claim waits for the store.
_AHEAD = 8


class ClaimingSampler(Sampler[int]):
    """Samples of an epoch, of which every replica claims what it has time for.

    Once all are claimed those of the next epoch's order follow, for a replica that has not heard yet that it is over.

    Args:
        dataset: Of which the samples are.
        block: Number of samples that are claimed at a time.
        seed: Of the orders, the same on all replicas; ``None`` for the order of the dataset.
        replicas: Number of them.
        claim: Adds to a counter of all replicas by name, and returns the sum.
    """

    def __init__(
        self, dataset: Sized, block: int, seed: int | None, replicas: int, claim: Callable[[str, int], int]
    ) -> None:
        self._size, self._block, self._seed = len(dataset), block, seed
        self._replicas, self._claim, self._epoch = replicas, claim, 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Samples of a replica as fast as the mean."""
        return self._size // self._replicas

    def __iter__(self) -> Iterator[int]:
        epoch, orders = self._epoch, dict[int, list[int]]()
        while True:
            end = self._claim(f"claimed in epoch {epoch}", self._block)
            for number in range(end - self._block, end):
                later, place = divmod(number, self._size)
                if later not in orders:
                    orders = {later: self._order(epoch + later)}
                yield orders[later][place]

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(self._size))
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return cast(list[int], torch.randperm(self._size, generator=generator).tolist())


class PacedLoop:
    """Ends epochs, and steps schedulers, by the global step.

    Args:
        trainer: Of this replica.
        sync: Counts the global step.

    Raises:
        MisconfigurationException: Something is to happen after so many steps of a replica.
    """

    def __init__(self, trainer: "pl.Trainer", sync: ProcessGroupSync) -> None:
        _check(trainer)
        self._trainer, self._sync = trainer, sync
        self._schedulers = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
        # Lightning would step them with the batches of this replica.
        self._every = [config.frequency for config in self._schedulers]
        for config in self._schedulers:
            config.frequency = sys.maxsize
        self._epoch_steps = self._scheduled = 0
        # Where nothing but agreements may be sent.
        self._in_epoch = False

    def begin_training(self) -> None:
        """Take up the global step where the run is."""
        steps = self._trainer.num_training_batches
        if steps == float("inf"):
            raise MisconfigurationException(
                "heterogeneous=True: an endless dataset needs limit_train_batches, the steps of an epoch"
            )
        self._epoch_steps = int(steps) // self._trainer.accumulate_grad_batches
        self._sync.global_step = self._scheduled = self._trainer.current_epoch * self._epoch_steps

    def begin_batch(self) -> None:
        """Called before every batch: the loop is not to count how many there are."""
        leave_epoch_open(self._trainer)
        self._in_epoch = True

    def meet(self) -> None:
        """Called where all replicas are after the same agreement."""
        self._in_epoch = False

    def verify_meeting(self, what: str) -> None:
        """Check that all replicas are about to run a collective.

        Raises:
            MisconfigurationException: They take different numbers of steps until they are.
        """
        if self._in_epoch:
            raise MisconfigurationException(
                f"heterogeneous=True: {what} would meet no other within an epoch, in which replicas take different"
                " numbers of steps; leave out sync_dist=True of values that are logged on_step, max_time, and"
                " collectives of your own"
            )

    def end_batch(self) -> None:
        """Called after every batch."""
        progress = self._sync.global_step
        while self._scheduled < int(progress):
            self._scheduled += 1
            for config, every in zip(self._schedulers, self._every, strict=True):
                if self._scheduled % every == 0:
                    config.scheduler.step()  # type: ignore[call-arg]
        if progress >= (self._trainer.current_epoch + 1) * self._epoch_steps:
            end_epoch_after_batch(self._trainer)
            self.meet()


def claim_samples(dataloader: Any, replicas: int, claim: Callable[[str, int], int]) -> Any:
    """The same dataloader with a sampler that claims, where Lightning has given it one."""
    sampler = getattr(dataloader, "sampler", None)
    if not isinstance(dataloader, DataLoader) or type(sampler) is not DistributedSampler:
        return dataloader
    block = _AHEAD * (getattr(dataloader.batch_sampler, "batch_size", None) or 1)
    seed = sampler.seed if sampler.shuffle else None
    return with_sampler(dataloader, ClaimingSampler(cast(Sized, sampler.dataset), block, seed, replicas, claim))


def _check(trainer: "pl.Trainer") -> None:
    advice = "replicas take different numbers of steps, and meet at the ends of epochs; set"
    if trainer.max_steps != -1:
        raise MisconfigurationException(f"heterogeneous=True: {advice} max_epochs instead of max_steps")
    if trainer.val_check_interval != 1.0:
        raise MisconfigurationException(f"heterogeneous=True: {advice} limit_train_batches, and no val_check_interval")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and saves_within_epochs(callback):
            raise MisconfigurationException(f"heterogeneous=True: {advice} ModelCheckpoint(every_n_epochs=...)")
