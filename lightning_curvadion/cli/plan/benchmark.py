"""How fast this machine is: a training step of the planned model, and a number's way through a wire format."""

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
from ...sync.collectives import Collectives
from ...sync.payloads import DisplacementPayload, TensorPayload
from .run_setup import PlanError, PlanningCLI, one_line_errors, quiet_trainer

_WARM_UP, _STEPS = 2, 8
_SECONDS_OF_STEPS = 30
_SECONDS_OF_CODING = 0.1
_KEPT = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


class _Echo(Collectives):
    """Between two replicas of which the other one says the same."""

    def __init__(self, chunk: int) -> None:
        super().__init__(None, chunk)
        self.world_size = 2

    @override
    def all_gather(self, own: Tensor) -> Tensor:
        return own.repeat(2, 1)


def coding_seconds(wire_format: str, device: torch.device, numel: int = 2**20) -> float:
    """Seconds that a replica works on one number of an exchange, measured here.

    The work is that of the real exchange between two replicas with all but the network: displacement and residual in,
    one encoding, three decodings (everybody's, and what was lost of the own), mean, parameter and residual out. With
    more replicas the decodings are as many; the encoding of a share of the mean is left out.

    Args:
        wire_format: As in :class:`~lightning_curvadion.ProcessGroupSync`.
        device: Where.
        numel: How many numbers to try it with.

    Example:
        >>> 1e-11 < coding_seconds("sign", torch.device("cpu"), numel=2**14) < 1e-4
        True
    """
    parameter, anchor, residual = torch.randn(3, numel, device=device)
    spent: list[float] = []
    while len(spent) < 2 or sum(spent) < _SECONDS_OF_CODING:
        _settle(device)
        start = time.perf_counter()
        if wire_format == "float32":
            whole = TensorPayload("speed", parameter)
            for slices in split_into_chunks([whole], numel):
                write_back(slices, flatten(slices, torch.float32).div_(2), None)
        else:
            _Echo(numel).average([DisplacementPayload("speed", parameter, anchor, wire_format, residual, None)])
        _settle(device)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:]) / numel


class _Clock(Callback):
    """Notes when each optimizer step was through."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        if trainer.global_step > len(self.times):
            _settle(pl_module.device)
            self.times.append(time.perf_counter())


def measured_step(args: Sequence[str]) -> tuple[float, int, str]:
    """Take a few training steps of a config's model with its data, on one device of this machine, in this process.

    Args:
        args: As after ``fit``.

    Returns:
        Median seconds of a step, the number of steps, and the type of the device.

    Raises:
        PlanError: It cannot be done here.

    Example:
        >>> seconds, steps, _ = measured_step(["--model=lightning.pytorch.demos.boring_classes.BoringModel"])
        >>> 0 < seconds < 1, steps
        (True, 8)
    """
    clock = _Clock()
    try:
        with one_line_errors():
            command_line = PlanningCLI(args)
            kept = {key: command_line.wanted[key] for key in _KEPT if command_line.wanted.get(key) is not None}
            trainer = quiet_trainer(
                accelerator="auto",
                devices=1,
                max_epochs=-1,
                max_steps=_WARM_UP + _STEPS,
                max_time={"seconds": _SECONDS_OF_STEPS},
                limit_val_batches=0,
                callbacks=[clock],
                **kept,
            )
            trainer.fit(command_line.model, datamodule=command_line.datamodule)
    except Exception as error:
        # Whatever a user's model or data may raise where they are not at home.
        why = " ".join(str(error).split())[:200]
        raise PlanError(f"no step could be measured here ({type(error).__name__}: {why}); {_SAY_IT}") from error
    steps = [after - before for before, after in zip(clock.times[_WARM_UP - 1 :], clock.times[_WARM_UP:], strict=False)]
    if not steps:
        raise PlanError(f"{len(clock.times)} steps took {_SECONDS_OF_STEPS} s here, too few to measure; {_SAY_IT}")
    return statistics.median(steps), len(steps), str(trainer.strategy.root_device.type)


_SAY_IT = "say what a step takes on a device of the cluster, such as --step-time 0.8s"


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
