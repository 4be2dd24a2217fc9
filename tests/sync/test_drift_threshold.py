"""DriftThreshold among real replicas: when it fires, what it sends, and what becomes of it in a checkpoint."""

import copy
import math

import pytest
import torch
from models import Net, build, equal, exact_sync, state_of, train_step
from replicas import counted_collectives

from lightning_curvadion import CurvaDion, DriftThreshold, EveryNSteps, split_parameters
from lightning_curvadion.sync import displacement_meter
from lightning_curvadion.sync.anchors import Anchors
from lightning_curvadion.sync.displacement_meter import DisplacementMeter

SIGN = {"wire_format": "sign", "momentum": "local"}
LOCAL = {"momentum": "local"}
TAU, LR, STEPS = 0.04, 0.02, 20


def constant(step, rank):
    return LR


def falling(step, rank):
    return LR if step < 6 else LR / 5


def falling_on_rank_1(step, rank):
    return LR / 20 if rank == 1 and step >= 2 else LR


def watched(rank, world, hook, dtype=torch.float32, schedule=constant, event=None):
    """Every step of a run: the parameters before and after it, by name, and what this replica agreed on in it."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = CurvaDion(split_parameters(model), lr=LR, trigger=DriftThreshold(TAU), max_local_steps=None)
    optimizer.register_sync_hook(exact_sync(**hook))
    sync = optimizer.sync_hook
    sync.include_module(model)
    named = dict(model.named_parameters())
    start = copy.deepcopy(model.state_dict())
    history = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, rank)
        if event == "frozen":
            named["up.0.weight"].requires_grad_(not 4 <= step < 12)
        if event == "rollback" and step == 6 and rank == 1:
            model.load_state_dict(start)
        record = {
            "trained": [name for name, parameter in named.items() if parameter.requires_grad],
            "lacks": sync._parameters.lack_anchors(optimizer),
            "before": {name: parameter.detach().clone() for name, parameter in named.items()},
            "scale": optimizer.param_groups[0]["lr"] / LR,
        }
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        record["after"] = {name: parameter.detach().clone() for name, parameter in named.items()}
        record["synced"], record["settled"] = optimizer.last_step.synced, sync.agreement.agreed_to_settle
        record["calls"] = [size for _, size in calls]
        history.append(record)
    return history


def relative_distance(own, anchor, names):
    squares = sum((own[name].double() - anchor[name].double()).square().sum().item() for name in names)
    return math.sqrt(squares / sum(anchor[name].double().square().sum().item() for name in names))


def drifts_by_hand(histories):
    """The drift of each replica at each step, from the parameters of all of them alone."""
    anchor = histories[0][0]["before"]
    drifts = []
    for records in zip(*histories, strict=True):
        drifts.append([0.0 if r["lacks"] else relative_distance(r["before"], anchor, r["trained"]) for r in records])
        if records[0]["settled"]:
            anchor = {name: sum(r["before"][name] for r in records) / len(records) for name in anchor}
        # What is equal on all replicas has been brought together, or has not moved.
        first, *others = (r["after"] for r in records)
        equal_now = {name for name in first if all(torch.equal(first[name], other[name]) for other in others)}
        anchor = {name: first[name] if name in equal_now else anchor[name] for name in anchor}
    return drifts


def verify_by_hand(histories, margin=1e-4):
    """All replicas sync exactly where the largest drift passes tau times the learning rate over the first."""
    drifts = drifts_by_hand(histories)
    for own_drifts, records in zip(drifts, zip(*histories, strict=True), strict=True):
        assert len({r["synced"] for r in records}) == 1
        weighed = max(drift / r["scale"] for drift, r in zip(own_drifts, records, strict=True))
        assert abs(weighed / TAU - 1) > margin, "too near to tau to say anything"
        assert records[0]["synced"] == (weighed > TAU)
    synced = [record["synced"] for record in histories[0]]
    assert 2 <= sum(synced) <= STEPS // 2
    return drifts, synced


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "hook", [LOCAL, {}, SIGN, {**SIGN, "spread": 2}, {**LOCAL, "outer_lr": 0.7, "outer_momentum": 0.5}], ids=str
)
def test_replicas_sync_where_one_of_them_has_drifted_by_tau(replicas, world, hook):
    verify_by_hand(replicas.run(world, watched, hook))


@pytest.mark.parametrize("hook", [LOCAL, SIGN], ids=str)
def test_narrow_parameters_drift_like_wide_ones(replicas, hook):
    verify_by_hand(replicas.run(2, watched, hook, torch.bfloat16), margin=2e-3)


@pytest.mark.parametrize("event", ["frozen", "rollback"])
def test_parameters_that_were_frozen_or_loaded_drift_from_where_they_were_settled(replicas, event):
    histories = replicas.run(2, watched, LOCAL, torch.float32, constant, event)
    verify_by_hand(histories)
    assert sum(record["settled"] for record in histories[0]) == 1


def test_where_the_learning_rate_falls_the_bound_falls_with_it(replicas):
    histories = replicas.run(2, watched, LOCAL, torch.float32, falling)
    drifts, synced = verify_by_hand(histories)
    late = [max(own) for own, fired in zip(drifts[8:], synced[8:], strict=True) if fired]
    assert late and max(late) < TAU, "a constant bound would have starved them"


def all_frozen(rank, world):
    model, optimizer = build(hook=LOCAL, trigger=DriftThreshold(TAU))
    train_step(model, optimizer, 0, shard=rank)
    model.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.step()
    return optimizer.last_step.synced


def test_a_model_without_a_trainable_parameter_does_not_drift(replicas):
    assert replicas.run(2, all_frozen) == [False, False]


def test_replicas_of_different_learning_rates_take_one_branch(replicas):
    # As where each reduces its own on a plateau: rank 1 alone passes its bound.
    histories = replicas.run(2, watched, LOCAL, torch.float32, falling_on_rank_1)
    drifts, synced = verify_by_hand(histories)
    assert any(fired and own[0] < TAU for own, fired in zip(drifts, synced, strict=True))


def test_a_local_step_sends_24_bytes_and_a_sync_step_no_more_collectives_than_with_another_trigger(replicas):
    for hook in (LOCAL, SIGN):
        for history in replicas.run(2, watched, hook):
            for record in history:
                assert record["calls"][0] == 24
                assert len(record["calls"]) <= 4 if record["synced"] else record["calls"] == [24]


def beside_another(rank, world):
    """The sizes of what two optimizers of one hook send, one of which watches the drift."""
    torch.manual_seed(0)
    sync = exact_sync(**LOCAL)
    parameters = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    triggers = [DriftThreshold(1e9), EveryNSteps(9)]
    optimizers = [CurvaDion([p], trigger=trigger) for p, trigger in zip(parameters, triggers, strict=True)]
    for optimizer in optimizers:
        optimizer.register_sync_hook(sync)
    sizes = []
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
        with counted_collectives() as calls:
            optimizer.step()
        sizes += [size for _, size in calls]
    with counted_collectives() as calls:
        sync.agreement.verify_no_step(torch.device("cpu"))
    return sizes, [size for _, size in calls]


def test_all_agreements_of_a_hook_have_one_size(replicas):
    assert replicas.run(2, beside_another) == [([24, 24], [24])] * 2


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saved_and_loaded(rank, world, hook, path):
    """A run that went on, and one that a checkpoint took up: whether they are equal, and when they synced."""
    options = {"trigger": DriftThreshold(TAU), "lr": LR}
    model, optimizer = build(hook=hook, **options)
    for step in range(8):
        train_step(model, optimizer, step, shard=rank)
        for group in optimizer.param_groups:
            group["lr"] = LR / 4
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    torch.distributed.barrier()
    saved = torch.load(path, weights_only=True)
    other_model, other = build(hook=hook, seed=1, **options)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    synced = []
    for step in range(8, 20):
        train_step(model, optimizer, step, shard=rank)
        train_step(other_model, other, step, shard=rank)
        synced.append((optimizer.last_step.synced, other.last_step.synced))
    return equal(state_of(optimizer), state_of(other)), synced


@pytest.mark.parametrize("hook", [LOCAL, SIGN, {**SIGN, "spread": 2}, {"consensus": "factors"}], ids=str)
def test_a_loaded_run_continues_bit_for_bit(replicas, hook, tmp_path):
    for same, synced in replicas.run(2, saved_and_loaded, hook, str(tmp_path / "saved.pt")):
        assert same
        assert all(own == other for own, other in synced)
        assert 0 < sum(own for own, _ in synced) < len(synced)


# -- refusals ---------------------------------------------------------------------------------------------------------


def attached_without_consensus(rank, world):
    try:
        build(hook={"consensus": "none"}, trigger=DriftThreshold(TAU))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("world", [1, 2])
def test_a_drift_that_no_consensus_ends_is_refused(replicas, world):
    for message in replicas.run(world, attached_without_consensus):
        assert message.startswith('use consensus="average", or a trigger such as IntegratedRMMC(0.3): DriftThreshold')


# -- the measurement --------------------------------------------------------------------------------------------------


def test_what_a_narrow_parameter_cannot_hold_is_no_drift():
    anchors, parameter = Anchors(), torch.ones(4, dtype=torch.bfloat16)
    anchors.capture([parameter])
    anchors.to_move(parameter).add_(1e-3)
    meter = DisplacementMeter(anchors)
    assert meter.measure([parameter]).item() == 0
    parameter += 0.25
    assert meter.measure([parameter]).item() == pytest.approx(0.25 / 1.001)


def test_the_norm_of_the_anchors_follows_them():
    anchors, parameters = Anchors(), [torch.ones(4), torch.ones(4)]
    anchors.capture(parameters)
    meter = DisplacementMeter(anchors)
    parameters[0] += 1.0
    assert meter.measure(parameters).item() == pytest.approx(math.sqrt(4 / 8))
    assert meter.measure(parameters[:1]).item() == pytest.approx(1.0)
    anchors.to_move(parameters[0]).mul_(3.0)
    assert meter.measure(parameters[:1]).item() == pytest.approx(1 / 3)


def test_a_parameter_that_is_nan_or_started_at_zero_counts_as_far_away():
    anchors, parameter = Anchors(), torch.zeros(4)
    anchors.capture([parameter])
    meter = DisplacementMeter(anchors)
    assert meter.measure([parameter]).item() == 0
    parameter[0] = 1e-3
    assert meter.measure([parameter]).item() > 1e9
    parameter[0] = math.nan
    assert meter.measure([parameter]).item() == math.inf


def test_a_measurement_in_batches_is_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (40,), (2, 2), (0,), (7,)]
    parameters = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters.insert(2, torch.randn(6, generator=generator).bfloat16())
    anchors = Anchors()
    anchors.capture(parameters)
    for parameter in parameters:
        parameter += 0.5
    whole = DisplacementMeter(anchors).measure(parameters)
    monkeypatch.setattr(displacement_meter, "STACK_ELEMENTS", 16)
    batches = list(displacement_meter._batches(parameters))
    assert [id(p) for batch in batches for p in batch] == [id(p) for p in parameters]
    assert all(sum(p.numel() for p in batch) <= 16 or len(batch) == 1 for batch in batches)
    torch.testing.assert_close(DisplacementMeter(anchors).measure(parameters), whole)
