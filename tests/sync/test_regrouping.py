"""What replicas go on from in a new group, after a loss, a mean that a loss cut in half, or a join.

The replicas regroup in the process group that they have, as if another replica had been there before.
"""

from contextlib import suppress
from unittest import mock

import pytest
import torch
from models import build, train_step

from examples.byte_gpt import GPT
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.sync.chunks import Bucket
from lightning_curvadion.sync.errors import ReplicaLostError
from lightning_curvadion.sync.payload_collectives import PayloadCollectives

SIGN = {"wire_format": "sign", "momentum": "displacement", "lag": 1}
HOOKS = [
    SIGN,
    {**SIGN, "lag": 0},
    {**SIGN, "wire_format": "int4", "overlap": 2},
    {**SIGN, "wire_format": "bfloat16", "residual_dtype": "float32", "spread": 2},
    {"wire_format": "int8", "momentum": "local", "lag": 1},
]
FULL_WIDTH = [
    {"wire_format": "float32", "momentum": "displacement", "lag": 1},
    {"wire_format": "float32", "momentum": "local", "lag": 1},
    {"wire_format": "float32", "momentum": "average", "lag": 0},
]
# They reconcile not all at a sync step.
INEXACT = [{"consensus": "factors"}, {"consensus": "none"}]


def parameters_of(optimizer):
    return [parameter.detach().clone() for _, parameter in optimizer.named_parameters()]


def with_residuals(optimizer):
    """What each parameter has walked to, and what quantization has kept back of it."""
    sums = []
    for _, parameter in optimizer.named_parameters():
        kept_back = optimizer.state[parameter].get("residual")
        sums.append(parameter.detach().double() + (0 if kept_back is None else kept_back.double()))
    return sums


def trained_apart(rank, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(3))
    for step in range(8):
        train_step(model, optimizer, step, shard=rank)
    return model, optimizer


