"""SE-DenseNet against an independent reference: torchvision's DenseNet."""

import copy
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models import densenet121
from torchvision.models.densenet import DenseNet
from torchvision.ops import SqueezeExcitation

from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork
from gatl.models.se_densenet import PointwiseConv2d, se_densenet
from gatl.models.weights import Weights, load

BLOCKS = (6, 12, 24, 16)
WIDTHS = {"121": (32, 64), "k12": (12, 24)}
K = 10
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-8, "atol": 1e-8}  # in 64 bits


def build(
    variant: str = "k12", n_layers: int = 58, dropout: float = 0.0, **options: str
) -> LayeredNetwork:
    growth_rate, init_features = WIDTHS[variant]
    return se_densenet(
        n_layers,
        K,
        dropout,
        growth_rate=growth_rate,
        init_features=init_features,
        block_config=BLOCKS,
        se_placement=options.get("se_placement", "block"),
        se_init=options.get("se_init", "identity"),
        dropout_at=options.get("dropout_at", "head"),
    )


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def copied(reference: DenseNet, **options: str | int) -> LayeredNetwork:
    network = build(**options)
    load(network, Weights(reference.state_dict()))
    if len(network.layers) == 58:
        network.classifier.load_state_dict(reference.classifier.state_dict())
    return network


def features(network: LayeredNetwork, x: Tensor) -> Tensor:
    for part in (network.stem, *network.layers):
        x = part(x)
    return x


def reference_features(reference: DenseNet, x: Tensor) -> dict[int, Tensor]:
    """What stands behind dense layer k of torchvision's network, in front of its transition."""
    modules, behind, k = reference.features, {}, 0
    x = modules.pool0(modules.relu0(modules.norm0(modules.conv0(x))))
    for b in range(4):
        maps = [x]
        for layer in getattr(modules, f"denseblock{b + 1}").values():
            maps.append(layer(maps))
            k += 1
            behind[k] = torch.cat(maps, 1)
        if b < 3:
            x = getattr(modules, f"transition{b + 1}")(behind[k])
    return behind


def reference_parts(reference: DenseNet, n_layers: int) -> list[nn.Module]:
    """torchvision's modules of the stem and the first layers with the transitions between them."""
    modules = reference.features
    parts = [modules.conv0, modules.norm0]
    for b, end in enumerate(accumulate(BLOCKS)):
        first = end - BLOCKS[b]
        parts += list(getattr(modules, f"denseblock{b + 1}").values())[: max(n_layers - first, 0)]
        if b < 3 and n_layers > end:
            parts.append(getattr(modules, f"transition{b + 1}"))
    return parts


