"""Real processes for the tests: a pool of workers that form a gloo process group for every job.

Importing torch takes seconds, so the workers stay. After a job that hangs or kills its worker the pool is thrown away,
and the next job starts a new one. Only processes started here are killed.
"""

import datetime
import gc
import io
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class Failed(AssertionError):
    """A replica raised; the message is its traceback."""


class CountedCollectives(list):
    """(name, bytes sent) of every torch.distributed collective called inside the block, and who called it."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def of(self, module: str) -> list[tuple[str, int]]:
        return [call for call, caller in zip(self, self.callers, strict=True) if caller == module]


_COUNTED = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "all_gather_object",
    "broadcast_object_list",
    "barrier",
    "reduce",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
)


@contextmanager
def counted_collectives() -> Iterator[CountedCollectives]:
    """Count collectives from outside, by wrapping the functions of ``torch.distributed``."""
    calls = CountedCollectives()
    originals = {name: getattr(dist, name) for name in _COUNTED}

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
            # The tensor that is sent comes last: all_to_all_single and its like take the one that receives first.
            size = tensors[-1].nbytes if tensors else 0
            if name == "all_to_all_single":
                others = dist.get_world_size() - 1
                rows = tensors[-1].view(others + 1, -1)
                # A row that goes to all counts as one that is gathered.
                size = rows[0].nbytes * (1 if torch.equal(rows, rows[:1].expand_as(rows)) else others)
            if name == "broadcast" and dist.get_rank() != kwargs.get("src", args[1] if len(args) > 1 else None):
                size = 0
            calls.append((name, size))
            calls.callers.append(sys._getframe(1).f_globals["__name__"])
            return original(*args, **kwargs)

        return counted

    for name, original in originals.items():
        setattr(dist, name, wrap(name, original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class _Pickler(pickle.Pickler):
    """Sends a tensor by its bytes: a file of shared memory for each, as torch has it, takes longer."""

    def reducer_override(self, value: object) -> Any:
        if type(value) is not torch.Tensor or value.requires_grad:
            return NotImplemented
        return _tensor, (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


def _send(connection: Connection, value: object) -> None:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    connection.send_bytes(buffer.getbuffer())


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    # What is imported stays, and is no business of the collector.
    gc.freeze()
    gc.set_threshold(700, 10, 10)
    while True:
        job = connection.recv()
        if job is None:
            return
        function, rank, world, store, args = job
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=30),
            )
            # Or a job that ends at once would leave the group while another rank still connects to it.
            dist.barrier()
            torch.manual_seed(0)
            answer = (True, function(rank, world, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        _send(connection, answer)


def _share(rank: int, world: int, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    # Nothing is synchronised: an optimizer without a hook would warn of that.
    dist.destroy_process_group()
    return [function(*job) for job in jobs[rank::world]]


class Replicas:
    """Runs functions on several ranks at once."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self, world: int) -> None:
        context = mp.get_context("spawn")
        while len(self._workers) < world:
            parent, child = context.Pipe()
            process = context.Process(target=_serve, args=(child,), daemon=True)
            process.start()
            child.close()
            self._workers.append((process, parent))

    def close(self) -> None:
        """Kill the workers."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """``[function(rank, world, *args) for rank in range(world)]``, each in its process with a gloo group."""
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            connections = [connection for _, connection in self._workers[:world]]
            for rank, connection in enumerate(connections):
                _send(connection, (function, rank, world, store, args))
            answers: dict[int, tuple[bool, Any]] = {}
            deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
            while len(answers) < world:
                left = (deadline - datetime.datetime.now()).total_seconds()
                ready = wait([c for r, c in enumerate(connections) if r not in answers], timeout=max(left, 0))
                if not ready:
                    missing = sorted(set(range(world)) - set(answers))
                    self.close()
                    raise TimeoutError(f"ranks {missing} did not answer within {timeout} s: {answers}")
                for connection in ready:
                    try:
                        answers[connections.index(connection)] = connection.recv()
                    except EOFError:
                        self.close()
                        raise Failed(f"rank {connections.index(connection)} died") from None
        failures = [f"rank {rank}:\n{answers[rank][1]}" for rank in range(world) if not answers[rank][0]]
        if failures:
            raise Failed("\n".join(failures))
        return [answers[rank][1] for rank in range(world)]

    def map(self, function: Callable[..., Any], jobs: list[tuple[Any, ...]], timeout: float = 200.0) -> list[Any]:
        """``[function(*job) for job in jobs]``; two processes share the jobs, which know nothing of each other."""
        shares = self.run(2, _share, function, jobs, timeout=timeout)
        return [shares[number % 2][number // 2] for number in range(len(jobs))]
