"""Agreements that nobody waits for: the same branches, an end for all at once, and what goes wrong."""

import time

import breaking
import preloaded
import pytest
import torch
import torch.distributed as dist
from launching import free_port
from models import build, parameters_of, train_step
from paces import HETEROGENEOUS, every, steps_per_agreement
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import CurvaDion, DriftThreshold, EveryNSteps, IntegratedRMMC, ProcessGroupSync
from lightning_curvadion.sync.errors import UnevenBatchesError

# -- what travels, and waits ------------------------------------------------------------------------------------------


def sizes(rank, world, trigger):
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=trigger)
    sent = []
    with steps_per_agreement(every(2 - rank)):
        for step in range(3 if rank else 6):
            with counted_collectives() as calls:
                train_step(model, optimizer, step, shard=rank)
            sent.append([size for _, size in calls])
            assert optimizer.last_step.bytes_sent == sum(sent[-1])
        # Or its process group would end before the last has arrived.
        optimizer.sync_hook.agreement.read(optimizer)
    return sent


@pytest.mark.parametrize(("trigger", "size"), [(EveryNSteps(99), 48), (DriftThreshold(99.0), 56)])
def test_a_step_that_reads_no_agreement_sends_nothing(replicas, trigger, size):
    fast, slow = replicas.run(2, sizes, trigger)
    assert fast == [[size], [], [size], [], [size], []]
    assert slow == [[size]] * 3


SLOW, FAST = 0.4, 0.05


def paces(rank, world, overlap):
    """Steps of a fast and a slow replica, their syncs, and in how many steps the fast one waited for the other."""
    hook = {**HETEROGENEOUS, "wire_format": "sign", "overlap": overlap}
    optimizer = CurvaDion([nn.Parameter(torch.zeros(4, 4))], trigger=EveryNSteps(2))
    optimizer.register_sync_hook(sync := ProcessGroupSync(**hook))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    waits, steps = 0, 0
    while sync.global_step < 24:
        time.sleep(SLOW if rank else FAST)
        start = time.monotonic()
        optimizer.step()
        waits += time.monotonic() - start > SLOW / 2
        steps += 1
    sync.reach_consensus(optimizer)
    return steps, optimizer.sync_steps, waits


def test_a_fast_replica_takes_more_steps_and_waits_for_none_of_the_slow_one(replicas):
    (fast, syncs, waits), (slow, other_syncs, _) = replicas.run(2, paces, 1)
    assert syncs == other_syncs >= 3
    assert fast > 3 * slow
    # A machine with other jobs may stop a process for so long once.
    assert waits <= 1


def test_without_an_overlap_it_waits_for_a_step_at_every_sync(replicas):
    (fast, syncs, waits), (slow, _, _) = replicas.run(2, paces, 0)
    assert fast > slow and syncs - 1 <= waits


# -- global step, and the end -----------------------------------------------------------------------------------------


def global_steps(rank, world):
    model, optimizer = build(hook=HETEROGENEOUS, trigger=EveryNSteps(4))
    sync = optimizer.sync_hook
    sync.global_step = 100
    seen = [sync.global_step]
    with steps_per_agreement(every(3 if rank == 0 else 1)):
        step = 0
        while sync.global_step < 110:
            train_step(model, optimizer, step, shard=rank)
            step += 1
            if sync.global_step != seen[-1]:
                seen.append(sync.global_step)
        sync.reach_consensus(optimizer, include_state=True)
    return step, seen, parameters_of(model)


def test_the_global_step_is_the_mean_and_ends_all_loops_at_one_agreement(replicas):
    (fast, seen, parameters), (slow, other_seen, others) = replicas.run(2, global_steps)
    assert (fast, slow) == (19, 7)
    assert seen == other_seen == [100, 101, 103, 105, 107, 109, 111]
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def ends_at_a_step_of_its_own(rank, world):
    model, optimizer = build(hook=HETEROGENEOUS, trigger=EveryNSteps(4))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    try:
        for _ in range(8):
            time.sleep(0.05 * rank)
            optimizer.step()
        optimizer.sync_hook.reach_consensus(optimizer)
    except UnevenBatchesError as error:
        return str(error)


def test_a_consensus_at_steps_of_their_own_is_an_error_on_all_and_not_a_hang(replicas):
    for message in replicas.run(3, ends_at_a_step_of_its_own):
        assert "`while sync.global_step < total`" in message and "another rank" in message


def test_without_it_there_is_no_global_step():
    with pytest.raises(ValueError, match="or use heterogeneous=True"):
        ProcessGroupSync().global_step  # noqa: B018


# -- what goes wrong --------------------------------------------------------------------------------------------------


def not_finite(rank, world, overlap, bad_rank):
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign", "overlap": overlap}, trigger=EveryNSteps(2))
    sync, raised = optimizer.sync_hook, None
    with steps_per_agreement(every(3 if rank == 0 else 1)):
        try:
            for step in range(40):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 0.01 * (step + rank))
                if rank == bad_rank and step == 7:
                    model.up[1].weight.grad[0, 0] = float("nan")
                optimizer.step()
        except ValueError as error:
            raised = sync.global_step, str(error)
        sync.reach_consensus(optimizer, include_state=True)
    return raised, parameters_of(model)


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("overlap", [0, 2])
def test_a_bad_gradient_of_one_replica_is_raised_on_all_at_the_same_agreement(replicas, overlap, bad_rank):
    answers = replicas.run(2, not_finite, overlap, bad_rank)
    assert len({step for (step, _), _ in answers}) == 1
    for (_, message), parameters in answers:
        assert f"rank {bad_rank}: up.1.weight has a gradient that is not finite" in message
        assert all(bool(torch.isfinite(p).all()) for p in parameters)
        assert all(torch.equal(a, b) for a, b in zip(parameters, answers[0][1], strict=True))


