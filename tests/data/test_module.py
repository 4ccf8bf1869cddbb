"""The datamodule against a loop written by hand, and inside Lightning."""

import warnings
from pathlib import Path

import lightning
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2  # type: ignore[import-untyped]

from gatl.data.images import PreparedData, prepare
from gatl.data.module import Batches, ImageData, augmentation, class_weights
from gatl.data.source import Source, in_memory
from gatl.streams import Purpose, generator

# Lightning 2.6 uses a class that torch has come to deprecate.
PYTREE = "`isinstance.treespec, LeafSpec"
pytestmark = pytest.mark.filterwarnings(f"ignore:{PYTREE}:FutureWarning")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (100, 16, 16, 3), np.uint8)
    source = Source(("a", "b"), in_memory(pixels, rng.permutation(np.arange(100) % 2), "x"))
    folder: Path = tmp_path_factory.mktemp("arrays")
    return prepare(source, image_size=16, split_seed=0, max_bad=0, folder=folder)


def data(prepared: PreparedData, augment: str = "none", batch_size: int = 16) -> ImageData:
    return ImageData(
        prepared,
        batch_size=batch_size,
        augment=augment,
        mean=MEAN,
        std=STD,
        seed=5,
        eval_batch_size=8,
    )


class Probe(lightning.LightningModule):
    """Records the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        assert images.is_contiguous(memory_format=torch.channels_last)
        self.seen[stage].append((images.clone(), labels.clone()))
        return nn.functional.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._step("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def fit(
    datamodule: ImageData, folder: Path, epochs: int, ckpt: Path | None = None, **options: object
) -> tuple[Probe, lightning.Trainer]:
    probe = Probe()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,  # type: ignore[arg-type]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", PYTREE, FutureWarning)
        trainer.fit(probe, datamodule=datamodule, ckpt_path=ckpt)
    return probe, trainer


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]], atol: float = 0) -> bool:
    return len(a) == len(b) and all(
        torch.equal(y, v) and x.shape == u.shape and torch.allclose(x, u, rtol=0, atol=atol)
        for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_a_silent_fit_sees_what_a_plain_loop_sees(prepared: PreparedData, tmp_path: Path) -> None:
    probe, trainer = fit(data(prepared), tmp_path, epochs=2)
    trainer.test(probe, datamodule=data(prepared), verbose=False)

    def loop(split: str, order: npt.NDArray[np.int64], size: int) -> list[tuple[Tensor, Tensor]]:
        part = getattr(prepared, split)
        nchw = np.load(part.images.path).transpose(0, 3, 1, 2)
        normalise = v2.Normalize(MEAN, STD)
        return [
            (normalise(torch.from_numpy(nchw[i]).float() / 255), torch.from_numpy(part.labels[i]))
            for i in (order[k : k + size] for k in range(0, len(order), size))
        ]

    orders = [generator(5, Purpose.FIT, e).permutation(len(prepared.train)) for e in range(2)]
    expected = [batch for order in orders for batch in loop("train", order, 16)]
    assert same(probe.seen["train"], expected, atol=2e-6)
    in_order = np.arange(len(prepared.val))
    # Lightning's sanity check is two batches of validation.
    assert same(probe.seen["val"][2:], 2 * loop("val", in_order, 8), atol=2e-6)
    assert same(probe.seen["test"], loop("test", np.arange(len(prepared.test)), 8), atol=2e-6)


def test_a_longer_fit_continues_a_shorter_one(prepared: PreparedData, tmp_path: Path) -> None:
    long, _ = fit(data(prepared), tmp_path, epochs=3)
    short, trainer = fit(data(prepared), tmp_path, epochs=1)
    n = len(short.seen["train"])
    assert same(short.seen["train"], long.seen["train"][:n])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _ = fit(data(prepared), tmp_path, epochs=3, ckpt=tmp_path / "a.ckpt")
    assert same(resumed.seen["train"], long.seen["train"][n:])


def test_double_precision(prepared: PreparedData, tmp_path: Path) -> None:
    probe, _ = fit(data(prepared), tmp_path, epochs=1, precision="64-true")
    assert probe.seen["train"][0][0].dtype == torch.float64


def test_augments_training_batches_only(prepared: PreparedData, tmp_path: Path) -> None:
    plain, _ = fit(data(prepared), tmp_path, epochs=1)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(fit(data(prepared, "crop_flip"), tmp_path, epochs=1)[0].seen)
    assert not same(runs[0]["train"], plain.seen["train"])
    assert same(runs[0]["val"], plain.seen["val"])
    assert same(runs[0]["train"], runs[1]["train"])
    assert not same(runs[0]["train"], runs[2]["train"])


@pytest.mark.parametrize(("n", "size", "sizes"), [(68, 67, [67]), (68, 32, [32, 32, 4])])
def test_the_last_batch(prepared: PreparedData, n: int, size: int, sizes: list[int]) -> None:
    assert len(prepared.train) == n
    batches = data(prepared, batch_size=size).train_dataloader()
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)
    evaluation = Batches(prepared.train, 67)
    assert [len(labels) for _, labels in evaluation] == [67, 1]


def test_epochs_differ_and_count(prepared: PreparedData) -> None:
    batches = data(prepared, batch_size=68).train_dataloader()
    (first,), (second,) = list(batches), list(batches)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0].sum(0), second[0].sum(0))
    batches.set_epoch(1)
    assert same(list(batches), [second])


@pytest.mark.parametrize("name", ["flip", "crop_flip", "trivial"])
def test_each_image_gets_its_own_draw(name: str) -> None:
    rng = np.random.default_rng(0)
    one = torch.from_numpy(rng.integers(0, 256, (1, 3, 16, 16), np.uint8))
    batch = one.expand(64, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    varied = augmentation(name)(batch)
    assert varied.shape == batch.shape
    assert varied.dtype == torch.uint8
    assert varied.is_contiguous(memory_format=torch.channels_last)
    kinds = len(torch.unique(varied.flatten(1), dim=0))
    assert kinds == 2 if name == "flip" else kinds > 10
    torch.manual_seed(0)
    assert torch.equal(augmentation(name)(batch), varied)


def test_flip_is_torchvisions() -> None:
    batch = torch.arange(64 * 3 * 4 * 4).reshape(64, 3, 4, 4).to(torch.uint8)
    torch.manual_seed(0)
    flipped = augmentation("flip")(batch)
    kept = (flipped == batch).flatten(1).all(1)
    assert 16 < int(kept.sum()) < 48
    assert torch.equal(flipped[~kept], v2.functional.horizontal_flip(batch[~kept]))


@pytest.mark.parametrize("side", [1, 4, 16])
def test_crop_flip_is_a_crop_of_the_mirrored_image(side: int) -> None:
    batch = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 3, side, side), np.uint8)
    )
    torch.manual_seed(0)
    varied = augmentation("crop_flip")(batch)
    shift = side // 8
    padded = v2.functional.pad(batch, [shift] * 4, padding_mode="reflect")
    for image, result in zip(padded, varied, strict=True):
        crops = [
            v2.functional.crop(image, top, left, side, side)
            for top in range(2 * shift + 1)
            for left in range(2 * shift + 1)
        ]
        crops += [v2.functional.horizontal_flip(crop) for crop in crops]
        assert any(torch.equal(result, crop) for crop in crops)


def test_class_weights() -> None:
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    weights = class_weights(labels, 3)
    assert weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert weights[labels].mean() == pytest.approx(1)
    with pytest.raises(ValueError, match="must have images"):
        class_weights(labels, 4)
