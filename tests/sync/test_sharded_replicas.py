"""Replicas that are sharded over their processes by fully_shard: they train what replicas under DDP do."""

import copy

import pytest
import torch
import torch.distributed as dist
from models import Net, equal, train_step
from moves import recorded_moves
from sharded import attach_sharded, layers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from training import fingerprint
from two_levels import attach

from lightning_curvadion import (
    CurvaDion,
    EveryNSteps,
    IntegratedRMMC,
    ProcessGroupSync,
    split_parameters,
)
from lightning_curvadion.optim.shards import is_sharded, local_of, sharded_like
from lightning_curvadion.sync.payloads import FEWEST_ROWS

# Processes that share a busy machine with others.
PATIENT = {"timeout": 240.0}
DEFAULT = {"wire_format": None, "momentum": None, "lag": 1}
STEPS = 20


def whole(tensor, optimizer):
    """A copy of all rows of a tensor. Not by ``full_tensor``: DTensors remember the groups of an earlier job."""
    tensor = torch.as_tensor(tensor).detach()
    if not is_sharded(tensor):
        return tensor.clone()
    group = optimizer.sync_hook._inner_group
    shards = [None] * group.size()
    dist.all_gather_object(shards, local_of(tensor).clone(), group=group)
    return torch.cat(shards)


def everything(optimizer):
    """Copies of all parameters and of the state, whole."""
    tensors = {}
    for name, parameter in optimizer.named_parameters():
        for key, value in {name: parameter, **optimizer.state[parameter]}.items():
            tensors[name if key == name else f"{key} of {name}"] = whole(value, optimizer)
    return tensors


def trained_both_ways(rank, world, model, runs):
    """Parameters, state and RMMC under DistributedDataParallel and under fully_shard, for each run."""
    ends = []
    for hook, arguments, every in runs:
        for way in (attach, attach_sharded):
            module, optimizer = way(world, 2, model(), hook, trigger=EveryNSteps(every), **arguments)
            seen = []
            for step in range(STEPS):
                train_step(module, optimizer, step, rank)
                seen.append((optimizer.last_step.rmmc, optimizer.last_step.bytes_sent))
            optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
            ends.append((everything(optimizer), seen, fingerprint(module.buffers())))
    return ends


def without_batch_norm():
    torch.manual_seed(0)
    model = Net(width=15)
    # Its statistics are those of a process's own batch.
    model.batch_norm = nn.Identity()
    return model


def all_layouts():
    # In float64, since Newton-Schulz makes a rounding error of a small square matrix five hundred times as large.
    return layers().double()


RUNS = [
    ({"momentum": "displacement"}, {}, 1),
    ({"momentum": "displacement"}, {"local_update": "dion"}, 3),
    ({"momentum": "local", "lag": 1, "overlap": 2, "spread": 2}, {}, 2),
    ({"momentum": "local"}, {"local_update": "sgd", "local_lr": 0.1}, 2),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("model", "runs", "tolerance"), [(without_batch_norm, RUNS[:2], 1e-5), (all_layouts, RUNS, 1e-9)]
)
def test_at_full_width_a_sharded_replica_trains_as_one_under_ddp(replicas, model, runs, tolerance):
    everyone = replicas.run(4, trained_both_ways, model, runs, **PATIENT)
    for runs_of_all in zip(*everyone, strict=True):
        assert len({buffers for *_, buffers in runs_of_all}) == 1, "after a consensus buffers are equal too"
    for ends in everyone:
        for run, (expected, seen_of_ddp, _), (end, seen, _) in zip(runs, ends[::2], ends[1::2], strict=True):
            assert end.keys() == expected.keys()
            for name in expected:
                # Norms are in float32. Columns of Q that carry next to nothing of the momentum are rounding.
                allowed = 100 * tolerance if name.startswith("Q of") else tolerance
                allowed = 1e-5 if name.startswith("norm of") else allowed
                close = torch.allclose(end[name].double(), expected[name].double(), rtol=allowed, atol=allowed)
                assert close, (run, name, (end[name] - expected[name]).abs().max())
            for (rmmc, _), (expected_rmmc, _) in zip(seen, seen_of_ddp, strict=True):
                assert rmmc == pytest.approx(expected_rmmc, rel=1e-3, abs=1e-5), run
            assert [sent for _, sent in seen] == [sent for _, sent in seen_of_ddp], run


