"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), by torchvision: 60,000 images of 32 x 32 pixels."""

from pathlib import Path

from gatl.data.download import torchvision_dataset
from gatl.data.source import Source, in_memory


def load(root: str, n_classes: int) -> Source:
    """Download CIFAR on first use (about 170 MB) and read it.

    Args:
        root: The files are in, or go to, its subfolder ``cifar-10-batches-py`` or
            ``cifar-100-python``.
        n_classes: 10 or 100.

    Returns:
        The official splits: 50,000 train and 10,000 test images.

    Raises:
        UserError: If the files cannot be had.
    """
    path = Path(root).expanduser()
    with torchvision_dataset(f"CIFAR-{n_classes}", path):
        from torchvision.datasets import CIFAR10, CIFAR100

        dataset = {10: CIFAR10, 100: CIFAR100}[n_classes]
        train, test = (dataset(path, train=is_train, download=True) for is_train in (True, False))
    return Source(
        tuple(train.classes),
        train=in_memory(train.data, train.targets, "train"),
        test=in_memory(test.data, test.targets, "test"),
    )
