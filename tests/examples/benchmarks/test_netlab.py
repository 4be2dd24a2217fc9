"""The network lab: namespaces, rate limits, failures, and nothing left behind."""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

import pytest

from examples.benchmarks import netlab
from examples.benchmarks.netlab import Lab, LabError, bits_per_second, missing, seconds

pytestmark = pytest.mark.alone
needs_network = pytest.mark.skipif(bool(missing()), reason=f"missing for a network lab: {missing()}")

ALL_REDUCE = """
import datetime, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
values = torch.ones(int(sys.argv[2]))
dist.all_reduce(values)
dist.barrier()
start = time.perf_counter()
dist.all_reduce(values)
seconds = time.perf_counter() - start
result = f"{os.environ['GROUP_RANK']} {dist.get_world_size()} {values[0].item():.0f} {seconds}"
Path(sys.argv[1], os.environ["RANK"]).write_text(result)
dist.destroy_process_group()
"""
# Rank 1 sends to rank 0 over TCP: 16 bytes there and back again, then five megabytes. Then 16 bytes of gloo from a
# common start: the hosts share a clock.
PING_PONG = """
import datetime, json, os, socket, sys, time
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
address, measured = (os.environ["MASTER_ADDR"], 5000), {}
if dist.get_rank() == 0:
    with socket.create_server(address) as server:
        dist.barrier()
        connection, _ = server.accept()
    while pinged := connection.recv(16):
        connection.sendall(pinged)
    with socket.create_server(address) as server:
        dist.barrier()
        connection, _ = server.accept()
    while connection.recv(1 << 20):
        pass
    connection.close()
else:
    dist.barrier()
    with socket.create_connection(address) as connection:
        measured["echo"] = []
        for _ in range(10):
            start = time.perf_counter()
            connection.sendall(bytes(16))
            connection.recv(16)
            measured["echo"].append(time.perf_counter() - start)
    dist.barrier()
    with socket.create_connection(address) as connection:
        start = time.perf_counter()
        connection.sendall(bytes(5_000_000))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        measured["five megabytes"] = [time.perf_counter() - start]
measured["all-reduce"] = []
for _ in range(5):
    start = torch.tensor(time.perf_counter() + 0.1, dtype=torch.float64)
    dist.all_reduce(start, op=dist.ReduceOp.MAX)
    time.sleep(max(0.0, start.item() - time.perf_counter()))
    dist.all_reduce(torch.zeros(2, dtype=torch.float64), op=dist.ReduceOp.MAX)
    measured["all-reduce"].append(time.perf_counter() - start.item())
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(measured))
dist.destroy_process_group()
"""
HANGING = "import os, sys, time\nopen(os.path.join(sys.argv[1], os.environ['RANK']), 'w').close()\ntime.sleep(300)\n"
FAILING = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('the disk is full')\ntime.sleep(300)\n"


