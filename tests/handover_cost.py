"""What a loss and a join cost the others on a slow link, with and without what spares them the model. Needs root.

    python tests/handover_cost.py            # 2 million numbers at 12 Mbit/s; 6 minutes on two cores
    python tests/handover_cost.py --rate 50mbit --width 256

Three replicas train in a network lab, one is killed, and another one comes. Without it, as before: the survivors take
the exact mean of parameters and states, and the new one receives them while all wait.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "helpers")]

from elastic_run import LOOP, Run
from launching import ROOT, environment
from training import python_path

from examples.benchmarks.netlab import INTERFACE, Lab

PORT = 29533


class LabRun(Run):
    """A run whose replicas are on the hosts of a lab, and its store on the first of them."""

    def __init__(self, lab: Lab, folder: Path, **options: object) -> None:
        self.lab, self.folder, self.processes = lab, folder, {}
        self.options = {"endpoint": f"{lab.address(0)}:{PORT}", "min_replicas": 2, "hook": {}, **options}
        words = [sys.executable, "-m", "lightning_curvadion", "store", "--port", str(PORT)]
        self.store = self._start(0, words, folder / "store")
        time.sleep(8)

    def _start(self, host: int, words: list[str], output: Path) -> subprocess.Popen:
        paths = python_path(ROOT, ROOT / "tests/helpers", ROOT / "tests")
        variables = {**environment(), "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        with output.open("wb") as file:
            command = ["ip", "netns", "exec", self.lab._namespace(host), *words]
            return subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)

    def add(self, *names: str) -> None:
        for name in names:
            words = [sys.executable, str(LOOP), name, json.dumps(self.options)]
            self.processes[name] = self._start(len(self.processes), words, self.folder / name)

    def close(self) -> None:
        for process in [*self.processes.values(), self.store]:
            process.kill()
            process.wait()


def measure(lab: Lab, folder: Path, width: int, as_before: bool) -> None:
    """Print what a loss and a join cost."""
    run = LabRun(lab, folder, width=width, steps=10**6, timeout=60, join_timeout=300, sleep=0.05, as_before=as_before)
    try:
        run.add("a", "b", "c")
        run.wait_until(lambda: run.step("a") >= 30, within=200)
        run.processes["c"].kill()
        run.wait_until(lambda: run.size("a") == 2, within=200)
        step = run.step("a")
        run.wait_until(lambda: run.step("a") >= step + 20, within=200)
        run.add("d")
        run.wait_until(lambda: all(run.size(name) == 3 for name in "abd"), within=400)
    finally:
        run.close()
    print("as before" if as_before else "now", flush=True)
    for what in ("loss", "join"):
        lines = [line for name in "ab" for line in run.lines(name) if line.get("why") == what]
        seconds, sent = (max(line[key] for line in lines) for key in ("seconds", "sent"))
        print(f"  a {what} cost the others {seconds:.1f} s, and at most {sent:,} bytes of one replica", flush=True)
    took = next(line for line in run.lines("d") if "caught up" in line)
    if took["caught up"]:
        longest = [line["longest"] for name in "ab" for line in run.lines(name) if "longest" in line]
        print(
            f"  the new one received the model beside their training in {took['seconds']:.0f} s. Of ten steps the"
            f" longest took {statistics.median(longest):.1f} s, at most {max(longest):.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="12mbit", help="of each link")
    parser.add_argument("--width", type=int, default=512, help="of the model")
    options = parser.parse_args()
    for as_before in (True, False):
        with Lab(hosts=4, rate=options.rate) as lab, tempfile.TemporaryDirectory() as folder:
            measure(lab, Path(folder), options.width, as_before)


if __name__ == "__main__":
    main()
