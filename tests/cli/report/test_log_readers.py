"""Logs of CSVLogger and TensorBoardLogger, read back."""

import math

import pytest
from logged_training import STEPS, SYNC_STEPS, LoggingModule
from torch.utils.tensorboard import SummaryWriter

from lightning_curvadion.cli.report.log_readers import read_run


def test_both_readers_give_the_same_run(trained):
    for name in ("curvadion", "ddp"):
        written, events = (read_run(trained / name / kind) for kind in ("csv", "tensorboard"))
        # Lightning gives TensorBoard's hyperparameter page a point of its own.
        assert written.series.keys() == events.series.keys() - {"hp_metric"}
        for key, series in written.series.items():
            assert series.steps == events.series[key].steps, key
            assert series.values == pytest.approx(events.series[key].values, rel=1e-6, nan_ok=True), key


def test_a_run_is_read_as_it_happened(trained):
    curvadion, ddp = (read_run(trained / name / "csv") for name in ("curvadion", "ddp"))
    assert curvadion.num_steps == ddp.num_steps == STEPS and ddp.is_ddp and not curvadion.is_ddp
    assert (
        curvadion.sync_steps == SYNC_STEPS
        and set(SYNC_STEPS) <= set(curvadion.metric("drift").steps)
        and curvadion.sync_gaps.values == [3, 3, 3]
    )
    assert curvadion.loss.steps == [1, 3, 5, 7, 9, 11] and len(curvadion.val_loss) == 3
    numbers = sum(parameter.numel() for parameter in LoggingModule().parameters())
    assert curvadion.ddp_bytes.last == ddp.metric("bytes_sent").last == STEPS * 4 * numbers
    assert 0 < curvadion.metric("bytes_sent").last < curvadion.ddp_bytes.last
    assert list(curvadion.rmmc_by_layer) == list(ddp.rmmc_by_layer) and {
        len(series) for series in curvadion.rmmc_by_layer.values()
    } == {6}


def test_the_newest_of_several_versions_counts_and_is_named(tmp_path):
    for version, loss in ((2, 2.0), (10, 1.5), (9, 3.0)):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"loss,step\n{loss},9\n")
    run = read_run(tmp_path)
    assert run.loss.values == [1.5] and "3 runs" in run.note and "version_10" in run.note


def test_no_point_of_an_event_file_is_dropped(tmp_path):
    steps = list(range(12_000))
    with SummaryWriter(tmp_path) as writer:
        for step in [*steps[6000:], *steps[:6000]]:
            writer.add_scalar("curvadion/rmmc", math.inf if step == 0 else step / 7, step)
    rmmc = read_run(tmp_path).metric("rmmc")
    assert rmmc.steps == steps and rmmc.values == pytest.approx([math.inf, *[step / 7 for step in steps[1:]]])
