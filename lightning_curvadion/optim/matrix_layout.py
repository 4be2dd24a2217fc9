"""Which matrices a parameter holds, by its shape and the option ``flatten`` of its group.

Where it is true, a kernel of shape (out, in, \\*kernel) is one matrix, (out, in x kernel). Otherwise the last two
dimensions are the matrix and those before them a batch, such as the experts of a layer, (experts, m, n).
"""

import math
from collections.abc import Sequence

from torch import Tensor


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
