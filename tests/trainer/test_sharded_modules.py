"""Modules that ``configure_model`` shards over the processes of a replica, under a Trainer."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint, _load_distributed_checkpoint
from models import Net
from torch import nn
from training import Module, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy, DriftThreshold, EveryNSteps
from lightning_curvadion.optim.shards import local_of

# The first use of fully_shard takes seconds to import.
PATIENT = {"timeout": 240}
EXACT = {"wire_format": "float32", "momentum": "local"}


class Sharded(Module):
    """Shards its layers as under ModelParallelStrategy; as ``how`` says otherwise.

    Its data depend on the process and the step alone, so that a run can resume at any step.
    """

    def __init__(self, how="shards", trigger=None):
        super().__init__(trigger)
        self.how = how

    def configure_model(self):
        # It is called again for each run of a Trainer.
        if self.how == "whole" or hasattr(self.net.head.weight, "placements"):
            return
        # Seconds to import.
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None and self.how != "world" else None
        if self.how == "columns":
            parallelize_module(self.net.up[0], self.device_mesh["tensor_parallel"], ColwiseParallel())
        if self.how == "meta":
            with torch.device("meta"):
                self.net = Net()
        for layer in [*self.net.up, *self.net.down]:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net.head if self.how == "partly" else self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(1000 * self.trainer.global_rank + self.trainer.global_step)
        tokens = torch.randint(0, 11, (24,), generator=generator)
        return nn.functional.cross_entropy(self.net(tokens), (3 * tokens + 1) % 11)

    def on_train_batch_end(self, *_):
        pass

    def on_validation_start(self):
        pass

    def validation_step(self, batch, batch_idx):
        (tokens,) = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(tokens), (3 * tokens + 1) % 11), sync_dist=True)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def fit(rank, world, how, options, folder=None, resume=None, steps=20, trigger=None, **trainer_options):
    """Train; weights, buffers and state at the end, gathered, and the bytes of parameters and state held here."""
    pl.seed_everything(0, verbose=False)
    module, monitor = Sharded(how, trigger), CommunicationMonitor()
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1) if folder else None
    trainer = trainer_for(
        rank,
        world,
        CurvaDionStrategy(**{"replica_size": 2, **options}),
        callbacks=[monitor, *([saves] if saves else [])],
        enable_checkpointing=saves is not None,
        max_steps=steps,
        **trainer_options,
    )
    trainer.fit(module, ckpt_path=resume)
    (optimizer,) = trainer.optimizers
    loss = trainer.validate(module, verbose=False)[0]["val_loss"]
    state = {
        f"{name} of {number}": whole(value) if isinstance(value, torch.Tensor) else value
        for number, own in enumerate(optimizer.state.values())
        for name, value in own.items()
    }
    tensors = [*module.parameters(), *(v for own in optimizer.state.values() for v in own.values())]
    return {
        "weights": {name: whole(value) for name, value in module.named_parameters()},
        "state": state,
        "held": sum(local_of(t).nbytes for t in tensors if isinstance(t, torch.Tensor)),
        "loss": loss,
        "syncs": optimizer.sync_steps,
        "drift": monitor.mean_drift.history,
    }


def farthest(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one if "Q" not in name)


@pytest.fixture(scope="module")
def fitted(replicas, tmp_path_factory):
    """Two replicas of two processes that shard their module, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("fitted")
    return replicas.run(4, fit, "shards", EXACT, folder, **PATIENT), folder


