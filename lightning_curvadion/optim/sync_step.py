r"""The sync step: what the optimizer does where the trigger fired, for each ``momentum`` of the hook.

``"factors"`` and ``"dion"`` are the Dion factor collectives (arXiv:2504.05295). With :math:`B_i` the momentum of
replica i, gradient included,

.. math:: P = \mathrm{orth}(\mathrm{mean}_i B_i Q_i), \quad R = \mathrm{mean}_i B_i^\top P,

and all replicas step along :math:`P R^\top`. Muon's step has no factors: matrices that take it send all of
:math:`B_i` with ``"factors"``, and all of Nesterov's momentum with ``"dion"``. With ``"average"`` the momenta
themselves become their mean. With ``"displacement"`` and ``"local"`` each replica takes its own step. The hook sends
all of it, and synchronises the parameters too; with ``"displacement"`` it then corrects each momentum by what the mean
displacement says of the others' (``momentum_correction.py``).

Where a momentum takes over a part of the others', the noise of the replicas cancels in it and its norm falls. The next
RMMC compares with the norm after that, or every sync would look like a bend of the loss surface.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dion
from .local_step import full_step, local_step, step_vector_groups
from .matrix_stacks import MatrixStack
from .optimizer_state import StackedOptimizer
from .rmmc import norm_ratios, norms_before_feedback, tensor_norms
from .sync_hook import SyncHook


def sync_step(
    optimizer: StackedOptimizer,
    stacks: Sequence[MatrixStack],
    hook: SyncHook,
    replicas_share_Q: bool,
    own_step: bool = True,
    keep_roots: bool = False,
) -> bool:
    """Step every parameter together with the other replicas.

    Args:
        optimizer: Holds the groups and their state.
        stacks: Its matrices.
        hook: Communicates.
        replicas_share_Q: Whether all replicas hold the same right factors now.
        own_step: Whether this replica takes a step of its own, and not only part in the mean.
        keep_roots: As for a local step.

    Returns:
        Whether they do afterwards.
    """
    if hook._momentum in ("displacement", "local"):
        if own_step:
            local_step(optimizer, stacks, at_sync=True, keep_roots=keep_roots)
        hook._mean_left(optimizer, [], [])
        hook._mean_right(optimizer, [], [])
        return False
    if hook._momentum == "average":
        _average_momenta(optimizer, stacks, hook)
        return True
    if hook._sync_rank_fraction is not None:
        local_step(optimizer, stacks, at_sync=True)
        _share_leading_columns(optimizer, stacks, hook, hook._sync_rank_fraction)
        return False
    _step_along_mean_factors(optimizer, stacks, hook, replicas_share_Q)
    return True


def _average_momenta(optimizer: StackedOptimizer, stacks: Sequence[MatrixStack], hook: SyncHook) -> None:
    """The momenta become their mean, and every replica computes the same factors from it."""
    for stack in stacks:
        stack.accumulate()
    hook._mean_left(optimizer, [], [tensor for stack in stacks for tensor in (stack.momentum, stack.Q)])
    for stack in stacks:
        stack.norm.copy_(tensor_norms(stack.momenta))
        full_step(stack)
    step_vector_groups(optimizer)
    hook._mean_right(optimizer, [], [])


def _share_leading_columns(
    optimizer: StackedOptimizer, stacks: Sequence[MatrixStack], hook: SyncHook, rank_fraction: float
) -> None:
    """After a step of its own, each replica's momentum takes over the mean's part in the span of a few columns.

    The first columns of Q are the dominant ones: every step orthonormalises them from left to right.
    """
    leading = [stack.Q[..., : dion.rank_of(stack.shape, rank_fraction)] for stack in stacks]
    left = [dion.left_factor(stack.B, Q) for stack, Q in zip(stacks, leading, strict=True)]
    shared_P = [dion.orthonormalize(mean) for mean in hook._mean_left(optimizer, left, [])]
    own_R = [dion.right_factor(stack.B, P) for stack, P in zip(stacks, shared_P, strict=True)]
    for stack, P, sent, R in zip(stacks, shared_P, own_R, hook._mean_right(optimizer, own_R, []), strict=True):
        own_norms = tensor_norms(stack.momenta)
        dion.feed_back_error_(stack.B, P, sent - R, share=1.0)
        if stack.steps_whole:
            # Nothing else turns Q towards the momentum.
            Q = stack.Q[..., : R.shape[-1]]
            Q.copy_(dion.unit_columns(R, Q, stack.group["eps"])[1])
        # The step is taken, so B is gone. Its norm and that of what is left of it change by about the same factor.
        stack.norm.mul_(norm_ratios(tensor_norms(stack.momenta), own_norms))


def _step_along_mean_factors(
    optimizer: StackedOptimizer, stacks: Sequence[MatrixStack], hook: SyncHook, replicas_share_Q: bool
) -> None:
    """The Dion factor collectives: P and R are means over the replicas, one mean each for the whole model."""
    for stack in stacks:
        stack.accumulate()
    shares_momentum = hook._momentum == "factors"
    whole_B = _whole_momenta(stacks, shares_momentum)
    stacks = [stack for stack in stacks if not stack.steps_whole]
    dense_B = _dense_momenta(stacks, shares_momentum, replicas_share_Q)
    factored = [stack for stack in stacks if stack not in dense_B]
    left_factors = [*whole_B.values(), *(dion.left_factor(stack.B, stack.Q) for stack in factored)]
    left = iter(hook._mean_left(optimizer, left_factors, list(dense_B.values())))
    # What is no step along common factors comes before the parameters are averaged, so that they end the step equal.
    for stack, sent in whole_B.items():
        _step_along_whole_momentum(stack, sent, next(left), shares_momentum)
    P, own_R = {}, {}
    for stack in stacks:
        B = stack.oriented(dense_B[stack]) if stack in dense_B else stack.B
        P[stack] = dion.orthonormalize(dion.left_factor(B, stack.Q) if stack in dense_B else next(left))
        own_R[stack] = dion.right_factor(B, P[stack])

    gradients: dict[Tensor, Tensor] = {}
    if hook._averages_vector_gradients:
        gradients = _vector_gradients(optimizer)
    else:
        step_vector_groups(optimizer)
    right = iter(hook._mean_right(optimizer, [own_R[stack] for stack in factored], list(gradients.values())))
    for stack in stacks:
        R = own_R[stack] if stack in dense_B else next(right)
        stack.descend(P[stack], R, own_R[stack] if shares_momentum and stack not in dense_B else None)
        if shares_momentum:
            stack.norm.copy_(norms_before_feedback(stack.momenta, R, stack.group["mu"]))
    if gradients:
        step_vector_groups(optimizer, gradients)


def _whole_momenta(stacks: Sequence[MatrixStack], shares_momentum: bool) -> dict[MatrixStack, Tensor]:
    """Stacks that step along their whole momentum, and so have no factors, with a copy of what they send.

    It is B where the replicas share their momentum. Where each keeps its own, it is what Muon's step starts from.
    """
    return {
        stack: stack.momentum.clone() if shares_momentum else stack.nesterov() for stack in stacks if stack.steps_whole
    }


def _step_along_whole_momentum(stack: MatrixStack, sent: Tensor, mean: Tensor, shares_momentum: bool) -> None:
    if shares_momentum:
        # What quantization left out stays.
        stack.momentum.add_(mean - sent)
        stack.norm.copy_(tensor_norms(stack.momenta))
    stack.descend_whole(stack.nesterov() if shares_momentum else mean)


def _dense_momenta(
    stacks: Sequence[MatrixStack], shares_momentum: bool, replicas_share_Q: bool
) -> dict[MatrixStack, Tensor]:
    """Stacks whose whole B is sent, since its two factors would be larger, with the tensor that becomes the mean.

    Both factors then follow from the mean, on every replica alike if all start from one Q.
    """
    dense = [stack for stack in stacks if stack.averaging_is_cheaper and replicas_share_Q]
    # Where replicas keep their own momentum, the mean is formed beside it.
    return {stack: stack.momentum if shares_momentum else stack.momentum.clone() for stack in dense}


def _vector_gradients(optimizer: StackedOptimizer) -> dict[Tensor, Tensor]:
    """A copy of the gradients of the AdamW and Lion groups; a missing one is zero, so that all ranks send the same."""
    parameters = [parameter for _, members in optimizer.vector_groups() for parameter in members]
    return {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters}
