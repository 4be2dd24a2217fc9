r"""Momentum correction: what a mean displacement says of the momentum that the replicas would share.

Each replica's momentum holds the noise of its own gradients only, and averaging the momenta costs as many bytes as the
parameters. But a displacement is a record of the momentum that made it. Over the steps since the last sync, of learning
rates :math:`\eta_t`, replica i moved by

.. math:: d_i = -\sqrt{m / n} \sum_t \eta_t O_{i,t}, \qquad O_{i,t} = \mathrm{polar}(B_{i,t}),

so the difference of the mean displacement from its own is a difference of mean steps. Times
:math:`H_i = (M_i^\top M_i)^{1/2}`, which turns the step :math:`\mathrm{polar}(M_i)` back into the momentum
:math:`M_i`, it is one of momenta:

.. math:: M_i \leftarrow M_i - \alpha\, \frac{\bar d - d_i}{\sqrt{m / n} \sum_t \eta_t}\, H_i .

Muon's step has just orthonormalised Nesterov's momentum. That stands for :math:`\mathrm{polar}(M_i)` here, and
:math:`H_i = \mathrm{polar}(M_i)^\top M_i` is one product. The factor :math:`\sqrt{m / n}` stands for that of
``lr_scale.py``. AdamW's step is the first moment over the root of the second, which takes the place of :math:`H_i`.
Nothing is sent for it: the replicas have the mean displacement anyway. The share :math:`\alpha` is below one where the
mean is quantized, since its error would enter the momentum.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import muon
from .adamw_lion import denominators_of
from .lr_scale import step_scale
from .matrix_layout import as_matrices, list_matrices, matrix_shape
from .matrix_stacks import State, batches
from .parameter_groups import Group
from .rmmc import norm_ratios, tensor_norms
from .shards import local_of


def corrects(group: Group) -> bool:
    """Whether the steps of a group are those of its momentum: not with Lion's signs, or plain steps along gradients."""
    return group["algorithm"] == "adamw" or (group["algorithm"] == "dion" and group["local_update"] != "sgd")


class Correction(NamedTuple):
    """What corrects the momentum of a parameter.

    Attributes:
        difference: The mean displacement of the replicas less that of this replica, of the parameter's shape.
        travel: Sum of the learning rates of the steps that made it.
        share: How much of the difference to take over, :math:`\\alpha`.
    """

    difference: Tensor
    travel: float
    share: float


def correct_momenta_(
    group: Group,
    states: Mapping[Tensor, State],
    corrections: Mapping[Tensor, Correction],
    roots: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """Correct the momenta of a group in place, those of one shape together.

    Args:
        group: Of the parameters. Those of AdamW may be sharded; matrices that are: ``sharded_corrections.py``.
        states: Their state, by parameter.
        corrections: By parameter; of some of them.
        roots: By parameter, :math:`H` of each of its matrices, shape (matrices, s, s) with s the smaller side. Of those
            that are missing it is computed from the momentum.
    """
    # A first moment that has had no gradient is zero, and the correction of its bias would divide by zero.
    moved = [p for p, correction in corrections.items() if correction.travel and states[p].get("step") != 0]
    if not moved:
        return
    if group["algorithm"] == "adamw":
        _correct_first_moments_(group, [states[p] for p in moved], [corrections[p] for p in moved])
        return
    for batch in batches(group, moved, states):
        known = torch.stack([roots[p] for p in batch]) if roots and all(p in roots for p in batch) else None
        _correct_matrices_(group, [states[p] for p in batch], [corrections[p] for p in batch], known)


def _correct_matrices_(
    group: Group, states: Sequence[State], corrections: Sequence[Correction], root: Tensor | None
) -> None:
    momenta = [state["momentum"] for state in states]
    matrices = [matrix for momentum in momenta for matrix in list_matrices(momentum, group)]
    before = tensor_norms(matrices)
    subtract_changes_(group, momenta, differences_of_steps(group, states[0], corrections), root)
    # RMMC compares with the norm after this, or every sync would look like a bend of the loss surface.
    ratios = norm_ratios(tensor_norms(matrices), before).view(len(states), -1)
    for state, ratio in zip(states, ratios, strict=True):
        state["norm"].mul_(ratio.view(state["norm"].shape))


def differences_of_steps(group: Group, state: State, corrections: Sequence[Correction]) -> list[Tensor]:
    """The differences between the mean step O and this replica's, times their shares.

    Args:
        group: Of the parameters.
        state: Of one of them, which have one shape.
        corrections: Theirs.
    """
    shape = matrix_shape(state["momentum"].shape, group)
    scale = step_scale(group, shape, state["Q"].shape[-1] if group["local_update"] == "dion" else min(shape))
    return [own.difference * (own.share / (own.travel * scale)) for own in corrections]


def subtract_changes_(
    group: Group, momenta: Sequence[Tensor], differences: Sequence[Tensor], root: Tensor | None = None
) -> None:
    """Subtract differences of steps, turned into those of momenta.

    Args:
        group: Of the parameters.
        momenta: Of one shape, contiguous.
        differences: Of their shape.
        root: Of all matrices of the momenta, shape (parameters, matrices, s, s); ``None`` to compute it.
    """
    # Momenta are contiguous, so these are views.
    matrices = [as_matrices(momentum, group) for momentum in momenta]
    if root is None:
        stacked = torch.stack(matrices)
        root = root_of_gram(stacked.to(torch.promote_types(stacked.dtype, torch.float32)), group["eps"])
    else:
        root = root.view(len(matrices), *matrices[0].shape[:-2], *root.shape[-2:])
    steps = torch.stack([as_matrices(own, group).to(root.dtype) for own in differences])
    wide = matrices[0].shape[-2] < matrices[0].shape[-1]
    torch._foreach_sub_(matrices, (root @ steps if wide else steps @ root).unbind())


def _correct_first_moments_(group: Group, states: Sequence[State], corrections: Sequence[Correction]) -> None:
    beta1, beta2 = group["betas"]
    steps = [state["step"] for state in states]
    changes = denominators_of([local_of(state["exp_avg_sq"]) for state in states], steps, beta2, group["eps"])
    torch._foreach_mul_(changes, [own.difference.to(of.dtype) for own, of in zip(corrections, changes, strict=True)])
    shares = [own.share / own.travel * (1.0 - beta1**step) for own, step in zip(corrections, steps, strict=True)]
    torch._foreach_mul_(changes, shares)
    torch._foreach_sub_([local_of(state["exp_avg"]) for state in states], changes)


def root_of_gram(M: Tensor, eps: float) -> Tensor:
    r""":math:`(M^\top M)^{1/2}`, or :math:`(M M^\top)^{1/2}` of a wide matrix, as good as Newton-Schulz is: a third.

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
    return muon.root_of_polar(muon.newton_schulz(M.reshape(-1, *M.shape[-2:]), eps).view(M.shape), M)
