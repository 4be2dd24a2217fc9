"""``bytes_sent`` beside the bytes that the kernel counted, between two network namespaces joined by veth."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What a collective of gloo costs beside its payload: 660 to 750 bytes of frames and acknowledgements (pytest -s
# prints them).
ALLOWANCE = 1000

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs Linux, root and iproute2 (apt-get install iproute2) for network namespaces",
)


@pytest.fixture
def hosts():
    """Names of two namespaces and of the interface in each."""
    mark = f"curv{os.getpid()}"
    names, interfaces = [f"{mark}a", f"{mark}b"], [f"v{os.getpid()}a", f"v{os.getpid()}b"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                interfaces[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                interfaces[1],
                "netns",
                names[1],
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not to be had here: {error.stderr.decode().strip()}")
        for number, (name, interface) in enumerate(zip(names, interfaces, strict=True), start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, interfaces, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def counted(hosts, folder, settings):
    """(kernel bytes, payload, steps) of each phase of each replica."""
    script = Path(__file__).with_name("network_replica.py")
    processes = [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                script,
                str(rank),
                folder / "store",
                interface,
                json.dumps(settings),
            ],
            env={**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (name, interface) in enumerate(hosts)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": "local", "wire_format": "bfloat16"}, {"consensus": "none"}], ids=str
)
def test_the_kernel_counts_what_bytes_sent_says(hosts, tmp_path, settings):
    for phases in counted(hosts, tmp_path, settings):
        for phase, (kernel, payload, steps) in phases.items():
            collectives = steps * (4 if phase.startswith("sync") else 1) + 2  # and two barriers
            print(f"{settings} {phase}: kernel {kernel}, payload {payload}, {collectives} collectives")
            assert payload <= kernel <= 1.1 * payload + ALLOWANCE * collectives
        assert phases["local"][1] == 8 * 16
        assert phases["sync"][1] > 1000 * phases["local"][1] / phases["local"][2]
