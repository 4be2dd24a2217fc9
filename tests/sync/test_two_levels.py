"""Two levels: several processes form a replica, hold the same bits, and send what one process would."""

import copy
from unittest.mock import patch

import pytest
import torch
from models import EXACT, Net, parameters_of, state_of, train_step
from moves import recorded_moves
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import fingerprint
from two_levels import attach, groups_of

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.optim import muon
from lightning_curvadion.sync.payloads import FEWEST_ROWS

QUANTIZED = {"wire_format": None, "momentum": None}
DELAYED = {**QUANTIZED, "lag": 1, "overlap": 2}
HOOKS = [
    DELAYED,
    {**QUANTIZED, "lag": 3, "spread": 2, "chunk": 50},
    {"wire_format": "int4"},
    {"momentum": "local", "outer_momentum": 0.5},
    {"consensus": "factors", "factor_format": "int4"},
]
# Fewer numbers than processes, and an embedding of which rows travel.
SHAPES = [(3,), (FEWEST_ROWS + 7, 20), (6, 4), (1,)]


def shared_bits(optimizer):
    """What all processes of a replica hold: all but the residuals, which their owners have."""
    return fingerprint(
        value
        for name, value in state_of(optimizer).items()
        if isinstance(value, torch.Tensor) and not name.endswith("residual")
    )


def without_batch_norm():
    torch.manual_seed(0)
    model = Net()
    # Its statistics are those of a process's own batch.
    model.batch_norm = nn.Identity()
    return model


def bits_over_a_run(rank, world, size, hooks):
    runs = []
    for hook in hooks:
        torch.manual_seed(0)
        module, optimizer = attach(world, size, Net(), hook, trigger=EveryNSteps(3))
        bits = []
        for step in range(7):
            train_step(module, optimizer, step, rank)
            bits.append(shared_bits(optimizer))
        optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
        end = fingerprint([*module.parameters(), *module.buffers()]) + shared_bits(optimizer)
        runs.append((bits, end, optimizer.sync_hook.bytes_sent))
    return runs


@pytest.mark.parametrize(("world", "hooks"), [(4, HOOKS), (6, [DELAYED])])
def test_all_processes_of_a_replica_hold_the_same_bits_at_every_step(replicas, world, hooks):
    everyone = replicas.run(world, bits_over_a_run, 2, hooks)
    for hook, runs in zip(hooks, zip(*everyone, strict=True), strict=True):
        for first, second in zip(runs[::2], runs[1::2], strict=True):
            assert first == second, hook
        assert runs[0][0][1] != runs[2][0][1], "after a local step replicas differ"
        assert len({end for _, end, _ in runs}) == 1, hook


def rows_over_a_run(rank, world, size, overlap):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    model = nn.ParameterList(parameters)
    groups = [{"params": [parameters[2]]}, {"params": [parameters[i] for i in (0, 1, 3)], "algorithm": "adamw"}]
    optimizer = CurvaDion(groups, lr=0.02, weight_decay=0.0, trigger=EveryNSteps(2))
    group, inner = groups_of(world, size)
    optimizer.register_sync_hook(ProcessGroupSync(group, inner_group=inner, overlap=overlap))
    generator = torch.Generator().manual_seed(rank // size)
    starts, bits = [parameter.detach().double() for parameter in parameters], []
    with recorded_moves(parameters) as moves:
        for _ in range(7):
            # One gradient for all processes of a replica, as DistributedDataParallel leaves it.
            for parameter in model:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameters[1].grad[torch.randperm(len(parameters[1]), generator=generator)[40:]] = 0.0
            moves.start()
            optimizer.step()
            bits.append(shared_bits(optimizer))
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    ends = [p.detach().double() - start for p, start in zip(parameters, starts, strict=True)]
    return bits, shared_bits(optimizer), ends, moves.totals


@pytest.mark.parametrize("overlap", [0, 2])
def test_of_moved_rows_and_parameters_of_one_number_nothing_is_lost(replicas, overlap):
    first, second, third, fourth = replicas.run(4, rows_over_a_run, 2, overlap)
    assert first[:2] == second[:2] and third[:2] == fourth[:2]
    assert first[0] != third[0] and first[1] == third[1]
    for end, own, other in zip(first[2], first[3], third[3], strict=True):
        assert (end - (own + other) / 2).abs().max() < 1e-5


def two_replicas_of_48_samples(rank, world, hook):
    """What two replicas learn of one set of data, as one process each or as two."""
    model, size = without_batch_norm(), world // 2
    if size == 1:
        module, optimizer = model, CurvaDion(split_parameters(model), lr=0.02, trigger=EveryNSteps(3))
        optimizer.register_sync_hook(ProcessGroupSync(**{**EXACT, **hook}))
    else:
        module, optimizer = attach(world, size, model, hook, trigger=EveryNSteps(3))
    before = optimizer.sync_hook.bytes_sent
    for step in range(10):
        shards = (2 * rank, 2 * rank + 1) if size == 1 else (rank,)
        generators = [torch.Generator().manual_seed(1000 * shard + step) for shard in shards]
        tokens = torch.cat([torch.randint(0, 11, (24,), generator=generator) for generator in generators])
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(tokens), (3 * tokens + 1) % 11).backward()
        optimizer.step()
    sent = optimizer.sync_hook.bytes_sent - before
    optimizer.sync_hook.reach_consensus(optimizer)
    return parameters_of(model), sent


