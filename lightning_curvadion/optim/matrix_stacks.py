"""Matrices of one shape, stacked in memory so that one call serves them all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import dion, muon
from .lr_scale import step_scale
from .matrix_layout import as_matrices, as_parameter, batch_shape, list_matrices, matrix_shape, packs_columns
from .parameter_groups import Group
from .rmmc import momentum_norms
from .shards import sharded_like

# 16 MiB of float32: enough work to hide the cost of a call, and temporaries that stay in a CPU's cache. A larger matrix
# has a stack of its own.
STACK_ELEMENTS = 2**22

State = dict[str, Any]


class MatrixStack:
    """k equally shaped matrices of one parameter group, with their state stacked along a first dimension.

    A parameter is one of them, or holds several (``matrix_layout.py``). The optimizer's ``state[p]`` holds views of
    these tensors, so that users and checkpoints see one parameter at a time and the arithmetic all k matrices.

    Args:
        group: The parameter group, read at every step since schedulers write to it.
        parameters: Equally shaped.
        states: Their ``state[p]`` with ``"momentum"``, ``"Q"`` and ``"norm"``; replaced by views of the stack.

    Attributes:
        shape: Rows m and columns n of each matrix, as they are stored.
        momentum: Shape (k, m, n), contiguous but for blocks of columns.
        momenta: The momentum matrices one by one.
        Q: Right factors, shape (k, min(m, n), r).
        norm: ``||B||_F`` of the step before, float32, shape (k,).
        roots: What a correction of the momenta needs of the last step (``momentum_correction.py``): shape (k, s, s)
            with s the smaller side. ``None`` where no correction follows, and after Dion's step.
    """

    def __init__(self, group: Group, parameters: Sequence[Tensor], states: Sequence[State]) -> None:
        self.group = group
        self.parameters = list(parameters)
        stacked = [
            # A stack of kernels may keep the strides of channels_last, of which there is no view as matrices.
            torch.stack([state[name] for state in states]).contiguous()
            for name in ("momentum", "Q", "norm")
        ]
        self._views = [tensor.unbind() for tensor in stacked]
        for state, *views in zip(states, *self._views, strict=True):
            state.update(zip(("momentum", "Q", "norm"), views, strict=True))
        self.shape = matrix_shape(states[0]["momentum"].shape, group)
        # Blocks of columns are a view only of a stack of one parameter; see batches.
        momenta = as_matrices(stacked[0][0], group) if packs_columns(group) else stacked[0]
        self.momentum = momenta.view(-1, *self.shape)
        self.Q = stacked[1].view(-1, *stacked[1].shape[-2:])
        self.norm = stacked[2].view(-1)
        self.momenta = self.momentum.unbind()
        self._per_parameter = len(self.momenta) // len(self.parameters)
        self.roots: Tensor | None = None

    @property
    def owners(self) -> list[Tensor]:
        """The parameter of each of the k matrices."""
        return [parameter for parameter in self.parameters for _ in range(self._per_parameter)]

    @property
    def wide(self) -> bool:
        """Whether the matrices have more columns than rows, and are handled transposed."""
        rows, columns = self.shape
        return rows < columns

    @property
    def steps_whole(self) -> bool:
        """Whether local steps are Muon's, along the whole momentum and not along factors."""
        return self.group["local_update"] == "muon"

    @property
    def B(self) -> Tensor:
        """The momentum as the equations see it, at least as tall as wide."""
        return self.oriented(self.momentum)

    def oriented(self, matrices: Tensor) -> Tensor:
        """A view of matrices of shape (k, m, n) that is at least as tall as wide."""
        return matrices.mT if self.wide else matrices

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of tensors shaped like the parameters as matrices, shape (k, m, n)."""
        return torch.stack([as_matrices(tensor, self.group) for tensor in tensors]).reshape(-1, *self.shape)

    def like_parameters(self, matrices: Tensor) -> Sequence[Tensor]:
        """Matrices of shape (k, m, n) as tensors shaped like the parameters."""
        of_parameters = matrices.unflatten(0, (len(self.parameters), -1)).unbind()
        return [as_parameter(own, self.parameters[0].shape, self.group) for own in of_parameters]

    @contextmanager
    def _writable_matrices(self) -> Iterator[list[Tensor]]:
        """The matrices of the parameters one by one. What is written to them is the parameters' afterwards."""
        of_parameters = [list_matrices(parameter, self.group) for parameter in self.parameters]
        yield [matrix for matrices in of_parameters for matrix in matrices]
        for parameter, matrices in zip(self.parameters, of_parameters, strict=True):
            if matrices[0].untyped_storage() is not parameter.untyped_storage():
                # Strides such as those of channels_last allow no view.
                parameter.copy_(as_parameter(torch.stack(matrices), parameter.shape, self.group))

    @property
    def averaging_is_cheaper(self) -> bool:
        """Whether the two factors, r (m + n) numbers, are no fewer than the m n of the matrix itself."""
        m, n = self.shape
        return self.Q.shape[-1] * (m + n) >= m * n

    @property
    def gradients(self) -> list[Tensor | None]:
        """Gradients of the k matrices, ``None`` where their parameter has none."""
        gradients: list[Tensor | None] = []
        for parameter in self.parameters:
            if parameter.grad is None:
                gradients += [None] * self._per_parameter
            else:
                gradients += list_matrices(parameter.grad, self.group)
        return gradients

    def take_roots(self) -> dict[Tensor, Tensor]:
        """:attr:`roots` by parameter, shape (matrices, s, s) each. Their memory is the caller's now."""
        roots, self.roots = self.roots, None
        if roots is None:
            return {}
        return dict(zip(self.parameters, roots.unflatten(0, (len(self.parameters), -1)), strict=True))

    def mirrors(self, states: Sequence[State]) -> bool:
        """Whether ``state[p]`` still holds this stack's views and not tensors that were put there since."""
        return all(
            state.get("momentum") is momentum and state.get("Q") is Q and state.get("norm") is norm
            for state, momentum, Q, norm in zip(states, *self._views, strict=True)
        )

    def momentum_norms(self) -> Tensor:
        """``||M + G||_F`` of the k matrices, before :meth:`accumulate`; see ``rmmc.py``."""
        return momentum_norms(self.momenta, self.gradients)

    def accumulate(self) -> None:
        """``B = M + G``; a missing gradient counts as zero."""
        pairs = [(m, g) for m, g in zip(self.momenta, self.gradients, strict=True) if g is not None]
        if pairs:
            momenta, gradients = zip(*pairs, strict=True)
            torch._foreach_add_(momenta, gradients)

    def decay(self) -> None:
        """``M = mu B``."""
        self.momentum.mul_(self.group["mu"])

    def nesterov(self) -> Tensor:
        """``G + mu B``, Nesterov's momentum, shape (k, m, n). Call it after :meth:`accumulate`."""
        lookahead = self.momentum * self.group["mu"]
        if pairs := [(u, g) for u, g in zip(lookahead.unbind(), self.gradients, strict=True) if g is not None]:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        return lookahead

    def descend_whole(self, nesterov: Tensor, keep_roots: bool = False) -> None:
        """Take Muon's step along Nesterov's momentum, and let the momentum decay.

        Args:
            nesterov: Of this replica, or a mean over replicas.
            keep_roots: As for :meth:`descend_along`.
        """
        self.descend_along(muon.newton_schulz(nesterov, self.group["eps"]), keep_roots)

    def descend_along(self, update: Tensor, keep_roots: bool = False) -> None:
        """The same, given the orthonormalised momentum.

        Args:
            update: Shape (k, m, n).
            keep_roots: Whether a correction of the momenta follows in this step. It would orthonormalise them again.
        """
        group = self.group
        self.decay()
        self.roots = muon.root_of_polar(update, self.momentum) if keep_roots else None
        scale = step_scale(group, self.shape, rank=min(self.shape))
        with self._writable_matrices() as matrices:
            muon.descend_(matrices, update, group["lr"], scale, group["weight_decay"])

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
        scale = step_scale(group, self.shape, rank=P.shape[-1])
        with self._writable_matrices() as matrices:
            dion.descend_(matrices, P, step_factor, group["lr"], scale, group["weight_decay"])


