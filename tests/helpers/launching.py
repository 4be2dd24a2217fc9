"""Starts scripts as a user would, and returns what they print."""

import contextlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
# As it is before any test changes it: programs that run ahead start in the middle of another test.
_ENVIRONMENT = dict(os.environ)

# In the place of SLURM's own: starts the tasks of two nodes on this machine.
SRUN = """#!/usr/bin/env bash
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" &
    tasks[rank]=$!
done
wait "${tasks[0]}" && wait "${tasks[1]}"
"""


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """The session's variables, with this Python's scripts on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{_ENVIRONMENT['PATH']}"
    return {**_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PATH": path, **more}


def slurm_environment(folder: Path) -> dict[str, str]:
    """Variables of a SLURM job of two nodes with one task each; an ``srun`` in ``folder`` starts the tasks."""
    srun = folder / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NNODES": "2", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    job |= {"NODELIST": "127.0.0.1", "SUBMIT_DIR": str(ROOT), "CPUS_PER_TASK": "1"}
    path = os.pathsep.join([str(srun.parent), environment()["PATH"]])
    return {**{f"SLURM_{name}": value for name, value in job.items()}, "PATH": path, "MASTER_PORT": str(free_port())}


def start(*words: object, cwd: Path = ROOT, **more: str) -> subprocess.Popen[str]:
    """Start a command; ``more`` are environment variables."""
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def outputs(*processes: subprocess.Popen[str], timeout: float = 120, statuses: Sequence[int] = ()) -> list[str]:
    """What the processes print. Fails if they take longer than ``timeout`` seconds, or end with other ``statuses``.

    Without ``statuses`` all must end without an error.
    """
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            # With what it has started: a launcher that is killed leaves its workers behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process, text, status in zip(processes, printed, statuses or [0] * len(processes), strict=True):
        assert process.returncode == status, text[-4000:]
    return printed


def run_as_torchrun(rank: int, world: int, script: Path, port: int) -> str:
    """Run a script in a worker of the pool with torchrun's variables, and return what it prints.

    The script starts at once: the worker has imported torch already.
    """
    dist.destroy_process_group()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()