def script(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def results(folder, world):
    """What the hosts wrote: (host, world size, first value, seconds)."""
    return [(folder / str(rank)).read_text().split() for rank in range(world)]


def namespaces_of(pid):
    """Namespaces of the lab of a process."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in names.splitlines() if line.startswith(f"netlab{pid}-")]


def processes_in(folder):
    """Processes with the folder on their command line."""
    return subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()


def processes_of_the_switch(pid):
    """What runs in the switch of a lab: the delay line, if it has one."""
    return subprocess.run(["ip", "netns", "pids", f"netlab{pid}-switch"], capture_output=True, text=True).stdout.split()


def ended(pids):
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def start_hanging_lab(folder, *options):
    """A lab in a process of its own, whose two hosts have started."""
    command = [sys.executable, netlab.__file__, "--hosts", "2", *options, "--", script(folder, HANGING), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: (folder / "0").exists() and (folder / "1").exists())
        assert len(namespaces_of(process.pid)) == 3, "two hosts and the switch"
    except BaseException:
        process.terminate()
        raise
    return process


@needs_network
def test_hosts_communicate_at_the_rate_and_the_kernel_counts(tmp_path):
    with Lab(hosts=3, rate="20mbit") as lab:
        lab.run([script(tmp_path, ALL_REDUCE), str(tmp_path), "250000"], timeout=100)
        traffic = lab.traffic()
    assert [result[:3] for result in results(tmp_path, 3)] == [[str(host), "3", "9"] for host in range(3)]
    # In a ring each host sends 4/3 of the megabyte, which takes 0.53 s, and does so twice.
    assert all(0.5 <= float(result[3]) < 1.2 for result in results(tmp_path, 3))
    assert all(2.6e6 < host.sent < 3.1e6 and 2.6e6 < host.received < 3.1e6 for host in traffic)
    assert namespaces_of(os.getpid()) == []


@needs_network
def test_every_frame_takes_the_latency_and_the_rate_is_still_reached(tmp_path):
    with Lab(hosts=2, rate="50mbit", latency="25ms") as lab:
        lab.run([script(tmp_path, PING_PONG), str(tmp_path)], timeout=100)
        traffic = lab.traffic()
        delay_line = processes_of_the_switch(os.getpid())
    server, client = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    print(client, traffic)
    assert min(client["echo"]) >= 0.05 and statistics.median(client["echo"]) < 0.055
    # 0.8 s at that rate, a round trip, and slow start.
    assert 0.85 <= client["five megabytes"][0] < 1.2
    # To the other and back, and before that the notice that the other is ready to receive.
    slowest = [max(pair) for pair in zip(server["all-reduce"], client["all-reduce"], strict=True)]
    assert min(slowest) >= 0.05 and statistics.median(slowest) < 0.085
    # In both directions, the same bytes arrive as are sent.
    for one, other in (traffic, traffic[::-1]):
        assert one.sent == pytest.approx(other.received, abs=2000)
    assert 5_000_000 < traffic[1].sent < 5_300_000
    assert len(delay_line) == 1 and ended(delay_line) and namespaces_of(os.getpid()) == []


@needs_network
def test_a_lab_whose_delay_line_ended_ends_the_run(tmp_path):
    with Lab(hosts=2, latency="5ms") as lab:
        (delay_line,) = processes_of_the_switch(os.getpid())
        threading.Timer(1.0, os.kill, (int(delay_line), signal.SIGKILL)).start()
        with pytest.raises(LabError, match="the delay line ended"):
            lab.run([script(tmp_path, HANGING), str(tmp_path)], timeout=100)
    assert processes_in(tmp_path) == [] and namespaces_of(os.getpid()) == []


@needs_network
def test_a_lab_without_a_delay_line_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(netlab, "_DELAY_LINE", script(tmp_path, "raise SystemExit('no such device')"))
    with pytest.raises(LabError, match="the delay line did not start: no such device"), Lab(hosts=1, latency="5ms"):
        pass
    assert namespaces_of(os.getpid()) == []


@needs_network
def test_a_host_that_fails_ends_the_run(tmp_path):
    start = time.monotonic()
    with Lab(hosts=2) as lab, pytest.raises(LabError, match=r"host 1 ended with exit status 1[\s\S]*the disk is full"):
        lab.run([script(tmp_path, FAILING)], timeout=100)
    assert time.monotonic() - start < 60
    assert namespaces_of(os.getpid()) == []


@needs_network
def test_a_run_that_takes_too_long_ends(tmp_path):
    with Lab(hosts=2) as lab, pytest.raises(LabError, match="host 0 did not end within 3 s"):
        lab.run([script(tmp_path, HANGING), str(tmp_path)], timeout=3)
    assert processes_in(tmp_path) == []


@needs_network
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(tmp_path, ending):
    process = start_hanging_lab(tmp_path, "--rate", "100mbit", "--latency", "5ms")
    delay_line = processes_of_the_switch(process.pid)
    try:
        process.send_signal(ending)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert namespaces_of(process.pid) == [] and processes_in(tmp_path) == []
    assert len(delay_line) == 1 and ended(delay_line)


@needs_network
def test_the_next_lab_removes_what_a_killed_one_left(tmp_path):
    process = start_hanging_lab(tmp_path, "--latency", "5ms")
    delay_line = processes_of_the_switch(process.pid)
    process.kill()
    process.wait()
    assert len(namespaces_of(process.pid)) == 3 and len(delay_line) == 1
    wait_for(lambda: ended(delay_line), 10)
    with Lab(hosts=1):
        assert namespaces_of(process.pid) == []
    wait_for(lambda: processes_in(tmp_path) == [], 10)


def test_without_ip_the_error_names_what_is_missing_and_loopback_works(monkeypatch, tmp_path):
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: None)
    with pytest.raises(LabError, match=r"ip \(apt-get install iproute2\).*--loopback"), Lab(hosts=2):
        pass
    with Lab(hosts=2, loopback=True) as lab:
        lab.run([script(tmp_path, ALL_REDUCE), str(tmp_path), "10"], timeout=100)
        assert lab.traffic() == []
    assert [result[:3] for result in results(tmp_path, 2)] == [["0", "2", "4"], ["1", "2", "4"]]


@pytest.mark.parametrize(("rate", "bits"), [("20mbit", 20e6), ("1gbit", 1e9), ("1.5Mbit", 1.5e6), ("300bit", 300)])
def test_rates(rate, bits):
    assert bits_per_second(rate) == bits


@pytest.mark.parametrize(("latency", "expected"), [("25ms", 0.025), ("0.5s", 0.5), ("1.5ms", 0.0015), ("50us", 5e-5)])
def test_latencies(latency, expected):
    assert seconds(latency) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 0}, "at least one host"),
        ({"hosts": 2, "rate": "fast"}, "a rate is written like 30mbit"),
        ({"hosts": 2, "rate": "1mbit", "loopback": True}, "loopback has no rate limit"),
        ({"hosts": 2, "latency": "25"}, "a latency is written like 25ms"),
        ({"hosts": 2, "latency": "0ms"}, "is above zero"),
        ({"hosts": 2, "latency": "25ms", "loopback": True}, "loopback has no rate limit and no latency"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(LabError, match=message), Lab(**arguments):
        pass
