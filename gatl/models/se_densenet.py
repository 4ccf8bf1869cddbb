"""SE-DenseNet: DenseNet-BC with Squeeze-and-Excitation, cut at any dense layer.

Sources: DenseNet, Huang et al. 2017, https://arxiv.org/abs/1608.06993;
Squeeze-and-Excitation, Hu et al. 2018, https://arxiv.org/abs/1709.01507; Kaiming
initialisation, He et al. 2015, https://arxiv.org/abs/1502.01852.

Without SE, or with SE at identity, it computes what torchvision's DenseNet does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution without bias: (B, C, H, W) to (B, n_out, H, W).

    While it trains on a CPU it is computed as the matrix product that it is: forward and
    backward of a DenseNet take 4 to 8 % less time so, for channels_last, and are as exact.

    Args:
        n_in: C.
        n_out: The output's channels.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        if not (self.training and x.is_cpu):
            return super().forward(x)
        return F.linear(x.movedim(1, 3), self.weight.flatten(1)).movedim(3, 1)


class DenseLayer(nn.Sequential):
    """A dense layer (section 3 of the paper), H_l: BN, ReLU, 1x1 conv, BN, ReLU, 3x3 conv.

    Maps (B, C, H, W) to (B, C + k, H, W): its input with k new feature maps behind.

    Args:
        n_features: C, the input's channels.
        growth_rate: k, the new feature maps; the bottleneck is 4k wide.
    """

    def __init__(self, n_features: int, growth_rate: int) -> None:
        width = 4 * growth_rate
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(n_features),
                relu1=nn.ReLU(inplace=True),
                conv1=PointwiseConv2d(n_features, width),
                norm2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, growth_rate, 3, padding=1, bias=False),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Put the new feature maps behind the input's."""
        new = x
        for module in self:
            new = module(new)
        return torch.cat((x, new), dim=1)


class DoubleSigmoid(nn.Module):
    """The gate 2 sigma(z), in (0, 2): exactly 1 at z = 0, where it is steepest."""

    def forward(self, z: Tensor) -> Tensor:
        """Apply the gate elementwise."""
        return 2 * torch.sigmoid(z)


def se_densenet(
    included_layers: int,
    n_classes: int,
    dropout: float,
    *,
    growth_rate: int,
    init_features: int,
    block_config: Sequence[int],
    se_placement: Literal["block", "layer", "none"],
    se_init: Literal["identity", "kaiming"],
    dropout_at: Literal["head", "layers"],
) -> LayeredNetwork:
    """Build the first layers of an SE-DenseNet with a new head; nothing behind them exists.

    Layer k of the network is dense layer k, with the SE that follows it and,
    if it ends its block and is not the last included one, the transition.
    Parameters are drawn from torch's global generator, which the caller seeds.

    Args:
        included_layers: L, in [1, sum(block_config)].
        n_classes: Outputs of the classifier.
        dropout: Probability of dropping, in [0, 1).
        growth_rate: k, the feature maps that each dense layer adds.
        init_features: Feature maps behind the stem's convolution.
        block_config: Dense layers of each block of the whole network.
        se_placement: `block`: behind the last included layer of each block, in
            front of the transition; `layer`: on each layer's new feature maps.
        se_init: `identity`: gate 2 sigma(z) with a zero last layer, so that SE
            changes nothing at first and trains all the same; `kaiming`: gate
            sigma(z), the original.
        dropout_at: `head`: in front of the classifier; `layers`: on the new
            features of each dense layer that is not frozen.

    Returns:
        The network, nothing frozen. In front of its neck, layer L's features
        are what the whole network has there.

    Raises:
        UserError: If there is no layer L.
    """
    if growth_rate < 1 or init_features < 1 or min(block_config, default=0) < 1:
        raise UserError(
            "`growth_rate`, `init_features` and each of `block_config` must be at least 1, but got "
            f"({growth_rate=}, {init_features=}, block_config={list(block_config)})."
        )
    if not 1 <= included_layers <= sum(block_config):
        raise UserError(
            f"included_layers must be in [1, {sum(block_config)}] for blocks of "
            f"{list(block_config)} layers, but got {included_layers}."
        )
    ends = set(accumulate(block_config))
    stem = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, init_features, 7, stride=2, padding=3, bias=False),
            norm=nn.BatchNorm2d(init_features),
            relu=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )
    layers: list[nn.Module] = []
    width = init_features
    for k in range(1, included_layers + 1):
        dense = DenseLayer(width, growth_rate)
        layer = nn.Sequential(OrderedDict(dense=dense))
        width += growth_rate
        if se_placement == "layer":
            dense.add_module("se", _squeeze_excitation(growth_rate, se_init))
        if dropout_at == "layers":
            dense.add_module("dropout", nn.Dropout(dropout))
        if se_placement == "block" and (k in ends or k == included_layers):
            layer.add_module("se", _squeeze_excitation(width, se_init))
        if k in ends and k < included_layers:
            layer.add_module("transition", _transition(width))
            width //= 2
        layers.append(layer)
    neck = nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),  # (B, C, 1, 1) -> (B, C)
        )
    )
    network = LayeredNetwork(
        stem,
        layers,
        neck,
        width,
        n_classes,
        dropout if dropout_at == "head" else 0.0,
        fixed_neck=False,
        names=_torchvision_names(block_config),
    )
    _initialise(network, se_init)
    return network


def _torchvision_names(block_config: Sequence[int]) -> dict[str, str]:
    """Return how torchvision names the tensors of the whole DenseNet's backbone, and we."""
    modules = {"conv0": "stem.conv", "norm0": "stem.norm", "norm5": "neck.norm"}
    k = 0
    for block, n_layers in enumerate(block_config, start=1):
        for layer in range(1, n_layers + 1):
            for module in ("norm1", "conv1", "norm2", "conv2"):
                theirs = f"denseblock{block}.denselayer{layer}.{module}"
                modules[theirs] = f"layers.{k}.dense.{module}"
            k += 1
        if block < len(block_config):
            for module in ("norm", "conv"):
                modules[f"transition{block}.{module}"] = f"layers.{k - 1}.transition.{module}"
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {
        f"features.{theirs}.{tensor}": f"{ours}.{tensor}"
        for theirs, ours in modules.items()
        for tensor in (norm if "norm" in ours.rpartition(".")[2] else ("weight",))
    }


def _squeeze_excitation(n_features: int, init: str) -> SqueezeExcitation:
    gate = DoubleSigmoid if init == "identity" else nn.Sigmoid
    # the paper's reduction ratio of 16; 12 feature maps would leave nothing, hence at least 8
    return SqueezeExcitation(n_features, max(n_features // 16, 8), scale_activation=gate)


def _transition(n_features: int) -> nn.Sequential:
    """Between two blocks: half the channels, half the height and width."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(n_features),
            relu=nn.ReLU(inplace=True),
            conv=PointwiseConv2d(n_features, n_features // 2),
            pool=nn.AvgPool2d(2),
        )
    )


def _initialise(network: nn.Module, se_init: str) -> None:
    """Draw convolutions by He et al. and zero all biases, as torchvision's DenseNet does."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, SqueezeExcitation) and se_init == "identity":
            nn.init.zeros_(module.fc2.weight)
