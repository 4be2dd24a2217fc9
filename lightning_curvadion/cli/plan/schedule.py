"""What a config will do, and how often: its steps, validations and checkpoints, as far as no data is needed to know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """Counts of a run; ``None`` where only the data or the clock tells.

    Attributes:
        steps: Optimizer steps.
        validations: Their number.
        checkpoints: Those right after a step.
        checkpoints_after_validation: Those right after a validation, which has sent the parameters already.
        epochs: Their number.
        validated_at_end: Whether the last step is followed by a validation.
        saved_at_end: Whether it is followed by a checkpoint with the optimizer's state.
        best_only: Whether some of them depend on a metric, so that their number is the largest possible.
    """

    steps: int | None
    validations: int | None
    checkpoints: int | None
    checkpoints_after_validation: int | None
    epochs: int | None = None
    validated_at_end: bool = False
    saved_at_end: bool = False
    best_only: bool = False

    @property
    def is_known(self) -> bool:
        """Whether no number is missing."""
        return None not in (self.steps, self.validations, self.checkpoints, self.checkpoints_after_validation)


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a config.

    Args:
        config: Arguments of the Trainer.

    Example:
        >>> epochs = {"max_epochs": 2, "limit_train_batches": 100}
        >>> schedule = read_schedule({**epochs, "val_check_interval": 50})
        >>> schedule.steps, schedule.validations, schedule.checkpoints_after_validation, schedule.saved_at_end
        (200, 4, 4, True)
        >>> read_schedule({"max_epochs": 2}).steps
    """
    accumulate = int(config.get("accumulate_grad_batches") or 1)
    limit = config.get("limit_train_batches")
    batches = limit if isinstance(limit, int) else None
    steps, epochs = _steps_and_epochs(config, batches, accumulate)
    validations, at_end = _validations(config, batches, steps, epochs, accumulate)
    totals: list[int | None] = [0, 0]
    best_only = saved_at_end = False
    for options in _checkpoint_options(config):
        number, after_validation, saves_last_step = _checkpoints(options, config, steps, epochs, validations, at_end)
        saved_at_end |= saves_last_step
        so_far = totals[after_validation]
        totals[after_validation] = None if number is None or so_far is None else so_far + number
        best_only |= options.get("monitor") is not None
    return Schedule(steps, validations, totals[0], totals[1], epochs, at_end, saved_at_end, best_only)


def _steps_and_epochs(config: Mapping[str, Any], batches: int | None, accumulate: int) -> tuple[int | None, int | None]:
    steps = config.get("max_steps")
    steps = steps if steps is not None and steps > 0 else None
    epochs = config.get("max_epochs")
    # Without either Lightning trains 1000 epochs.
    epochs = 1000 if epochs is None and steps is None else epochs
    epochs = epochs if epochs is not None and epochs > 0 else None
    if batches is not None:
        per_epoch = -(-batches // accumulate)
        if epochs is not None:
            steps = min(steps or epochs * per_epoch, epochs * per_epoch)
        if steps is not None:
            epochs = -(-steps // per_epoch)
    return steps, epochs


def _validations(
    config: Mapping[str, Any], batches: int | None, steps: int | None, epochs: int | None, accumulate: int
) -> tuple[int | None, bool]:
    """Their number, and whether one follows the last step."""
    interval, every = config.get("val_check_interval"), config.get("check_val_every_n_epoch", 1)
    interval = 1.0 if interval is None else interval
    if config.get("limit_val_batches") == 0:
        return 0, False
    if isinstance(interval, float):
        if epochs is None or every is None:
            return None, False
        whole = batches is None or steps is None or steps * accumulate % batches == 0
        return epochs // every * int(1 / interval), whole and epochs % every == 0
    if not isinstance(interval, int) or steps is None:
        return None, False
    trained = steps * accumulate
    if every is None or batches is None:
        return trained // interval, trained % interval == 0
    whole_epochs, rest = divmod(trained, batches)
    number = (whole_epochs * (batches // interval) + rest // interval) // every
    return number, (rest or batches) % interval == 0


def _checkpoint_options(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of each ModelCheckpoint; without one Lightning takes its defaults."""
    if config.get("enable_checkpointing") is False:
        return []
    callbacks = config.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    options: list[dict[str, Any]] = [
        dict(callback.get("init_args") or {})
        for callback in callbacks
        if isinstance(callback, Mapping) and str(callback.get("class_path")).endswith("ModelCheckpoint")
    ]
    return options or [{}]


def _checkpoints(
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    steps: int | None,
    epochs: int | None,
    validations: int | None,
    validated_at_end: bool,
) -> tuple[int | None, bool, bool]:
    """Their number, whether each follows a validation, and whether one follows the last step."""
    if options.get("train_time_interval") is not None:
        return None, False, False
    if every_n_steps := options.get("every_n_train_steps"):
        return (None, False, False) if steps is None else (steps // every_n_steps, False, steps % every_n_steps == 0)
    on_epoch_end = options.get("save_on_train_epoch_end")
    if on_epoch_end is None:
        each_epoch = config.get("val_check_interval") in (None, 1.0) and config.get("check_val_every_n_epoch", 1) == 1
        on_epoch_end = validations == 0 or each_epoch
    every_n_epochs = options.get("every_n_epochs") or 1
    if not on_epoch_end:
        return validations, True, validated_at_end
    return (None if epochs is None else epochs // every_n_epochs), validated_at_end, True
