"""Tables of the comparison, from nothing but its CSV."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.benchmarks.compare_plan import (
    BASE,
    BATCHES,
    DISTANT,
    ELSEWHERE,
    QUOTED,
    RATES,
    STEPS,
    SWEEPS,
    TRIGGERS,
    USUAL,
    Row,
    best_rates,
    plan,
    read,
    swept,
    with_rates,
)
from examples.benchmarks.methods import DEFAULT, HALF_RANK, METHODS

DENSE, ALONE = "DDP, AdamW", "no communication"
# What a user could pick instead of CurvaDion, and CurvaDion: the table of the README.
CHOICES = {
    DENSE: "DDP + AdamW",
    USUAL: "DDP + Muon",
    "DDP, Dion": "DDP + Dion",
    "local SGD, H=10": "local SGD, every 10 steps",
    "DiLoCo, Muon, H=30": "DiLoCo + Muon, every 30 steps",
    DEFAULT: "CurvaDion, defaults",
    HALF_RANK: "CurvaDion, rank fraction 1/2",
}


def rows_at(rows: Iterable[Row], **changes: Any) -> list[Row]:
    """Rows at the base settings with some changes and the learning rates of the method's sweep, by seed."""
    like = with_rates(replace(BASE, **changes), best_rates(changes["method"], rows, changes.get("replicas", 2)))
    return sorted((row for row in rows if replace(row.run, seed=0) == like), key=lambda row: row.run.seed)


def mean_loss(rows: list[Row], digits: int = 4) -> str:
    """Mean loss and, for several seeds, half the distance between the best and the worst."""
    losses = [row.outcome.val_loss for row in rows]
    mean = f"{statistics.mean(losses):.{digits}f}"
    return mean if len(losses) == 1 else f"{mean} ± {(max(losses) - min(losses)) / 2:.{digits}f} ({len(losses)})"


def gap(rows: list[Row], goal: list[Row]) -> float:
    """Percent by which the loss is above the goal's, over the seeds that both have."""
    pairs = pairs_of(rows, goal)
    return 100 * (sum(loss for loss, _ in pairs) / sum(goal for _, goal in pairs) - 1) if pairs else float("nan")


def gap_cell(rows: list[Row], goal: list[Row], digits: int = 2) -> str:
    """The gap and, from five seeds on, its standard error."""
    pairs = pairs_of(rows, goal)
    shown = f"{gap(rows, goal):+.{digits}f}"
    if len(pairs) >= 5 and rows != goal:
        error = statistics.stdev(loss - goal for loss, goal in pairs) / len(pairs) ** 0.5
        shown += f" ± {100 * error / statistics.mean(goal for _, goal in pairs):.{digits}f}"
    return f"{shown} %"


def pairs_of(rows: list[Row], goal: list[Row]) -> list[tuple[float, float]]:
    """Losses beside the goal's, for the seeds that both have."""
    goals = {row.run.seed: row.outcome.val_loss for row in goal}
    return [(row.outcome.val_loss, goals[row.run.seed]) for row in rows if row.run.seed in goals]


def points(row: Row) -> list[tuple[int, float, int, float, int]]:
    """The curve: (step, loss, kernel bytes, seconds, sync steps) of every evaluation."""
    parsed = [entry.split(":") for entry in row.outcome.curve.split()]
    return [(int(step), float(loss), int(sent), float(time), int(syncs)) for step, loss, sent, time, syncs in parsed]


def reached(row: Row, loss: float) -> tuple[float, float] | None:
    """Steps and kernel bytes at which a run reached ``loss``, interpolated between evaluations."""
    before = None
    for step, value, sent, _, _ in points(row):
        if value <= loss:
            if before is None:
                return step, sent
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (step - before[0]), before[2] + share * (sent - before[2])
        before = (step, value, sent)
    return None


def pace(rows: Iterable[Row], method: str, rate: str, replicas: int = 2) -> float | None:
    """Steps per second of a timed run; the median of several."""
    found = [
        (row.run.stop or row.run.steps) / row.outcome.seconds
        for row in rows
        if (row.run.method, row.run.rate, row.run.replicas) == (method, rate, replicas)
    ]
    return statistics.median(found) if found else None


def kernel_share(row: Row, dense: list[Row], total: bool = True) -> float:
    """Kernel bytes in percent of DDP's at equal steps, the last consensus included."""
    sent = row.outcome.kernel_total if total else row.outcome.kernel_steps
    each = statistics.mean(entry.outcome.kernel_total / entry.run.steps for entry in dense)
    return 100 * sent / row.run.steps / each


