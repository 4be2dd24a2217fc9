"""Ranks with different numbers of batches get an error that names them, and neither hang nor abort."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset
from training import Module, trainer_for

from lightning_curvadion import CurvaDionStrategy, DriftThreshold


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return ((number % 11,) for number in range(8 * self.batches))


def fit(rank, world, batches, folder, options, trigger=None, replica_size=1):
    """The error of a run in which each rank has its own number of batches."""
    module = Module(trigger)
    save = [ModelCheckpoint(folder, every_n_epochs=1)] if folder else []
    trainer = trainer_for(
        rank,
        world,
        CurvaDionStrategy(replica_size=replica_size),
        max_steps=-1,
        max_epochs=2,
        callbacks=save,
        enable_checkpointing=bool(save),
        num_sanity_val_steps=0,
        **options,
    )
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(module, DataLoader(Stream(batches[rank]), batch_size=8))
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("batches", [(20, 14), (14, 20), (9, 9, 7)])
@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}], ids=["validation", "no validation"])
@pytest.mark.parametrize("saves", [False, True])
def test_uneven_batches_are_an_error_that_names_the_ranks_and_their_steps(replicas, tmp_path, batches, options, saves):
    folder = str(tmp_path) if saves else None
    verify(replicas.run(len(batches), fit, batches, folder, options, timeout=60), batches)


@pytest.mark.parametrize("batches", [(20, 14), (9, 9, 7)])
def test_uneven_batches_are_that_error_too_where_agreements_carry_the_drift(replicas, tmp_path, batches):
    answers = replicas.run(len(batches), fit, batches, str(tmp_path), {}, DriftThreshold(0.05), timeout=60)
    verify(answers, batches)


def test_uneven_batches_of_replicas_of_two_processes_end_all_of_them(replicas, tmp_path):
    answers = replicas.run(4, fit, (9, 9, 7, 7), str(tmp_path), {}, None, 2, timeout=60)
    for name, message in answers:
        assert name == "UnevenBatchesError"
        assert message.startswith("Give every rank the same number of batches")
        assert "ended after 7 steps" in message and "takes step 8" in message


def verify(answers, batches):
    shortest = min(batches)
    for name, message in answers:
        assert name == "UnevenBatchesError"
        assert message.startswith("Give every rank the same number of batches")
        for rank, own in enumerate(batches):
            assert (f"rank {rank} ended after {own} steps" in message) == (own == shortest)
            assert (f"rank {rank} takes step {shortest + 1}" in message) == (own > shortest)
