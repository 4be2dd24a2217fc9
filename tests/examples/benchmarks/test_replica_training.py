"""The replicas of ``examples/benchmarks/replica_training.py``."""

import contextlib
import os
import signal
import subprocess
import sys
import time

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


def test_replicas_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(tmp_path)]
    variables = environment(PYTHONPATH=python_path(ROOT))
    process = subprocess.Popen(command, cwd=tmp_path, env=variables, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("started_*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(list(tmp_path.glob("started_*"))) == 2
        process.terminate()
        assert process.wait(30) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
