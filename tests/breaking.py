"""Breaks training runs for real, and reports what became of them.

    python tests/breaking.py              # all of it, at length: 20 kills, 20 000 steps; 3 minutes on two cores
    python tests/breaking.py kills        # one of: write, stall, exception, signals, restart, kills, memory

``tests/trainer/test_breaking.py`` runs the same functions, shorter. Only processes that were started here are killed.
"""

import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "helpers")]

import preloaded
import torch
import torch.distributed.run
from failing import Job
from launching import free_port
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from preloaded import Process

from lightning_curvadion.trainer.checkpoint_io import AtomicCheckpointIO

HERE = Path(__file__).parent
HELPERS = HERE / "helpers"
SCRIPT = HELPERS / "failing.py"


@dataclass
class End:
    """How a process ended.

    Attributes:
        status: Exit status, negative for a signal.
        output: Both streams.
        seconds: From the hit to its end.
        report: What it wrote itself, if it could.
    """

    status: int
    output: str
    seconds: float
    report: dict


def environment(**more: str) -> dict[str, str]:
    """Variables of a training process, beside those of this one."""
    paths = os.pathsep.join([str(HELPERS), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **more}


def start(job: Job, **more: str) -> list[Process]:
    """Start one process for each rank, none of which knows how the others end, as on machines of their own.

    Args:
        job: What they run.
        **more: Environment variables; ``{rank}`` in them is the rank.
    """
    folder = Path(job.folder)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(job.devices)}
    processes = []
    for rank in range(job.devices):
        own = {name: value.format(rank=rank) for name, value in more.items()}
        variables = environment(**group, LOCAL_RANK=str(rank), NODE_RANK="0", **own)
        log = folder / f"rank{rank}.log"
        processes.append(preloaded.start(SCRIPT, json.dumps(asdict(job)), folder=folder, output=log, **variables))
    return processes


def wait_for_hit(job: Job, processes: list[Process]) -> float:
    """Wait until the victim is hit; the time of it."""
    hit = Path(job.folder) / "hit"
    deadline = time.time() + 90
    while not hit.exists():
        if time.time() > deadline or all(process.poll() is not None for process in processes):
            raise AssertionError(f"rank {job.victim} was not hit: {logs(Path(job.folder))}")
        time.sleep(0.01)
    return float(hit.read_text() or time.time())


def ends(job: Job, processes: list[Process], within: float, stopped: bool = False) -> list[End]:
    """Wait for all processes.

    Args:
        job: What they run.
        processes: One for each rank.
        within: Seconds from the hit, or from the start of a job without one.
        stopped: Whether the victim stays stopped; it is not waited for, and killed here.

    Raises:
        AssertionError: The victim was not hit within 90 s, or another process took longer than ``within``.
    """
    folder = Path(job.folder)
    try:
        moment = wait_for_hit(job, processes) if job.what else time.time()
        waiting = [process for rank, process in enumerate(processes) if not (stopped and rank == job.victim)]
        seconds = {}
        while len(seconds) < len(waiting):
            for process in waiting:
                if process.pid not in seconds and process.poll() is not None:
                    seconds[process.pid] = time.time() - moment
            if time.time() - moment > within:
                late = [rank for rank, process in enumerate(processes) if process in waiting and process.poll() is None]
                raise AssertionError(f"ranks {late} still run after {within} s: {logs(folder)}")
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        End(process.wait(), read(folder / f"rank{rank}.log"), seconds.get(process.pid, 0.0), report(folder, rank))
        for rank, process in enumerate(processes)
    ]


def read(path: Path) -> str:
    """The text of a file, if there is one."""
    return path.read_text() if path.exists() else ""


def report(folder: Path, rank: int) -> dict:
    """What a rank wrote at its end."""
    return json.loads(read(folder / f"rank{rank}.json") or "{}")


def logs(folder: Path) -> str:
    """The end of every log."""
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if entry.readlink() == folder.resolve():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


# -- what is broken ---------------------------------------------------------------------------------------------------