def bits_over_a_run(rank, world, hook):
    """Bits of this process's shards, what its replica moved, and where it ended, of a run with moved rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(FEWEST_ROWS + 7, 20), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 1))
    module, optimizer = attach_sharded(world, 2, model, hook, trigger=EveryNSteps(2), weight_decay=0.0)
    parameters = list(module.parameters())
    generator = torch.Generator().manual_seed(rank)
    starts, bits = [whole(parameter, optimizer).double() for parameter in parameters], []
    with recorded_moves(parameters) as moves:
        for _ in range(7):
            tokens = torch.randint(0, FEWEST_ROWS + 7, (16,), generator=generator)
            optimizer.zero_grad()
            module(tokens).square().sum().backward()
            moves.start()
            optimizer.step()
            bits.append(fingerprint(map(local_of, parameters)))
    with torch.no_grad():
        # From here on the module holds whole parameters, which the consensus changes.
        module(torch.arange(16))
        optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
        computed = module(torch.arange(16))
        module.reshard()
        assert torch.equal(module(torch.arange(16)), computed)
        bits.append(fingerprint([computed]))
    ends = [whole(parameter, optimizer).double() - start for parameter, start in zip(parameters, starts, strict=True)]
    tensors = [value for p in parameters for value in (p, *optimizer.state[p].values()) if isinstance(value, Tensor)]
    state = fingerprint(map(local_of, tensors))
    moved = [whole(total, optimizer) for total in moves.totals]
    return bits, state, ends, moved, optimizer.rmmc_by_parameter(), optimizer.sync_hook.bytes_sent


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "hook"), [(4, DEFAULT), (6, {**DEFAULT, "overlap": 2})])
def test_in_one_bit_counterparts_end_equal_and_nothing_is_lost(replicas, world, hook):
    everyone = replicas.run(world, bits_over_a_run, hook, **PATIENT)
    firsts, seconds = everyone[::2], everyone[1::2]
    for of_shard in (firsts, seconds):
        bits, states, *_ = zip(*of_shard, strict=True)
        assert len({own[0] for own in bits}) == len(bits), "after a local step replicas differ"
        assert len(set(states)) == 1, "after a consensus they are equal"
    assert len({own[0][-1] for own in everyone}) == 1, "and so is what the modules compute"
    for end, *moved in zip(firsts[0][2], *(own[3] for own in firsts), strict=True):
        assert (end - sum(moved) / len(moved)).abs().max() < 1e-5
    for first, second in zip(firsts, seconds, strict=True):
        assert first[4] == second[4], "all processes of a replica see one RMMC"
        assert first[5] == second[5], "and count what it sends"


def one_replica_both_ways(rank, world):
    ends = []
    for way in (attach, attach_sharded):
        module, optimizer = way(world, world, layers().double(), DEFAULT, trigger=EveryNSteps(2))
        for step in range(6):
            train_step(module, optimizer, step, rank)
        ends.append((everything(optimizer), optimizer.last_step.bytes_sent))
    return ends


@pytest.mark.timeout(300)
def test_a_single_sharded_replica_trains_as_one_under_ddp(replicas):
    for (expected, sent), (end, sent_by_shards) in replicas.run(3, one_replica_both_ways, **PATIENT):
        assert sent == sent_by_shards
        for name in expected:
            assert torch.allclose(end[name].double(), expected[name].double(), rtol=1e-5, atol=1e-9), name


def bytes_held(rank, world, way, dtype):
    """Bytes that a process holds: parameters, moments, residuals and anchors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 64)).to(dtype)
    way = attach_sharded if way == "sharded" else attach
    module, optimizer = way(world, 2, model, DEFAULT, trigger=EveryNSteps(1))
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.arange(8)).square().sum().backward()
        optimizer.step()
    held = {"parameters": 0, "anchors": optimizer.sync_hook.anchor_bytes}
    for parameter in module.parameters():
        held["parameters"] += local_of(parameter).nbytes
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                held[name] = held.get(name, 0) + local_of(value).nbytes
    return held


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_holds_a_half_of_parameters_and_state(replicas, dtype):
    unsharded, *_ = replicas.run(4, bytes_held, "ddp", dtype, **PATIENT)
    for held in replicas.run(4, bytes_held, "sharded", dtype, **PATIENT):
        assert held.keys() == unsharded.keys() >= {"momentum", "Q", "exp_avg", "exp_avg_sq", "residual", "anchors"}
        for name in held.keys() - {"norm", "residual"}:
            assert held[name] == unsharded[name] / 2, name
        # Under DDP each process of a replica holds its part of these already.
        assert held["residual"] == unsharded["residual"]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def continued_and_resumed(rank, world, hook, folder):
    """Bits after steps 5 to 8, of the run that saved before them, and of those that start from what it saved."""
    # Seconds to import.
    from torch.distributed import checkpoint

    def attached(seed):
        module = layers()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(seed)
        return attach_sharded(world, 2, module, hook, trigger=IntegratedRMMC(0.5))

    def trained_on(module, optimizer):
        for step in range(5, 9):
            train_step(module, optimizer, step, rank)
        optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
        return fingerprint(everything(optimizer).values())

    module, optimizer = attached(0)
    for step in range(5):
        train_step(module, optimizer, step, rank)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    checkpoint.save({"model": module, "optimizer": optimizer}, checkpoint_id=folder)
    gathered = optimizer.state_dict()
    gathered["state"] = {
        number: {name: whole(value, optimizer) if isinstance(value, Tensor) else value for name, value in own.items()}
        for number, own in gathered["state"].items()
    }
    gathered = copy.deepcopy(gathered)
    weights = [whole(parameter, optimizer) for parameter in module.parameters()]
    continued = trained_on(module, optimizer)

    module, optimizer = attached(1)
    checkpoint.load({"model": module, "optimizer": optimizer}, checkpoint_id=folder)
    resumed = trained_on(module, optimizer)

    # A whole state, as a run under DistributedDataParallel saves it.
    module, optimizer = attached(2)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), weights, strict=True):
            local_of(parameter).copy_(local_of(sharded_like(value, parameter)))
    optimizer.sync_hook.note_other_values(module.parameters())
    optimizer.load_state_dict(gathered)
    return continued, resumed, trained_on(module, optimizer)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hook", [DEFAULT])
