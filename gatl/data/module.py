"""The LightningDataModule: batches by index, augmented and normalised as whole batches.

Shapes: B images a batch, S pixels a side. Images travel to the device as uint8,
a quarter of what float32 takes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import v2

from gatl.data.images import Images, PreparedData, PreparedSplit
from gatl.data.source import Labels
from gatl.streams import Purpose, generator

Batch = tuple[Tensor, Tensor]


class Batches:
    """The batches of a split in its order: (uint8 images (B, 3, S, S), int64 labels (B,)).

    A DataLoader would collate image by image in worker processes; here the images
    lie in one array, and a batch is one gather.
    """

    def __init__(self, split: PreparedSplit, batch_size: int, *, pin_memory: bool = False) -> None:
        """Set how to batch.

        Args:
            split: N images.
            batch_size: At least 1; the last batch may be smaller.
            pin_memory: Whether to copy batches to page-locked memory.
        """
        self.split = split
        self.batch_size = batch_size
        self.pin_memory = pin_memory
        self.n_images = len(split)

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self.n_images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        order = self.order()
        for start in range(0, self.n_images, self.batch_size):
            indices = order[start : min(start + self.batch_size, self.n_images)]
            batch = self.split.images.batch(indices), torch.from_numpy(self.split.labels[indices])
            yield (batch[0].pin_memory(), batch[1].pin_memory()) if self.pin_memory else batch

    def order(self) -> npt.NDArray[np.int64]:
        """Return the indices of the images, in the order of the epoch that begins."""
        return np.arange(len(self.split))


class ShuffledBatches(Batches):
    """Training batches, in an order that depends on the seed and the epoch alone.

    Each iteration is one epoch, counted from 0. A last batch of one image is left
    out: batch normalisation over maps of 1 x 1 has no variance there.
    """

    def __init__(
        self, split: PreparedSplit, batch_size: int, seed: int, *, pin_memory: bool = False
    ) -> None:
        """Start at epoch 0; the seed is in [0, 2**32), the rest as for `Batches`."""
        super().__init__(split, batch_size, pin_memory=pin_memory)
        self.seed = seed
        self.epoch = 0
        if self.n_images > batch_size > 1 and self.n_images % batch_size == 1:
            self.n_images -= 1

    def order(self) -> npt.NDArray[np.int64]:
        """Return the permutation of this epoch and move on to the next."""
        order = generator(self.seed, Purpose.FIT, self.epoch).permutation(len(self.split))
        self.epoch += 1
        return order

    @property
    def sampler(self) -> "ShuffledBatches":
        """Where Lightning's loops look for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, so that a fit resumed later goes on in order."""
        self.epoch = epoch


