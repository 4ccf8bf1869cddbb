"""Oxford 102 Flowers (Nilsback & Zisserman 2008), by torchvision."""

from pathlib import Path

import numpy as np

from gatl.data.download import torchvision_dataset
from gatl.data.source import Source, Split
from gatl.errors import UserError


def load(root: str) -> Source:
    """Download the flowers on first use (about 350 MB) and list them.

    Args:
        root: The files are in, or go to, its subfolder ``flowers-102``.

    Returns:
        The official splits: 1,020 train, 1,020 val and 6,149 test images.

    Raises:
        UserError: If the files cannot be had.
    """
    path = Path(root).expanduser()
    with torchvision_dataset("Oxford 102 Flowers", path / "flowers-102"):
        from torchvision.datasets import Flowers102

        # The loader returns the path itself: the image is decoded later, and once.
        splits = {
            name: list(Flowers102(path, split=name, download=True, loader=Path))
            for name in ("train", "val", "test")
        }
    missing = [path for pairs in splits.values() for path, _ in pairs if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} images of Oxford 102 Flowers are missing, {missing[0]} for one: "
            f"delete {path / 'flowers-102'} to download them again."
        )
    return Source(
        tuple(Flowers102.classes), **{name: _split(pairs) for name, pairs in splits.items()}
    )


def _split(pairs: list[tuple[Path, int]]) -> Split:
    images = [path for path, _ in pairs]
    labels = np.array([label for _, label in pairs], np.int64)
    return Split(images, labels, [path.name for path in images])