# The collective in which the others wait for a rank that was hit in a place.
# Lag and overlap.
DELAYS = ((0, 0), (1, 1), (2, 5))
COLLECTIVES = {"forward": "the RMMC all-reduce", "agreement": "the RMMC all-reduce", "sync": "an all-"}
# Where a loss may be noticed that comes while all of them are under way.
IN_BACKGROUND = (*COLLECTIVES.values(), "the comparison of digests")


def kill_once(folder: Path, world: int, victim: int, step: int, where: str, delays: tuple[int, ...] = (0, 0)) -> float:
    """``kill -9`` on a rank; the seconds until the last survivor has ended with an error that names the loss."""
    job = Job(
        str(folder), steps=10**6, devices=world, victim=victim, step=step, what="kill", where=where, delays=delays
    )
    result = ends(job, start(job), within=30)
    for rank, end in enumerate(result):
        if rank == victim:
            assert end.status == -signal.SIGKILL
            continue
        assert end.status > 0, (rank, end)
        # What is in the background is noticed where it is waited for, or in the agreement before that.
        named = [COLLECTIVES[where]] if delays == (0, 0) else IN_BACKGROUND
        lost = [f"lost the connection to another rank during {collective}" for collective in named]
        # In one of some hundred kills gloo did not notice the end of the connection, and its timeout came.
        lost += [f"{collective} timed out: rank {victim} did not arrive" for collective in named]
        assert any(words in end.output for words in lost), end.output[-3000:]
        assert "GLHF" not in end.output and ".cc:" not in end.output, end.output[-3000:]
        # The store goes with rank 0, be it the victim or a survivor that has ended.
        silent = re.findall(r"No report came from (.*), as where", end.output)
        tells = [str(victim) in re.findall(r"\d+", ranks) for ranks in silent]
        assert tells == [True] or (rank != 0 and "store does not answer either" in end.output), end.output[-3000:]
        assert end.report["how"] == "ReplicaLostError", end.report
    assert not processes_in(folder)
    return max(end.seconds for end in result)


def job_of_two_replicas(folder: Path, victim: int, sharded: bool, **breaks: Any) -> Job:
    """A run of two replicas of two processes each, of which one is hit."""
    return Job(str(folder), steps=10**6, devices=4, replica_size=2, sharded=sharded, victim=victim, **breaks)


