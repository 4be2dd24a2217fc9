"""What README, guide and benchmarks claim: their files exist, and their tables are those that the commands print."""

import difflib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.benchmarks import compare_report, models, quantization_training, scaling, two_levels
from examples.benchmarks.compare_plan import RATES, RESULTS, SEEDS, STEPS, read
from examples.benchmarks.compare_report import DENSE, USUAL, gap, kernel_share, pace, rows_at
from examples.benchmarks.methods import DEFAULT
from examples.benchmarks.model_replica import finished
from lightning_curvadion import CurvaDion, ProcessGroupSync

ROOT = Path(__file__).parents[1]
README, GUIDE, BENCHMARKS = (
    ROOT / name for name in ("README.md", "examples/guide.md", "examples/benchmarks/README.md")
)
PAGES = (README, GUIDE, BENCHMARKS, ROOT / "examples/README.md")
TWO_LEVELS = [two_levels.Job(layout, STEPS, "", 0, seed) for layout in two_levels.LAYOUTS for seed in SEEDS]
ON_A_SLOW_LINK = [
    two_levels.Job(layout, STEPS, "12mbit", 120, seed)
    for layout in (*two_levels.LAYOUTS, *two_levels.TIMED)
    for seed in SEEDS
]
COMMANDS = ("fit", "validate", "test", "predict", "plan", "report")


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def tables(text: str) -> list[list[str]]:
    """The lines of each Markdown table."""
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)]


