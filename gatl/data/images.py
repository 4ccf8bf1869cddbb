"""The images of a run, decoded and resized once, shared by all fits.

Each split becomes one ``.npy`` file that every process maps into its memory, so
that any number of fits share one copy. Images that are too many for that are
streamed: see `fits_in_memory`. Nothing here imports torch until a batch is made.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import psutil

from gatl.data.decode import UndecodableImage, to_rgb
from gatl.data.source import ImageLike, Labels, Source, Split
from gatl.data.splits import complete_splits
from gatl.errors import UserError

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Is told how many images are done, and of how many."""

Digests = npt.NDArray[np.uint64]

_CHUNK = 256
"""Images between two calls of the progress function."""


class Loaded:
    """Images of one size in memory, (N, S, S, 3) uint8."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array

    def __len__(self) -> int:
        """The number of images."""
        return len(self.array)

    def batch(self, indices: npt.NDArray[np.integer]) -> "torch.Tensor":
        """Gather images, as `Decoded.batch` does."""
        return _channels_last(np.take(self.array, indices, axis=0))


class Decoded:
    """Images of one size in a ``.npy`` file, mapped when first read; pickles as its path."""

    def __init__(self, path: Path) -> None:
        """Name the file, which holds (N, S, S, 3) uint8."""
        self.path = path.resolve()

    def __reduce__(self) -> tuple[type["Decoded"], tuple[Path]]:
        """Leave the array behind: the other process maps the file itself."""
        return Decoded, (self.path,)

    @cached_property
    def array(self) -> npt.NDArray[np.uint8]:
        """Shape (N, S, S, 3)."""
        mapped: npt.NDArray[np.uint8] = np.load(self.path, mmap_mode="r")
        return mapped

    def __len__(self) -> int:
        """The number of images."""
        return len(self.array)

    def batch(self, indices: npt.NDArray[np.integer]) -> "torch.Tensor":
        """Gather images.

        Args:
            indices: Shape (B,), each in [0, N).

        Returns:
            Shape (B, 3, S, S), uint8, in channels_last memory format.
        """
        return _channels_last(np.take(self.array, indices, axis=0))


@dataclass(frozen=True, eq=False)
class Streamed:
    """Images that are decoded anew for each batch, in threads."""

    images: Sequence[ImageLike] | Decoded | Loaded
    size: int
    interpolation: str = "bicubic"

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def batch(self, indices: npt.NDArray[np.integer]) -> "torch.Tensor":
        """Decode images.

        Args:
            indices: Shape (B,), each in [0, N).

        Returns:
            Shape (B, 3, S, S), uint8, in channels_last memory format.

        Raises:
            UndecodableImage: If a file was damaged or removed after the run began.
        """
        images = self.images.array if isinstance(self.images, Decoded | Loaded) else self.images
        # A pool a batch costs little beside the decoding, and none has to survive a fork.
        decode = partial(to_rgb, size=self.size, interpolation=self.interpolation)
        with ThreadPoolExecutor(_n_threads()) as pool:
            chosen = [images[i] for i in indices.tolist()]
            return _channels_last(np.stack(list(pool.map(decode, chosen))))


class Images(Protocol):
    """What batches are gathered from."""

    def __len__(self) -> int:
        """The number of images."""

    def batch(self, indices: npt.NDArray[np.integer]) -> "torch.Tensor":
        """Gather images by their indices (B,)."""


@dataclass(frozen=True, eq=False, repr=False)
class PreparedSplit:
    """The images of a split, ready for batches.

    Attributes:
        images: N images.
        labels: Shape (N,).
        names: N names.
        digests: Shape (N,): a hash of the pixels of each, as decoded.
    """

    images: Images
    labels: Labels
    names: tuple[str, ...]
    digests: Digests

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """A hash of all pixels."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


class Skipped(NamedTuple):
    """An image that is left out.

    Attributes:
        split: The split that it would be in.
        label: Its class, an index.
        name: Its name in the source.
        error: Why it cannot be decoded, in one line.
    """

    split: str
    label: int
    name: str
    error: str


