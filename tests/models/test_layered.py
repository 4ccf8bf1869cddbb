"""The protocol itself, on a tiny network that is no DenseNet."""

import pytest
import torch
from torch import Tensor, nn

from gatl.models.layered import LayeredNetwork

L = 3


def conv(n_in: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def tiny(dropout: float = 0.0, *, fixed_neck: bool = False, norm: bool = True) -> LayeredNetwork:
    torch.manual_seed(0)
    first = nn.BatchNorm2d(4) if norm else nn.Identity()
    neck = nn.Sequential(first, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = [nn.Sequential(conv(4), nn.Dropout(0.5)) for _ in range(L)]
    return LayeredNetwork(conv(3), layers, neck, 4, 5, dropout, fixed_neck=fixed_neck)


def images(n: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def parts(network: LayeredNetwork) -> list[nn.Module]:
    return [network.stem, *network.layers, network.neck]


@pytest.mark.parametrize(("n_frozen", "n_fixed"), [(0, 0), (1, 2), (2, 3), (3, 5)])
def test_freeze_fixes_stem_layers_and_a_probes_neck(n_frozen: int, n_fixed: int) -> None:
    network = tiny()
    network.freeze(n_frozen)
    for mode in (True, False, True):
        assert network.train(mode) is network
        for index, part in enumerate(parts(network)):
            trained = index >= n_fixed
            assert all(p.requires_grad == trained for p in part.parameters())
            assert all(m.training == (trained and mode) for m in part.modules())
        assert network.classifier.training == mode
        assert all(p.requires_grad for p in network.classifier.parameters())
    assert network.n_trainable == network.n_parameters - sum(
        p.numel() for part in parts(network)[:n_fixed] for p in part.parameters()
    )


def test_freezing_again_undoes_the_call_before() -> None:
    network = tiny()
    network.freeze(L)
    network.freeze(0)
    assert network.n_trainable == network.n_parameters
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("n_frozen", [-1, L + 1])
def test_only_included_layers_can_be_frozen(n_frozen: int) -> None:
    with pytest.raises(ValueError, match=f"0 <= n_frozen <= {L} must hold, but got {n_frozen}"):
        tiny().freeze(n_frozen)


@pytest.mark.parametrize("n_frozen", range(L + 1))
def test_suffix_of_prefix_is_forward(n_frozen: int) -> None:
    network = tiny(dropout=0.3)
    network.freeze(n_frozen)
    x = images()
    z = network.prefix(x)
    assert not z.requires_grad or n_frozen == 0
    kept = z.clone()
    torch.manual_seed(5)
    split = network.suffix(z)
    assert torch.equal(z, kept), "the suffix must leave a cached boundary tensor as it is"
    torch.manual_seed(5)
    other = tiny(dropout=0.3)
    other.freeze(n_frozen)
    torch.manual_seed(5)
    assert torch.equal(split, other(x))


def test_boundary_tensors() -> None:
    network, x = tiny(), images()
    assert network.prefix(x) is x
    network.freeze(1)
    assert network.prefix(x).shape == (7, 4, 8, 8)
    network.freeze(L)
    assert network.prefix(x).shape == (7, 4)


def test_head_dropout_acts_in_training_only() -> None:
    network, x = tiny(dropout=0.5), images()
    network.freeze(L)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 30, 13]])
def test_neck_statistics_are_exact_over_all_images(sizes: list[int]) -> None:
    network, x = tiny(), images(50)
    norm = network.neck[0]
    with torch.no_grad():
        norm.weight.fill_(3)
        norm.bias.fill_(-2)
    network.freeze(L)
    network.fit_neck_statistics(x.split(sizes))
    z = x
    for part in parts(network)[:-1]:
        z = part(z)
    z = z.double()
    mean = z.mean((0, 2, 3))
    variance = (z - mean[:, None, None]).square().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-6, atol=1e-7)
    assert torch.equal(norm.weight, torch.ones(4))
    assert torch.equal(norm.bias, torch.zeros(4))
    assert not norm.training
    assert not norm.weight.requires_grad
    fitted = norm.running_mean.clone()
    network.train()(x)
    assert torch.equal(norm.running_mean, fitted)


def test_neck_statistics_survive_a_mean_far_from_zero() -> None:
    network, x = tiny(), images(40)
    with torch.no_grad():
        network.layers[-1][0][1].bias.fill_(100)  # sums in float32 would be off by a factor
    network.freeze(L)
    network.fit_neck_statistics(x.split(16))
    z = network.layers[2](network.layers[1](network.layers[0](network.stem(x)))).double()
    expected = z.var((0, 2, 3), correction=0)
    torch.testing.assert_close(network.neck[0].running_var.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("network", "n_frozen"),
    [(tiny(), L - 1), (tiny(fixed_neck=True), L), (tiny(norm=False), L)],
    ids=["trained layer", "pretrained neck", "no BN"],
)
def test_neck_statistics_are_left_alone(network: LayeredNetwork, n_frozen: int) -> None:
    def never() -> Tensor:
        pytest.fail("a batch was drawn")

    network.freeze(n_frozen)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.fit_neck_statistics(never() for _ in range(1))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_neck_statistics_need_images() -> None:
    network = tiny()
    network.freeze(L)
    with pytest.raises(ValueError, match="at least one batch"):
        network.fit_neck_statistics([])


def test_a_backbone_of_tokens_fits_the_protocol() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).mT  # (B, 3, H, W) -> (B, HW, 3)

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0]  # (B, N, C) -> (B, C)

    blocks = [nn.TransformerEncoderLayer(3, 1, 8, batch_first=True) for _ in range(2)]
    network = LayeredNetwork(
        Tokens(), blocks, nn.Sequential(nn.LayerNorm(3), First()), 3, 5, 0.1, fixed_neck=True
    )
    network.freeze(1)
    network.fit_neck_statistics([])
    assert network(images(2)).shape == (2, 5)
    assert network.prefix(images(2)).shape == (2, 64, 3)
