"""Pretrained weights: where they come from, and torchvision's names in gatl's terms."""

import functools
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision.models import DenseNet121_Weights

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork
from gatl.models.se_densenet import SEDenseNet

# The files that torchvision downloads still say `norm.1` where its modules say `norm1`.
_DENSE = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?([12])\.(\w+)")
_TRANSITION = re.compile(r"features\.transition(\d+)\.(\w+\.\w+)")
_SINGLE = {"features.conv0": "stem.conv", "features.norm0": "stem.norm"}


@dataclass(frozen=True)
class LoadReport:
    """What loading a state dict did.

    Attributes:
        loaded: The number of tensors that were taken from the state dict.
        left_random: The network's tensors that it did not hold: they are new.
        unused: Its tensors that the network has no place for.
    """

    loaded: int
    left_random: tuple[str, ...]
    unused: tuple[str, ...]


def load_torchvision_densenet(
    network: LayeredNetwork, state_dict: Mapping[str, Tensor]
) -> LoadReport:
    """Load a state dict of torchvision's DenseNet into a network cut anywhere.

    SE and classifier stay new. The last BN (`norm5`) is loaded if and only if
    all layers are included, and then counts as pretrained (`fixed_neck`).

    Args:
        network: A network made by `se_densenet`.
        state_dict: Tensors by torchvision's names, today's or those of its
            old files (`norm.1` for `norm1`).

    Returns:
        What was loaded, what stayed new, what was not used.

    Raises:
        UserError: If the state dict is another network's; the network is then
            unchanged.
    """
    if not isinstance(network, SEDenseNet):
        raise UserError(
            "torchvision's DenseNet weights fit model=se_densenet121 and its like, "
            "not the chosen model."
        )
    _check_blocks(network, state_dict)
    own = network.state_dict()
    names = {key: _own_name(key, network) for key in state_dict}
    tensors = {name: state_dict[key] for key, name in names.items() if name in own}
    for key, name in names.items():
        if name in own and state_dict[key].shape != own[name].shape:
            raise UserError(
                f"The weights do not fit the model: {key} has the shape "
                f"{tuple(state_dict[key].shape)}, but the model needs {tuple(own[name].shape)}."
            )
    # BN's counter is no weight; torchvision's old files lack it
    left = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    whole = len(network.layers) == sum(network.block_config)
    for name in left:
        new = name.startswith("classifier.") or ".se." in name
        if not new and (whole or not name.startswith("neck.")):
            raise UserError(f"The weights do not fit the model: they hold nothing for {name}.")
    network.load_state_dict(tensors, strict=False)
    network.fixed_neck = whole
    unused = tuple(key for key, name in names.items() if name not in own)
    return LoadReport(len(tensors), tuple(left), unused)


def load_weights(network: LayeredNetwork, spec: str) -> LoadReport | None:
    """Load what ``model.weights`` names into a network, see `read_weights`."""
    weights = read_weights(spec)
    return None if weights is None else load_torchvision_densenet(network, weights)


@functools.lru_cache(maxsize=1)  # every fit of a process starts from the same weights
def read_weights(spec: str) -> Mapping[str, Tensor] | None:
    """Read pretrained weights.

    Args:
        spec: ``none``; ``imagenet``, torchvision's for DenseNet-121, downloaded on
            first use and checked by their hash; or the path of a ``.safetensors``
            file or of a state dict that torch saved. Nothing in a file is run.

    Returns:
        Tensors by name, or None for ``none``.

    Raises:
        UserError: If the weights cannot be had or read.
    """
    if spec == "none":
        return None
    if spec == "imagenet":
        weights = DenseNet121_Weights.IMAGENET1K_V1
        try:
            downloaded: Mapping[str, Tensor] = weights.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.weights=imagenet cannot be downloaded ({error}): "
                "give model.weights=PATH, or model.weights=none for random ones."
            ) from error
        return downloaded
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"model.weights must be none, imagenet or a file, but got {spec!r}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"model.weights={spec} is no file of plain weights: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise UserError(f"model.weights={spec} holds no state dict of tensors.")
    return content


def _check_blocks(network: SEDenseNet, state_dict: Mapping[str, Tensor]) -> None:
    """Tell another DenseNet's weights even where the included layers would fit."""
    matches = filter(None, map(_DENSE.fullmatch, state_dict))
    layers = {(int(match[1]), int(match[2])) for match in matches}
    if not layers:
        raise UserError(
            "The weights are no torchvision DenseNet's: their first name is "
            f"{next(iter(state_dict), None)!r}, not 'features.conv0.weight'."
        )
    sizes = Counter(block for block, _ in layers)
    blocks = [sizes[block] for block in sorted(sizes)]
    if blocks != list(network.block_config):
        raise UserError(
            f"The weights are of a DenseNet with blocks of {blocks} layers, but the "
            f"model has {list(network.block_config)}."
        )


def _own_name(key: str, network: SEDenseNet) -> str | None:
    """Translate torchvision's name of a tensor; None if the whole network has no such tensor."""
    if match := _DENSE.fullmatch(key):
        index = sum(network.block_config[: int(match[1]) - 1]) + int(match[2]) - 1
        return f"layers.{index}.dense.{match[3]}{match[4]}.{match[5]}"
    if match := _TRANSITION.fullmatch(key):
        return f"layers.{sum(network.block_config[: int(match[1])]) - 1}.transition.{match[2]}"
    module, _, tensor = key.rpartition(".")
    if module == "features.norm5" and len(network.layers) == sum(network.block_config):
        return f"neck.norm.{tensor}"
    return f"{_SINGLE[module]}.{tensor}" if module in _SINGLE else None
