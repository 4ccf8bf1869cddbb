"""Layouts of a user's folder, and what is said about those that are wrong."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gatl.data.decode import UndecodableImage, to_rgb
from gatl.data.folder import find_splits, load
from gatl.data.source import Source
from gatl.data.splits import complete_splits
from gatl.errors import UserError


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            Image.new("RGB", (4, 4)).save(path, "PNG")


def put_classes(root: Path, *folders: str, classes: Sequence[str] = ("a", "b")) -> None:
    put(
        root,
        *(f"{folder}/{label}/{i}.png" for folder in folders for label in classes for i in "012"),
    )


def test_bare_folder(tmp_path: Path) -> None:
    put(tmp_path, "b/2.png", "b/1.JPG", "b/deep/er/3.webp", "a/z.jpeg", "a/y.tiff")
    put(tmp_path, "a/.hidden.png", ".cache/x.png", "a/.thumbs/x.png", "a/notes.txt", "loose.png")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "deep")
    source = load(str(tmp_path))
    assert source.classes == ("a", "b")
    assert list(source.train.names) == [
        "a/link/er/3.webp",
        "a/y.tiff",
        "a/z.jpeg",
        "b/1.JPG",
        "b/2.png",
        "b/deep/er/3.webp",
    ]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.train.labels.dtype == np.int64
    assert source.train.images == [tmp_path / name for name in source.train.names]
    assert source.val is None
    assert source.test is None


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    put_classes(tmp_path, "train", val, "test")
    source = load(str(tmp_path))
    assert source.val is not None
    assert source.test is not None
    assert [s.names[0] for s in (source.train, source.val, source.test)] == [
        "train/a/0.png",
        f"{val}/a/0.png",
        "test/a/0.png",
    ]
    assert complete_splits(source, 0) is source


@pytest.mark.parametrize("others", [(), ("val",), ("test",)])
def test_partial_layouts_are_completed(tmp_path: Path, others: tuple[str, ...]) -> None:
    put_classes(tmp_path, "train", *others)
    source = load(str(tmp_path))
    assert [source.val is None, source.test is None] == [n not in others for n in ("val", "test")]
    completed = complete_splits(source, 0)
    assert sum(len(s) for s in (completed.train, completed.val, completed.test) if s) == (
        6 * (1 + len(others))
    )


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "car/1.png", "plane/1.png")
    assert load(str(tmp_path)).classes == ("car", "plane", "train")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put_classes(tmp_path, "photos")
    assert load("~/photos").classes == ("a", "b")


def test_the_layout_is_found_without_a_look_at_any_image(tmp_path: Path) -> None:
    put(tmp_path, "train/a/", "train/b/", "test/a/", "test/b/")
    assert find_splits(str(tmp_path)) == {"train": tmp_path / "train", "test": tmp_path / "test"}
    with pytest.raises(UserError, match="holds no images"):
        load(str(tmp_path))


@pytest.mark.parametrize("find", [find_splits, load])
def test_a_missing_folder_is_shown_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, find: Callable[[str], object]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for root, path in {"~/gone": tmp_path / "home" / "gone", "gone": tmp_path / "gone"}.items():
        with pytest.raises(UserError) as caught:
            find(root)
        assert str(caught.value).startswith(f"data.root={path} does not exist; give a folder")


@pytest.mark.parametrize("root", ["~nobody_of_that_name/photos", "x" * 300])
def test_a_folder_that_cannot_be_looked_for_is_one_line(root: str) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*x|data\.root=.*photos does not exist"):
        find_splits(root)


@pytest.mark.parametrize(
    ("names", "root", "message"),
    [
        ((), "gone", "data.root={root} does not exist; give a folder with one folder a class."),
        (("x.png",), "x.png", "data.root={root} is no folder; give a folder with one folder a"),
        (("x.png",), "", "{root} must hold a folder for each of 2 or more classes: none."),
        (("a/x.png",), "", "{root} must hold a folder for each of 2 or more classes: only 'a'."),
        (("train/a/x.png",), "", "{root}/train must hold a folder for each of 2 or more classes"),
        (("a/", "b/"), "", "{root} holds no images; files that end in .apng, "),
        (("a/1.png", "b/"), "", "{root}/b holds no images; add some or remove the folder."),
        (
            ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"),
            "",
            "{root}: the classes of test and train must be the same, but test has no folder 'b'.",
        ),
        (
            ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png", "val/c/1.png"),
            "",
            "{root}: the classes of val and train must be the same, but train has no folder 'c'.",
        ),
        (("val/a/1.png", "test/a/1.png"), "", "{root} holds test and val, but no folder 'train'."),
        (
            ("train/a/1.png", "test/a/1.png", "more/1.png"),
            "",
            "{root} holds test and train, so 'more' must not be there.",
        ),
        (
            ("train/a/1.png", "val/a/1.png", "valid/a/1.png"),
            "",
            "{root} must hold one validation folder, but got train, val, valid.",
        ),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, names: tuple[str, ...], root: str, message: str
) -> None:
    put(tmp_path, *names)
    path = str(tmp_path / root)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(message.format(root=path))
    assert "\n" not in str(caught.value)


def names(source: Source) -> list[str]:
    return list(source.train.names)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/in/2.png", "b/3.png")
    for where, to in {"a/in/up": "a", "a/in/down": "a/in", "b/self": "b", "b/in": "a/in"}.items():
        (tmp_path / where).symlink_to(tmp_path / to, target_is_directory=True)
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b" / "loop")
    assert names(load(str(tmp_path))) == [
        *("a/1.png", "a/in/2.png"),
        *("b/3.png", "b/in/2.png", "b/in/up/1.png", "b/loop"),
    ]


def test_a_link_that_leads_nowhere_counts_as_an_image(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "a" / "more").symlink_to(tmp_path / "unmounted")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert names(load(str(tmp_path))) == ["a/1.png", "a/2.png", "a/more", "a/pipe.png", "b/1.png"]


def test_a_picture_of_a_format_that_is_not_read_counts_as_an_image(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/photo.HEIC", "b/1.png", "b/2.jxl", "b/film.mov")
    (tmp_path / "a" / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    (tmp_path / "b" / "2.jxl").write_bytes(b"\xff\x0a" + bytes(99))
    found = load(str(tmp_path)).train.images
    assert [path.name for path in found] == ["1.png", "photo.HEIC", "1.png", "2.jxl"]
    for path in (found[1], found[3]):
        with pytest.raises(UndecodableImage) as caught:
            to_rgb(path, 8)
        assert str(caught.value) == (
            f"{path} cannot be decoded: of a format that gatl does not read; save it as JPEG or PNG"
        )


def test_a_class_that_is_a_link_to_nowhere_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "c").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError) as caught:
        find_splits(str(tmp_path))
    said = f"{tmp_path}/c is a link that leads nowhere: mend it or remove it."
    assert str(caught.value) == said


@pytest.mark.parametrize("hidden", ["a", "a/deep"])
def test_a_folder_that_may_not_be_read_is_an_error(
    readable_folder: Path, unprivileged: Callable[[], AbstractContextManager[None]], hidden: str
) -> None:
    put(readable_folder, "a/1.png", "a/deep/2.png", "b/1.png")
    (readable_folder / hidden).chmod(0)
    with unprivileged(), pytest.raises(UserError) as caught:
        load(str(readable_folder))
    (readable_folder / hidden).chmod(0o755)
    assert str(caught.value) == f"{readable_folder / hidden} cannot be read: Permission denied."


def test_any_name_is_told_in_one_line(tmp_path: Path) -> None:
    put(tmp_path / "line\nbreak", "a/1.png", "b\x1b[2J/")
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / "line\nbreak"))
    assert str(caught.value).isprintable()
    assert "line\\nbreak/b\\x1b[2J holds no images" in str(caught.value)
