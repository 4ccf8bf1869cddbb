"""Every kind of image becomes correct RGB: pixel values, not only shapes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from gatl.data.decode import UndecodableImage, to_rgb

SIDE = 32
COLOURS = {"red": (200, 30, 40), "green": (20, 180, 60), "blue": (40, 50, 210), "grey": (120,) * 3}


def quadrants(side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Red and green over blue and grey: no flip or rotation leaves it as it is."""
    half = np.ones((side // 2, side // 2, 1), np.uint8)
    red, green, blue, grey = (half * np.array(c, np.uint8) for c in COLOURS.values())
    return np.vstack([np.hstack([red, green]), np.hstack([blue, grey])])


def off_by(a: npt.NDArray[np.uint8], b: npt.NDArray[np.generic]) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_array_of_the_right_size_is_unchanged() -> None:
    assert np.array_equal(to_rgb(quadrants(), SIDE), quadrants())
    grey = quadrants()[..., 0]
    assert np.array_equal(to_rgb(grey, SIDE), np.stack([grey] * 3, 2))
    assert np.array_equal(to_rgb(Image.fromarray(quadrants()), SIDE), quadrants())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that is its inverse
    upright = Image.fromarray(quadrants())
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", stored, exif=exif)
    assert np.array_equal(to_rgb(path, SIDE), quadrants())
    jpeg = save(tmp_path / "a.jpg", stored, exif=exif, quality=100, subsampling=0)
    assert off_by(to_rgb(jpeg, SIDE), quadrants()) <= 6


def test_palette_and_grey_and_bilevel(tmp_path: Path) -> None:
    image = Image.fromarray(quadrants())
    palette = save(tmp_path / "p.png", image.quantize(4))
    with Image.open(palette) as stored:
        assert stored.mode == "P"
    assert off_by(to_rgb(palette, SIDE), quadrants()) <= 2
    grey = save(tmp_path / "g.png", image.convert("L"))
    assert np.array_equal(to_rgb(grey, SIDE)[..., 1], np.asarray(image.convert("L")))
    bilevel = save(tmp_path / "1.png", Image.fromarray(quadrants()[..., 0] > 100))
    assert set(to_rgb(bilevel, SIDE).ravel().tolist()) == {0, 255}


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    alpha = np.repeat(np.array([0, 64, 128, 255], np.uint8), SIDE // 4)[None].repeat(SIDE, 0)
    share = alpha[..., None] / 255
    rgba = np.dstack([quadrants(), alpha])
    expected = quadrants() * share + 255 * (1 - share)
    for name in ("rgba.png", "rgba.tif", "rgba.webp"):
        path = save(tmp_path / name, Image.fromarray(rgba), lossless=True)
        assert off_by(to_rgb(path, SIDE), expected) <= 1, name
    la = save(tmp_path / "la.png", Image.fromarray(np.dstack([quadrants()[..., 0], alpha]), "LA"))
    assert off_by(to_rgb(la, SIDE)[..., :1], expected[..., :1]) <= 1


def test_transparent_palette_entry_and_colour_key_are_white(tmp_path: Path) -> None:
    indices = np.repeat([[0, 1]], SIDE, 0).repeat(SIDE // 2, 1).astype(np.uint8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    keyed = Image.fromarray(np.where(indices[..., None], [40, 50, 60], [10, 20, 30]).astype("u1"))
    for path in (
        save(tmp_path / "p.png", palette, transparency=0),
        save(tmp_path / "p.gif", palette, transparency=0),
        save(tmp_path / "rgb.png", keyed, transparency=(10, 20, 30)),
    ):
        pixels = to_rgb(path, SIDE)
        assert (pixels[:, : SIDE // 2] == 255).all(), path.name
        assert (pixels[:, SIDE // 2 :] == [40, 50, 60]).all(), path.name


def test_cmyk_also_as_adobe_stores_it(tmp_path: Path) -> None:
    cmyk = Image.fromarray(quadrants()).convert("CMYK")
    tiff = save(tmp_path / "c.tif", cmyk)
    assert off_by(to_rgb(tiff, SIDE), quadrants()) <= 1
    # Pillow writes JPEG as Adobe does, inverted and with its marker.
    jpeg = save(tmp_path / "c.jpg", cmyk, quality=100, subsampling=0)
    assert b"Adobe" in jpeg.read_bytes()
    assert off_by(to_rgb(jpeg, SIDE), quadrants()) <= 8


def test_sixteen_bits_and_floats(tmp_path: Path) -> None:
    grey = quadrants()[..., 0].astype(np.float64)
    expected = np.stack([grey] * 3, 2)
    deep = save(tmp_path / "16.png", Image.fromarray((grey * 257).astype(np.uint16)))
    with Image.open(deep) as stored:
        assert stored.mode.startswith("I")
    assert np.array_equal(to_rgb(deep, SIDE), expected)
    tiff = save(tmp_path / "16.tif", Image.fromarray((grey * 257 + 128).astype(np.uint16)))
    assert np.array_equal(to_rgb(tiff, SIDE), expected)
    assert np.array_equal(to_rgb(Image.fromarray((grey * 257).astype(np.int32)), SIDE), expected)
    for scale, name in ((1 / 255, "unit"), (1.0, "bytes")):
        path = save(tmp_path / f"{name}.tif", Image.fromarray((grey * scale).astype(np.float32)))
        assert np.array_equal(to_rgb(path, SIDE), expected), name
    stretched = to_rgb(Image.fromarray((grey * 9 - 700).astype(np.float32)), SIDE)
    assert stretched.min() == 0
    assert stretched.max() == 255
    constant = Image.fromarray(np.full((4, 4), 1e6, np.float32))
    assert (to_rgb(constant, 4) == 0).all()


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    """Written by hand, because Pillow cannot: a PNG of 16 bits a channel."""
    import struct
    import zlib

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in quadrants() * np.uint16(257))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    path = tmp_path / "48.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )
    assert np.array_equal(to_rgb(path, SIDE), quadrants())


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    for name in ("a.gif", "a.png", "a.webp"):
        path = save(
            tmp_path / name, frames[0], save_all=True, append_images=frames[1:], lossless=True
        )
        assert (to_rgb(path, SIDE) == [200, 0, 0]).all(), name


def test_centre_crop_and_scale_as_pillow_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8)).resize(
        (500, 300), Image.Resampling.BICUBIC
    )
    expected = np.asarray(ImageOps.fit(smooth, (24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(to_rgb(save(tmp_path / "a.png", smooth), 24), expected)
    jpeg = save(tmp_path / "a.jpg", smooth, quality=95)
    assert np.abs(to_rgb(jpeg, 24).astype(int) - expected).mean() < 2  # scaled by libjpeg first
    assert to_rgb(np.zeros((1, 1), np.uint8), 24).shape == (24, 24, 3)


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "missing", "broken"])
def test_undecodable_names_the_file_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.jpg"
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG" if kind == "broken" else "JPEG")
    data = bytearray(buffer.getvalue())
    data[100:140] = bytes(40) if kind == "broken" else data[100:140]
    if kind != "missing":
        half = bytes(data[: len(data) // 2])
        path.write_bytes({"text": b"hello", "empty": b"", "broken": bytes(data)}.get(kind, half))
    with pytest.raises(UndecodableImage, match=r"bad\.jpg cannot be decoded: .+") as caught:
        to_rgb(path, SIDE)
    assert "\n" not in str(caught.value)
