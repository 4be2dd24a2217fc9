"""A Trainer whose agreements lag behind and whose means are on their way: what ends training finishes them first."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from models import parameters_of
from training import Module, fingerprint, trainer_for

from lightning_curvadion import CurvaDionStrategy, EveryNSteps

DELAYS = [{"lag": 0, "overlap": 0}, {"lag": 1, "overlap": 1}, {"lag": 2, "overlap": 5}]


class Poison(Callback):
    def on_after_backward(self, trainer, module):
        if trainer.global_step == 6 and trainer.global_rank == 1:
            module.net.head.weight.grad[0, 0] = float("nan")


def poisoned(rank, world, delays, folder):
    module = Module()
    saves = OnExceptionCheckpoint(folder)
    trainer = trainer_for(
        rank, world, CurvaDionStrategy(**delays), callbacks=[Poison(), saves], enable_checkpointing=True
    )
    with pytest.raises(ValueError, match=r"rank 1: net\.head\.weight has a gradient that is not finite") as caught:
        trainer.fit(module)
    return str(caught.value), trainer.global_step, parameters_of(module)


@pytest.mark.parametrize("delays", DELAYS, ids=str)
def test_after_a_bad_gradient_the_saved_checkpoint_is_a_consensus_of_finite_numbers(replicas, delays, tmp_path):
    answers = replicas.run(2, poisoned, delays, str(tmp_path))
    assert len({(message, step) for message, step, _ in answers}) == 1
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    weights = [saved["state_dict"][name] for name, _ in Module().named_parameters()]
    for _, step, parameters in answers:
        assert 6 <= step <= 6 + delays["lag"] and saved["global_step"] == step
        assert all(torch.equal(a, b) for a, b in zip(parameters, weights, strict=True))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)


class DataByStep(Module):
    """Its batches depend on the rank and the step alone, so that a run can resume at any step."""

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(1000 * self.trainer.global_rank + self.trainer.global_step)
        return super().training_step([torch.randint(0, 11, (24,), generator=generator)], batch_idx)


def trained(rank, world, delays, folder, resume=None):
    module = DataByStep(trigger=EveryNSteps(4))
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    options = {"callbacks": [checkpoint], "max_steps": 14, "enable_checkpointing": True}
    trainer_for(rank, world, CurvaDionStrategy(**delays), **options).fit(module, ckpt_path=resume)
    return fingerprint(module.parameters())


@pytest.mark.parametrize("delays", DELAYS, ids=str)
def test_a_run_that_resumes_from_a_checkpoint_ends_bit_for_bit_where_it_would_have(replicas, delays, tmp_path):
    whole = replicas.run(2, trained, delays, str(tmp_path))
    # Step 5 is one step after a sync: something is under way where overlap is 2 or more.
    resumed = replicas.run(2, trained, delays, str(tmp_path / "resumed"), str(tmp_path / "step=5.ckpt"))
    assert len({*whole, *resumed}) == 1
