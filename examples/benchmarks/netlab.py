"""A network lab: several hosts on one Linux machine, with links of a chosen speed. Runs a training script on all.

    python examples/benchmarks/netlab.py --hosts 2 --rate 30mbit -- train.py --max_steps 100
    python examples/benchmarks/netlab.py --hosts 2 --rate 30mbit --latency 25ms -- train.py --max_steps 100
    python examples/benchmarks/netlab.py --hosts 2 --loopback -- train.py    # no root: no rate, latency or byte count

A host is a network namespace with its own address. A link (veth) joins it to one switch (a bridge); a rate limit (tc
tbf) is on both ends of the link. With a latency the switch is ``delay_line.py``, which holds every frame for that time.
The latency is one way, as ``plan --latency`` has it: an answer takes twice as long. torchrun starts the script on every
host as on a cluster, each with its own ``--node-rank``: a Lightning script takes ``Trainer(num_nodes=HOSTS, devices=1,
...)``.

Host 0 prints to the terminal. If a host fails, the end of its output is shown. At the end the lab prints the bytes that
the kernel counted on every host. No namespace or process is left, whether the run ends, fails or is interrupted.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

INTERFACE = "eth0"
PORT = 29511
_DELAY_LINE = Path(__file__).with_name("delay_line.py")
_GRACE_SECONDS = 10.0


class LabError(RuntimeError):
    """The lab cannot be built here, or a host failed."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that the kernel counted on one host's interface, headers included."""

    sent: int
    received: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.sent - earlier.sent, self.received - earlier.received)


def missing() -> list[str]:
    """What this machine lacks for a lab. Empty if it lacks nothing."""
    requirements = []
    if sys.platform != "linux":
        requirements.append("Linux (network namespaces)")
    elif os.geteuid() != 0:
        requirements.append("root (run with sudo)")
    requirements += [f"{tool} (apt-get install iproute2)" for tool in ("ip", "tc") if shutil.which(tool) is None]
    return requirements


