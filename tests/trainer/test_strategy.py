"""CurvaDionStrategy under a real Trainer, with real processes."""

import io
import os
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from models import parameters_of
from replicas import counted_collectives
from training import Module, same, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy, split_parameters


class CollectivesOfBatches(Callback):
    """Collectives of each training batch, and between one and the next."""

    def __init__(self, calls):
        self.calls, self.batches, self.between = calls, [], []
        self._end = None

    def on_train_batch_start(self, *_):
        self._before = len(self.calls)
        if self._end is not None:
            self.between.append(self.calls[self._end :])

    def on_train_batch_end(self, trainer, *_):
        report = trainer.optimizers[0].last_step
        self.batches.append((report is not None and report.synced, self.calls[self._before :]))
        self._end = len(self.calls)


class OwnCheckpoint(Callback):
    """The checkpoint as this rank would write it."""

    def on_save_checkpoint(self, trainer, module, checkpoint):
        parts = {key: checkpoint[key] for key in ("state_dict", "optimizer_states")}
        buffer = io.BytesIO()
        torch.save(parts, buffer)
        buffer.seek(0)
        self.saved = torch.load(buffer, weights_only=True)


FACTORS = {"wire_format": "float32", "momentum": "factors"}


def fit(rank, world, folder, strategy_options):
    pl.seed_everything(0, verbose=False)
    module = Module()
    monitor = CommunicationMonitor()
    own_checkpoint = OwnCheckpoint()
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=8)
    with counted_collectives() as calls:
        counter = CollectivesOfBatches(calls)
        trainer = trainer_for(
            rank,
            world,
            CurvaDionStrategy(**strategy_options),
            val_check_interval=4,
            enable_checkpointing=True,
            callbacks=[monitor, checkpoint, counter, own_checkpoint, LearningRateMonitor("step")],
            logger=CSVLogger(folder),
        )
        trainer.fit(module)
    wrapped = type(trainer.strategy.model).__name__
    return {
        "batches": counter.batches,
        "between": counter.between,
        "final": parameters_of(module),
        "checkpoint": own_checkpoint.saved,
        "data": module.batches,
        "wrapped": wrapped,
    }


