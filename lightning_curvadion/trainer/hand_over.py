"""What a replica that comes takes over from one that trains, beside the tensors of the model and of the optimizers.

It is a checkpoint without them: plain numbers, strings and small tensors. Nothing that arrives is unpickled as anything
else.
"""

import io
import logging
import pickle
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from .lightning_internals import load_loop_progress, loop_progress

log = logging.getLogger(__name__)


def pack(trainer: "pl.Trainer") -> bytes:
    """The state of a replica that is about to train on a batch."""
    callbacks = {}
    for callback in _callbacks(trainer):
        if state := callback.state_dict():
            folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
            if _plain(state):
                callbacks[callback.state_key] = (folder, state)
            else:
                log.warning(
                    f"the state of {type(callback).__name__} holds more than numbers, strings and tensors, and"
                    " is not handed over to a replica that comes"
                )
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return _serialize(
        {
            "loops": loop_progress(trainer),
            "schedulers": [state if _plain(state) else None for state in schedulers],
            "callbacks": callbacks,
            "precision": trainer.precision_plugin.state_dict(),
        }
    )


def unpack(trainer: "pl.Trainer", packed: bytes) -> None:
    """Take over a state, where an epoch is about to begin.

    Raises:
        ValueError: A learning-rate scheduler has a state that could not be sent.
    """
    state = torch.load(io.BytesIO(packed), weights_only=True)
    for config, scheduler in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        if scheduler is None:
            raise ValueError(
                f"the state of {type(config.scheduler).__name__} holds more than numbers, strings and tensors: give the"
                " learning-rate scheduler plain functions in place of objects"
            )
        config.scheduler.load_state_dict(scheduler)
    for callback in _callbacks(trainer):
        if callback.state_key in state["callbacks"]:
            folder, own = state["callbacks"][callback.state_key]
            if isinstance(callback, ModelCheckpoint) and folder is not None:
                callback.dirpath = folder
            callback.load_state_dict(own)
    trainer.precision_plugin.load_state_dict(state["precision"])
    load_loop_progress(trainer, state["loops"])


def _callbacks(trainer: "pl.Trainer") -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _serialize(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _plain(state: Any) -> bool:
    try:
        torch.load(io.BytesIO(_serialize(state)), weights_only=True)
    except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, TypeError):
        return False
    return True
