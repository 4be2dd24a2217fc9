"""Replicas are one model wherever a callback, or a hook of the module, looks at it."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from models import equal, parameters_of, state_of
from training import Module, fingerprint, same, trainer_for

from lightning_curvadion import CurvaDionStrategy, EveryNSteps


def fit(rank, world):
    """Parameters of this rank: after a local step, before and in validation, and at the end."""
    pl.seed_everything(0, verbose=False)
    module = Module()
    # The last step is a local one.
    trainer_for(rank, world, max_steps=10, val_check_interval=4, limit_val_batches=2).fit(module)
    return {
        "local": module.after_step_4,
        "before": module.before_validation,
        "validated": module.validated,
        "final": parameters_of(module),
    }


@pytest.fixture(scope="module")
def fitted(replicas):
    return replicas.run(2, fit)


def test_one_model_is_validated_and_fit_returns_one_model(fitted):
    a, b = fitted
    assert len(a["validated"]) == 4 and all(same(x, y) for x, y in zip(a["validated"], b["validated"], strict=True))
    assert same(a["final"], b["final"])


def test_hooks_of_the_module_find_the_consensus_before_validation(fitted):
    # Step 4 is a local one, and no checkpoint is due: without a consensus the ranks would validate different models.
    a, b = fitted
    assert not same(a["local"], b["local"])
    assert same(a["before"][0], b["before"][0]) and same(a["before"][0], a["validated"][0][: len(a["local"])])


def validated_saved_and_returned(rank, world, folder, options):
    """The best loss, the loss of its checkpoint, and whether what was saved and returned had been validated."""
    pl.seed_everything(0, verbose=False)
    module = Module(trigger=EveryNSteps(3))
    best = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1)
    trainer = trainer_for(
        rank,
        world,
        CurvaDionStrategy(**options),
        max_steps=12,
        # After sync steps and after local ones.
        val_check_interval=2,
        limit_val_batches=4,
        callbacks=[best],
        enable_checkpointing=True,
    )
    trainer.fit(module)
    returned = parameters_of(module)
    validated = [fingerprint(tensors[: len(returned)]) for tensors in module.validated]
    monitored = best.best_model_score.item()
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    saved = fingerprint([saved[name] for name, _ in module.named_parameters()])
    (reloaded,) = trainer.validate(module, ckpt_path="best", verbose=False)
    return monitored, reloaded["val_loss"], saved in validated, fingerprint(returned) == validated[-1]


FORMATS = [{}, {"wire_format": "int2"}, {"wire_format": "int4", "outer_lr": 0.8}, {"wire_format": "float32"}]


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_what_is_validated_saved_and_returned_is_one_model(replicas, tmp_path, options):
    answers = replicas.run(2, validated_saved_and_returned, str(tmp_path), options, timeout=120)
    for monitored, reloaded, saved_was_validated, returned_was_validated_last in answers:
        assert reloaded == monitored and saved_was_validated and returned_was_validated_last


class SaveAt(Callback):
    """Saves after a local step, and tells what that sent and which of the optimizer's state it changed."""

    def __init__(self, path, weights_only):
        self.path, self.weights_only = path, weights_only

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            optimizer = trainer.optimizers[0]
            before, sent = state_of(optimizer), trainer.strategy.sync.bytes_sent
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)
            self.sent = trainer.strategy.sync.bytes_sent - sent
            after = state_of(optimizer)
            self.changed = {key.rpartition(".")[2] for key in after if not equal({"": before[key]}, {"": after[key]})}


def save_in_between(rank, world, path, weights_only):
    pl.seed_everything(0, verbose=False)
    module, save = Module(trigger=EveryNSteps(3)), SaveAt(path, weights_only)
    trainer_for(rank, world, max_steps=6, limit_val_batches=0, callbacks=[save]).fit(module)
    saved = torch.load(path, weights_only=True)["state_dict"]
    return save.sent, save.changed, fingerprint(saved.values())


def test_a_checkpoint_of_weights_sends_weights_and_leaves_the_momenta_alone(replicas, tmp_path):
    module = Module()
    tensors = [*module.parameters(), *module.buffers()]
    weights = 4 * sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    # Three buffers, the anchors, and how far the consensus is; before it, that nobody steps.
    compared = 5 * 16 + 16
    in_whole, alone = (
        replicas.run(2, save_in_between, str(tmp_path / f"{weights_only}.ckpt"), weights_only, timeout=120)
        for weights_only in (False, True)
    )
    state = {"momentum", "norm", "exp_avg", "exp_avg_sq"}
    for (sent, changed, saved), (sent_in_whole, changed_in_whole, saved_in_whole) in zip(alone, in_whole, strict=True):
        assert sent == compared + weights and sent_in_whole > 2 * sent
        assert changed.isdisjoint(state) and state <= changed_in_whole
        assert saved == saved_in_whole