class Lab:
    """Context manager with a number of hosts.

    Args:
        hosts: Number of hosts.
        rate: Speed of each link in both directions, in the notation of ``tc`` (``"30mbit"``). ``None`` sets no limit.
        loopback: Run all hosts on the loopback interface instead. Needs no root, but has no rate, no latency and no
            byte count.
        latency: Time of a frame from any host to another, one way (``"25ms"``): a round trip takes twice as long.
            ``None`` adds nothing to what the machine takes, a fraction of a millisecond.

    Raises:
        LabError: The machine lacks something, or an ``ip`` or ``tc`` command failed.
    """

    def __init__(self, hosts: int, rate: str | None = None, loopback: bool = False, latency: str | None = None) -> None:
        if hosts < 1:
            raise LabError(f"a lab needs at least one host, not {hosts}")
        if rate is not None:
            bits_per_second(rate)
        if latency is not None:
            seconds(latency)
        if loopback and (rate, latency) != (None, None):
            raise LabError("loopback has no rate limit and no latency: leave out either them or loopback")
        self.hosts, self.rate, self.loopback, self.latency = hosts, rate, loopback, latency
        self._prefix = f"netlab{os.getpid()}"
        self._delay_line: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Lab":
        if self.loopback:
            return self
        if requirements := missing():
            raise LabError(
                f"a network lab needs {', '.join(requirements)}. Without them use --loopback, which has no rate limit,"
                " no latency and no byte count."
            )
        _remove_namespaces_of_ended_labs()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _namespace(self, host: int | str) -> str:
        return f"{self._prefix}-{host}"

    def address(self, host: int) -> str:
        """IP address of a host."""
        return "127.0.0.1" if self.loopback else f"10.99.0.{host + 1}"

    def _build(self) -> None:
        # The switch has a namespace too: the machine's own network stays as it is.
        switch = self._namespace("switch")
        _ip("netns", "add", switch)
        if self.latency is None:
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            name, port = self._namespace(host), f"port{host}"
            _ip("netns", "add", name)
            _ip("link", "add", INTERFACE, "netns", name, "type", "veth", "peer", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, *([] if self.latency else ["master", "bridge"]), "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        if self.rate is not None:
            self.set_rate(self.rate)
        if self.latency is not None:
            self._start_delay_line(seconds(self.latency))

    def _start_delay_line(self, latency: float) -> None:
        ports = [f"port{host}" for host in range(self.hosts)]
        # In a session of its own: an interrupt from the terminal must not reach it before the hosts have ended.
        self._delay_line = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace("switch"), sys.executable, _DELAY_LINE, str(latency), *ports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._delay_line.stdout is not None
        if (said := self._delay_line.stdout.readline()) != b"ready\n":
            said += self._delay_line.stdout.read()
            raise LabError(f"the delay line did not start: {said.decode(errors='replace').strip()}")

    def set_rate(self, rate: str | None) -> None:
        """Set the speed of all links; ``None`` removes the limit."""
        self.rate = rate
        for host in range(self.hosts):
            for name, device in ((self._namespace(host), INTERFACE), (self._namespace("switch"), f"port{host}")):
                if rate is None:
                    subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", device, "root"], capture_output=True)
                    continue
                # The token bucket holds 4 ms of traffic, a timer's tick, or high rates would not be reached. The queue
                # is so long that it drops nothing and TCP does not slow down.
                burst = max(32_000, bits_per_second(rate) // 8 // 250)
                words = f"qdisc replace dev {device} root tbf rate {rate} burst {burst} limit {burst + 8_000_000}"
                _call("tc", "-n", name, *words.split())

    def _remove(self) -> None:
        if self._delay_line is not None:
            self._delay_line.kill()
            self._delay_line.communicate()
            self._delay_line = None
        if not self.loopback:
            for host in [*range(self.hosts), "switch"]:
                _remove_namespace(self._namespace(host))

    def traffic(self) -> list[Traffic]:
        """Bytes of each host since the lab was built. Empty over loopback."""
        return [] if self.loopback else [self._traffic(host) for host in range(self.hosts)]

    def delay_line_cpu_seconds(self) -> float:
        """Seconds of a core that the delay line has taken. 0 without one."""
        if self._delay_line is None:
            return 0.0
        user, system = Path("/proc", str(self._delay_line.pid), "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _traffic(self, host: int) -> Traffic:
        shown = _call("ip", "-n", self._namespace(host), "-s", "-j", "link", "show", "dev", INTERFACE)
        counted = json.loads(shown)[0]["stats64"]
        return Traffic(counted["tx"]["bytes"], counted["rx"]["bytes"])

    def run(
        self,
        script: Sequence[str],
        nproc_per_node: int = 1,
        environment: Mapping[str, str] | None = None,
        timeout: float | None = None,
        quiet: bool = False,
    ) -> None:
        """Run a script on every host through torchrun and wait for all hosts.

        Args:
            script: The script and its arguments, or ``-m`` and a module.
            nproc_per_node: Processes on each host.
            environment: Environment variables to add.
            timeout: Seconds after which the run fails.
            quiet: Do not print host 0's output either.

        Raises:
            LabError: A host failed or the time is over. No process is left.
        """
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            processes: list[subprocess.Popen[bytes]] = []
            outputs = [Path(folder, f"host{host}") for host in range(self.hosts)]
            try:
                for host, output in enumerate(outputs):
                    file = None if host == 0 and not quiet else stack.enter_context(output.open("wb"))
                    process = subprocess.Popen(
                        self._command(host, script, nproc_per_node),
                        env={**os.environ, **self._environment(), **(environment or {})},
                        stdout=file,
                        stderr=subprocess.STDOUT if file else None,
                        start_new_session=True,
                    )
                    processes.append(process)
                failure = _wait(processes, timeout, self._delay_line)
            finally:
                _stop(processes)
            if failure is not None:
                host, reason = failure
                printed = outputs[host].read_text(errors="replace")[-4000:] if outputs[host].exists() else ""
                raise LabError(f"host {host} {reason}\n{printed}".rstrip())

    def _environment(self) -> dict[str, str]:
        interface = "lo" if self.loopback else INTERFACE
        return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "PYTHONUNBUFFERED": "1"}

    def _command(self, host: int, script: Sequence[str], nproc_per_node: int) -> list[str]:
        inside = [] if self.loopback else ["ip", "netns", "exec", self._namespace(host)]
        launch = (
            f"-m torch.distributed.run --nnodes {self.hosts} --node-rank {host} --nproc-per-node {nproc_per_node}"
            f" --master-addr {self.address(0)} --master-port {PORT} --local-addr {self.address(host)}"
        )
        return [*inside, sys.executable, *launch.split(), *script]


def bits_per_second(rate: str) -> int:
    """Bits per second of a rate such as ``"30mbit"``.

    Raises:
        LabError: The rate is written differently.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate.lower())
    if found is None:
        raise LabError(f"a rate is written like 30mbit, 1gbit or 500kbit, not {rate!r}")
    return int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2]])


def seconds(latency: str) -> float:
    """Seconds of a latency such as ``"25ms"``.

    Raises:
        LabError: The latency is written differently, or is zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", latency)
    if found is None or not float(found[1]):
        raise LabError(f"a latency is written like 25ms, 500us or 0.1s, and is above zero, not {latency!r}")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]


def _ip(*words: str) -> str:
    return _call("ip", *words)


def _call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _remove_namespace(name: str) -> None:
    if not Path("/run/netns", name).exists():
        return
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _remove_namespaces_of_ended_labs() -> None:
    """A lab whose process was killed could not remove its own."""
    for path in Path("/run/netns").glob("netlab*-*"):
        owner = path.name.removeprefix("netlab").partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove_namespace(path.name)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], timeout: float | None, delay_line: subprocess.Popen[bytes] | None
) -> tuple[int, str] | None:
    """Wait for all processes. If one fails, return its host and the reason at once."""
    end = time.monotonic() + timeout if timeout is not None else float("inf")
    while True:
        codes = [process.poll() for process in processes]
        for host, code in enumerate(codes):
            if code not in (None, 0):
                return host, f"ended with exit status {code}"
        if all(code == 0 for code in codes):
            return None
        if delay_line is not None and delay_line.poll() is not None:
            assert delay_line.stdout is not None
            raise LabError(f"the delay line ended: {delay_line.stdout.read().decode(errors='replace').strip()}")
        if time.monotonic() > end:
            return codes.index(None), f"did not end within {timeout:.0f} s"
        time.sleep(0.05)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate processes that still run: torchrun forwards SIGTERM to its workers. Then kill their sessions."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that every ``finally`` runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(work: Callable[[], None], interrupted: str) -> int:
    """Do the work of a command line, and return its exit status.

    Args:
        work: Runs labs.
        interrupted: What to say where it is interrupted.
    """
    try:
        with interruptible():
            work()
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


