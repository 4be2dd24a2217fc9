"""What latency costs: collectives of replicas whose frames take that long, in a network lab. Needs root.

    python examples/benchmarks/latency.py            # six minutes
    python examples/benchmarks/latency.py --smoke    # seconds

First the lab itself: a TCP round trip, TCP's speed beside the rate limit, and the processor time of the delay line.
Then what replicas wait at every step, in a row of steps that compute for 50 ms: for the agreement of a local step (the
maximum of 16 bytes), and for what a sync step has beside it (an all-gather of 20 kB). Both are also given in latencies,
one way. They go around a ring, as without delays, or directly from each replica to each other one, as with a lag or an
overlap.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
if "RANK" not in os.environ:
    sys.path.insert(0, str(ROOT))

from examples.benchmarks.netlab import Lab, bits_per_second, exit_status, quiet_environment, seconds  # noqa: E402
from lightning_curvadion.sync.collectives import Collectives  # noqa: E402

PORT = 29600
COMPUTE_SECONDS, GATHERED_BYTES = 0.05, 20_000
ECHOES = 10
WAYS = RING, DIRECT = "ring", "direct"


def measure_tcp(nbytes: int) -> dict[str, float]:
    """On rank 1: seconds of a round trip to rank 0, and of so many bytes. Empty on rank 0."""
    address = os.environ["MASTER_ADDR"], PORT
    if dist.get_rank() == 0:
        with socket.create_server(address) as server:
            dist.barrier()
            connection, _ = server.accept()
        with connection:
            for _ in range(ECHOES):
                connection.sendall(connection.recv(16))
            remaining = nbytes
            while remaining:
                remaining -= len(connection.recv(1 << 20))
            connection.sendall(b"all")
        return {}
    dist.barrier()
    with socket.create_connection(address) as connection:
        round_trips = []
        for _ in range(ECHOES):
            start = time.perf_counter()
            connection.sendall(bytes(16))
            connection.recv(16)
            round_trips.append(time.perf_counter() - start)
        start = time.perf_counter()
        connection.sendall(bytes(nbytes))
        connection.recv(3)
        return {"round trip": statistics.median(round_trips), "transfer": time.perf_counter() - start}


def seconds_of_waiting(steps: int, *collectives: Callable[[], object]) -> float:
    """Seconds that a step waits for its collectives, on the slowest replica; a mean over steps in a row."""
    waits = []
    for step in range(steps + 2):  # two to open connections and to get into step
        start = time.perf_counter()
        time.sleep(COMPUTE_SECONDS)
        for collective in collectives:
            collective()
        waits.append(time.perf_counter() - start - COMPUTE_SECONDS)
        if step == 1:
            waits.clear()
    slowest = torch.tensor(statistics.mean(waits), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def measure_collectives(steps: int) -> dict[str, float]:
    """Seconds of an agreement, and of an agreement and an all-gather, by where the messages go."""
    signal, own = torch.zeros(2, dtype=torch.float64), torch.zeros(GATHERED_BYTES, dtype=torch.uint8)
    collectives = Collectives()
    collectives.join()

    def agree() -> None:
        collectives.start_all_reduce_max(signal.clone(), "an agreement").read()

    def gather() -> None:
        collectives.all_gather(own)

    measured = {}
    for way in WAYS:
        if way == DIRECT:
            collectives.send_to_each()
        measured[f"agreement {way}"] = seconds_of_waiting(steps, agree)
        measured[f"both {way}"] = seconds_of_waiting(steps, agree, gather)
    return measured


def replica(folder: Path, steps: int, nbytes: int) -> None:
    """Measure one or the other or both, on a host of the lab. The last rank writes what it measured."""
    dist.init_process_group("gloo")
    measured = (measure_collectives(steps) if steps else {}) | (measure_tcp(nbytes) if nbytes else {})
    if dist.get_rank() == dist.get_world_size() - 1:
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def run(lab: Lab, steps: int = 0, nbytes: int = 0) -> dict[str, float]:
    """What the replicas of a lab measured."""
    with tempfile.TemporaryDirectory() as folder:
        lab.run([__file__, folder, str(steps), str(nbytes)], environment=quiet_environment(ROOT), timeout=120)
        measured: dict[str, float] = json.loads(Path(folder, "measured.json").read_text())
        return measured


def print_lab(rates: list[str], latencies: list[str], transfer_seconds: float, steps: int = 0) -> None:
    """Print what TCP and the delay line do; and what collectives cost there, with steps of them."""
    print(f"{'rate':>10}{'latency':>10}{'round trip':>14}{'TCP payload':>18}{'delay line':>20}")
    for rate, latency in itertools.product(rates, latencies):
        nbytes = int(bits_per_second(rate) / 8 * transfer_seconds)
        with Lab(2, rate, latency=None if latency == "0ms" else latency) as lab:
            measured = run(lab, steps, nbytes)
            cores = lab.delay_line_cpu_seconds() / measured["transfer"]
        speed = 8 * nbytes / measured["transfer"] / 1e6
        print(
            f"{rate:>10}{latency:>10}{1000 * measured['round trip']:>11.2f} ms{speed:>11.1f} Mbit/s"
            f"{100 * cores:>12.0f} % of a core",
            flush=True,
        )
        if steps:
            print_columns(rate, steps)
            print_collectives(2, latency, measured)


def print_columns(rate: str, steps: int) -> None:
    """Print what the columns of the rows of ``print_collectives`` are."""
    print(f"\non links of {rate}, {steps} steps in a row")
    columns = f"{'agreement':>12}{'in latencies':>14}{'all-gather':>14}{'in latencies':>14}"
    print(f"{'replicas':>10}{'latency':>10}{'sent':>9}{columns}")


def print_collectives(replicas: int, latency: str, measured: dict[str, float]) -> None:
    """Print what agreements and all-gathers cost."""
    for way in WAYS:
        cells = f"{replicas:>10}{latency:>10}{way:>9}"
        agreement, both = measured[f"agreement {way}"], measured[f"both {way}"]
        for time_taken in (agreement, both - agreement):
            in_latencies = f"{time_taken / seconds(latency):.1f}" if latency != "0ms" else ""
            cells += f"{1000 * time_taken:>9.1f} ms{in_latencies:>14}"
        print(cells, flush=True)


def measure_replicas(rate: str, counts: list[int], latencies: list[str], steps: int) -> None:
    """Measure and print collectives of several replicas, at several latencies."""
    print_columns(rate, steps)
    for replicas, latency in itertools.product(counts, latencies):
        with Lab(replicas, rate, latency=None if latency == "0ms" else latency) as lab:
            print_collectives(replicas, latency, run(lab, steps))


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one link, two replicas, a few steps")
    options = parser.parse_args()

    def work() -> None:
        if options.smoke:
            # One lab for both.
            print_lab(["50mbit"], ["10ms"], transfer_seconds=0.5, steps=4)
        else:
            print_lab(["12mbit", "100mbit", "500mbit", "1gbit"], ["0ms", "25ms"], transfer_seconds=4.0)
            measure_replicas("100mbit", [2, 3, 4, 8], ["0ms", "10ms", "25ms"], steps=20)

    return exit_status(work, "interrupted")


if __name__ == "__main__":
    if "RANK" in os.environ:
        replica(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    else:
        sys.exit(main())
