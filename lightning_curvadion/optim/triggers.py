"""Triggers: small objects that receive the RMMC of every step and decide whether to synchronise.

One of them, :class:`DriftThreshold`, receives how far the replicas have moved since the last consensus as well.

All replicas give their triggers the same number, so all decide alike. A trigger must therefore depend on nothing else.
Its state is part of the optimizer's ``state_dict``.

Where replicas take different numbers of steps, only those that act on an agreement ask the trigger. What is said of
steps here, such as of a period, then holds for agreements.
"""

import math
import sys
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

State = dict[str, Any]


class Trigger(ABC):
    """Base class. A subclass answers in :meth:`wants_sync` and may keep its state in the attributes named in
    ``_state``, plain numbers that a checkpoint then holds.

    Attributes:
        watches_drift: Whether the trigger needs the drift, which :meth:`observe` then receives. Measuring it is a pass
            over the parameters at every step, and the agreement of a step then has 24 bytes in place of 16.

    Example:
        >>> class Doubling(Trigger):
        ...     '''Synchronise at the steps 1, 2, 4, 8 and so on.'''
        ...     _state = ("steps",)
        ...     def __init__(self):
        ...         self.steps = 0
        ...     def wants_sync(self, rmmc):
        ...         self.steps += 1
        ...         return self.steps & (self.steps - 1) == 0
        >>> trigger = Doubling()
        >>> [trigger.wants_sync(rmmc=0.1) for _ in range(5)], trigger.state_dict()
        ([True, True, False, True, False], {'type': 'Doubling', 'steps': 5})
    """

    watches_drift: ClassVar[bool] = False
    _state: tuple[str, ...] = ()

    def drift_factor(self, lr: float) -> float:
        """What this replica multiplies its drift by, before the replicas agree on the largest. It changes no state.

        The learning rate may differ between replicas, as where each reduces its own on a plateau. What depends on it
        must therefore enter here, and not into a decision.

        Args:
            lr: Learning rate of this replica's first parameter group.
        """
        return 1.0

    def observe(self, drift: float, lr: float) -> None:  # noqa: B027
        """Called before :meth:`wants_sync` where the trigger watches the drift.

        Args:
            drift: The largest drift of any replica, times its :meth:`drift_factor`; 0 for a single replica.
            lr: Learning rate of this replica's first parameter group.
        """

    @abstractmethod
    def wants_sync(self, rmmc: float) -> bool:
        """Whether to synchronise at this step. Called exactly once a step.

        Args:
            rmmc: The largest RMMC of any momentum on any replica; infinite at the first step.
        """

    def stepped(self, synced: bool) -> None:  # noqa: B027
        """Called after :meth:`wants_sync` with the decision, since a cap can force a sync."""

    def state_dict(self) -> State:
        """Plain numbers, under the name of the class."""
        return {"type": type(self).__name__, **{name: getattr(self, name) for name in self._state}}

    def load_state_dict(self, state: State) -> None:
        """Take over a state of :meth:`state_dict`; warns and starts afresh where it is another trigger's."""
        if state["type"] != type(self).__name__:
            warnings.warn(
                f"The checkpoint was written with the trigger {state['type']}; {type(self).__name__} starts afresh.",
                stacklevel=2,
            )
            return
        for name in self._state:
            setattr(self, name, state[name])


class RMMCThreshold(Trigger):
    """Synchronise where RMMC > tau: the rule of the CurvaDion paper (arXiv:2512.13728).

    Args:
        tau: Threshold, >= 0. Its meaning shifts during a run, since the norm of the momentum grows and RMMC sinks;
            prefer :class:`IntegratedRMMC` or :class:`CommunicationBudget` where that matters.

    Raises:
        ValueError: ``tau`` is negative or NaN.

    Example:
        >>> trigger = LocalStepCap(RMMCThreshold(0.1), max_local_steps=2)
        >>> [trigger.decide(rmmc) for rmmc in (0.2, 0.05, 0.05, 0.05)]
        [True, False, False, True]
    """

    def __init__(self, tau: float) -> None:
        if not tau >= 0:
            raise ValueError(f"tau must be >= 0, not {tau}: RMMC is a ratio of norms and never negative")
        self.tau = float(tau)

    def wants_sync(self, rmmc: float) -> bool:
        """True where ``rmmc > tau``."""
        return rmmc > self.tau


