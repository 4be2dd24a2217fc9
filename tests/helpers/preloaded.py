"""Starts scripts in processes that have imported the package, torch and Lightning already.

    process = preloaded.start(script, *arguments, folder=folder, output=folder / "log")

An import takes seconds, a fork of a server that has imported takes none. What is forked is otherwise a process as a
shell starts it: its own session, folder, environment and output, Python's own signal handlers, and the interpreter's
own exit, with its status. Only the seed of Python's hashes is the same in all of them; the workers of ``Replicas``, and
what torchrun or Lightning starts, have seeds of their own.
"""

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Process:
    """A started script, with the part of ``subprocess.Popen`` that the tests use."""

    def __init__(self, server: "Server", pid: int) -> None:
        self._server, self.pid = server, pid

    @property
    def returncode(self) -> int | None:
        return self._server.statuses.get(self.pid)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        self._server.receive()
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        """Wait for the end. Raises ``TimeoutError`` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self._server.receive(timeout=0.1)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process, and what it has started in its session."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


class Server:
    """This process's side of the server: requests go out, pids and exit statuses come in."""

    def __init__(self) -> None:
        parent, child = socket.socketpair()
        command = [sys.executable, __file__, str(child.fileno())]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            command,
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
        child.close()
        self._connection = Connection(parent.detach())
        # Several threads may start and await scripts.
        self._lock = threading.RLock()
        self._pids: list[int] = []
        self.statuses: dict[int, int] = {}

    def receive(self, timeout: float = 0.0) -> None:
        """Read what the server reports."""
        with self._lock:
            while self._connection.poll(timeout):
                pid, status = self._connection.recv()
                if status is None:
                    # A pid may be used again.
                    self.statuses.pop(pid, None)
                    self._pids.append(pid)
                else:
                    self.statuses[pid] = status
                timeout = 0.0

    def start(self, **request: object) -> Process:
        with self._lock:
            self._connection.send(request)
            while not self._pids:
                self.receive(timeout=1.0)
            return Process(self, self._pids.pop())


_servers: list[Server] = []
_making = threading.Lock()


def start(
    script: Path | str, *arguments: str, folder: Path, output: Path, errors: Path | None = None, **environment: str
) -> Process:
    """Start a script.

    Args:
        script: What runs as ``__main__``.
        *arguments: Its arguments.
        folder: Where it runs.
        output: Where its output goes.
        errors: Where its errors go, if not there too.
        **environment: Its environment variables, beside those of this process.
    """
    with _making:
        if not _servers:
            _servers.append(Server())
    return _servers[0].start(
        arguments=[str(script), *arguments],
        folder=str(folder),
        output=str(output),
        errors=str(errors or output),
        environment={**os.environ, **environment},
    )


def serve(connection: Connection) -> dict:
    """Fork for every request, and report the pids and the exit statuses. Returns in the forked processes alone."""
    while True:
        if connection.poll(0.01):
            try:
                request = connection.recv()
            except EOFError:
                sys.exit()
            pid = os.fork()
            if not pid:
                connection.close()
                return request
            connection.send((pid, None))
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            continue
        if pid:
            connection.send((pid, os.waitstatus_to_exitcode(status)))


def become(request: dict) -> None:
    """Make this process the one that was asked for."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, path in ((1, request["output"]), (2, request["errors"])):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # A killed process flushes nothing.
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = request["arguments"]
    paths = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [os.path.dirname(os.path.abspath(sys.argv[0])), *filter(None, paths)]


if __name__ == "__main__":
    for _name in ("lightning.pytorch", "torch.distributed.run", "lightning_curvadion"):
        importlib.import_module(_name)
    # Or the first collection of every process would copy all of it.
    gc.freeze()
    gc.set_threshold(700, 10, 10)
    become(serve(Connection(int(sys.argv[1]))))
    __file__ = sys.argv[0]
    # At the top level, so that it ends as the script does: exceptions, statuses and the interpreter's exit are its own.
    exec(compile(Path(__file__).read_bytes(), __file__, "exec", dont_inherit=True))
