"""Benchmarks of this machine: a training step of the planned model, and quantization in a wire format."""

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from ...sync.chunks import flatten, split_into_chunks, write_back
from ...sync.payload_collectives import PayloadCollectives
from ...sync.payloads import DisplacementPayload, TensorPayload
from ...sync.transfers import Transfer
from ..errors import PlanError
from .config_cli import ConfigCLI, config_errors_as_plan_errors, one_line, silent_trainer
from .dry_run import Arrived

_WARM_UP_STEPS, _MEASURED_STEPS = 2, 8
_MAX_STEP_SECONDS = 30
_MIN_QUANTIZATION_SECONDS = 0.1
# Arguments of the Trainer that change how long a step takes.
_TRAINER_OPTIONS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
_ASK_FOR_STEP_TIME = "give the time of a step on a device of the cluster, such as --step-time 0.8s"


class _LoopbackCollectives(PayloadCollectives):
    """Two replicas in one process: the other one sends the same as this one."""

    def __init__(self, chunk: int) -> None:
        super().__init__(None, chunk)
        self.world_size = 2

    @override
    def start_all_gather(self, own: Tensor) -> Transfer:
        return Arrived(own.repeat(2, 1))


def measure_quantization(wire_format: str, device: torch.device, numel: int = 2**20) -> float:
    """Measure the seconds that a sync step between two replicas works on one number, without the network.

    That is: read displacement and residual, quantize once, dequantize twice (both replicas' numbers), average, write
    parameter and residual. With more replicas half as many again are dequantized (this replica's own, which it does not
    receive); that and quantizing the mean of a shard is not included.

    Args:
        wire_format: As in :class:`~lightning_curvadion.ProcessGroupSync`.
        device: Device to measure on.
        numel: Numbers to measure with.

    Example:
        >>> 1e-11 < measure_quantization("sign", torch.device("cpu"), numel=2**14) < 1e-4
        True
    """
    parameter, anchor, residual = torch.randn(3, numel, device=device)
    durations: list[float] = []
    while len(durations) < 2 or sum(durations) < _MIN_QUANTIZATION_SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        if wire_format == "float32":
            payload = TensorPayload("benchmark", parameter)
            for slices in split_into_chunks([payload], numel):
                write_back(slices, flatten(slices, torch.float32).div_(2), None)
        else:
            displacement = DisplacementPayload("benchmark", parameter, anchor, wire_format, residual, None)
            _LoopbackCollectives(numel).average([displacement])
        _synchronize(device)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:]) / numel


class _StepTimer(Callback):
    """Records when each optimizer step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        if trainer.global_step > len(self.times):
            _synchronize(pl_module.device)
            self.times.append(time.perf_counter())


def measure_training_step(args: Sequence[str]) -> tuple[float, int, str]:
    """Train a config's model on its data for a few steps, on one device of this machine, in this process.

    Args:
        args: As after ``fit``.

    Returns:
        Median seconds of a step, the number of steps, and the type of the device.

    Raises:
        PlanError: The steps fail or take too long here.

    Example:
        >>> args = ["--model=lightning.pytorch.demos.boring_classes.BoringModel"]
        >>> seconds, steps, _ = measure_training_step(args)
        >>> 0 < seconds < 1, steps
        (True, 8)
    """
    timer = _StepTimer()
    try:
        with config_errors_as_plan_errors():
            command_line = ConfigCLI(args)
            config = command_line.trainer_config
            trainer = silent_trainer(
                accelerator="auto",
                devices=1,
                max_epochs=-1,
                max_steps=_WARM_UP_STEPS + _MEASURED_STEPS,
                max_time={"seconds": _MAX_STEP_SECONDS},
                limit_val_batches=0,
                callbacks=[timer],
                **{key: config[key] for key in _TRAINER_OPTIONS if config.get(key) is not None},
            )
            trainer.fit(command_line.model, datamodule=command_line.datamodule)
    except Exception as error:
        # A user's model or data may raise anything on a machine they were not written for.
        reason = f"{type(error).__name__}: {one_line(error, max_length=200)}"
        raise PlanError(f"no step could be measured here ({reason}); {_ASK_FOR_STEP_TIME}") from error
    ends = timer.times[_WARM_UP_STEPS - 1 :]
    steps = [end - start for start, end in itertools.pairwise(ends)]
    if not steps:
        raise PlanError(f"{len(timer.times)} steps took {_MAX_STEP_SECONDS} s here, too few; {_ASK_FOR_STEP_TIME}")
    return statistics.median(steps), len(steps), str(trainer.strategy.root_device.type)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