@pytest.mark.parametrize("hook", [{}, {"momentum": "displacement", "lag": 1, "overlap": 2}])
def test_two_by_two_processes_learn_what_two_replicas_with_twice_the_batch_do(replicas, hook):
    (one_level, sent), _ = replicas.run(2, two_replicas_of_48_samples, hook)
    (two_levels, sent_by_two), *_ = replicas.run(4, two_replicas_of_48_samples, hook)
    for a, b in zip(one_level, two_levels, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    assert sent == sent_by_two


def orthonormalised(rank, world, size):
    """How many matrices each of some steps orthonormalises on this process, and what becomes of the parameters."""
    counts, newton_schulz = [], muon.newton_schulz
    module, optimizer = attach(world, size, without_batch_norm(), {"momentum": "displacement"}, trigger=EveryNSteps(2))
    with patch.object(muon, "newton_schulz", lambda U, eps: counts.append(len(U)) or newton_schulz(U, eps)):
        by_step = []
        for step in range(4):
            # One set of data for all.
            train_step(module, optimizer, step, 0)
            by_step.append(sum(counts))
            counts.clear()
    return by_step, parameters_of(module)


def test_the_processes_of_a_replica_share_out_its_matrices(replicas):
    (alone, expected), _ = replicas.run(2, orthonormalised, 1)
    (first, found), (second, _), *_ = replicas.run(4, orthonormalised, 2)
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    assert all(0 < own < total for own, total in zip(first, alone, strict=True))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def counted_bytes(rank, world, size):
    module, optimizer = attach(world, size, Net(), QUANTIZED, trigger=EveryNSteps(2))
    sync = optimizer.sync_hook
    own = sync._collectives._outer
    counts = []
    for step in range(4):
        before = sync.bytes_sent, own.bytes_sent
        train_step(module, optimizer, step, rank)
        counts.append((sync.bytes_sent - before[0], own.bytes_sent - before[1]))
    residuals = sum(optimizer.state[parameter]["residual"].numel() for parameter in module.parameters())
    return counts, residuals, sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("world", [6])
def test_every_process_counts_what_the_processes_of_its_replica_send_together(replicas, world):
    everyone, residuals, numbers = zip(*replicas.run(world, counted_bytes, 2), strict=True)
    assert residuals[0] + residuals[1] == numbers[0] < 2.1 * residuals[0], "each stores those of what it sends"
    for of_replica, own in zip(everyone[0], zip(*everyone[:2], strict=True), strict=True):
        assert {count for count, _ in own} == {of_replica[0]} == {sum(sent for _, sent in own)}
    assert everyone[0][0][0] == 16, "a local step sends what one process would"


def continued_and_resumed(rank, world, hook):
    """Bits after steps 5 to 8, of the run that saved before them and of one that starts from what it saved."""
    module, optimizer = attach(world, 2, Net(), hook, trigger=EveryNSteps(3))
    for step in range(5):
        train_step(module, optimizer, step, rank)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    ends = []
    for resumed in (False, True):
        if resumed:
            module, optimizer = attach(world, 2, Net(), hook, trigger=EveryNSteps(3))
            module.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for step in range(5, 9):
            train_step(module, optimizer, step, rank)
        ends.append(shared_bits(optimizer) + fingerprint(module.buffers()))
    return ends


@pytest.mark.parametrize("hook", [DELAYED])
def test_a_run_resumes_bit_for_bit(replicas, hook):
    for continued, resumed in replicas.run(4, continued_and_resumed, hook):
        assert continued == resumed


# -- one process alone ------------------------------------------------------------------------------------------------


def one_process_breaks(rank, world, what):
    module, optimizer = attach(world, 2, Net(), QUANTIZED, trigger=EveryNSteps(2))
    train_step(module, optimizer, 0, rank)
    if what == "stop" and rank == 3:
        optimizer.sync_hook.agreement.stop_request = 0.5
    if what == "weights" and rank == 3:
        # A parameter that cannot be quantized, on one process: gradients and the agreement say nothing of it.
        with torch.no_grad():
            module.module.head.weight[0, 0] = 1e30
    try:
        if what == "gradient":
            # Averaged inside of the replica.
            module.module.head.weight.register_hook(lambda g: g * float("nan") if rank == 3 else g)
        train_step(module, optimizer, 1, rank)
    except ValueError as error:
        return str(error)
    return optimizer.sync_hook.agreement.agreed_request


@pytest.mark.parametrize(
    ("what", "said"),
    [("gradient", "replica 1 (ranks 2 and 3): head.weight has a gradient"), ("weights", "replica 1 (ranks 2 and 3): ")],
)
def test_an_error_of_one_process_is_raised_by_all_and_names_its_replica(replicas, what, said):
    answers = replicas.run(4, one_process_breaks, what)
    assert len(set(answers)) == 1 and answers[0].startswith(said), answers


def test_a_stop_request_of_any_process_reaches_all(replicas):
    assert replicas.run(4, one_process_breaks, "stop") == [0.5] * 4


def one_process_loads_other_values(rank, world, hook):
    module, optimizer = attach(world, 2, Net(), hook, trigger=EveryNSteps(2))
    for step in range(7):
        if step == 3 and rank == 3:
            module.module.load_state_dict({name: value + 0.1 for name, value in module.module.state_dict().items()})
        train_step(module, optimizer, step, rank)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    return fingerprint(module.parameters()), shared_bits(optimizer)


@pytest.mark.parametrize("hook", [QUANTIZED, DELAYED])
def test_a_process_that_alone_loads_other_values_comes_back_to_the_others(replicas, hook):
    assert len(set(replicas.run(4, one_process_loads_other_values, hook))) == 1


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(rank, world, what):
    group, inner = groups_of(world, 2)
    model = Net()
    if what == "no group":
        with pytest.raises(ValueError, match="give group as well as inner_group"):
            ProcessGroupSync(inner_group=inner)
        return
    if what == "other models":
        model = Net(2 + (rank == 3))
    optimizer = CurvaDion(split_parameters(model))
    sync = ProcessGroupSync(group, inner_group=inner)
    if what == "other models":
        with pytest.raises(ValueError, match=r"replicas differ: rank 0 has .* where rank 3 has"):
            optimizer.register_sync_hook(sync)
        return
    optimizer.register_sync_hook(sync)
    with pytest.raises(ValueError, match="wrap the module in DistributedDataParallel"):
        sync.include_module(model)
    with pytest.raises(ValueError, match=r"averages the gradients of ranks \[0, 1, 2, 3\], but .* \[(0, 1|2, 3)\]"):
        sync.include_module(DistributedDataParallel(model))


@pytest.mark.parametrize("what", ["no group", "other models", "other modules"])
def test_what_is_no_replica_of_several_processes_is_refused(replicas, what):
    replicas.run(4, refused, what)