class IntegratedRMMC(Trigger):
    """Synchronise once the RMMC summed since the last sync passes a budget.

    Where the curvature is steady this is a period; where it is not, syncs come denser. It needs no tuning when the
    batch size changes the scale of RMMC.

    Args:
        budget: How much relative change the replicas may go through alone, > 0.

    Raises:
        ValueError: ``budget`` is not positive.

    Example:
        >>> trigger = LocalStepCap(IntegratedRMMC(0.3), max_local_steps=50)
        >>> [trigger.decide(rmmc) for rmmc in (0.125, 0.125, 0.125, 0.125)]
        [False, False, True, False]
    """

    _state = ("spent",)

    def __init__(self, budget: float) -> None:
        if not budget > 0:
            raise ValueError(f"budget must be > 0, not {budget}; to synchronise at every step use EveryNSteps(1)")
        self.budget = float(budget)
        self.spent = 0.0

    def wants_sync(self, rmmc: float) -> bool:
        """True where the sum, this step included, is above the budget."""
        self.spent += rmmc
        return self.spent > self.budget

    def stepped(self, synced: bool) -> None:
        """A sync starts a new sum."""
        if synced:
            self.spent = 0.0


class EveryNSteps(Trigger):
    """Synchronise at every n-th step, whatever the RMMC: the schedule of local SGD and DiLoCo. ``n=1`` is Dion.

    Args:
        n: Period in steps, >= 1.

    Raises:
        ValueError: ``n`` is not a positive integer.

    Example:
        >>> trigger = LocalStepCap(EveryNSteps(3), max_local_steps=None)
        >>> [trigger.decide(rmmc) for rmmc in (0.9, 0.0, 0.9, 0.0)]
        [False, False, True, False]
    """

    _state = ("since_sync",)

    def __init__(self, n: int) -> None:
        if isinstance(n, bool) or n != int(n) or n < 1:
            raise ValueError(f"n must be an integer >= 1, not {n!r}; EveryNSteps(1) synchronises at every step")
        self.n = int(n)
        self.since_sync = 0

    def wants_sync(self, rmmc: float) -> bool:
        """True at the n-th step since the last sync."""
        self.since_sync += 1
        return self.since_sync >= self.n

    def stepped(self, synced: bool) -> None:
        """A sync starts a new period."""
        if synced:
            self.since_sync = 0


class CommunicationBudget(Trigger):
    r"""Move the threshold so that a chosen share of the steps synchronises.

    After every step :math:`\log\tau \leftarrow \log\tau + g\,([\mathrm{synced}] - f)`, the Robbins-Monro estimate of
    the (1 - f)-quantile of RMMC. Summed over T steps, the share of sync steps differs from f by
    :math:`|\log(\tau_T / \tau_1)| / (g T)`: however RMMC drifts, the budget is kept in the long run.

    Args:
        fraction: Share f of the steps that may synchronise, in (0, 1].

    Raises:
        ValueError: ``fraction`` outside (0, 1].

    Example:
        >>> trigger = LocalStepCap(CommunicationBudget(0.25), max_local_steps=None)
        >>> sum(trigger.decide((1 + step % 7) / (1 + step)) for step in range(1000))
        225
    """

    _state = ("tau",)
    # Fast enough to follow RMMC down three decades in a few hundred steps, slow enough not to chase single steps.
    _gain = 0.2
    # A run of unchanged momenta (RMMC = 0) must not drive tau to a zero that no factor can lift again.
    _least_tau = 1e-12

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], not {fraction}: it is a share of the steps")
        self.fraction = float(fraction)
        self.tau = 0.0

    def wants_sync(self, rmmc: float) -> bool:
        """True where RMMC is above the present threshold, which starts at the first finite RMMC seen."""
        if self.fraction == 1.0:
            return True
        if self.tau == 0.0 and 0 < rmmc < math.inf:
            self.tau = rmmc
            return False
        return rmmc > self.tau

    def stepped(self, synced: bool) -> None:
        """Move the threshold: up after a sync, down after a local step."""
        if self.tau > 0.0:
            self.tau = max(self.tau * math.exp(self._gain * (synced - self.fraction)), self._least_tau)