def test_a_sharded_module_trains_as_one_under_ddp_and_a_process_holds_a_half(replicas, fitted, tmp_path):
    wrapped = replicas.run(4, fit, "whole", EXACT, tmp_path, **PATIENT)
    for own, other in zip(fitted[0], wrapped, strict=True):
        assert farthest(own["weights"], other["weights"]) < 1e-5
        assert own["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert own["syncs"] == other["syncs"] > 3
        # Rows that do not divide, and buffers, make it a little more.
        assert own["held"] < 0.55 * other["held"]


def test_all_end_with_one_model_and_each_process_knows_the_drift_of_its_shards(fitted):
    everyone, _ = fitted
    for other in everyone[1:]:
        assert farthest(other["weights"], everyone[0]["weights"]) == 0
        assert other["drift"] and all(0 < drift < 1 for drift in other["drift"])


@pytest.mark.parametrize("options", [{}, {**EXACT, "overlap": 1}])
def test_a_resumed_run_continues_bit_for_bit(replicas, tmp_path, options):
    through = replicas.run(4, fit, "shards", options, tmp_path / "through", None, 8, **PATIENT)
    again = replicas.run(4, fit, "shards", options, tmp_path / "again", tmp_path / "through/step=4.ckpt", 8, **PATIENT)
    for one, other in zip(through, again, strict=True):
        assert farthest(one["weights"], other["weights"]) == 0
        assert one["state"].keys() == other["state"].keys()


def evaluate(rank, world, folder, replica_size=2):
    trainer = trainer_for(rank, world, CurvaDionStrategy(replica_size=replica_size))
    return trainer.validate(Sharded(), ckpt_path=folder, verbose=False)[0]["val_loss"]


def test_a_checkpoint_is_read_by_other_replicas_validated_and_consolidated(replicas, fitted, tmp_path):
    everyone, folder = fitted
    saved = folder / "step=20.ckpt"
    assert not list(folder.glob(".*")) and len(list(folder.glob("*.ckpt"))) == 5
    for world, size in ((4, 2), (3, 3)):
        losses = replicas.run(world, evaluate, saved, size, **PATIENT)
        assert losses == [pytest.approx(everyone[0]["loss"], abs=1e-6)] * world

    whole_file = tmp_path / "whole.ckpt"
    torch.save(_format_checkpoint(_load_distributed_checkpoint(saved)), whole_file)
    for how in ("shards", "whole"):
        started = replicas.run(4, fit, how, EXACT, None, whole_file, 20, **PATIENT)
        assert farthest(started[0]["weights"], everyone[0]["weights"]) == 0
    later = replicas.run(4, fit, "shards", EXACT, None, whole_file, 24, **PATIENT)
    assert farthest(later[0]["weights"], everyone[0]["weights"]) > 0
    model = Sharded.load_from_checkpoint(whole_file, how="whole", weights_only=False)
    assert farthest(dict(model.named_parameters()), everyone[0]["weights"]) == 0


def clipped(rank, world):
    return fit(
        rank, world, "shards", {}, steps=6, trigger=EveryNSteps(2), gradient_clip_val=0.5, accumulate_grad_batches=2
    )


def test_gradients_are_clipped_and_accumulated(replicas):
    everyone = replicas.run(4, clipped, **PATIENT)
    assert len({one["loss"] for one in everyone}) == 1 and everyone[0]["loss"] < 2.4


def fit_mixed(rank, world, precision):
    return fit(rank, world, "shards", {}, steps=6, precision=precision)["loss"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(replicas, precision):
    losses = replicas.run(4, fit_mixed, precision, **PATIENT)
    assert len(set(losses)) == 1 and losses[0] < 2.4


@pytest.mark.parametrize(("world", "how", "size"), [(4, "meta", 2), (1, "shards", "node"), (2, "shards", "node")])
def test_a_module_without_memory_and_a_single_replica(replicas, world, how, size):
    everyone = replicas.run(world, fit, how, {"replica_size": size}, None, None, 6, **PATIENT)
    for other in everyone:
        assert farthest(other["weights"], everyone[0]["weights"]) == 0
        assert other["loss"] < 2.6


def test_all_processes_see_one_drift_where_a_trigger_watches_it(replicas):
    threshold = DriftThreshold(0.02)
    sharded, wrapped = (
        replicas.run(4, fit, how, EXACT, None, None, 20, threshold, **PATIENT) for how in ("shards", "whole")
    )
    assert {one["syncs"] for one in sharded} == {one["syncs"] for one in wrapped}
    assert 1 < sharded[0]["syncs"] < 20
    assert farthest(sharded[0]["weights"], wrapped[0]["weights"]) < 1e-5


def fail(rank, world, how, options, resume=None):
    pl.seed_everything(0, verbose=False)
    trainer = trainer_for(rank, world, CurvaDionStrategy(**options))
    with pytest.raises((MisconfigurationException, TypeError)) as caught:
        trainer.fit(Sharded(how), ckpt_path=resume)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("world", {}, "give CurvaDionStrategy(replica_size=...)"),
        ("world", {"replica_size": 2}, 'call fully_shard(..., mesh=self.device_mesh["data_parallel"])'),
        ("columns", {"replica_size": 2}, "leave out tensor parallelism"),
        ("partly", {"replica_size": 2}, "is whole where others are sharded"),
        ("shards", {"replica_size": 2, "find_unused_parameters": True}, "leave out find_unused_parameters"),
        ("shards", {"replica_size": 2, "momentum": "factors"}, 'need consensus="average"'),
    ],
)
def test_a_module_that_cannot_be_sharded_so_is_refused(replicas, how, options, message):
    answers = replicas.run(4, fail, how, options, **PATIENT)
    assert all(message in answer for answer in answers), answers


def test_a_whole_module_does_not_read_shards(replicas, fitted):
    _, folder = fitted
    answers = replicas.run(2, fail, "whole", {}, folder / "step=4.ckpt", **PATIENT)
    assert all("consolidate_checkpoint" in answer for answer in answers)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data_parallel_size", "replica_size"),
        ("tensor_parallel_size", "fully_shard alone"),
        ("save_distributed_checkpoint", "directory"),
    ],
)
def test_arguments_of_model_parallel_strategy_say_what_to_write(argument, message):
    with pytest.raises(MisconfigurationException, match=f"{argument}: .*{message}"):
        CurvaDionStrategy(**{argument: 2})


def break_a_save(rank, world, folder):
    """A save that fails on one process, over a checkpoint of before; what all say, and what is there then."""
    from torch.distributed.checkpoint import FileSystemWriter

    pl.seed_everything(0, verbose=False)
    trainer = trainer_for(rank, world, CurvaDionStrategy(replica_size=2), max_steps=2)
    trainer.fit(Sharded())
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    write = FileSystemWriter.write_data
    if rank == 1:
        FileSystemWriter.write_data = None
    try:
        with pytest.raises(BaseException, match="NoneType") as caught:
            trainer.save_checkpoint(path)
    finally:
        FileSystemWriter.write_data = write
    again = torch.distributed.get_rank() == rank and trainer.save_checkpoint(folder / "other.ckpt")
    return type(caught.value).__name__, again


def test_a_save_that_fails_leaves_the_checkpoint_of_before(replicas, tmp_path):
    answers = replicas.run(4, break_a_save, tmp_path, **PATIENT)
    assert {name for name, _ in answers} == {"CheckpointException"}
    assert not list(tmp_path.glob(".*"))
    before, after = (replicas.run(4, evaluate, tmp_path / f"{name}.ckpt", **PATIENT) for name in ("last", "other"))
    assert before == after
