r"""Momentum correction: what a mean displacement says of the momentum that the replicas would share.

Each replica's momentum holds the noise of its own gradients only, and averaging the momenta costs as many bytes as the
parameters. But a displacement is a record of the momentum that made it. Over the steps since the last sync, of learning
rates :math:`\eta_t`, replica i moved by

.. math:: d_i = -\sqrt{m / n} \sum_t \eta_t O_{i,t}, \qquad O_{i,t} = \mathrm{polar}(B_{i,t}),

so the difference of the mean displacement from its own is a difference of mean steps. Times
:math:`H_i = (M_i^\top M_i)^{1/2}`, which turns the step :math:`\mathrm{polar}(M_i)` back into the momentum
:math:`M_i`, it is one of momenta:

.. math:: M_i \leftarrow M_i - \alpha\, \frac{\bar d - d_i}{\sqrt{m / n} \sum_t \eta_t}\, H_i .

The factor :math:`\sqrt{m / n}` stands for that of ``lr_scale.py``. AdamW's step is the first moment over the root of
the second, which takes the place of :math:`H_i`. Nothing is sent for it: the replicas have the mean displacement
anyway. The share :math:`\alpha` is below one where the mean is quantized, since its error would enter the momentum.
"""

from typing import Any

import torch
from torch import Tensor

from . import muon
from .adamw_lion import denominators_of
from .lr_scale import step_scale
from .matrix_layout import as_matrices, list_matrices, matrix_shape
from .parameter_groups import Group
from .rmmc import norm_ratios, tensor_norms
from .shards import local_of


def corrects(group: Group) -> bool:
    """Whether the steps of a group are those of its momentum: not with Lion's signs, or plain steps along gradients."""
    return group["algorithm"] == "adamw" or (group["algorithm"] == "dion" and group["local_update"] != "sgd")


def correct_momentum_(group: Group, state: dict[str, Any], difference: Tensor, travel: float, share: float) -> None:
    """Correct the momentum of one parameter in place. Momenta of sharded matrices: ``sharded_corrections.py``.

    Args:
        group: The parameter's group.
        state: Its ``state[p]``.
        difference: The mean displacement of the replicas less that of this replica, of the parameter's shape.
        travel: Sum of the learning rates of the steps that made it.
        share: How much of the difference to take over, :math:`\\alpha`.
    """
    if travel == 0.0:
        return
    if group["algorithm"] == "adamw":
        _correct_first_moment_(group, state, difference, share / travel)
        return
    # It is contiguous, so this is a view.
    momentum = as_matrices(state["momentum"], group)
    before = tensor_norms(list_matrices(state["momentum"], group))
    momentum.sub_(change_of_momentum(group, state, momentum, as_matrices(difference, group), travel, share))
    # RMMC compares with the norm after this, or every sync would look like a bend of the loss surface.
    ratios = norm_ratios(tensor_norms(list_matrices(state["momentum"], group)), before)
    state["norm"].mul_(ratios.view(state["norm"].shape))


def change_of_momentum(
    group: Group, state: dict[str, Any], momentum: Tensor, difference: Tensor, travel: float, share: float
) -> Tensor:
    """What leaves the momentum of a parameter, as matrices.

    Args:
        group: The parameter's group.
        state: Its ``state[p]``.
        momentum: Whole, as matrices.
        difference: As of :func:`correct_momentum_`, whole, as matrices.
        travel: As there.
        share: As there.
    """
    shape = matrix_shape(state["momentum"].shape, group)
    root = root_of_gram(momentum.to(torch.promote_types(momentum.dtype, torch.float32)), group["eps"])
    scale = step_scale(group, shape, rank=state["Q"].shape[-1] if group["local_update"] == "dion" else min(shape))
    steps = difference.to(root.dtype) * (share / (travel * scale))
    return root @ steps if shape[0] < shape[1] else steps @ root


def _correct_first_moment_(group: Group, state: dict[str, Any], difference: Tensor, share: float) -> None:
    if state["step"] == 0:
        # It has had no gradient here: its moments are zero, and the correction of their bias would divide by zero.
        return
    beta1, beta2 = group["betas"]
    (denominator,) = denominators_of([local_of(state["exp_avg_sq"])], [state["step"]], beta2, group["eps"])
    bias_correction = 1.0 - beta1 ** state["step"]
    local_of(state["exp_avg"]).addcmul_(difference.to(denominator.dtype), denominator, value=-share * bias_correction)


def root_of_gram(M: Tensor, eps: float) -> Tensor:
    r""":math:`(M^\top M)^{1/2}`, or :math:`(M M^\top)^{1/2}` of a wide matrix, as good as Newton-Schulz is: a third.

    With :math:`M = U S V^\top` and :math:`\mathrm{polar}(M) = U V^\top`, their product is :math:`V S V^\top`.

    Args:
        M: Shape (m, n), or (\*batch, m, n).
        eps: As in :func:`muon.newton_schulz`.

    Returns:
        Square, of the smaller side; one for each matrix.

    Example:
        >>> singular = torch.tensor([3.0, 2.0])
        >>> torch.allclose(root_of_gram(torch.diag(singular), eps=1e-8).diag(), singular, rtol=0.35)
        True
    """
    polar = muon.newton_schulz(M.reshape(-1, *M.shape[-2:]), eps).view(M.shape)
    return M @ polar.mT if M.shape[-2] < M.shape[-1] else polar.mT @ M
