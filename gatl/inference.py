"""The final model in use: images as they are in, labels and probabilities out."""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor, nn

from gatl.classifier import Classifier
from gatl.data.decode import to_rgb
from gatl.errors import UserError
from gatl.files import checkpoint_in
from gatl.trust import whole, words_of

MAX_SIZE = 4096
"""Of ``data.image_size``, so of a sound checkpoint's images."""

Pixels = npt.NDArray[np.uint8]


class Probabilities(nn.Module):
    """A final network with what stands in front of it and behind it.

    Shapes: B images of S by S pixels, K classes.

    Args:
        network: Of the classifier; maps normalised images (B, 3, S, S) to logits (B, K).
        mean: Three channel means of images in [0, 1].
        std: Three channel standard deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map RGB pixels (B, S, S, 3), uint8, to probabilities (B, K), float32."""
        x = images.movedim(3, 1).float() / 255
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits.softmax(1)


class Model:
    """A final model; `load` makes it.

    It lies on the accelerator, if there is one, and computes in float32.

    Attributes:
        classes: K class names, in the order of the probabilities.
        image_size: S, the side in pixels of what the network sees.
        interpolation: The filter by which images are scaled to it.
        network: From pixels to probabilities, in eval mode.
    """

    def __init__(self, classifier: Classifier) -> None:
        """Take a classifier over, with what it says of its classes and its preprocessing.

        Raises:
            ValueError: If that makes no sense.
        """
        self.classes: tuple[str, ...] = classifier.classes
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError("its classes are no names")
        known = dict(classifier.hparams["preprocessing"])
        self.image_size, self.interpolation = known["image_size"], known["interpolation"]
        if not (isinstance(self.image_size, int) and 1 <= self.image_size <= MAX_SIZE):
            raise ValueError(f"its images have {self.image_size!r} pixels a side")
        if str(self.interpolation).upper() not in PIL.Image.Resampling.__members__:
            raise ValueError(f"its images are scaled by {self.interpolation!r}")
        mean, std = ([float(value) for value in known[name]] for name in ("mean", "std"))
        if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and all(std)):
            raise ValueError(f"its images are normalised by {mean} and {std}")
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.network = Probabilities(classifier.network, mean, std).eval().to(gpu or "cpu")

    def __call__(self, image: str | Path | PIL.Image.Image | Tensor) -> tuple[str, float]:
        """Classify one image.

        Args:
            image: See `pixels`.

        Returns:
            The most probable class, and its probability.

        Raises:
            TypeError, ValueError: See `pixels`.
        """
        probabilities = self.probabilities([self.pixels(image)])[0]
        best = int(probabilities.argmax())
        return self.classes[best], float(probabilities[best])

    def pixels(self, image: str | Path | PIL.Image.Image | Tensor) -> Pixels:
        """Prepare one image exactly as those of the training were: see `to_rgb`.

        Args:
            image: A file; or an image of Pillow's; or an RGB tensor (3, H, W) of any
                size, either uint8 in [0, 255], or floating-point in [0, 1], as
                torchvision's ``to_tensor`` gives it, which is rounded to 8 bits. A
                tensor is neither scaled nor normalised before: that happens here.

        Returns:
            Shape (S, S, 3), RGB in [0, 255].

        Raises:
            TypeError: If it is none of these.
            ValueError: If a tensor has another shape or other values; or, as its
                subclass `UndecodableImage`, if the image cannot be read.
        """
        match image:
            case Tensor():
                found: Any = PIL.Image.fromarray(_bytes(image))
            case str() | Path():
                found = Path(image)
            case PIL.Image.Image():
                found = image
            case _:
                raise TypeError(
                    "An image must be a path, an image of Pillow's or a tensor (3, H, W), but got "
                    f"{type(image).__name__}; of an array, PIL.Image.fromarray makes an image."
                )
        return to_rgb(found, self.image_size, self.interpolation)

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """Return the probabilities of all classes.

        Args:
            images: B of what `pixels` returns, B at least 1.

        Returns:
            Shape (B, K); each row adds up to 1.
        """
        batch = torch.from_numpy(np.stack(images)).to(self.network.mean.device)
        found: npt.NDArray[np.float32] = self.network(batch).cpu().numpy()
        return found


def load(run: str | Path, *, trust: str = "") -> Model:
    """Load the final model of a run; nothing that lies there is run.

    Args:
        run: The run folder, or a checkpoint such as its ``best.ckpt``; ``~`` is the home
            folder.
        trust: ``NAME,NAME``: functions that are not gatl's own, which the checkpoint may
            call to build its network.

    Returns:
        The model; ``label, probability = model("photo.jpg")``.

    Raises:
        UserError: If there is no final model, if it is damaged, or if its network is built
            by a function that is not trusted.
    """
    path = checkpoint_in(run)
    trusted, _ = words_of([f"trust={trust}"])
    try:
        with whole(path):
            return Model(Classifier.load_from_checkpoint(path, map_location="cpu", trusted=trusted))
    except UserError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):  # torch would advise to run it
            raise UserError(f"{path} is no checkpoint by gatl, or holds more than data.") from error
        raise


def _bytes(image: Tensor) -> Pixels:
    """Return an RGB tensor (3, H, W) as an array (H, W, 3), see `Model.pixels`."""
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"A tensor must be one RGB image (3, H, W), but got {(*image.shape,)}.")
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # NaN is in no range
            raise ValueError(
                "A floating-point tensor must be in [0, 1] and not normalised, but its values are "
                f"in [{low:g}, {high:g}]."
            )
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise TypeError(f"A tensor must be uint8 or floating-point, but got {image.dtype}.")
    return image.permute(1, 2, 0).contiguous().numpy()
