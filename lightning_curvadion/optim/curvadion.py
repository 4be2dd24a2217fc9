r"""CurvaDion: every replica steps alone; the replicas synchronise only when the loss surface bends.

One step reads as in the paper (arXiv:2512.13728; the Dion update is arXiv:2504.05295). Replica i, with gradient
:math:`G_i` and momentum :math:`M_i`:

1. measures :math:`B_i = M_i + G_i` and its RMMC, and writes nothing (``step_signal.py``, ``rmmc.py``);
2. agrees with the others on the largest RMMC, and on whether every gradient is finite: one all-reduce of 16 bytes.
   A trigger that watches the drift receives the largest of that too, in 24 bytes. With a lag, what is read here is what
   was sent some steps before, so that nobody waits for it;
3. decides: the trigger sees this number, so every replica takes the same branch (``triggers.py``);
4. takes a local step with its own :math:`B_i` (``local_step.py``), or a sync step (``sync_step.py``), which brings the
   parameters together. The paper's goes along :math:`P = \mathrm{orth}(\mathrm{mean}_i B_i Q)` and
   :math:`R = \mathrm{mean}_i B_i^\top P`. By default it is a local step, and the mean displacement then corrects
   the momentum (``momentum_correction.py``).

Nothing here communicates. A hook does (``sync_hook.py``), such as :class:`~lightning_curvadion.ProcessGroupSync`.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.profiler import record_function

from . import gradient_checks
from .local_step import local_step
from .optimizer_state import StackedOptimizer
from .parameter_groups import OPTIONS_SINCE_0_1_0
from .shards import is_sharded
from .step_signal import FIRST_MOMENTS, SignalMeter, StepSignal
from .sync_hook import SyncHook, watchers_without_hook
from .sync_step import sync_step
from .triggers import IntegratedRMMC, LocalStepCap, RMMCThreshold, Trigger

# Chosen by loss and bytes, see examples/benchmarks/README.md.
DEFAULT_BUDGET = 0.45
_RANK_FRACTION = 0.5
# Muon's step has no factors. They serve sync steps that send some, and cost memory at the others.
_RANK_FRACTION_OF_MUON = 0.25


@dataclass(frozen=True)
class StepReport:
    """What the last step did.

    Attributes:
        rmmc: The largest RMMC of any momentum on any replica that the trigger saw; infinite at the first step. With a
            lag it is that of so many steps before, and 0 at the first. It is 0 where a step acts on no agreement, as
            those of a fast replica beside a slow one.
        synced: Whether the replicas synchronised. Without a hook, and for a single replica, nobody is there to
            synchronise with: whether the trigger fired.
        bytes_sent: Payload of this replica's collectives in bytes; an all-reduce of n bytes counts n.
    """

    rmmc: float
    synced: bool
    bytes_sent: int


class CurvaDion(StackedOptimizer):
    r"""Muon or Dion with decoupled momentum that synchronises its replicas only when its trigger fires.

    Without a hook (:meth:`register_sync_hook`) it is a single replica: it never communicates, and its steps are those
    of Muon, or of Dion where a rank is given.

    Args:
        params: Parameters or groups; :func:`~lightning_curvadion.split_parameters` makes them from a module. Groups of
            ``algorithm="dion"``, the default, hold parameters of two dimensions and more. Others go to groups with
            ``"adamw"`` or ``"lion"``. Frozen parameters (``requires_grad=False``) are left alone. A missing gradient
            counts as zero for matrices; other parameters skip the step, as in ``torch.optim``.
        lr: Learning rate :math:`\eta`; matrices multiply it by what ``lr_scale`` says.
        tau: Shorthand for ``trigger=RMMCThreshold(tau)``.
        mu: Momentum decay :math:`\mu`, in [0, 1).
        local_update: How matrices step. ``"muon"``: the whole momentum orthonormalised, with Nesterov's momentum
            (``muon.py``). ``"dion"``: Dion's step along factors of ``rank_fraction``. ``"sgd"``, between syncs,
            :math:`X \leftarrow X - \eta_{local} G` with the momentum decayed by ``mu``, the paper's cheap step; Dion's
            at syncs. ``None`` is ``"dion"`` where ``rank_fraction`` is given, and ``"muon"`` otherwise, which trains
            better (``examples/benchmarks/README.md``). On a CPU it costs more, since it computes in float32 there.
        rank_fraction: Rank of the factors over the smaller side of the matrix, in (0, 1]. ``None`` is 0.5 for Dion's
            step. A higher rank costs time, and bytes only where factors are sent; it trains better. For Muon's step
            ``None`` is 0.25: only sync steps that send factors have any then.
        local_lr: :math:`\eta_{local}`, needed by ``local_update="sgd"``.
        lr_scale: ``"spectral"``: the spectral norm of a matrix's step is the learning rate times
            :math:`\sqrt{\mathrm{fan\ out} / \mathrm{fan\ in}}`. ``"match_rms_adamw"``: its root mean square is 0.2
            times the learning rate, as AdamW's usually is, so that a learning rate tuned for AdamW carries over.
        betas: Decay of the moments of AdamW, or of Lion.
        weight_decay: Decoupled weight decay.
        eps: Added to denominators.
        trigger: When to synchronise; a copy is taken. Default ``IntegratedRMMC(0.45)``, which
            at one bit a number came to about 1 % of DDP's bytes in the comparison of ``examples/benchmarks/README.md``.
        max_local_steps: At most so many local steps in a row; ``None`` for no bound. It is for plateaus, where RMMC
            falls to nothing.

    Every hyperparameter up to ``eps``, except ``tau``, can be set per group, and so can ``algorithm``.

    Three options say which matrices a parameter of a ``"dion"`` group holds; they are for groups alone.
    ``flatten=True``: it is one matrix (out, in x kernel), as a convolution's weight. By default the last two dimensions
    are a matrix and those before them a batch. ``transposed=True``: its matrices are stored (fan in, fan out).
    ``packed=3``: it holds three matrices of one size side by side along its outputs, such as queries, keys and values.
    Each steps, and is watched by RMMC, as a parameter of its own would be. The momentum keeps the parameter's shape.

    State of a matrix: its momentum, its right factor Q (min(m, n) x r) and one number. Of other parameters: that of
    AdamW or Lion. A step allocates temporaries for one stack of equally shaped matrices (16 MiB, or one parameter if
    larger); a sync step holds the factors of all of them.

    Raises:
        ValueError: On a bad argument or group, naming it and the remedy.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = CurvaDion([{"params": [model[0].weight, model[2].weight]},
        ...                        {"params": [model[0].bias, model[2].bias], "algorithm": "adamw"}], lr=0.02)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_step
        StepReport(rmmc=inf, synced=True, bytes_sent=0)

        In every process of a process group, before the first step::

            optimizer.register_sync_hook(ProcessGroupSync())
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        tau: float | None = None,
        mu: float = 0.95,
        rank_fraction: float | None = None,
        local_update: Literal["muon", "dion", "sgd"] | None = None,
        local_lr: float | None = None,
        lr_scale: Literal["spectral", "match_rms_adamw"] = "spectral",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        trigger: Trigger | None = None,
        max_local_steps: int | None = 50,
    ) -> None:
        if tau is not None and trigger is not None:
            raise ValueError("tau and trigger exclude each other: tau=x is short for trigger=RMMCThreshold(x)")
        if trigger is None:
            trigger = IntegratedRMMC(DEFAULT_BUDGET) if tau is None else RMMCThreshold(tau)
        self._cap = LocalStepCap(copy.deepcopy(trigger), max_local_steps)
        self._hook: SyncHook | None = None
        self._replicas_share_Q = True
        self._meter = SignalMeter()
        self._signal: StepSignal | None = None
        # What a loaded state says of its last agreements, for a hook that is attached later.
        self._loaded_agreements: list[tuple[float, float]] = []
        self.last_step: StepReport | None = None
        if local_update is None:
            local_update = "muon" if rank_fraction is None else "dion"
        if rank_fraction is None:
            rank_fraction = _RANK_FRACTION_OF_MUON if local_update == "muon" else _RANK_FRACTION
        defaults = {
            "lr": lr,
            "mu": mu,
            "rank_fraction": rank_fraction,
            "local_update": local_update,
            "local_lr": local_lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "eps": eps,
            "algorithm": "dion",
            **OPTIONS_SINCE_0_1_0,
            "lr_scale": lr_scale,
        }
        super().__init__(params, defaults)

    @property
    def trigger(self) -> Trigger:
        """The trigger, with its present state."""
        return self._cap.trigger

    @property
    def max_local_steps(self) -> int | None:
        """The bound on the run of local steps, ``None`` for no bound."""
        return self._cap.max_local_steps

    @property
    def sync_steps(self) -> int:
        """Number of sync steps so far."""
        return self._cap.sync_steps

    @property
    def sync_hook(self) -> SyncHook | None:
        """The attached hook, if any."""
        return self._hook

    def register_sync_hook(self, hook: SyncHook) -> None:
        """Attach what communicates. It is a collective: every process calls it.

        Raises:
            ValueError: A hook is attached already, the replicas hold different models, or this is Fabric's wrapper.
        """
        if isinstance(self.__dict__.get("_optimizer"), CurvaDion):
            raise ValueError(
                "this is Fabric's wrapper of the optimizer, whose steps would not see the hook: register it on the"
                " CurvaDion that you gave to fabric.setup, and read last_step there"
            )
        if self._hook is not None:
            raise ValueError("a sync hook is registered already; an optimizer has one, made for one process group")
        self.init_state()
        hook._attach(self)
        self._hook = hook
        hook._resume(self, self._loaded_agreements)
        self.replicas_share_state()

    def replicas_share_state(self, share: bool = True) -> None:
        """Called by the hook when all replicas hold the same state, and so the same Q, or may not."""
        self._replicas_share_Q = share

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``, and the trigger's state under ``"trigger"``; tensors and plain numbers only.

        Under ``"agreements"``, with a lag, RMMC and drift of the last steps, which the next ones act on. Sharded
        parameters have sharded states, as ``torch.distributed.checkpoint`` saves them.
        """
        agreed = self._hook._agreed_so_far(self) if self._hook is not None else []
        state = {**super().state_dict(), "trigger": self._cap.state_dict()}
        # A distributed checkpoint is loaded into a state that has its keys.
        named = bool(agreed) or self.shards is not None
        return {**state, "agreements": [list(one) for one in agreed]} if named else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``. A state without ``"trigger"`` leaves the trigger as it is."""
        super().load_state_dict(state_dict)
        if "trigger" in state_dict:
            self._cap.load_state_dict(state_dict["trigger"])
        self._loaded_agreements = [(rmmc, drift) for rmmc, drift in state_dict.get("agreements", ())]
        if self._hook is not None:
            self._hook._resume(self, self._loaded_agreements)
        self.replicas_share_state()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the trigger and the state, and no hook: a process group cannot be copied."""
        own = {"_cap": self._cap, "_hook": None, "_replicas_share_Q": True, "_meter": SignalMeter(), "_signal": None}
        return {**super().__getstate__(), **own, "_loaded_agreements": [], "last_step": self.last_step}

    def rmmc_by_parameter(self) -> dict[str, float]:
        """Relative change of each momentum that RMMC counts, on this replica in the last step.

        Of a matrix under the parameter's name, the largest where a parameter has several, and of all other parameters
        together under ``"first moments"``. Infinite in a matrix's first step. Reading it makes the host wait for the
        device.
        """
        if self._signal is None:
            return {}
        # Where all parameters are matrices there is no last change.
        counted: list[Tensor | str] = [*self._signal.parameters, FIRST_MOMENTS]
        change_of: dict[Tensor | str, float] = {}
        for owner, change in zip(counted, self._signal.changes.tolist(), strict=False):
            change_of[owner] = max(change, change_of.get(owner, 0.0))
        named: list[tuple[str, Tensor | str]] = [*self.named_parameters(), (FIRST_MOMENTS, FIRST_MOMENTS)]
        return {name: change_of[key] for name, key in named if key in change_of}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on this replica. With a hook it is a collective, of 16 bytes unless the trigger fires.

        They are 24 where the trigger watches the drift. With a lag it waits for nobody unless the trigger fires.

        Args:
            closure: Evaluates the model again and returns the loss, as in ``torch.optim``.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: A gradient of any replica is not finite, sparse or complex, or a parameter has another shape
                than its state. Raised on all replicas in the same step, naming the replica and the parameter, before
                any parameter or state has changed. With a lag it is raised as many steps later, or in a consensus if
                that comes first: the replica concerned has then left out its step, and the others have taken theirs.
                So is a parameter that a sync step cannot quantize; each replica has then taken its own step, and none
                the mean.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if self.shards is None and is_sharded(self.param_groups[0]["params"][0]):
            raise ValueError(
                "the parameters are sharded over several processes, and nothing makes their matrices whole: call"
                ' register_sync_hook(ProcessGroupSync(mesh.get_group("replica"), inner_group=mesh.get_group("inner")))'
            )
        hook, stacks = self._hook, self.matrix_stacks()
        with _no_autocast(self.param_groups[0]["params"][0].device.type):
            sent_before = hook.bytes_sent if hook is not None else 0
            with record_function("curvadion::rmmc"):
                signal = self._signal = self._meter.measure(self, stacks, rank=hook.rank if hook is not None else 0)
            with record_function("curvadion::agreement"):
                rmmc, code, drift = hook._agree(signal.numbers) if hook is not None else (*signal.numbers.tolist(), 0.0)
                self._raise_if_unusable(code)
            sync_hook = hook if hook is not None and hook.world_size > 1 else None
            may_sync = sync_hook is None or sync_hook._may_sync(self)
            asked = sync_hook is None or sync_hook._reads_agreement
            lr = float(self.param_groups[0]["lr"])
            synced = asked and self._cap.decide(rmmc, drift, lr=lr, may_sync=may_sync)
            if synced and sync_hook is not None:
                with record_function("curvadion::agreement"):
                    self._raise_if_unusable(sync_hook._confirm())
            # Where the others learn of an unusable gradient only later, this replica takes no step with it.
            steps = sync_hook is None or not sync_hook._lag or signal.leave_out_unusable(self)
            if steps:
                for stack, norm in zip(stacks, signal.norms, strict=True):
                    stack.norm.copy_(norm)
            keep_roots = sync_hook is not None and sync_hook._corrects_momenta(self, synced)
            if synced and sync_hook is not None:
                with record_function("curvadion::sync_step"):
                    self._replicas_share_Q = sync_step(
                        self, stacks, sync_hook, self._replicas_share_Q, steps, keep_roots
                    )
            elif steps:
                with record_function("curvadion::local_step"):
                    changed_Q = local_step(self, stacks, synced, keep_roots)
                    self._replicas_share_Q = self._replicas_share_Q and not changed_Q
            if sync_hook is not None:
                sync_hook._proceed(self)
            if hook is None:
                for watcher in watchers_without_hook:
                    watcher(self)
            sent = hook.bytes_sent - sent_before if hook is not None else 0
            self.last_step = StepReport(rmmc=rmmc, synced=synced, bytes_sent=sent)
        return loss

    def _raise_if_unusable(self, code: float) -> None:
        if code >= 1:
            names = [name for name, _ in self.named_parameters()]
            places = self._hook._places if self._hook is not None else ["rank 0"]
            raise gradient_checks.UnusableGradientError(gradient_checks.describe(int(code), names, places))


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which products of the state keep its dtype, whatever the user's mixed precision."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