class ImageData(lightning.LightningDataModule):
    """Prepared images for one fit, in seeded order."""

    def __init__(
        self,
        prepared: PreparedData,
        *,
        batch_size: int,
        augment: str,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        eval_batch_size: int = 128,
    ) -> None:
        """Set how to batch, augment and normalise.

        Args:
            prepared: The three splits.
            batch_size: Training images a batch, at least 2.
            augment: What varies the training images, see `augmentation`.
            mean: Three channel means of images in [0, 1].
            std: Three channel standard deviations, above 0.
            seed: Orders the training images, in [0, 2**32). Augmentation draws from
                torch's global generator, which the fit seeds.
            eval_batch_size: Validation and test images a batch, at least 1.
        """
        super().__init__()
        self.prepared = prepared
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.augment = augment
        self._augment = augmentation(augment)
        self._boundary_dtype = torch.float32
        self._normalise = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        )

    def start_behind_prefix(self, train: Images, val: Images, dtype: torch.dtype) -> None:
        """Hand out boundary tensors in place of training and validation images.

        Args:
            train: Of the training images; with ``augment=flip`` a batch is (2, B, ...):
                of the images, and of the mirrored images.
            val: Of the validation images.
            dtype: Of the boundary tensors.
        """
        self.prepared = replace(
            self.prepared,
            train=replace(self.prepared.train, images=train),
            val=replace(self.prepared.val, images=val),
        )
        self._boundary_dtype = dtype

    def train_dataloader(self) -> ShuffledBatches:
        """The training split, shuffled; each call starts at epoch 0."""
        return ShuffledBatches(
            self.prepared.train, self.batch_size, self.seed, pin_memory=self._on_cuda
        )

    def val_dataloader(self) -> Batches:
        """The validation split, in its order."""
        return Batches(self.prepared.val, self.eval_batch_size, pin_memory=self._on_cuda)

    def test_dataloader(self) -> Batches:
        """The test split, in its order."""
        return Batches(self.prepared.test, self.eval_batch_size, pin_memory=self._on_cuda)

    def plain_train_images(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the training images in order: normalised (B, 3, S, S), never augmented."""
        for images, _ in Batches(self.prepared.train, self.eval_batch_size):
            yield self.normalise(images.to(device))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment in training, normalise images always, on the device.

        Args:
            batch: uint8 images (B, 3, S, S), or boundary tensors of any floating-point
                type, and labels (B,).
            dataloader_idx: Lightning's; of no meaning here.

        Returns:
            Images in the trainer's floating-point type, or boundary tensors (B, ...) in
            theirs; and the labels.
        """
        images, labels = batch
        if images.dtype != torch.uint8:
            if self.trainer and self.trainer.training and self.augment == "flip":
                images = _pick_mirrored(*images)
            return images.to(self._boundary_dtype), labels  # Lightning converted them
        if self.trainer and self.trainer.training:
            images = self._augment(images)
        return self.prepare(images), labels

    def prepare(self, images: Tensor) -> Tensor:
        """Turn uint8 images (B, 3, S, S) into what the network takes in this fit."""
        images = self.normalise(images)
        # Lightning converts batches to its precision before its hook, when they were bytes.
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 images (B, 3, S, S) into float32: ``(images / 255 - mean) / std``."""
        normalised: Tensor = self._normalise(images)
        return normalised

    @property
    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def augmentation(name: str) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 images (B, 3, S, S) to varied ones.

    Every image gets its own draw, from torch's global generator.

    Args:
        name: ``none``; ``flip``, left to right with probability 1/2; ``crop_flip``,
            that and a shift of up to S // 8 pixels each way, the edges mirrored;
            ``trivial``, TrivialAugment Wide (Müller & Hutter 2021).
    """
    return {"none": _same, "flip": _flip, "crop_flip": _crop_flip, "trivial": _trivial}[name]


def _same(images: Tensor) -> Tensor:
    return images


def _flip(images: Tensor) -> Tensor:
    return torch.where(_draw_flips(images), v2.functional.horizontal_flip(images), images)


def _draw_flips(images: Tensor) -> Tensor:
    """Draw which of B images are mirrored; returns (B, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5


def _pick_mirrored(plain: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror as `_flip` does, by the same draw, what is there in both variants, (B, ...)."""
    flipped = _draw_flips(plain).reshape(-1, *[1] * (plain.ndim - 1))
    picked = torch.where(flipped, mirrored, plain)
    return picked.contiguous(memory_format=torch.channels_last) if picked.ndim == 4 else picked


def _crop_flip(images: Tensor) -> Tensor:
    """Crop the mirror-padded images at random and flip half of them, in one gather."""
    n, _, side, _ = images.shape
    device, shift = images.device, side // 8
    offsets = torch.randint(-shift, shift + 1, (2, n, 1), device=device)
    flipped = torch.rand(n, 1, device=device) < 0.5
    rows, columns = torch.arange(side, device=device) + offsets  # 2 x (B, S)
    columns = torch.where(flipped, columns.flip(1), columns)
    rows, columns = (side - 1 - (side - 1 - x.abs()).abs() for x in (rows, columns))
    image = torch.arange(n, device=device)[:, None, None]
    nhwc = images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return nhwc.permute(0, 3, 1, 2)  # channels_last


def _trivial(images: Tensor) -> Tensor:
    """Augment image by image: one call of the transform draws once."""
    transform = v2.TrivialAugmentWide()
    augmented = torch.stack([transform(image) for image in images])
    return augmented.contiguous(memory_format=torch.channels_last)


def class_weights(labels: Labels, n_classes: int) -> npt.NDArray[np.float64]:
    """Weigh the classes inversely to how frequent they are.

    Args:
        labels: Shape (N,), each in [0, C).
        n_classes: C.

    Returns:
        Shape (C,): ``N / (C * n_c)`` for a class of n_c images. Averaged over the
        N images they give 1, so that the loss keeps its scale.

    Raises:
        ValueError: If a class has no images.
    """
    counts = np.bincount(labels, minlength=n_classes)
    if counts.min() == 0 or len(counts) > n_classes:
        raise ValueError(f"All of the {n_classes} classes must have images, but got {counts}.")
    weights: npt.NDArray[np.float64] = len(labels) / (n_classes * counts)
    return weights
