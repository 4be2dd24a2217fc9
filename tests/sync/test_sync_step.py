"""The sync step in every format: equal parameters, conserved momentum and displacement, repeatable."""

import math

import pytest
import torch
from models import build, equal, exact_sync, parameters_of, state_of, train_step
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync
from lightning_curvadion.sync import quantization

CODED = [f for f in quantization.WIRE_FORMATS if f != "float32"]


def sums(rank, world, hook):
    """This replica's momentum and parameters around one sync step without gradients, decay and learning rate."""
    torch.manual_seed(rank)
    parameter = nn.Parameter(torch.zeros(60, 40))
    optimizer = CurvaDion([parameter], lr=0.1, mu=0.9999999, weight_decay=0.0, trigger=EveryNSteps(2))
    optimizer.register_sync_hook(exact_sync(**hook))
    parameter.grad = torch.randn(60, 40)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    parameter.grad = None
    momentum, start = optimizer.state[parameter]["momentum"].clone(), parameter.detach().clone()
    optimizer.step()
    assert optimizer.last_step.synced
    return momentum, optimizer.state[parameter]["momentum"].clone(), start, parameter.detach().clone()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("factor_format", ["float32", "int4", "sign"])
@pytest.mark.parametrize("thin", [None, 0.125])
def test_what_factors_do_not_carry_stays_in_the_momentum(replicas, world, factor_format, thin):
    hook = {"wire_format": "int2", "factor_format": factor_format, "sync_rank_fraction": thin}
    before, after, *_ = zip(*replicas.run(world, sums, hook), strict=True)
    torch.testing.assert_close(sum(before), sum(after), rtol=0, atol=1e-4)
    assert all((a - b).norm() > 0.02 * a.norm() for a, b in zip(before, after, strict=True)), "they did meet"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("factor_format", ["float32", "int4", "sign"])
def test_what_factors_do_not_carry_stays_in_the_displacement(replicas, world, factor_format):
    hook = {"consensus": "factors", "momentum": "local", "wire_format": "int2", "factor_format": factor_format}
    *_, before, after = zip(*replicas.run(world, sums, hook), strict=True)
    torch.testing.assert_close(sum(before), sum(after), rtol=0, atol=1e-5)
    assert all((a - b).norm() > 0.02 * a.norm() for a, b in zip(before, after, strict=True)), "they did meet"


