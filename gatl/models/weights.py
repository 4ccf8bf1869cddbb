"""Pretrained weights: where they come from, and their names in gatl's terms.

Two kinds of files are understood: torchvision's DenseNets, and what
``python -m gatl.pretrain`` writes, with its card in the header.
"""

import functools
import itertools
import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import DenseNet121_Weights
from torchvision.ops import SqueezeExcitation

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork
from gatl.models.se_densenet import DoubleSigmoid, SEDenseNet

CARD_KEY = "gatl.card"
"""Where the header of a weights file holds its card, as JSON."""

# The files that torchvision downloads still say `norm.1` where its modules say `norm1`.
_DENSE = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?([12])\.(\w+)")
_TRANSITION = re.compile(r"features\.transition(\d+)\.(\w+\.\w+)")
_SINGLE = {"features.conv0": "stem.conv", "features.norm0": "stem.norm"}
_OWN = re.compile(r"(?:stem|neck|layers\.(\d+)\.(dense|se|transition))\..+")


@dataclass(frozen=True)
class Weights:
    """Pretrained weights, of any network.

    Attributes:
        tensors: By name.
        card: What their file says of them; empty if it says nothing.
    """

    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadReport:
    """What loading a state dict did.

    Attributes:
        loaded: The number of tensors that were taken from the state dict.
        left_random: The network's tensors that it did not hold: they are new.
        unused: Its tensors that the network has no place for.
        notes: What the user should know of it, a phrase each.
    """

    loaded: int
    left_random: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        se = {name.split(".se.")[0] for name in self.left_random if ".se." in name}
        new = dict.fromkeys(name.split(".")[0] for name in self.left_random if ".se." not in name)
        parts = [*new, *([f"SE of {len(se)} layer{'s' * (len(se) > 1)}"] if se else [])]
        return "; ".join(
            (
                f"{self.loaded} tensors loaded",
                f"new: {', '.join(parts) or 'nothing'}",
                f"{len(self.unused)} not used",
                *self.notes,
            )
        )


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
    layers: Counter[int] = Counter()
    for block, _ in {(int(m[1]), m[2]) for m in map(_DENSE.fullmatch, state_dict) if m}:
        layers[block] += 1
    if not layers:
        raise UserError(
            "The weights are no torchvision DenseNet's: their first name is "
            f"{next(iter(state_dict), None)!r}, not 'features.conv0.weight'."
        )
    _check_blocks(network, [layers[block] for block in sorted(layers)])
    return _fill(network, state_dict, {key: _own_name(key, network) for key in state_dict})


def load_own(
    network: LayeredNetwork,
    tensors: Mapping[str, Tensor],
    placement: str | None,
    gate: str | None,
) -> LoadReport:
    """Load what ``python -m gatl.pretrain`` wrote into a network cut anywhere.

    The classifier stays new, and so does the SE of a block that the network cuts. The
    last BN is loaded if and only if all layers are included, and then counts as
    pretrained (`fixed_neck`). SE is loaded only where it means the same.

    Args:
        network: A network made by `se_densenet`.
        tensors: By gatl's names, of the whole network without its classifier.
        placement: Where the weights have SE, as `describe_se` says; None: unknown.
        gate: Which gate their SE has, likewise.

    Returns:
        What was loaded, what stayed new, what was not used.

    Raises:
        UserError: If the weights are another network's; the network is then unchanged.
    """
    if not isinstance(network, SEDenseNet):
        raise UserError(
            "Weights by gatl.pretrain fit the model that they were trained for, se_densenet121 "
            "or its like, not the chosen model."
        )
    matches = {key: _OWN.fullmatch(key) for key in tensors}
    dense = {int(m[1]) for m in matches.values() if m and m[2] == "dense"}
    if not dense:
        raise UserError(
            "The weights are none that gatl.pretrain wrote: their first name is "
            f"{next(iter(tensors), None)!r}, not 'stem.conv.weight'."
        )
    transitions = {int(m[1]) + 1 for m in matches.values() if m and m[2] == "transition"}
    ends = [0, *sorted(transitions), max(dense) + 1]
    _check_blocks(network, [end - start for start, end in itertools.pairwise(ends)])
    own_placement, own_gate = describe_se(network)
    same_se = (placement, gate) == (own_placement, own_gate)
    whole = len(network.layers) == sum(network.block_config)
    names = {
        key: None
        if (".se." in key and not same_se) or (key.startswith("neck.") and not whole)
        else key
        for key in tensors
    }
    report = _fill(network, tensors, names)
    if same_se or own_placement == "none" == placement:
        return report
    theirs = f"se.placement={placement}, gate {gate}" if placement else "unknown"
    own = f"se.placement={own_placement}, gate {own_gate}"
    note = f"SE not loaded: the weights' is {theirs}, the model's {own}"
    return replace(report, notes=(note,))


