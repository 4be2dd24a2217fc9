"""The dry run beside real replicas, and DDP's buckets beside real ones."""

import pytest
import torch
from models import build, exact_sync, train_step
from replicas import counted_collectives
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from examples.byte_gpt import GPT
from lightning_curvadion import CurvaDion, DriftThreshold, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.cli.plan.collective_costs import ALL_GATHER, ALL_TO_ALL, MAXIMUM
from lightning_curvadion.cli.plan.dry_run import CollectiveRecorder
from lightning_curvadion.cli.plan.footprint import ddp_buckets, dion_step_traffic, measure_footprint
from lightning_curvadion.cli.plan.launch_counter import LaunchCounter
from lightning_curvadion.sync.payload_collectives import PayloadCollectives
from lightning_curvadion.sync.payloads import TensorPayload
from lightning_curvadion.sync.quantization import WIRE_FORMATS

SETTINGS = [
    {"wire_format": "sign", "momentum": "local"},
    {"wire_format": "int2", "momentum": "factors"},
    {"wire_format": "int8", "momentum": "average", "outer_momentum": 0.5},
    {"momentum": "dion", "chunk": 1500},
    {"consensus": "factors"},
    {"consensus": "none"},
]
# The functions of torch.distributed that have another name.
FUNCTIONS = {MAXIMUM: "all_reduce"}
SYNC_STATE = ("residual", "outer_momentum")


def real_steps(rank, world):
    """For each of the settings: collectives and payload of a local and a sync step, and the memory of the state."""
    results = []
    for hook in SETTINGS:
        model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
        steps = []
        for step in range(2):
            with counted_collectives() as calls:
                train_step(model, optimizer, step, rank)
            steps.append((list(calls), optimizer.last_step.bytes_sent))
        state = [(key, t.nbytes) for s in optimizer.state.values() for key, t in s.items() if torch.is_tensor(t)]
        memory = [sum(n for key, n in state if (key in SYNC_STATE) == of_sync) for of_sync in (False, True)]
        results.append((steps, *memory))
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_a_dry_run_sends_and_stores_what_real_replicas_do(replicas, world):
    real = replicas.run(world, real_steps)[0]
    for hook, (steps, optimizer_state, residuals) in zip(SETTINGS, real, strict=True):
        with torch.device("meta"):
            model, optimizer = build()
        footprint = measure_footprint(model, optimizer, exact_sync(**hook).settings, world)
        assert (footprint.optimizer_state, footprint.residuals) == (optimizer_state, residuals), hook
        for traffic, (calls, sent) in zip((footprint.local, footprint.sync), steps, strict=True):
            recorded = [
                ("all_to_all_single", collective.nbytes // world * (world - 1))
                if collective.kind == ALL_TO_ALL
                else (FUNCTIONS.get(collective.kind, collective.kind.replace("-", "_")), collective.nbytes)
                for collective in traffic.collectives
            ]
            assert (recorded, traffic.bytes_sent) == (calls, sent), hook


def test_a_drift_takes_eight_bytes_a_step_and_anchors_in_every_format():
    footprints = {}
    for trigger in (EveryNSteps(2), DriftThreshold(0.02)):
        with torch.device("meta"):
            model, optimizer = build(trigger=trigger)
        footprints[trigger] = measure_footprint(model, optimizer, exact_sync(momentum="local").settings, 2)
        assert dion_step_traffic(model, optimizer, 2).collectives[0].nbytes == 16
    without, watched = footprints.values()
    assert [c.nbytes for c in watched.local.collectives] == [24] and watched.sync.collectives[0].nbytes == 24
    assert watched.sync.collectives[1:] == without.sync.collectives[1:]
    assert (without.anchors, watched.anchors) == (0, watched.parameters)
    assert watched.local.launches > without.local.launches, "the measurement"


def launches_of_a_mean(collectives, device):
    """Operators that launch a kernel in one mean of tensors in each format, but for the communication itself."""
    payloads = [TensorPayload(name, torch.ones(300, 5, device=device), name) for name in WIRE_FORMATS]
    with LaunchCounter() as counter:
        collectives.average(payloads)
    communication = {"allgather_", "alltoall_base_", "any", "_local_scalar_dense"}
    return {name: count for name, count in counter.launches.items() if name not in communication}


def real_launches(rank, world):
    collectives = PayloadCollectives(chunk=2000)
    collectives.join()
    return launches_of_a_mean(collectives, "cpu")


@pytest.mark.parametrize("world", [2, 3])
def test_a_dry_run_launches_the_kernels_that_real_replicas_do(replicas, world):
    real = replicas.run(world, real_launches)[0]
    assert launches_of_a_mean(CollectiveRecorder(world, chunk=2000), "meta") == real


def test_a_sync_step_of_a_thousand_replicas_launches_as_many_kernels_as_one_of_four():
    with torch.device("meta"):
        model = GPT(layers=2, width=256, heads=4, context=64)
        optimizer = CurvaDion(split_parameters(model))
    of_four, of_thousand = (
        measure_footprint(model, optimizer, ProcessGroupSync(wire_format="sign").settings, replicas).sync.launches
        for replicas in (4, 1024)
    )
    assert 0 < of_thousand <= 1.05 * of_four


def buckets_of_ddp(rank, world):
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT(layers=4, width=320, heads=4, context=8))
    sizes = []

    def record(_, bucket):
        sizes.append(bucket.buffer().nbytes)
        return torch.futures.collect_all([]).then(lambda _: bucket.buffer())

    model.register_comm_hook(None, record)
    for _ in range(2):  # rebuilt in the order of the first backward pass
        sizes.clear()
        model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    return sizes, [tuple(p.shape) for p in model.parameters()]


def test_buckets_are_those_of_ddp(replicas):
    real, shapes = replicas.run(2, buckets_of_ddp)[0]
    predicted = ddp_buckets([torch.empty(shape, device="meta") for shape in shapes])
    assert len(predicted) == len(real) > 1 and sum(predicted) == sum(real)
    assert predicted == pytest.approx(real, rel=0.1)


def test_with_overlap_the_question_is_a_stage_and_each_kind_of_all_chunks_is_another():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    settings = ProcessGroupSync(chunk=1000, overlap=4).settings
    footprint = measure_footprint(model, CurvaDion(split_parameters(model)), settings, replicas=3)
    question, shards, means = footprint.sync.stages
    assert [{each.kind for each in stage} for stage in (question, shards, means)] == [
        {MAXIMUM},
        {ALL_TO_ALL},
        {ALL_GATHER},
    ]
    assert len(question) == 1 and len(shards) == len(means) > 4
    assert sorted(map(str, question + shards + means)) == sorted(map(str, footprint.sync.collectives[1:]))
    assert footprint.copies == sum(4 * parameter.numel() for parameter in model.parameters())
