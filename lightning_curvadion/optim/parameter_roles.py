"""The role of a parameter in its module, by the type of the layer that holds it and by its use."""

import re
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

MATRIX = "matrices"
TRANSPOSED = "transposed matrices"
PACKED = "packed matrices"
TRANSPOSED_PACKED = "transposed packed matrices"
TRANSPOSED_PAIR = "transposed packed pairs"
EMBEDDING = "embeddings"
HEAD = "output head"
CONVOLUTION = "convolutions"
TRANSPOSED_CONVOLUTION = "transposed convolutions"
DEPTHWISE = "depthwise convolutions"
NORM = "norms"
BIAS = "biases"
OTHER = "other parameters"

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Roles whose parameters are matrices.
_MATRICES = (
    MATRIX,
    TRANSPOSED,
    PACKED,
    TRANSPOSED_PACKED,
    TRANSPOSED_PAIR,
    CONVOLUTION,
    TRANSPOSED_CONVOLUTION,
)
# Names by which timm, nanoGPT, flash-attention and others call a linear layer whose outputs are all queries, then all
# keys, then all values. Left out are names under which some interleave them by head (query_key_value of GPT-NeoX, BLOOM
# and Falcon, qkv_proj of tutorials) or hold something else (in_proj of Mamba and DeBERTa).
_PACKING_LAYERS = ("qkv", "to_qkv", "c_attn", "Wqkv")
# Of transformers: its c_attn is a linear layer, interleaved by head.
_INTERLEAVING_MODULES = ("transformers.models.gpt_bigcode",)


def roles_of(module: nn.Module) -> dict[str, str]:
    """Role of every parameter by its name; a tied parameter has the role of an embedding or head it serves as."""
    head = _head(module)
    roles: dict[int, str] = {}
    # A parametrization holds parameters of the layer that it is registered on.
    parametrized: dict[nn.Module, tuple[nn.Module, str]] = {}
    path_of = {owner: path for path, owner in module.named_modules()}
    for owner in path_of:
        if parametrize.is_parametrized(owner):
            parametrized.update({own: (owner, name) for name, own in owner.parametrizations.items()})  # type: ignore[operator, union-attr]
        for name, parameter in owner.named_parameters(recurse=False):
            layer, tensor_name = parametrized.get(owner, (owner, name))
            role = _role(layer, tensor_name, parameter, is_head=layer is head)
            if role in (MATRIX, TRANSPOSED) and _packs(module, layer, path_of[layer], tensor_name):
                role = _packed_role(role, parameter)
            if owner in parametrized and _is_weight_norm(owner) and name == "original0":
                role = NORM
            # Nothing can be said of what has no elements.
            role = OTHER if role in _MATRICES and parameter.numel() == 0 else role
            # A tied weight occurs once for each owner; an embedding or head outranks a plain matrix.
            if roles.get(id(parameter), MATRIX) == MATRIX:
                roles[id(parameter)] = role
    return {name: roles[id(parameter)] for name, parameter in module.named_parameters()}


def _role(layer: nn.Module, name: str, parameter: Tensor, is_head: bool) -> str:
    if isinstance(layer, _NORMS) or type(layer).__name__.endswith("Norm"):
        return NORM
    if "bias" in name:
        return BIAS
    if name.endswith("_g") and f"{name[:-1]}v" in layer._parameters:
        # The lengths of torch.nn.utils.weight_norm, whose directions are the weight.
        return NORM
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return EMBEDDING
    if isinstance(layer, nn.modules.conv._ConvNd) and parameter.dim() > 2:
        return _role_of_kernel(layer)
    if name.startswith("lora_") and parameter.dim() == 2:
        return MATRIX
    if is_head:
        return HEAD
    if _is_conv1d(layer) and parameter.dim() == 2:
        return TRANSPOSED
    if isinstance(layer, (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)) and parameter.dim() == 2:
        return MATRIX
    if parameter.dim() == 3 and ("Expert" in type(layer).__name__ or name in ("gate_up_proj", "down_proj")):
        return TRANSPOSED if _experts_are_transposed(layer) else MATRIX
    return OTHER