def describe_se(network: nn.Module) -> tuple[str, str | None]:
    """Return where a network has SE and which gate: what its weights mean depends on both.

    Returns:
        The placement, ``block``, ``layer`` or ``none``, and the gate, ``2*sigmoid``
        (`model.se.init=identity`), ``sigmoid`` (`kaiming`), or None without SE.
    """
    for name, module in network.named_modules():
        if isinstance(module, SqueezeExcitation):
            doubled = isinstance(module.scale_activation, DoubleSigmoid)
            placement = "layer" if name.endswith(".dense.se") else "block"
            return placement, "2*sigmoid" if doubled else "sigmoid"
    return "none", None


def load_weights(network: LayeredNetwork, spec: str) -> LoadReport | None:
    """Load what ``model.weights`` names into a network, see `read_weights`.

    Returns:
        What was loaded; None for ``none``.

    Raises:
        UserError: If the weights cannot be had or read, or are another network's.
    """
    weights = read_weights(spec)
    return None if weights is None else load(network, weights)


def load(network: LayeredNetwork, weights: Weights) -> LoadReport:
    """Load weights of any kind that is understood into a network.

    Raises:
        UserError: If they are another network's; the network is then unchanged.
    """
    if not weights.card and not any(map(_OWN.fullmatch, weights.tensors)):
        return load_torchvision_densenet(network, weights.tensors)
    se = weights.card.get("se", {})
    return load_own(network, weights.tensors, se.get("placement"), se.get("gate"))


@functools.lru_cache(maxsize=1)  # every fit of a process starts from the same weights
def read_weights(spec: str) -> Weights | None:
    """Read pretrained weights.

    Args:
        spec: ``none``; ``imagenet``, torchvision's for DenseNet-121, downloaded on
            first use and checked by their hash; or the path of a ``.safetensors``
            file or of a state dict that torch saved. Nothing in a file is run.

    Returns:
        The weights, or None for ``none``.

    Raises:
        UserError: If the weights cannot be had or read.
    """
    if spec == "none":
        return None
    if spec == "imagenet":
        weights = DenseNet121_Weights.IMAGENET1K_V1
        try:
            downloaded = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.weights=imagenet cannot be downloaded ({error}): "
                "give model.weights=PATH, or model.weights=none for random ones."
            ) from error
        return Weights(downloaded)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"model.weights must be none, imagenet or a file, but got {spec!r}.")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"model.weights={spec} is no file of plain weights: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise UserError(f"model.weights={spec} holds no state dict of tensors.")
    return Weights(content)


def read_safetensors(path: Path) -> Weights:
    """Read a ``.safetensors`` file and its card.

    Raises:
        OSError, SafetensorError: If it is damaged.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        card = (file.metadata() or {}).get(CARD_KEY, "{}")
        try:
            card = json.loads(card)
            if not isinstance(card, dict) or not isinstance(card.get("se", {}), dict):
                raise ValueError("no object")
        except ValueError as error:
            raise SafetensorError(f"its card cannot be read: {error}") from error
        return Weights({name: file.get_tensor(name) for name in file.keys()}, card)  # noqa: SIM118


def _check_blocks(network: SEDenseNet, blocks: list[int]) -> None:
    """Tell another DenseNet's weights even where the included layers would fit."""
    if blocks != list(network.block_config):
        raise UserError(
            f"The weights are of a DenseNet with blocks of {blocks} layers, but the "
            f"model has {list(network.block_config)}."
        )


def _fill(
    network: SEDenseNet, state_dict: Mapping[str, Tensor], names: Mapping[str, str | None]
) -> LoadReport:
    """Copy tensors into a network, all or none.

    Args:
        network: Where to.
        state_dict: Tensors by their file's names.
        names: From these to the network's; None where it has no such tensor.

    Raises:
        UserError: If a shape differs, or if something is missing that is not new anyway.
    """
    own = network.state_dict()
    taken = {key: name for key, name in names.items() if name in own and name is not None}
    for key, name in taken.items():
        if state_dict[key].shape != own[name].shape:
            raise UserError(
                f"The weights do not fit the model: {key} has the shape "
                f"{tuple(state_dict[key].shape)}, but the model needs {tuple(own[name].shape)}."
            )
    tensors = {name: state_dict[key] for key, name in taken.items()}
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
