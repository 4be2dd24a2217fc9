"""Profilers, the tuner, loggers and seeds."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from models import parameters_of
from training import Module, same

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters

from .registry import feature

PROFILERS = {"simple profiler": SimpleProfiler, "advanced profiler": AdvancedProfiler}


@feature("tools", *PROFILERS)
def a_profiler_is_no_hindrance(run):
    run.fit(profiler=PROFILERS[run.name](), limit_val_batches=0, max_steps=6)


@feature("tools", "PyTorch profiler")
def the_pytorch_profiler_names_the_phases_of_a_step(run):
    profiler = PyTorchProfiler(emit_nvtx=False, export_to_chrome=False, dirpath=run.folder)
    run.fit(profiler=profiler, limit_val_batches=0, max_steps=6)
    if run.under_curvadion:
        named = {event.key for event in profiler.profiler.key_averages()} if profiler.profiler else set()
        named |= {event.name for event in profiler.function_events or ()}
        phases = {"curvadion::rmmc", "curvadion::agreement", "curvadion::local_step", "curvadion::sync_step"}
        assert phases <= named, named


class TunableModule(Module):
    lr = 0.02

    def configure_optimizers(self):
        return CurvaDion(split_parameters(self), lr=self.lr, trigger=EveryNSteps(3))


@feature("tools", "`Tuner.lr_find`")
def the_tuner_tries_learning_rates_before_a_fit(run):
    module = TunableModule()
    trainer = run.trainer(max_steps=5, default_root_dir=run.folder)
    run.modules.append(module)
    found = Tuner(trainer).lr_find(module, num_training=12, min_lr=1e-4, max_lr=0.1, update_attr=True)
    assert len(found.results["lr"]) == 12
    trainer.fit(module)
    assert trainer.global_step == 5


LOGGERS = {
    "`CSVLogger`": (CSVLogger, "metrics.csv"),
    "`TensorBoardLogger`": (pl.loggers.TensorBoardLogger, "events.*"),
}


@feature("tools", *LOGGERS)
def rank_0_writes_the_log(run):
    logger, pattern = LOGGERS[run.name]
    run.fit(logger=logger(run.folder), log_every_n_steps=1, val_check_interval=4)
    assert run.rank != 0 or any(run.folder.rglob(pattern))


@feature("tools", "`seed_everything`: repeats bit for bit")
def a_seed_repeats_a_run(run):
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        run.fit()
    first, second = (parameters_of(module) for module in run.modules)
    assert same(first, second)
