"""Pretrained weights in a layered network: what fits, what stays new, what is not used.

Weights come under the names of the library that the backbone is from (torchvision's or
timm's, see `LayeredNetwork.names`), or under gatl's own, as ``python -m gatl.pretrain``
and gatl's checkpoints have them. `gatl.models.weight_files` reads them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork
from gatl.models.se_densenet import DoubleSigmoid

_HEADS = ("classifier", "fc", "head")
"""How libraries call the classifier, which every data set needs anew."""

# The files that torchvision downloads still say `norm.1` where its modules say `norm1`.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_LAYER = re.compile(r"layers\.(\d+)\.")
_SE = re.compile(r"layers\.\d+\.(dense\.)?se\.fc[12]\.(weight|bias)")


@dataclass(frozen=True)
class Weights:
    """Pretrained weights, of any network.

    Attributes:
        tensors: By name.
        card: What their file says of them: among others `backbone`, see `backbone_of`;
            `se`, with `placement` and `gate` as `describe_se` says them; and
            `preprocessing`. Empty if it says nothing.
    """

    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadReport:
    """What loading weights did.

    Attributes:
        loaded: The number of tensors that were taken.
        left_random: The network's tensors that the weights did not hold: they are new.
        unused: Tensors that the network has no place for.
        notes: What the user should know of it, a phrase each.
    """

    loaded: int
    left_random: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        return "; ".join(
            (
                f"{self.loaded} tensors loaded",
                f"new: {', '.join(self._new) or 'nothing'}",
                f"{len(self.unused)} not used",
                *self.notes,
            )
        )

    @property
    def _new(self) -> list[str]:
        """The parts of the network that are new, in few words."""
        se = {name.split(".se.")[0] for name in self.left_random if ".se." in name}
        parts = dict.fromkeys(name.split(".")[0] for name in self.left_random if ".se." not in name)
        return [*parts, *([f"SE of {len(se)} layer{'s' * (len(se) > 1)}"] if se else [])]

    def to_json(self) -> dict[str, Any]:
        """Return what ``result.json`` keeps of it."""
        return {
            "loaded": self.loaded,
            "new": self._new,
            "unused": len(self.unused),
            "notes": list(self.notes),
        }


def load(network: LayeredNetwork, weights: Weights) -> LoadReport:
    """Load weights into a network that may be cut anywhere, all or none.

    The classifier stays new. The neck is taken if and only if the weights end with the
    network's last layer, and then counts as pretrained (`fixed_neck`). SE-DenseNet's SE
    stays new where a block is cut that was not cut there, where the weights have none,
    and everywhere if theirs means something else.

    Args:
        network: Where to; nothing in it is changed if an error is raised.
        weights: Of the same backbone, as deep as the network at least.

    Raises:
        UserError: If the weights are another network's, or end before this one.
    """
    own = network.state_dict()
    names, unknown = _translate(network, weights)
    if not any(names.values()):
        expected = next(iter(network.names or own))
        raise UserError(
            "The weights fit nothing in the model: their first name is "
            f"{next(iter(weights.tensors), None)!r}, not {expected!r}."
        )
    if unknown:
        raise UserError(
            f"The weights are another network's: the model has no place for {unknown[0]}."
        )
    depth = 1 + max((int(m[1]) for name in names.values() if (m := _LAYER.match(name))), default=-1)
    if depth < len(network.layers):
        raise UserError(
            f"The weights end with layer {depth}, but the search reaches up to layer "
            f"{len(network.layers)}: give space.included_layers.high={depth}."
        )
    whole = depth == len(network.layers)
    note = _se_mismatch(network, weights)
    taken = {
        key: name
        for key, name in names.items()
        if name in own
        and (whole or not name.startswith("neck."))
        and not (note and _is_se(name, network))
    }
    _check_shapes({name: weights.tensors[key] for key, name in taken.items()}, own)
    found = set(taken.values())
    # BN's counter is no weight; torchvision's old files lack it
    left = [n for n in own if n not in found and not n.endswith("num_batches_tracked")]
    for name in left:
        new = name.startswith("classifier.") or _is_se(name, network)
        if not new and (whole or not name.startswith("neck.")):
            raise UserError(f"The weights do not fit the model: they hold nothing for {name}.")
    network.load_state_dict(
        {name: weights.tensors[key] for key, name in taken.items()}, strict=False
    )
    network.fixed_neck = whole
    unused = tuple(key for key in weights.tensors if key not in taken)
    return LoadReport(len(taken), tuple(left), unused, (note,) if note else ())


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


def backbone_of(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides which tensors a backbone has and what they mean, but for SE.

    Args:
        network: `model.network`: the `_target_` that builds it, and its arguments.
    """
    chosen = ("se_placement", "se_init", "dropout_at")
    backbone = {key: value for key, value in network.items() if key not in chosen}
    if isinstance(name := backbone.get("name"), str):
        backbone["name"] = name.partition(".")[0]  # a tag of timm's says which weights
    return backbone


