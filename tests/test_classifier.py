"""The LightningModule against training loops written by hand."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from gatl import classifier as module
from gatl.classifier import Classifier, Diverged
from gatl.data.images import PreparedData, PreparedSplit, prepare
from gatl.data.module import Batches, ImageData, ShuffledBatches, class_weights
from gatl.data.source import Source, Split, in_memory
from gatl.evaluation import silence

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NETWORK = {
    "_target_": "gatl.models.se_densenet.se_densenet",
    "growth_rate": 4,
    "init_features": 8,
    "block_config": [2, 2],
    "se_placement": "block",
    "se_init": "identity",
    "dropout_at": "head",
}
GENES = {"included_layers": 4, "frozen_layers": 0, "learning_rate": 1e-2, "dropout": 0.0}
PREPROCESSING = {"image_size": 32, "mean": MEAN, "std": STD}
CLASSES = ["a", "b", "c"]
SEED = 5


@pytest.fixture(autouse=True)
def quiet():
    silence()


def split(counts: tuple[int, int, int], seed: int) -> Split:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(3), counts))
    pixels = rng.integers(0, 200, (len(labels), 32, 32, 3), np.uint8)
    pixels[..., 0] += (labels * 25).astype(np.uint8)[:, None, None]
    return in_memory(pixels, labels, str(seed))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Three classes, unequal in training and otherwise unequal in validation."""
    source = Source(tuple(CLASSES), split((24, 10, 6), 0), split((5, 8, 9), 1), split((3, 3, 3), 2))
    folder = tmp_path_factory.mktemp("images")
    return prepare(source, image_size=32, split_seed=0, max_bad=0, folder=folder)


def build(
    *, weights: Any = None, network: Mapping[str, Any] = NETWORK, **genes: float
) -> Classifier:
    torch.manual_seed(SEED)
    return Classifier(network, GENES | genes, CLASSES, PREPROCESSING, weights)


def fit(
    classifier: Classifier,
    prepared: PreparedData,
    epochs: int = 1,
    eval_batch_size: int = 128,
    batch_size: int = 8,
    checkpoint: Path | None = None,
    **more: Any,
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **more,
    )
    torch.manual_seed(SEED)
    images = data(prepared, eval_batch_size, batch_size)
    trainer.fit(classifier, datamodule=images, ckpt_path=checkpoint, weights_only=True)
    return trainer


def data(prepared: PreparedData, eval_batch_size: int = 128, batch_size: int = 8) -> ImageData:
    return ImageData(
        prepared,
        batch_size=batch_size,
        augment="none",
        mean=MEAN,
        std=STD,
        seed=SEED,
        eval_batch_size=eval_batch_size,
    )


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x)[None, :, None, None] for x in (MEAN, STD))
    return (images / 255 - mean) / std


def everything(part: PreparedSplit) -> tuple[Tensor, Tensor]:
    ((images, labels),) = Batches(part, len(part))
    return normalised(images), labels


