"""Models of ``models.py`` whose matrices could be taken in more than one way, each way a model of its own.

``split_parameters`` takes gates and groups as they lie there. Here a parametrization holds the parts of such a
parameter as a batch of matrices, each with a step of its own.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples.benchmarks.image_models import ResNet
from examples.benchmarks.model_task import ModelTask
from examples.benchmarks.text_models import GPT2, LSTM, MixtureOfExperts
from examples.digits_resnet import Residual, resnet

APART = {"*.original": {"algorithm": "dion", "flatten": False}}


class Parts(nn.Module):
    """Computes a packed parameter from its parts.

    Args:
        parts: Number of parts, each some rows of the packed parameter.
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, parts: Tensor) -> Tensor:
        """Shape (parts, rows, columns, ...) to (parts x rows, columns, ...)."""
        return parts.flatten(0, 1)

    def right_inverse(self, packed: Tensor) -> Tensor:
        """The parts of a packed parameter."""
        return packed.unflatten(0, (self.parts, -1))


class Kernels(Parts):
    """Computes the kernels of a grouped convolution from a matrix a group."""

    def __init__(self, shape: Iterable[int], groups: int) -> None:
        super().__init__(groups)
        self.shape = tuple(shape)

    def forward(self, parts: Tensor) -> Tensor:
        """Shape (groups, out / groups, in / groups x kernel) to the kernels'."""
        return parts.view(self.shape)

    def right_inverse(self, packed: Tensor) -> Tensor:
        """The matrices of the groups."""
        return super().right_inverse(packed.flatten(1))


class LSTMGatesApart(LSTM):
    """Each of the four gates a matrix."""

    overrides = APART

    def build(self) -> nn.Module:
        """The LSTM with eight matrices."""
        net = super().build()
        for name in ("weight_ih_l0", "weight_hh_l0"):
            parametrize.register_parametrization(net.get_submodule("lstm"), name, Parts(4))
        return net


class GPT2Whole(GPT2):
    """Queries, keys and values one matrix."""

    overrides: ClassVar[dict[str, Any]] = {"*.c_attn.weight": {"packed": 1}}


class MixtureWhole(MixtureOfExperts):
    """Queries, keys and values of ``nn.MultiheadAttention`` one matrix."""

    overrides: ClassVar[dict[str, Any]] = {"*.in_proj_weight": {"packed": 1}}


class GroupedResNet(ResNet):
    """The ResNet with twice the channels, and four groups in the second convolution of every block."""

    groups: ClassVar[int] = 4

    def build(self) -> nn.Module:
        """Three stages of 32, 64 and 128 channels."""
        net = resnet(width=32)
        for block in net:
            if isinstance(block, Residual):
                block.second[0] = self.convolution(block.second[0].out_channels)  # type: ignore[arg-type]
        return net

    def convolution(self, channels: int) -> nn.Module:
        """What stands in place of a convolution of three by three."""
        return nn.Conv2d(channels, channels, 3, padding=1, groups=self.groups, bias=False)


class GroupedResNetApart(GroupedResNet):
    """Each group a matrix."""

    overrides = APART

    def convolution(self, channels: int) -> nn.Module:
        """A grouped convolution whose kernels are computed from a matrix a group."""
        layer = super().convolution(channels)
        parametrize.register_parametrization(layer, "weight", Kernels(layer.weight.shape, self.groups))  # type: ignore[arg-type]
        return layer


class DepthwiseResNet(GroupedResNet):
    """The ResNet with twice the channels, and a depthwise and a pointwise one for the second convolution of a block."""

    def convolution(self, channels: int) -> nn.Module:
        """A kernel a channel, and a mix of the channels."""
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        return nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1, bias=False))


class DepthwiseResNetAsMatrix(DepthwiseResNet):
    """The kernels of a layer a matrix, (channels, 9)."""

    overrides: ClassVar[dict[str, Any]] = {"*.second.0.0.weight": {"algorithm": "dion", "flatten": True}}


# By what is compared; the first of each is what split_parameters does by itself.
LAYOUTS: dict[str, dict[str, type[ModelTask]]] = {
    "gates of an LSTM": {"LSTM": LSTM, "LSTM, gates apart": LSTMGatesApart},
    "queries, keys and values of GPT-2": {"GPT-2": GPT2, "GPT-2, q k v whole": GPT2Whole},
    "queries, keys and values of the mixture": {
        "mixture of experts": MixtureOfExperts,
        "mixture, q k v whole": MixtureWhole,
    },
    "grouped convolutions": {"grouped ResNet": GroupedResNet, "grouped ResNet, apart": GroupedResNetApart},
    "depthwise convolutions": {"depthwise ResNet": DepthwiseResNet, "depthwise ResNet, Muon": DepthwiseResNetAsMatrix},
}
