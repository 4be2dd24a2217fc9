"""Which matrices a parameter holds, by its shape and its group's options ``flatten``, ``transposed`` and ``packed``.

With ``flatten`` a kernel of shape (out, in, \\*kernel) is one matrix, (out, in x kernel). Otherwise the last two
dimensions are the matrix and those before them a batch, such as the experts of a layer, (experts, m, n). With
``packed`` each of these holds several matrices side by side along its outputs, such as queries, keys and values: blocks
of rows, or of columns where it is stored (fan in, fan out).
"""

import math
from collections.abc import Sequence

from torch import Tensor

from .parameter_groups import Group


def matrix_shape(shape: Sequence[int], group: Group) -> tuple[int, int]:
    """Rows and columns, as they are stored, of each matrix of a parameter.

    Example:
        >>> plain = {"flatten": False, "transposed": False, "packed": 1}
        >>> matrix_shape((64, 3, 7, 7), {**plain, "flatten": True}), matrix_shape((8, 16, 32), plain)
        ((64, 147), (16, 32))
        >>> matrix_shape((48, 16), {**plain, "packed": 3})
        (16, 16)
    """
    rows, columns = (shape[0], math.prod(shape[1:])) if group["flatten"] else (shape[-2], shape[-1])
    parts = group["packed"]
    return (rows, columns // parts) if group["transposed"] else (rows // parts, columns)


def batch_shape(shape: Sequence[int], group: Group) -> tuple[int, ...]:
    """The dimensions that count the matrices of a parameter; empty where it is one matrix.

    Example:
        >>> plain = {"flatten": False, "transposed": False, "packed": 1}
        >>> batch_shape((64, 3, 7, 7), {**plain, "flatten": True}), batch_shape((8, 16, 32), plain)
        ((), (8,))
        >>> batch_shape((48, 16), {**plain, "packed": 3})
        (3,)
    """
    batch = () if group["flatten"] else tuple(shape[:-2])
    return (*batch, group["packed"]) if group["packed"] > 1 else batch


def packs_columns(group: Group) -> bool:
    """Whether the matrices of a parameter are blocks of its columns, which do not lie in memory one after the other."""
    return bool(group["transposed"] and group["packed"] > 1)


def as_matrices(tensor: Tensor, group: Group) -> Tensor:
    """A tensor of a parameter's shape as its matrices, shape (\\*batch, m, n).

    A view, except of a flattened kernel whose strides allow none: write to it only where that is seen to.

    Example:
        >>> import torch
        >>> plain = {"flatten": False, "transposed": False, "packed": 1}
        >>> as_matrices(torch.zeros(64, 3, 7, 7), {**plain, "flatten": True}).shape
        torch.Size([64, 147])
        >>> as_matrices(torch.zeros(16, 48), {**plain, "transposed": True, "packed": 3}).shape
        torch.Size([3, 16, 16])
    """
    matrices = tensor.flatten(1) if group["flatten"] else tensor
    if group["packed"] == 1:
        return matrices
    if group["transposed"]:
        return matrices.unflatten(-1, (group["packed"], -1)).transpose(-3, -2)
    return matrices.unflatten(-2, (group["packed"], -1))


def list_matrices(tensor: Tensor, group: Group) -> list[Tensor]:
    """The matrices of a tensor of a parameter's shape, one by one, as of :func:`as_matrices`.

    Example:
        >>> import torch
        >>> group = {"flatten": False, "transposed": False, "packed": 1}
        >>> [matrix.shape for matrix in list_matrices(torch.zeros(2, 5, 3), group)]
        [torch.Size([5, 3]), torch.Size([5, 3])]
    """
    matrices = [as_matrices(tensor, group)]
    while matrices[0].dim() > 2:
        matrices = [one for batch in matrices for one in batch.unbind()]
    return matrices


def as_parameter(matrices: Tensor, shape: Sequence[int], group: Group) -> Tensor:
    """The inverse of :func:`as_matrices`: a tensor of a parameter's shape.

    Args:
        matrices: Shape (k, m, n).
        shape: Of the parameter.
        group: Of the parameter.

    Example:
        >>> import torch
        >>> group = {"flatten": False, "transposed": True, "packed": 2}
        >>> as_parameter(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), (1, 4), group)
        tensor([[1., 2., 3., 4.]])
    """
    if packs_columns(group):
        matrices = matrices.unflatten(0, (-1, group["packed"])).transpose(1, 2)
    return matrices.reshape(shape)
