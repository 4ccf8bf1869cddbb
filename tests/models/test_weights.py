"""Loading weights by torchvision's DenseNets, by gatl.pretrain and by gatl's checkpoints."""

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
from gatl.models.se_densenet import se_densenet
from gatl.models.timm_network import timm_network
from gatl.models.weights import Weights, describe_se, differences, load, require_backbone

BLOCKS = (6, 12, 24, 16)


def build(
    n_layers: int,
    placement: Literal["block", "layer", "none"] = "block",
    init: Literal["identity", "kaiming"] = "identity",
) -> LayeredNetwork:
    return se_densenet(
        n_layers,
        5,
        0.5,
        growth_rate=12,
        init_features=24,
        block_config=BLOCKS,
        se_placement=placement,
        se_init=init,
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
    report = load(network, Weights(state))
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
    report = load(network, Weights(state))
    assert not network.fixed_neck
    neck = [f"neck.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
    assert report.left_random == (*neck, "classifier.weight", "classifier.bias")
    assert {key for key in state if "norm5" in key} < set(report.unused)
    assert report.loaded + len(report.unused) == len(state)
    assert ("features.denseblock1.denselayer2.conv1.weight" in report.unused) == (n_layers == 1)
    assert ("features.transition1.conv.weight" in report.unused) == (n_layers <= 6)


def test_a_pretrained_neck_keeps_its_statistics(state: dict[str, Tensor]) -> None:
    network = build(58)
    load(network, Weights(state))
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
    expected = load(new_names, Weights(state))
    report = load(old_names, Weights(old))
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
        (lambda _: torchvisions((6, 12, 32, 16)), "no place for .*denseblock3.denselayer25"),
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
        load(network, Weights(other(state)))
    assert "\n" not in str(error.value)
    assert not network.fixed_neck
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def own(network: LayeredNetwork) -> Weights:
    """What gatl.pretrain writes of a network, in 16 bits."""
    placement, gate = describe_se(network)
    tensors = {
        name: value.half()
        for name, value in network.state_dict().items()
        if value.is_floating_point() and not name.startswith("classifier.")
    }
    return Weights(tensors, {"se": {"placement": placement, "gate": gate}})


@pytest.fixture(scope="module")
def pretrained() -> LayeredNetwork:
    """A whole network in which no tensor is as it was initialised."""
    torch.manual_seed(1)
    network = build(58)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape))
    return network


def test_own_weights_of_the_whole_network(pretrained: LayeredNetwork) -> None:
    network, weights = build(58), own(pretrained)
    report = load(network, weights)
    assert report.left_random == ("classifier.weight", "classifier.bias")
    assert report.unused == report.notes == ()
    assert report.loaded == len(weights.tensors)
    assert network.fixed_neck
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name], v.float()) for name, v in weights.tensors.items())
    assert str(report) == f"{report.loaded} tensors loaded; new: classifier; 0 not used"


@pytest.mark.parametrize(
    ("n_layers", "cut_se"), [(1, [0]), (6, []), (7, [6]), (18, []), (57, [56])]
)
def test_own_weights_of_a_cut_network(
    pretrained: LayeredNetwork, n_layers: int, cut_se: list[int]
) -> None:
    torch.manual_seed(2)
    network, weights = build(n_layers), own(pretrained)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = load(network, weights)
    assert not network.fixed_neck
    assert {int(name.split(".")[1]) for name in report.left_random if ".se." in name} == set(cut_se)
    rest = [name for name in report.left_random if ".se." not in name]
    neck = [f"neck.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
    assert rest == [*neck, "classifier.weight", "classifier.bias"]
    for name, value in network.state_dict().items():
        if name in report.left_random:
            assert torch.equal(value, before[name])
        elif name in weights.tensors:
            assert torch.equal(value, weights.tensors[name].float())
    assert report.loaded + len(report.unused) == len(weights.tensors)
    assert ("SE of 1 layer" in str(report)) == bool(cut_se)


@pytest.mark.parametrize(
    ("placement", "init", "theirs"),
    [
        ("layer", "identity", "se.placement=block, gate 2*sigmoid"),
        ("block", "kaiming", "se.placement=block, gate 2*sigmoid"),
        ("none", "identity", "se.placement=block, gate 2*sigmoid"),
        ("block", "identity", None),
    ],
)
def test_se_is_loaded_only_where_it_means_the_same(
    pretrained: LayeredNetwork,
    placement: Literal["block", "layer", "none"],
    init: Literal["identity", "kaiming"],
    theirs: str | None,
) -> None:
    network, weights = build(58, placement, init), own(pretrained)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = load(network, weights)
    se = {name for name in before if ".se." in name}
    if theirs is None:
        assert report.notes == ()
        assert not se & set(report.left_random)
        return
    assert len(report.notes) == 1
    assert theirs in report.notes[0]
    assert f"model's se.placement={placement}" in report.notes[0]
    assert se <= set(report.left_random)
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in se)
    assert {name for name in weights.tensors if ".se." in name} <= set(report.unused)
    assert "\n" not in str(report)


