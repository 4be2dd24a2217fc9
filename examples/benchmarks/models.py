"""Models of many kinds under DDP and under CurvaDion: the same data, order, schedule and steps for all three methods.

    python examples/benchmarks/models.py                        # hours: all runs that results/models.csv lacks
    python examples/benchmarks/models.py sweep --only LSTM      # one stage, or several; one model, or several
    python examples/benchmarks/models.py --tables               # the CSV as Markdown tables
    python examples/benchmarks/models.py --smoke                # a few steps of everything, without a file in results/

The methods are DDP with AdamW, DDP with Muon and AdamW for what is no matrix, and the defaults of CurvaDion. Replicas
are processes of one thread that form a gloo group. The stages, in order:

- ``sweep``: three learning rates for every method, each for all parameters, with two replicas
- ``seeds``: three seeds at the best of them, and six of the GAN
- ``four``: the same with four replicas
- ``parts``: where ours ends more than 2 % above DDP + Muon, ours without one of its parts
- ``layouts``, ``layout seeds``: ours where a layer's matrices could be taken in more than one way
- ``carried``: ours with ``lr_scale="match_rms_adamw"``, at the best of AdamW's learning rates
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from examples.benchmarks.layout_models import LAYOUTS  # noqa: E402
from examples.benchmarks.model_replica import (  # noqa: E402
    ADAMW,
    ALL_TASKS,
    CARRIED,
    MUON,
    OURS,
    PARTS,
    TASKS,
    Outcome,
    Run,
    finished,
    train_all,
)
from examples.benchmarks.netlab import interruptible  # noqa: E402
from examples.benchmarks.replica_training import on_replicas  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "models.csv"
METHODS = (ADAMW, MUON, OURS)
# Of the sweep.
SEED = 0
STAGES = ("sweep", "seeds", "four", "parts", "layouts", "layout seeds", "carried")
# What a loss above DDP + Muon's asks an explanation for, in percent.
TOLERANCE = 2.0

Done = dict[Run, tuple[Outcome, str]]


def rates(model: str, method: str) -> tuple[float, ...]:
    """Learning rates that are tried."""
    return ALL_TASKS[model].adamw_rates if method == ADAMW else ALL_TASKS[model].muon_rates


def swept(model: str, method: str, done: Done) -> dict[float, float]:
    """Loss by learning rate, of the finished part of the sweep."""
    runs = {lr: Run(model, method, 2, lr, SEED, ALL_TASKS[model].length) for lr in rates(model, method)}
    return {lr: done[run][0].loss for lr, run in runs.items() if run in done}


def at_best_rate(model: str, method: str, replicas: int, done: Done) -> list[Run]:
    """Runs over all seeds, at the learning rate with the lowest loss in the sweep. Ours without a part has ours."""
    losses = swept(model, {CARRIED: ADAMW, **dict.fromkeys(PARTS, OURS)}.get(method, method), done)
    if not losses:
        return []
    best = min(losses, key=losses.__getitem__)
    return [Run(model, method, replicas, best, seed, ALL_TASKS[model].length) for seed in ALL_TASKS[model].seeds]


def above(
    model: str, method: str, replicas: int, done: Done, other: str = MUON, other_model: str | None = None
) -> float | None:
    """Percent by which a loss is above that of another method or model, over the seeds that both have finished."""
    others = at_best_rate(other_model or model, other, replicas, done)
    pairs = zip(at_best_rate(model, method, replicas, done), others, strict=False)
    losses = [(done[mine][0].loss, done[theirs][0].loss) for mine, theirs in pairs if mine in done and theirs in done]
    if not losses:
        return None
    mine, theirs = zip(*losses, strict=True)
    return 100 * (mean(mine) / mean(theirs) - 1)


def sweep(models: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """Runs at all learning rates that are tried."""
    return [
        Run(model, method, 2, lr, SEED, ALL_TASKS[model].length)
        for model in models
        for method in methods
        for lr in rates(model, method)
    ]


def plan(stage: str, models: Sequence[str], done: Done) -> list[Run]:
    """The runs of a stage, whether done or not. What is done decides the learning rates."""
    if stage.startswith("layout"):
        kinds = [kind for layouts in LAYOUTS.values() if set(models) & set(layouts) for kind in layouts]
        if stage == "layouts":
            return sweep(kinds, [OURS])
        return [run for kind in kinds for run in at_best_rate(kind, OURS, 2, done)]
    models = [model for model in models if model in TASKS]
    if stage == "sweep":
        return sweep(models, METHODS)
    if stage == "parts":
        losing = [(model, n) for n in (2, 4) for model in models if (above(model, OURS, n, done) or 0.0) > TOLERANCE]
        return [run for model, n in losing for part in PARTS for run in at_best_rate(model, part, n, done)]
    if stage == "carried":
        return [run for model in models for run in at_best_rate(model, CARRIED, 2, done)]
    replicas = 2 if stage == "seeds" else 4
    return [run for model in models for method in METHODS for run in at_best_rate(model, method, replicas, done)]


def train_missing(runs: Sequence[Run], results: Path, batches: int | None = None) -> None:
    """Train the runs that the CSV lacks, those with the same number of replicas in the same processes.

    Args:
        runs: The runs.
        results: The CSV.
        batches: How many held-out batches are scored, all by default.
    """
    done = finished(results)
    todo = [run for run in dict.fromkeys(runs) if run not in done]
    for model, steps in dict.fromkeys((run.model, run.steps) for run in todo):
        ALL_TASKS[model].prepare(steps)
    results.parent.mkdir(parents=True, exist_ok=True)
    for replicas, group in groupby(todo, key=lambda run: run.replicas):
        on_replicas(replicas, train_all, list(group), results.resolve(), commit(), batches)


def commit() -> str:
    """The commit of the code that runs."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def tables(done: Done) -> None:
    """Print the table of the models, the sweeps, and what parts of ours do where it loses."""
    print(f"| model | replicas | {ADAMW} | {MUON} | {OURS} | above {MUON} | sync steps | of DDP | commit |")
    print("| --- " * 9 + "|")
    for model in TASKS:
        for replicas in (2, 4):
            ours = finished_seeds(model, OURS, replicas, done)
            if not ours:
                continue
            cells = [cell(finished_seeds(model, method, replicas, done)) for method in METHODS]
            gap = above(model, OURS, replicas, done)
            sync_rate, byte_share = (mean(getattr(row, name) for row in ours) for name in ("sync_rate", "byte_share"))
            commits = sorted({done[run][1] for run in at_best_rate(model, OURS, replicas, done) if run in done})
            print(
                f"| {model} | {replicas} | {' | '.join(cells)} | {percent(gap)} | {100 * sync_rate:.1f} % |"
                f" {100 * byte_share:.2f} % | {', '.join(commits)} |"
            )
    print("\n| learning rate: loss | " + " | ".join(METHODS) + " |\n" + "| --- " * 4 + "|")
    for model in TASKS:
        sweeps = [swept(model, method, done) for method in METHODS]
        if any(sweeps):
            shown = [", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in sweep.items()) for sweep in sweeps]
            print(f"| {model} | {' | '.join(shown)} |")
    print(
        f"\n| model | AdamW's best rate | {ADAMW} | ours there, match_rms_adamw | above {OURS} |\n" + "| --- " * 5 + "|"
    )
    for model in TASKS:
        if carried := finished_seeds(model, CARRIED, 2, done):
            rate = at_best_rate(model, CARRIED, 2, done)[0].lr
            adamw, gap = finished_seeds(model, ADAMW, 2, done), above(model, CARRIED, 2, done, OURS)
            print(f"| {model} | {rate:g} | {cell(adamw)} | {cell(carried)} | {percent(gap)} |")
    print(f"\n| a layer's matrices | model | {OURS} | above the first |\n" + "| --- " * 4 + "|")
    for question, layouts in LAYOUTS.items():
        default = next(iter(layouts))
        for kind in layouts:
            if rows := finished_seeds(kind, OURS, 2, done):
                print(f"| {question} | {kind} | {cell(rows)} | {percent(above(kind, OURS, 2, done, OURS, default))} |")
    print(f"\n| ours, but | model | replicas | loss | above {MUON} | sync steps | of DDP |\n" + "| --- " * 7 + "|")
    for model, replicas, part in product(TASKS, (2, 4), PARTS):
        if rows := finished_seeds(model, part, replicas, done):
            sync_rate, byte_share = mean(row.sync_rate for row in rows), mean(row.byte_share for row in rows)
            print(
                f"| {part} | {model} | {replicas} | {cell(rows)} | {percent(above(model, part, replicas, done))} |"
                f" {100 * sync_rate:.1f} % | {100 * byte_share:.2f} % |"
            )


def finished_seeds(model: str, method: str, replicas: int, done: Done) -> list[Outcome]:
    """Outcomes at the best learning rate."""
    return [done[run][0] for run in at_best_rate(model, method, replicas, done) if run in done]


def cell(rows: Sequence[Outcome]) -> str:
    """Loss with half the distance between the best and the worst seed, their number, and the accuracy."""
    if not rows:
        return ""
    losses = [row.loss for row in rows]
    spread = f" ± {(max(losses) - min(losses)) / 2:.4f} ({len(rows)})" if len(rows) > 1 else ""
    accuracy = mean(row.accuracy for row in rows)
    return f"{mean(losses):.4f}{spread}" + (f", {100 * accuracy:.1f} %" if accuracy == accuracy else "")


def percent(value: float | None) -> str:
    """A difference in percent."""
    return "" if value is None else f"{value:+.1f} %"


def smoke() -> None:
    """Three steps and two held-out batches of every model and method, and of every part with one model; the table."""
    with tempfile.TemporaryDirectory() as folder:
        results, steps = Path(folder) / "models.csv", 3
        runs = [Run(model, method, 2, rates(model, method)[1], 0, steps) for model in TASKS for method in METHODS]
        runs += [Run("LSTM", part, 2, rates("LSTM", OURS)[1], 0, steps) for part in PARTS]
        runs += [Run(kind, OURS, 2, rates(kind, OURS)[1], 0, steps) for kind in ALL_TASKS if kind not in TASKS]
        train_missing([*runs, Run("LSTM", CARRIED, 2, rates("LSTM", ADAMW)[1], 0, steps)], results, batches=2)
        for task in ALL_TASKS.values():
            task.length = steps
        tables(finished(results))


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; by default all")
    parser.add_argument("--only", action="append", metavar="NAME", choices=ALL_TASKS, help=f"{', '.join(ALL_TASKS)}")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    os.chdir(ROOT)
    try:
        with interruptible():
            if options.smoke:
                smoke()
            elif not options.tables:
                for stage in options.stages or STAGES:
                    train_missing(plan(stage, options.only or list(ALL_TASKS), finished(RESULTS)), RESULTS)
    except KeyboardInterrupt:
        print("interrupted; finished runs are in the CSV, and the same command continues", file=sys.stderr)
        return 130
    if options.tables:
        tables(finished(RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