def require_backbone(card: Mapping[str, Any], network: Mapping[str, Any]) -> None:
    """Refuse weights whose card names another backbone; without a name, their tensors decide.

    Raises:
        UserError: If so.
    """
    theirs, ours = card.get("backbone", {}), backbone_of(network)
    for key in theirs:
        if theirs[key] != ours.get(key):
            raise UserError(
                f"The weights are another network's: its {key} is {theirs[key]}, "
                f"the model's is {ours.get(key)}."
            )


def differences(card: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> list[str]:
    """Say where the images of a run are not prepared as those that the weights saw.

    Args:
        card: See `Weights`; one without `preprocessing` says nothing.
        preprocessing: The run's `image_size`, `mean`, `std` and `interpolation`.
    """
    seen = card.get("preprocessing", {})
    return [
        f"pretrained with {name} {seen[name]}, used with {value}"
        for name, value in preprocessing.items()
        if name in seen and seen[name] != value
    ]


def _translate(network: LayeredNetwork, weights: Weights) -> tuple[dict[str, str], list[str]]:
    """Translate the names of weights to the network's.

    Returns:
        From each name that the whole backbone has to gatl's, and those it does not have;
        the classifier is neither.
    """
    whole = {*network.names.values(), *network.state_dict()}
    whole = {name for name in whole if not name.startswith("classifier.")}
    modern = {key: _OLD_DENSENET.sub(r"\1\2", key) for key in weights.tensors}
    library = {key: network.names[new] for key, new in modern.items() if new in network.names}
    own = {key: key for key in weights.tensors if key in whole}
    if len(library) > len(own):
        rest = [key for key in weights.tensors if key not in library]
        return library, [key for key in rest if key.split(".")[0] not in _HEADS]
    rest = [key for key in weights.tensors if key not in own and not key.startswith("classifier.")]
    if weights.card.get("se") or describe_se(network)[0] != "none":
        # Cut or without SE, the network has no place for all SE of the weights.
        rest = [key for key in rest if not _SE.fullmatch(key)]
    return own, rest


def _is_se(name: str, network: LayeredNetwork) -> bool:
    """Whether a tensor is SE that gatl put into the backbone: no library has it."""
    return ".se." in name and name not in network.names.values()


def _se_mismatch(network: LayeredNetwork, weights: Weights) -> str | None:
    """Say why the weights' SE would mean something else in the network; None if it would not."""
    own = describe_se(network)
    se = weights.card.get("se", {})
    theirs = se.get("placement"), se.get("gate")
    listed = {*network.names, *network.names.values()}
    held = any(_SE.fullmatch(key) and key not in listed for key in weights.tensors)
    if theirs == own or not held:
        return None
    kind = _say_se(theirs) if theirs[0] else "unknown"
    return f"SE not loaded: the weights' is {kind}, the model's {_say_se(own)}"


def _say_se(se: Sequence[str | None]) -> str:
    return f"se.placement={se[0]}, gate {se[1]}"


def _check_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"The weights do not fit the model: {name} has the shape {tuple(tensor.shape)}, "
                f"but the model needs {tuple(own[name].shape)}."
            )
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(
                f"The weights do not fit the model: {name} is {tensor.dtype}, "
                f"but the model needs {own[name].dtype}."
            )
