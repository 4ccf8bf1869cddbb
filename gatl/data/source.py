"""What a source of labelled images hands over: classes and splits, nothing decoded yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Labels = npt.NDArray[np.int64]
ImageLike = Path | Image.Image | npt.NDArray[np.uint8]
"""A file, opened only when it is decoded; or an image; or an H x W or H x W x 3 array."""


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Labelled images, in a fixed order.

    Attributes:
        images: N images.
        labels: Shape (N,): indices into the source's classes.
        names: N names, unique in the source, by which files list the images.
    """

    images: Sequence[ImageLike]
    labels: Labels
    names: Sequence[str]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def subset(self, indices: npt.NDArray[np.intp]) -> "Split":
        """Return the images at these positions, in this order."""
        chosen = indices.tolist()
        images, names = self.images, self.names
        return Split([images[i] for i in chosen], self.labels[chosen], [names[i] for i in chosen])


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as it is delivered: the splits that it does not have are None."""

    classes: tuple[str, ...]
    train: Split
    val: Split | None = None
    test: Split | None = None


def in_memory(images: npt.NDArray[np.uint8], labels: npt.ArrayLike, prefix: str) -> Split:
    """Make a split of N x H x W (x 3) images; image i is named ``prefix/i``."""
    return Split(
        list(images), np.asarray(labels, np.int64), [f"{prefix}/{i}" for i in range(len(images))]
    )
