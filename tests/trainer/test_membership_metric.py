"""What ``CommunicationMonitor`` logs and prints of replicas that are lost and join."""

import contextlib
import csv
import io
import re

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger
from membership_training import ChangingStrategy
from training import Module, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy
from lightning_curvadion.sync.membership_changes import MembershipChange

KEYS = ("members", "replicas_lost", "replicas_joined", "samples_skipped", "membership_seconds")


class LastMoment(pl.Callback):
    """Loses a replica in the last consensus."""

    def on_train_end(self, trainer, pl_module):
        trainer.strategy.membership_changes.append(MembershipChange("loss", 3, lost=1, joined=0, seconds=3.0))


def fit(rank, world, folder, strategy=None, callbacks=()):
    """What a fit of twelve steps prints; it logs in the folder."""
    pl.seed_everything(0, verbose=False)
    trainer = trainer_for(
        rank,
        world,
        strategy or ChangingStrategy(),
        max_steps=12,
        callbacks=[CommunicationMonitor(), *callbacks],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=5,
        limit_val_batches=0,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.fit(Module())
    return printed.getvalue()


def logged(folder):
    """(step, values of ``KEYS``) of each row that has them."""
    with open(folder / "metrics.csv") as file:
        rows = [{key.partition("/")[2]: value for key, value in row.items()} | row for row in csv.DictReader(file)]
    return [(int(row["step"]), *(float(row[key]) for key in KEYS)) for row in rows if row.get("members")]


def table_of(printed):
    return dict(re.findall(r"^  (\S.*?|  at .*?)  +(\S.*)$", printed, flags=re.M))


@pytest.fixture(scope="module")
def changed(replicas, tmp_path_factory):
    """The folder of a fit whose strategy says of changes, and what it printed."""
    folder = tmp_path_factory.mktemp("changed")
    return folder, *replicas.run(1, fit, str(folder), timeout=120)


def test_every_change_is_logged_once_at_its_step_and_the_counts_at_the_interval(changed):
    at_interval = [(4, 2, 1, 0, 8, 4.0), (9, 4, 2, 3, 24, 12.0), (11, 4, 2, 3, 24, 12.0)]
    at_changes = [(0, 3, 0, 0, 0, 0.0), (4, 2, 1, 0, 8, 4.0), (7, 4, 1, 2, 8, 6.0), (9, 4, 2, 3, 24, 12.0)]
    assert sorted(logged(changed[0])) == sorted(at_interval + at_changes)


def test_the_table_says_what_they_cost(changed):
    expected = {
        "replicas at the end": "4",
        "replicas lost": "2",
        "replicas joined": "3",
        "time that losses and joins cost": "12 s",
        "  at a loss, mean": "5 s",
        "  at a join, mean": "2 s",
        "samples skipped after losses": "24",
    }
    assert table_of(changed[1]).items() >= expected.items()


def test_a_loss_after_the_last_step_counts(replicas, tmp_path):
    (printed,) = replicas.run(1, fit, str(tmp_path), None, [LastMoment()])
    assert logged(tmp_path)[-1] == (11, 3, 3, 3, 24, 15.0)
    assert table_of(printed)["replicas at the end"] == "3"


def test_only_rank_0_writes_what_it_counts(replicas, tmp_path):
    rank0, rank1 = replicas.run(2, fit, str(tmp_path), timeout=120)
    assert len(logged(tmp_path)) == 7 and "replicas lost" in rank0 and rank1 == ""


@pytest.mark.parametrize("strategy", [CurvaDionStrategy(), ChangingStrategy({})])
def test_without_changes_nothing_is_said_of_them(replicas, tmp_path, strategy):
    if isinstance(strategy, ChangingStrategy):
        strategy.membership_changes = []
    (printed,) = replicas.run(1, fit, str(tmp_path), strategy)
    assert logged(tmp_path) == [] and "replicas lost" not in printed and "replicas at the end" not in printed
