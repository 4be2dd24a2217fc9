"""The network lab: real namespaces, real limits, real failures, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.benchmarks import netlab
from examples.benchmarks.netlab import Lab, LabError, bits_per_second, missing

needs_network = pytest.mark.skipif(bool(missing()), reason=f"missing for a network lab: {missing()}")
LAB = Path(netlab.__file__)

MEETING = """
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
told = f"{os.environ['GROUP_RANK']} {dist.get_world_size()} {values[0].item():.0f} {seconds}"
Path(sys.argv[1], os.environ["RANK"]).write_text(told)
dist.destroy_process_group()
"""
HANGING = "import os, sys, time\nopen(os.path.join(sys.argv[1], os.environ['RANK']), 'w').close()\ntime.sleep(300)\n"
FAILING = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('the disk is full')\ntime.sleep(300)\n"


def script(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def told(folder, world):
    return [(folder / str(rank)).read_text().split() for rank in range(world)]


def of_process(pid):
    """Namespaces that a lab of this process has now."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in names.splitlines() if line.startswith(f"netlab{pid}-")]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@needs_network
def test_hosts_meet_and_the_kernel_counts(tmp_path):
    with Lab(hosts=3) as lab:
        lab.run([script(tmp_path, MEETING), str(tmp_path), "250000"], timeout=100)
        traffic = lab.traffic()
    assert [words[:3] for words in told(tmp_path, 3)] == [[str(host), "3", "9"] for host in range(3)]
    # Each host sends 4/3 of the megabyte in a ring, twice.
    assert all(2.6e6 < counted.sent < 3.1e6 and 2.6e6 < counted.received < 3.1e6 for counted in traffic)
    assert of_process(os.getpid()) == []


@needs_network
def test_a_limited_link_is_as_slow_as_it_says(tmp_path):
    with Lab(hosts=2, rate="20mbit") as lab:
        lab.run([script(tmp_path, MEETING), str(tmp_path), "500000"], timeout=100)
    seconds = float(told(tmp_path, 2)[0][3])
    assert 0.8 <= seconds < 1.6  # 2 MB at 20 Mbit/s take 0.8 s


@needs_network
def test_a_host_that_fails_ends_the_run(tmp_path):
    start = time.monotonic()
    with Lab(hosts=2) as lab, pytest.raises(LabError, match=r"host 1 ended with exit status 1[\s\S]*the disk is full"):
        lab.run([script(tmp_path, FAILING)], timeout=100)
    assert time.monotonic() - start < 60
    assert of_process(os.getpid()) == []


@needs_network
def test_a_run_that_takes_too_long_ends(tmp_path):
    with Lab(hosts=2) as lab, pytest.raises(LabError, match="host 0 did not end within 12 s"):
        lab.run([script(tmp_path, HANGING), str(tmp_path)], timeout=12)
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


@needs_network
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(tmp_path, ending):
    command = [
        sys.executable,
        str(LAB),
        "--hosts",
        "2",
        "--rate",
        "100mbit",
        "--",
        script(tmp_path, HANGING),
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        assert len(of_process(process.pid)) == 3
        process.send_signal(ending)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert of_process(process.pid) == []
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


@needs_network
def test_the_next_lab_removes_what_a_killed_one_left(tmp_path):
    command = [sys.executable, str(LAB), "--hosts", "2", "--", script(tmp_path, HANGING), str(tmp_path)]
    process = subprocess.Popen(command)
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    process.kill()
    process.wait()
    assert len(of_process(process.pid)) == 3
    with Lab(hosts=1):
        assert of_process(process.pid) == []
    wait_for(lambda: subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b"", 10)


def test_without_ip_it_says_what_is_missing_and_what_works(monkeypatch, tmp_path):
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: None)
    with pytest.raises(LabError, match=r"ip \(apt-get install iproute2\).*--loopback"), Lab(hosts=2):
        pass
    with Lab(hosts=2, loopback=True) as lab:
        lab.run([script(tmp_path, MEETING), str(tmp_path), "10"], timeout=100)
        assert lab.traffic() == []
    assert [words[:3] for words in told(tmp_path, 2)] == [["0", "2", "4"], ["1", "2", "4"]]


@pytest.mark.parametrize(("rate", "bits"), [("20mbit", 20e6), ("1gbit", 1e9), ("1.5Mbit", 1.5e6), ("300bit", 300)])
def test_rates(rate, bits):
    assert bits_per_second(rate) == bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 0}, "at least one host"),
        ({"hosts": 2, "rate": "fast"}, "a rate is written like 30mbit"),
        ({"hosts": 2, "rate": "1mbit", "loopback": True}, "loopback has no rate limit"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(LabError, match=message), Lab(**arguments):
        pass
