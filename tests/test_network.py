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


def counted(hosts, folder, model, settings):
    """For each of the settings and each replica, (kernel bytes, payload, steps) of each phase."""
    script = Path(__file__).with_name("network_replica.py")
    processes = [
        subprocess.Popen(
            [
                *f"ip netns exec {name} {sys.executable} {script} {rank}".split(),
                *(folder / "store", interface, model, json.dumps(settings)),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(script.parents[1]),
                "GLOO_SOCKET_IFNAME": interface,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (name, interface) in enumerate(hosts)
    ]
    try:
        outputs = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return list(zip(*[json.loads(out.splitlines()[-1]) for out, _ in outputs], strict=True))


def test_the_kernel_counts_what_bytes_sent_says(hosts, tmp_path):
    settings = [
        {},
        {"momentum": "local", "wire_format": "bfloat16"},
        {"momentum": "average", "wire_format": "int4"},
        {"consensus": "none"},
    ]
    for hook, replicas in zip(settings, counted(hosts, tmp_path, "small", settings), strict=True):
        for phases in replicas:
            for phase, (kernel, payload, steps) in phases.items():
                collectives = steps * (3 if phase.startswith("sync") else 1) + 2  # and two barriers
                print(f"{hook} {phase}: kernel {kernel}, payload {payload}, {collectives} collectives")
                assert payload <= kernel <= 1.1 * payload + ALLOWANCE * collectives
            assert phases["local"][1] == 8 * 16
            assert phases["sync"][1] > 1000 * phases["local"][1] / phases["local"][2]


def test_a_sync_step_in_few_bits_beside_one_in_float32(hosts, tmp_path):
    local = {"momentum": "local"}
    most = {"int8": 1 / 3.7, "int4": 1 / 7, "int2": 1 / 13, "sign": 1 / 25}
    settings = [local, {}, *[{**local, "wire_format": wire_format} for wire_format in most], {"wire_format": "int2"}]
    # The whole sync step, agreement included, at the end that the kernel says sent more.
    steps = [
        max(phases["sync again"][0] for phases in replicas) for replicas in counted(hosts, tmp_path, "gpt", settings)
    ]
    for (wire_format, bound), step in zip(most.items(), steps[2:-1], strict=True):
        print(f"momentum=local, {wire_format}: {step} bytes, 1/{steps[0] / step:.1f} of {steps[0]} in float32")
        assert step <= bound * steps[0]
    print(f"momentum=factors, int2 and int4: {steps[-1]} bytes, 1/{steps[1] / steps[-1]:.1f} of {steps[1]} in float32")
    assert steps[-1] <= steps[1] / 8
