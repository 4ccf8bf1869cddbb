"""Fashion-MNIST (Xiao et al. 2017), by torchvision: 70,000 grey images of 28 x 28 pixels."""

from pathlib import Path

from gatl.data.download import torchvision_dataset
from gatl.data.source import Source, in_memory


def load(root: str) -> Source:
    """Download Fashion-MNIST on first use (about 30 MB) and read it.

    Args:
        root: The files are in, or go to, its subfolder ``FashionMNIST/raw``.

    Returns:
        The official splits: 60,000 train and 10,000 test images.

    Raises:
        UserError: If the files cannot be had.
    """
    path = Path(root).expanduser()
    with torchvision_dataset("Fashion-MNIST", path / "FashionMNIST" / "raw"):
        from torchvision.datasets import FashionMNIST

        train, test = (
            FashionMNIST(path, train=is_train, download=True) for is_train in (True, False)
        )
    return Source(
        tuple(FashionMNIST.classes),
        train=in_memory(train.data.numpy(), train.targets, "train"),
        test=in_memory(test.data.numpy(), test.targets, "test"),
    )
