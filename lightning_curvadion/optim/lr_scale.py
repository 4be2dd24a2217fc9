r"""The scale of a matrix's step, by the options ``lr_scale`` and ``transposed`` of its group.

A step goes along a matrix O of m x n with r singular values near one: all of them in Muon's, the rank of the factors in
Dion's. It is multiplied by the learning rate and by

- ``"spectral"``: :math:`\sqrt{\mathrm{fan\ out} / \mathrm{fan\ in}}`. Inputs whose root mean square is one then change
  the outputs by the learning rate at most, whatever the shape (Yang et al., 2023, arXiv:2310.17813).
- ``"match_rms_adamw"``: :math:`0.2 \sqrt{m n / r}`. The root mean square of O is :math:`\sqrt{r / (m n)}`, so that of
  the step is 0.2, as AdamW's usually is, and AdamW's learning rate carries over. Moonlight (arXiv:2502.16982) has it
  for Muon, where r is the smaller side: :math:`0.2 \sqrt{\max(m, n)}`.
"""

import math

from .parameter_groups import Group

_RMS_OF_ADAMW = 0.2


def step_scale(group: Group, shape: tuple[int, int], rank: int) -> float:
    """What the step of a matrix is multiplied by, next to the learning rate.

    Args:
        group: The parameter's group. ``transposed``: the matrix is stored as (fan-in, fan-out), and not as
            (fan-out, fan-in) like that of ``nn.Linear``.
        shape: Of the matrix as it is stored.
        rank: Number of its step's singular values near one.

    Example:
        >>> group = {"lr_scale": "spectral", "transposed": False}
        >>> step_scale(group, (64, 16), rank=16), step_scale({**group, "transposed": True}, (64, 16), rank=16)
        (2.0, 0.5)
        >>> round(step_scale({**group, "lr_scale": "match_rms_adamw"}, (64, 16), rank=16), 4)
        1.6
    """
    rows, columns = shape
    if group["lr_scale"] == "match_rms_adamw":
        return _RMS_OF_ADAMW * math.sqrt(rows * columns / rank)
    fan_out, fan_in = (columns, rows) if group["transposed"] else (rows, columns)
    return math.sqrt(fan_out / fan_in)
