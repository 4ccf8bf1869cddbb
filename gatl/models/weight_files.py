"""Where pretrained weights come from: a word that the model knows, or a file.

Nothing in a file is ever run: pickles are read with ``weights_only=True``.
"""

import functools
import hashlib
import json
import pickle
import re
import socket
import sys
import warnings
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision.models import DenseNet121_Weights

from gatl.errors import UserError
from gatl.models.weights import Weights, backbone_of
from gatl.targets import call

CARD_KEY = "gatl.card"
"""Where the header of a weights file holds its card, as JSON."""

TIMEOUT_S = 10.0
"""Seconds without an answer after which a download has failed."""

DENSENET121_URL: str = DenseNet121_Weights.IMAGENET1K_V1.url

_GATES = {"identity": "2*sigmoid", "kaiming": "sigmoid"}


def read_weights(spec: str, sources: Mapping[str, Any]) -> Weights | None:
    """Read pretrained weights.

    Args:
        spec: ``none``; one of the words of `sources`; or the path of a ``.safetensors``
            file, of a state dict that torch saved, or of a checkpoint by gatl.
        sources: `model.sources`: by word, the `_target_` of a function that returns
            `Weights`, and its arguments.

    Returns:
        The weights, or None for ``none``.

    Raises:
        UserError: If the weights cannot be had or read.
    """
    if spec == "none":
        return None
    return _read(spec, json.dumps(sources))


@functools.lru_cache(maxsize=1)  # every fit of a process starts from the same weights
def _read(spec: str, sources_json: str) -> Weights:
    sources: dict[str, dict[str, Any]] = json.loads(sources_json)
    if (source := sources.get(spec)) is not None:
        try:
            return _sound(call(source))
        except UserError:
            raise
        except Exception as error:  # networks, disks and files have many ways to fail
            others = [word for word in ("none", *sources, "PATH") if word != spec]
            choices = [f"model.weights={word}" for word in others]
            if "bundled" not in sources:
                choices.append("model=se_densenet121_k12, whose weights are here")
            raise UserError(
                f"model.weights={spec} cannot be had ({_first_line(error)}): give "
                + " or ".join(choices)
                + "."
            ) from error
    try:
        path = Path(spec).expanduser()
    except RuntimeError:  # there is no such user
        path = Path(spec)
    if not path.is_file():
        raise UserError(
            f"model.weights must be {', '.join(['none', *sources])} or a file, "
            f"but there is no file {str(path)!r}."
        )
    try:
        return _sound(
            read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        )
    except UserError as error:
        raise UserError(f"model.weights={spec}: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.weights={spec} is refused: it is damaged, or holds more than tensors, which "
            "could only be loaded by running code from it; save a state dict or .safetensors."
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"model.weights={spec} is no file of plain weights: {_first_line(error)}"
        ) from error


def _sound(weights: Weights) -> Weights:
    """Return weights if they are tensors of finite numbers.

    Raises:
        UserError: If not.
    """
    for name, tensor in weights.tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError("It holds no state dict of tensors.")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"Its tensor {name} is no plain one.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"Its tensor {name} is larger than what the file holds of it.")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"Its tensor {name} holds NaN or infinity.")
    return weights


def read_safetensors(path: Path) -> Weights:
    """Read a ``.safetensors`` file and its card.

    Raises:
        OSError, SafetensorError: If it is damaged.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        card = (file.metadata() or {}).get(CARD_KEY, "{}")
        try:
            card = json.loads(card)
            if not isinstance(card, dict):
                raise ValueError("no object")
            for name in ("backbone", "preprocessing", "se"):
                if not isinstance(card.get(name, {}), dict):
                    raise ValueError(f"its {name} is no object")
        except ValueError as error:
            raise SafetensorError(f"its card cannot be read: {error}") from error
        return Weights({name: file.get_tensor(name) for name in file.keys()}, card)  # noqa: SIM118


def _read_torch(path: Path) -> Weights:
    """Read a state dict, plain or inside a checkpoint.

    Raises:
        OSError, RuntimeError, EOFError, pickle.UnpicklingError: If it is damaged, or
            holds anything that would have to be run.
        UserError: If it holds something else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old pickle protocols: what cannot be read is an error
        content = torch.load(path, map_location="cpu", weights_only=True)
    card: dict[str, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        card = _card_of(content.get("hyper_parameters"))
        content = content["state_dict"]
        if card:  # a checkpoint by gatl
            prefix = "network."
            content = {
                str(key).removeprefix(prefix): value
                for key, value in content.items()
                if str(key).startswith(prefix)
            }
    if not isinstance(content, Mapping):
        raise UserError("It holds no state dict of tensors.")
    return Weights(content, card)


def _card_of(hyper_parameters: object) -> dict[str, Any]:
    """Return what a checkpoint by gatl says of its weights; empty for any other's."""
    preprocessing: dict[str, Any] = {}
    match hyper_parameters:
        case {"settings": {"model": {"network": {"_target_": str()} as network}}}:
            pass  # of a pretraining
        case {"network": {"_target_": str()} as network, "preprocessing": dict(preprocessing)}:
            pass
        case _:
            return {}
    placement = network.get("se_placement", "none")
    gate = None if placement == "none" else _GATES.get(network.get("se_init", ""))
    return {
        "backbone": backbone_of(network),
        "se": {"placement": placement, "gate": gate},
        "preprocessing": preprocessing,
    }


def bundled(name: str) -> Weights:
    """Read weights that ship with gatl.

    Args:
        name: Of a file in ``gatl/models/bundled``, without its extension.
    """
    with as_file(files("gatl.models") / "bundled" / f"{name}.safetensors") as path:
        return read_safetensors(path)


def torchvision_densenet121() -> Weights:
    """Return torchvision's DenseNet-121, trained on ImageNet; downloaded once.

    The file lies in torch's cache, ``TORCH_HOME``. Its name holds the beginning of its
    SHA-256, by which it is checked whenever it is read.

    Raises:
        OSError: If it can be neither found nor downloaded nor kept.
        RuntimeError: If what was downloaded is not what it should be.
    """
    name = DENSENET121_URL.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    assert match is not None
    if not path.is_file() or not _sha256(path).startswith(match[1]):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT_S)
        try:
            torch.hub.download_url_to_file(
                DENSENET121_URL, str(path), match[1], progress=sys.stderr.isatty()
            )
        finally:
            socket.setdefaulttimeout(before)
    return Weights(torch.load(path, map_location="cpu", weights_only=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
