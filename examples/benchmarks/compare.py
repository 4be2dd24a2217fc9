"""Compares the ways to train over a slow link: the same model, data, order and schedule for every method.

    python examples/benchmarks/compare.py --run          # hours: all runs that results/compare.csv lacks
    python examples/benchmarks/compare.py --run sweep    # one stage, or several
    python examples/benchmarks/compare.py --tables       # the CSV as Markdown tables
    python examples/benchmarks/compare.py --plots        # the CSV as pictures in results/ (pip install matplotlib)
    python examples/benchmarks/compare.py --smoke        # a few steps of a few methods

Every replica runs on its own host of a network lab (``netlab.py``), where the kernel counts its bytes. Without root the
replicas share the loopback interface, without a count and without slow links. The stages, in order:

- ``sweep``: learning rates
- ``seeds``: the rows that the README quotes, and the triggers
- ``lengths``: longer runs of the defaults
- ``disturbed``: runs with a change in the middle
- ``methods``: every method once
- ``batches``: other batch sizes
- ``momenta``: what a sync step does to the momentum
- ``sweep of four``, ``four``, ``sweep of eight``, ``eight``: more replicas
- ``overlap``: agreements read late, and means taken over late
- ``many seeds``: eight seeds of what ends close together
- ``elsewhere``: another text, and a model of a million parameters
- ``links``: time at three link speeds; leave the machine idle
- ``distant``: time on links with latency; leave the machine idle
- ``races``: whole runs on the slowest link
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from examples.benchmarks import compare_plan  # noqa: E402
from examples.benchmarks.compare_plan import RATES, USUAL  # noqa: E402
from examples.benchmarks.compare_plots import plots  # noqa: E402
from examples.benchmarks.compare_replica import Run  # noqa: E402
from examples.benchmarks.compare_report import tables  # noqa: E402
from examples.benchmarks.corpora import CORPORA  # noqa: E402
from examples.benchmarks.methods import DEFAULT  # noqa: E402
from examples.benchmarks.netlab import Lab, LabError, exit_status, missing, quiet_environment  # noqa: E402

EVALUATIONS, VAL_SEQUENCES = 8, 1024


def run(runs: Sequence[Run], results: Path, evaluations: int = EVALUATIONS, val_sequences: int = VAL_SEQUENCES) -> None:
    """Train the runs that the CSV lacks, those with the same replicas and link in one lab."""
    done = {row.run for row in compare_plan.read(results)}
    todo = [entry for entry in dict.fromkeys(runs) if entry not in done]
    for corpus in {entry.corpus for entry in todo}:
        CORPORA[corpus]().prepare_data()
    results.parent.mkdir(parents=True, exist_ok=True)
    loopback = bool(missing())
    for (replicas, rate), group in groupby(todo, key=lambda entry: (entry.replicas, entry.rate)):
        if loopback and rate:
            raise LabError(f"a link of {rate} needs a network lab, and that needs {', '.join(missing())}")
        job = {"runs": [asdict(entry) for entry in group], "evaluations": evaluations, "val_sequences": val_sequences}
        script = [str(ROOT / "examples/benchmarks/compare_replica.py"), json.dumps(job), str(results)]
        speed, _, latency = rate.partition("+")
        with Lab(replicas, speed or None, loopback, latency or None) as lab:
            lab.run(script, environment=_environment())


def _environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {**quiet_environment(ROOT), "COMPARE_COMMIT": commit.strip()}


def smoke(folder: Path) -> None:
    """A few methods for a few steps, two of them also on a slow link; then the tables and the plots."""
    results, steps = folder / "compare.csv", 12  # PowerSGD compresses from step 10 on
    methods = ("DDP, AdamW", USUAL, "DDP, Dion", "DDP, PowerSGD", "DiLoCo, AdamW, H=10", DEFAULT)
    runs = compare_plan.tuned(methods, [], steps=steps)
    run(runs, results, evaluations=2, val_sequences=64)
    if not missing():
        stops = {USUAL: 2, DEFAULT: steps}
        slow = [replace(entry, rate=RATES[-1], stop=stops[entry.method]) for entry in runs if entry.method in stops]
        run(slow, results, evaluations=3, val_sequences=64)
    tables(results, steps)
    plots(results, folder, steps)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="STAGE", choices=compare_plan.STAGES, help="train")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    parser.add_argument("--plots", action="store_true", help="draw the plots")
    parser.add_argument(
        "--smoke", nargs="?", type=Path, const=Path(), metavar="FOLDER", help="a few steps of a few methods"
    )
    options = parser.parse_args()
    smoke_folder = options.smoke.resolve() if options.smoke is not None and options.smoke.name else None
    os.chdir(ROOT)

    def work() -> None:
        if options.smoke is not None:
            with tempfile.TemporaryDirectory() as folder:
                # The default is an empty folder: finished runs in a folder are not repeated.
                smoke(smoke_folder or Path(folder))
        if options.run is not None:
            for stage in options.run or compare_plan.STAGES:
                run(compare_plan.plan(stage, compare_plan.read(compare_plan.RESULTS)), compare_plan.RESULTS)

    status = exit_status(work, "interrupted; finished runs are in the CSV, and the same command continues")
    if status:
        return status
    if options.tables:
        tables(compare_plan.RESULTS)
    if options.plots:
        plots(compare_plan.RESULTS, compare_plan.RESULTS.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
