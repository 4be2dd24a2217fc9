"""The local step: every parameter steps with this replica's own gradient and momentum. Nothing is sent."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import adamw_lion, dion
from .matrix_stacks import MatrixStack
from .optimizer_state import StackedOptimizer
from .sharded_stacks import ShardedStack
from .shards import Shards, local_of
from .shared_work import SharedWork, runs


def local_step(
    optimizer: StackedOptimizer, stacks: Sequence[MatrixStack], at_sync: bool = False, keep_roots: bool = False
) -> bool:
    """Step every parameter of one replica.

    Args:
        optimizer: Holds the groups and their state.
        stacks: Its matrices.
        at_sync: Whether this is a sync step, which takes Dion's step also where ``local_update="sgd"``.
        keep_roots: Whether a correction of the momenta follows; see ``MatrixStack.roots``.

    Returns:
        Whether a right factor Q has changed, which then differs between replicas.
    """
    changed_Q = False
    sharded: list[ShardedStack] = []
    together: list[MatrixStack] = []
    for stack in stacks:
        stack.accumulate()
        if stack.group["local_update"] == "sgd" and not at_sync:
            sgd_step(stack)
            continue
        changed_Q |= not stack.steps_whole
        if isinstance(stack, ShardedStack):
            sharded.append(stack)
        elif stack.steps_whole and optimizer.shared_work is not None:
            together.append(stack)
        else:
            full_step(stack, keep_roots)
    if optimizer.shared_work is not None:
        _step_together(together, optimizer.shared_work, keep_roots)
    if sharded:
        _step_sharded(sharded, optimizer.shards, keep_roots)
    step_vector_groups(optimizer)
    return changed_Q


def full_step(stack: MatrixStack, keep_roots: bool = False) -> None:
    """Muon's update or Dion's, as the group says, from this replica's B."""
    if stack.steps_whole:
        stack.descend_whole(stack.nesterov(), keep_roots)
    else:
        dion_step(stack)


def _step_together(stacks: Sequence[MatrixStack], shared_work: SharedWork, keep_roots: bool) -> None:
    """Muon's step of matrices that several processes hold: each orthonormalises some of them."""
    for run in runs(stacks, [stack.momentum.numel() for stack in stacks], shared_work.elements):
        updates = shared_work.newton_schulz([stack.nesterov() for stack in run], [stack.group["eps"] for stack in run])
        for stack, update in zip(run, updates, strict=True):
            stack.descend_along(update, keep_roots)


def _step_sharded(stacks: Sequence[ShardedStack], shards: Shards | None, keep_roots: bool) -> None:
    """The same of sharded matrices, all at once: the processes that hold them share the work."""
    assert shards is not None, "checked before the step"
    computations, steps = zip(*(stack.whole_step() for stack in stacks), strict=True)
    shards.compute(computations)
    for stack, own in zip(stacks, steps, strict=True):
        stack.take(own, keep_roots)


def dion_step(stack: MatrixStack) -> None:
    """Dion's update from this replica's B: ``P = orth(B Q)``, ``R = B^T P``, and a step along ``P R^T``."""
    P = dion.orthonormalize(dion.left_factor(stack.B, stack.Q))
    R = dion.right_factor(stack.B, P)
    stack.descend(P, R)


def sgd_step(stack: MatrixStack) -> None:
    """The paper's cheap local step: ``X -= local_lr G``. The momentum, with the gradient in it, decays by mu."""
    pairs = [(local_of(p), local_of(p.grad)) for p in stack.parameters if p.grad is not None]
    if pairs:
        parameters, gradients = zip(*pairs, strict=True)
        torch._foreach_add_(parameters, gradients, alpha=-stack.group["local_lr"])
    stack.decay()


def step_vector_groups(optimizer: StackedOptimizer, mean_gradients: Mapping[Tensor, Tensor] | None = None) -> None:
    """Step the AdamW and Lion groups.

    Args:
        optimizer: Holds the groups and their state.
        mean_gradients: Gradients to step with; by default the parameters' own. Parameters without one are left alone.
    """
    for group, parameters in optimizer.vector_groups():
        gradient_of = mean_gradients or {p: p.grad for p in parameters if p.grad is not None}
        members = [p for p in parameters if p in gradient_of]
        if not members:
            continue
        states = [optimizer.state[p] for p in members]
        for state in states:
            state["step"] += 1
        gradients = [local_of(gradient_of[p]) for p in members]
        first_moments = [local_of(state["exp_avg"]) for state in states]
        own = [local_of(p) for p in members]
        common = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        if group["algorithm"] == "lion":
            adamw_lion.lion_(own, gradients, first_moments, **common)
        else:
            second_moments = [local_of(state["exp_avg_sq"]) for state in states]
            steps = [state["step"] for state in states]
            adamw_lion.adamw_(own, gradients, first_moments, second_moments, steps, **common, eps=group["eps"])