def stand_still(model, optimizer, rank, steps=6):
    """Steps of no length, of which some synchronise."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(steps):
        train_step(model, optimizer, step, shard=rank)


def momenta_of(optimizer):
    return [own["momentum"].clone() for own in optimizer.state.values() if "momentum" in own]


def go_on(rank, world, hook, trained):
    """What each replica has before and after it regroups, and after the next sync steps and a consensus."""
    model, optimizer = trained_apart(rank, hook)
    sync = optimizer.sync_hook
    before, own, momenta, sent = (
        parameters_of(optimizer),
        with_residuals(optimizer),
        momenta_of(optimizer),
        sync.bytes_sent,
    )
    sync.regroup(trained)
    sent = sync.bytes_sent - sent
    regrouped = parameters_of(optimizer)
    kept = all(torch.equal(a, b) for a, b in zip(momenta, momenta_of(optimizer), strict=True))
    syncs = optimizer.sync_steps
    stand_still(model, optimizer, rank)
    assert optimizer.sync_steps > syncs + 1
    synced = with_residuals(optimizer)
    sync.reach_consensus(optimizer, include_state=True)
    return {
        "own": own,
        "keeps its parameters": all(torch.equal(a, b) for a, b in zip(before, regrouped, strict=True)),
        "keeps its momenta": kept,
        "sent": sent,
        "regrouped": regrouped,
        "synced": synced,
        "end": parameters_of(optimizer),
    }


def means(everyone, key):
    return [sum(parts) / len(everyone) for parts in zip(*(one[key] for one in everyone), strict=True)]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def one_model(everyone):
    for one in everyone:
        assert all(torch.equal(a, b) for a, b in zip(one["end"], everyone[0]["end"], strict=True))


@pytest.mark.parametrize("hook", [*HOOKS, *FULL_WIDTH])
def test_after_a_loss_the_others_keep_what_they_have_and_send_digests(replicas, hook):
    everyone = replicas.run(2, go_on, hook, 2)
    for one in everyone:
        assert one["keeps its parameters"] and one["keeps its momenta"]
        # A few numbers a tensor, where the model has 4500.
        assert one["sent"] < 400
    one_model(everyone)
    mean = means(everyone, "own")
    if hook["momentum"] != "average":
        assert_close(means(everyone, "synced"), mean)
        assert_close(everyone[0]["end"], mean)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_replica_that_comes_changes_nothing_of_what_the_others_have_walked(replicas, hook):
    everyone = replicas.run(3, go_on, hook, 2)
    assert all(one["keeps its parameters"] and one["keeps its momenta"] for one in everyone[:2])
    # It may have sent nothing itself.
    assert everyone[1]["sent"] < 400 and everyone[2]["sent"] < 2000
    one_model(everyone)
    assert_close(means(everyone, "synced"), means(everyone[:2], "own"))
    assert_close(everyone[0]["end"], means(everyone[:2], "own"))


@pytest.mark.parametrize(
    ("world", "trained", "hook"),
    [
        (3, 2, FULL_WIDTH[0]),
        (3, 2, FULL_WIDTH[1]),
        (3, 2, INEXACT[0]),
        (2, 2, INEXACT[1]),
        (3, 1, SIGN),
        (3, 1, HOOKS[2]),
    ],
)
def test_without_residuals_or_others_all_begin_at_the_exact_mean(replicas, world, trained, hook):
    everyone = replicas.run(world, go_on, hook, trained)
    mean = means(everyone[:trained], "own")
    for one in everyone:
        assert_close(one["regrouped"], mean)
    one_model(everyone)


def loss_in_the_byte_gpt(rank, world):
    model = GPT(layers=2, width=64, heads=4, context=64)
    optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(2))
    optimizer.register_sync_hook(sync := ProcessGroupSync())
    sync.include_module(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, 256, (2, 64))).logsumexp(-1).mean().backward()
        optimizer.step()
    sent = sync.bytes_sent
    sync.regroup(world)
    return sync.bytes_sent - sent, sum(parameter.nbytes for parameter in model.parameters())


def test_a_loss_sends_a_thousandth_of_the_byte_gpt(replicas):
    for sent, model in replicas.run(3, loss_in_the_byte_gpt):
        print(f"a loss: {sent} bytes, the model: {model}")
        assert sent < model / 1000


# -- a mean that is cut in half ---------------------------------------------------------------------------------------


def train_until_lost(model, optimizer, rank):
    for step in range(8, 12):
        train_step(model, optimizer, step, shard=rank)


def cut_in_half(rank, world, hook, lost_again):
    """Two chunks of a mean arrive on both replicas, and the third on rank 0 alone."""
    model, optimizer = trained_apart(rank, {**hook, "chunk": 700})
    sync, mean_of_chunk, write_back = optimizer.sync_hook, PayloadCollectives.mean_of_chunk, Bucket.write_back
    chunks = 0

    def broken_off(collectives, *arguments, **options):
        nonlocal chunks
        chunks += 1
        if chunks > 3:
            raise ReplicaLostError("lost")
        return mean_of_chunk(collectives, *arguments, **options)

    def written(bucket, mean):
        if chunks == 3 and rank == 1:
            raise ReplicaLostError("lost")
        write_back(bucket, mean)

    with (
        mock.patch.object(PayloadCollectives, "mean_of_chunk", broken_off),
        mock.patch.object(Bucket, "write_back", written),
        pytest.raises(ReplicaLostError),
    ):
        train_until_lost(model, optimizer, rank)
    own = with_residuals(optimizer)
    average = PayloadCollectives.average

    def lost(collectives, payloads):
        average(collectives, payloads[:1])
        for payload in payloads:
            payload.break_off()
        raise ReplicaLostError("lost")

    if lost_again:
        with mock.patch.object(PayloadCollectives, "average", lost), pytest.raises(ReplicaLostError):
            sync.regroup(world)
    sync.regroup(world)
    after = parameters_of(optimizer)
    anchors = [sync._parameters.anchors.of(p).clone() for _, p in optimizer.named_parameters()]
    stand_still(model, optimizer, rank)
    synced = with_residuals(optimizer)
    sync.reach_consensus(optimizer, include_state=True)
    return {"own": own, "after": after, "anchors": anchors, "synced": synced, "end": parameters_of(optimizer)}


@pytest.mark.parametrize("lost_again", [False, True])
@pytest.mark.parametrize("hook", [HOOKS[0], {**HOOKS[4], "lag": 0}, {**SIGN, "outer_momentum": 0.5}])
def test_of_what_a_loss_left_unequal_the_mean_is_taken(replicas, hook, lost_again):
    everyone = replicas.run(2, cut_in_half, hook, lost_again)
    for a, b in zip(everyone[0]["anchors"], everyone[1]["anchors"], strict=True):
        assert torch.equal(a, b)
    equal = [torch.equal(a, b) for a, b in zip(everyone[0]["after"], everyone[1]["after"], strict=True)]
    assert any(equal) and (lost_again or not all(equal)), "some have the mean, and some what they had"
    one_model(everyone)
    if "outer_momentum" not in hook:
        assert_close(means(everyone, "synced"), means(everyone, "own"))
        assert_close(everyone[0]["end"], means(everyone, "own"))


def diverged(rank, world, hook):
    _, optimizer = trained_apart(rank, hook)
    if rank == 0:
        next(own for own in optimizer.state.values() if "exp_avg" in own)["exp_avg"].fill_(float("nan"))
    if rank < 2:
        # Rank 1 gives it nothing, and notices later that it is gone.
        with suppress(ReplicaLostError):
            optimizer.sync_hook.regroup(2)
        return
    with pytest.raises(
        ValueError, match=r"exp_avg of .*, which this replica was to take over from rank 0, holds numbers"
    ):
        optimizer.sync_hook.regroup(2)


@pytest.mark.parametrize("hook", [SIGN, FULL_WIDTH[1]])
def test_what_is_not_finite_is_taken_over_by_nobody(replicas, hook):
    replicas.run(3, diverged, hook)
