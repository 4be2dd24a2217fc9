"""Several hosts on one Linux machine, joined by links of a speed you choose; runs a training script on all of them.

    python examples/benchmarks/netlab.py --hosts 2 --rate 30mbit -- train.py --max_steps 100
    python examples/benchmarks/netlab.py --hosts 2 --loopback -- train.py    # no root: neither a rate nor a byte count

Every host is a network namespace with an address of its own, a cable (veth) to one switch (a bridge), and a rate
limit (tc tbf) on both ends of the cable. The script starts on every host through torchrun as on a cluster, with its own
``--node-rank``: a Lightning script says ``Trainer(num_nodes=HOSTS, devices=1, ...)``. Host 0 prints to the terminal; of
a host that fails, the end of its output is shown. Then follow the bytes that the kernel counted on every host.
Nothing is left behind, whether the run ends, fails or is interrupted.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

INTERFACE = "eth0"
PORT = 29511
_GRACE_SECONDS = 10.0


class LabError(RuntimeError):
    """The lab cannot be built here, or a host failed."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that the kernel counted on one host's interface, with every header."""

    sent: int
    received: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.sent - earlier.sent, self.received - earlier.received)


def missing() -> list[str]:
    """What this machine lacks for namespaces with limited links; empty where nothing is missing."""
    lacks = []
    if sys.platform != "linux":
        lacks.append("Linux (network namespaces)")
    elif os.geteuid() != 0:
        lacks.append("root (run with sudo)")
    lacks += [f"{tool} (apt-get install iproute2)" for tool in ("ip", "tc") if shutil.which(tool) is None]
    return lacks


