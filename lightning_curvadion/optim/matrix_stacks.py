"""Matrices of one shape, stacked in memory so that one call serves them all."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dion, muon

# 16 MiB of float32: enough work to hide the cost of a call, and temporaries that stay in a CPU's cache. A larger matrix
# has a stack of its own.
STACK_ELEMENTS = 2**22

Group = dict[str, Any]
State = dict[str, Any]


class MatrixStack:
    """k equally shaped matrices of one parameter group, with their state stacked along a first dimension.

    The optimizer's ``state[p]`` holds views of these tensors, so that users and checkpoints see one matrix at a time
    and the arithmetic all k.

    Args:
        group: The parameter group, read at every step since schedulers write to it.
        parameters: The k matrices.
        states: Their ``state[p]`` with ``"momentum"``, ``"Q"`` and ``"norm"``; replaced by views of the stack.

    Attributes:
        momentum: Shape (k, fan-out, fan-in).
        Q: Right factors, shape (k, min(fan-out, fan-in), r).
        norm: ``||B||_F`` of the step before, float32, shape (k,).
    """

    def __init__(self, group: Group, parameters: Sequence[Tensor], states: Sequence[State]) -> None:
        self.group = group
        self.parameters = list(parameters)
        self.momentum, self.Q, self.norm = (
            torch.stack([state[name] for state in states]) for name in ("momentum", "Q", "norm")
        )
        self._views = [self.momentum.unbind(), self.Q.unbind(), self.norm.unbind()]
        for state, momentum, Q, norm in zip(states, *self._views, strict=True):
            state.update(momentum=momentum, Q=Q, norm=norm)

    @property
    def momenta(self) -> Sequence[Tensor]:
        """The momentum matrices one by one."""
        return self._views[0]

    @property
    def wide(self) -> bool:
        """Whether the matrices have more columns than rows, and are handled transposed."""
        fan_out, fan_in = self.parameters[0].shape
        return fan_out < fan_in

    @property
    def steps_whole(self) -> bool:
        """Whether local steps are Muon's, along the whole momentum and not along factors."""
        return self.group["local_update"] == "muon"

    @property
    def B(self) -> Tensor:
        """The momentum as the equations see it, at least as tall as wide: a view of shape (k, m, n)."""
        return self.oriented(self.momentum)

    def oriented(self, matrices: Tensor) -> Tensor:
        """A view of matrices shaped like the parameters that is at least as tall as wide."""
        return matrices.mT if self.wide else matrices

    @property
    def averaging_is_cheaper(self) -> bool:
        """Whether the two factors, r (m + n) numbers, are no fewer than the m n of the matrix itself."""
        m, n = self.parameters[0].shape
        return self.Q.shape[-1] * (m + n) >= m * n

    @property
    def gradients(self) -> list[Tensor | None]:
        """Gradients of the parameters, ``None`` where one has none."""
        return [parameter.grad for parameter in self.parameters]

    def mirrors(self, states: Sequence[State]) -> bool:
        """Whether ``state[p]`` still holds this stack's views and not tensors that were put there since."""
        return all(
            state.get("momentum") is momentum and state.get("Q") is Q and state.get("norm") is norm
            for state, momentum, Q, norm in zip(states, *self._views, strict=True)
        )

    def accumulate(self) -> None:
        """``B = M + G``; a missing gradient counts as zero."""
        pairs = [(m, g) for m, g in zip(self.momenta, self.gradients, strict=True) if g is not None]
        if pairs:
            momenta, gradients = zip(*pairs, strict=True)
            torch._foreach_add_(momenta, gradients)

    def nesterov(self) -> Tensor:
        """``G + mu B``, Nesterov's momentum, shape (k, fan-out, fan-in). Call it after :meth:`accumulate`."""
        lookahead = self.momentum * self.group["mu"]
        if pairs := [(u, g) for u, g in zip(lookahead.unbind(), self.gradients, strict=True) if g is not None]:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        return lookahead

    def descend_whole(self, nesterov: Tensor) -> None:
        """Take Muon's step along Nesterov's momentum, and let the momentum decay.

        Args:
            nesterov: Of this replica, or a mean over replicas.
        """
        group = self.group
        update = muon.newton_schulz(nesterov, group["eps"])
        self.momentum.mul_(group["mu"])
        muon.descend_(self.parameters, update, group["lr"], group["weight_decay"])

    def descend(self, P: Tensor, R: Tensor, own_R: Tensor | None = None) -> None:
        """Take the step along the factors P (k, m, r) and R (k, n, r), and what it used up out of the momentum.

        Args:
            P: Orthonormal left factor.
            R: Right factor, a mean over replicas at a sync step.
            own_R: This replica's right factor, given where its part in the span of P is to become the mean's.
        """
        group = self.group
        step_factor, kept_factor = dion.unit_columns(R, self.Q, group["eps"])
        self.Q.copy_(kept_factor)
        if own_R is None:
            dion.feed_back_error_(self.B, P, R, share=1.0 - group["mu"])
        else:
            dion.feed_back_error_(self.B, P, own_R - group["mu"] * R, share=1.0)
        dion.descend_(self.parameters, P, step_factor, group["lr"], group["weight_decay"])


def new_matrix_state(parameter: Tensor, rank_fraction: float, seed: int) -> State:
    """State of a matrix before its first step: no momentum, a random right factor, and no norm to compare with."""
    rank = dion.rank_of(parameter.shape, rank_fraction)
    return {
        "momentum": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
        "Q": dion.initial_right_factor(min(parameter.shape), rank, seed, like=parameter),
        "norm": torch.tensor(torch.inf, dtype=torch.float32, device=parameter.device),
    }


def batches(parameters: Sequence[Tensor], state: dict[Tensor, State]) -> Iterator[list[Tensor]]:
    """Split parameters into runs that can be stacked: equal shape, rank, dtype and device, of bounded size."""
    by_layout: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        key = (parameter.shape, state[parameter]["Q"].shape, parameter.dtype, parameter.device)
        by_layout.setdefault(key, []).append(parameter)
    for members in by_layout.values():
        most = max(1, STACK_ELEMENTS // max(1, members[0].numel()))
        for start in range(0, len(members), most):
            yield members[start : start + most]
