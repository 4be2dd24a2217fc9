"""The report of a real training, opened in a real browser, and the command that writes it."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from lightning_curvadion.cli.errors import ReportError
from lightning_curvadion.cli.report.command import main
from lightning_curvadion.cli.report.log_readers import read_run
from lightning_curvadion.cli.report.plotting import FIGURE_WIDTH, STYLE
from lightning_curvadion.cli.report.report import build_report


@pytest.fixture(scope="module")
def page(trained):
    runs = [trained / "curvadion" / "csv", trained / "ddp" / "csv"]
    return build_report(runs, trained / "report")


def open_in_browser(page, folder, *more):
    """What a browser as wide as a phone finds in the page. A copy of the page gets a script that reports it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    script = """<script>addEventListener("load", () => {
        const images = [...document.images].map(image => [image.complete ? image.naturalWidth : 0, image.alt]);
        const dark = [...document.images].filter(i => i.currentSrc == i.parentElement.children[0].srcset).length;
        const root = document.documentElement, margin = root.clientWidth - document.images[0].clientWidth;
        const found = {images, dark, margin, fits: root.scrollWidth <= innerWidth, width: innerWidth};
        document.body.innerHTML = "<pre></pre>";
        document.querySelector("pre").textContent = JSON.stringify(found);
    })</script>"""
    copy = folder / "copy.html"
    copy.write_text(page.read_text().replace("</body>", script + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", f"--user-data-dir={folder}/user"]
    done = subprocess.run(
        [browser, *options, *more, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", done.stdout, flags=re.S)[1]))


def embedded_images(text):
    """Those on white and those for a dark page."""
    return [base64.b64decode(data) for data in re.findall(r'src(?:set)?="data:image/png;base64,([^"]+)"', text)]


def test_a_browser_shows_every_figure(page, tmp_path):
    found = open_in_browser(page, tmp_path)
    # Two that compare, five of the run, and DDP's loss and layers.
    assert len(found["images"]) == 9 and all(width > 1000 for width, _ in found["images"])
    assert all(len(alt) > 40 for _, alt in found["images"])
    assert found["fits"] and found["width"] <= 500 and found["dark"] == 0
    # On a phone of 390 pixels the text of a figure, in points of an inch of its width, is as high as small print.
    assert STYLE["font.size"] / 72 * (390 - found["margin"]) / FIGURE_WIDTH > 10.9


def test_a_browser_that_prefers_the_dark_shows_dark_figures(page, tmp_path):
    found = open_in_browser(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert found["dark"] == len(found["images"]) == 9


def test_the_page_needs_nothing_but_itself(page):
    text = page.read_text()
    assert not re.search(r"://|<script|<link|@import|url\(", text)
    beside = sorted(path.read_bytes() for path in page.parent.glob("*.png"))
    assert sorted(embedded_images(text)) == beside and len(beside) == 2 * text.count("<img ")
    assert {path.suffix for path in page.parent.iterdir()} == {".html", ".png"}, "nothing half written is left"


def test_captions_state_the_numbers_of_the_run(page, trained):
    text = html.unescape(page.read_text())
    curvadion, ddp = (read_run(trained / name / "csv") for name in ("curvadion", "ddp"))
    sent, dense = curvadion.metric("bytes_sent").last, curvadion.ddp_bytes.last
    for words in (
        f"this replica sent {sent / 1e3:.3g} kB, {100 * sent / dense:.3g} % of the {dense / 1e3:.3g} kB",
        f"The validation loss goes from {curvadion.val_loss.values[0]:.4f} to {curvadion.val_loss.last:.4f}.",
        f"The validation loss goes from {ddp.val_loss.values[0]:.4f} to {ddp.val_loss.last:.4f}.",
        "Green marks 4 sync steps.",
        "3 gaps with a median of 3 steps",
        "Filled: 4 sync steps.",
        "Under DDP every step synchronises.",
        "<th>curvadion</th><th>ddp</th>",
        f"<th>share of DDP</th><td>{100 * sent / dense:.3g} %</td><td>100 %</td>",
    ):
        assert words in text, words


@pytest.mark.parametrize("name", ["curvadion", "ddp"])
@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_the_page_and_the_closing_table_agree_to_the_byte(trained, tmp_path, name, logger):
    printed = (trained / name / "printed").read_text().partition("Communication of this run")[2]
    table = [(label.strip(), value) for label, value in re.findall(r"^ +(\S.*?)  +(\S.*)$", printed, flags=re.M)]
    text = build_report([trained / name / logger], tmp_path / "report").read_text()
    rows = re.findall(r"<tr><th>(?:&emsp;)?(.*?)</th><td>(.*?)</td></tr>", text)
    # The page has the training loss above.
    assert rows[0][0] == "last training loss" and rows[1:] == table
    assert len(table) >= 7
    if name == "curvadion":
        values = dict(table)
        sent, share = values["sent per replica"], values["share of DDP"]
        assert f"this replica sent {sent}, {share} of the {values['DDP would have sent']} that DDP" in text
        assert {"in steps", "in validation", "in checkpoints", "at start and end"} < values.keys()


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_the_page_has_the_settings_of_the_run(trained, tmp_path, logger):
    text = html.unescape(build_report([trained / "curvadion" / logger], tmp_path / "report").read_text())
    assert "trigger: EveryNSteps(n=3)" in text and "wire_format: sign" in text


def test_the_page_has_a_date_and_words_that_explain_it(page):
    text = html.unescape(page.read_text())
    assert re.search(r"written on \d{4}-\d\d-\d\d \d\d:\d\d, up to step", text)
    assert [text.count(f"<p><b>{word}</b> is") for word in ("RMMC", "Drift", "Consensus")] == [1, 1, 1]


def test_runs_with_similar_names_have_pictures_of_their_own(tmp_path):
    names = ["a b", "a-b", "a?b", "A-B", "a-b-2"]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"loss,step\n{number + 3},9\n2,19\n")
    page = build_report([tmp_path / name for name in names], tmp_path / "report").read_text()
    embedded = set(embedded_images(page))
    beside = [path.read_bytes() for path in (tmp_path / "report").glob("*.png")]
    assert len(beside) == len(embedded) == 2 * len(names) and set(beside) == embedded
    # Where a capital is a small letter.
    assert len({path.name.lower() for path in (tmp_path / "report").glob("*.png")}) == 2 * len(names)


def test_the_page_says_at_which_step_the_logs_end(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss,step\n3,49\n2,99\n")
    page = build_report([tmp_path], tmp_path / "report").read_text()
    assert ", up to step 99, the last that was logged." in page
    assert "<th>logged optimizer steps</th><td>100</td>" in page


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
    assert "The training loss goes from 3.0000 to 2.0000." in (tmp_path / "out" / "report.html").read_text()


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
