"""The signal of a step: the two numbers that the replicas agree on, measured before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from . import gradient_checks
from .matrix_stacks import MatrixStack
from .optimizer_state import StackedOptimizer
from .rmmc import first_moment_norms, relative_change, tensor_norms
from .shards import local_of, whole_norms

# What RMMC counts beside the matrices: the first moments of all AdamW and Lion parameters, as one vector.
FIRST_MOMENTS = "first moments"


@dataclass(frozen=True)
class StepSignal:
    """What a replica has measured of its step.

    Attributes:
        numbers: RMMC, and the code of an unusable gradient or 0; float64, shape (2,), on the device.
        norms: ``||B||_F`` of the matrices, one tensor a stack; empty where a gradient has an unusable layout.
        parameters: The parameter of each matrix, in the order of the stacks.
        changes: Relative change of each matrix's norm, and last of the first moments', where there are any; empty where
            a gradient has an unusable layout.
    """

    numbers: Tensor
    norms: list[Tensor]
    parameters: list[Tensor]
    changes: Tensor

    def leave_out_unusable(self, optimizer: StackedOptimizer) -> bool:
        """Let a step write no number that is not finite, without a wait for the device.

        On a CPU, and where the layout of a gradient is unusable, the replica takes no step at all. On a device that the
        host does not wait for, its gradients become zero there if one of them is not finite: it steps along its momenta
        alone.

        Returns:
            Whether to take the step.
        """
        code = self.numbers[1]
        if code.device.type == "cpu" or not self.changes.numel():
            return bool(self.changes.numel()) and bool(code < 1)
        unusable = code >= 1
        for _, parameter in optimizer.members():
            if parameter.grad is not None:
                local_of(parameter.grad).masked_fill_(unusable, 0.0)
        stacks = iter(optimizer.matrix_stacks())
        for norm in self.norms:
            norm.copy_(torch.where(unusable, next(stacks).norm, norm))
        return True


class SignalMeter:
    """Measures the signal of each step of an optimizer, without a wait for the device."""

    def __init__(self) -> None:
        self._codes: tuple[list[int], Tensor] | None = None

    def measure(self, optimizer: StackedOptimizer, stacks: Sequence[MatrixStack], rank: int) -> StepSignal:
        """Measure RMMC, and look for a gradient or a shape that no step can be taken with.

        Args:
            optimizer: Holds the parameters.
            stacks: Its matrices.
            rank: This replica, for the code of an unusable gradient.
        """
        parameters = [parameter for _, parameter in optimizer.members()]
        number_of = {parameter: number for number, parameter in enumerate(parameters)}

        def code(kind: int, parameter: Tensor) -> int:
            return gradient_checks.encode(kind, number_of[parameter], len(parameters), rank)

        numbers = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
        matrices = [parameter for stack in stacks for parameter in stack.owners]
        for parameter in parameters:
            if parameter.requires_grad:
                kind = gradient_checks.unusable_shape(parameter, optimizer.state[parameter])
                if kind is None and parameter.grad is not None:
                    kind = gradient_checks.unusable_layout(parameter.grad)
                if kind is not None:
                    numbers[1] = code(kind, parameter)
                    return StepSignal(numbers, [], [], numbers.new_empty(0))

        norms = [stack.momentum_norms() for stack in stacks]
        vectors, vector_norms, previous_vector_norms = _first_moments(optimizer)
        if optimizer.shards is not None and (norms or vector_norms):
            whole = iter(whole_norms(optimizer.shards, [*norms, *vector_norms, *previous_vector_norms]))
            norms, vector_norms, previous_vector_norms = (
                list(islice(whole, len(own))) for own in (norms, vector_norms, previous_vector_norms)
            )
        measured = torch.cat([numbers.new_empty(0, dtype=torch.float32), *norms, *vector_norms])
        if measured.numel() == 0:
            return StepSignal(numbers, norms, matrices, measured)
        codes = [code(gradient_checks.NOT_FINITE, parameter) for parameter in [*matrices, *vectors]]
        numbers[1] = (self._on_device(codes, numbers) * ~torch.isfinite(measured)).max()
        joint = [torch.cat(own).norm().view(1) for own in (vector_norms, previous_vector_norms) if own]
        changes = relative_change(
            torch.cat([*norms, *joint[:1]]), torch.cat([*(stack.norm for stack in stacks), *joint[1:]])
        )
        numbers[0] = changes.max()
        return StepSignal(numbers, norms, matrices, changes)

    def _on_device(self, codes: list[int], like: Tensor) -> Tensor:
        """The codes as a tensor, copied to the device only when they have changed: a copy makes the host wait."""
        if self._codes is None or self._codes[0] != codes or self._codes[1].device != like.device:
            self._codes = codes, torch.tensor(codes, dtype=like.dtype, device=like.device)
        return self._codes[1]


def _first_moments(optimizer: StackedOptimizer) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The trainable AdamW and Lion parameters, the norms of their first moments after this step, and before it.

    The norm before the step needs no place in the state: the moment is what the step before has written, or the mean
    over the replicas since. Before the first step it is zero, which makes the first change infinite.
    """
    vectors: list[Tensor] = []
    norms, previous = [], []
    for group, members in optimizer.vector_groups():
        if members:
            moments = [local_of(optimizer.state[parameter]["exp_avg"]) for parameter in members]
            gradients = [None if parameter.grad is None else local_of(parameter.grad) for parameter in members]
            beta = group["betas"][group["algorithm"] == "lion"]
            vectors += members
            norms.append(first_moment_norms(moments, gradients, beta))
            previous.append(tensor_norms(moments))
    return vectors, norms, previous
