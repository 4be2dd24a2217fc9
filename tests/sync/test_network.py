"""``bytes_sent`` beside the bytes that the kernel counts, between two hosts of a network lab."""

import json

import pytest
from lab_replicas import run_on_hosts

from examples.benchmarks.netlab import Lab, missing

# Frames and acknowledgements of one collective of gloo: 660 to 750 bytes (``pytest -s`` prints them).
ALLOWANCE = 1000
# Frames of 66 bytes that acknowledge a packet alone: as many as a step has packets, where it comes after 40 ms.
ACKNOWLEDGEMENTS = 6 * 66

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"missing for a network lab: {missing()}")


SMALL = [
    {},
    {"momentum": "local", "wire_format": "bfloat16"},
    {"momentum": "average", "wire_format": "int4"},
    {"consensus": "none"},
]
LOCAL = {"momentum": "local"}
MOST = {"int8": 1 / 3.7, "int4": 1 / 7, "int2": 1 / 13, "sign": 1 / 25}
GPT = [LOCAL, {}, *[{**LOCAL, "wire_format": wire_format} for wire_format in MOST], {"wire_format": "int2"}]


def measure(folder, settings, processes=1):
    """By model: for each of its settings and each process, (kernel bytes of its host, payload, steps) of each phase."""
    with Lab(hosts=2) as lab:
        run_on_hosts(lab, "network_replica.py", folder, json.dumps(settings), processes=processes)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2 * processes)]
    return {model: list(zip(*[rank[model] for rank in ranks], strict=True)) for model in settings}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("measured"), {"small": SMALL, "gpt": GPT})


def test_bytes_sent_is_what_the_kernel_counts(measured):
    for hook, replicas in zip(SMALL, measured["small"], strict=True):
        for phases in replicas:
            for phase, (kernel, payload, steps) in phases.items():
                collectives = steps * (3 if phase.startswith("sync") else 1) + 2  # and two barriers
                print(f"{hook} {phase}: kernel {kernel}, payload {payload}, {collectives} collectives")
                assert payload <= kernel <= 1.1 * payload + ALLOWANCE * collectives
            assert phases["local"][1] == 8 * 16
            assert phases["sync"][1] > 1000 * phases["local"][1] / phases["local"][2]


def test_a_quantized_sync_step_sends_a_fraction_of_one_in_float32(measured):
    # The whole sync step, agreement included, of the host that sent more.
    steps = [max(phases["sync again"][0] for phases in replicas) for replicas in measured["gpt"]]
    for (wire_format, bound), step in zip(MOST.items(), steps[2:-1], strict=True):
        print(f"momentum=local, {wire_format}: {step} bytes, 1/{steps[0] / step:.1f} of {steps[0]} in float32")
        assert step <= bound * steps[0]
    print(f"momentum=factors, int2 and int4: {steps[-1]} bytes, 1/{steps[1] / steps[-1]:.1f} of {steps[1]} in float32")
    assert steps[-1] <= steps[1] / 8


def test_two_hosts_of_two_processes_send_what_two_hosts_of_one_do(measured, tmp_path):
    of_two = measure(tmp_path, {"small": SMALL[1:2]}, processes=2)["small"][0]
    of_one = measured["small"][1]
    for host in (0, 1):
        for phase, (kernel, payload, steps) in of_one[host].items():
            by_two, payload_of_two, _ = of_two[2 * host][phase]
            # Inside of a sync step each process has collectives of its own, and so has each of the two barriers.
            more = (2 if phase.startswith("sync") else 0) + 2
            print(f"{phase}, host {host}: {by_two} bytes of two processes, {kernel} of one, in {steps} steps")
            assert by_two <= kernel + ALLOWANCE * more + ACKNOWLEDGEMENTS * steps
            assert payload_of_two == pytest.approx(payload, rel=0.01)
