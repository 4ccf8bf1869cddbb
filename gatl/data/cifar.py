"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), by torchvision: 60,000 images of 32 x 32 pixels."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatl.data.download import torchvision_dataset
from gatl.data.source import Source, Split, in_memory
from gatl.errors import UserError

_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # of bytes, in pickles of Python 3 that Python 2 can read
}


class _Plain(pickle.Unpickler):
    """Reads pickles of arrays and plain data, as the authors' are; runs nothing."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - the base class's type
        """Return one of the few things that arrays are made with."""
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)


def load(root: str, n_classes: int) -> Source:
    """Download CIFAR on first use (about 170 MB) and read it.

    Args:
        root: The files are in, or go to, its subfolder ``cifar-10-batches-py`` or
            ``cifar-100-python``.
        n_classes: 10 or 100.

    Returns:
        The official splits: 50,000 train and 10,000 test images.

    Raises:
        UserError: If the files cannot be had, or there is no such CIFAR.
    """
    if n_classes not in (10, 100):
        raise UserError(f"data.source.n_classes must be 10 or 100, but got {n_classes!r}.")
    path = Path(root).expanduser()
    with torchvision_dataset(f"CIFAR-{n_classes}", path):
        from torchvision.datasets import CIFAR10, CIFAR100
        from torchvision.datasets.utils import check_integrity

        kind = {10: CIFAR10, 100: CIFAR100}[n_classes]
        # Made without its constructor, which would unpickle whatever lies there.
        files = kind.__new__(kind)
        files.root = path
        files.download()
        folder = path / kind.base_folder
        meta = folder / kind.meta["filename"]
        if not (files._check_integrity() and check_integrity(meta, kind.meta["md5"])):
            raise RuntimeError("not all files are as they were published")
        classes = _read(meta)[kind.meta["key"]]
        return Source(
            tuple(classes),
            train=_split([_read(folder / name) for name, _ in kind.train_list], "train"),
            test=_split([_read(folder / name) for name, _ in kind.test_list], "test"),
        )


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content: dict[str, Any] = _Plain(file, encoding="latin1").load()
    return content


def _split(batches: Sequence[dict[str, Any]], name: str) -> Split:
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate(
        [batch["labels" if "labels" in batch else "fine_labels"] for batch in batches]
    )
    return in_memory(images.transpose(0, 2, 3, 1), labels, name)
