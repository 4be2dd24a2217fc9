"""split_parameters: which parameters of a module are matrices to Dion, and which are not."""

import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .parameter_groups import ALGORITHMS, GROUP_OPTIONS, Group, check_choice

# Roles in the order of their groups, with what becomes of each and the options of its group.
_MATRIX, _EMBEDDING, _HEAD, _CONVOLUTION, _NORM, _BIAS, _OTHER = (
    "matrices",
    "embeddings",
    "output head",
    "convolutions",
    "norms",
    "biases",
    "other parameters",
)
_OPTIONS: dict[str, Group] = {
    _MATRIX: {"algorithm": "dion"},
    _EMBEDDING: {"algorithm": "adamw"},
    _HEAD: {"algorithm": "adamw"},
    _CONVOLUTION: {"algorithm": "adamw"},
    _NORM: {"algorithm": "adamw", "weight_decay": 0.0},
    _BIAS: {"algorithm": "adamw", "weight_decay": 0.0},
    _OTHER: {"algorithm": "adamw"},
}
_WHY = {
    _MATRIX: "weights of linear layers, attention projections and recurrent layers",
    _EMBEDDING: "a row is a lookup, not a linear map: AdamW",
    _HEAD: "its rows are classes: AdamW",
    _CONVOLUTION: "not two-dimensional: AdamW for now",
    _NORM: "AdamW without weight decay",
    _BIAS: "AdamW without weight decay",
    _OTHER: "use unknown: AdamW; name them in overrides if they are linear maps",
}
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)

Override = str | Mapping[str, Any]


class ParameterGroups(list[Group]):
    """Parameter groups for :class:`~lightning_curvadion.CurvaDion` that print as a table of what went where."""

    def __str__(self) -> str:
        lines = [f"{'group':<18}{'algorithm':<11}{'tensors':>8}{'numbers':>13}  why, and which"]
        for group in self:
            members = group["params"]
            numbers = sum(parameter.numel() for _, parameter in members)
            names = _abbreviated([name for name, _ in members])
            role = group["name"]
            lines.append(
                f"{role:<18}{group['algorithm']:<11}{len(members):>8}{numbers:>13,}  {_WHY.get(role, 'overridden')}"
            )
            lines.append(f"{'':<52}{names}")
        return "\n".join(lines)


def split_parameters(
    module: nn.Module,
    overrides: Mapping[str, Override] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParameterGroups:
    """Sort the parameters of a module into groups for :class:`~lightning_curvadion.CurvaDion`, by type and use.

    Weights of ``nn.Linear``, the projections of ``nn.MultiheadAttention`` (packed or not) and of recurrent layers are
    matrices and go to Dion. Embeddings, the output head, convolutions, norms, biases, and parameters that a module of
    unknown type holds itself go to AdamW; norms and biases without weight decay.

    The output head is a linear layer whose weight is tied to an embedding or has the shape of one, or else the last
    linear layer of the module, unless it is one of a row of equal blocks (then the module has no head, such as an
    encoder).

    Args:
        module: Any module; a LightningModule in ``configure_optimizers``: ``split_parameters(self)``. Frozen
            parameters are included, so that they can be unfrozen later; the optimizer leaves them alone until then.
        overrides: Patterns of parameter names (``*`` as in file names) and what to do with those parameters instead: an
            algorithm, or a dictionary of group options. The first matching pattern counts.
        options: Group options for all groups of an algorithm (``"adamw"``) or for a group by its name (``"matrices"``,
            ``"embeddings"``, ``"output head"``, ``"convolutions"``, ``"norms"``, ``"biases"``, ``"other parameters"``),
            such as another learning rate. A group's name outranks its algorithm, and an override outranks both.

    Returns:
        A list of groups with named parameters, to pass to the optimizer. ``print`` shows what was decided.

    Raises:
        ValueError: A pattern that matches no parameter, or an unknown algorithm, group or option.

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
    roles = _roles(module)
    overrides = dict(overrides or {})
    for pattern, override in overrides.items():
        if isinstance(override, str):
            check_choice(f"overrides[{pattern!r}]", override, ALGORITHMS)
        else:
            _check_options(f"overrides[{pattern!r}]", override)
        if not any(fnmatchcase(name, pattern) for name in roles):
            raise ValueError(
                f"overrides[{pattern!r}] matches no parameter; names are such as {_abbreviated(list(roles))}"
            )

    by_role = _options_by_role(options or {})
    named = dict(module.named_parameters())
    groups: dict[str, Group] = {role: {**own, "name": role, "params": []} for role, own in by_role.items()}
    for name, parameter in named.items():
        matching = next((pattern for pattern in overrides if fnmatchcase(name, pattern)), None)
        key = roles[name]
        if matching is not None:
            override = overrides[matching]
            own = {"algorithm": override} if isinstance(override, str) else dict(override)
            key = f"{matching} ({roles[name]})"
            # An option of an algorithm belongs to the one that the override chose.
            groups.setdefault(key, {**_options_by_role(options or {}, **own)[roles[name]], "name": key, "params": []})
        groups[key]["params"].append((name, parameter))
    return ParameterGroups(group for group in groups.values() if group["params"])


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


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    for option in options:
        check_choice(f"{where}: an option", option, GROUP_OPTIONS)


def _roles(module: nn.Module) -> dict[str, str]:
    """Role of every parameter by its name; a tied parameter has the role of an embedding or head it serves as."""
    head = _head(module)
    roles: dict[int, str] = {}
    for _, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            role = _role(owner, name, parameter, is_head=owner is head)
            # A tied weight occurs once for each owner; an embedding or head outranks a plain matrix.
            if roles.get(id(parameter), _MATRIX) == _MATRIX:
                roles[id(parameter)] = role
    return {name: roles[id(parameter)] for name, parameter in module.named_parameters()}


def _role(owner: nn.Module, name: str, parameter: nn.Parameter, is_head: bool) -> str:
    if isinstance(owner, _NORMS) or type(owner).__name__.endswith("Norm"):
        return _NORM
    if "bias" in name:
        return _BIAS
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return _EMBEDDING
    if isinstance(owner, nn.modules.conv._ConvNd):
        return _CONVOLUTION
    if is_head:
        return _HEAD
    if isinstance(owner, (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)) and parameter.dim() == 2:
        return _MATRIX
    return _OTHER


def _head(module: nn.Module) -> nn.Module | None:
    linears = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    embeddings = [layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)]
    for _, layer in linears:
        if any(layer.weight is embedding for embedding in embeddings):
            return layer
    for _, layer in reversed(linears):
        if any(layer.weight.shape == embedding.shape for embedding in embeddings):
            return layer
    if len(linears) < 2:
        return None
    places = Counter(_place_in_block(name) for name, _ in linears)
    name, layer = linears[-1]
    return layer if places[_place_in_block(name)] == 1 else None


def _place_in_block(name: str) -> str:
    """``layers.3.mlp.0`` -> ``layers.*.mlp.0``: one for all blocks of a row, distinct for layers of a Sequential."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def _abbreviated(names: list[str]) -> str:
    shown = [re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in names]
    distinct = list(dict.fromkeys(shown))
    return ", ".join(distinct[:6]) + (", ..." if len(distinct) > 6 else "")
