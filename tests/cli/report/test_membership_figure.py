"""The figure of a run whose replicas were lost and joined."""

import contextlib
import io
import re

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from logged_training import LoggingModule
from membership_training import ChangingStrategy
from training import trainer_for

from lightning_curvadion import CommunicationMonitor
from lightning_curvadion.cli.report.log_readers import read_run
from lightning_curvadion.cli.report.report import build_report


def train(rank, world, folder):
    """Train; logs go to ``folder/{csv,tensorboard}``. Returns what is printed."""
    loggers = [CSVLogger(folder, "csv", ""), TensorBoardLogger(folder, "tensorboard", "")]
    options = {"max_steps": 12, "val_check_interval": 4, "log_every_n_steps": 5, "logger": loggers}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer_for(rank, world, ChangingStrategy(), callbacks=[CommunicationMonitor()], **options).fit(LoggingModule())
    return printed.getvalue()


@pytest.fixture(scope="module")
def changed(replicas, tmp_path_factory):
    """The folder with the logs of such a run, and what it printed."""
    folder = tmp_path_factory.mktemp("changed")
    return folder, *replicas.run(1, train, str(folder), timeout=120)


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_the_page_draws_the_replicas_and_says_what_changes_cost(changed, tmp_path, logger):
    folder, printed = changed
    text = build_report([folder / logger], tmp_path).read_text()
    caption = "The run begins with 3 replicas and ends with 4. 2 were lost and 3 joined. This cost the replica that"
    caption += " logged it 12 s, the longest 6 s (step 9). Nobody trains on 24 samples that lost replicas had drawn."
    assert text.count(caption) == 2, "in the caption and in the alternative text"
    assert (tmp_path / f"{logger}-replicas.png").is_file()
    rows = re.findall(r"<tr><th>(?:&emsp;)?(.*?)</th><td>(.*?)</td></tr>", text)
    table = re.findall(r"^ +(\S.*?)  +(\S.*)$", printed.partition("Communication of this run")[2], flags=re.M)
    # The page has the training loss above.
    assert rows[1:] == table and ("replicas lost", "2") in table


def test_losses_and_joins_are_read_at_their_steps(changed):
    run = read_run(changed[0] / "csv")
    found = [run.metric(key).rises for key in ("replicas_lost", "replicas_joined", "membership_seconds")]
    assert [(series.steps, series.values) for series in found] == [
        ([4, 9], [1, 1]),
        ([7, 9], [2, 1]),
        ([4, 7, 9], [4, 2, 6]),
    ]


def test_other_runs_have_no_such_figure(trained, tmp_path):
    text = build_report([trained / "curvadion" / "csv"], tmp_path).read_text()
    assert "<h3>Replicas</h3>" not in text and not list(tmp_path.glob("*-replicas*.png"))