def losses_by_hand(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    right = log_p[torch.arange(len(labels)), labels]
    return -(1 - smoothing) * right - smoothing * log_p.mean(1)


def train_by_hand(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    prepared: PreparedData,
    epochs: int,
    weights: Tensor,
    smoothing: float = 0.0,
    batch_size: int = 8,
) -> list[dict[str, float]]:
    """Train as a plain loop does; returns the losses of each epoch."""
    batches = ShuffledBatches(prepared.train, batch_size, SEED)
    history = []
    torch.manual_seed(SEED)
    for _ in range(epochs):
        network.train()
        total, seen = 0.0, 0
        for images, labels in batches:
            logits = network(normalised(images).double())
            losses = weights[labels] * losses_by_hand(logits, labels, smoothing)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            total, seen = total + losses.sum().item(), seen + len(labels)
        network.eval()
        images, labels = everything(prepared.val)
        with torch.no_grad():
            losses = losses_by_hand(network(images.double()), labels)
        val_loss = (weights[labels] * losses).sum() / weights[labels].sum()
        history.append({"train_loss": total / seen, "val_loss": val_loss.item()})
    return history


LENET = {"_target_": "gatl.models.lenet.lenet5"}  # without BN


@pytest.mark.parametrize("n_parts", [2, 3])
@pytest.mark.parametrize("batch_size", [7, 12])  # the last batch has 5 images, and 4
def test_in_parts_a_step_is_that_of_the_whole_batch(prepared, batch_size, n_parts):
    """But for BN and dropout: same batches, same gradients, whatever the sizes of the parts."""
    weights = class_weights(prepared.train.labels, 3)
    genes = {"included_layers": 5, "label_smoothing": 0.2, "weight_decay": 0.1}
    whole = build(weights=weights.tolist(), network=LENET, **genes)
    reference, parted = copy.deepcopy(whole.network).double(), copy.deepcopy(whole)
    parted.train_in_parts(n_parts)
    seen = []
    parted.network.register_forward_hook(
        lambda network, inputs, _: seen.append(len(inputs[0])) if network.training else None
    )
    more = {"epochs": 2, "batch_size": batch_size, "precision": "64-true"}
    for classifier in (whole, parted):
        fit(classifier, prepared, **more)
    n_whole, n_last = divmod(40, batch_size)
    assert len(seen) == 2 * (n_whole * n_parts + (n_parts if n_last >= 2 * n_parts else 1))
    assert max(seen[:-1]) == max(-(-batch_size // n_parts), seen[-1])
    assert sum(seen) == 2 * 40
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    losses = train_by_hand(
        reference, optimizer, prepared, 2, torch.tensor(weights), 0.2, batch_size
    )
    for classifier in (whole, parted):
        for metrics, expected in zip(classifier.epochs, losses, strict=True):
            for name, loss in expected.items():
                assert metrics[name] == pytest.approx(loss, rel=1e-5), name
    assert parted.epochs == [pytest.approx(metrics, rel=1e-6) for metrics in whole.epochs]
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(parted.network.state_dict()[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(2, {2}), (3, {3}), (4, {2}), (6, {3}), (13, {6, 7})]
)
def test_no_part_is_a_single_image(prepared, batch_size, sizes):
    classifier = build(included_layers=2)
    classifier.train_in_parts(2)
    seen = set()
    classifier.network.stem.register_forward_hook(
        lambda stem, inputs, _: seen.add(len(inputs[0])) if stem.training else None
    )
    fit(classifier, prepared, batch_size=batch_size)
    assert seen - {2} == sizes - {2}
    assert min(seen) >= 2
    assert classifier.epochs


def test_what_began_in_parts_goes_on_in_parts(prepared, tmp_path):
    expected = build()
    expected.train_in_parts(2)
    fit(expected, prepared, epochs=2)
    begun, resumed = build(), build()
    begun.train_in_parts(2)
    fit(begun, prepared).save_checkpoint(tmp_path / "rung.ckpt")
    fit(resumed, prepared, epochs=2, checkpoint=tmp_path / "rung.ckpt")
    assert resumed.epochs == expected.epochs


@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [None, 0.2])
def test_fit_is_the_plain_loop(prepared, weight_decay, weighted, smoothing):
    weights = class_weights(prepared.train.labels, 3) if weighted else np.ones(3)
    genes = {"dropout": 0.3}
    genes |= {} if weight_decay is None else {"weight_decay": weight_decay}
    genes |= {} if smoothing is None else {"label_smoothing": smoothing}
    classifier = build(weights=weights.tolist() if weighted else None, **genes)
    reference = copy.deepcopy(classifier.network).double()
    # In 64 bits, for Adam enlarges what rounding does to the smallest gradients.
    fit(classifier, prepared, epochs=2, precision="64-true")
    if weight_decay is None:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    else:  # decoupled: Loshchilov & Hutter
        optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=weight_decay)
    expected = train_by_hand(
        reference, optimizer, prepared, 2, torch.tensor(weights), smoothing or 0.0
    )
    for metrics, losses in zip(classifier.epochs, expected, strict=True):
        for name, loss in losses.items():
            assert metrics[name] == pytest.approx(loss, rel=1e-5), name
    for name, value in reference.state_dict().items():
        trained = classifier.network.state_dict()[name].to(value.dtype)
        torch.testing.assert_close(trained, value, rtol=1e-5, atol=1e-5)


def test_adam_is_that_of_the_paper():
    """Kingma & Ba 2015, algorithm 1, at its default settings."""
    classifier = build(learning_rate=0.01)
    optimizer = classifier.configure_optimizers()
    parameter = classifier.network.classifier.weight
    expected = parameter.detach().double().clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    rng = torch.Generator().manual_seed(0)
    for t in range(1, 6):
        gradient = torch.randn(parameter.shape, generator=rng)
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected -= 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_val_loss_does_not_depend_on_the_batches(prepared, weighted):
    weights = class_weights(prepared.train.labels, 3).tolist() if weighted else None
    results = []
    for size in (5, 22):
        classifier = build(weights=weights)
        fit(classifier, prepared, eval_batch_size=size)
        results.append(classifier.epochs[0])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_metrics_are_those_of_scikit_learn(prepared):
    classifier = build()
    fit(classifier, prepared, epochs=2, eval_batch_size=5)
    images, labels = everything(prepared.val)
    with torch.no_grad():
        predicted = classifier.eval()(images).argmax(1)
    last = classifier.epochs[-1]
    assert last["val_accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert last["val_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert 0 < last["val_f1"] < 1  # it tells something


@pytest.mark.parametrize("n_frozen", [1, 2, 3])
def test_frozen_prefix_stays_bit_identical_and_all_behind_it_moves(prepared, n_frozen):
    classifier = build(frozen_layers=n_frozen, dropout=0.3)
    network = classifier.network
    before = copy.deepcopy(network.state_dict())
    fit(classifier, prepared, epochs=3)
    frozen = ("stem.", *(f"layers.{i}." for i in range(n_frozen)))
    assert any(name.startswith("layers.1.transition") for name in before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_linear_probe_stands_on_exact_statistics_of_the_training_split(prepared, monkeypatch):
    calls = []
    plain = ImageData.plain_train_images
    monkeypatch.setattr(
        ImageData, "plain_train_images", lambda self, device: calls.append(1) or plain(self, device)
    )
    classifier = build(included_layers=3, frozen_layers=3, dropout=0.5)
    network = classifier.network
    before = copy.deepcopy(network.state_dict())
    images, _ = everything(prepared.train)
    with torch.no_grad():
        features = network.stem(images)
        for layer in network.layers:
            features = layer(features)
    features = features.double().transpose(0, 1).flatten(1)  # (C, B * H * W)
    fit(classifier, prepared, epochs=2, eval_batch_size=7)
    assert calls == [1]
    norm = network.neck.norm
    torch.testing.assert_close(norm.running_mean.double(), features.mean(1), rtol=1e-5, atol=1e-6)
    variance = features.var(1, correction=0)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    for name, value in network.state_dict().items():
        if not name.startswith("neck.norm.running"):
            assert torch.equal(value, before[name]) != name.startswith("classifier."), name
    network.train()
    with torch.no_grad():
        pooled = network.prefix(images)
        assert torch.equal(pooled, network.prefix(images))
        torch.testing.assert_close(torch.cat([network.prefix(x) for x in images.split(3)]), pooled)
    assert network.n_trainable == sum(p.numel() for p in network.classifier.parameters())


def test_network_with_a_trained_layer_draws_no_statistics(prepared, monkeypatch):
    drawn = []
    monkeypatch.setattr(Batches, "__iter__", lambda self: drawn.append(self) or iter(()))
    classifier = build(included_layers=3, frozen_layers=2)
    batches = data(prepared).plain_train_images(torch.device("cpu"))
    classifier.network.fit_neck_statistics(batches)
    assert drawn == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_divergence(prepared, value):
    classifier = build()
    with torch.no_grad():
        classifier.network.classifier.weight[0, 0] = value
    with pytest.raises(Diverged, match=r"diverged: classifier\.weight is not finite in epoch 1"):
        fit(classifier, prepared)


@pytest.mark.parametrize("frozen", [0, 2])
def test_statistics_that_no_loss_shows_are_divergence_before_the_first_step(prepared, frozen):
    """What is divided by an infinite variance is 0: the losses look fine."""
    classifier = build(frozen_layers=frozen)
    norm = classifier.network.layers[0].dense.norm1
    norm.running_var.fill_(math.inf)
    classifier.eval()
    images, labels = everything(prepared.val)
    with torch.no_grad():
        assert nn.functional.cross_entropy(classifier(images), labels).isfinite()
    classifier.training_step = refuse  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"layers\.0\.dense\.norm1\.running_var is not finite"):
        fit(classifier, prepared)


def refuse(*args: object) -> None:
    pytest.fail("too late")


def test_buffers_that_are_in_no_state_dict_count_too(prepared):
    classifier = build()
    classifier.network.register_buffer("scale", torch.tensor([1.0, math.nan]), persistent=False)
    classifier.network.register_buffer("nothing", torch.zeros(0))
    with pytest.raises(Diverged, match="diverged: scale is not finite"):
        classifier._require_finite_weights(frozen=True)


@pytest.mark.parametrize("name", ["layers.3.dense.norm1.running_var", "classifier.bias"])
@pytest.mark.parametrize("batches_between", [2, 1000])
def test_weights_that_become_infinite_are_divergence_though_the_losses_are_finite(
    prepared, monkeypatch, name, batches_between
):
    """Within some steps; at the latest when the epoch ends."""
    monkeypatch.setattr(module, "BATCHES_BETWEEN_CHECKS", batches_between)
    classifier = build()
    steps = []

    def spoil(outputs: object, batch: object, batch_idx: int) -> None:
        steps.append(batch_idx)
        if len(steps) == 3:
            classifier.network.state_dict()[name].fill_(math.inf)

    monkeypatch.setattr(classifier, "on_train_batch_end", spoil)
    monkeypatch.setattr(classifier, "_logits", lambda x: classifier(x).nan_to_num(0, 0, 0))
    with pytest.raises(Diverged, match=f"diverged: {name} is not finite in epoch 1"):
        fit(classifier, prepared)
    assert classifier.epochs == []
    assert len(steps) == (3 if batches_between == 2 else 5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_loss_that_is_no_number_is_noticed_at_the_next_look(prepared, monkeypatch, split):
    """Though it is not the one of the batch at which somebody looks."""
    monkeypatch.setattr(module, "BATCHES_BETWEEN_CHECKS", 4)
    classifier = build()
    steps = []

    def spoil(network: nn.Module, _: object, logits: Tensor) -> Tensor:
        if network.training == (split == "train"):
            steps.append(logits)
        return logits * math.nan if len(steps) == 2 else logits

    classifier.network.register_forward_hook(spoil)
    monkeypatch.setattr(classifier, "_require_finite_weights", lambda **_: None)
    monkeypatch.setattr(classifier, "optimizer_step", lambda *args: args[-1]())  # it moves nothing
    with pytest.raises(Diverged, match=f"diverged: {split}_loss is nan in epoch 1"):
        fit(classifier, prepared, eval_batch_size=4)
    assert len(steps) == 4


def test_huge_learning_rate_is_divergence(prepared):
    with pytest.raises(Diverged):
        fit(build(learning_rate=1e30), prepared)


def test_one_image_whose_loss_is_no_number_is_divergence(prepared):
    """The mean over the others would look fine."""
    classifier = build()

    def spoil(network: nn.Module, _: object, logits: Tensor) -> None:
        if not network.training:
            logits[0] = math.nan

    classifier.network.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="val_loss is nan"):
        fit(classifier, prepared)


def test_divergence_is_noticed_within_an_epoch(prepared, monkeypatch):
    monkeypatch.setattr(module, "BATCHES_BETWEEN_CHECKS", 2)
    monkeypatch.setattr(Classifier, "validation_step", lambda *_: pytest.fail("too late"))
    with pytest.raises(Diverged, match="train_loss is"):
        fit(build(learning_rate=1e30), prepared)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
def test_checkpoint_is_plain_data_and_gives_the_same_logits(prepared, tmp_path: Path, weights):
    classifier = build(weights=weights, frozen_layers=2)
    trainer = fit(classifier, prepared)
    path = tmp_path / "best.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    content = torch.load(path, weights_only=True)
    hparams = content["hyper_parameters"]
    assert json.loads(json.dumps(hparams)) == {
        "network": NETWORK,
        "genes": GENES | {"frozen_layers": 2},
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "class_weights": weights,
    }
    loaded = Classifier.load_from_checkpoint(path, weights_only=True).eval()
    images, _ = everything(prepared.test)
    with torch.no_grad():
        assert torch.equal(loaded(images), classifier.eval()(images))
    assert loaded.network.n_frozen == 2


def test_test_keeps_the_logits_in_order(prepared):
    classifier = build()
    trainer = fit(classifier, prepared)
    for _ in range(2):  # the second does not add to the first
        trainer.test(classifier, datamodule=data(prepared, 2), verbose=False)
    images, _ = everything(prepared.test)
    with torch.no_grad():
        expected = classifier.eval()(images)
    torch.testing.assert_close(torch.cat(classifier.test_logits), expected)


def test_bf16_mixed_trains_on_a_cpu(prepared):
    classifier = build(included_layers=3, frozen_layers=3)
    seen = []
    classifier.network.classifier.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    fit(classifier, prepared, precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    exact = build(included_layers=3, frozen_layers=3)
    fit(exact, prepared)
    assert classifier.epochs[0]["val_loss"] == pytest.approx(exact.epochs[0]["val_loss"], rel=0.05)


def test_weights_lie_in_channels_last():
    weight = build().network.layers[0].dense.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