def tables(results: Path, steps: int = STEPS) -> None:
    """Print all tables as Markdown."""
    rows = read(results)
    choice_table(rows, steps)
    sweep_table(rows)
    for replicas in SWEEPS:
        method_table(rows, replicas, steps)
    elsewhere_table(rows)
    batch_table(rows)
    length_table(rows)
    race_table(rows)
    disturbed_table(rows)
    sync_distribution_table(rows)
    links_table(rows)
    links_table(rows, DISTANT)


def line(*cells: object) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def header(title: str, *cells: str) -> None:
    """A title and the head of a table."""
    print(f"\n### {title}\n")
    line(*cells)
    line(*["---"] * len(cells))


def choice_table(rows: list[Row], steps: int = STEPS) -> None:
    """The table of the README, with two replicas; steps a second are those of ``links_table``."""
    dense, usual = rows_at(rows, method=DENSE, steps=steps), rows_at(rows, method=USUAL, steps=steps)
    if not dense or not usual:
        return
    speed = f"steps/s at {RATES[-1].replace('mbit', ' Mbit/s')}"
    header("What a user would pick", "method", "loss (seeds)", f"above {CHOICES[USUAL]}", "of DDP's bytes", speed)
    for method, name in CHOICES.items():
        if mine := rows_at(rows, method=method, steps=steps):
            last = pace([row for row in rows if row.run.stop], method, RATES[-1])
            line(
                name,
                mean_loss(mine, digits=3),
                gap_cell(mine, usual, digits=1) if method != USUAL else "-",
                f"{statistics.mean(kernel_share(row, dense) for row in mine):.1f} %",
                f"{last:.1f}" if last else "-",
            )


def sweep_table(rows: list[Row]) -> None:
    """Loss by learning rate."""
    header("Learning rates of matrices / of the rest", "method", "replicas", "first", "second", "third")
    for replicas, sweeps in SWEEPS.items():
        for method, sweep in sweeps.items():
            done = swept(method, rows, replicas)
            cells = [f"{lr:g} / {rest:g}: {done.get((lr, rest), float('nan')):.4f}" for lr, rest in sweep]
            line(method, replicas, *cells)


def method_table(rows: list[Row], replicas: int, steps: int) -> None:
    """Every method at the base settings."""
    dense = rows_at(rows, method=DENSE, replicas=replicas, steps=steps)
    goal = rows_at(rows, method=USUAL, replicas=replicas, steps=steps)
    dense = dense or goal
    if not goal:
        return
    header(
        f"{replicas} replicas, {BASE.sequences} sequences each, {steps} steps",
        "method",
        "loss (seeds)",
        f"above {USUAL}",
        "sync steps",
        "MB sent",
        "of DDP",
        f"steps to {USUAL}'s loss",
        "drift",
        "MiB",
    )
    for method in METHODS:
        mine = rows_at(rows, method=method, replicas=replicas, steps=steps)
        if not mine:
            continue
        first = mine[0].outcome
        crossing = reached(mine[0], goal[0].outcome.val_loss)
        line(
            method,
            mean_loss(mine),
            gap_cell(mine, goal),
            f"{statistics.mean(100 * row.outcome.sync_steps / steps for row in mine):.1f} %",
            f"{statistics.mean(row.outcome.kernel_total for row in mine) / 1e6:.2f}",
            f"{statistics.mean(kernel_share(row, dense) for row in mine):.2f} %",
            f"{crossing[0]:.0f}, {crossing[1] / 1e6:.2f} MB" if crossing else "not reached",
            f"{100 * first.spread:.2f} %" if first.spread >= 0 else "-",
            f"{first.peak_mib:.0f}",
        )


def elsewhere_table(rows: list[Row]) -> None:
    """Another text and another size."""
    header(
        "Elsewhere",
        "text",
        "parameters",
        "replicas",
        "method",
        "loss (seeds)",
        f"above {USUAL}",
        "sync steps",
        "of DDP",
    )
    for corpus, model, steps in ELSEWHERE:
        for replicas in SWEEPS:
            at: dict[str, Any] = {"corpus": corpus, "model": model, "steps": steps, "replicas": replicas}
            goal = rows_at(rows, method=USUAL, **at)
            for method in (USUAL, *TRIGGERS):
                if mine := rows_at(rows, method=method, **at):
                    syncs = statistics.mean(row.outcome.sync_steps for row in mine)
                    sent = statistics.mean(kernel_share(row, goal) for row in mine)
                    cells = (
                        mean_loss(mine),
                        gap_cell(mine, goal),
                        f"{100 * syncs / steps:.1f} %",
                        f"{sent:.2f} %",
                    )
                    line(corpus, model, replicas, method, *cells)


