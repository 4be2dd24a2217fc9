"""Parameters and state of an optimizer of stacked matrices, whatever its steps do."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .matrix_layout import batch_shape, matrix_shape
from .matrix_stacks import MatrixStack, batches, new_matrix_state
from .parameter_groups import OPTIONS_SINCE_0_1_0, Group, check_group, check_saved_groups
from .rmmc import norm_ratios
from .sharded_stacks import ShardedStack
from .shards import Shards, is_sharded, matrix_norms, sharded_like
from .shared_work import SharedWork

STEP_COUNTS = "step counts"
MOMENTUM_NORMS = "momentum norms"
# What is sharded where its parameter is.
_SHARDED = {"momentum", "Q", "exp_avg", "exp_avg_sq", "residual"}


class StackedOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` that stacks its matrices of one shape; subclasses implement the step.

    Args:
        params: Parameters or groups.
        defaults: Options of groups that do not set them.

    Attributes:
        shards: The processes that hold the parameters together, where these are sharded. The sync hook sets it.
        shared_work: The processes that hold the same parameters, and take a part of each step. The sync hook sets it.
    """

    shards: Shards | None = None
    shared_work: SharedWork | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._stacks: list[MatrixStack] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in ``torch.optim``; its options are checked like the constructor's.

        Raises:
            ValueError: On a bad option, or on a parameter that the group's algorithm cannot take.
        """
        if self.param_groups and "param_names" in self.param_groups[0]:
            # torch refuses a group without names beside groups with names; finetuning callbacks add such groups.
            members = param_group["params"]
            members = [members] if isinstance(members, Tensor) else list(members)
            number = len(self.param_groups)
            param_group["params"] = [
                member if isinstance(member, tuple) else (_default_name(position, number), member)
                for position, member in enumerate(members)
            ]
        if "rank_fraction" in param_group:
            # Whoever chooses a rank means Dion's step, which has one.
            param_group.setdefault("local_update", "dion")
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self._names(len(self.param_groups) - 1))
        except ValueError:
            self.param_groups.pop()
            raise

    def _names(self, group_index: int) -> list[str]:
        group = self.param_groups[group_index]
        if "param_names" in group:
            return list(group["param_names"])
        return [_default_name(position, group_index) for position in range(len(group["params"]))]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters in order, with the name from the module where the groups carry one."""
        for index, group in enumerate(self.param_groups):
            yield from zip(self._names(index), group["params"], strict=True)

    def init_state(self) -> None:
        """Create the state of all parameters that have none; the first :meth:`step` calls it.

        ``state[p]["momentum"]``, ``state[p]["Q"]`` and ``state[p]["norm"]`` for matrices. Q is random but the same in
        every process, and the global random generators are left alone.
        """
        for seed, (group, parameter) in enumerate(self.members()):
            if group["algorithm"] == "dion":
                if "momentum" not in self.state[parameter]:
                    self.state[parameter].update(new_matrix_state(parameter, group, seed))
            elif "step" not in self.state[parameter]:
                moments = ("exp_avg", "exp_avg_sq") if group["algorithm"] == "adamw" else ("exp_avg",)
                self.state[parameter].update(step=0, **{name: torch.zeros_like(parameter) for name in moments})

    def members(self) -> Iterator[tuple[Group, Tensor]]:
        """All parameters in order, each with its group."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    def matrix_stacks(self) -> list[MatrixStack]:
        """The trainable matrices in stacks of one shape; rebuilt where state was replaced or a matrix (un)frozen."""
        self.init_state()
        trainable = {
            index: [parameter for parameter in group["params"] if parameter.requires_grad]
            for index, group in enumerate(self.param_groups)
            if group["algorithm"] == "dion"
        }
        stacked = [parameter for stack in self._stacks for parameter in stack.parameters]
        if len(stacked) == sum(map(len, trainable.values())) and all(
            all(parameter.requires_grad for parameter in stack.parameters)
            and stack.mirrors([self.state[parameter] for parameter in stack.parameters])
            for stack in self._stacks
        ):
            return self._stacks
        self._stacks = [
            (ShardedStack if is_sharded(members[0]) else MatrixStack)(
                self.param_groups[index], members, [self.state[parameter] for parameter in members]
            )
            for index, parameters in trainable.items()
            for members in batches(self.param_groups[index], parameters, self.state)
        ]
        return self._stacks

    def take_roots(self) -> dict[Tensor, Tensor]:
        """What the last step has kept for a correction of the momenta, by parameter. Its memory is the caller's now."""
        return {parameter: root for stack in self._stacks for parameter, root in stack.take_roots().items()}

    def vector_groups(self) -> list[tuple[Group, list[Tensor]]]:
        """Groups of other algorithms than Dion, with their trainable parameters."""
        return [
            (group, [parameter for parameter in group["params"] if parameter.requires_grad])
            for group in self.param_groups
            if group["algorithm"] != "dion"
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``. A whole state of sharded parameters is cut as they are.

        Raises:
            ValueError: The state was saved with other parameter groups, or its right factors are of other matrices than
                its groups say.
        """
        state_dict = {**state_dict, "state": _by_number(state_dict["state"])}
        check_saved_groups(state_dict["param_groups"], self.param_groups)
        _check_saved_factors(state_dict, [name for name, _ in self.named_parameters()])
        super().load_state_dict(state_dict)
        saved_order = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, (_, parameter) in zip(saved_order, self.members(), strict=True):
            saved = state_dict["state"].get(index, {})
            for name in saved.keys() & {"norm", "residual", "outer_momentum"}:
                # torch casts every state to the parameter's dtype; these have one of their own.
                self.state[parameter][name] = saved[name].detach().clone().to(parameter.device)
            own = self.state[parameter]
            own.update({name: sharded_like(own[name], parameter) for name in _SHARDED & own.keys()})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in OPTIONS_SINCE_0_1_0.items():
                group.setdefault(option, value)
        self._stacks = []


def _by_number(state: Mapping[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The state by the parameters' numbers: a distributed checkpoint puts what is no tensor under their digits.

    Example:
        >>> _by_number({0: {"exp_avg": "tensor", "step": 0}, "0": {"step": 5}})
        {0: {'exp_avg': 'tensor', 'step': 5}}
    """
    by_number: dict[Any, dict[str, Any]] = {}
    for key, own in state.items():
        number = int(key) if isinstance(key, str) and key.isdigit() else key
        by_number[number] = {**by_number.get(number, {}), **own}
    return by_number


def _check_saved_factors(state_dict: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that the right factors of a state fit its groups, as they do unless one of the two was edited.

    Raises:
        ValueError: They do not, naming the parameter.
    """
    members = ((group, index) for group in state_dict["param_groups"] for index in group["params"])
    for name, (group, index) in zip(names, members, strict=True):
        saved = state_dict["state"].get(index, {})
        if "Q" in saved:
            layout = {**OPTIONS_SINCE_0_1_0, **group}
            shape = saved["momentum"].shape
            expected = (*batch_shape(shape, layout), min(matrix_shape(shape, layout)))
            if tuple(saved["Q"].shape[:-1]) != expected:
                options = ", ".join(f"{option}={layout[option]}" for option in ("flatten", "transposed", "packed"))
                raise ValueError(
                    f"the state of {name} is of other matrices: with {options} the first dimensions of its Q are"
                    f" {expected}, not {tuple(saved['Q'].shape[:-1])}. Load the groups with the options that they were"
                    " saved with, or load the weights without the state of the optimizer"
                )


def _default_name(position: int, group_index: int) -> str:
    return f"parameter {position} of group {group_index}"


def trainable_parameters(optimizer: StackedOptimizer) -> dict[str, Tensor]:
    """Parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in optimizer.named_parameters() if parameter.requires_grad}


def state_tensors(optimizer: StackedOptimizer) -> dict[str, Tensor]:
    """The state that replicas can have in common, by name.

    Error-feedback residuals are left out: they are each replica's own. All step counts are in one int64 tensor,
    ``"step counts"``, a copy that :func:`set_step_counts` writes back.
    """
    tensors: dict[str, Tensor] = {}
    step_counts: list[int] = []
    device = torch.device("cpu")
    for parameter_name, parameter in optimizer.named_parameters():
        device = parameter.device
        state = optimizer.state[parameter]
        for name in sorted(state):
            if isinstance(state[name], Tensor) and name != "residual":
                tensors[f"{name} of {parameter_name}"] = state[name]
        step_counts += [state["step"]] if "step" in state else []
    if step_counts:
        tensors[STEP_COUNTS] = torch.tensor(step_counts, dtype=torch.int64, device=device)
    return tensors


def averageable_state(optimizer: StackedOptimizer) -> dict[str, Tensor]:
    """:func:`state_tensors`, and what :func:`set_averaged_state` needs once they are means over the replicas.

    The norm of a mean momentum is not the mean of the norms: noise that differs between replicas cancels. So the norms
    of the momenta, ``"momentum norms"``, are averaged too, and tell how far the mean's norm has fallen.
    """
    state = state_tensors(optimizer)
    if norms := _momentum_norms(optimizer):
        state[MOMENTUM_NORMS] = torch.cat([own for _, own in norms])
    return state


def set_averaged_state(optimizer: StackedOptimizer, state: Mapping[str, Tensor]) -> None:
    """Take over the copies of an :func:`averageable_state`, and let each norm fall as far as its momentum's has."""
    set_step_counts(optimizer, state)
    if norms := _momentum_norms(optimizer):
        before = state[MOMENTUM_NORMS].split([own.numel() for _, own in norms])
        for (norm, own), mean in zip(norms, before, strict=True):
            norm.mul_(norm_ratios(own, mean).view(norm.shape))


def _momentum_norms(optimizer: StackedOptimizer) -> list[tuple[Tensor, Tensor]]:
    """``state[p]["norm"]`` of each parameter of matrices, and the norms of its momenta, float32, shape (k,)."""
    return [
        (own["norm"], matrix_norms(own["momentum"], group, optimizer.shards))
        for group, parameter in optimizer.members()
        if "norm" in (own := optimizer.state[parameter])
    ]


def set_step_counts(optimizer: StackedOptimizer, state: Mapping[str, Tensor]) -> None:
    """Take over the step counts of :func:`state_tensors`."""
    if STEP_COUNTS in state:
        counted = [own for _, p in optimizer.named_parameters() if "step" in (own := optimizer.state[p])]
        for own, step in zip(counted, state[STEP_COUNTS].tolist(), strict=True):
            own["step"] = step
