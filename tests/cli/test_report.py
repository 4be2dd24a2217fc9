"""The report: read from real logs of a real training, and opened in a real browser."""

import base64
import html
import json
import math
import re
import shutil
import subprocess
import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.tensorboard import SummaryWriter
from training import Module, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy
from lightning_curvadion.cli.report.log_readers import ReportError, read_run
from lightning_curvadion.cli.report.report import build_report, main

SYNCS = [2, 5, 8, 11]  # of EveryNSteps(3)


class Logging(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


def train(rank, world, folder):
    for name, strategy in (("ours", CurvaDionStrategy()), ("ddp", DDPStrategy())):
        pl.seed_everything(0, verbose=False)
        trainer_for(
            rank,
            world,
            strategy,
            max_steps=12,
            val_check_interval=4,
            log_every_n_steps=2,
            callbacks=[CommunicationMonitor()],
            logger=[CSVLogger(f"{folder}/{name}", "csv"), TensorBoardLogger(f"{folder}/{name}", "tensorboard")],
        ).fit(Logging())


@pytest.fixture(scope="module")
def trained(replicas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    replicas.run(2, train, str(folder), timeout=120)
    return folder


@pytest.fixture(scope="module")
def page(trained):
    runs = [trained / "ours" / "csv", trained / "ddp" / "csv"]
    return build_report(runs, trained / "report")


def test_both_readers_give_the_same_run(trained):
    for name in ("ours", "ddp"):
        written, events = (read_run(trained / name / kind) for kind in ("csv", "tensorboard"))
        # Lightning gives TensorBoard's hyperparameter page a point of its own.
        assert written.series.keys() == events.series.keys() - {"hp_metric"}
        for key, series in written.series.items():
            assert series.steps == events.series[key].steps, key
            assert series.values == pytest.approx(events.series[key].values, rel=1e-6, nan_ok=True), key


def test_a_run_is_read_as_it_happened(trained):
    ours, ddp = (read_run(trained / name / "csv") for name in ("ours", "ddp"))
    assert ours.steps == ddp.steps == 12 and ddp.is_ddp and not ours.is_ddp
    assert ours.sync_steps == SYNCS and set(SYNCS) <= set(ours.named("drift").steps) and ours.gaps.values == [3, 3, 3]
    assert ours.loss.steps == [1, 3, 5, 7, 9, 11] and len(ours.val_loss) == 3
    numbers = sum(parameter.numel() for parameter in Module().parameters())
    assert ours.ddp_bytes.last == ddp.named("bytes_sent").last == 12 * 4 * numbers
    assert 0 < ours.named("bytes_sent").last < ours.ddp_bytes.last
    assert list(ours.layers) == list(ddp.layers) and {len(series) for series in ours.layers.values()} == {6}


def opened(page, folder):
    """What a browser as wide as a phone finds in the page; a script is added to a copy, since the page has none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    script = """<script>addEventListener("load", () => {
        const images = [...document.images].map(image => [image.complete ? image.naturalWidth : 0, image.alt]);
        const found = {images, fits: document.documentElement.scrollWidth <= innerWidth, width: innerWidth};
        document.body.innerHTML = "<pre></pre>";
        document.querySelector("pre").textContent = JSON.stringify(found);
    })</script>"""
    copy = folder / "copy.html"
    copy.write_text(page.read_text().replace("</body>", script + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", f"--user-data-dir={folder}/user"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", done.stdout, flags=re.S)[1]))


def test_a_browser_shows_every_figure(page, tmp_path):
    found = opened(page, tmp_path)
    # Two that compare, five of the run, and DDP's loss and layers.
    assert len(found["images"]) == 9 and all(width > 1000 for width, _ in found["images"])
    assert all(len(alt) > 40 for _, alt in found["images"])
    assert found["fits"] and found["width"] <= 500


def test_the_page_needs_nothing_but_itself(page):
    text = page.read_text()
    assert not re.search(r"://|<script|<link|@import|url\(", text)
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    beside = sorted(path.read_bytes() for path in page.parent.glob("*.png"))
    assert sorted(embedded) == beside and len(beside) == text.count("<img ")
    assert {path.suffix for path in page.parent.iterdir()} == {".html", ".png"}, "nothing half written is left"


def test_captions_tell_the_runs_own_figures(page, trained):
    text = html.unescape(page.read_text())
    ours, ddp = (read_run(trained / name / "csv") for name in ("ours", "ddp"))
    sent, dense = ours.named("bytes_sent").last, ours.ddp_bytes.last
    for words in (
        f"this replica sent {sent / 1e3:.3g} kB, {100 * sent / dense:.3g} % of the {dense / 1e3:.3g} kB",
        f"The validation loss goes from {ours.val_loss.values[0]:.3g} to {ours.val_loss.last:.3g}.",
        f"The validation loss goes from {ddp.val_loss.values[0]:.3g} to {ddp.val_loss.last:.3g}.",
        "Green marks 4 sync steps.",
        "3 gaps with a median of 3 steps",
        "Filled: 4 sync steps.",
        "Under DDP every step synchronises.",
        "<th>ours</th><th>ddp</th>",
        f"<th>of DDP</th><td>{100 * sent / dense:.3g} %</td><td>100 %</td>",
    ):
        assert words in text, words


MONITORED = "curvadion/bytes_saved,curvadion/bytes_sent,curvadion/rmmc,curvadion/sync_rate"


@pytest.mark.parametrize(
    ("rows", "figures", "sentences"),
    [
        ("loss,step\n2.5,9\n2,19", 1, ["no CommunicationMonitor: give its Trainer", "No validation loss was logged"]),
        ("loss,step\n2.5,9", 0, ["one finite value, 2.5 at step 9"]),
        ("loss,step\nnan,9\nnan,19", 0, ["training loss has no finite value", "<td>nan</td>"]),
        ("loss,step\n3,9\nnan,19\n2,29\n2,39", 1, ["not finite in 1 row, first at step 19", "from 3 to 2."]),
        ("my_loss,step\n3,9\n2,19", 0, ["--loss KEY takes one of my_loss"]),
        (
            f"loss,step,{MONITORED}\n3,0,8,2,inf,1",
            0,
            ["finite 0 times", "two logged rows of the bytes", "only CurvaDion measures it"],
        ),
        (
            f"loss,step,{MONITORED}\n3,0,8,2,inf,1\n2,9,80,5,0.2,0.5\n2,19,90,6,0.1,0.5",
            2,
            ["is 0.15 in the median; its largest logged value is 0.2 (step 9)"],
        ),
        ("loss,step,curvadion/local_steps\n3,9,\n2,19,\n,4,4", 1, ["Green marks 1 sync step."]),
        (
            "curvadion/bytes_sent,curvadion/drift,curvadion/local_steps,step\n5,,,9\n,0.01,9,9\n,0.03,,5",
            1,
            ["3 % at most (step 5). Filled: 1 sync step. Open: 1 meeting between steps", "and 1 logged its own row"],
        ),
    ],
)
def test_what_is_not_there_is_said(tmp_path, rows, figures, sentences):
    (tmp_path / "metrics.csv").write_text(rows)
    text = html.unescape(build_report([tmp_path], tmp_path / "report").read_text())
    assert text.count("<img ") == figures
    for sentence in sentences:
        assert sentence in text


def test_runs_that_logged_no_seconds_are_named(tmp_path):
    for name, key in (("a", "curvadion/seconds"), ("b", "curvadion/seconds"), ("c", "else")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"loss,step,{key}\n3,9,1\n2,19,2\n")
    text = build_report([tmp_path / name for name in "abc"], tmp_path / "report").read_text()
    assert "training loss of 2: a after 2 s and b after 2 s. Without a line: c, " in text
    assert "Not drawn. Without a line: a, b and c" in text


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
    rmmc = read_run(tmp_path).named("rmmc")
    assert rmmc.steps == steps and rmmc.values == pytest.approx([math.inf, *[step / 7 for step in steps[1:]]])


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unused").mkdir()
    (tmp_path / "unused" / "metrics.csv").write_text("loss,step\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.csv").write_text("loss,step\n3,9\n")
    one = str(tmp_path / "one")
    for words, message in (
        ([str(tmp_path / "nowhere")], "nowhere is no directory"),
        ([str(tmp_path / "empty")], "empty has no metrics.csv and no TensorBoard event file"),
        ([one, str(tmp_path / "unused")], "hold no value yet"),
        ([one, one], "a directory is given twice"),
        ([one, "--loss", "other"], "no run logged 'other'; one logged loss"),
        ([one, "--output", f"{one}/metrics.csv"], "File exists"),
    ):
        assert main(["--output", str(tmp_path / "report"), *words]) == 2
        out, error = capsys.readouterr()
        assert out == "" and message in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_the_command_prints_the_page_and_takes_a_key(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("nll,step\n3,9\n2,19\n")
    assert main([str(tmp_path), "--loss", "nll", "--output", str(tmp_path / "out")]) == 0
    place = capsys.readouterr().out.strip()
    assert place == str(tmp_path / "out" / "report.html")
    assert "The training loss goes from 3 to 2." in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("library", "file"),
    [
        ("matplotlib.style", "metrics.csv"),
        ("tensorboard.backend.event_processing.event_accumulator", "events.out.tfevents.1"),
    ],
)
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, library, file):
    (tmp_path / file).write_text("loss,step\n3,9\n2,19\n")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ReportError, match=r'pip install "lightning-curvadion\[report\]"'):
        build_report([tmp_path], tmp_path / "report")