def kill_in_replica(folder: Path, victim: int, where: str = "forward", sharded: bool = False) -> float:
    """``kill -9`` on a process of one of two replicas; the seconds until all processes of both have ended.

    Each says which one is lost. Those of the victim's replica notice it inside of the replica, the others in the next
    agreement or mean.
    """
    job = job_of_two_replicas(folder, victim, sharded, step=5, what="kill", where=where, save=False)
    result = ends(job, start(job), within=30)
    for rank, end in enumerate(result):
        if rank != victim:
            assert end.status > 0 and end.report["how"] == "ReplicaLostError", (rank, end)
            silent = re.findall(r"No report came from (.*), as where", end.output)
            tells = [str(victim) in re.findall(r"\d+", ranks) for ranks in silent]
            assert tells == [True] or (rank != 0 and "store does not answer either" in end.output), end.output[-3000:]
    (other,) = {rank for rank in range(4) if rank // 2 == victim // 2} - {victim}
    assert f"No report came from rank {victim}, as" in result[other].output, result[other].output[-3000:]
    assert not processes_in(folder)
    return max(end.seconds for end in result)


def kills(folder: Path, count: int = 20, seed: int = 0) -> list[float]:
    """Kills at random: ranks, steps, and places."""
    choose = random.Random(seed)
    seconds = []
    for number in range(count):
        world = choose.choice([2, 3, 4])
        victim, step, where = choose.randrange(world), choose.randrange(1, 40), list(COLLECTIVES)[number % 3]
        lag, overlap = delays = choose.choice(DELAYS)
        place = folder / f"kill{number}"
        place.mkdir(parents=True)
        seconds.append(kill_once(place, world, victim, step, where, delays))
        print(
            f"kill -9, rank {victim} of {world}, step {step}, {where}, lag {lag}, overlap {overlap}: all ended after"
            f" {seconds[-1]:.1f} s",
            flush=True,
        )
    print(f"{count} kills: every survivor ended with an error that names the loss, at most {max(seconds):.1f} s later")
    return seconds


def restart(folder: Path) -> None:
    """torchrun starts a killed job again from its newest checkpoint; it ends where an undisturbed run ends."""
    first, second = folder / "killed", folder / "undisturbed"
    for place in (first, second):
        place.mkdir(parents=True)
    # With a checkpoint at the exception "last" would be what the survivor saved, alone.
    job = Job(
        str(first), steps=20, victim=1, step=13, what="kill", where="agreement", every=5, resume="last", save=False
    )
    words = ["--standalone", "--nproc-per-node=2", "--max-restarts=2", str(SCRIPT), json.dumps(asdict(job))]
    # Or workers read addresses of the run before from the agent's store (pytorch issue 135712).
    variables = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    log = first / "torchrun.log"
    torchrun = preloaded.start(torch.distributed.run.__file__, *words, folder=first, output=log, **variables)
    try:
        assert torchrun.wait(timeout=180) == 0, logs(first)
    finally:
        torchrun.kill()
    assert (first / "hit").exists()
    undisturbed = replace(job, folder=str(second), what="", victim=-1, resume=str(first / "step=10.ckpt"))
    result = ends(undisturbed, start(undisturbed), within=90)
    assert [end.status for end in result] == [0, 0], logs(second)
    reports = [report(place, rank) for place in (first, second) for rank in (0, 1)]
    assert all(final["how"] == "finished" and final["step"] == 20 for final in reports), reports
    assert len({final["digest"] for final in reports}) == 1, reports
    print("killed at step 13 and restarted from step 10 by torchrun: the final parameters are those of a run resumed")


def terminate(
    folder: Path,
    victim: int = 1,
    world: int = 2,
    delays: tuple[int, ...] = (0, 0),
    replica_size: int = 1,
    sharded: bool = False,
) -> float:
    """SIGTERM on one rank: all stop after the same step and have saved their consensus."""
    job = Job(
        str(folder),
        steps=10**6,
        devices=world,
        victim=victim,
        step=7,
        what="term",
        delays=delays,
        replica_size=replica_size,
        sharded=sharded,
    )
    result = ends(job, start(job), within=30)
    assert {end.report["how"] for end in result} == {"SIGTERMException"}, [end.output[-2000:] for end in result]
    models = {(end.report["step"], end.report["digest"]) for end in result}
    # Each process of a replica has shards of its own.
    assert len(models) == (replica_size if sharded else 1), [end.report for end in result]
    path = folder / "on_exception.ckpt"
    saved = _load_distributed_checkpoint(path) if sharded else torch.load(path, weights_only=True)
    (state,) = [saved["optimizer_0"]] if sharded else saved["optimizer_states"]
    assert saved["global_step"] == result[0].report["step"] and "momentum" in state["state"]["0" if sharded else 0]
    seconds = max(end.seconds for end in result)
    print(f"SIGTERM on rank {victim} of {world}: all stopped after step {saved['global_step']}, {seconds:.1f} s later")
    return seconds


def slurm_environment(folder: Path) -> dict[str, str]:
    """Variables of a SLURM job of two tasks on one node, with an ``scontrol`` that records how it was called."""
    scontrol = folder / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {folder}/requeued\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NODELIST": "127.0.0.1"}
    return slurm | {"SLURM_NTASKS_PER_NODE": "2", "PATH": f"{folder}:{os.environ['PATH']}"}


def requeue(folder: Path) -> None:
    """SIGUSR1 on one task of a SLURM job: all save their consensus after the same step, requeue, and train on."""
    job = Job(str(folder), steps=20, victim=1, step=7, what="requeue", save=False, delays=(1, 0))
    result = ends(job, start(job, **slurm_environment(folder)), within=60)
    assert [end.status for end in result] == [0, 0], logs(folder)
    assert (folder / "requeued").read_text() == "requeue 7\n"
    assert [end.report["step"] for end in result] == [20, 20] and len({end.report["digest"] for end in result}) == 1
    saved = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)
    # The request of step 8 is read in the next one.
    assert saved["global_step"] == 9 and "momentum" in saved["optimizer_states"][0]["state"][0]
    print("SIGUSR1 on rank 1 of a SLURM job: all saved their consensus of step 9, requeued once, and finished")


