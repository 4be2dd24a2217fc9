"""What a run logged: :class:`Series` of values by optimizer step, and the :class:`LoggedRun` that holds them."""

import bisect
import math
import re
from dataclasses import dataclass
from pathlib import Path

from ...trainer.run_metric import table_rows

# Of runs with CurvaDion's sync hook, and of those without, as under DDP.
_PREFIXES = ("curvadion/", "ddp/")
_SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
# Suffixes that Lightning appends to a key. By step is best for a training loss, by epoch for a validation loss.
_SUFFIXES = {"train": ("", "_step", "_epoch"), "val": ("", "_epoch", "/dataloader_idx_0", "_step")}


@dataclass(frozen=True)
class Series:
    """One logged quantity: optimizer steps, ascending, and the value at each.

    Example::

        >>> series = Series([0, 10, 20], [float("inf"), 4.0, 2.0])
        >>> series.finite().steps, series.at(15), series.last
        ([10, 20], 3.0, 2.0)
    """

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The value of the last step."""
        return self.values[-1]

    @property
    def step_of_max(self) -> int:
        """The first step that has the largest value."""
        return self.steps[self.values.index(max(self.values))]

    @property
    def rises(self) -> "Series":
        """By how much a count rose, at each step where it did; it was 0 before the first.

        Example::

            >>> Series([0, 4, 9], [0.0, 2.0, 2.0]).rises
            Series(steps=[4], values=[2.0])
        """
        pairs = zip(self.steps, self.values, [0.0, *self.values], strict=False)
        points = [(step, value - before) for step, value, before in pairs if value > before]
        return Series([s for s, _ in points], [v for _, v in points])

    def finite(self) -> "Series":
        """The same without infinite values and NaN."""
        points = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Series([s for s, _ in points], [v for _, v in points])

    def at(self, step: int) -> float:
        """The value at a step: interpolated between logged steps, the nearest value outside of them."""
        after = bisect.bisect_left(self.steps, step)
        if after == 0 or after == len(self.steps):
            return self.values[min(after, len(self.steps) - 1)]
        (a, x), (b, y) = ((self.steps[i], self.values[i]) for i in (after - 1, after))
        return x + (y - x) * (step - a) / (b - a)


EMPTY = Series([], [])


@dataclass(frozen=True)
class LoggedRun:
    """Everything that one run logged.

    Args:
        name: Its name in the report.
        source: The folder that holds its logs.
        series: Every logged quantity by its key.
        note: Why this folder was read, where there was a choice; else empty.
        loss_key: Key of the training loss; ``None`` takes the first usual name that was logged.
        val_key: Key of the validation loss, likewise.
        written: When its logs were last written; empty if unknown.

    Example::

        >>> series = {"train_loss_step": Series([4, 9], [2.5, 2.0]), "val_loss": Series([9], [2.1])}
        >>> run = LoggedRun("mine", Path("logs"), series)
        >>> run.loss.last, run.val_loss.last, run.num_steps, run.has_monitor
        (2.0, 2.1, 10, False)
    """

    name: str
    source: Path
    series: dict[str, Series]
    note: str = ""
    loss_key: str | None = None
    val_key: str | None = None
    written: str = ""

    def metric(self, name: str) -> Series:
        """What CommunicationMonitor logged as ``curvadion/name``, or under ``ddp/name``; empty if it did not."""
        return self._by_monitor.get(name, EMPTY)

    @property
    def _by_monitor(self) -> dict[str, Series]:
        """What a CommunicationMonitor logged, by the name without prefix."""
        return {
            key[len(prefix) :]: series
            for key, series in self.series.items()
            for prefix in _PREFIXES
            if key.startswith(prefix)
        }

    @property
    def table(self) -> dict[str, str]:
        """The rows of the monitor's closing table, from the last value of each metric that was logged.

        A run that was interrupted has those that are logged while it trains.
        """
        totals = {name: series.last for name, series in self._by_monitor.items() if "/" not in name}
        if self.ddp_bytes and self.ddp_bytes.last:
            totals.setdefault("bytes_of_ddp", self.ddp_bytes.last)
            totals.setdefault("share_of_ddp", totals["bytes_sent"] / totals["bytes_of_ddp"])
        return table_rows(totals)

    @property
    def val_losses(self) -> dict[str, Series]:
        """All that was logged under a name that begins with ``val``, as the closing table has it, and ``val_loss``."""
        named = {key: series for key, series in sorted(self.series.items()) if key.startswith("val")}
        if self.val_loss and self.val_loss not in named.values():
            named["validation loss"] = self.val_loss
        return named

    @property
    def num_steps(self) -> int:
        """Optimizer steps, up to the last one at which anything was logged."""
        return max((series.steps[-1] for series in self.series.values()), default=-1) + 1

    @property
    def loss(self) -> Series:
        """The training loss."""
        return self.series.get(self.loss_key or self._usual_key("train") or "", EMPTY)

    @property
    def val_loss(self) -> Series:
        """The validation loss."""
        return self.series.get(self.val_key or self._usual_key("val") or "", EMPTY)

    def _usual_key(self, split: str) -> str | None:
        names = _SPLIT_NAMES[split]
        stems = [f"{name}{separator}loss" for name in names for separator in "_/"] + [f"loss/{name}" for name in names]
        stems += ["loss"] if split == "train" else []
        keys = (stem + suffix for stem in stems for suffix in _SUFFIXES[split])
        return next((key for key in keys if key in self.series), None)

    @property
    def has_monitor(self) -> bool:
        """Whether the run had a CommunicationMonitor."""
        return len(self.metric("bytes_sent")) > 0

    @property
    def ddp_bytes(self) -> Series:
        """Bytes that DDP would have sent so far: the bytes sent plus the bytes saved."""
        sent, saved = self.metric("bytes_sent"), self.metric("bytes_saved")
        if not saved:
            return EMPTY
        return Series(sent.steps, [v + saved.at(s) for s, v in zip(sent.steps, sent.values, strict=True)])

    @property
    def is_ddp(self) -> bool:
        """Whether the run used DDP, or another strategy without CurvaDion's sync hook."""
        return any(key.startswith("ddp/") for key in self.series)

    @property
    def sync_steps(self) -> list[int]:
        """The sync steps that logged a row of their own."""
        return self.metric("local_steps").steps

    @property
    def sync_gaps(self) -> Series:
        """Optimizer steps since the previous sync step, at each sync step after the first."""
        local_steps = self.metric("local_steps")
        return Series(local_steps.steps[1:], [value + 1 for value in local_steps.values[1:]])

    @property
    def rmmc_by_layer(self) -> dict[str, Series]:
        """RMMC by layer, in natural order of the names."""
        prefix = "rmmc_layer/"
        layers = {name[len(prefix) :]: s for name, s in self._by_monitor.items() if name.startswith(prefix)}
        return {name: layers[name] for name in sorted(layers, key=_natural_key)}

    @property
    def own_keys(self) -> str:
        """Keys that the run logged itself, the first ten, as text."""
        keys = sorted(key for key in self.series if not key.startswith(_PREFIXES) and key != "epoch")
        return ", ".join(keys[:10] + ["..."] * (len(keys) > 10)) or "nothing"


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