def new_matrix_state(parameter: Tensor, group: Group, seed: int) -> State:
    """State of a parameter's matrices before the first step: no momentum, random Q, and no norm to compare with."""
    shape, batch = (of(parameter.shape, group) for of in (matrix_shape, batch_shape))
    rank = dion.rank_of(shape, group["rank_fraction"])
    like = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return {
        "momentum": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
        "Q": sharded_like(dion.initial_right_factor(min(shape), rank, seed, like=like, batch=batch), parameter),
        "norm": torch.full(batch, torch.inf, dtype=torch.float32, device=parameter.device),
    }


def batches(group: Group, parameters: Sequence[Tensor], state: Mapping[Tensor, State]) -> Iterator[list[Tensor]]:
    """Split parameters of a group into runs that can be stacked: equal shape, rank, dtype and device, of bounded size.

    A parameter whose matrices are blocks of columns is alone: the momentum keeps its shape, and the blocks of several
    have no common stride.
    """
    by_layout: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        key = (parameter.shape, state[parameter]["Q"].shape, parameter.dtype, parameter.device)
        by_layout.setdefault(key, []).append(parameter)
    for members in by_layout.values():
        most = 1 if packs_columns(group) else max(1, STACK_ELEMENTS // max(1, members[0].numel()))
        for start in range(0, len(members), most):
            yield members[start : start + most]
