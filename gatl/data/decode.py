"""Decodes one image of any kind into square 8-bit RGB."""

import functools
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from gatl.data.source import ImageLike
from gatl.errors import UserError, printable
from gatl.files import is_passing

FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
"""Formats for pictures; Pillow also reads documents, by another program, icons, fonts and films."""

UNREAD = {".heic", ".heif", ".jxl"}
"""Endings of pictures of other formats: who has them expects them to be read, or to be told."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit, for a JPEG as well: 0.7 GB in each thread that decodes."""
COSTLY = 4
"""So many times fewer may be those that take more: transparent, of 16 bits or more, of floats."""

_JPEG = b"\xff\xd8\xff"


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

    A file is refused by its header if it would be more than `MAX_PIXELS` when it is
    decoded, see `COSTLY`; a JPEG may be larger, since libjpeg scales it down, to no less than
    an eighth.

    Args:
        image: A file of one of `FORMATS`, an image, or an array, see `ImageLike`.
        size: S, the side of the result in pixels.
        interpolation: The name of one of Pillow's filters, such as ``bilinear``.

    Returns:
        Shape (S, S, 3), RGB in [0, 255].

    Raises:
        UndecodableImage: If the image cannot be read.
        UserError: If that is no fault of the image: for want of memory, say.
    """
    name = image if isinstance(image, Path) else f"an image of {type(image).__name__}"
    try:
        if isinstance(image, Path):
            with _opened(image) as opened:
                _draft(opened, 2 * size)  # twice the size is left for the filter to work on
                ImageOps.exif_transpose(opened, in_place=True)
                return _square(opened, size, interpolation)
        if isinstance(image, np.ndarray):
            return _square(Image.fromarray(image), size, interpolation)
        return _square(ImageOps.exif_transpose(image), size, interpolation)
    except Exception as error:  # what Pillow's plugins raise for damaged files has no end
        if is_passing(error):
            reason = getattr(error, "strerror", None) or "there is not enough memory"
            raise UserError(
                f"{name} cannot be read now ({reason}): when that has passed, try again."
            ) from error
        raise UndecodableImage(
            printable(f"{name} cannot be decoded: {_reason(image, error)}")
        ) from error


def _reason(image: ImageLike, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the file's name, which stands in front of it
    if isinstance(image, Path) and image.suffix.lower() in UNREAD:
        return "of a format that gatl does not read; save it as JPEG or PNG"
    if isinstance(error, UnidentifiedImageError):
        return "not an image file"
    return (str(error).splitlines() or [type(error).__name__])[0]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow can read."""
    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))


def _opened(path: Path) -> Image.Image:
    """Open an image file; decode nothing yet."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")  # whoever opens a pipe waits
    try:
        return Image.open(path, formats=_formats())
    except Image.DecompressionBombError:
        with path.open("rb") as file:
            if file.read(len(_JPEG)) != _JPEG:
                raise
        return JpegImageFile(path)  # what counts is the size to which libjpeg scales it


def _draft(image: Image.Image, size: int) -> None:
    """Let libjpeg scale by 1/2, 1/4 or 1/8 where it decodes, several times faster.

    Raises:
        DecompressionBombError: If that would still take too much memory.
    """
    width, height = image.size
    image.draft(None, (size, size))
    if "progressive" not in image.info:  # else libjpeg keeps the whole, however small it scales
        width, height = image.size
    costly = image.has_transparency_data or image.mode[0] in "FI"  # F, I and I;16
    limit = MAX_PIXELS // COSTLY if costly else MAX_PIXELS
    if width * height > limit:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels are more than the {limit} that can be decoded"
        )


def _square(image: Image.Image, size: int, interpolation: str) -> npt.NDArray[np.uint8]:
    resampling = Image.Resampling[interpolation.upper()]
    fitted = ImageOps.fit(_rgb(image), (size, size), resampling)
    return np.asarray(fitted)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Scale the pixels of the modes I;16, I and F, see `to_rgb`."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float32), copy=False)
    low, high = pixels.min(), pixels.max()
    white = {"F": 1.0 if high <= 1 else 255.0}.get(image.mode, 65535.0)
    if low < 0 or high > white:
        pixels, white = pixels - low, (high - low) or 1.0
    pixels *= 255 / white
    return np.rint(pixels, out=pixels).astype(np.uint8)
