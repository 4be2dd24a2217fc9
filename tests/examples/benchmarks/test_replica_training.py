"""The replicas of ``examples/benchmarks/replica_training.py``."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from ahead import ahead
from launching import ROOT, environment
from training import python_path

SCRIPT = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from examples.benchmarks.netlab import interruptible
from examples.benchmarks.replica_training import on_replicas

def train_for_hours(folder):
    Path(folder, f"started_{dist.get_rank()}").touch()
    time.sleep(3600)

if __name__ == "__main__":
    with interruptible():
        on_replicas(2, train_for_hours, sys.argv[1])
"""


@ahead
def status_of_terminated(folder):
    """The exit status of the process, once its replicas had started."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(folder)]
    variables = environment(PYTHONPATH=python_path(ROOT))
    process = subprocess.Popen(command, cwd=folder, env=variables, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("started_*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(list(folder.glob("started_*"))) == 2
        process.terminate()
        return process.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_replicas_end_with_the_process_that_started_them(status_of_terminated):
    assert status_of_terminated != 0
