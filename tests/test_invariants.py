"""What the design promises of several replicas, with real processes."""

import re

import pytest
import torch
from models import QuantizesAlone, build, equal, exact_sync, parameters_of, state_of, train_step
from replicas import counted_collectives

from lightning_curvadion import CommunicationBudget, DriftThreshold, EveryNSteps, IntegratedRMMC, RMMCThreshold
from lightning_curvadion.sync import quantization

TRIGGERS = [RMMCThreshold(0.1), IntegratedRMMC(0.5), EveryNSteps(3), CommunicationBudget(0.3)]
HOOKS = [
    {"consensus": "average", "momentum": "factors"},
    {"consensus": "average", "momentum": "dion"},
    {"consensus": "average", "momentum": "average"},
    {"consensus": "average", "momentum": "local"},
    {"consensus": "average", "momentum": "displacement"},
    {"consensus": "factors", "momentum": "factors"},
    {"consensus": "factors", "momentum": "dion"},
    {"consensus": "factors", "momentum": "average"},
    {"consensus": "factors", "momentum": "local"},
    {"consensus": "none"},
]
OUTER = {"outer_lr": 0.7, "outer_momentum": 0.6}


def name_of(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else type(value).__name__


def train(rank, world, steps, hook, options, same_data=False, layers=2):
    model, optimizer = build(layers, hook, **options)
    synced = []
    for step in range(steps):
        train_step(model, optimizer, step, shard=0 if same_data else rank)
        synced.append(optimizer.last_step.synced)
    return synced, parameters_of(model), state_of(optimizer)


# -- invariant 2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("hook", HOOKS, ids=name_of)
@pytest.mark.parametrize("trigger", [EveryNSteps(3), IntegratedRMMC(0.5)], ids=name_of)
def test_ranks_with_equal_data_equal_one_rank(replicas, world, hook, trigger):
    options = {"trigger": trigger}
    alone, expected, _ = train(0, 1, 8, None, options)
    assert True in alone and False in alone
    for synced, parameters, _ in replicas.run(world, train, 8, hook, options, True):
        assert synced == alone
        torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trigger", TRIGGERS, ids=name_of)
def test_ranks_with_equal_data_take_the_sgd_steps_of_one_rank(replicas, trigger):
    options = {"trigger": trigger, "local_update": "sgd", "local_lr": 0.05}
    alone, expected, _ = train(0, 1, 8, None, options)
    for synced, parameters, _ in replicas.run(2, train, 8, HOOKS[0], options, True):
        assert synced == alone
        torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hook", HOOKS, ids=name_of)
def test_full_rank_averages_the_dense_momentum_and_still_equals_one_rank(replicas, hook):
    options = {"trigger": EveryNSteps(1), "rank_fraction": 1.0}
    _, expected, _ = train(0, 1, 4, None, options)
    for _, parameters, _ in replicas.run(2, train, 4, hook, options, True):
        torch.testing.assert_close(parameters, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hook", HOOKS, ids=name_of)
def test_at_full_rank_ranks_with_equal_data_equal_one_rank(replicas, hook):
    # The columns that rounding decides take short steps. What is left of it is less than a hundredth of a step.
    options = {"trigger": EveryNSteps(3), "rank_fraction": 1.0}
    _, expected, _ = train(0, 1, 8, None, options)
    for _, parameters, _ in replicas.run(3, train, 8, hook, options, True):
        torch.testing.assert_close(parameters, expected, rtol=1e-4, atol=1e-5)


# Formats in which the mean of equal numbers, quantized again, is another number.
COARSE = [name for name, block_format in quantization.BLOCK_FORMATS.items() if block_format.clips]
CODED = [{"wire_format": f} for f in quantization.WIRE_FORMATS if f != "float32"]
CODED += [{"wire_format": "int4", **hook} for hook in HOOKS[1:]]
CODED += [{"wire_format": "int8", "sync_rank_fraction": 0.125}]


def train_each(rank, world, steps, hooks, options):
    return [
        train(rank, world, steps, hook, {**options, "hook_class": QuantizesAlone}, same_data=True)[:2] for hook in hooks
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_in_every_format_ranks_with_equal_data_equal_one_rank_that_quantizes_alike(replicas, world):
    # Among three replicas the mean of equal numbers is quantized a second time. In two bits, as the mean of signs too,
    # that changes them until the residuals are sent.
    hooks = [hook for hook in CODED if world == 2 or hook["wire_format"] not in COARSE]
    options = {"trigger": EveryNSteps(3)}
    alone = replicas.run(1, train_each, 8, hooks, options)[0]
    for together in replicas.run(world, train_each, 8, hooks, options):
        for (synced, parameters), (synced_alone, expected) in zip(together, alone, strict=True):
            assert synced == synced_alone and True in synced and False in synced
            torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


# -- invariant 3 ------------------------------------------------------------------------------------------------------


def parameters_after_each_step(rank, world, steps, hook, options):
    model, optimizer = build(hook=hook, **options)
    history = []
    for step in range(steps):
        train_step(model, optimizer, step, shard=rank)
        history.append((optimizer.last_step.synced, parameters_of(model)))
    return history


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "hook", [*HOOKS[:5], {"wire_format": "bfloat16"}, OUTER, {"momentum": "local", **OUTER}], ids=name_of
)
def test_parameters_are_bit_identical_after_a_sync_step_and_differ_after_a_local_one(replicas, world, hook):
    histories = replicas.run(world, parameters_after_each_step, 6, hook, {"trigger": EveryNSteps(3)})
    for step, (synced, reference) in enumerate(histories[0]):
        assert synced == (step % 3 == 2)
        for other in histories[1:]:
            same = [torch.equal(a, b) for a, b in zip(reference, other[step][1], strict=True)]
            assert all(same) if synced else not any(same)


@pytest.mark.parametrize("hook", HOOKS[5:], ids=name_of)
def test_other_kinds_of_consensus_leave_replicas_different(replicas, hook):
    histories = replicas.run(2, parameters_after_each_step, 3, hook, {"trigger": EveryNSteps(3)})
    assert not all(torch.equal(a, b) for a, b in zip(histories[0][-1][1], histories[1][-1][1], strict=True))


def drift(parameters):
    mean = [sum(tensors) / len(parameters) for tensors in zip(*parameters, strict=True)]
    return sum(
        (tensor - centre).square().sum().item()
        for own in parameters
        for tensor, centre in zip(own, mean, strict=True)
        if tensor.dim() == 2
    )


def test_consensus_through_factors_brings_replicas_closer_than_none(replicas):
    options = {"trigger": EveryNSteps(3)}
    drifts = {
        hook["consensus"]: drift([h[-1][1] for h in replicas.run(2, parameters_after_each_step, 15, hook, options)])
        for hook in ({"consensus": "factors"}, {"consensus": "none"})
    }
    assert 0 < drifts["factors"] < 0.7 * drifts["none"]


@pytest.mark.parametrize("hook", HOOKS[:3], ids=name_of)
def test_a_sync_step_leaves_one_right_factor_on_all_replicas(replicas, hook):
    options = {"trigger": EveryNSteps(3), "local_update": "dion"}
    _, states = zip(*[(r[0], r[2]) for r in replicas.run(2, train, 6, hook, options)], strict=True)
    factors = [key for key in states[0] if key.endswith(".Q")]
    assert factors and all(torch.equal(states[0][key], states[1][key]) for key in factors)


# -- invariant 4 ------------------------------------------------------------------------------------------------------


def calls_of_steps(rank, world, trigger):
    model, optimizer = build(hook={}, trigger=trigger)
    sizes = []
    for step in range(4):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        sizes.append([size for _, size in calls])
    return sizes


@pytest.mark.parametrize("trigger", TRIGGERS, ids=name_of)
def test_the_agreement_has_16_bytes(replicas, trigger):
    for calls in replicas.run(2, calls_of_steps, trigger):
        assert all(own[0] == 16 for own in calls)


def collectives(rank, world, layers, hook, period=2, rank_fraction=0.25, steps=4):
    model, optimizer = build(layers, hook, trigger=EveryNSteps(period), rank_fraction=rank_fraction)
    counts = []
    for step in range(steps):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        counts.append((optimizer.last_step, list(calls)))
    return counts


@pytest.mark.parametrize("layers", [2, 24])
@pytest.mark.parametrize("hook", [*HOOKS, OUTER], ids=name_of)
def test_a_local_step_is_one_small_collective_and_a_sync_step_at_most_four(replicas, layers, hook):
    for counts in replicas.run(2, collectives, layers, hook):
        assert [report.synced for report, _ in counts] == [False, True, False, True]
        for report, calls in counts:
            assert report.bytes_sent == sum(size for _, size in calls)
            if report.synced:
                assert len(calls) <= 4
            else:
                assert [size for _, size in calls] == [16]


def test_a_sync_step_sends_factors_and_parameters_and_nothing_else(replicas):
    hook = {"consensus": "average", "momentum": "factors"}
    (_, calls), *_ = [c for c in replicas.run(2, collectives, 2, hook)[0] if c[0].synced]
    rank, width, layers = 4, 16, 2
    factors = 2 * layers * 4 * rank * (width, 2 * width)[1], 2 * layers * 4 * rank * width
    parameters = 4 * sum(p.numel() for p in build(2)[0].parameters())
    # Running mean and variance, and the digests of these two and of a counter that is equal on all replicas.
    buffers, digests = 4 * (16 + 16), 3 * 16
    assert [size for _, size in calls] == [16, factors[0], digests, factors[1] + parameters + buffers]


def test_a_matrix_travels_whole_where_its_factors_would_be_larger_and_replicas_share_Q(replicas):
    width, layers = 16, 2
    matrix, factor = 4 * width * 2 * width, 4 * width * (width + 2 * width)
    digests, everything_else = [
        size for _, size in replicas.run(2, collectives, layers, {"momentum": "local"}, 1)[0][-1][1][-2:]
    ]
    always = replicas.run(2, collectives, layers, {}, 1, 1.0)[0][-1][1]
    assert [size for _, size in always] == [16, 2 * layers * matrix, digests, everything_else]
    after_local_steps = replicas.run(2, collectives, layers, {}, 2, 1.0)[0][-1][1]
    assert sum(size for _, size in after_local_steps) == 16 + 2 * layers * factor + digests + everything_else


def test_bfloat16_halves_what_a_sync_step_sends(replicas):
    def payload(wire_format):
        counts = replicas.run(2, collectives, 2, {"wire_format": wire_format})[0]
        return next(report.bytes_sent for report, _ in counts if report.synced)

    assert payload("bfloat16") < 0.56 * payload("float32")


# -- invariant 5 ------------------------------------------------------------------------------------------------------


def branches_with_missing_gradients(rank, world, steps, trigger):
    model, optimizer = build(hook={}, trigger=trigger)
    decisions = []
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = None
        generator = torch.Generator().manual_seed(1000 * rank + step)
        for parameter in model.parameters():
            if torch.rand((), generator=generator) < 0.6:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        decisions.append((optimizer.last_step.rmmc, optimizer.last_step.synced))
    return decisions, parameters_of(model)


@pytest.mark.parametrize("trigger", [*TRIGGERS, DriftThreshold(0.02)], ids=name_of)
def test_every_rank_takes_the_same_branch_with_missing_gradients(replicas, trigger):
    answers = replicas.run(3, branches_with_missing_gradients, 12, trigger)
    assert answers[0][0] == answers[1][0] == answers[2][0]
    assert any(synced for _, synced in answers[0][0])


def bad_gradient(rank, world, bad_rank, bad, where, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
    train_step(model, optimizer, 0, shard=rank)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if rank == bad_rank:
        dict(model.named_parameters())[where].grad.view(-1)[-1] = bad
    before = state_of(optimizer), optimizer.state_dict()["trigger"]
    message = None
    try:
        optimizer.step()
    except ValueError as error:
        message = str(error)
    unchanged = equal(before[0], state_of(optimizer)) and before[1] == optimizer.state_dict()["trigger"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return message, unchanged, optimizer.last_step.synced


@pytest.mark.parametrize("hook", [HOOKS[0], HOOKS[-1]], ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["up.1.weight", "embedding.weight"])
def test_a_bad_gradient_raises_on_all_ranks_and_changes_nothing(replicas, bad, where, hook):
    for message, unchanged, synced_next in replicas.run(3, bad_gradient, 1, bad, where, hook):
        assert message is not None and "rank 1" in message and where in message and "not finite" in message
        assert unchanged
        assert synced_next, "the failed step must not count as a local step, and the next one must work"


def odd_gradient(rank, world, sparse):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(6, 4, sparse=sparse and rank == 1)
    from lightning_curvadion import CurvaDion, split_parameters

    optimizer = CurvaDion(split_parameters(embedding))
    optimizer.register_sync_hook(exact_sync())
    embedding(torch.tensor([1, 2])).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)


def test_a_sparse_gradient_on_one_rank_raises_on_all(replicas):
    assert replicas.run(2, odd_gradient, False) == [None, None]
    for message in replicas.run(2, odd_gradient, True):
        assert re.search(r"rank 1: weight has a sparse gradient.*sparse=False", message)


# -- invariant 7 ------------------------------------------------------------------------------------------------------


def saved_and_loaded(rank, world, hook, path):
    model, optimizer = build(hook=hook, trigger=IntegratedRMMC(0.3))
    for step in range(5):
        train_step(model, optimizer, step, shard=rank)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    own = state_of(optimizer)
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    torch.distributed.barrier()
    saved = torch.load(path, weights_only=True)
    other_model, other = build(hook=hook, trigger=IntegratedRMMC(0.3), seed=1)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    same_start = equal(own, state_of(other))
    for step in range(5, 11):
        train_step(model, optimizer, step, shard=rank)
        train_step(other_model, other, step, shard=rank)
    return same_start, equal(state_of(optimizer), state_of(other)), optimizer.last_step == other.last_step


@pytest.mark.parametrize(
    "hook", [HOOKS[0], HOOKS[2], HOOKS[3], HOOKS[4], HOOKS[5], OUTER, {"wire_format": "bfloat16"}], ids=name_of
)
def test_a_saved_consensus_is_every_ranks_and_continues_bit_for_bit(replicas, hook, tmp_path):
    for same_start, same_end, same_report in replicas.run(2, saved_and_loaded, hook, str(tmp_path / "saved.pt")):
        assert same_start and same_end and same_report
