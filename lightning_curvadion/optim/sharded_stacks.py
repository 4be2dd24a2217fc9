"""Stacks of sharded matrices: each process of a replica holds some rows of them, and computes whole steps for some."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from typing_extensions import override

from .dion import left_factor, orthonormalize, right_factor
from .lr_scale import step_scale
from .matrix_layout import matrix_shape
from .matrix_stacks import MatrixStack, State
from .parameter_groups import Group
from .rmmc import momentum_norms
from .shards import Shard, WholeComputation, local_of, matrix_pieces, norms_by_matrix, shard_of


class ShardedStack(MatrixStack):
    """Equally shaped sharded parameters of one group. Their momentum and Q stay where they are, sharded as they are.

    What needs whole matrices takes place in a :class:`~lightning_curvadion.optim.shards.WholeComputation`. It has
    neither ``momentum`` nor ``Q`` in one piece, and so no steps along means of factors.

    Args:
        group: The parameter group.
        parameters: Equally shaped, sharded alike.
        states: Their ``state[p]``.

    Attributes:
        momenta: What this process holds of the momentum matrices, one by one.
    """

    def __init__(self, group: Group, parameters: Sequence[Tensor], states: Sequence[State]) -> None:
        self.group = group
        self.parameters = list(parameters)
        norm = torch.stack([state["norm"] for state in states])
        self._momenta, self._Q = ([state[name] for state in states] for name in ("momentum", "Q"))
        self._views = [tuple(self._momenta), tuple(self._Q), norm.unbind()]
        for state, view in zip(states, self._views[2], strict=True):
            state["norm"] = view
        self.shape = matrix_shape(states[0]["momentum"].shape, group)
        self.norm = norm.view(-1)
        self._per_parameter = self.norm.numel() // len(self.parameters)
        self._pieces = [matrix_pieces(momentum, group) for momentum in self._momenta]
        self.momenta = tuple(chain.from_iterable(pieces for _, pieces in self._pieces))
        self._polars: list[Tensor] | None = None

    @property
    @override
    def gradients(self) -> list[Tensor | None]:
        gradients: list[Tensor | None] = []
        for parameter, (_, pieces) in zip(self.parameters, self._pieces, strict=True):
            own = [None] * len(pieces) if parameter.grad is None else matrix_pieces(parameter.grad, self.group)[1]
            gradients += own
        return gradients

    @override
    def momentum_norms(self) -> Tensor:
        """As of whole matrices, of what this process holds of them."""
        if not self.momenta:
            return torch.zeros_like(self.norm)
        norms = momentum_norms(self.momenta, self.gradients).split([len(pieces) for _, pieces in self._pieces])
        return torch.cat(
            [
                norms_by_matrix(own, first, self._per_parameter)
                for own, (first, _) in zip(norms, self._pieces, strict=True)
            ]
        )

    @override
    def decay(self) -> None:
        torch._foreach_mul_([local_of(momentum) for momentum in self._momenta], self.group["mu"])

    def whole_step(self) -> tuple[WholeComputation, list[Tensor]]:
        """The computation of Muon's or Dion's step from B, and the rows of the step that it writes.

        Call it after :meth:`accumulate`, and :meth:`take` once it was run.
        """
        momenta = [shard_of(momentum) for momentum in self._momenta]
        steps = [Shard(torch.empty_like(momentum.local), momentum.shape) for momentum in momenta]
        if self.steps_whole:
            for step, momentum, parameter in zip(steps, momenta, self.parameters, strict=True):
                torch.mul(momentum.local, self.group["mu"], out=step.local)
                if parameter.grad is not None:
                    step.local.add_(local_of(parameter.grad))
            self.decay()
            computation = WholeComputation(self._muon_steps, inputs=[steps], outputs=[steps])
        else:
            Q = [shard_of(own) for own in self._Q]
            computation = WholeComputation(self._dion_steps, inputs=[momenta, Q], outputs=[steps, momenta, Q])
        return computation, [step.local for step in steps]

    def take(self, steps: Sequence[Tensor], keep_roots: bool = False) -> None:
        """Take the rows of a step, with weight decay.

        Args:
            steps: What :meth:`whole_step` returned; they hold the learning rate.
            keep_roots: Whether a correction of the momenta follows.
        """
        length = -self.group["lr"] * step_scale(self.group, self.shape, rank=min(self.shape))
        keeps = keep_roots and self.steps_whole and length
        self._polars = [step / length for step in steps] if keeps else None
        parameters = [local_of(parameter) for parameter in self.parameters]
        torch._foreach_mul_(parameters, 1.0 - self.group["lr"] * self.group["weight_decay"])
        torch._foreach_add_(parameters, list(steps))

    @override
    def take_roots(self) -> dict[Tensor, Tensor]:
        """The orthonormalised momentum by parameter, of which this process has some rows, in place of the roots."""
        polars, self._polars = self._polars, None
        return dict(zip(self.parameters, polars, strict=True)) if polars is not None else {}

    def _muon_steps(self, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        (nesterov,) = inputs
        # It steps without factors.
        stack, _ = self._whole_stack(nesterov, [nesterov[0].new_zeros(1, 1)] * len(nesterov))
        stack.descend_whole(stack.momentum)
        return [stack.parameters]

    def _dion_steps(self, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        momenta, Q = inputs
        stack, states = self._whole_stack(momenta, Q)
        P = orthonormalize(left_factor(stack.B, stack.Q))
        stack.descend(P, right_factor(stack.B, P))
        return [stack.parameters, [state["momentum"] for state in states], [state["Q"] for state in states]]

    def _whole_stack(self, momenta: list[Tensor], Q: list[Tensor]) -> tuple[MatrixStack, list[State]]:
        """A stack of whole matrices that starts at zero, so that it becomes the step, and its state."""
        norm = self.norm[: self._per_parameter]
        states = [{"momentum": momentum, "Q": own, "norm": norm} for momentum, own in zip(momenta, Q, strict=True)]
        return MatrixStack(self.group, [torch.zeros_like(momentum) for momentum in momenta], states), states
