"""LeNet-5 against the numbers of its paper."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gatl.cli import compose
from gatl.config import checked
from gatl.errors import UserError
from gatl.models.layered import LayeredNetwork
from gatl.models.lenet import ScaledTanh, lenet5
from gatl.models.weights import Weights, load

K = 10


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def test_sizes_are_the_papers() -> None:
    network, x = lenet5(5, K, 0.0), images()
    shapes = []
    for layer in network.layers:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120, 1, 1)]
    assert network.neck(x).shape == (2, 84)
    c1, s2, c3, s4, c5 = map(count, network.layers)
    assert (s2, s4, c5, count(network.neck)) == (12, 32, 48_120, 10_164)  # as printed
    assert (c1, c3) == (6 * (3 * 25 + 1), 16 * (6 * 25 + 1))  # where we depart from it


@torch.no_grad()
def test_forward_is_the_papers() -> None:
    network, x = lenet5(5, K, 0.0).eval(), images()
    state = network.state_dict()

    def squash(a: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(2 * a / 3)

    def convolve(x: Tensor, layer: int) -> Tensor:
        weight, bias = (state[f"layers.{layer}.conv.{name}"] for name in ("weight", "bias"))
        return squash(F.conv2d(x, weight, bias))

    def subsample(x: Tensor, layer: int) -> Tensor:
        coefficient = state[f"layers.{layer}.scale.weight"].view(-1, 1, 1)
        bias = state[f"layers.{layer}.scale.bias"].view(-1, 1, 1)
        total = x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
        return squash(total / 4 * coefficient + bias)

    for name in (1, 3):
        nn.init.normal_(state[f"layers.{name}.scale.weight"])
        nn.init.normal_(state[f"layers.{name}.scale.bias"])
    x5 = convolve(subsample(convolve(subsample(convolve(x, 0), 1), 2), 3), 4)[:, :, 0, 0]
    f6 = squash(x5 @ state["neck.f6.weight"].T + state["neck.f6.bias"])
    expected = f6 @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_squashing_is_about_one_at_one() -> None:
    assert ScaledTanh()(torch.tensor(1.0)).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [32, 33, 64])
def test_any_cut_takes_any_size(n_layers: int, size: int) -> None:
    network = lenet5(n_layers, K, 0.0)
    assert len(network.layers) == n_layers
    width = (6, 6, 16, 16, 84)[n_layers - 1]
    assert network.classifier.in_features == width
    assert network(images(2, size)).shape == (2, K)
    assert count(network.neck) == (10_164 if n_layers == 5 else 0)


@pytest.mark.parametrize(("n_layers", "n_frozen"), [(5, 0), (5, 1), (5, 2), (5, 5), (3, 3)])
def test_training_moves_all_but_the_frozen_prefix(n_layers: int, n_frozen: int) -> None:
    network = lenet5(n_layers, K, 0.2)
    network.freeze(n_frozen)
    before = copy.deepcopy(network.state_dict())
    train(network, images(8), torch.arange(8), steps=2)
    fixed = [f"layers.{k}." for k in range(n_frozen)]
    fixed += ["neck."] if n_frozen == n_layers else []
    for name, value in network.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith(tuple(fixed)), name


def train(network: LayeredNetwork, x: Tensor, y: Tensor, steps: int) -> float:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        network.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_table_of_trainable_parameters() -> None:
    network = lenet5(5, K, 0.0)
    found = []
    for n_frozen in range(6):
        network.freeze(n_frozen)
        found.append(network.n_trainable)
    assert found == [62_050, 61_594, 61_582, 59_166, 59_134, 850]


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(lenet5(5, K, 0.0).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["layers.0.conv.weight"], states[2]["layers.0.conv.weight"])
    bound = 2.4 / (3 * 25)
    assert 0.9 * bound < states[0]["layers.0.conv.weight"].abs().max() <= bound


@pytest.mark.parametrize("n_layers", [0, 6])
def test_a_layer_that_does_not_exist(n_layers: int) -> None:
    with pytest.raises(UserError, match=rf"must be in \[1, 5\] .* but got {n_layers}"):
        lenet5(n_layers, K, 0.0)


def test_it_learns_digits_as_configured() -> None:
    model = checked(compose(["model=lenet5"])).model
    build = instantiate(model.network, _partial_=True)
    network = build(included_layers=model.n_layers, n_classes=K, dropout=0.0)
    network.freeze(0)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    x = F.interpolate(x, model.image_size, mode=model.interpolation)
    x, y = (x - 0.5) / 0.5, torch.from_numpy(labels)
    for start in range(0, 1200, 20):
        train(network, x[start : start + 20], y[start : start + 20], steps=1)
    accuracy = (network.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean()
    assert accuracy > 0.8


def test_it_has_no_se_and_no_other_place_for_dropout() -> None:
    assert checked(compose(["model=lenet5"])).model.se == {}
    with pytest.raises(UserError, match="must be null for model=lenet5"):
        checked(compose(["model=lenet5", "model.dropout_at=layers"]))


def test_densenet121_is_the_published_one() -> None:
    model = checked(compose(["model=densenet121"])).model
    build = instantiate(model.network, _partial_=True, _convert_="all")
    network = build(included_layers=model.n_layers, n_classes=1000, dropout=0.0)
    assert network.n_parameters == 7_978_856


def test_the_whole_networks_weights_fit_a_cut_one() -> None:
    whole, cut = lenet5(5, 10, 0.0), lenet5(3, 2, 0.0)
    report = load(cut, Weights(whole.state_dict()))
    assert report.left_random == ("classifier.weight", "classifier.bias")
    assert torch.equal(cut.layers[2].conv.weight, whole.layers[2].conv.weight)
    report = load(again := lenet5(5, 2, 0.0), Weights(whole.state_dict()))
    assert again.fixed_neck
    assert len(report.unused) == 2