def test_a_distributed_checkpoint_and_a_whole_state_resume_bit_for_bit(replicas, hook, tmp_path):
    for continued, *resumed in replicas.run(4, continued_and_resumed, hook, str(tmp_path), **PATIENT):
        assert resumed == [continued] * 2


def saved(rank, world, folder):
    """Everything of a run of a few steps that saves itself."""
    # Seconds to import.
    from torch.distributed import checkpoint

    module, optimizer = attach_sharded(world, 2, layers(), DEFAULT, trigger=EveryNSteps(2))
    for step in range(3):
        train_step(module, optimizer, step, rank)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    checkpoint.save({"model": module, "optimizer": optimizer}, checkpoint_id=folder)
    return everything(optimizer)


def loaded(rank, world, size, folder):
    """Everything of a run that starts from a distributed checkpoint, and one step more."""
    # Seconds to import.
    from torch.distributed import checkpoint

    module, optimizer = attach_sharded(world, size, layers(), DEFAULT, trigger=EveryNSteps(2))
    checkpoint.load({"model": module, "optimizer": optimizer}, checkpoint_id=folder)
    start = everything(optimizer)
    train_step(module, optimizer, 3, rank)
    return start


@pytest.mark.timeout(300)
def test_a_distributed_checkpoint_is_read_by_other_replicas_and_consolidates_to_a_file(replicas, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, file = str(tmp_path / "distributed"), tmp_path / "whole.pt"
    expected, *_ = replicas.run(4, saved, folder, **PATIENT)
    for state in replicas.run(6, loaded, 3, folder, **PATIENT):
        assert equal(state, expected)

    dcp_to_torch_save(folder, file)
    checkpoint = torch.load(file, weights_only=True)
    model = layers(seed=1)
    optimizer = CurvaDion(split_parameters(model))
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert equal(everything(optimizer), expected)


# -- one process alone ------------------------------------------------------------------------------------------------


def one_process_breaks(rank, world, what):
    module, optimizer = attach_sharded(world, 2, layers(), DEFAULT, trigger=EveryNSteps(2))
    train_step(module, optimizer, 0, rank)
    optimizer.zero_grad()
    module(torch.arange(11)).square().sum().backward()
    if what == "weights" and rank == 3:
        local_of(module.head.weight)[0, 0] = 1e30
    if what == "gradient" and rank == 3:
        local_of(module.head.weight.grad)[0, 0] = float("nan")
    try:
        optimizer.step()
        optimizer.sync_hook.reach_consensus(optimizer)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("what", "said"),
    [("gradient", "head.weight has a gradient"), ("weights", "displacement of head.weight")],
)
def test_an_error_of_one_process_is_raised_by_all_and_names_its_replica(replicas, what, said):
    answers = replicas.run(4, one_process_breaks, what, **PATIENT)
    assert len(set(answers)) == 1 and f"replica 1 (ranks 2 and 3): {said}" in answers[0], answers


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(rank, world):
    # Seconds to import.
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "inner"))
    group, inner_group = mesh.get_group("replica"), mesh.get_group("inner")
    model = layers()
    whole_optimizer = CurvaDion(split_parameters(model))
    whole_optimizer.register_sync_hook(sync := ProcessGroupSync(group, inner_group=inner_group))
    fully_shard(model, mesh=mesh["inner"])
    with pytest.raises(ValueError, match="make the optimizer after that"):
        sync.include_module(model)

    def attaching(message, hook=None, **arguments):
        optimizer = CurvaDion(split_parameters(model), **arguments)
        with pytest.raises(ValueError, match=message):
            optimizer.register_sync_hook(
                ProcessGroupSync(**{"group": group, "inner_group": inner_group, **(hook or {})})
            )

    attaching("give ProcessGroupSync their process group as inner_group", {"group": None, "inner_group": None})
    attaching(
        r"sharded over ranks \[.*\], but a replica consists of ranks", {"group": inner_group, "inner_group": group}
    )
    attaching('need consensus="average"', {"momentum": "factors"})
    attaching("no outer step", {"outer_momentum": 0.5})
    optimizer = CurvaDion(split_parameters(model))
    optimizer.register_sync_hook(sync := ProcessGroupSync(group, inner_group=inner_group))
    with pytest.raises(ValueError, match="this module is whole"):
        sync.include_module(layers())
    with pytest.raises(ValueError, match="fully_shard in place of FullyShardedDataParallel"):
        sync.include_module(FullyShardedDataParallel(nn.Linear(4, 4), inner_group, device_id=torch.device("cpu")))
    with pytest.raises(ValueError, match="nothing makes their matrices whole"):
        CurvaDion(split_parameters(model)).step()

    partly = nn.Sequential(fully_shard(nn.Linear(4, 4), mesh=mesh["inner"]), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="is whole where others are sharded"):
        CurvaDion(split_parameters(partly)).register_sync_hook(ProcessGroupSync(group, inner_group=inner_group))
    hybrid = fully_shard(nn.Linear(4, 4), mesh=mesh)
    by_columns = parallelize_module(nn.Linear(4, 4), mesh["inner"], RowwiseParallel())
    for other in (hybrid, by_columns):
        with pytest.raises(ValueError, match=r"fully_shard\(model, mesh=mesh.*leave out tensor parallelism"):
            CurvaDion(split_parameters(other))
    by_rows = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh["inner"], {"0": ColwiseParallel()})
    optimizer = CurvaDion(split_parameters(by_rows))
    optimizer.register_sync_hook(sync := ProcessGroupSync(group, inner_group=inner_group))
    with pytest.raises(ValueError, match="call fully_shard on the module that you include"):
        sync.include_module(by_rows)


@pytest.mark.timeout(300)
def test_what_cannot_be_sharded_is_refused(replicas):
    replicas.run(4, refused, **PATIENT)