def count(modules: list[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def references() -> dict[str, DenseNet]:
    """torchvision's networks with random weights and random BN parameters and statistics."""
    torch.manual_seed(7)
    made = {
        "121": densenet121(num_classes=K),
        "k12": DenseNet(growth_rate=12, num_init_features=24, num_classes=K),
    }
    for network in made.values():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return made


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("variant", WIDTHS)
@torch.no_grad()
def test_whole_network_equals_torchvisions(references: dict[str, DenseNet], variant: str) -> None:
    reference = copy.deepcopy(references[variant]).eval()
    network = copied(reference, variant=variant).eval()
    x = images()
    behind = reference.features(x)
    torch.testing.assert_close(network.neck.norm(features(network, x)), behind, **CLOSE)
    torch.testing.assert_close(network(x), reference(x), **CLOSE)


@pytest.mark.parametrize("variant", WIDTHS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whole_network_trains_as_torchvisions(
    references: dict[str, DenseNet], variant: str, layout: torch.memory_format
) -> None:
    """In 64 bits: BN over few images makes much of how sums are rounded."""
    reference = copy.deepcopy(references[variant]).double().train()
    network = copied(reference, variant=variant).double().train().to(memory_format=layout)
    x = images().double().contiguous(memory_format=layout)
    ours, theirs = network(x), reference(x)
    torch.testing.assert_close(ours, theirs, **EXACT)
    for logits in (ours, theirs):
        logits.square().sum().backward()
    for ours, theirs in (
        (network.stem.conv, reference.features.conv0),
        (network.layers[5].transition.conv, reference.features.transition1.conv),
        (network.layers[57].dense.conv1, reference.features.denseblock4.denselayer16.conv1),
        (network.layers[57].dense.conv2, reference.features.denseblock4.denselayer16.conv2),
    ):
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **EXACT)
    moved = reference.state_dict()
    for name in ("running_mean", "running_var"):
        ours = network.layers[57].get_submodule("dense.norm2").get_buffer(name)
        theirs = moved[f"features.denseblock4.denselayer16.norm2.{name}"]
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_is_as_exact_when_it_trains(layout: torch.memory_format) -> None:
    convolution = PointwiseConv2d(40, 12)
    x = torch.randn(8, 40, 5, 7).contiguous(memory_format=layout)
    exact = F.conv2d(x.double(), convolution.weight.double())
    for mode in (False, True):
        y = convolution.train(mode)(x)
        assert y.is_contiguous(memory_format=torch.channels_last) or not mode
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("variant", "placement"),
    [("121", "block"), ("k12", "block"), ("k12", "layer"), ("k12", "none")],
)
@torch.no_grad()
def test_cut_network_equals_torchvisions_features(
    references: dict[str, DenseNet], variant: str, placement: str
) -> None:
    reference, x = references[variant].eval(), images()
    behind = reference_features(reference, x)
    # the recomputation itself, against torchvision's own forward
    whole = F.relu(reference.features.norm5(behind[58])).mean((2, 3))
    torch.testing.assert_close(reference.classifier(whole), reference(x), **CLOSE)
    for n_layers in (1, 6, 7, 18, 19, 42, 43):
        network = copied(reference, variant=variant, n_layers=n_layers, se_placement=placement)
        ours = features(network.eval(), x)
        torch.testing.assert_close(ours, behind[n_layers], **CLOSE)
        pooled = F.relu(network.neck.norm(ours)).mean((2, 3))
        torch.testing.assert_close(network(x), network.classifier(pooled), **CLOSE)


@pytest.mark.parametrize("n_layers", [1, 6, 7, 18, 19, 42, 43, 58])
def test_nothing_stands_behind_the_cut(references: dict[str, DenseNet], n_layers: int) -> None:
    network = build(n_layers=n_layers, se_placement="none")
    width = network.classifier.in_features
    body = count(reference_parts(references["k12"], n_layers))
    assert network.n_parameters == body + 2 * width + (width + 1) * K
    transitions = [k for k, layer in enumerate(network.layers, 1) if hasattr(layer, "transition")]
    assert transitions == [end for end in (6, 18, 42) if end < n_layers]


@pytest.mark.parametrize(
    ("placement", "n_layers", "expected"),
    [
        ("none", 58, []),
        ("block", 58, [6, 18, 42, 58]),
        ("block", 43, [6, 18, 42, 43]),
        ("block", 42, [6, 18, 42]),
        ("block", 10, [6, 10]),
        ("block", 1, [1]),
        ("layer", 7, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_placement_of_se(placement: str, n_layers: int, expected: list[int]) -> None:
    layers = build(n_layers=n_layers, se_placement=placement).layers
    found = [
        k
        for k, layer in enumerate(layers, 1)
        if any(isinstance(module, SqueezeExcitation) for module in layer.modules())
    ]
    assert found == expected
    if placement == "block" and n_layers > 6:
        assert list(dict(layers[5].named_children())) == ["dense", "se", "transition"]


# Trainable parameters with all 58 layers and 10 classes, by F.
TRAINABLE = {
    ("121", "none"): {0: 6964106, 1: 6909130, 6: 6586250, 7: 6532490, 18: 5534474},
    ("121", "block"): {0: 7270202, 1: 7215226, 6: 6883882, 7: 6830122, 18: 5798794},
    ("k12", "none"): {0: 1003546, 1: 993490, 6: 947290, 7: 939610, 18: 796714},
    ("k12", "block"): {0: 1047678, 1: 1037622, 6: 989782, 7: 982102, 18: 834394},
}
BLOCK_ENDS = {
    "121": {6: 256, 18: 512, 42: 1024, 58: 1024},
    "k12": {6: 96, 18: 192, 42: 384, 58: 384},
}


@pytest.mark.parametrize(("variant", "placement"), TRAINABLE)
def test_table_of_trainable_parameters(
    references: dict[str, DenseNet], variant: str, placement: str
) -> None:
    reference = references[variant]
    network = build(variant, se_placement=placement)
    for n_frozen, literal in TRAINABLE[variant, placement].items():
        frozen = reference_parts(reference, n_frozen) if n_frozen else []
        if n_frozen in (6, 18):
            transition = {6: "transition1", 18: "transition2"}[n_frozen]
            frozen.append(getattr(reference.features, transition))
        expected = count([reference]) - count(frozen)
        if placement == "block":
            for end, c in BLOCK_ENDS[variant].items():
                s = max(c // 16, 8)
                expected += (2 * c * s + c + s) * (end > n_frozen)
        network.freeze(n_frozen)
        assert network.n_trainable == expected == literal


def test_the_published_parameter_count() -> None:
    network = se_densenet(
        58,
        1000,
        0.5,
        growth_rate=32,
        init_features=64,
        block_config=BLOCKS,
        se_placement="none",
        se_init="identity",
        dropout_at="head",
    )
    assert network.n_parameters == 7_978_856


@pytest.mark.parametrize(
    ("n_layers", "n_frozen"), [(8, 0), (8, 1), (8, 5), (8, 6), (8, 7), (8, 8), (6, 6), (19, 18)]
)
@pytest.mark.parametrize("dropout_at", ["head", "layers"])
def test_training_moves_all_but_the_frozen_prefix(
    n_layers: int, n_frozen: int, dropout_at: str
) -> None:
    network = build(n_layers=n_layers, dropout=0.2, dropout_at=dropout_at)
    network.freeze(n_frozen)
    x = images(8, 32)
    network.fit_neck_statistics([x])
    before = copy.deepcopy(network.state_dict())
    # weight decay moves every parameter that an optimizer sees with a gradient
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(3):
        network.train()  # as Lightning does
        optimizer.zero_grad()
        F.cross_entropy(network(x), torch.arange(8)).backward()
        optimizer.step()
    fixed = ["stem."] if n_frozen else []
    fixed += [f"layers.{k}." for k in range(n_frozen)]
    fixed += ["neck."] if n_frozen == n_layers else []
    for name, value in network.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith(tuple(fixed)), name


@pytest.mark.parametrize(("n_frozen", "frozen"), [(5, False), (6, True), (7, True)])
def test_transition_is_frozen_with_the_whole_block_in_front(n_frozen: int, frozen: bool) -> None:
    network = build(n_layers=8)
    network.freeze(n_frozen)
    last = network.layers[5]
    for part in (last.transition, last.se):
        assert all(p.requires_grad != frozen for p in part.parameters())
    assert last.transition.norm.training != frozen


@pytest.mark.parametrize("n_frozen", [0, 1, 6, 7, 10])
def test_suffix_of_prefix_is_forward_bit_for_bit(n_frozen: int) -> None:
    network = build(n_layers=10, se_init="kaiming").eval()
    network.freeze(n_frozen)
    x = images()
    assert torch.equal(network.suffix(network.prefix(x)), network(x))


def test_dropout_at_layers_acts_in_trainable_layers_only() -> None:
    network = build(n_layers=8, dropout=0.5, dropout_at="layers")
    assert network.dropout.p == 0
    network.freeze(3)
    x = images()
    assert torch.equal(network.prefix(x), network.prefix(x))
    z = network.prefix(x)
    new = network.layers[3](z)[:, z.shape[1] :]
    assert torch.equal(network.layers[3](z)[:, : z.shape[1]], z)
    assert 0.4 < (new == 0).float().mean() < 0.6
    network.eval()
    assert torch.equal(network(x), network(x))
    assert (network.layers[3](z)[:, z.shape[1] :] == 0).float().mean() < 0.1


def test_dropout_at_head_acts_in_the_head_only() -> None:
    network = build(n_layers=8, dropout=0.4)
    dropouts = [m for m in network.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [network.dropout]
    assert network.dropout.p == 0.4
    x = images()
    assert not torch.equal(network(x), network(x))


def test_initialisation_is_he_et_als() -> None:
    network = build("121", 20)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            weight = module.weight
            zero = any(module is m.fc2 for m in network.modules() if hasattr(m, "fc2"))
            expected = 0 if zero else (2 / fan_in) ** 0.5
            # five standard errors of a normal sample's mean and standard deviation
            tolerance = 5 * expected / weight.numel() ** 0.5
            assert abs(weight.mean()) <= tolerance
            assert abs(weight.std() - expected) <= tolerance
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
    assert not network.classifier.bias.any()


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build(n_layers=7).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["stem.conv.weight"], states[2]["stem.conv.weight"])


@pytest.mark.parametrize("placement", ["block", "layer"])
def test_identity_se_changes_nothing_yet_trains(placement: str) -> None:
    network = build(n_layers=7, se_placement=placement)
    x = torch.rand(2, 12 if placement == "layer" else 96, 5, 5)
    layer = network.layers[5]
    se = layer.dense.se if placement == "layer" else layer.se
    assert torch.equal(se(x), x)
    F.cross_entropy(network(images()), torch.tensor([0, 1])).backward()
    for module in network.modules():
        if isinstance(module, SqueezeExcitation):
            assert module.fc2.weight.grad.any()
            assert module.fc2.bias.grad.any()


def test_kaiming_se_gates_with_a_sigmoid() -> None:
    se = build(n_layers=7, se_init="kaiming").layers[5].se
    x = torch.rand(2, 96, 5, 5)
    z = x.mean((2, 3))
    gate = torch.sigmoid(F.relu(z @ se.fc1.weight[:, :, 0, 0].T) @ se.fc2.weight[:, :, 0, 0].T)
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])
    assert se.fc1.out_channels == 8
    assert gate.std() > 0.01


@pytest.mark.parametrize("placement", ["block", "layer"])
def test_channels_last_stays_so_and_changes_nothing(placement: str) -> None:
    network = build(n_layers=8, se_placement=placement, se_init="kaiming").eval()
    expected = network(images())
    network = network.to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    assert features(network, x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x), expected, **CLOSE)
    network.train()(x).sum().backward()
    network.freeze(8)
    network.fit_neck_statistics([x])


def test_one_concatenation_a_layer() -> None:
    network = build(n_layers=19, se_placement="none").eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        network(images())
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::cat"] == 19
    assert "aten::clone" not in calls


@pytest.mark.parametrize("n_layers", [0, 59])
def test_a_layer_that_does_not_exist(n_layers: int) -> None:
    with pytest.raises(UserError, match=rf"must be in \[1, 58\] .* but got {n_layers}"):
        build(n_layers=n_layers)


@pytest.mark.parametrize("variant", WIDTHS)
def test_configured_variants(variant: str) -> None:
    name = {"121": "se_densenet121", "k12": "se_densenet121_k12"}[variant]
    cfg = OmegaConf.load(Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml")
    assert cfg.name == name
    network = instantiate(
        cfg.network,
        included_layers=cfg.n_layers,
        n_classes=K,
        dropout=0.5,
        se_placement=cfg.se.placement,
        se_init=cfg.se.init,
        dropout_at=cfg.dropout_at,
    )
    assert network.n_parameters == TRAINABLE[variant, "block"][0]
    assert tuple(cfg.network.block_config) == BLOCKS
    assert sum(BLOCKS[:2]) == cfg.n_freezable
    assert network.eval()(images(2, cfg.min_image_size)).shape == (2, K)
