"""Loading torchvision's DenseNet state dicts."""

import re
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.densenet import DenseNet

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork
from gatl.models.se_densenet import SEDenseNet, se_densenet
from gatl.models.weights import load_torchvision_densenet

BLOCKS = (6, 12, 24, 16)


def build(n_layers: int, placement: Literal["block", "none"] = "block") -> SEDenseNet:
    return se_densenet(
        n_layers,
        5,
        0.5,
        growth_rate=12,
        init_features=24,
        block_config=BLOCKS,
        se_placement=placement,
        se_init="identity",
        dropout_at="head",
    )


def torchvisions(blocks: tuple[int, ...] = BLOCKS, growth_rate: int = 12) -> dict[str, Tensor]:
    return DenseNet(growth_rate, blocks, 24, num_classes=7).state_dict()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return torchvisions()


def test_whole_network_takes_all_but_the_classifier(state: dict[str, Tensor]) -> None:
    network = build(58)
    report = load_torchvision_densenet(network, state)
    assert report.unused == ("classifier.weight", "classifier.bias")
    assert report.loaded == len(state) - 2
    se = [
        f"layers.{k}.se.{fc}.{tensor}"
        for k in (5, 17, 41, 57)
        for fc in ("fc1", "fc2")
        for tensor in ("weight", "bias")
    ]
    assert report.left_random == (*se, "classifier.weight", "classifier.bias")
    assert network.fixed_neck
    own = network.state_dict()
    assert torch.equal(own["neck.norm.weight"], state["features.norm5.weight"])
    key = "features.denseblock3.denselayer24.conv2.weight"
    assert torch.equal(own["layers.41.dense.conv2.weight"], state[key])


@pytest.mark.parametrize("n_layers", [1, 6, 7, 57])
def test_cut_network_keeps_its_new_neck(state: dict[str, Tensor], n_layers: int) -> None:
    network = build(n_layers, "none")
    report = load_torchvision_densenet(network, state)
    assert not network.fixed_neck
    neck = [f"neck.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
    assert report.left_random == (*neck, "classifier.weight", "classifier.bias")
    assert {key for key in state if "norm5" in key} < set(report.unused)
    assert report.loaded + len(report.unused) == len(state)
    assert ("features.denseblock1.denselayer2.conv1.weight" in report.unused) == (n_layers == 1)
    assert ("features.transition1.conv.weight" in report.unused) == (n_layers <= 6)


def test_a_pretrained_neck_keeps_its_statistics(state: dict[str, Tensor]) -> None:
    network = build(58)
    load_torchvision_densenet(network, state)
    network.freeze(58)
    network.fit_neck_statistics([torch.randn(2, 3, 32, 32)])
    running = network.state_dict()["neck.norm.running_mean"]
    assert torch.equal(running, state["features.norm5.running_mean"])


def test_names_of_torchvisions_old_files(state: dict[str, Tensor]) -> None:
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    new_names, old_names = build(58), build(58)
    expected = load_torchvision_densenet(new_names, state)
    report = load_torchvision_densenet(old_names, old)
    assert report.left_random == expected.left_random
    assert report.loaded == len(old) - 2
    left = old_names.state_dict()
    for name, value in new_names.state_dict().items():
        assert name in report.left_random or torch.equal(left[name], value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda _: resnet18(num_classes=2).state_dict(), "first name is 'conv1.weight'"),
        (lambda _: {}, "first name is None"),
        (lambda _: torchvisions((6, 12, 32, 16)), r"blocks of \[6, 12, 32, 16\] layers"),
        (lambda _: torchvisions(growth_rate=16), "has the shape .*, but the model needs"),
        (lambda s: {k: v for k, v in s.items() if "conv0" not in k}, "nothing for stem.conv"),
    ],
    ids=["resnet", "empty", "blocks", "growth", "incomplete"],
)
@pytest.mark.parametrize("n_layers", [3, 58])
def test_another_networks_weights(
    state: dict[str, Tensor],
    other: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    n_layers: int,
) -> None:
    network = build(n_layers)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_torchvision_densenet(network, other(state))
    assert "\n" not in str(error.value)
    assert not network.fixed_neck
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_another_backbone() -> None:
    network = LayeredNetwork(
        nn.Identity(), [nn.Identity()], nn.Flatten(), 3, 2, 0.0, fixed_neck=True
    )
    with pytest.raises(UserError, match="not the chosen model"):
        load_torchvision_densenet(network, torchvisions())
