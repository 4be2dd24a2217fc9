"""ProcessGroupSync: attaching, consensus, the outer step, and its errors."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from models import build, parameters_of, state_of, train_step
from replicas import Failed, counted_collectives
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters

NEVER = EveryNSteps(10**6)


# -- attaching --------------------------------------------------------------------------------------------------------


def start(rank, world):
    model, optimizer = build(seed=rank)
    with counted_collectives() as calls:
        sync = ProcessGroupSync()
        optimizer.register_sync_hook(sync)
        sync.include_module(model)
    return parameters_of(model), [b.clone() for b in model.buffers()], [name for name, _ in calls]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_replicas_start_from_rank_zeros_values(replicas, world):
    answers = replicas.run(world, start)
    expected = parameters_of(build(seed=0)[0])
    for parameters, buffers, names in answers:
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, answers[0][1], strict=True))
        assert names.count("all_gather") == 2, "one check for the optimizer, one for the module"


def different(rank, world, what):
    torch.manual_seed(0)
    width = 9 if what == "shape" and rank == 1 else 8
    layers = [nn.Linear(width, 4), nn.Linear(4, 4)]
    if what == "order" and rank == 1:
        layers.reverse()
    if what == "count" and rank == 1:
        layers.append(nn.Linear(4, 4))
    model = nn.Sequential(*layers)
    if what == "dtype" and rank == 1:
        model.double()
    trigger = EveryNSteps(3 if what == "trigger" and rank == 1 else 2)
    optimizer = CurvaDion(split_parameters(model), trigger=trigger)
    hook = ProcessGroupSync(momentum="local" if what == "hook" and rank == 1 else "factors")
    try:
        optimizer.register_sync_hook(hook)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("what", ["shape", "order", "count", "dtype", "trigger", "hook"])
def test_replicas_that_differ_get_a_clear_error_on_every_rank(replicas, what):
    before = time.monotonic()
    for message in replicas.run(3, different, what):
        assert message is not None and "replicas differ: rank 0 has" in message and "rank 1" in message
        assert "build the same model" in message
    assert time.monotonic() - before < 30, "an error, not a time-out"


def different_buffers(rank, world, persistent):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if rank == 1:
        model.register_buffer("extra", torch.zeros(3), persistent=persistent)
    optimizer = CurvaDion(split_parameters(model))
    sync = ProcessGroupSync()
    optimizer.register_sync_hook(sync)
    with pytest.raises(ValueError, match="replicas differ: rank 0 has 4 entries and rank 1 has 5"):
        sync.include_module(model)


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_only_one_rank_has_are_an_error_and_not_a_hang(replicas, persistent):
    replicas.run(2, different_buffers, persistent, timeout=20)


def second_hook(rank, world):
    _, optimizer = build(hook={})
    with pytest.raises(ValueError, match="already"):
        optimizer.register_sync_hook(ProcessGroupSync())


def test_a_second_hook(replicas):
    replicas.run(1, second_hook)


def test_a_hook_without_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        build(hook={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consensus": "mean"}, "consensus must be one of 'average', 'factors', 'none', not 'mean'"),
        ({"momentum": "all"}, "momentum must be one of"),
        ({"wire_format": "fp8"}, "wire_format must be one of 'float32', .*'sign', not 'fp8'"),
        ({"outer_lr": 0.0}, "outer_lr must be > 0"),
        ({"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\)"),
        ({"consensus": "none", "outer_lr": 0.5}, 'an outer step needs consensus="average"'),
        ({"consensus": "none", "momentum": "local"}, 'consensus="none" implies momentum="dion"'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ProcessGroupSync(**options)


# -- consensus --------------------------------------------------------------------------------------------------------


def consensus(rank, world, hook, include_state):
    model, optimizer = build(hook=hook, trigger=NEVER, max_local_steps=None)
    for step in range(3):
        train_step(model, optimizer, step, shard=rank)
    own = state_of(optimizer), [b.clone() for b in model.buffers()]
    with counted_collectives() as calls:
        optimizer.sync_hook.reach_consensus([optimizer], include_state)
    sent = sum(size for _, size in calls)
    with counted_collectives() as again:
        optimizer.sync_hook.reach_consensus([optimizer], include_state)
    return own, (state_of(optimizer), [b.clone() for b in model.buffers()]), sent, len(again)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "hook", [{}, {"consensus": "factors"}, {"consensus": "none"}, {"wire_format": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("include_state", [False, True])
def test_reaching_consensus_is_the_exact_mean_whatever_the_settings(replicas, world, hook, include_state):
    answers = replicas.run(world, consensus, hook, include_state)
    for key in answers[0][0][0]:
        values = [own[0][key] for own, *_ in answers]
        results = [met[0][key] for _, met, *_ in answers]
        is_parameter = not key.endswith((".momentum", ".Q", ".norm", ".exp_avg", ".exp_avg_sq", ".step"))
        if not (is_parameter or include_state):
            continue
        assert all(torch.equal(torch.as_tensor(r), torch.as_tensor(results[0])) for r in results)
        if key.endswith(".step"):
            assert results[0] == values[0]
        else:
            torch.testing.assert_close(results[0], sum(v / world for v in values), rtol=1e-5, atol=1e-6)
    for number, buffer in enumerate(answers[0][1][1]):
        values = [own[1][number] for own, *_ in answers]
        assert all(torch.equal(met[1][number], buffer) for _, met, *_ in answers)
        if buffer.is_floating_point():
            assert not torch.equal(values[0], values[1])
            torch.testing.assert_close(buffer, sum(values) / world)
        else:
            assert torch.equal(buffer, values[0])
    assert all(again == 0 for *_, again in answers), "nothing has moved since: nothing to send"


def outer(rank, world, outer_lr, outer_momentum):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = CurvaDion([parameter], trigger=EveryNSteps(2))
    optimizer.register_sync_hook(ProcessGroupSync(momentum="local", outer_lr=outer_lr, outer_momentum=outer_momentum))
    anchor = parameter.detach().clone()
    reference = nn.Parameter(anchor.clone())
    sgd = torch.optim.SGD([reference], lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)
    for step in range(6):
        alone = CurvaDion([nn.Parameter(parameter.detach().clone())], trigger=NEVER)
        alone.load_state_dict({**optimizer.state_dict(), "trigger": alone.state_dict()["trigger"]})
        (twin,) = alone.param_groups[0]["params"]
        parameter.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        twin.grad = parameter.grad.clone()
        alone.step()
        optimizer.step()
        if optimizer.last_step.synced:
            displacement = twin.detach() - reference.detach()
            dist.all_reduce(displacement)
            reference.grad = -displacement / world
            sgd.step()
            torch.testing.assert_close(parameter.detach(), reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("outer_lr", "outer_momentum"), [(0.7, 0.0), (0.7, 0.9), (1.0, 0.5)])
def test_the_outer_step_is_torchs_nesterov_sgd_on_the_averaged_displacement(replicas, outer_lr, outer_momentum):
    replicas.run(2, outer, outer_lr, outer_momentum)


def consensus_after_sync(rank, world):
    model, optimizer = build(hook={"outer_lr": 0.7, "outer_momentum": 0.9}, trigger=EveryNSteps(2))
    for step in range(4):
        train_step(model, optimizer, step, shard=rank)
    assert optimizer.last_step.synced
    before = parameters_of(model)
    for include_state in (False, True, True):
        optimizer.sync_hook.reach_consensus(optimizer, include_state)
    return all(torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True))


def test_a_consensus_right_after_a_sync_step_takes_no_second_outer_step(replicas):
    assert replicas.run(2, consensus_after_sync) == [True, True]


def rewind(rank, world, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))

    def train(steps):
        for step in steps:
            train_step(model, optimizer, step, shard=rank)
        return parameters_of(model)

    train(range(3))
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    model_state, optimizer_state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    once = train(range(3, 8))
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    again = train(range(3, 8))
    return all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("hook", [{"wire_format": "bfloat16"}, {"outer_lr": 0.7, "outer_momentum": 0.9}], ids=str)
def test_loading_a_state_into_a_running_optimizer_forgets_where_it_was(replicas, hook):
    assert replicas.run(2, rewind, hook) == [True, True]


def gan(rank, world):
    generator, first = build(trigger=EveryNSteps(2))
    critic, second = build(layers=1, trigger=EveryNSteps(3))
    sync = ProcessGroupSync()
    for optimizer in (first, second):
        optimizer.register_sync_hook(sync)
    for step in range(6):
        train_step(generator, first, step, rank)
        train_step(critic, second, step, rank)
    sync.reach_consensus([first, second])
    return parameters_of(generator) + parameters_of(critic)


def test_one_hook_serves_two_optimizers(replicas):
    a, b = replicas.run(2, gan)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def lost_peer(rank, world):
    model, optimizer = build(hook={})
    if rank == 1:
        raise RuntimeError("this rank gives up")
    train_step(model, optimizer, 0, rank)


def test_a_lost_peer_is_an_error_and_not_a_hang(replicas):
    with pytest.raises(Failed, match="gives up"):
        replicas.run(2, lost_peer, timeout=50)


def requesting(rank, world):
    model, optimizer = build(hook={}, trigger=EveryNSteps(3))
    agreed = []
    for step, request in enumerate((0.0, 0.5 if rank == 1 else 0.0, 0.0, 0.75 if rank == 0 else 0.5)):
        optimizer.sync_hook.agreement.stop_request = request
        train_step(model, optimizer, step, shard=rank)
        agreed.append(optimizer.sync_hook.agreement.agreed_request)
    model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        train_step(model, optimizer, 4, shard=rank)
    return agreed


def test_all_ranks_agree_on_a_stop_request_of_one_in_the_next_step_and_a_bad_gradient_outranks_it(replicas):
    for agreed in replicas.run(2, requesting):
        assert agreed == [0.0, 0.5, 0.0, 0.75]
