"""The list of a run's images: what is told when they are others, or there twice."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gatl.data.folder import load
from gatl.data.images import PreparedData, Streamed, prepare
from gatl.data.manifest import MANIFEST, keep_or_compare, left_out, repeated
from gatl.data.source import Source, Split
from gatl.errors import UserError


def put(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(40):
        put(tmp_path / "photos" / "ab"[i % 2] / f"{i:02}.png", i)
    return tmp_path / "photos"


def prepared(photos: Path, tmp_path: Path, max_bad: float = 0.5) -> PreparedData:
    folder = tmp_path / "arrays"
    folder.mkdir(exist_ok=True)
    source = load(str(photos))
    return prepare(source, image_size=8, split_seed=0, max_bad=max_bad, folder=folder)


def rename_class(photos: Path) -> None:
    (photos / "a").rename(photos / "c")


def three_changes(photos: Path) -> None:
    (photos / "a" / "00.png").unlink()
    put(photos / "b" / "01.png", 100)
    for i in (41, 43):
        put(photos / "b" / f"{i}.png", i)


CHANGES: dict[Callable[[Path], object], str] = {
    lambda photos: put(photos / "a" / "new\n.png", 99): "1 new; the first: a/new\\n.png",
    lambda photos: (photos / "a" / "02.png").unlink(): "1 gone; the first: a/02.png",
    lambda photos: put(photos / "a" / "02.png", 99): "1 changed; the first: a/02.png",
    lambda photos: (photos / "a" / "02.png").write_text("x"): "1 changed; the first: a/02.png",
    lambda photos: (photos / "a" / "02.png").rename(photos / "b" / "02.png"): (
        "1 new, 1 gone; the first: b/02.png"
    ),
    rename_class: "20 new, 20 gone; the first: c/",
    three_changes: "2 new, 1 gone, 1 changed; the first: b/4",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_told(photos: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    for _ in range(2):  # the second time it goes on
        keep_or_compare(prepared(photos, tmp_path), tmp_path)
    change(photos)
    with pytest.raises(UserError) as caught:
        keep_or_compare(prepared(photos, tmp_path), tmp_path)
    start = f"The images are not those that this run began with: {CHANGES[change]}"
    assert str(caught.value).startswith(start)
    assert str(caught.value).isprintable()


def test_a_touched_file_or_one_stored_otherwise_is_no_change(photos: Path, tmp_path: Path) -> None:
    keep_or_compare(prepared(photos, tmp_path), tmp_path)
    path = photos / "a" / "00.png"
    with Image.open(path) as image:
        image.save(path, compress_level=0)
    keep_or_compare(prepared(photos, tmp_path), tmp_path)


def test_an_image_that_could_not_be_decoded_and_now_can_is_a_change(
    photos: Path, tmp_path: Path
) -> None:
    path = photos / "a" / "00.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    for _ in range(2):
        keep_or_compare(prepared(photos, tmp_path), tmp_path)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"1 changed; the first: a/00\.png"):
        keep_or_compare(prepared(photos, tmp_path), tmp_path)


def test_other_pixels_of_all_images_may_be_pillows_doing(photos: Path, tmp_path: Path) -> None:
    keep_or_compare(prepared(photos, tmp_path), tmp_path)
    for i in range(40):
        put(photos / "ab"[i % 2] / f"{i:02}.png", 100 + i)
    with pytest.raises(UserError, match="40 changed, perhaps by another version of Pillow;"):
        keep_or_compare(prepared(photos, tmp_path), tmp_path)


def test_other_splits_are_told(photos: Path, tmp_path: Path) -> None:
    keep_or_compare(prepared(photos, tmp_path), tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace("val,", "test,", 1))
    with pytest.raises(UserError, match="their order or their splits are others"):
        keep_or_compare(prepared(photos, tmp_path), tmp_path)


def test_any_name_is_the_same_the_next_time(photos: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("x\ry", "x\ny", "x\r\ny", "x,y", 'x"y', "x;'y", " ")):
        put(photos / "a" / f"{name}.png", 100 + i)
    keep_or_compare(prepared(photos, tmp_path), tmp_path)
    keep_or_compare(prepared(photos, tmp_path), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arrays", "images.csv", "photos"]


@pytest.mark.parametrize("content", ["", "split,class\n", "split,class,image,digest,error\na,b\n"])
def test_a_damaged_list_is_one_line(photos: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"images\.csv is damaged: "):
        keep_or_compare(prepared(photos, tmp_path), tmp_path)


def test_the_list_has_every_image_and_what_is_left_out(photos: Path, tmp_path: Path) -> None:
    for i in range(0, 14, 2):
        (photos / "a" / f"{i:02}.png").write_text("x")
    data = prepared(photos, tmp_path)
    keep_or_compare(data, tmp_path)
    with (tmp_path / MANIFEST).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows) == sorted(
        f"{'ab'[i % 2]}/{i:02}.png" for i in range(40)
    )
    assert all(row["image"].startswith(row["class"]) for row in rows)
    assert all(bool(row["digest"]) != bool(row["error"]) for row in rows)
    of_val = [row["image"] for row in rows if row["split"] == "val" and row["digest"]]
    assert of_val == list(data.val.names)
    assert sum(bool(row["error"]) for row in rows) == 7
    assert len(left_out(data)) == 6
    assert left_out(data)[-1] == "left out: 2 more"


@pytest.mark.parametrize("streamed", [False, True])
def test_the_same_pixels_have_the_same_digest(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr("gatl.data.images.fits_in_memory", lambda *_: not streamed)
    data = prepared(photos, tmp_path)
    assert isinstance(data.train.images, Streamed) is streamed
    again = prepared(photos, tmp_path)
    assert data.train.digest == again.train.digest
    assert len(set(data.train.digests.tolist())) == len(data.train)


def of(*splits: list[tuple[str, int, int]]) -> Source:
    """Make a source from (name, label, brightness) of each image."""

    def split(images: list[tuple[str, int, int]]) -> Split:
        pixels = [np.full((4, 4), brightness, np.uint8) for *_, brightness in images]
        labels = np.array([label for _, label, _ in images], np.int64)
        return Split(pixels, labels, [name for name, *_ in images])

    return Source(("a", "b"), *map(split, splits))


def test_pictures_that_are_there_twice_are_told(tmp_path: Path) -> None:
    def said(*splits: list[tuple[str, int, int]]) -> str | None:
        source = of(*splits)
        options = {"image_size": 4, "split_seed": 0, "max_bad": 0.0, "folder": tmp_path}
        return repeated(prepare(source, **options))  # type: ignore[arg-type]

    val, test = [("v0", 0, 10), ("v1", 1, 11)], [("t0", 0, 20), ("t1", 1, 21)]
    train = [("a0", 0, 1), ("a0 again", 0, 1), ("b0", 1, 2)]  # twice in one place is no matter
    assert said(train, val, test) is None
    assert said([*train, ("b\n1", 1, 21), ("b2", 1, 21)], val, test) == (
        "the same pictures: 1 in several splits, 0 in several classes; the first: b\\n1 and t1"
    )
    assert said([*train, ("a1", 0, 2), ("a2", 0, 11)], val, test) == (
        "the same pictures: 1 in several splits, 2 in several classes; the first: b0 and a1"
    )