def final_momentum(rank, world, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
    for step in range(2):
        train_step(model, optimizer, step, shard=rank)
    momenta = {key: value for key, value in state_of(optimizer).items() if key.endswith(".momentum")}
    return optimizer.last_step.bytes_sent, momenta


def test_thinner_factors_send_less_and_bring_momenta_less_close(replicas):
    sent, apart = {}, {}
    for fraction in (0.0625, 0.125, 0.25):
        (sent[fraction], a), (_, b) = replicas.run(2, final_momentum, {"sync_rank_fraction": fraction})
        apart[fraction] = math.sqrt(sum((a[key] - b[key]).square().sum().item() for key in a))
    assert sent[0.0625] < sent[0.125] < sent[0.25]
    assert apart[0.0625] > apart[0.125] > apart[0.25]


def after_each_step(rank, world, hooks, steps):
    histories = []
    for hook in hooks:
        model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
        history = []
        for step in range(steps):
            with counted_collectives() as calls:
                train_step(model, optimizer, step, shard=rank)
            history.append((optimizer.last_step, parameters_of(model), list(calls)))
        histories.append((history, state_of(optimizer)))
    return histories


MOMENTA = [{"momentum": "factors"}, {"momentum": "dion"}, {"momentum": "average"}, {"momentum": "local"}]
MOMENTA += [{"momentum": "factors", "sync_rank_fraction": 0.125}]


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_after_every_sync_step_parameters_are_bit_identical_in_every_format(replicas, momentum, world):
    everyone = replicas.run(
        world, after_each_step, [{"wire_format": wire_format, **momentum} for wire_format in CODED], 4
    )
    for number, _ in enumerate(CODED):
        histories = [answer[number][0] for answer in everyone]
        for step, (report, reference, _) in enumerate(histories[0]):
            assert report.synced == (step % 2 == 1)
            for other in histories[1:]:
                same = [torch.equal(a, b) for a, b in zip(reference, other[step][1], strict=True)]
                assert all(same) if report.synced else not any(same)
            for history in histories:
                report, _, calls = history[step]
                assert report.bytes_sent == sum(size for _, size in calls)
                assert len(calls) <= 6 if report.synced else [size for _, size in calls] == [16]


def test_two_runs_repeat_bit_for_bit(replicas):
    hooks = [{"wire_format": f, "consensus": c} for f in ("int2", "bfloat16") for c in ("average", "factors", "none")]
    first, second = (replicas.run(3, after_each_step, hooks, 6) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(equal(one, other) for (_, one), (_, other) in zip(a, b, strict=True))


def diverged(rank, world, wire_format, value):
    model, optimizer = build(hook={"wire_format": wire_format, "momentum": "local"}, trigger=EveryNSteps(2))
    train_step(model, optimizer, 0, shard=rank)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if rank == 1:
        model.down[1].weight.data[3, 3] = value
    with pytest.raises(ValueError, match=r"rank 1: displacement of down\.1\.weight holds NaN.* cannot be quantized"):
        optimizer.step()
    return [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]


@pytest.mark.parametrize(("wire_format", "value"), [(f, math.nan) for f in CODED] + [("int2", math.inf)])
@pytest.mark.parametrize("world", [2, 3])
def test_a_replica_that_diverged_is_an_error_on_all_of_them(replicas, wire_format, value, world):
    answers = replicas.run(world, diverged, wire_format, value, timeout=20)
    assert answers == [["down.1.weight"] if rank == 1 else [] for rank in range(world)], "nobody took it over"


def everything(model, optimizer):
    """All that a sync step writes: parameters, buffers, the state with its residuals, and the anchors."""
    anchors = optimizer.sync_hook._parameters.anchors
    tensors = [*model.parameters(), *model.buffers(), *(anchors.of(p) for p in model.parameters())]
    residuals = [optimizer.state[p]["residual"] for p in model.parameters()]
    return [tensor.detach().clone() for tensor in [*tensors, *residuals]]


def bits(tensor):
    """Of which NaN is equal to itself."""
    return tensor.reshape(-1).view(torch.uint8).tolist()


def refused(rank, world, hook, value):
    """Whether the bits of anything have changed when a mean of many chunks is refused for the last of its tensors."""
    model, optimizer = build(hook={"momentum": "local", "chunk": 100, **hook}, trigger=EveryNSteps(1))
    train_step(model, optimizer, 0, shard=rank)
    sync = optimizer.sync_hook
    *_, (name, last) = optimizer.named_parameters()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * (1 + rank))
        if rank == world - 1:
            last.view(-1)[-1] = value
    before = everything(model, optimizer)
    with counted_collectives() as calls, pytest.raises(ValueError, match=f"rank {world - 1}: .*{name} holds NaN"):
        sync._mean_right(optimizer, [], [])
    after = everything(model, optimizer)
    return [bits(a) == bits(b) for a, b in zip(before, after, strict=True)], list(calls)


@pytest.mark.parametrize(
    ("hook", "value"),
    [({"wire_format": f}, math.nan) for f in CODED]
    + [({"wire_format": "sign"}, math.inf), ({"wire_format": "int8", "outer_momentum": 0.5}, 1e30)],
    ids=str,
)
@pytest.mark.parametrize("world", [2, 3])
def test_a_mean_that_cannot_be_quantized_changes_nothing_on_any_replica(replicas, hook, value, world):
    for unchanged, calls in replicas.run(world, refused, hook, value, timeout=20):
        assert all(unchanged), "not a bit, of the tensors before the bad one either"
        _, _, *others = [name for name, _ in calls]
        assert others == ["all_gather", "all_gather"], "after the comparison of buffers the first chunk tells it"


def large(rank, world, wire_format, value):
    model, optimizer = build(hook={"wire_format": wire_format, "momentum": "local"}, trigger=EveryNSteps(1))
    train_step(model, optimizer, 0, shard=rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
            optimizer.sync_hook._parameters.anchors.of(parameter).fill_(-value)
            optimizer.state[parameter]["residual"].fill_(value)
    optimizer.sync_hook._mean_right(optimizer, [], [])
    return all(bool(torch.isfinite(tensor).all()) for tensor in everything(model, optimizer))


@pytest.mark.parametrize("wire_format", CODED)
def test_the_largest_numbers_that_pass_the_check_stay_finite(replicas, wire_format):
    # Of the largest tensor, 512 numbers, so that its norm is just below 2**58.
    assert all(replicas.run(3, large, wire_format, 2.0**53))


class SeesFactors(ProcessGroupSync):
    """Keeps the left factors that a sync step sends, and those of all columns."""

    def _mean_left(self, optimizer, factors, whole):
        self.seen = [factor.clone() for factor in factors], [stack.B @ stack.Q for stack in optimizer.matrix_stacks()]
        return super()._mean_left(optimizer, factors, whole)


def thin_factors(rank, world):
    hook = {"sync_rank_fraction": 0.125}
    model, optimizer = build(hook=hook, hook_class=SeesFactors, trigger=EveryNSteps(4), rank_fraction=1.0)
    for step in range(4):
        train_step(model, optimizer, step, shard=rank)
    return optimizer.sync_hook.seen


def test_thin_factors_are_those_of_the_first_columns_which_are_the_dominant_ones(replicas):
    for sent, all_columns in replicas.run(2, thin_factors):
        for thin, factor in zip(sent, all_columns, strict=True):
            assert 0 < thin.shape[-1] == factor.shape[-1] // 8
            torch.testing.assert_close(thin, factor[..., : thin.shape[-1]])