@dataclass(frozen=True, eq=False)
class PreparedData:
    """A data set as the fits use it; pickles cheaply.

    Attributes:
        classes: C class names; a label is an index into them.
        train: The training split.
        val: The validation split.
        test: The test split.
        image_size: S, the side of the images in pixels.
        skipped: The images that could not be decoded and are left out.
        features: The folder where the boundary tensors of frozen prefixes are kept,
            see `gatl.features`; None: none are.
        features_bytes: What they may take there.
    """

    classes: tuple[str, ...]
    train: PreparedSplit
    val: PreparedSplit
    test: PreparedSplit
    image_size: int
    skipped: tuple[Skipped, ...]
    features: Path | None = None
    features_bytes: int = 0


def fits_in_memory(n_images: int, image_size: int, folder: Path) -> bool:
    """Whether the decoded images take at most half of the free memory, and of the free disk.

    Args:
        n_images: N, in all splits together; they take 3 * N * S * S bytes.
        image_size: S, in pixels.
        folder: Where the arrays would be written.
    """
    free = min(psutil.virtual_memory().available, shutil.disk_usage(folder).free)
    return bool(3 * n_images * image_size**2 <= free / 2)


def decode_split(
    split: Split,
    image_size: int,
    path: Path,
    *,
    interpolation: str = "bicubic",
    stream: bool = False,
    progress: Progress | None = None,
) -> tuple[PreparedSplit, dict[int, UndecodableImage]]:
    """Decode every image of a split, once.

    Args:
        split: N images.
        image_size: S, in pixels.
        path: The ``.npy`` file to write, which appears only when it is complete.
        interpolation: See `to_rgb`.
        stream: Keep no pixels; only find out which images can be decoded.
        progress: Called now and then, and at the end.

    Returns:
        The decodable images, and why the others are not, by their index.
    """
    decode = partial(to_rgb, size=image_size, interpolation=interpolation)
    if stream:
        digests, bad = _decode_each(split.images, decode, None, progress)
        split = split.subset(_kept(split, bad)) if bad else split
        images: Images = Streamed(_spilled(split.images, path), image_size, interpolation)
    else:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            shape = (len(split), image_size, image_size, 3)
            array = _new_file(Path(folder, "all.npy"), shape)
            digests, bad = _decode_each(split.images, decode, array, progress)
            if bad:
                kept = _kept(split, bad)
                split = split.subset(kept)
                fewer = _new_file(Path(folder, "kept.npy"), (len(split), *shape[1:]))
                for new, old in enumerate(kept):
                    fewer[new] = array[old]
                array = fewer
            array.flush()
            Path(str(array.filename)).replace(path)
        images = Decoded(path)
    digests = np.delete(digests, list(bad))
    return PreparedSplit(images, split.labels, tuple(split.names), digests), bad


def prepare(
    source: Source,
    *,
    image_size: int,
    split_seed: int,
    max_bad: float,
    folder: Path,
    interpolation: str = "bicubic",
    progress: Progress | None = None,
) -> PreparedData:
    """Complete the splits of a source and decode its images.

    Images that cannot be decoded are left out, with their labels, and listed.

    Args:
        source: Images with a training split at least.
        image_size: S, in pixels, at least 1.
        split_seed: In [0, 2**32), see `complete_splits`.
        max_bad: In [0, 1]; the share of undecodable images, of any class and of
            all images, above which the run stops.
        folder: An existing folder, where ``train.npy``, ``val.npy`` and
            ``test.npy`` are written. It must outlive the result.
        interpolation: See `to_rgb`.
        progress: Told how many images are decoded.

    Returns:
        Three splits, ready for batches.

    Raises:
        UserError: If the source cannot be split, or too many images are bad.
    """
    source = complete_splits(source, split_seed)
    splits = {"train": source.train, "val": source.val, "test": source.test}
    given = {name: split for name, split in splits.items() if split is not None}
    total = sum(len(split) for split in given.values())
    stream = not fits_in_memory(total, image_size, folder)
    prepared: dict[str, PreparedSplit] = {}
    skipped: list[Skipped] = []
    done = 0
    for name, split in given.items():
        prepared[name], bad = decode_split(
            split,
            image_size,
            folder / f"{name}.npy",
            interpolation=interpolation,
            stream=stream,
            progress=partial(_report, progress, done, total) if progress else None,
        )
        skipped += [
            Skipped(name, int(split.labels[i]), split.names[i], str(error))
            for i, error in bad.items()
        ]
        done += len(split)
    labels = np.concatenate([split.labels for split in given.values()])
    _check_bad(source.classes, labels, skipped, max_bad)
    for name, ready in prepared.items():
        n_left = len(np.unique(ready.labels))
        if n_left < (len(source.classes) if name == "train" else 1):
            first = next(image for image in skipped if image.split == name)
            raise UserError(
                f"Too many images of the {name} split cannot be decoded; the first: {first.error}."
            )
    return PreparedData(
        classes=source.classes,
        train=prepared["train"],
        val=prepared["val"],
        test=prepared["test"],
        image_size=image_size,
        skipped=tuple(skipped),
    )