class DriftThreshold(Trigger):
    r"""Synchronise once a replica has moved far from the last consensus.

    With the parameters :math:`x_i` of replica i and the last consensus a, over all trainable parameters of the
    optimizer and before the step, the rule is

    .. math::
        \max_i \frac{\|x_i - a\|}{\|a\|} > \tau\,\frac{\mathrm{lr}}{\mathrm{largest\ lr\ so\ far}} .

    It is the plainest form of Federated Dynamic Averaging (arXiv:2405.20988), which bounds the variance of the
    replicas, :math:`\mathrm{mean}_i \|d_i\|^2 - \|\mathrm{mean}_i\, d_i\|^2` with :math:`d_i = x_i - a`. Without the
    second term it is an upper bound that needs one number of each replica. A sketch of the second term in 11 numbers
    was tried, and synchronised no better.

    The bound falls with the learning rate of the first parameter group. Shorter steps shorten the distance at which
    noise no longer averages out. A constant bound would let the syncs die out in a cooldown, whose last sync would then
    flush error-feedback residuals of far longer steps.

    What a sync step does not bring together counts on: with ``spread`` the parameters whose turn has not come, with
    the consensus ``"factors"`` what the factors leave out. A single replica never fires it, and the consensus
    ``"none"`` refuses it.

    Args:
        tau: How far a replica may move, relative to the norm of the consensus, > 0.

    Raises:
        ValueError: ``tau`` is not positive.

    Example:
        >>> trigger = LocalStepCap(DriftThreshold(0.02), max_local_steps=50)
        >>> [trigger.decide(0.1, drift=drift, lr=0.5) for drift in (0.0, 0.01, 0.03)]
        [False, False, True]
        >>> trigger.trigger.drift_factor(lr=0.25)
        2.0
    """

    watches_drift = True
    _state = ("largest_lr",)

    def __init__(self, tau: float) -> None:
        if not tau > 0:
            raise ValueError(f"tau must be > 0, not {tau}; to synchronise at every step use EveryNSteps(1)")
        self.tau = float(tau)
        self.largest_lr = 0.0
        self._passed = False

    def drift_factor(self, lr: float) -> float:
        """The largest learning rate so far over the present one: it lowers the bound by raising the drift."""
        # At a learning rate of zero every drift passes but zero itself, which times infinity would be NaN.
        return max(self.largest_lr, lr) / max(lr, sys.float_info.min)

    def observe(self, drift: float, lr: float) -> None:
        """Compare the drift with tau."""
        self.largest_lr = max(self.largest_lr, lr)
        self._passed = drift > self.tau

    def wants_sync(self, rmmc: float) -> bool:
        """True where the drift is above tau, whatever the RMMC."""
        return self._passed


class LocalStepCap:
    """Any trigger, with a bound on the run of local steps between two syncs.

    Args:
        trigger: Asked at every step.
        max_local_steps: At most so many local steps in a row; the next one synchronises. ``None`` sets no bound.

    Raises:
        ValueError: ``trigger`` is no trigger, or ``max_local_steps`` no positive integer.
    """

    def __init__(self, trigger: Trigger, max_local_steps: int | None) -> None:
        if not isinstance(trigger, Trigger):
            raise ValueError(f"trigger must be a trigger such as IntegratedRMMC(0.5), not {trigger!r}")
        if max_local_steps is not None and (max_local_steps != int(max_local_steps) or max_local_steps < 1):
            raise ValueError(f"max_local_steps must be an integer >= 1, or None for no bound, not {max_local_steps!r}")
        self.trigger = trigger
        self.max_local_steps = max_local_steps
        self.local_steps = 0
        self.sync_steps = 0

    def decide(self, rmmc: float, drift: float = 0.0, lr: float = 0.0, may_sync: bool = True) -> bool:
        """Whether this step synchronises. Called exactly once a step.

        Args:
            rmmc: See :meth:`Trigger.wants_sync`.
            drift: See :meth:`Trigger.observe`, as for ``lr``; for a trigger that watches it.
            lr: Learning rate.
            may_sync: Whether it may. The trigger goes on as after a local step otherwise.
        """
        if self.trigger.watches_drift:
            self.trigger.observe(drift, lr)
        synced = self.trigger.wants_sync(rmmc)
        if self.max_local_steps is not None and self.local_steps >= self.max_local_steps:
            synced = True
        synced = synced and may_sync
        self.local_steps = 0 if synced else self.local_steps + 1
        self.sync_steps += synced
        self.trigger.stepped(synced)
        return synced

    def state_dict(self) -> State:
        """State of the trigger, the present run of local steps, and the number of sync steps."""
        counts = {"local_steps": self.local_steps, "sync_steps": self.sync_steps}
        return {**counts, "trigger": self.trigger.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Take over a state of :meth:`state_dict`."""
        self.trigger.load_state_dict(state["trigger"])
        self.local_steps = state["local_steps"]
        # Version 0.1.0 did not count them.
        self.sync_steps = state.get("sync_steps", 0)
