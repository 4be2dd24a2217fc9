"""Two levels: four processes as two replicas of two, beside other ways to train the same model on the same data.

    python examples/benchmarks/two_levels.py                       # losses, three seeds
    python examples/benchmarks/two_levels.py --seeds 0
    python examples/benchmarks/two_levels.py --rate 12mbit --stop 120    # steps a second on a slow link
    python examples/benchmarks/two_levels.py --smoke

Every row takes as many sequences a step. Two hosts of a network lab (``netlab.py``) have two processes each, but for
the row of two replicas with twice the batch, which are one process on each host. Without root the hosts share the
loopback interface, where nothing is counted. Learning rates are those that ``compare.py`` found for four replicas.
Finished runs are in ``results/two_levels.csv``, and are not repeated.
"""

import argparse
import csv
import datetime
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from examples.benchmarks import compare_plan  # noqa: E402
from examples.benchmarks.compare_replica import Run, train  # noqa: E402
from examples.benchmarks.corpora import CORPORA  # noqa: E402
from examples.benchmarks.methods import DEFAULT, METHODS  # noqa: E402
from examples.benchmarks.netlab import Lab, interruptible, missing, quiet_environment  # noqa: E402
from lightning_curvadion import CurvaDionStrategy  # noqa: E402

RESULTS = ROOT / "examples/benchmarks/results/two_levels.csv"
HOSTS, PROCESSES, EVALUATIONS, VAL_SEQUENCES = 2, 2, 8, 1024
KEY = ("layout", "steps", "rate", "stop", "seed")


@dataclass(frozen=True)
class Layout:
    """How a method is spread over the hosts.

    Attributes:
        method: Name in ``methods.METHODS``.
        per_host: Processes on each host.
        replica_size: Processes of a replica.
    """

    method: str
    per_host: int = PROCESSES
    replica_size: int = 1


LAYOUTS = {
    "DDP, Muon, four processes": Layout(compare_plan.USUAL),
    "four replicas of one process": Layout(DEFAULT),
    "two replicas of two processes": Layout(DEFAULT, replica_size=2),
    "two replicas of one process, twice the batch": Layout(DEFAULT, per_host=1),
}
# Of interest on a slow link only.
TIMED = {"DDP, PowerSGD, four processes": Layout("DDP, PowerSGD")}


@dataclass(frozen=True)
class Job:
    """A run of a layout: the first columns of the CSV.

    Attributes:
        layout: Name in ``LAYOUTS`` or ``TIMED``.
        steps: Length of the run and of its learning-rate schedule.
        rate: Speed of the links between the hosts; empty for no limit.
        stop: Steps after which a timed run ends; 0 trains to the end.
        seed: Of the model and of the order of the data.
        val_sequences: Windows of each evaluation.
    """

    layout: str
    steps: int
    rate: str
    stop: int
    seed: int
    val_sequences: int = VAL_SEQUENCES

    @property
    def key(self) -> tuple[str, ...]:
        """The values by which the CSV tells runs apart."""
        return tuple(str(getattr(self, name)) for name in KEY)


def train_job(job: Job) -> dict[str, object]:
    """Train one run. Every process calls it."""
    layout = {**LAYOUTS, **TIMED}[job.layout]
    rates = compare_plan.best_rates(layout.method, compare_plan.read(compare_plan.RESULTS), HOSTS * PROCESSES)
    sequences = compare_plan.SEQUENCES * PROCESSES // layout.per_host
    # To its fields a replica is what it is in compare.py: a process.
    run = Run(layout.method, HOSTS * layout.per_host, sequences, job.steps, job.seed, *rates, job.rate, stop=job.stop)
    method = METHODS[layout.method]
    strategy = CurvaDionStrategy(replica_size=2, **method.hook) if layout.replica_size > 1 else method.strategy()
    outcome = train(run, EVALUATIONS, job.val_sequences, num_nodes=HOSTS, devices=layout.per_host, strategy=strategy)
    return {
        **dict(zip(KEY, job.key, strict=True)),
        "loss": outcome.val_loss,
        "sync_steps": outcome.sync_steps,
        "payload": outcome.payload,
        "kernel": outcome.kernel_steps,
        "seconds": outcome.seconds,
    }


def train_jobs(jobs: Sequence[Job], results: Path) -> None:
    """Train some runs, one after another, and append a row for each. Every process calls it."""
    torch.set_num_threads(1)
    # Or Lightning would list the devices at every run.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # One group for all runs: a Trainer uses an initialised group.
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    for job in jobs:
        row = train_job(job)
        if dist.get_rank() == 0:
            with results.open("a", newline="") as file:
                writer = csv.DictWriter(file, row.keys())
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
    dist.destroy_process_group()


def read(results: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The finished runs."""
    if not results.exists():
        return {}
    with results.open(newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def run(jobs: Sequence[Job], results: Path) -> None:
    """Train the runs that the CSV lacks, those with as many processes in one lab."""
    CORPORA["python"]().prepare_data()
    todo = [job for job in jobs if job.key not in read(results)]
    layouts = {**LAYOUTS, **TIMED}
    for per_host in sorted({layouts[job.layout].per_host for job in todo}, reverse=True):
        mine = [asdict(job) for job in todo if layouts[job.layout].per_host == per_host]
        with Lab(HOSTS, todo[0].rate or None, loopback=bool(missing())) as lab:
            lab.run([__file__, "--train", json.dumps(mine), str(results)], per_host, quiet_environment(ROOT))


def table(jobs: Sequence[Job], results: Path) -> str:
    """The mean of each layout over its seeds, as Markdown. Bytes are a host's, as the kernel counts them."""
    rows = read(results)
    lines = [
        "| layout | loss | spread | sync steps | MB a host | steps a second |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for layout in dict.fromkeys(job.layout for job in jobs):
        mine = [rows[job.key] for job in jobs if job.layout == layout]
        losses = [float(row["loss"]) for row in mine]
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "-"
        steps = [(int(row["stop"]) or int(row["steps"])) / float(row["seconds"]) for row in mine]
        syncs, megabytes = mean(int(row["sync_steps"]) for row in mine), mean(int(row["kernel"]) for row in mine) / 1e6
        lines.append(
            f"| {layout} | {mean(losses):.4f} | {spread} | {syncs:.0f} | {megabytes:.2f} | {mean(steps):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(compare_plan.SEEDS))
    parser.add_argument("--steps", type=int, default=compare_plan.STEPS)
    parser.add_argument("--rate", default="", help="speed of the link of each host, such as 12mbit")
    parser.add_argument("--stop", type=int, default=0, metavar="STEPS", help="end timed runs early")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every layout")
    parser.add_argument("--train", nargs=2, metavar=("JOBS", "CSV"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_jobs([Job(**job) for job in json.loads(options.train[0])], Path(options.train[1]))
        return
    os.chdir(ROOT)
    names = [*LAYOUTS, *(TIMED if options.rate else {})]
    with tempfile.TemporaryDirectory() as folder, interruptible():
        results = Path(folder, "smoke.csv") if options.smoke else RESULTS
        steps, windows = (12, 64) if options.smoke else (options.steps, VAL_SEQUENCES)
        seeds = options.seeds[:1] if options.smoke else options.seeds
        jobs = [Job(name, steps, options.rate, options.stop, seed, windows) for seed in seeds for name in names]
        run(jobs, results)
        print(table(jobs, results))


if __name__ == "__main__":
    main()