def requeue_and_stop(folder: Path, what: str) -> None:
    """SIGUSR1 and SIGTERM on one task before the ranks have agreed on either: all requeue, then all stop."""
    job = Job(str(folder), steps=10**6, victim=1, step=7, what=what, delays=(1, 0))
    result = ends(job, start(job, **slurm_environment(folder)), within=60)
    assert (folder / "requeued").read_text() == "requeue 7\n"
    assert {end.report["how"] for end in result} == {"SIGTERMException"}, [end.output[-2000:] for end in result]
    assert [end.report["step"] for end in result] == [11, 11] and len({end.report["digest"] for end in result}) == 1
    print(f"{what} on rank 1 of a SLURM job: all requeued after step 9 and stopped after step 11")


def interrupt(folder: Path) -> float:
    """Ctrl-C, which a terminal sends to every rank: a clean end and a checkpoint."""
    job = Job(str(folder), steps=10**6, victim=1, step=7, what="interrupt")
    processes = start(job)
    wait_for_hit(job, processes)
    processes[0].send_signal(signal.SIGINT)
    result = ends(job, processes, within=30)
    assert all(end.status == 1 for end in result), [(end.status, end.output[-2000:]) for end in result]
    assert result[1].report["how"] == "KeyboardInterrupt", result[1].report
    saved = torch.load(folder / "on_exception.ckpt", weights_only=True)
    # Rank 0 may still be within the step that rank 1 has finished.
    assert saved["global_step"] >= job.step - 1, saved["global_step"]
    seconds = max(end.seconds for end in result)
    print(f"Ctrl-C: both ranks ended after {seconds:.1f} s, with a checkpoint")
    return seconds


def stall(folder: Path, timeout: float = 5.0) -> float:
    """SIGSTOP on a rank: the others name the collective that timed out, after the user's timeout."""
    job = Job(str(folder), steps=10**6, timeout=timeout, victim=1, step=7, what="stop", where="agreement")
    result = ends(job, start(job), within=timeout + 25, stopped=True)
    assert result[0].status > 0
    late = "On rank 0 the RMMC all-reduce timed out: rank 1 did not arrive."
    assert late in result[0].output, result[0].output[-3000:]
    assert result[0].seconds >= timeout - 0.5
    print(f"SIGSTOP with a timeout of {timeout:.0f} s: the other rank ended after {result[0].seconds:.1f} s")
    return result[0].seconds


def lose_on_gpus(folder: Path, what: str, timeout: float = 20.0, accelerator: str = "gpu") -> float:
    """A rank is killed or stopped where NCCL communicates: the other ends, and its output says that a rank is missing.

    By PyTorch's own watchdog, after the timeout, unless NCCL notices the loss before.
    """
    job = Job(str(folder), steps=10**6, timeout=timeout, victim=1, step=7, what=what, accelerator=accelerator)
    result = ends(job, start(job), within=timeout + 90, stopped=what == "stop")
    assert result[0].status != 0
    words = ("ReplicaLostError", "Watchdog caught collective operation timeout", "ncclRemoteError")
    assert any(word in result[0].output for word in words), result[0].output[-3000:]
    print(f"{what} on a GPU with a timeout of {timeout:.0f} s: the other rank ended after {result[0].seconds:.1f} s")
    return result[0].seconds


