"""Chunks bound the memory of a sync step."""

import pytest
import torch
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def growth(rank, world, chunk):
    """Bytes that the second sync step needs beside what there was before it."""
    parameter = nn.Parameter(torch.zeros(8_000_000))
    optimizer = CurvaDion([{"params": [parameter], "algorithm": "lion"}], trigger=EveryNSteps(1))
    optimizer.register_sync_hook(ProcessGroupSync(wire_format="int4", momentum="local", chunk=chunk))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is that from here on
    before = resident("VmRSS")
    optimizer.step()
    assert optimizer.last_step.synced
    return resident("VmHWM") - before


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_getaffinity"), reason="reads /proc, which Linux has")
@pytest.mark.parametrize("world", [2, 3])
def test_peak_memory_grows_by_a_chunk_and_not_by_the_model(replicas, world):
    model = 4 * 8_000_000
    # Lion itself needs a temporary as large as the parameter.
    in_chunks, whole = (max(replicas.run(world, growth, chunk)) for chunk in (2**18, 2**30))
    assert in_chunks < 1.5 * model < 2.5 * model < whole
