"""The settings of a sync hook, checked when they are given and not when they are first used."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.parameter_groups import check_choice
from ..optim.triggers import Trigger
from .quantization import bits_of, wire_formats

# Literals, so that a command line lists the choices.
Consensus = Literal["average", "factors", "none"]
Momentum = Literal["displacement", "factors", "dion", "average", "local"]
ResidualDtype = Literal["float32", "bfloat16"]
_RESIDUAL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How a momentum travels where nothing else is said, chosen by loss, see examples/benchmarks/README.md.
_FACTOR_FORMATS = {"float32": "float32", "bfloat16": "bfloat16"}
_QUANTIZED_FACTOR_FORMAT = "int4"
# How much of the difference between the mean displacement and its own a momentum takes over, where a number has fewer
# bits on the wire than said: the error of few bits would enter the momentum. All of it above. Chosen by loss as well.
_CORRECTION_SHARES = ((2, 0.3), (4, 0.8))
# The same of AdamW's first moments, which an error in sparse rows harms more.
_CORRECTION_SHARES_OF_VECTORS = ((4, 0.0),)
# Of norms and biases, and of all parameters in AdamW and Lion groups where these are small, if the wire format has
# fewer bits. In one bit norms and biases cost a GAN a fifth of its loss, and its generator's output layer a quarter.
_SMALL_FORMAT = "int8"
# The most numbers in small AdamW and Lion groups. They add at most 14 kB to a sync step.
SMALL_GROUPS = 2**14
# Steps that a sync step's mean may take where it can run in the background.
_OVERLAP = 0
# The same, in agreements, of fast and slow replicas together: nobody waits for a slow one's step then.
_OVERLAP_OF_HETEROGENEOUS = 1
# Numbers sent at a time, 64 MiB of float32: enough to fill any network, little beside a model.
CHUNK = 2**24


def has_small_groups(optimizer: CurvaDion) -> bool:
    """Whether the AdamW and Lion groups of an optimizer hold at most ``SMALL_GROUPS`` numbers, frozen ones included."""
    numbers = sum(parameter.numel() for group, parameter in optimizer.members() if group["algorithm"] != "dion")
    return numbers <= SMALL_GROUPS


@dataclass(frozen=True)
class SyncSettings:
    """The arguments of :class:`~lightning_curvadion.ProcessGroupSync` but for the process group.

    Raises:
        ValueError: On a bad argument, or a combination that would do nothing.
    """

    consensus: str
    wire_format: str
    vector_format: str | None
    momentum: str
    outer_lr: float
    outer_momentum: float
    factor_format: str
    sync_rank_fraction: float | None
    residual_dtype: str
    spread: int
    chunk: int
    lag: int
    overlap: int
    heterogeneous: bool = False

    def __post_init__(self) -> None:
        check_choice("consensus", self.consensus, get_args(Consensus))
        check_choice("wire_format", self.wire_format, wire_formats())
        check_choice("vector_format", self.embedding_format, wire_formats())
        check_choice("momentum", self.momentum, get_args(Momentum))
        check_choice("factor_format", self.factor_format, wire_formats())
        check_choice("residual_dtype", self.residual_dtype, get_args(ResidualDtype))
        if not self.outer_lr > 0:
            raise ValueError(f"outer_lr must be > 0, not {self.outer_lr}; 1.0 takes the average itself")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"outer_momentum must be in [0, 1), not {self.outer_momentum}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 number, not {self.chunk}; {CHUNK} is the default")
        if self.spread < 1:
            raise ValueError(f"spread must be at least 1 sync step, not {self.spread}; 1 sends all parameters at once")
        if self.lag < 0:
            raise ValueError(f"lag must be 0 steps or more, not {self.lag}; with 0 every step waits for its agreement")
        if self.overlap < 0:
            raise ValueError(f"overlap must be 0 steps or more, not {self.overlap}; with 0 a sync step waits for it")
        if self.sync_rank_fraction is not None and not 0 < self.sync_rank_fraction <= 1:
            raise ValueError(f"sync_rank_fraction must be in (0, 1], not {self.sync_rank_fraction}")
        self._check_together()

    def _check_together(self) -> None:
        if self.has_outer_step and self.consensus != "average":
            raise ValueError(f'an outer step needs consensus="average", not {self.consensus!r}')
        if self.spread > 1 and not self.sends_parameters_alone:
            raise ValueError(
                'spread needs consensus="average" with momentum="displacement" or "local", which send nothing but'
                f" parameters; leave it out with consensus={self.consensus!r}, momentum={self.momentum!r}"
            )
        if self.overlap > 0 and not self.sends_parameters_alone:
            raise ValueError(
                'overlap needs consensus="average" with momentum="displacement" or "local", which send nothing but'
                f" parameters; use overlap=0 with consensus={self.consensus!r}, momentum={self.momentum!r}"
            )
        if self.heterogeneous:
            self._check_heterogeneous()
        if self.momentum == "displacement" and self.consensus == "factors":
            raise ValueError(
                'momentum="displacement" needs the mean displacement of all parameters: use consensus="average", or'
                ' momentum="factors"'
            )
        if self.consensus == "none" and self.momentum not in ("factors", "dion"):
            raise ValueError(f'consensus="none" implies momentum="dion", not {self.momentum!r}')
        if self.sync_rank_fraction is not None and (self.momentum != "factors" or self.consensus == "none"):
            raise ValueError(
                'sync_rank_fraction is the rank of what momentum="factors" sends and needs a consensus of parameters;'
                f" leave it out with momentum={self.momentum!r}, consensus={self.consensus!r}"
            )
        if self.momentum == "average" and bits_of(self.factor_format) < 3:
            warnings.warn(
                f"a whole momentum in {self.factor_format} is known to hurt the loss; use factor_format='int4', or"
                " momentum='factors'",
                stacklevel=7,
            )

    def _check_heterogeneous(self) -> None:
        if not self.sends_parameters_alone:
            raise ValueError(
                'heterogeneous=True needs consensus="average" with momentum="displacement" or "local", which send'
                f" nothing but parameters; leave it out with consensus={self.consensus!r}, momentum={self.momentum!r}"
            )
        if self.lag != 1:
            raise ValueError(f"heterogeneous=True reads an agreement when it has arrived: leave out lag={self.lag}")
        if self.spread > 1:
            raise ValueError(f"heterogeneous=True sends all parameters at once: leave out spread={self.spread}")
        if self.has_outer_step:
            raise ValueError("heterogeneous=True takes the weighted mean itself: leave out outer_lr and outer_momentum")

    def check_trigger(self, trigger: Trigger) -> None:
        """Check that the trigger of an optimizer makes sense with these settings.

        Raises:
            ValueError: It watches a drift that no sync step would end.
        """
        if trigger.watches_drift and self.consensus == "none":
            name = type(trigger).__name__
            raise ValueError(
                f'use consensus="average", or a trigger such as IntegratedRMMC(0.3): {name} fires where replicas have'
                ' moved far since the last consensus, and consensus="none" never brings them together'
            )

    @property
    def sends_parameters_alone(self) -> bool:
        """Whether a sync step is a local step, and a mean of parameters after it."""
        return self.consensus == "average" and self.momentum in ("displacement", "local")

    @property
    def has_outer_step(self) -> bool:
        """Whether the averaged displacement goes through an outer step."""
        return (self.outer_lr, self.outer_momentum) != (1.0, 0.0)

    @property
    def needs_anchors(self) -> bool:
        """Whether parameters are averaged through their displacements, whatever the trigger."""
        quantized = self.consensus == "average" and {self.wire_format, self.embedding_format} != {"float32"}
        displacement = self.momentum == "displacement" or self.overlap > 0 or self.heterogeneous
        return self.consensus == "factors" or self.has_outer_step or quantized or displacement

    @property
    def embedding_format(self) -> str:
        """The wire format of parameters in AdamW and Lion groups, norms, biases and small groups apart."""
        return self.vector_format or self.wire_format

    @property
    def small_format(self) -> str:
        """The wire format of norms and biases, and of all parameters in small AdamW and Lion groups."""
        return self.vector_format or max(self.wire_format, _SMALL_FORMAT, key=bits_of)

    def format_of(self, parameter: Tensor, matrix: bool, in_small_groups: bool) -> str:
        """The wire format of a parameter in a sync step.

        Args:
            parameter: Of any shape.
            matrix: Whether it is in a ``"dion"`` group.
            in_small_groups: See :func:`has_small_groups`.
        """
        if matrix:
            return self.wire_format
        one_dimensional = parameter.numel() == max(parameter.shape, default=1)
        return self.small_format if in_small_groups or one_dimensional else self.embedding_format

    def correction_share(self, wire_format: str, matrix: bool) -> float:
        """How much of the difference between the mean displacement and its own a momentum takes over.

        Args:
            wire_format: Of the displacement.
            matrix: Whether the momentum is Muon's or Dion's, and not AdamW's.
        """
        if self.momentum != "displacement":
            return 0.0
        shares = _CORRECTION_SHARES if matrix else _CORRECTION_SHARES_OF_VECTORS
        bits = bits_of(wire_format)
        return next((share for fewer_than, share in shares if bits < fewer_than), 1.0)

    @property
    def dtype_of_residuals(self) -> torch.dtype:
        """``residual_dtype`` as a ``torch.dtype``."""
        return _RESIDUAL_DTYPES[self.residual_dtype]


def resolve_settings(
    *,
    consensus: str,
    wire_format: str | None,
    momentum: str | None,
    factor_format: str | None,
    overlap: int | None,
    heterogeneous: bool = False,
    quantizable: bool = True,
    **others: Any,
) -> SyncSettings:
    """The settings of a hook with all defaults filled in: the one place that says what they are.

    Args:
        consensus: See :class:`~lightning_curvadion.ProcessGroupSync`, as for all but ``quantizable``.
        wire_format: ``None`` for the default.
        momentum: ``None`` for the default.
        factor_format: ``None`` for the default.
        overlap: ``None`` for the default.
        heterogeneous: It has a default of ``overlap`` of its own.
        quantizable: Whether the parameters can be quantized.
        **others: Settings that no default depends on.

    Example:
        >>> defaults = dict.fromkeys(["wire_format", "momentum", "factor_format", "overlap"])
        >>> others = dict(vector_format=None, spread=1, chunk=1, lag=0)
        >>> others |= dict(outer_lr=1.0, outer_momentum=0.0, sync_rank_fraction=None, residual_dtype="float32")
        >>> settings = resolve_settings(consensus="average", **defaults, **others)
        >>> settings.wire_format, settings.embedding_format, settings.small_format, settings.momentum
        ('sign', 'sign', 'int8', 'displacement')
    """
    averages = consensus == "average"
    wire_format = wire_format or ("sign" if averages and quantizable else "float32")
    momentum = momentum or ("displacement" if averages else "factors")
    if consensus == "none" and momentum == "factors":
        # Nothing brings the momenta together where nothing brings the parameters together.
        momentum = "dion"
    factor_format = factor_format or _FACTOR_FORMATS.get(wire_format, _QUANTIZED_FACTOR_FORMAT)
    if overlap is None:
        usual = _OVERLAP_OF_HETEROGENEOUS if heterogeneous else _OVERLAP
        overlap = usual if averages and momentum in ("displacement", "local") else 0
    return SyncSettings(
        consensus=consensus,
        wire_format=wire_format,
        momentum=momentum,
        factor_format=factor_format,
        overlap=overlap,
        heterogeneous=heterogeneous,
        **others,
    )
