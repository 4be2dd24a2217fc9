"""Runs scripts of this folder on the hosts of a network lab, in processes that have imported torch already."""

import ctypes
import os
from pathlib import Path

import preloaded
from training import ROOT, python_path

from examples.benchmarks.netlab import INTERFACE, PORT, Lab

_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET


def run_on_hosts(lab: Lab, script: str, folder: Path, *arguments: str, processes: int = 1) -> None:
    """Run a script on every host, and wait for its end. It gets the folder, the arguments and its host's namespace.

    torchrun would import torch on every host, and so would every process that it starts.
    """
    world = processes * lab.hosts
    group = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": lab.address(0)}
    group |= {"MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE, "PYTHONPATH": python_path(ROOT)}
    started = [
        preloaded.start(
            ROOT / "tests/helpers" / script,
            *(str(folder), *arguments, lab._namespace(rank // processes)),
            folder=folder,
            output=folder / f"output{rank}",
            **{"RANK": str(rank), **group},
        )
        for rank in range(world)
    ]
    statuses = [process.wait(timeout=90) for process in started]
    assert not any(statuses), "\n".join(path.read_text() for path in sorted(folder.glob("output*")))


def move_to_host(namespace: str) -> None:
    """Put this process on a host of the lab, as ``ip netns exec`` does, but for what ``/sys`` shows."""
    outside = os.readlink("/proc/self/ns/net")
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NETWORK_NAMESPACE):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    assert os.readlink("/proc/self/ns/net") != outside


def kernel_sent() -> int:
    """Bytes that this process's host has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        interface, _, counts = line.partition(":")
        if interface.strip() == INTERFACE:
            return int(counts.split()[8])
    raise LookupError(INTERFACE)
