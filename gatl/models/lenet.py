"""LeNet-5 (LeCun et al. 1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf).

Small enough that any machine trains it in seconds. Where it departs from section II.B:
images have three channels; C3 sees all maps of S2, not those of table I; the classifier
is linear, not of radial basis functions; subsampling starts as the plain mean.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork

N_LAYERS = 5


class ScaledTanh(nn.Module):
    """The paper's squashing function (appendix A), A tanh(S a): about 1 at 1 and -1 at -1."""

    def forward(self, a: Tensor) -> Tensor:
        """Apply it elementwise."""
        return 1.7159 * torch.tanh(2 / 3 * a)


def lenet5(included_layers: int, n_classes: int, dropout: float) -> LayeredNetwork:
    """Build the first layers of LeNet-5 with a new head; nothing behind them exists.

    The layers are C1, S2, C3, S4 and C5. Behind C5 stand a global average, which changes
    nothing at 32 pixels, where its maps are 1x1, and F6; behind an earlier layer stands
    the average alone. Parameters are drawn from torch's global generator, which the
    caller seeds.

    Args:
        included_layers: L, in [1, 5].
        n_classes: Outputs of the classifier.
        dropout: Probability of dropping a pooled feature, in [0, 1).

    Returns:
        The network, nothing frozen, for images of 32 pixels or more.

    Raises:
        UserError: If there is no layer L.
    """
    if not 1 <= included_layers <= N_LAYERS:
        raise UserError(
            f"included_layers must be in [1, {N_LAYERS}] for model=lenet5, "
            f"but got {included_layers}."
        )
    layers = [
        _convolution(3, 6),
        _subsampling(6),
        _convolution(6, 16),
        _subsampling(16),
        _convolution(16, 120),
    ]
    width = (6, 6, 16, 16, 120)[included_layers - 1]
    whole = included_layers == N_LAYERS
    neck = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    if whole:
        neck.add_module("f6", nn.Linear(width, 84))
        neck.add_module("squash", ScaledTanh())
    names = [f"layers.{name}" for name in nn.ModuleList(layers).state_dict()]
    names += ["neck.f6.weight", "neck.f6.bias"]
    network = LayeredNetwork(
        nn.Identity(),
        layers[:included_layers],
        neck,
        84 if whole else width,
        n_classes,
        dropout,
        fixed_neck=False,
        names={name: name for name in names},  # no library has it
    )
    _initialise(network)
    return network


def _convolution(n_in: int, n_out: int) -> nn.Sequential:
    """C1, C3 or C5: (B, n_in, H, W) to (B, n_out, H - 4, W - 4)."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(n_in, n_out, 5), squash=ScaledTanh()))


def _subsampling(n_maps: int) -> nn.Sequential:
    """S2 or S4: half the height and width; each map has a coefficient and a bias."""
    scale = nn.Conv2d(n_maps, n_maps, 1, groups=n_maps)
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2), scale=scale, squash=ScaledTanh()))


def _initialise(network: nn.Module) -> None:
    """Draw weights from [-2.4, 2.4] over the number of inputs (appendix A); biases are zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 2.4 / module.weight[0].numel()
            nn.init.uniform_(module.weight, -bound, bound)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            nn.init.ones_(module.weight)
