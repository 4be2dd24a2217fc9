"""A run whose replicas are started, killed and added, in a loop of its own or under a Trainer."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import preloaded
from launching import ROOT, environment
from training import python_path

from lightning_curvadion.sync.membership import host_store

LOOP, TRAINER = (Path(__file__).parent / name for name in ("elastic_replica.py", "elastic_training.py"))


class Run:
    """A store and the replicas of a run."""

    def __init__(self, folder, script=LOOP, **options):
        self.script = script
        self.store = host_store(0, "127.0.0.1")
        self.folder, self.processes = folder, {}
        self.options = {"endpoint": f"127.0.0.1:{self.store.port}", "min_replicas": 2, "hook": {}, **options}

    def add(self, *names):
        for name in names:
            log = self.folder / name
            paths = python_path(ROOT, ROOT / "tests/helpers", ROOT / "tests")
            self.processes[name] = preloaded.start(
                self.script,
                name,
                json.dumps(self.options),
                folder=self.folder,
                output=log,
                **{**environment(), "PYTHONPATH": paths},
            )

    def lines(self, name):
        return [json.loads(line) for line in self.text(name).splitlines() if line.startswith("{")]

    def step(self, name):
        """The last step that it has reported; -1 before the first."""
        return max((line["step"] for line in self.lines(name) if "step" in line), default=-1)

    def size(self, name):
        """How many replicas it last knew of; 0 before it is one of them."""
        return next((line["size"] for line in reversed(self.lines(name)) if "size" in line), 0)

    def text(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def wait_until(self, condition, within=60):
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.text(name)[-1500:] for name in self.processes)
            time.sleep(0.05)

    def ends(self, *names, within=90):
        """The last line of each of some replicas, which all end well."""
        self.wait_until(lambda: all(self.processes[name].poll() is not None for name in names), within)
        assert all(self.processes[name].wait() == 0 for name in names), "\n".join(self.text(n)[-4000:] for n in names)
        return [self.lines(name)[-1] for name in names]


@contextmanager
def a_run(folder, script=LOOP, **options):
    run = Run(folder, script, **options)
    try:
        yield run
    finally:
        for process in run.processes.values():
            process.kill()