def records(text: str) -> list[dict[str, str]]:
    """The rows of all tables, by the head of each column."""
    split = [[[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table] for table in tables(text)]
    return [dict(zip(head, row, strict=False)) for head, _, *rows in split for row in rows]


def prose(page: Path) -> str:
    return " ".join(page.read_text().split())


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command: in code spans, and in blocks of bash line by line."""
    text = page.read_text().replace("\\\n", " ")
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    for words in (shlex.split(part, comments=True) for line in spans + lines for part in line.split("&&")):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] in ("python", "pytest", "torchrun", "sbatch"):
            yield words


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 110] == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_are_named_exist(page):
    named = re.findall(r"(?:\.ci|configs|examples|lightning_curvadion|results|tests)/[\w./-]*\w", page.read_text())
    missing = [path for path in named if not any((folder / path).exists() for folder in (ROOT, page.parent))]
    assert named
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_name_scripts_and_options_that_exist(page):
    for words in commands(page):
        if words[0] == "python" and words[1] == "-m":
            assert words[2] == "lightning_curvadion" and (len(words) == 3 or words[3] in COMMANDS), words
        elif words[0] == "python":
            script = ROOT / words[1] if "/" in words[1] else page.parent / words[1]
            source, options = script.read_text(), words[2 : words.index("--") if "--" in words else None]
            assert all(re.search(rf"{word}\b", source) for word in options if word.startswith("--")), words


def test_the_contents_of_the_guide():
    listed = re.findall(r"^- \[(.*)\]\(#", GUIDE.read_text(), flags=re.M)
    assert listed == re.findall(r"^## (.*)$", GUIDE.read_text(), flags=re.M)


@pytest.mark.parametrize("thing", [CurvaDion, ProcessGroupSync], ids=lambda thing: thing.__name__)
def test_the_guide_names_every_option(thing):
    options = GUIDE.read_text().partition("## Options\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)=?`", options))
    assert inspect.signature(thing).parameters.keys() - {"params", "group"} <= named


def test_the_diff_is_that_of_the_scripts():
    before, after = ((ROOT / f"examples/switch_{name}.py").read_text().splitlines() for name in ("before", "after"))
    (shown,) = re.findall(r"```diff\n(.*?)```", README.read_text(), flags=re.S)
    changes = [
        line for line in difflib.unified_diff(before, after, n=0, lineterm="") if re.match(r"[+-](?![+-])", line)
    ]
    assert shown.splitlines() == [line for line in changes if line[1:].strip()]


def test_the_table_of_the_readme_is_the_first_that_the_comparison_prints(capsys):
    compare_report.tables(RESULTS)
    printed = tables(capsys.readouterr().out)[0]
    assert len(printed) == 9
    assert tables(README.read_text())[0] == printed


def print_two_levels():
    for jobs in (TWO_LEVELS, ON_A_SLOW_LINK):
        print(two_levels.table(jobs, two_levels.RESULTS) + "\n")


@pytest.mark.parametrize(
    ("part", "printer", "least"),
    [
        ("Comparison", lambda: compare_report.tables(RESULTS), 50),
        ("Wire formats", quantization_training.tables, 14),
        ("Two levels", print_two_levels, 9),
        ("Other models", lambda: models.tables(finished(models.RESULTS)), 30),
    ],
    ids=["compare.py", "quantization.py", "two_levels.py", "models.py"],
)
def test_the_tables_of_the_benchmarks_are_rows_of_what_is_printed(capsys, part, printer, least):
    printer()
    printed = records(capsys.readouterr().out)
    shown = records(
        BENCHMARKS.read_text().partition(f"\n## {part}")[2].partition("\n## ")[0].partition("\n### Size")[0]
    )
    assert len(shown) >= least
    assert [row for row in shown if not any(row.items() <= other.items() for other in printed)] == []


def test_the_predictions_for_large_models_are_those_that_are_printed(monkeypatch, capsys):
    # The larger ones take a minute.
    monkeypatch.setattr(scaling, "MODELS", {"160 M": scaling.MODELS["160 M"]})
    monkeypatch.setattr(scaling, "REPLICAS", (64,))
    scaling.main()
    text = capsys.readouterr().out
    section = BENCHMARKS.read_text().partition("\n## On paper")[2]
    shown = [row for row in records(section) if row["model"] == "160 M"]
    assert len(shown) == 3
    assert [row for row in shown if not any(row.items() <= other.items() for other in records(text))] == []
    (rate,) = re.findall(r"The sync rate is that of our small runs, (\S+)%", text)
    assert f"but the sync rate, {rate} %," in section


def test_the_figures_in_the_prose_of_the_readme():
    rows = read(RESULTS)
    text = prose(README)
    two, four = ({name: rows_at(rows, method=name, replicas=n) for name in (DENSE, USUAL, DEFAULT)} for n in (2, 4))
    slow, fast = RATES[-1], RATES[0]
    timed = [row for row in rows if row.run.stop]
    speed = {(name, rate): pace(timed, name, rate) for name in (DENSE, DEFAULT) for rate in ("", *RATES)}
    for claim in (
        f"{gap(two[DEFAULT], two[USUAL]):.1f} % of the loss against DDP + Muon",
        f"{gap(four[DEFAULT], four[USUAL]):.1f} % above DDP + Muon",
        f"at {sum(kernel_share(row, four[DENSE]) for row in four[DEFAULT]) / len(four[DEFAULT]):.1f} % of the bytes",
        f"DDP waits {100 * (1 - speed[DENSE, slow] / speed[DENSE, '']):.0f} % of a step",
        f"CurvaDion takes {speed[DEFAULT, slow] / speed[DENSE, slow]:.0f} times as many steps per second",
        f"DDP waits {100 * (1 - speed[DENSE, RATES[1]] / speed[DENSE, '']):.0f} %,"
        f" and it is {speed[DEFAULT, RATES[1]] / speed[DENSE, RATES[1]]:.1f} times",
        f"DDP waits {100 * (1 - speed[DENSE, fast] / speed[DENSE, '']):.0f} %,"
        f" and CurvaDion takes {speed[DEFAULT, fast]:.0f} steps per second where DDP + AdamW"
        f" takes {speed[DENSE, fast]:.0f}",
    ):
        assert claim in text, claim
