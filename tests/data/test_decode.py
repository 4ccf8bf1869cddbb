"""Every kind of image becomes correct RGB: pixel values, not only shapes."""

import contextlib
import errno
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from gatl.data.decode import UndecodableImage, to_rgb
from gatl.errors import UserError, printable

SIDE = 32
COLOURS = {"red": (200, 30, 40), "green": (20, 180, 60), "blue": (40, 50, 210), "grey": (120,) * 3}


def quadrants(side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Red and green over blue and grey: no flip or rotation leaves it as it is."""
    half = np.ones((side // 2, side // 2, 1), np.uint8)
    red, green, blue, grey = (half * np.array(c, np.uint8) for c in COLOURS.values())
    return np.vstack([np.hstack([red, green]), np.hstack([blue, grey])])


def off_by(a: npt.NDArray[np.uint8], b: npt.NDArray[np.generic]) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, os.strerror(errno.EMFILE)), OSError(5, "I/O")]
)
def test_a_fault_that_passes_does_not_make_an_image_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(quadrants()))

    def fail(*args: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"a\.png cannot be read .*try again") as caught:
        to_rgb(path, SIDE)
    assert not isinstance(caught.value, UndecodableImage)


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


FORMATS = ("jpg", "png", "gif", "bmp", "tif", "webp", "ppm", "jp2", "avif")


def noise(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    name = {"jpg": "jpeg", "tif": "tiff", "jp2": "jpeg2000"}.get(kind, kind)
    Image.fromarray(pixels).save(buffer, name)
    return buffer.getvalue()


def reason(path: Path, size: int = SIDE) -> str:
    with pytest.raises(UndecodableImage) as caught:
        to_rgb(path, size)
    message = str(caught.value)
    assert message.isprintable()
    start = f"{printable(path)} cannot be decoded: "
    assert message.startswith(start)
    return message.removeprefix(start)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's: a run silences them
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_undecodable(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(noise(kind))
    assert to_rgb(path, SIDE).shape == (SIDE, SIDE, 3)
    for n_bytes in (1, 20, 100, len(noise(kind)) // 2):
        path.write_bytes(noise(kind)[:n_bytes])
        assert reason(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's: a run silences them
@pytest.mark.parametrize("kind", FORMATS)
def test_damage_anywhere_is_an_undecodable_image_or_some_image(tmp_path: Path, kind: str) -> None:
    rng, path = np.random.default_rng(0), tmp_path / f"a.{kind}"
    for _ in range(40):
        data = np.frombuffer(noise(kind), np.uint8).copy()
        reach = int(rng.choice([32, 200, len(data)]))  # headers are where the traps are
        data[rng.integers(0, reach, rng.integers(1, 8))] = rng.integers(0, 256)
        path.write_bytes(data.tobytes())
        with contextlib.suppress(UndecodableImage):
            assert to_rgb(path, 8).shape == (8, 8, 3)


def test_broken_pixels_are_undecodable(tmp_path: Path) -> None:
    data = bytearray(noise("png"))
    data[100:140] = bytes(40)
    (tmp_path / "a.png").write_bytes(data)
    assert "broken" in reason(tmp_path / "a.png")


NO_IMAGE = "not an image file"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", NO_IMAGE),
        (b"hello", NO_IMAGE),
        (b"PK\3\4 an archive", NO_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", NO_IMAGE),
        (b"P6\n0 0\n255\n", NO_IMAGE),
        (b"GIF89a" + bytes(7), NO_IMAGE),
    ],
    ids=["empty", "text", "zip", "postscript", "zero-sized", "zero-sized-gif"],
)
def test_what_is_no_image_says_so(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    assert reason(path) == said


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert reason(tmp_path / "missing.jpg") == "No such file or directory"
    assert reason(tmp_path / "gone.jpg") == "No such file or directory"
    assert reason(tmp_path / "loop.jpg") == "Too many levels of symbolic links"


@pytest.mark.parametrize("name", ["pipe.jpg", "zeros.jpg", "folder.jpg"])
def test_what_is_no_file_is_never_opened(tmp_path: Path, name: str) -> None:
    """Whoever opens a pipe waits for ever, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path / name) == "not a regular file"


@pytest.mark.parametrize(
    "name", ["a b.png", "'a' \"b\".png", "[red]a[bold].png", "ü 🐈.png", "a\nb\x1b[2J\u202e.png"]
)
def test_any_name_is_read_and_printed_in_one_line(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, Image.fromarray(quadrants()))
    assert np.array_equal(to_rgb(path, SIDE), quadrants())
    path.write_bytes(b"no image")
    assert reason(path) == NO_IMAGE


def test_a_file_that_may_not_be_read_says_so(readable_folder: Path, unprivileged: Any) -> None:
    path = save(readable_folder / "secret.png", Image.fromarray(quadrants()))
    path.chmod(0)
    with unprivileged():
        assert reason(path) == "Permission denied"


# Large images


def png_header(side: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def resize_jpeg(data: bytes, side: int) -> bytes:
    """Let the header of a JPEG say another size; its pixels end early then."""
    start = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: start + 5] + struct.pack(">HH", side, side) + data[start + 9 :]


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    pixels = zlib.compress(bytes(10**6))  # of rows that would be 1.2 GB
    chunk = struct.pack(">I", len(pixels)) + b"IDAT" + pixels
    (tmp_path / "a.png").write_bytes(png_header(20_000) + chunk)
    assert "400000000 pixels" in reason(tmp_path / "a.png")
    (tmp_path / "a.jpg").write_bytes(resize_jpeg(noise("jpg"), 65_000))
    for size, side in {4096: 16_250, 8192: 32_500}.items():  # a quarter, a half
        said = f"{side} x {side} pixels are more than the 178956970 that can be decoded"
        assert reason(tmp_path / "a.jpg", size) == said
    buffer = io.BytesIO()
    Image.fromarray(quadrants()).save(buffer, "JPEG", progressive=True)
    (tmp_path / "a.jpg").write_bytes(resize_jpeg(buffer.getvalue(), 20_000))
    assert reason(tmp_path / "a.jpg").startswith("20000 x 20000 pixels are more than the ")


@pytest.mark.parametrize(("mode", "depth", "kind"), [("RGBA", 8, 6), ("I;16", 16, 0), ("LA", 8, 4)])
def test_a_costly_bomb_is_refused_sooner(tmp_path: Path, mode: str, depth: int, kind: int) -> None:
    """Alpha and 16 bits take several times the memory of plain pixels."""
    header = struct.pack(">IIBBBBB", 7_000, 7_000, depth, kind, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in chunks.items():
            check = struct.pack(">I", zlib.crc32(name + content))
            file.write(struct.pack(">I", len(content)) + name + content + check)
    with Image.open(path) as image:
        assert image.mode == mode
    assert reason(path) == "7000 x 7000 pixels are more than the 44739242 that can be decoded"


def test_a_huge_jpeg_is_scaled_down_where_it_is_decoded(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels are 1.6 GB, but an eighth of the side is all that is needed."""
    path = tmp_path / "a.jpg"
    path.write_bytes(resize_jpeg(noise("jpg"), 20_000))
    code = (
        "import resource; from pathlib import Path; from gatl.data.decode import to_rgb\n"
        "taken = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"before = taken(); pixels = to_rgb(Path({str(path)!r}), 224)\n"
        "print(pixels.shape, (taken() - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shape, _, mebibytes = done.stdout.strip().rpartition(" ")
    assert shape == "(224, 224, 3)"
    assert int(mebibytes) < 150
