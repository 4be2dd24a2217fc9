"""Replicas of several processes under a Trainer: each is one model, whatever a process of it does."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from features.optimisation import GanModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from training import Member, Module, fingerprint, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy


class Bits(Callback):
    """A digest of the parameters after every batch."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append(fingerprint(module.parameters()))


def fit(rank, world, folder, resume, options):
    pl.seed_everything(0, verbose=False)
    module, monitor, bits = Module(), CommunicationMonitor(), Bits()
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=4)
    trainer = trainer_for(
        rank,
        world,
        CurvaDionStrategy(**options),
        callbacks=[monitor, bits, checkpoint],
        enable_checkpointing=True,
        max_steps=8 if resume is None else 12,
        accumulate_grad_batches=2 if resume is None else 1,
    )
    trainer.fit(module, ckpt_path=resume)
    return {
        "bits": bits.after,
        "batches": module.batches,
        "end": fingerprint([*module.parameters(), *module.buffers()]),
        "validated": [fingerprint(tensors) for tensors in module.validated],
        "loss": trainer.callback_metrics["val_loss"].item(),
        "replicas": int(monitor.replicas.number),
        "sent": int(monitor.bytes_sent.sent),
        "steps": trainer.global_step,
    }


@pytest.fixture(scope="module")
def fitted(replicas, tmp_path_factory):
    """Four processes as two replicas, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("fitted")
    options = {"replica_size": 2, "find_unused_parameters": True, "overlap": 1}
    return replicas.run(4, fit, folder, None, options, timeout=120), folder


def test_the_processes_of_a_replica_hold_one_model_at_every_step_and_all_do_in_the_end(fitted):
    everyone, _ = fitted
    for first, second in (everyone[:2], everyone[2:]):
        assert first["bits"] == second["bits"] and first["sent"] == second["sent"]
        assert first["batches"] != second["batches"]
    assert everyone[0]["bits"] != everyone[2]["bits"]
    for what in ("end", "validated", "loss"):
        assert all(other[what] == everyone[0][what] for other in everyone), what
    assert {one["replicas"] for one in everyone} == {2}


@pytest.mark.parametrize("options", [{}, {"replica_size": 4}])
def test_a_checkpoint_resumes_with_another_replica_size(replicas, fitted, options):
    _, folder = fitted
    (checkpoint,) = folder.glob("step=8*.ckpt")
    everyone = replicas.run(4, fit, folder / "again", checkpoint, options, timeout=120)
    assert {one["steps"] for one in everyone} == {12}
    assert len({one["validated"][-1] for one in everyone}) == 1


def fit_gan(rank, world):
    pl.seed_everything(0, verbose=False)
    module, bits = GanModule(), Bits()
    strategy = CurvaDionStrategy(replica_size=2, find_unused_parameters=True)
    trainer_for(rank, world, strategy, callbacks=[bits], max_steps=14).fit(module)
    syncs = [optimizer.sync_steps for optimizer in module.optimizers(use_pl_optimizer=False)]
    return bits.after, syncs, fingerprint(module.parameters())


def test_two_optimizers_step_in_turn_and_the_processes_of_a_replica_stay_equal(replicas):
    everyone = replicas.run(4, fit_gan, timeout=120)
    assert everyone[0] == everyone[1] and everyone[2] == everyone[3]
    assert everyone[0][0] != everyone[2][0]
    assert [syncs for _, syncs, _ in everyone] == [[2, 3]] * 4
    assert len({end for *_, end in everyone}) == 1


def fail(rank, world, options, what):
    module = Module()
    if what == "gradient":
        module.net.head.weight.register_hook(lambda gradient: gradient * (float("nan") if rank == 3 else 1.0))
    trainer = trainer_for(rank, world, CurvaDionStrategy(**options))
    with pytest.raises((ValueError, MisconfigurationException)) as caught:
        trainer.fit(module)
    return str(caught.value)


def test_a_bad_gradient_of_one_process_names_its_replica_on_all(replicas):
    answers = replicas.run(4, fail, {"replica_size": 2}, "gradient")
    assert len(set(answers)) == 1 and answers[0].startswith("replica 1 (ranks 2 and 3): net.head.weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replica_size": 0}, "at least 1 process, not 0"),
        ({"replica_size": "host"}, "a number of processes or \"node\", not 'host'"),
        ({"replica_size": 2, "find_unused_parameter": True}, "did you mean find_unused_parameters"),
        ({"find_unused_parameters": True}, "find_unused_parameters: .*replica_size"),
        ({"replica_size": 2, "ddp_comm_hook": None}, "ddp_comm_hook: .* communication hooks"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        CurvaDionStrategy(**options)


def test_a_number_of_processes_that_does_not_divide_is_refused_before_they_start():
    with pytest.raises(MisconfigurationException, match=r"4 processes .* replica_size=3, .* choose one of 1, 2, 4"):
        pl.Trainer(accelerator="cpu", devices=4, strategy=CurvaDionStrategy(replica_size=3), logger=False)


def test_by_name_a_node_is_a_replica():
    assert "curvadion_node" in StrategyRegistry
    trainer = pl.Trainer(accelerator="cpu", devices=2, num_nodes=3, strategy="curvadion_node", logger=False)
    assert trainer.strategy.replica_size == 2 and trainer.world_size == 6


class OfTwoNodes(Member):
    def local_rank(self):
        return self.global_rank() % 2


def hint_on_two_nodes(rank, world, options):
    """What the strategy logs where it joins the process group, on two nodes of two processes."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    strategy, plugins = CurvaDionStrategy(**options), [OfTwoNodes(rank, world)]
    pl.Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=strategy, plugins=plugins, logger=False)
    logger.addHandler(handler)
    strategy.setup_environment()
    logger.removeHandler(handler)
    return [text for text in records if "replica_size='node'" in text]


def test_the_processes_of_a_node_that_are_replicas_of_their_own_get_a_hint(replicas):
    (hint,), *others = replicas.run(4, hint_on_two_nodes, {})
    assert "each of the 2 processes of a node is a replica" in hint and others == [[], [], []]
    assert replicas.run(4, hint_on_two_nodes, {"replica_size": "node"}) == [[]] * 4


class NotesBatchNorm(CurvaDionStrategy):
    """Which ranks a synchronised batch norm spans, before DistributedDataParallel takes the module."""

    def _setup_model(self, model):
        self.spanned = torch.distributed.get_process_group_ranks(model.net.batch_norm.process_group)
        return super()._setup_model(model)


def spanned_by_batch_norm(rank, world):
    strategy = NotesBatchNorm(replica_size=2)
    # torch has it on GPUs only.
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        trainer_for(rank, world, strategy, sync_batchnorm=True).fit(Module())
    return strategy.spanned


def test_synchronised_batch_norm_spans_a_replica(replicas):
    assert replicas.run(4, spanned_by_batch_norm) == [[0, 1], [0, 1], [2, 3], [2, 3]]