@pytest.fixture(scope="module")
def fitted(replicas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return folder, replicas.run(2, fit, str(folder), FACTORS, timeout=120)


def test_the_module_is_not_wrapped_and_each_rank_sees_its_own_data(fitted):
    _, (a, b) = fitted
    assert a["wrapped"] == b["wrapped"] == "Module"
    assert not set(map(tuple, a["data"])) & set(map(tuple, b["data"]))


def test_a_local_training_batch_makes_one_collective_of_16_bytes(fitted):
    for rank in fitted[1]:
        assert [synced for synced, _ in rank["batches"]] == [False, False, True] * 2 + [False, False]
        for synced, calls in rank["batches"]:
            payload = [size for _, size in calls if size]
            assert payload == [16] if not synced else len(payload) == 4


def test_nothing_is_sent_between_batches_not_by_lightning_either(fitted):
    for rank in fitted[1]:
        # Validation comes after the fourth batch and the eighth.
        assert [calls for number, calls in enumerate(rank["between"], start=1) if number != 4] == [[]] * 6


def test_a_checkpoint_is_the_consensus_in_tensors_and_plain_numbers(fitted):
    folder, (a, _) = fitted
    paths = sorted(folder.glob("*.ckpt"))
    assert len(paths) == 1
    saved = torch.load(paths[-1], weights_only=True)
    names = [name for name, _ in Module().named_parameters()]
    assert same([saved["state_dict"][name] for name in names], a["final"])
    assert {"momentum", "Q", "norm"} <= set(saved["optimizer_states"][0]["state"][0])
    assert saved["optimizer_states"][0]["trigger"]["trigger"]["type"] == "EveryNSteps"


def flat(value, path=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}
    if isinstance(value, list):
        return flat(dict(enumerate(value)), path)
    return {path: value}


def test_any_rank_would_write_the_same_checkpoint(fitted):
    a, b = (flat(rank["checkpoint"]) for rank in fitted[1])
    assert a.keys() == b.keys() and any("momentum" in key for key in a)
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def resume(rank, world, path, steps):
    pl.seed_everything(0, verbose=False)
    module = Module()
    trainer = trainer_for(rank, world, max_steps=steps)
    trainer.fit(module, ckpt_path=path)
    return trainer.global_step, parameters_of(module)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_checkpoint_resumes_on_any_number_of_replicas(replicas, fitted, world):
    path = str(sorted(fitted[0].glob("*.ckpt"))[-1])
    answers = replicas.run(world, resume, path, 11, timeout=120)
    assert all(step == 11 for step, _ in answers)
    assert all(same(parameters, answers[0][1]) for _, parameters in answers)


def accumulate(rank, world, strategy_options):
    pl.seed_everything(0, verbose=False)
    module = Module()
    with counted_collectives() as calls:
        counter = CollectivesOfBatches(calls)
        trainer = trainer_for(
            rank,
            world,
            CurvaDionStrategy(**strategy_options),
            max_steps=3,
            accumulate_grad_batches=2,
            callbacks=[counter],
        )
        trainer.fit(module)
    return [[size for _, size in calls if size] for _, calls in counter.batches]


def test_accumulated_batches_send_nothing(replicas):
    for payloads in replicas.run(2, accumulate, FACTORS):
        assert payloads[:4] == [[], [16], [], [16]] and payloads[4] == [] and len(payloads[5]) == 4


def test_by_default_a_sync_step_sends_one_bit_for_each_number_of_a_matrix(replicas):
    groups = split_parameters(Module())
    of_matrices, others = (
        sum(p.numel() for group in groups if (group["algorithm"] == "dion") == wanted for _, p in group["params"])
        for wanted in (True, False)
    )
    for payloads in replicas.run(2, accumulate, {}):
        assert payloads[:4] == [[], [16], [], [16]] and payloads[4] == []
        agreement, digests, quantized = payloads[5]
        # One bit and a scale a block, and a byte where the other groups are small; the last blocks are not full.
        assert agreement == 16 and digests == 3 * 16
        assert of_matrices / 8 < quantized - others < of_matrices / 3


def test_by_default_other_kinds_of_consensus_send_at_full_width():
    for consensus, momentum in (("factors", "factors"), ("none", "dion")):
        settings = CurvaDionStrategy(consensus=consensus).sync.settings
        assert (settings.wire_format, settings.momentum) == ("float32", momentum)


class Poison(Callback):
    def on_after_backward(self, trainer, module):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            module.net.head.weight.grad[0, 0] = float("nan")


def poisoned(rank, world):
    module = Module()
    with pytest.raises(ValueError, match=r"rank 1: net\.head\.weight has a gradient that is not finite") as caught:
        trainer_for(rank, world, callbacks=[Poison()]).fit(module)
    return str(caught.value)


def test_a_bad_gradient_stops_all_ranks_with_the_same_error(replicas):
    assert len(set(replicas.run(2, poisoned))) == 1


def fit_twice(rank, world):
    module = Module()
    monitor = CommunicationMonitor()
    trainer = trainer_for(
        rank, world, CurvaDionStrategy(**{"momentum": "local", "outer_momentum": 0.5}), callbacks=[monitor]
    )
    trainer.fit(module)
    first = int(monitor.bytes_sent.compute())
    trainer.fit_loop.epoch_loop.max_steps = 16
    trainer.fit(module)
    return first, int(monitor.bytes_sent.compute()), int(monitor.sync_rate.steps), parameters_of(module)


def test_fit_again_in_the_same_process(replicas):
    a, b = replicas.run(2, fit_twice)
    assert a[2] == b[2] == 8 and same(a[3], b[3])
    assert a[1] == pytest.approx(a[0], rel=0.4), "the second fit counts its own bytes"


def evaluate(rank, world):
    module = Module()
    trainer = trainer_for(rank, world)
    (result,) = trainer.validate(module, verbose=False)
    return result["val_loss"]


def test_validating_without_training_needs_no_optimizer(replicas):
    a, b = replicas.run(2, evaluate)
    assert a == b


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_by_default_collectives_time_out_as_the_backend_has_it(monkeypatch, accelerator):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    trainer = pl.Trainer(accelerator=accelerator, devices=1, strategy="curvadion", logger=False)
    trainer.strategy.setup_environment()
    try:
        group = torch.distributed.distributed_c10d._get_default_group()
        timeout = group._get_backend(trainer.strategy.root_device).options._timeout
    finally:
        torch.distributed.destroy_process_group()
    assert timeout == timedelta(minutes=30 if accelerator == "cpu" else 10)


def test_the_names_are_registered():
    for name, method in (
        ("curvadion", "popen"),
        ("curvadion_spawn", "spawn"),
        ("curvadion_fork", "fork"),
        ("curvadion_notebook", "fork"),
    ):
        strategy = StrategyRegistry.get(name)
        assert type(strategy) is CurvaDionStrategy and strategy._start_method == method


def test_a_fit_in_two_bits_saves_one_model_without_residuals(replicas, tmp_path):
    a, b = replicas.run(2, fit, str(tmp_path), {"wire_format": "int2", "residual_dtype": "bfloat16"}, timeout=120)
    assert same(a["final"], b["final"])
    for path in tmp_path.glob("*.ckpt"):
        states = torch.load(path, weights_only=True)["optimizer_states"][0]["state"].values()
        assert any("momentum" in state for state in states)
        assert not any("residual" in state for state in states)
    assert list(tmp_path.glob("*.ckpt"))