def stopping(rank, world):
    """Each replica ends at the step that reads the request; the slow one asks between two agreements of the fast."""
    model, optimizer = build(hook=HETEROGENEOUS, trigger=EveryNSteps(3))
    sync = optimizer.sync_hook
    with steps_per_agreement(every(4 - rank)):
        for step in range(60):
            # Withdrawn before an agreement starts.
            sync.agreement.stop_request = 0.5 if rank == 0 and step == 6 else 0.0
            train_step(model, optimizer, step, shard=rank)
            if sync.agreement.agreed_request:
                break
        sync.reach_consensus(optimizer)
    return sync.agreement.agreed_request, sync.global_step, step


def test_a_stop_request_is_agreed_on_at_the_same_agreement(replicas):
    (request, at, fast), (other_request, other_at, slow) = replicas.run(2, stopping)
    assert request == other_request == 0.5
    assert at == other_at > 0 and 6 < fast < 14 and slow < fast


def rolled_back(rank, world, whose):
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=EveryNSteps(4), lr=0.05)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sync, step, loaded = optimizer.sync_hook, 0, False
    with steps_per_agreement(every(2 - rank)):
        while sync.global_step < 30:
            if sync.global_step >= 9 and not loaded:
                loaded = True
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
                if rank in whose:
                    model.load_state_dict(start)
            train_step(model, optimizer, step, shard=rank)
            step += 1
        sync.reach_consensus(optimizer)
    return parameters_of(model), [start[name] for name, _ in model.named_parameters()]


def test_a_rollback_stays_where_it_is(replicas):
    for parameters, loaded in replicas.run(2, rolled_back, [0, 1]):
        torch.testing.assert_close(parameters, loaded, rtol=1e-6, atol=1e-7)


def test_a_rollback_of_one_rank_ends_equal_on_all(replicas):
    (parameters, loaded), (others, _) = replicas.run(2, rolled_back, [1])
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters, loaded, strict=True))


# A fast replica, and a slow one that is killed while the other takes local steps, or waits for a mean.
KILLED = """
import os, signal, sys, time
import torch.distributed as dist
from models import build, train_step
from lightning_curvadion import EveryNSteps
dist.init_process_group("gloo")
rank, hook = dist.get_rank(), {"heterogeneous": True, "lag": 1, "momentum": "displacement", "overlap": int(sys.argv[1])}
model, optimizer = build(hook=hook, trigger=EveryNSteps(4))
for step in range(100 if rank else 100000):
    if rank == 1 and step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02 * rank)
    train_step(model, optimizer, step, rank)
"""


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_replica_that_is_killed_is_an_error_of_the_other_and_not_a_hang(tmp_path, overlap):
    (tmp_path / "loop.py").write_text(KILLED)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        preloaded.start(
            tmp_path / "loop.py", str(overlap), folder=tmp_path, output=tmp_path / f"rank{rank}",
            **breaking.environment(**group, RANK=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert [process.wait(60) for process in ranks] == [1, -9]
    finally:
        for process in ranks:
            process.kill()
    assert "ReplicaLostError: Read what rank 1 printed, if it could, and restart" in (tmp_path / "rank0").read_text()


def saved(rank, world, path):
    """A run that is saved at a consensus and goes on, beside one that resumes from there."""
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=IntegratedRMMC(0.3))
    sync, step = optimizer.sync_hook, 0
    with steps_per_agreement(every(2 - rank)):
        while sync.global_step < 12:
            train_step(model, optimizer, step, shard=rank)
            step += 1
        sync.reach_consensus(optimizer, include_state=True)
        if rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": sync.global_step}, path)
        dist.barrier()
    checkpoint = torch.load(path, weights_only=True)
    resumed_model, resumed = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=IntegratedRMMC(0.3), seed=1)
    resumed_model.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    resumed.sync_hook.global_step = checkpoint["at"]
    ends = []
    for one_model, one in ((model, optimizer), (resumed_model, resumed)):
        with steps_per_agreement(every(2 - rank)):
            number = step
            while one.sync_hook.global_step < 30:
                train_step(one_model, one, number, shard=rank)
                number += 1
            one.sync_hook.reach_consensus(one)
        ends.append((parameters_of(one_model), one.sync_steps))
    return ends


def test_a_saved_run_resumes_at_its_global_step(replicas, tmp_path):
    answers = replicas.run(2, saved, str(tmp_path / "checkpoint.pt"))
    for (parameters, syncs), (resumed, resumed_syncs) in answers:
        assert syncs > 0 and abs(syncs - resumed_syncs) <= 1
        for one, other in zip(parameters, resumed, strict=True):
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.05)
    assert all(torch.equal(a, b) for a, b in zip(answers[0][1][0], answers[1][1][0], strict=True))
