"""Where in an image a network saw what it says: Grad-CAM.

Source: Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, as the package
pytorch-grad-cam computes it.

Shapes: C channels, H by W pixels.
"""

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from gatl.models.layered import LayeredNetwork

LEAST_SIDE = 7
"""Of a feature map that says where something is: 7 is what is left of 224 pixels behind the usual
networks. Of 64 pixels SE-DenseNet leaves 2 behind all layers; where a shape had been drawn at
random, a heat map of those was brightest at the shape in 24 % of 80 images, one of the last that
were 4 wide in 80 %, of the last 8 in 88 %."""
OPACITY = 0.75
"""Of the colour where a heat map is brightest."""


def heat_map(
    network: LayeredNetwork, image: Tensor, label: int
) -> npt.NDArray[np.floating[Any]] | None:
    """Return how much each place of an image speaks for a class.

    The network's parameters stay as they are, and have no gradients afterwards.

    Args:
        network: In eval mode from then on.
        image: Shape (3, H, W), normalised.
        label: The class.

    Returns:
        Shape (H, W), in [0, 1]: 0 where it is lowest, 1 where it is highest, or 0
        everywhere if nothing speaks for the class. None if the network has no feature
        maps of at least `LEAST_SIDE` by `LEAST_SIDE` behind a layer.
    """
    network.eval()
    batch = image.unsqueeze(0).to(next(network.parameters()).device)
    layer, as_maps = _last_maps(network, batch)
    if layer is None:
        return None
    cam = GradCAM(network, [layer], as_maps)
    try:
        # Gradients have to pass the feature maps, whose layers may all be frozen.
        heat: npt.NDArray[np.floating[Any]] = cam(
            batch.requires_grad_(), [ClassifierOutputTarget(label)]
        )[0]
    finally:
        cam.activations_and_grads.release()
        network.zero_grad()
    return heat


@torch.no_grad()
def _last_maps(
    network: LayeredNetwork, batch: Tensor
) -> tuple[nn.Module | None, Callable[[Tensor], Tensor] | None]:
    """Find the last module in front of the pooling that returns feature maps, with an image.

    Returns:
        The module, None if there is none; and how to make maps of what it returns,
        None if it returns maps.
    """
    found: nn.Module | None = None

    def look(module: nn.Module, _: object, output: object) -> None:
        nonlocal found
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= LEAST_SIDE:
            found = module

    hooks = [m.register_forward_hook(look) for m in (*network.layers, *network.neck.children())]
    network(batch)
    for hook in hooks:
        hook.remove()
    # Of a ViT, the class token may be all that is pooled: what the other tokens of the last
    # block have to do with it, they have in its attention.
    norm = getattr(network.layers[-1], "norm1", None)
    n_prefix = getattr(network.neck, "n_prefix", None)
    if found is None and isinstance(norm, nn.Module) and isinstance(n_prefix, int):
        return norm, lambda tokens: _as_maps(tokens[:, n_prefix:])
    return found, None


def _as_maps(tokens: Tensor) -> Tensor:
    """Lay the tokens (B, N, C) of square images out as they lie there: (B, C, N**.5, N**.5)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def overlay(image: Image.Image, heat: npt.NDArray[np.floating[Any]]) -> Image.Image:
    """Colour an image in grey by its heat map, the more the brighter that is.

    Args:
        image: RGB, of any size.
        heat: Shape (H, W), in [0, 1].
    """
    scaled = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    share = OPACITY * np.asarray(scaled)[:, :, None]
    grey = np.asarray(image.convert("L").convert("RGB"))
    colours = 255 * mpl.colormaps["turbo"](np.asarray(scaled))[:, :, :3]
    return Image.fromarray(((1 - share) * grey + share * colours).round().astype(np.uint8))
