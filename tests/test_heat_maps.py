"""Heat maps: against Grad-CAM by hand, CAM without a gradient, and an object to be found."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gatl.heat_maps import heat_map, overlay
from gatl.models.lenet import lenet5
from gatl.models.se_densenet import se_densenet
from gatl.models.timm_network import timm_network


def dense(included_layers, size=4, dropout=0.0):
    return se_densenet(
        included_layers,
        3,
        dropout,
        growth_rate=8,
        init_features=16,
        block_config=(size, size),
        se_placement="block",
        se_init="kaiming",
        dropout_at="head",
    )


def scaled(cam, size):
    """Return a map (h, w) as one of the image's size, in [0, 1]."""
    cam = cam.relu()
    cam = (cam - cam.min()) / cam.max().sub(cam.min()).clamp(min=1e-7)
    cam = F.interpolate(cam[None, None], (size, size), mode="bilinear")[0, 0]
    return ((cam - cam.min()) / cam.max().sub(cam.min()).clamp(min=1e-7)).detach().numpy()


def by_hand(network, image, label, layer, n_prefix=None):
    """Compute Grad-CAM as its paper's equations 1 and 2 have it."""
    kept = []
    hook = network.get_submodule(layer).register_forward_hook(lambda *call: kept.append(call[2]))
    logits = network(image[None].requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, label], kept[0])
    maps, gradient = kept[0][0], gradient[0]
    if n_prefix is not None:  # tokens (N, C)
        side = round((len(maps) - n_prefix) ** 0.5)
        maps, gradient = (x[n_prefix:].T.reshape(-1, side, side) for x in (maps, gradient))
    return scaled((gradient.mean((1, 2))[:, None, None] * maps).sum(0), image.shape[1])


def timm(n_layers, name):
    return lambda: timm_network(n_layers, 3, 0.0, name=name)


NETWORKS = {  # built how, the side of the images, the layer whose maps they are
    "DenseNet cut in its first block": (lambda: dense(2), 32, "neck.relu"),
    "DenseNet cut in its second block": (lambda: dense(6), 64, "neck.relu"),
    "DenseNet whose last maps are too small": (lambda: dense(6), 32, "layers.2"),
    "LeNet-5": (lambda: lenet5(5, 3, 0.0), 64, "layers.4"),
    "ResNet": (timm(4, "resnet10t"), 224, "layers.3"),
    "ResNet whose last maps are too small": (timm(4, "resnet10t"), 64, "layers.1"),
    "EfficientNet": (timm(16, "tf_efficientnet_lite0"), 224, "neck.bn2"),
    "EfficientNet cut": (timm(4, "tf_efficientnet_lite0"), 64, "neck.relu"),
    "MobileNetV3": (timm(12, "mobilenetv3_small_050"), 224, "layers.11"),
    "ConvNeXt": (timm(12, "convnext_atto"), 224, "neck.norm_pre"),
    "ViT": (timm(2, "vit_tiny_patch16_224"), 64, "layers.1.norm1"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_grad_cam_of_the_last_maps(name):
    build, size, layer = NETWORKS[name]
    torch.manual_seed(0)
    network = build().eval()
    network.freeze(len(network.layers))  # no gradient would pass by itself
    image = torch.randn(3, size, size)
    maps = [heat_map(network, image, label) for label in (0, 1)]
    for label, found in enumerate(maps):
        expected = by_hand(network, image, label, layer, 1 if name == "ViT" else None)
        assert found.shape == (size, size)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert max(found.max() for found in maps) == pytest.approx(1, abs=1e-5)
    assert all(p.grad is None for p in network.parameters())


def test_behind_it_stands_a_mean_so_it_is_what_the_classifier_weighs():
    torch.manual_seed(0)
    network = dense(3).eval()
    image = torch.randn(3, 32, 32)
    with torch.no_grad():
        x = image[None]
        for module in (network.stem, *network.layers, network.neck.norm, network.neck.relu):
            x = module(x)
        # Zhou et al. 2016, equation 2
        expected = torch.einsum("c,chw->hw", network.classifier.weight[1], x[0])
    np.testing.assert_allclose(heat_map(network, image, 1), scaled(expected, 32), atol=1e-4)


def test_without_feature_maps_there_is_none():
    network = dense(8)
    assert heat_map(network, torch.randn(3, 8, 8), 0) is None


def planted(n, rng):
    """Return images with a ring, a cross or nothing somewhere, their labels and the places."""
    images = 0.3 * rng.standard_normal((n, 3, 32, 32)).astype(np.float32)
    labels, places = rng.integers(0, 3, n), rng.integers(2, 22, (n, 2))
    shapes = np.zeros((3, 8, 8), np.float32)
    shapes[1] = 3
    shapes[1, 2:6, 2:6] = 0
    shapes[2, 3:5] = shapes[2, :, 3:5] = 3
    for image, label, (y, x) in zip(images, labels, places, strict=True):
        image[:, y : y + 8, x : x + 8] += shapes[label]
    return torch.from_numpy(images), torch.from_numpy(labels), places


def test_a_trained_network_looks_at_the_object():
    torch.manual_seed(0)
    network = dense(1)
    images, labels, places = planted(400, np.random.default_rng(0))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(6):
        for rows in torch.randperm(300).split(20):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = network(images[300:]).argmax(1) == labels[300:]
    assert right.float().mean() > 0.95
    inside, outside = [], []
    for i in range(300, 360):
        if labels[i] == 0 or not right[i - 300]:
            continue
        heat = heat_map(network, images[i], int(labels[i]))
        y, x = places[i]
        there = np.zeros((32, 32), bool)
        there[y : y + 8, x : x + 8] = True
        inside.append(heat[there].mean())
        outside.append(heat[~there].mean())
    assert np.mean(inside) > 2 * np.mean(outside)
    assert np.mean(np.array(inside) > outside) > 0.95


def test_the_overlay_is_the_grey_image_where_nothing_speaks():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    heat = np.zeros((80, 80), np.float32)
    heat[:40] = 1
    pixels = np.asarray(overlay(image, heat)).astype(int)
    grey = np.asarray(image.convert("L"))
    assert (pixels[30:] == grey[30:, :, None]).all()
    assert (pixels[:10, :, 0] > pixels[:10, :, 2] + 30).all()  # red
