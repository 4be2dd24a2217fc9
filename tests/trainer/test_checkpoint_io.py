"""A checkpoint is one consensus, whoever reads or writes it, and a complete file or none."""

import os
import time
from pathlib import Path

import breaking
import lightning.pytorch as pl
import pytest
import torch
from failing import Module
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import equal, parameters_of, state_of
from torch.utils.data import DataLoader
from training import same, trainer_for

from lightning_curvadion import CurvaDionStrategy
from lightning_curvadion.trainer.checkpoint_io import AtomicCheckpointIO

OUTER = {"wire_format": "int4", "outer_lr": 0.8, "outer_momentum": 0.5}


def fit(rank, world, folder, options, steps=8, resume=None, every=4, ddp=False, plugins=()):
    """Train and save every few steps; the steps, the parameters and the optimizer's state at the end."""
    pl.seed_everything(0, verbose=False)
    module = Module()
    trainer = trainer_for(
        rank,
        world,
        DDPStrategy() if ddp else CurvaDionStrategy(**options),
        max_steps=steps,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)],
        enable_checkpointing=True,
        plugins=list(plugins),
    )
    # More batches than are trained, so that every checkpoint is in the middle of an epoch.
    trainer.fit(module, DataLoader(torch.zeros(1000), batch_size=1), ckpt_path=resume)
    return trainer.global_step, parameters_of(module), state_of(trainer.optimizers[0])


@pytest.mark.parametrize("options", [{}, OUTER, {"consensus": "factors"}, {"momentum": "average"}])
@pytest.mark.parametrize("world", [2, 3])
def test_a_resumed_run_continues_bit_for_bit_in_the_middle_of_an_epoch(replicas, tmp_path, options, world):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    through = replicas.run(world, fit, str(whole), options, timeout=120)
    again = replicas.run(world, fit, str(resumed), options, 8, str(whole / "step=4.ckpt"), timeout=120)
    for (_, parameters, state), (steps, others, other_state) in zip(through, again, strict=True):
        assert steps == 8 and same(parameters, others) and equal(state, other_state)
    saved = [torch.load(path / "step=8.ckpt", weights_only=True) for path in (whole, resumed)]
    assert same(*[list(checkpoint["state_dict"].values()) for checkpoint in saved])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_another_number_of_replicas_starts_from_the_saved_consensus(replicas, tmp_path, before, after):
    replicas.run(before, fit, str(tmp_path), {}, 4)
    path = str(tmp_path / "step=4.ckpt")
    at_once = replicas.run(after, fit, str(tmp_path / "at once"), {}, 4, path)
    names = [name for name, _ in Module().named_parameters()]
    saved = [torch.load(path, weights_only=True)["state_dict"][name] for name in names]
    assert all(same(parameters, saved) for _, parameters, _ in at_once)
    later = replicas.run(after, fit, str(tmp_path / "later"), {}, 8, path)
    assert all(steps == 8 and not same(parameters, saved) for steps, parameters, _ in later)


@pytest.mark.parametrize("from_ddp", [True, False])
def test_a_checkpoint_goes_from_ddp_to_curvadion_and_back(replicas, tmp_path, from_ddp):
    replicas.run(2, fit, str(tmp_path), {}, 4, None, 4, from_ddp)
    path = str(tmp_path / "step=4.ckpt")
    momentum = torch.load(path, weights_only=True)["optimizer_states"][0]["state"][0]["momentum"]
    at_once = replicas.run(2, fit, str(tmp_path / "at once"), {}, 4, path, 4, not from_ddp)
    for _, _, state in at_once:
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        assert any(torch.equal(tensor, momentum) for tensor in tensors)
    for steps, _, _ in replicas.run(2, fit, str(tmp_path / "later"), {}, 8, path, 4, not from_ddp):
        assert steps == 8


def test_a_checkpoint_written_in_the_background_is_the_same(replicas, tmp_path):
    replicas.run(2, fit, str(tmp_path / "plain"), {}, 4)
    replicas.run(2, fit, str(tmp_path / "background"), {}, 4, None, 4, False, [AsyncCheckpointIO()])
    plain, background = (
        torch.load(tmp_path / name / "step=4.ckpt", weights_only=True)["state_dict"] for name in ("plain", "background")
    )
    assert same(list(plain.values()), list(background.values()))
    assert sorted(path.name for path in (tmp_path / "background").iterdir()) == ["step=4.ckpt"]


def strict(rank, world, path):
    weights = torch.load(path, weights_only=True)
    module = Module.load_from_checkpoint(path, weights_only=True)
    assert same(list(module.state_dict().values()), list(weights["state_dict"].values()))
    del weights["state_dict"]["net.head.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(weights["state_dict"])
    module.strict_loading = False
    module.load_state_dict(weights["state_dict"], strict=False)


def test_weights_load_elsewhere_with_strict_as_usual(replicas, tmp_path):
    replicas.run(2, fit, str(tmp_path), {}, 4)
    replicas.run(1, strict, str(tmp_path / "step=4.ckpt"))


def from_directory(rank, world, path):
    with pytest.raises(MisconfigurationException, match=r"is a directory.*consolidate_checkpoint"):
        fit(rank, world, path, {}, 4, path)


def test_a_sharded_checkpoint_is_an_error_that_says_what_to_do(replicas, tmp_path):
    sharded = Path(tmp_path / "sharded")
    sharded.mkdir()
    replicas.run(2, from_directory, str(sharded))


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path):
    breaking.write(tmp_path)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(Exception, match=r"pickle|local"):
        AtomicCheckpointIO().save_checkpoint({"x": lambda: None}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(2)}, tmp_path / "deep" / "a.ckpt")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.ckpt"]


def save_at_the_same_time(rank, world, path):
    """Save 60 times and load after each; the values that were found, and names that are not the checkpoint's."""
    found, io = set(), AtomicCheckpointIO()
    for _ in range(60):
        io.save_checkpoint({"x": torch.full((100_000,), float(rank))}, path)
        found.update(io.load_checkpoint(path)["x"].unique().tolist())
    torch.distributed.barrier()
    return found, [entry.name for entry in Path(path).parent.iterdir()]


def test_processes_that_save_to_one_path_at_the_same_time_leave_a_whole_checkpoint(replicas, tmp_path):
    for found, names in replicas.run(3, save_at_the_same_time, str(tmp_path / "a.ckpt")):
        assert found <= {0.0, 1.0, 2.0} and names == ["a.ckpt"]


def test_what_a_killed_process_left_an_hour_ago_is_removed_by_the_next_save(tmp_path):
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "b.ckpt")
    kept = [".a.ckpt.0123456789abcdef.part", ".download.part", "b.ckpt"]
    for name in (".b.ckpt.fedcba9876543210.part", *kept):
        (tmp_path / name).touch()
        hours_ago = time.time() - (0.9 if name == kept[0] else 1.1) * 3600
        os.utime(tmp_path / name, (hours_ago, hours_ago))
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a.ckpt"])


def test_others_may_read_a_checkpoint_as_any_other_file(tmp_path):
    before = os.umask(0o027)
    try:
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    finally:
        os.umask(before)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640