def batch_table(rows: list[Row]) -> None:
    """The gap by batch size."""
    header("Batch per replica", "method", *[f"{batch * 64} bytes" for batch in BATCHES])
    for method in QUOTED:
        cells = []
        for batch in BATCHES:
            mine = rows_at(rows, method=method, sequences=batch)[:1]
            goal = rows_at(rows, method=USUAL, sequences=batch)[:1]
            cells.append(f"{mean_loss(mine)} ({gap_cell(mine, goal)})" if mine and goal else "not run")
        if cells.count("not run") < len(cells) - 1:
            line(method, *cells)


def length_table(rows: list[Row]) -> None:
    """Longer runs of the defaults against the goal's loss: steps, bytes, and seconds on the slowest link."""
    goal, dense = rows_at(rows, method=USUAL), rows_at(rows, method=DENSE)
    if not goal or not dense:
        return
    header(
        f"Longer runs against {USUAL} ({STEPS} steps)",
        "run", "loss (seeds)", "above", "of DDP's bytes", f"seconds at {RATES[-1]}", f"of {USUAL}'s",
    )  # fmt: skip
    slow = pace(rows, USUAL, RATES[-1])
    lengths = sorted({row.run.steps for row in rows if row.run.method == DEFAULT and row.run.stop == 0})
    for method, length in [(USUAL, STEPS), *[(DEFAULT, length) for length in lengths]]:
        mine, mine_pace = rows_at(rows, method=method, steps=length), pace(rows, method, RATES[-1])
        if not mine:
            continue
        seconds = length / mine_pace if mine_pace else None
        line(
            f"{method}, {length} steps",
            mean_loss(mine),
            gap_cell(mine, goal),
            f"{statistics.mean(kernel_share(row, dense) * length / STEPS for row in mine):.2f} %",
            f"{seconds:.0f}" if seconds else "not timed",
            f"{100 * seconds * slow / STEPS:.1f} %" if seconds and slow else "-",
        )


def race_table(rows: list[Row]) -> None:
    """Whole runs on the slowest link."""
    header(f"Whole runs on a link of {RATES[-1]}", "run", "loss", "seconds", "MB sent")
    for run in plan("races", rows):
        for row in (row for row in rows if row.run == run):
            sent = f"{row.outcome.kernel_total / 1e6:.2f}"
            line(f"{run.method}, {run.steps} steps", f"{row.outcome.val_loss:.4f}", f"{row.outcome.seconds:.0f}", sent)


def disturbed_table(rows: list[Row]) -> None:
    """Triggers at about equal bytes, with and without a change in the middle of the run."""
    header(
        "Triggers",
        "trigger",
        "undisturbed",
        "learning rate x 3 for a tenth of the run",
        "text backwards from the middle",
    )
    for method in TRIGGERS:
        cells = []
        for kind in ("", "lr", "data"):
            mine = rows_at(rows, method=method, disturbance=kind)
            syncs = statistics.mean(row.outcome.sync_steps for row in mine) if mine else 0
            cells.append(f"{mean_loss(mine)}, {syncs:.0f} syncs" if mine else "not run")
        line(method, *cells)


def sync_distribution_table(rows: list[Row]) -> None:
    """Share of sync steps in each eighth of a run."""
    eighths = [f"{number}/8" for number in range(1, 9)]
    header("Sync steps, percent of the steps of each eighth of a run", "trigger", "disturbed", *eighths)
    for method in (DEFAULT, "as published, tau=0.1"):
        for kind in ("", "lr", "data"):
            for row in rows_at(rows, method=method, disturbance=kind)[:1]:
                counts = [(0, 0), *[(step, syncs) for step, _, _, _, syncs in points(row)]]
                pairs = itertools.pairwise(counts)
                line(method, kind or "no", *[f"{100 * (b[1] - a[1]) / (b[0] - a[0]):.0f}" for a, b in pairs])


def links_table(rows: list[Row], links: Sequence[str] = RATES) -> None:
    """Steps per second by link, beside DDP and beside no communication at all, on the last one."""
    header("Steps a second, 2 replicas", "method", "no limit", *links, f"x {DENSE}", f"of {ALONE}")
    slow, most = pace(rows, DENSE, links[-1]), pace(rows, ALONE, links[-1])
    for method in METHODS:
        paces = [pace([row for row in rows if row.run.stop], method, rate) for rate in ("", *links)]
        last = paces[-1]
        if last:
            times = f"{last / slow:.1f}" if slow else "-"
            share = f"{100 * last / most:.0f} %" if most else "-"
            line(method, *[f"{value:.2f}" if value else "-" for value in paces], times, share)
    for rate in links:
        with_link, without = pace(rows, DENSE, rate), pace([row for row in rows if row.run.stop], DENSE, "")
        if with_link and without:
            print(f"\n{DENSE} spends {100 * (1 - with_link / without):.0f} % of a step waiting for a link of {rate}.")
