"""Chunks bound the memory of a sync step."""

import pytest
import torch
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync
from lightning_curvadion.sync.collectives import Collectives


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def growth_during(function):
    """Bytes that a function needs beside what there was before it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is that from here on
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def growth(rank, world, chunk):
    """Bytes that the second sync step needs beside what there was before it."""
    parameter = nn.Parameter(torch.zeros(8_000_000))
    optimizer = CurvaDion([{"params": [parameter], "algorithm": "lion"}], trigger=EveryNSteps(1))
    optimizer.register_sync_hook(ProcessGroupSync(wire_format="int4", momentum="local", chunk=chunk))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    grown = growth_during(optimizer.step)
    assert optimizer.last_step.synced
    return grown


def growth_of_a_broadcast(rank, world, numel):
    """Bytes that a broadcast needs beside the tensor."""
    collectives = Collectives(chunk=2**16)
    collectives.join()
    tensor = torch.full((numel // 8, 8), float(rank))
    grown = growth_during(lambda: collectives.broadcast([torch.ones(3), tensor]))
    assert not tensor.any()
    return grown


needs_proc = pytest.mark.skipif(
    not hasattr(__import__("os"), "sched_getaffinity"), reason="reads /proc, which Linux has"
)


@needs_proc
@pytest.mark.parametrize("world", [2, 3])
def test_peak_memory_grows_by_a_chunk_and_not_by_the_model(replicas, world):
    model = 4 * 8_000_000
    # Lion itself needs a temporary as large as the parameter.
    in_chunks, whole = (max(replicas.run(world, growth, chunk)) for chunk in (2**18, 2**30))
    assert in_chunks < 1.2 * model < 1.5 * model < whole


@needs_proc
def test_a_large_tensor_is_broadcast_without_a_copy(replicas):
    numel = 16_000_000
    assert max(replicas.run(2, growth_of_a_broadcast, numel)) < numel
