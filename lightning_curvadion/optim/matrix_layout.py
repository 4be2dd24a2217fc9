"""Which matrices a parameter holds, by its shape and two options of its group, and the scale of their steps.

``flatten``: a kernel of shape (out, in, \\*kernel) is one matrix, (out, in x kernel). Otherwise the last two dimensions
are the matrix and those before them a batch, such as the experts of a layer, (experts, m, n).

``transposed``: the matrix is stored as (fan-in, fan-out), and not as (fan-out, fan-in) like that of ``nn.Linear``. Its
step is the same up to the scale.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

Group = dict[str, Any]


def matrix_shape(shape: Sequence[int], flatten: bool) -> tuple[int, int]:
    """Rows and columns, as they are stored, of each matrix of a parameter.

    Example:
        >>> matrix_shape((64, 3, 7, 7), flatten=True), matrix_shape((8, 16, 32), flatten=False)
        ((64, 147), (16, 32))
    """
    return (shape[0], math.prod(shape[1:])) if flatten else (shape[-2], shape[-1])


def batch_shape(shape: Sequence[int], flatten: bool) -> tuple[int, ...]:
    """The dimensions that count the matrices of a parameter; empty where it is one matrix.

    Example:
        >>> batch_shape((64, 3, 7, 7), flatten=True), batch_shape((8, 16, 32), flatten=False)
        ((), (8,))
    """
    return () if flatten else tuple(shape[:-2])


def as_matrices(tensor: Tensor, flatten: bool) -> Tensor:
    """A tensor of a parameter's shape as its matrix (m, n), or as its matrices (k, m, n).

    A view where the strides allow one, else a copy: write to it only where that is seen to.

    Example:
        >>> import torch
        >>> as_matrices(torch.zeros(64, 3, 7, 7), flatten=True).shape
        torch.Size([64, 147])
    """
    if flatten:
        return tensor.flatten(1)
    return tensor.flatten(0, -3) if tensor.dim() > 3 else tensor


def list_matrices(tensor: Tensor, flatten: bool) -> list[Tensor]:
    """The matrices of a tensor of a parameter's shape, one by one, as of :func:`as_matrices`.

    Example:
        >>> import torch
        >>> [matrix.shape for matrix in list_matrices(torch.zeros(2, 5, 3), flatten=False)]
        [torch.Size([5, 3]), torch.Size([5, 3])]
    """
    matrices = as_matrices(tensor, flatten)
    return list(matrices.unbind()) if matrices.dim() == 3 else [matrices]


def step_scale(group: Group, shape: tuple[int, int]) -> float:
    """What a step along an orthonormal direction is multiplied by, next to the learning rate.

    The root of fan-out over fan-in: inputs of root mean square one then change the outputs by the learning rate at most
    (Yang et al., 2023, arXiv:2310.17813).

    Args:
        group: The parameter's group.
        shape: Of the matrix as it is stored.

    Example:
        >>> step_scale({"transposed": False}, (64, 16)), step_scale({"transposed": True}, (64, 16))
        (2.0, 0.5)
    """
    fan_out, fan_in = reversed(shape) if group["transposed"] else shape
    return math.sqrt(fan_out / fan_in)
