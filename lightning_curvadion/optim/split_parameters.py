"""split_parameters: which parameters of a module are matrices to Dion, and which are not."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from . import parameter_roles as roles
from .parameter_groups import ALGORITHMS, GROUP_OPTIONS, TRAINABLE_DTYPES, Group, check_choice, check_initialized

# Roles in the order of their groups, with the options of each.
_OPTIONS: dict[str, Group] = {
    roles.MATRIX: {"algorithm": "dion"},
    roles.PACKED: {"algorithm": "dion", "packed": 3},
    roles.TRANSPOSED: {"algorithm": "dion", "transposed": True},
    roles.TRANSPOSED_PACKED: {"algorithm": "dion", "transposed": True, "packed": 3},
    roles.TRANSPOSED_PAIR: {"algorithm": "dion", "transposed": True, "packed": 2},
    roles.EMBEDDING: {"algorithm": "adamw"},
    roles.HEAD: {"algorithm": "adamw"},
    roles.CONVOLUTION: {"algorithm": "dion", "flatten": True},
    roles.TRANSPOSED_CONVOLUTION: {"algorithm": "dion", "flatten": True, "transposed": True},
    roles.DEPTHWISE: {"algorithm": "adamw"},
    roles.NORM: {"algorithm": "adamw", "weight_decay": 0.0},
    roles.BIAS: {"algorithm": "adamw", "weight_decay": 0.0},
    roles.OTHER: {"algorithm": "adamw"},
}
# Where the matrices of a packed parameter go if the options do not take them apart.
_WHOLE = {
    roles.PACKED: roles.MATRIX,
    roles.TRANSPOSED_PACKED: roles.TRANSPOSED,
    roles.TRANSPOSED_PAIR: roles.TRANSPOSED,
}
_WHY = {
    roles.MATRIX: "weights of linear, attention and recurrent layers, and experts stored (out, in)",
    roles.PACKED: "queries, keys and values in one parameter, each a matrix",
    roles.TRANSPOSED: "stored (in, out): Conv1D of transformers, and experts",
    roles.TRANSPOSED_PACKED: "stored (in, out): queries, keys and values in one parameter, each a matrix",
    roles.TRANSPOSED_PAIR: "stored (in, out): keys and values in one parameter, each a matrix",
    roles.EMBEDDING: "a row is a lookup, not a linear map: AdamW",
    roles.HEAD: "its rows are classes: AdamW",
    roles.CONVOLUTION: "a kernel is one matrix (out, in x kernel)",
    roles.TRANSPOSED_CONVOLUTION: "a kernel is one matrix (in, out x kernel)",
    roles.DEPTHWISE: "a filter for each channel, no linear map of channels: AdamW",
    roles.NORM: "AdamW without weight decay",
    roles.BIAS: "AdamW without weight decay",
    roles.OTHER: "use unknown: AdamW; name them in overrides if they are linear maps",
}

Override = str | Mapping[str, Any]


class ParameterGroups(list[Group]):
    """Parameter groups for :class:`~lightning_curvadion.CurvaDion` that print as a table of what went where.

    Args:
        groups: With named parameters.
        left_out: Frozen parameters by name that no optimizer could train, such as integer codes.
    """

    def __init__(self, groups: Iterable[Group], left_out: Mapping[str, Tensor]) -> None:
        super().__init__(groups)
        self.left_out = dict(left_out)

    def __str__(self) -> str:
        width = max([18, *(len(group["name"]) + 2 for group in self)])
        lines = [f"{'group':<{width}}{'algorithm':<11}{'tensors':>8}{'numbers':>13}  why, and which"]

        def add(name: str, algorithm: str, members: Mapping[str, Tensor], why: str) -> None:
            numbers = sum(parameter.numel() for parameter in members.values())
            lines.append(f"{name:<{width}}{algorithm:<11}{len(members):>8}{numbers:>13,}  {why}")
            lines.append(f"{'':<{width + 34}}{_abbreviated(list(members))}")

        for group in self:
            role, algorithm = group["name"], group["algorithm"]
            usual = _OPTIONS.get(role, {})
            as_usual = all(group.get(option) == usual.get(option) for option in ("algorithm", "packed"))
            add(role, algorithm, dict(group["params"]), _WHY[role] if as_usual else "overridden")
        if self.left_out:
            add("left out", "none", self.left_out, "frozen, in a dtype that no step could train")
        return "\n".join(lines)


def split_parameters(
    module: nn.Module,
    overrides: Mapping[str, Override] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParameterGroups:
    """Sort the parameters of a module into groups for :class:`~lightning_curvadion.CurvaDion`, by type and use.

    Matrices go to Muon or Dion:

    - Weights of ``nn.Linear``, the pairs of LoRA, and the projections of ``nn.MultiheadAttention`` and of recurrent
      layers.
    - Weights of transformers' ``Conv1D``, which are stored (in, out).
    - Queries, keys and values in one parameter, each a matrix: ``in_proj_weight`` of ``nn.MultiheadAttention``, and
      linear layers and ``Conv1D`` called ``qkv``, ``to_qkv``, ``c_attn`` or ``Wqkv`` with three times as many outputs
      as inputs (two, of a cross attention's ``Conv1D``). Those of other names stay whole, since some interleave the
      three by head, as GPT-NeoX's ``query_key_value`` does, and so do those of other sizes, as in grouped-query
      attention, and the gates of recurrent layers. ``options={"dion": {"packed": 1}}`` leaves all whole.
    - Experts, each a matrix: three-dimensional parameters of a module with "Expert" in the name of its class, or named
      ``gate_up_proj`` and ``down_proj``. They are taken to be (experts, in, out), unless transformers'
      ``is_transposed``, or the shapes of these two, say (experts, out, in).
    - Kernels of convolutions, each as one matrix (out, in x kernel). The groups of a grouped convolution are rows of
      it, so that the step of a group is no longer than that of a whole matrix. A transposed convolution maps each
      pixel to a patch of outputs, by a matrix (in, out x kernel). Where patches overlap, their steps add up, and a
      lower ``lr`` may suit.

    Embeddings, the output head, depthwise convolutions, norms, biases, and parameters that a module of unknown type
    holds itself go to AdamW; norms and biases without weight decay. What a parametrization (``torch.nn.utils``)
    computes a weight from is treated like the weight, and the lengths of a weight norm like norms.

    The output head is a linear layer whose weight is tied to an embedding or has the shape of one, or else the last
    linear layer of the module, unless it is one of a row of equal blocks, or the only layer (then the module has no
    head, such as an encoder).

    Args:
        module: Any module; a LightningModule in ``configure_optimizers``: ``split_parameters(self)``. Frozen
            parameters are included, so that they can be unfrozen later; the optimizer leaves them alone until then.
            Left out are frozen ones in a dtype that no step could train, such as the codes of a quantized layer.
        overrides: Patterns of parameter names (``*`` as in file names) and what to do with those parameters instead: an
            algorithm, or a dictionary of group options. The first matching pattern counts.
        options: Group options for all groups of an algorithm (``"adamw"``) or for a group by its name (``"matrices"``,
            ``"packed matrices"``, ``"transposed matrices"``, ``"transposed packed matrices"``, ``"transposed packed
            pairs"``, ``"embeddings"``, ``"output head"``, ``"convolutions"``, ``"transposed convolutions"``,
            ``"depthwise convolutions"``, ``"norms"``, ``"biases"``, ``"other parameters"``), such as another learning
            rate. A group's name outranks its algorithm, and an override outranks both.

    Returns:
        A list of groups with named parameters, to pass to the optimizer. ``print`` shows what was decided.

    Raises:
        ValueError: A pattern that matches no parameter, an unknown algorithm, group or option, or a parameter of a lazy
            module, which has no shape yet.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 100))
        >>> groups = split_parameters(model, overrides={"1.bias": "lion"}, options={"adamw": {"lr": 1e-3}})
        >>> [(group["name"], group["algorithm"], group.get("lr")) for group in groups][:3]
        [('matrices', 'dion', None), ('embeddings', 'adamw', 0.001), ('output head', 'adamw', 0.001)]
        >>> print(split_parameters(nn.LayerNorm(4)))
        group             algorithm   tensors      numbers  why, and which
        norms             adamw             2            8  AdamW without weight decay
                                                            weight, bias
    """
    named = dict(module.named_parameters())
    check_initialized(named.items())
    role_of = roles.roles_of(module)
    overrides = dict(overrides or {})
    for pattern, override in overrides.items():
        if isinstance(override, str):
            check_choice(f"overrides[{pattern!r}]", override, ALGORITHMS)
        else:
            _check_options(f"overrides[{pattern!r}]", override)
        if not any(fnmatchcase(name, pattern) for name in role_of):
            raise ValueError(
                f"overrides[{pattern!r}] matches no parameter; names are such as {_abbreviated(list(role_of))}"
            )

    by_role = _options_by_role(options or {})
    groups: dict[str, Group] = {role: {**own, "name": role, "params": []} for role, own in by_role.items()}
    left_out = {name: p for name, p in named.items() if not p.requires_grad and p.dtype not in TRAINABLE_DTYPES}
    for name, parameter in named.items():
        if name in left_out:
            continue
        matching = next((pattern for pattern in overrides if fnmatchcase(name, pattern)), None)
        key = _group_of(role_of[name], by_role)
        if matching is not None:
            override = overrides[matching]
            own = {"algorithm": override} if isinstance(override, str) else dict(override)
            key = f"{matching} ({role_of[name]})"
            # An option of an algorithm belongs to the one that the override chose.
            groups.setdefault(key, {**_options_by_role(options or {}, **own)[role_of[name]], "name": key, "params": []})
        groups[key]["params"].append((name, parameter))
    return ParameterGroups((group for group in groups.values() if group["params"]), left_out)


def _options_by_role(options: Mapping[str, Mapping[str, Any]], **override: Any) -> dict[str, Group]:
    """Options of every role's group, those of its algorithm and its name included, and what overrides them."""
    for name, chosen in options.items():
        check_choice("options: an algorithm or a group's name", name, (*ALGORITHMS, *_OPTIONS))
        _check_options(f"options[{name!r}]", chosen)
    by_role = {}
    for role, own in _OPTIONS.items():
        algorithm = {**own, **options.get(role, {}), **override}["algorithm"]
        by_role[role] = {**own, **options.get(algorithm, {}), **options.get(role, {}), **override}
    return by_role


def _group_of(role: str, by_role: Mapping[str, Group]) -> str:
    """The group of a role; packed matrices with the options of whole ones are among these."""
    whole = _WHOLE.get(role, role)
    return whole if {"packed": 1, **by_role[whole]} == {"packed": 1, **by_role[role]} else role


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    for option in options:
        check_choice(f"{where}: an option", option, GROUP_OPTIONS)


def _abbreviated(names: list[str]) -> str:
    shown = [re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in names]
    distinct = list(dict.fromkeys(shown))
    return ", ".join(distinct[:6]) + (", ..." if len(distinct) > 6 else "")
