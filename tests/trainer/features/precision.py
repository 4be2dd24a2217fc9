"""``Trainer(precision=...)``."""

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from models import parameters_of
from training import Module, same

from .registry import feature


@feature("precision", "32-true", "64-true", "bf16-true", "bf16-mixed")
def parameters_have_the_dtype_of_the_flag(run):
    module = Module()
    run.fit(module, precision=run.name)
    expected = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(run.name, torch.float32)
    assert {parameter.dtype for parameter in module.parameters()} == {expected}


class OverflowOnRank1(Module):
    """The loss of one rank overflows at one batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 3 and self.trainer.global_rank == 1 else loss


class ScaleRecorder(Callback):
    def __init__(self):
        self.scales, self.parameters = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.parameters.append(parameters_of(module))


@feature("precision", "16-mixed")
def an_overflow_on_one_rank_skips_the_step_on_all(run):
    # On a CPU Lightning replaces the flag by bf16-mixed, so the plugin is named.
    recorder = ScaleRecorder()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    options = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 8}
    run.fit(OverflowOnRank1(), callbacks=[recorder], plugins=[plugin], **options)
    assert recorder.scales == [1024.0] * 3 + [512.0] * 5, recorder.scales
    before, skipped, after = recorder.parameters[2:5]
    assert same(before, skipped) and not same(skipped, after)