def quiet_environment(root: Path) -> dict[str, str]:
    """Environment of a script that imports from a folder, on one thread, and prints no warnings."""
    return {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        # Hosts of the lab have no names, of which torch would warn at every connection.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts")
    parser.add_argument("--rate", help="speed of every link, such as 30mbit; by default unlimited")
    parser.add_argument("--latency", help="time of a frame between two hosts, one way, such as 25ms; by default none")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes on each host")
    parser.add_argument("--timeout", type=float, help="seconds after which the run fails")
    parser.add_argument("--loopback", action="store_true", help="no namespaces: needs no root, but counts no bytes")
    parser.add_argument("script", nargs="+", help="after --: the script and its arguments, or -m and a module")
    options = parser.parse_args()

    def run() -> None:
        with Lab(options.hosts, options.rate, options.loopback, options.latency) as lab:
            start = time.perf_counter()
            lab.run(options.script, options.nproc_per_node, timeout=options.timeout)
            elapsed = time.perf_counter() - start
            print(f"\n{elapsed:.1f} s, {lab.rate or 'no'} rate limit, {lab.latency or 'no'} latency added")
            for host, traffic in enumerate(lab.traffic()):
                sent, received = traffic.sent / 1e6, traffic.received / 1e6
                print(f"host {host} ({lab.address(host)}): sent {sent:.3f} MB, received {received:.3f} MB")

    return exit_status(run, "interrupted; all hosts and processes are removed")


if __name__ == "__main__":
    sys.exit(main())