def memory(folder: Path, steps: int = 20_000, settled: int = 2_000) -> tuple[float, int]:
    """A long run on two ranks: MiB by which resident memory grew since step ``settled``, and files opened since."""
    job = Job(str(folder), steps=steps, watch=settled // 2)
    result = ends(job, start(job), within=60 + steps * 0.05)
    assert [end.status for end in result] == [0, 0], logs(folder)
    growth, opened = 0.0, 0
    for end in result:
        readings = {step: (resident, files) for step, resident, files in end.report["readings"]}
        growth = max(growth, (readings[steps][0] - readings[settled][0]) / 2**20)
        opened = max(opened, readings[steps][1] - readings[settled][1])
        base = readings[settled][0] / 2**20
    print(
        f"{steps} steps: from step {settled} on, resident memory grew by {growth:.1f} MiB of {base:.0f},"
        f" open files by {opened}"
    )
    return growth, opened


def exception(folder: Path) -> float:
    """An exception on one rank while the others are in a collective reaches the user from the rank that had it."""
    job = Job(str(folder), steps=10**6, victim=1, step=7, what="raise")
    result = ends(job, start(job), within=30)
    assert all(end.status == 1 for end in result)
    assert "ArithmeticError: the batch is broken" in result[1].output
    assert "lost the connection to another rank during the RMMC all-reduce" in result[0].output
    assert "Mend what ended rank 1: ArithmeticError: the batch is broken." in result[0].output
    assert [end.report["how"] for end in result] == ["ReplicaLostError", "ArithmeticError"]
    # Rank 0 alone writes, what it has: it takes one step more before it waits for rank 1.
    assert torch.load(folder / "on_exception.ckpt", weights_only=True)["global_step"] == 8
    seconds = max(end.seconds for end in result)
    print(f"an exception on rank 1: both ranks ended after {seconds:.1f} s")
    return seconds


def exception_in_replica(folder: Path, victim: int, sharded: bool = False) -> float:
    """An exception on one process of one of two replicas: all end, and it reaches the user from that process.

    Where the replicas are sharded none of them can save itself, and they say so.
    """
    job = job_of_two_replicas(folder, victim, sharded, step=7, what="raise", save=sharded)
    result = ends(job, start(job), within=30)
    assert all(end.status == 1 for end in result), [end.status for end in result]
    for rank, end in enumerate(result):
        how = "ArithmeticError" if rank == victim else "ReplicaLostError"
        assert end.report["how"] == how, (rank, end.report, end.output[-3000:])
    tells = f"Mend what ended rank {victim}: ArithmeticError: the batch is broken."
    (other,) = {rank for rank in range(4) if rank // 2 == victim // 2} - {victim}
    assert tells in result[other].output, result[other].output[-3000:]
    if sharded:
        assert "on_exception.ckpt is not written" in result[0].output, result[0].output[-3000:]
        assert not (folder / "on_exception.ckpt").exists()
    return max(end.seconds for end in result)


def write(folder: Path, size: int = 2**28) -> None:
    """``kill -9`` while a checkpoint is written over an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.arange(5)}}, place)
    script = folder / "write.py"
    script.write_text(
        "import sys, torch; from lightning_curvadion.trainer.checkpoint_io import AtomicCheckpointIO;"
        f"AtomicCheckpointIO().save_checkpoint({{'x': torch.zeros({size // 4})}}, sys.argv[1])"
    )
    writer = preloaded.start(script, str(place), folder=folder, output=folder / "write.log", **environment())
    deadline = time.time() + 60
    while not any(part.stat().st_size > size // 10 for part in folder.glob(".last.ckpt.*.part")):
        assert writer.poll() is None and time.time() < deadline, f"it ended before it was killed: {logs(folder)}"
        time.sleep(0.001)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    (part,) = folder.glob(".last.ckpt.*.part")
    written = part.stat().st_size
    assert 0 < written < size
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(place)["state_dict"]["x"], torch.arange(5))
    print(f"kill -9 after {written / 2**20:.0f} of {size / 2**20:.0f} MiB of a checkpoint: the one before is intact")


def main() -> None:
    """The long way."""
    chosen = sys.argv[1:] or ["write", "stall", "exception", "signals", "restart", "kills", "memory"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what in chosen:
            place = folder / what
            place.mkdir()
            if what == "signals":
                for world, victim in ((2, 0), (2, 1), (3, 2)):
                    (place / f"{world}{victim}").mkdir()
                    terminate(place / f"{world}{victim}", victim, world)
                (place / "requeue").mkdir()
                requeue(place / "requeue")
                (place / "interrupt").mkdir()
                interrupt(place / "interrupt")
            else:
                globals()[what](place)


if __name__ == "__main__":
    main()