def test_se_of_an_unknown_kind_is_left_out(pretrained: LayeredNetwork) -> None:
    report = load(build(58), Weights(own(pretrained).tensors))
    assert "the weights' is unknown" in report.notes[0]
    assert load(build(58, "none"), own(build(58, "none"))).notes == ()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda t: t | {"layers.58.dense.conv1.weight": t["stem.conv.weight"]}, "no place for la"),
        (lambda t: {n: v for n, v in t.items() if n != "stem.conv.weight"}, "nothing for stem"),
        (lambda t: t | {"stem.conv.weight": torch.zeros(2, 3, 7, 7)}, r"has the shape \(2, 3"),
        (lambda t: {"conv1.weight": t["stem.conv.weight"]}, "first name is 'conv1.weight'"),
    ],
    ids=["deeper", "incomplete", "width", "resnet"],
)
def test_another_networks_own_weights(
    pretrained: LayeredNetwork,
    other: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    network, weights = build(3), own(pretrained)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load(network, Weights(other(dict(weights.tensors)), weights.card))
    assert not network.fixed_neck
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_another_backbone(pretrained: LayeredNetwork) -> None:
    network = LayeredNetwork(
        nn.Identity(), [nn.Identity()], nn.Flatten(), 3, 2, 0.0, fixed_neck=True
    )
    for weights in (own(pretrained), Weights(torchvisions())):
        with pytest.raises(UserError, match="fit nothing in the model"):
            load(network, weights)


def test_a_cut_networks_weights_fit_one_as_deep_or_less(pretrained: LayeredNetwork) -> None:
    """As a checkpoint of gatl's final model holds them, its classifier and SE included."""
    cut = build(8)
    load(cut, own(pretrained))
    weights = Weights(cut.state_dict(), own(cut).card)
    again, less = build(8), build(7)
    report = load(again, weights)
    assert report.left_random == ("classifier.weight", "classifier.bias")
    assert again.fixed_neck
    assert torch.equal(again.layers[7].se.fc1.weight, cut.layers[7].se.fc1.weight)
    report = load(less, weights)
    assert {name.split(".")[0] for name in report.left_random} == {"layers", "neck", "classifier"}
    assert not less.fixed_neck
    with pytest.raises(UserError, match=r"end with layer 8.*reaches up to layer 9.*high=8"):
        load(build(9), weights)


def test_a_report_says_the_same_as_a_line_and_as_data(pretrained: LayeredNetwork) -> None:
    report = load(build(7), own(pretrained))
    new = ["neck", "classifier", "SE of 1 layer"]
    assert report.to_json() == {
        "loaded": report.loaded,
        "new": new,
        "unused": len(report.unused),
        "notes": [],
    }
    assert f"new: {', '.join(new)};" in str(report)


def test_differences_of_preprocessing_are_told() -> None:
    seen = {"image_size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    used = {**seen, "image_size": 32, "interpolation": "bicubic"}
    assert differences({"preprocessing": seen}, used) == [
        "pretrained with image_size 64, used with 32"
    ]
    assert differences({"preprocessing": seen}, seen) == differences({}, used) == []


def test_a_card_that_names_another_backbone_is_an_error() -> None:
    network = {"_target_": "a.b", "growth_rate": 12, "se_placement": "block", "se_init": "kaiming"}
    card = {"backbone": {"_target_": "a.b", "growth_rate": 12}}
    require_backbone(card, network)
    require_backbone({}, network)
    with pytest.raises(UserError, match="its growth_rate is 12, the model's is 16"):
        require_backbone(card, network | {"growth_rate": 16})
    tagged = {"backbone": {"_target_": "t", "name": "resnet50"}}
    require_backbone(tagged, {"_target_": "t", "name": "resnet50.a1_in1k"})
    with pytest.raises(UserError, match="its name is resnet50, the model's is seresnet50"):
        require_backbone(tagged, {"_target_": "t", "name": "seresnet50"})


def test_se_of_a_librarys_network_is_not_dropped() -> None:
    """timm calls SE as gatl does; only gatl's own may be left out."""
    with_se, without = (timm_network(8, 2, 0.0, name=name) for name in ("seresnet18", "resnet18"))
    with pytest.raises(UserError, match=r"no place for layers\.0\.se\.fc1"):
        load(without, Weights(with_se.state_dict()))
    mobile = timm_network(3, 2, 0.0, name="mobilenetv3_small_050")
    assert load(mobile, Weights(mobile.state_dict())).notes == ()
