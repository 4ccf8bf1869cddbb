"""Decodes one image of any kind into square 8-bit RGB."""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from gatl.data.source import ImageLike

# What Pillow's plugins raise for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    Image.DecompressionBombError,
)


class UndecodableImage(ValueError):
    """An image that cannot be read; its one-line message names the image."""


def to_rgb(image: ImageLike, size: int, interpolation: str = "bicubic") -> npt.NDArray[np.uint8]:
    """Decode an image, turn it upright, scale it and cut out its centre.

    The shorter side is scaled to ``size`` (antialiased) and the longer
    one cropped about its centre. Transparency is laid over white. Of an animation
    the first frame is taken. 16-bit grey values are divided by 257, since 65535
    is white. Floating-point files have no agreed range: pixels in [0, 1] are
    multiplied by 255, in [0, 255] kept, and others, like 32-bit integers beyond
    16 bits, stretched from their minimum to their maximum.

    Args:
        image: A file, an image, or an array, see `ImageLike`.
        size: S, the side of the result in pixels.
        interpolation: The name of one of Pillow's filters, such as ``bilinear``.

    Returns:
        Shape (S, S, 3), RGB in [0, 255].

    Raises:
        UndecodableImage: If the image cannot be read.
    """
    try:
        if isinstance(image, Path):
            with Image.open(image) as opened:
                # Lets libjpeg scale by 1/2, 1/4 or 1/8 where it decodes: several times
                # faster, and twice the size is left for the filter to work on.
                opened.draft(None, (2 * size, 2 * size))
                return _square(opened, size, interpolation)
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return _square(image, size, interpolation)
    except _DAMAGE as error:
        name = image if isinstance(image, Path) else f"an image of {type(image).__name__}"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image file"
        raise UndecodableImage(f"{name} cannot be decoded: {reason}") from error


def _square(image: Image.Image, size: int, interpolation: str) -> npt.NDArray[np.uint8]:
    upright = ImageOps.exif_transpose(image)
    resampling = Image.Resampling[interpolation.upper()]
    fitted = ImageOps.fit(_rgb(upright), (size, size), resampling)
    return np.asarray(fitted)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Scale the pixels of the modes I;16, I and F, see `to_rgb`."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
    low, high = pixels.min(), pixels.max()
    white = {"F": 1.0 if high <= 1 else 255.0}.get(image.mode, 65535.0)
    if low < 0 or high > white:
        pixels, white = pixels - low, (high - low) or 1.0
    return np.rint(pixels * (255 / white)).astype(np.uint8)
