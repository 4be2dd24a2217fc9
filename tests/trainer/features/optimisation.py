"""Gradients, schedules, and which parameters an optimizer steps."""

import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import nn
from torch.optim import lr_scheduler
from training import Module

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters

from .registry import feature


@feature("optimisation", "`accumulate_grad_batches`")
def two_batches_make_a_step(run):
    trainer = run.fit(accumulate_grad_batches=2, max_steps=4)
    assert len(run.modules[0].batches) == 8 and trainer.global_step == 4


class GradientRecorder(Callback):
    """The norm and the largest value of all gradients, at every step."""

    def __init__(self):
        self.norms, self.values = [], []

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(nn.utils.get_total_norm(gradients).item())
            self.values.append(max(gradient.abs().max().item() for gradient in gradients))


@feature("optimisation", "`gradient_clip_val` by norm")
def gradients_are_clipped_by_norm(run):
    recorder = GradientRecorder()
    run.fit(gradient_clip_val=0.01, gradient_clip_algorithm="norm", callbacks=[recorder])
    assert max(recorder.norms) <= 0.0101


@feature("optimisation", "`gradient_clip_val` by value")
def gradients_are_clipped_by_value(run):
    recorder = GradientRecorder()
    run.fit(gradient_clip_val=0.01, gradient_clip_algorithm="value", callbacks=[recorder])
    assert max(recorder.values) <= 0.0101 < max(recorder.norms)


SCHEDULERS = {
    "`StepLR`": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    "`OneCycleLR`": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=13, cycle_momentum=False),
    "`CosineAnnealingWarmRestarts`": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "`SequentialLR`": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]
    ),
    "`ReduceLROnPlateau`": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=100.0),
}


class ScheduledModule(Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.rates = name, []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        interval = "epoch" if self.name in ("`StepLR`", "`ReduceLROnPlateau`") else "step"
        schedule = {"scheduler": SCHEDULERS[self.name](optimizer), "interval": interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_batch_start(self, *_):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


@feature("optimisation", *SCHEDULERS)
def the_schedule_moves_the_learning_rate(run):
    module = ScheduledModule(run.name)
    run.fit(module, max_steps=-1, max_epochs=3, limit_train_batches=4)
    assert len(set(module.rates)) >= 3


class ManualModule(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()


@feature("optimisation", "manual optimisation")
def a_module_may_step_by_itself(run):
    run.fit(ManualModule())


class GanModule(Module):
    """Two optimizers that step in turn, each with the other's parameters frozen."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        self.batches.append(tokens.tolist())
        generator, critic = self.optimizers()
        real = nn.functional.one_hot(tokens, 11).float()
        self.toggle_optimizer(critic)
        critic.zero_grad()
        scores = self.critic(torch.cat([real, self.net(tokens).detach()]))
        self.manual_backward(nn.functional.binary_cross_entropy_with_logits(scores, scores.detach() * 0 + 0.5))
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.critic(self.net(tokens))).mean())
        generator.step()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self):
        return [
            CurvaDion(split_parameters(part), lr=0.02, trigger=EveryNSteps(n))
            for part, n in ((self.net, 3), (self.critic, 2))
        ]


@feature("optimisation", "several CurvaDion optimizers (GAN)")
def optimizers_may_step_in_turn(run):
    run.fit(GanModule(), max_steps=14)


class Unfreeze(BaseFinetuning):
    """Adds the parameters of a layer to the optimizer in the second epoch."""

    def freeze_before_training(self, module):
        self.freeze([module.net.up, module.net.embedding])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.up, optimizer, initial_denom_lr=2)


class TrainableModule(Module):
    """Its optimizer has no parameter that is frozen at first."""

    def configure_optimizers(self):
        groups = split_parameters(self)
        for group in groups:
            group["params"] = [(name, p) for name, p in group["params"] if p.requires_grad]
        return CurvaDion([group for group in groups if group["params"]], lr=0.02, trigger=EveryNSteps(3))


class AddGroups(Unfreeze):
    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(module.net.up)
            optimizer.add_param_group({"params": [layer.weight for layer in module.net.up], "lr": 0.01})
            biases = [layer.bias for layer in module.net.up]
            optimizer.add_param_group({"params": biases, "lr": 0.01, "algorithm": "adamw"})


FINETUNING = {
    "frozen and unfrozen parameters (`BaseFinetuning`)": (Module, Unfreeze),
    "parameter groups added later": (TrainableModule, AddGroups),
}


@feature("optimisation", *FINETUNING)
def what_is_unfrozen_trains_and_what_is_frozen_stays(run):
    module_class, callback_class = FINETUNING[run.name]
    module = module_class()
    before = module.net.up[0].weight.detach().clone(), module.net.embedding.weight.detach().clone()
    run.fit(module, callbacks=[callback_class()], max_steps=-1, max_epochs=2, limit_train_batches=5)
    assert not torch.equal(before[0], module.net.up[0].weight)
    assert torch.equal(before[1], module.net.embedding.weight)


class PartlyUsedModule(Module):
    """A layer that only some ranks use, or none."""

    def __init__(self, users):
        super().__init__()
        self.users, self.extra = users, nn.Linear(11, 11)

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        self.batches.append(tokens.tolist())
        logits = self.net(tokens)
        if self.trainer.global_rank in self.users:
            logits = self.extra(logits)
        return nn.functional.cross_entropy(logits, (3 * tokens + 1) % 11)


@feature("optimisation", "parameters unused on one rank")
def a_layer_that_one_rank_uses_trains(run):
    module = PartlyUsedModule(users=[1])
    before = module.extra.weight.detach().clone()
    run.fit(module)
    assert not torch.equal(before, module.extra.weight)


@feature("optimisation", "parameters unused on all ranks")
def a_layer_that_nobody_uses_is_no_error(run):
    run.fit(PartlyUsedModule(users=[]))