def describe(prepared: PreparedData) -> str:
    """Say in one line what there is to learn from, and how unequal the classes are."""
    counts = np.bincount(prepared.train.labels, minlength=len(prepared.classes))
    imbalance = counts.max() / counts.min()
    parts = [
        f"{len(prepared.classes)} classes",
        *(f"{name} {len(getattr(prepared, name))}" for name in ("train", "val", "test")),
        f"{prepared.image_size} px",
        "balanced" if imbalance < 1.05 else f"largest class {imbalance:.1f} times the smallest",
    ]
    if imbalance > 3:
        parts[-1] += " (data.class_weights=true makes them count alike)"
    if prepared.skipped:
        parts.append(f"{len(prepared.skipped)} undecodable left out")
    if isinstance(prepared.train.images, Streamed):
        parts.append("streamed: more than half of the free memory or disk")
    return " · ".join(parts)


def _channels_last(images: npt.NDArray[np.uint8]) -> "torch.Tensor":
    """View (B, S, S, 3) as (B, 3, S, S) without a copy."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _n_threads() -> int:
    """The cores that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _report(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _decode_each(
    images: Sequence[ImageLike],
    decode: Callable[[ImageLike], npt.NDArray[np.uint8]],
    into: npt.NDArray[np.uint8] | None,
    progress: Progress | None,
) -> tuple[Digests, dict[int, UndecodableImage]]:
    """Decode images in threads; return their digests, and those that cannot be, by index."""
    digests = np.zeros(len(images), np.uint64)

    def decode_into(i: int) -> UndecodableImage | None:
        try:
            pixels = decode(images[i])
        except UndecodableImage as error:
            return error
        digests[i] = int.from_bytes(hashlib.blake2b(pixels.data, digest_size=8).digest(), "big")
        if into is not None:
            into[i] = pixels
        return None

    bad: dict[int, UndecodableImage] = {}
    with ThreadPoolExecutor(_n_threads()) as pool:
        # In chunks, so that Ctrl-C waits for one chunk only.
        for start in range(0, len(images), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(images)))
            errors = pool.map(decode_into, chunk)
            bad |= {i: error for i, error in zip(chunk, errors, strict=True) if error}
            if progress:
                progress(chunk.stop, len(images))
    return digests, bad


def _kept(split: Split, bad: Collection[int]) -> npt.NDArray[np.intp]:
    """The indices of the images that are not bad."""
    return np.setdiff1d(np.arange(len(split)), list(bad))


def _new_file(
    path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike = np.uint8
) -> np.memmap[Any, Any]:
    """Make an array in a file.

    Raises:
        OSError: If there is no room for it.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # Without room of its own, writing to it would be a signal that kills, once the disk is full.
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _spilled(images: Sequence[ImageLike], path: Path) -> Sequence[ImageLike] | Decoded:
    """Move arrays of one shape into a file, so that they need not be pickled."""
    arrays = [image for image in images if isinstance(image, np.ndarray)]
    if len(arrays) < len(images) or len({array.shape for array in arrays}) != 1:
        return images
    stacked = np.stack(arrays)
    _new_file(path, stacked.shape, stacked.dtype)[:] = stacked
    return Decoded(path)


def _check_bad(
    classes: Sequence[str], labels: Labels, skipped: Sequence[Skipped], max_bad: float
) -> None:
    """Raise if more than the allowed share of a class or of all images is bad."""
    groups = [("the data set", len(labels), list(skipped))]
    for index, name in enumerate(classes):
        of_class = [image for image in skipped if image.label == index]
        groups.append((f"class {name!r}", int((labels == index).sum()), of_class))
    for what, n, bad in groups:
        if len(bad) > max_bad * n + 1e-9:  # 0.29 of 100 is less than 29, in floats
            raise UserError(
                f"{len(bad)} of the {n} images of {what} cannot be decoded, but data.max_bad="
                f"{max_bad:g} allows {100 * max_bad:.3g}%; the first: {bad[0].error}."
            )
