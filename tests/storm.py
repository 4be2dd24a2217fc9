"""Kills and adds replicas of a run at random, and says what it cost the others.

    python tests/storm.py                    # 20 kills and 20 joins over 2000 steps; 8 minutes on two cores
    python tests/storm.py --kills 2 --steps 300
    python tests/storm.py --trainer          # the same under Lightning's Trainer, in place of a loop

``tests/sync/test_membership.py`` and ``tests/trainer/test_elastic.py`` have each of these once. Only processes that
were started here are killed.
"""

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "helpers")]

from elastic_run import LOOP, TRAINER, a_run


def options_for(steps: int) -> dict:
    """Of the replicas."""
    return {"steps": steps, "text": True, "sleep": 0, "every": steps // 4, "val_check_interval": steps // 4}


def undisturbed(folder: Path, script: Path, replicas: int, steps: int) -> float:
    """The loss of a run that loses nobody."""
    with a_run(folder, script, **options_for(steps)) as run:
        run.add(*(f"r{number}" for number in range(replicas)))
        return run.ends(*run.processes, within=600)[0]["loss"]


def storm(folder: Path, script: Path, replicas: int, kills: int, steps: int, seed: int = 0) -> float:
    """The loss of a run that loses a replica and gets another one, again and again."""
    choose = random.Random(seed)
    lost: list[float] = []
    joined: list[float] = []
    with a_run(folder, script, **options_for(steps)) as run:
        members = [f"r{number}" for number in range(replicas)]
        run.add(*members)
        for number in range(kills):
            at = (number + 1) * steps // (kills + 2) + choose.randrange(steps // (2 * kills + 4) + 1)
            run.wait_until(lambda at=at: max(run.step(name) for name in members) >= at, within=300)
            run.processes[victim := members.pop(choose.randrange(len(members)))].kill()
            print(f"step {at}: {victim} is killed", flush=True)
            run.wait_until(lambda: all(run.size(name) == replicas - 1 for name in members))
            run.add(new := f"r{replicas + number}")
            members.append(new)
            run.wait_until(lambda: all(run.size(name) == replicas for name in members))
        ends = run.ends(*members, within=600)
        # Of those too that were killed later.
        for name in run.processes:
            for line in run.lines(name):
                if line.get("why") in ("loss", "join"):
                    (lost if line["why"] == "loss" else joined).append(line["seconds"])
    assert len({end["digest"] for end in ends}) == 1 and all(end["end"] == steps for end in ends), ends
    print(f"{kills} kills and joins of {replicas} replicas over {steps} steps: no survivor was started again")
    for what, seconds in (("kill", lost), ("join", joined)):
        print(f"a {what} cost the others {statistics.median(seconds):.1f} s, at most {max(seconds):.1f}")
    return ends[0]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--trainer", action="store_true")
    options = parser.parse_args()
    script = TRAINER if options.trainer else LOOP
    with tempfile.TemporaryDirectory() as folder:
        for name in ("storm", "quiet"):
            (Path(folder) / name).mkdir()
        disturbed = storm(Path(folder) / "storm", script, options.replicas, options.kills, options.steps)
        quiet = undisturbed(Path(folder) / "quiet", script, options.replicas, options.steps)
    print(f"loss: {disturbed:.4f}, undisturbed {quiet:.4f}")


if __name__ == "__main__":
    main()
