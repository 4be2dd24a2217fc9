r"""CurvaDion: every replica steps alone, and only a bend of the loss surface brings the replicas together.

One step reads as in the paper (arXiv:2512.13728; the Dion update is arXiv:2504.05295). Replica i, with gradient
:math:`G_i`:

1. measures: :math:`B_i = M_i + G_i` and its RMMC, writing nothing;
2. agrees: the largest RMMC of all replicas, one collective of 16 bytes, and with it whether any gradient is not finite;
3. decides: the trigger is told that number, so every replica takes the same branch;
4. steps: with its own :math:`B_i`, or at a sync step with :math:`P = \mathrm{orth}(\mathrm{mean}_i B_i Q)` and
   :math:`R = \mathrm{mean}_i B_i^\top P`, where parameters meet too (:class:`~lightning_curvadion.ProcessGroupSync`).

Nothing here communicates: a hook does, see :class:`~lightning_curvadion.optim.sync_hook.SyncHook`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.profiler import record_function

from . import adamw_lion, dion, gradient_checks
from . import rmmc as curvature
from .matrix_stacks import MatrixStack
from .optimizer_state import StackedOptimizer
from .sync_hook import SyncHook
from .triggers import IntegratedRMMC, LocalStepCap, RMMCThreshold, Trigger

# Chosen by loss and bytes, see examples/benchmarks/README.md.
DEFAULT_BUDGET = 0.3


@dataclass(frozen=True)
class StepReport:
    """What the last step did.

    Attributes:
        rmmc: The largest RMMC of any matrix on any replica; infinite at the first step.
        synced: Whether the trigger fired and, where a hook is attached, the replicas met.
        bytes_sent: Payload of this replica's collectives in bytes; an all-reduce of n bytes counts n.
    """

    rmmc: float
    synced: bool
    bytes_sent: int


class CurvaDion(StackedOptimizer):
    r"""Dion with decoupled momentum that synchronises replicas only when its trigger says so.

    Without a hook (:meth:`register_sync_hook`) it is a single replica and never communicates; its steps are those of
    Dion.

    Args:
        params: Parameters or groups; :func:`~lightning_curvadion.split_parameters` makes them from a module. Groups of
            ``algorithm="dion"``, the default, hold matrices only. Other parameters go to groups with ``"adamw"`` or
            ``"lion"``. Frozen parameters (``requires_grad=False``) are left alone. A missing gradient counts as zero
            for matrices; other parameters skip the step, as in ``torch.optim``.
        lr: Learning rate :math:`\eta`; matrices scale it by :math:`\sqrt{\mathrm{fan\ out} / \mathrm{fan\ in}}`.
        tau: Shorthand for ``trigger=RMMCThreshold(tau)``.
        mu: Momentum decay :math:`\mu`, in [0, 1).
        rank_fraction: Rank of the factors over the smaller side of the matrix, in (0, 1]. Ranks cost time, not bytes,
            unless factors are sent. Half trains better than a quarter; at full rank rounding decides the smallest
            directions of a step, and replicas with equal data part.
        local_update: How matrices step between syncs: ``"dion"``, the same update with the replica's own momentum, or
            ``"sgd"``, :math:`X \leftarrow X - \eta_{local} G` with the momentum decayed by ``mu``, the paper's cheap
            step.
        local_lr: :math:`\eta_{local}`, needed by ``local_update="sgd"``.
        betas: Decay of the moments of AdamW, or of Lion.
        weight_decay: Decoupled weight decay.
        eps: Added to denominators.
        trigger: When to synchronise; a copy is taken. Default ``IntegratedRMMC(0.3)``, which
            at one bit a number came to about 1 % of DDP's bytes in the comparison of ``examples/benchmarks/README.md``.
        max_local_steps: At most so many local steps in a row; ``None`` for no bound. For plateaus, where RMMC
            falls to nothing.

    Every hyperparameter up to ``eps``, except ``tau``, can be set per group, and so can ``algorithm``.

    State of a matrix: its momentum, its right factor Q (min(m, n) x r) and one number. Of other parameters: that of
    AdamW or Lion. A step allocates temporaries for one stack of equally shaped matrices (16 MiB, or one matrix if
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
        rank_fraction: float = 0.5,
        local_update: Literal["dion", "sgd"] = "dion",
        local_lr: float | None = None,
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
        self._codes: tuple[list[int], Tensor] | None = None
        self._changes: tuple[list[Tensor], Tensor] | None = None
        self.last_step: StepReport | None = None
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
        }
        super().__init__(params, defaults)

    @property
    def trigger(self) -> Trigger:
        """The trigger, with its present state."""
        return self._cap.trigger

    @property
    def sync_hook(self) -> SyncHook | None:
        """The attached hook, if any."""
        return self._hook

    def register_sync_hook(self, hook: SyncHook) -> None:
        """Attach what communicates; a meeting of all replicas, so every process calls it.

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
        hook.attach(self)
        self._hook = hook
        self.replicas_share_state()

    def replicas_share_state(self) -> None:
        """Told by the hook that all replicas now hold the same state, so the same Q."""
        self._replicas_share_Q = True

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``, and the trigger's state under ``"trigger"``; tensors and plain numbers only."""
        return {**super().state_dict(), "trigger": self._cap.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``. A state without ``"trigger"`` leaves the trigger as it is."""
        super().load_state_dict(state_dict)
        if "trigger" in state_dict:
            self._cap.load_state_dict(state_dict["trigger"])
        self.replicas_share_state()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the trigger and the state, and no hook: a process group cannot be copied."""
        own = {"_cap": self._cap, "_hook": None, "_replicas_share_Q": True, "_codes": None, "_changes": None}
        return {**super().__getstate__(), **own, "last_step": self.last_step}

    def rmmc_by_parameter(self) -> dict[str, float]:
        """Relative change of each matrix's momentum on this replica in the last step, by the parameter's name.

        Infinite in a matrix's first step. Reading it makes the host wait for the device.
        """
        if self._changes is None:
            return {}
        parameters, changes = self._changes
        change_of = dict(zip(parameters, changes.tolist(), strict=True))
        return {name: change_of[parameter] for name, parameter in self.named_parameters() if parameter in change_of}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on this replica; with a hook a meeting of all of them, of 16 bytes unless the trigger fires.

        Args:
            closure: Evaluates the model again and returns the loss, as in ``torch.optim``.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: A gradient of any replica is not finite, sparse or complex. Raised on all replicas in the same
                step, naming the replica and the parameter, before any parameter or state has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        hook = self._hook
        sent_before = hook.bytes_sent if hook is not None else 0
        stacks = self.matrix_stacks()
        with record_function("curvadion::rmmc"):
            norms, signal = self._measure(stacks)
        with record_function("curvadion::agreement"):
            rmmc, fault = hook.agree(signal) if hook is not None else signal.tolist()
        if fault >= 1:
            raise ValueError(gradient_checks.describe(int(fault), [name for name, _ in self.named_parameters()]))
        for stack, norm in zip(stacks, norms, strict=True):
            stack.norm.copy_(norm)

        synced = self._cap.decide(rmmc)
        if synced and hook is not None:
            with record_function("curvadion::sync_step"):
                self._sync_step(stacks, hook)
        else:
            with record_function("curvadion::local_step"):
                self._local_step(stacks, dion_only=synced)
        sent = hook.bytes_sent - sent_before if hook is not None else 0
        self.last_step = StepReport(rmmc=rmmc, synced=synced, bytes_sent=sent)
        return loss

    def _measure(self, stacks: list[MatrixStack]) -> tuple[list[Tensor], Tensor]:
        """Norms of all B, and the signal to agree on: (RMMC, code of a bad gradient or 0), float64, on the device."""
        parameters = [parameter for _, parameter in self.members()]
        number_of = {parameter: number for number, parameter in enumerate(parameters)}
        rank = self._hook.rank if self._hook is not None else 0

        def code(kind: int, parameter: Tensor) -> int:
            return gradient_checks.encode(kind, number_of[parameter], len(parameters), rank)

        signal = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
        self._changes = None
        graded = [p for p in parameters if p.requires_grad and p.grad is not None]
        unusable = [
            (kind, p) for p in graded if (kind := gradient_checks.layout_fault(cast(Tensor, p.grad))) is not None
        ]
        if unusable:
            signal[1] = code(*unusable[0])
            return [], signal

        norms = [curvature.momentum_norms(stack.momenta, stack.gradients) for stack in stacks]
        checked = [parameter for stack in stacks for parameter in stack.parameters]
        sizes = list(norms)
        if norms:
            changes = curvature.relative_change(torch.cat(norms), torch.cat([stack.norm for stack in stacks]))
            self._changes = [parameter for stack in stacks for parameter in stack.parameters], changes
            signal[0] = changes.max()
        vector_members = [p for _, members in self.vector_groups() for p in members if p.grad is not None]
        if vector_members:
            checked += vector_members
            sizes.append(curvature.gradient_norms([cast(Tensor, p.grad) for p in vector_members]))
        if sizes:
            codes = self._on_device([code(gradient_checks.NOT_FINITE, p) for p in checked], signal)
            signal[1] = (codes * ~torch.isfinite(torch.cat(sizes))).max()
        return norms, signal

    def _on_device(self, codes: list[int], like: Tensor) -> Tensor:
        """The codes as a tensor, copied to the device only when they have changed: a copy makes the host wait."""
        if self._codes is None or self._codes[0] != codes or self._codes[1].device != like.device:
            self._codes = codes, torch.tensor(codes, dtype=like.dtype, device=like.device)
        return self._codes[1]

    def _local_step(self, stacks: list[MatrixStack], dion_only: bool = False) -> None:
        """Every parameter steps with this replica's own gradient and momentum."""
        for stack in stacks:
            stack.accumulate()
            if stack.group["local_update"] == "sgd" and not dion_only:
                _sgd_step(stack)
                continue
            _dion_step(stack)
            self._replicas_share_Q = False
        self._step_vectors()

    def _sync_step(self, stacks: list[MatrixStack], hook: SyncHook) -> None:
        """A step at which the replicas meet; what of their momentum does is the hook's ``momentum``."""
        if hook.momentum == "local":
            self._local_step(stacks, dion_only=True)
            hook.mean_left(self, [], [])
            hook.mean_right(self, [], [])
        elif hook.momentum == "average":
            for stack in stacks:
                stack.accumulate()
            hook.mean_left(self, [], [tensor for stack in stacks for tensor in (stack.momentum, stack.Q)])
            for stack in stacks:
                _dion_step(stack)
            self._replicas_share_Q = True
            self._step_vectors()
            hook.mean_right(self, [], [])
        elif hook.sync_rank_fraction is not None:
            self._local_step(stacks, dion_only=True)
            self._thin_meeting(stacks, hook, hook.sync_rank_fraction)
        else:
            for stack in stacks:
                stack.accumulate()
            self._factor_step(stacks, hook)
            self._replicas_share_Q = True

    def _thin_meeting(self, stacks: list[MatrixStack], hook: SyncHook, rank_fraction: float) -> None:
        """After a step of its own, each replica's momentum takes the mean's part in the span of a few common columns.

        The first columns of Q are the dominant ones: every step orthonormalises them from left to right.
        """
        thin = [stack.Q[..., : dion.rank_of(stack.parameters[0].shape, rank_fraction)] for stack in stacks]
        left = [dion.left_factor(stack.B, Q) for stack, Q in zip(stacks, thin, strict=True)]
        common = [dion.orthonormalize(mean) for mean in hook.mean_left(self, left, [])]
        own = [dion.right_factor(stack.B, P) for stack, P in zip(stacks, common, strict=True)]
        for stack, P, sent, R in zip(stacks, common, own, hook.mean_right(self, own, []), strict=True):
            dion.feed_back_error_(stack.B, P, sent - R, share=1.0)

    def _factor_step(self, stacks: list[MatrixStack], hook: SyncHook) -> None:
        """The Dion factor collectives: P and R are means over the replicas, one exchange each for the whole model."""
        # Where two factors are as large as the matrix, the mean matrix itself is exchanged and both factors follow from
        # it, on every replica alike if they start from one Q.
        dense = [stack.averaging_is_cheaper and self._replicas_share_Q for stack in stacks]
        thin = [stack for stack, whole in zip(stacks, dense, strict=True) if not whole]
        # Where replicas keep their own momentum, the mean is formed beside it.
        shared = {
            stack: stack.momentum if hook.momentum == "factors" else stack.momentum.clone()
            for stack, whole in zip(stacks, dense, strict=True)
            if whole
        }
        left = iter(hook.mean_left(self, [dion.left_factor(s.B, s.Q) for s in thin], list(shared.values())))
        P, own_R = {}, {}
        for stack in stacks:
            B = stack.oriented(shared[stack]) if stack in shared else stack.B
            P[stack] = dion.orthonormalize(dion.left_factor(B, stack.Q) if stack in shared else next(left))
            own_R[stack] = dion.right_factor(B, P[stack])

        gradients: dict[Tensor, Tensor] = {}
        if hook.averages_vector_gradients:
            graded = [parameter for _, parameters in self.vector_groups() for parameter in parameters]
            gradients = {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in graded}
        else:
            # Before parameters meet, so that they end the step as one.
            self._step_vectors()
        right = iter(hook.mean_right(self, [own_R[stack] for stack in thin], list(gradients.values())))
        for stack in stacks:
            if stack in shared:
                stack.descend(P[stack], own_R[stack])
            else:
                stack.descend(P[stack], next(right), own_R[stack] if hook.momentum == "factors" else None)
        if gradients:
            self._step_vectors(gradients)

    def _step_vectors(self, mean_gradients: dict[Tensor, Tensor] | None = None) -> None:
        for group, parameters in self.vector_groups():
            gradient_of = mean_gradients or {p: p.grad for p in parameters if p.grad is not None}
            members = [p for p in parameters if p in gradient_of]
            if not members:
                continue
            states = [self.state[p] for p in members]
            for state in states:
                state["step"] += 1
            gradients = [gradient_of[p] for p in members]
            averages = [state["exp_avg"] for state in states]
            common = {name: group[name] for name in ("lr", "betas", "weight_decay")}
            if group["algorithm"] == "lion":
                adamw_lion.lion_(members, gradients, averages, **common)
            else:
                squares = [state["exp_avg_sq"] for state in states]
                steps = [state["step"] for state in states]
                adamw_lion.adamw_(members, gradients, averages, squares, steps, **common, eps=group["eps"])


def _dion_step(stack: MatrixStack) -> None:
    """Dion's update from this replica's B alone."""
    P = dion.orthonormalize(dion.left_factor(stack.B, stack.Q))
    R = dion.right_factor(stack.B, P)
    stack.descend(P, R)


def _sgd_step(stack: MatrixStack) -> None:
    """The paper's cheap local step: ``X -= local_lr G``, and the momentum, gradient included, decays by mu."""
    pairs = [(p, p.grad) for p in stack.parameters if p.grad is not None]
    if pairs:
        parameters, gradients = zip(*pairs, strict=True)
        torch._foreach_add_(parameters, gradients, alpha=-stack.group["local_lr"])
    stack.momentum.mul_(stack.group["mu"])