class Lab:
    """A context manager: N hosts while it is open.

    Args:
        hosts: How many.
        rate: Speed of each cable in both directions, as ``tc`` writes it (``"30mbit"``); ``None`` sets no limit.
        loopback: Run all "hosts" on this machine's loopback instead: no root needed, no rate, no byte count.

    Raises:
        LabError: Something is missing, or the kernel refused.
    """

    def __init__(self, hosts: int, rate: str | None = None, loopback: bool = False) -> None:
        if hosts < 1:
            raise LabError(f"a lab needs at least one host, not {hosts}")
        if rate is not None:
            bits_per_second(rate)
        if loopback and rate is not None:
            raise LabError("loopback has no rate limit: leave out the rate, or the loopback")
        self.hosts, self.rate, self.loopback = hosts, rate, loopback
        self._mark = f"netlab{os.getpid()}"

    def __enter__(self) -> "Lab":
        if self.loopback:
            return self
        if lacks := missing():
            raise LabError(
                f"missing for a network lab: {', '.join(lacks)}. The same run over loopback, without a rate limit and"
                " without the kernel's count, needs none of it: --loopback"
            )
        _remove_leftovers()
        try:
            self._build()
        except BaseException:
            self._demolish()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._demolish()

    def _namespace(self, host: int | str) -> str:
        return f"{self._mark}-{host}"

    def address(self, host: int) -> str:
        """IP address of a host."""
        return "127.0.0.1" if self.loopback else f"10.99.0.{host + 1}"

    def _build(self) -> None:
        # The switch has a namespace too, so that nothing of the machine's own network is touched.
        switch = self._namespace("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            name, port = self._namespace(host), f"port{host}"
            _ip("netns", "add", name)
            _ip("link", "add", INTERFACE, "netns", name, "type", "veth", "peer", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        if self.rate is not None:
            self.set_rate(self.rate)

    def set_rate(self, rate: str | None) -> None:
        """Give all cables another speed."""
        self.rate = rate
        for host in range(self.hosts):
            for name, device in ((self._namespace(host), INTERFACE), (self._namespace("switch"), f"port{host}")):
                if rate is None:
                    subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", device, "root"], capture_output=True)
                    continue
                # The bucket holds what passes in 4 ms, a timer's tick, or high rates would not be reached; the queue is
                # long enough that nothing is dropped and TCP stays out of the picture.
                burst = max(32_000, bits_per_second(rate) // 8 // 250)
                words = f"qdisc replace dev {device} root tbf rate {rate} burst {burst} limit {burst + 8_000_000}"
                _call("tc", "-n", name, *words.split())

    def _demolish(self) -> None:
        if not self.loopback:
            for host in [*range(self.hosts), "switch"]:
                _remove_namespace(self._namespace(host))

    def traffic(self) -> list[Traffic]:
        """What each host sent and received since the lab was built; empty over loopback."""
        return [] if self.loopback else [self._traffic(host) for host in range(self.hosts)]

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
        """Run a script on every host through torchrun and wait for all of them.

        Args:
            script: The script and its arguments, or ``-m`` and a module.
            nproc_per_node: Processes on each host.
            environment: Variables beside this process's own.
            timeout: Seconds after which the run counts as failed.
            quiet: Keep host 0's output to itself as well.

        Raises:
            LabError: A host failed or time ran out; no process is left.
        """
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            processes, outputs = [], []
            try:
                for host in range(self.hosts):
                    output = Path(folder, f"host{host}")
                    outputs.append(output)
                    shown = host == 0 and not quiet
                    file = None if shown else stack.enter_context(output.open("wb"))
                    processes.append(
                        subprocess.Popen(
                            self._command(host, script, nproc_per_node),
                            env={**os.environ, **self._environment(), **(environment or {})},
                            stdout=file,
                            stderr=subprocess.STDOUT if file else None,
                            start_new_session=True,
                        )
                    )
                failed = _wait(processes, timeout)
            finally:
                _stop(processes)
            if failed is not None:
                host, why = failed
                told = outputs[host].read_text(errors="replace")[-4000:] if outputs[host].exists() else ""
                raise LabError(f"host {host} {why}\n{told}".rstrip())

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
    """The number behind ``"30mbit"``.

    Raises:
        LabError: It is no such rate.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate.lower())
    if found is None:
        raise LabError(f"a rate is written like 30mbit, 1gbit or 500kbit, not {rate!r}")
    return int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2]])


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


def _remove_leftovers() -> None:
    """Namespaces of labs that were killed and could not clean up themselves."""
    for path in Path("/run/netns").glob("netlab*-*"):
        owner = path.name.removeprefix("netlab").partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove_namespace(path.name)


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float | None) -> tuple[int, str] | None:
    """Wait for all; the first host that failed and how, if any did."""
    end = time.monotonic() + timeout if timeout is not None else float("inf")
    while True:
        codes = [process.poll() for process in processes]
        for host, code in enumerate(codes):
            if code not in (None, 0):
                return host, f"ended with exit status {code}"
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > end:
            return codes.index(None), f"did not end within {timeout:.0f} s"
        time.sleep(0.05)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: torchrun passes SIGTERM on to its workers; whoever ignores it is killed with its session."""
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
    """Within it SIGTERM and SIGHUP end the program as Ctrl-C does, through every ``finally``."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts")
    parser.add_argument("--rate", help="speed of every link, such as 30mbit; without it there is no limit")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes on each host")
    parser.add_argument("--timeout", type=float, help="seconds after which the run counts as failed")
    parser.add_argument("--loopback", action="store_true", help="no namespaces: needs no root, counts no bytes")
    parser.add_argument("script", nargs="+", help="after --: the script and its arguments, or -m and a module")
    options = parser.parse_args()
    try:
        with interruptible(), Lab(options.hosts, options.rate, options.loopback) as lab:
            start = time.perf_counter()
            lab.run(options.script, options.nproc_per_node, timeout=options.timeout)
            seconds = time.perf_counter() - start
            print(f"\n{seconds:.1f} s, {lab.rate or 'no'} rate limit")
            for host, counted in enumerate(lab.traffic()):
                sent, received = counted.sent / 1e6, counted.received / 1e6
                print(f"host {host} ({lab.address(host)}): sent {sent:.3f} MB, received {received:.3f} MB")
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; hosts and processes are gone", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
