"""Kills a replica of a Trainer's run at every point of a step and between steps: the others train on, as one model.

    python tests/kill_points.py              # 20 kills; 6 minutes on two cores
    python tests/kill_points.py --only validation --rounds 5

``tests/trainer/test_elastic.py`` has some of them. Only processes that were started here are killed.
"""

import argparse
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "helpers")]

from elastic_run import TRAINER, Run, a_run

# As in ``elastic_training.Kill``, each with the rank that is killed: rank 0 writes, and others follow.
POINTS = [
    ("forward", 0),
    ("forward", 1),
    ("rmmc", 2),
    ("agreement", 0),
    ("agreement/", 1),
    ("sync_step", 1),
    ("quantize", 2),
    ("quantize/", 0),
    ("collective", 1),
    ("collective/", 0),
    ("dequantize", 1),
    ("send", 2),
    ("merge", 1),
    ("merge/", 0),
    ("sync_step/", 2),
    ("consensus", 0),
    ("consensus/", 1),
    ("validation", 1),
    ("checkpoint", 0),
    ("checkpoint/", 0),
]
# Phases of a mean in the background.
OVERLAPPED = ("send", "merge")
REPLICAS = "abc"


def kill_at(folder: Path, point: str, rank: int, step: int) -> tuple[Run, list[str], list[dict]]:
    """A run of three replicas of which one kills itself: the run, those that are left, and how they ended."""
    hook = {"overlap": 1} if point.strip("/") in OVERLAPPED else {}
    options = {"epochs": 2, "samples": 480, "decay": 100, "sleep": 0.02, "hook": hook, "kill": (point, step, rank)}
    with a_run(folder, TRAINER, **options) as run:
        run.add(*REPLICAS)
        run.wait_until(lambda: any(process.poll() is not None for process in run.processes.values()))
        left = [name for name in REPLICAS if run.processes[name].poll() is None]
        assert len(left) == 2, {name: run.text(name)[-1500:] for name in REPLICAS}
        return run, left, run.ends(*left)


def check(run: Run, left: list[str], ends: list[dict]) -> float:
    """What must be true after a kill; the seconds that it cost."""
    assert len({(end["digest"], end["end"], end["epoch"]) for end in ends}) == 1, ends
    assert all([change["lost"] for change in end["changes"]][-1] == 1 for end in ends), ends
    # Uniform over the tokens is 2.4.
    assert ends[0]["loss"] < 0.5, ends
    for epoch in (0, 1):
        drawn = [n for name in left for line in run.lines(name) if line.get("epoch") == epoch for n in line["samples"]]
        assert len(drawn) == len(set(drawn)), "a sample was trained on twice"
    # Each of them trains on every batch once.
    for name in left:
        batches = [(line["epoch"], line["batch"]) for line in run.lines(name) if "batch" in line]
        assert batches == sorted(set(batches)), batches
    steps = [int(path.stem.removeprefix("step=")) for path in run.folder.glob("*.ckpt")]
    assert sorted(steps) == list(range(25, ends[0]["end"] + 1, 25)), steps
    return max(end["changes"][-1]["seconds"] for end in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a point")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    choose = random.Random(options.seed)
    points = [point for point in POINTS if options.only in (None, point[0])] * options.rounds

    def kill(point: str, rank: int, step: int) -> float | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                seconds = check(*kill_at(Path(folder), point, rank, step))
            except AssertionError as error:
                print(f"{point}, rank {rank}, from step {step}: FAILED {error}", flush=True)
                return None
        print(f"{point}, rank {rank}, from step {step}: the others train on after {seconds:.1f} s", flush=True)
        return seconds

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(kill, point, rank, choose.randrange(5, 25)) for point, rank in points]
        seconds = [job.result() for job in jobs]
    survived = [cost for cost in seconds if cost is not None]
    print(f"{len(survived)} of {len(seconds)}: the others train on, at most {max(survived):.1f} s later")
    sys.exit(len(survived) < len(seconds))


if __name__ == "__main__":
    main()