def _packs(module: nn.Module, layer: nn.Module, path: str, name: str) -> bool:
    """Whether a tensor of a layer is known to hold queries, keys and values one after the other."""
    if isinstance(layer, nn.MultiheadAttention):
        return name == "in_proj_weight"
    parent, _, own_name = path.removesuffix("._orig_mod").rpartition(".")
    interleaves = type(module.get_submodule(parent)).__module__.startswith(_INTERLEAVING_MODULES)
    return own_name in _PACKING_LAYERS and not interleaves


def _packed_role(role: str, parameter: Tensor) -> str:
    """The role of a parameter that packs matrices, if its shape says that they are of one size, or else ``role``."""
    if parameter.dim() != 2:
        return role
    fan_out, fan_in = parameter.shape if role == MATRIX else parameter.shape[::-1]
    if fan_out == 3 * fan_in:
        return PACKED if role == MATRIX else TRANSPOSED_PACKED
    # Keys and values of a cross attention.
    return TRANSPOSED_PAIR if role == TRANSPOSED and fan_out == 2 * fan_in else role


def _role_of_kernel(layer: nn.modules.conv._ConvNd) -> str:
    # With a single input channel and one group a kernel is a map of patches, like any other.
    if layer.groups > 1 and layer.in_channels == layer.groups:
        return DEPTHWISE
    return TRANSPOSED_CONVOLUTION if isinstance(layer, _TRANSPOSED_CONVOLUTIONS) else CONVOLUTION


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is the linear layer of transformers' GPT-2, whose weight is stored (in, out)."""
    kinds = type(layer).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)


def _experts_are_transposed(layer: nn.Module) -> bool:
    """Whether the experts of a layer are stored (experts, in, out), as ``torch.bmm`` multiplies, and not (out, in).

    transformers says so in ``is_transposed``. Else the shapes tell where a gate and its projection are fused, which
    makes their outputs twice the inputs of the next matrix.
    """
    told = getattr(layer, "is_transposed", None)
    if isinstance(told, bool):
        return told
    up, down = (layer._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is not None and down is not None:
        return up.shape[-1] == 2 * down.shape[-2]
    return True


def _is_weight_norm(parametrization: nn.Module) -> bool:
    return type(next(parametrization.children())).__name__ == "_WeightNorm"


def _head(module: nn.Module) -> nn.Module | None:
    linears = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not any(part.startswith("lora_") for part in name.split("."))
    ]
    embeddings = [weight for layer in module.modules() if isinstance(layer, nn.Embedding) for weight in _weights(layer)]
    for _, layer in linears:
        if any(weight is embedding for weight in _weights(layer) for embedding in embeddings):
            return layer
    for _, layer in reversed(linears):
        if any(weight.shape == embedding.shape for weight in _weights(layer) for embedding in embeddings):
            return layer
    if not linears:
        return None
    name, layer = linears[-1]
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        # The output projection of an nn.MultiheadAttention.
        return None
    if len(linears) == 1:
        # A classifier behind convolutions; before them it would be none.
        layers = [other for other in module.modules() if other is layer or _is_convolution(other)]
        return layer if len(layers) > 1 and layers[-1] is layer else None
    places = Counter(_place_in_block(name) for name, _ in linears)
    return layer if places[_place_in_block(name)] == 1 else None


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) or _is_conv1d(module)


def _weights(layer: nn.Module) -> Iterator[Tensor]:
    """The weight of a layer, or what a parametrization computes it from; computing it could change its buffers."""
    for name, parameter in layer.named_parameters():
        if re.fullmatch(r"(parametrizations\.)?weight(_v|_orig|\.original1?)?", name):
            yield parameter


def _place_in_block(name: str) -> str:
    """``layers.3.mlp.0`` -> ``layers.*.mlp.0``: one for all blocks of a row, distinct for layers of a Sequential."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
