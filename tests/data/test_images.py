"""Decoding once, sharing, streaming, and leaving out what cannot be decoded."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from gatl.data import images
from gatl.data.decode import to_rgb
from gatl.data.folder import load
from gatl.data.images import Decoded, PreparedData, Streamed, describe, prepare
from gatl.data.source import Source, in_memory
from gatl.errors import UserError


class Memory(NamedTuple):
    """Stands for psutil's answer."""

    available: int


def photos(root: Path, counts: dict[str, int]) -> Source:
    rng = np.random.default_rng(0)
    for label, n in counts.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i:03}.png")
    return load(str(root))


def run(source: Source, folder: Path, size: int = 8, max_bad: float = 0.05) -> PreparedData:
    folder.mkdir(exist_ok=True)
    return prepare(source, image_size=size, split_seed=0, max_bad=max_bad, folder=folder)


def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(available=100))


def pixels_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = tensor.permute(0, 2, 3, 1).numpy()
    return array


@pytest.mark.parametrize("streamed", [False, True])
def test_batches_are_the_decoded_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    source = photos(tmp_path / "in", {"a": 20, "b": 30})
    if streamed:
        little_memory(monkeypatch)
    prepared = run(source, tmp_path / "out")
    assert type(prepared.train.images) is (Streamed if streamed else Decoded)
    for split in (prepared.train, prepared.val, prepared.test):
        indices = np.random.default_rng(0).permutation(len(split))[:5]
        batch = split.images.batch(indices)
        assert batch.shape == (5, 3, 8, 8)
        assert batch.dtype == torch.uint8
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for pixels, i in zip(pixels_of(batch), indices, strict=True):
            path = tmp_path / "in" / split.names[i]
            assert np.array_equal(pixels, to_rgb(path, 8))
            assert prepared.classes[split.labels[i]] == path.parent.name
        assert len(split.images) == len(split.labels) == len(split.names) == len(split)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == (
        [] if streamed else ["test.npy", "train.npy", "val.npy"]
    )


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shape", [(200, 20, 20), (200, 20, 20, 3)])
def test_pickles_without_the_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, shape: tuple[int, ...]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if streamed:
        little_memory(monkeypatch)
    prepared = run(Source(("a", "b"), in_memory(pixels, np.arange(200) % 2, "x")), tmp_path)
    prepared.train.images.batch(np.arange(2))  # opens the file
    data = pickle.dumps(prepared)
    assert len(data) < 20_000
    copy = pickle.loads(data)
    assert torch.equal(copy.val.images.batch(np.arange(3)), prepared.val.images.batch(np.arange(3)))
    first = pixels_of(copy.val.images.batch(np.arange(1)))[0]
    assert np.array_equal(first, to_rgb(pixels[int(copy.val.names[0][2:])], 8))


def test_the_rule_for_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(available=6 * 100 * 8 * 8))
    assert images.fits_in_memory(100, 8, tmp_path)
    assert not images.fits_in_memory(101, 8, tmp_path)


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_images_are_left_out_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    source = photos(tmp_path / "in", {"a": 40, "b": 60})
    bad = [tmp_path / "in" / name for name in ("a/003.png", "b/001.png", "b/059.png")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    if streamed:
        little_memory(monkeypatch)
    prepared = run(source, tmp_path / "out")
    splits = (prepared.train, prepared.val, prepared.test)
    assert sum(len(s) for s in splits) == sum(len(s.images) for s in splits) == 97
    said = sorted(image.error.partition(" cannot be decoded: ")[0] for image in prepared.skipped)
    assert said == [str(path) for path in bad]
    assert {(i.name, prepared.classes[i.label]) for i in prepared.skipped} == {
        (f"{path.parent.name}/{path.name}", path.parent.name) for path in bad
    }
    for split in splits:
        everything = pixels_of(split.images.batch(np.arange(len(split))))
        for pixels, name, label in zip(everything, split.names, split.labels, strict=True):
            assert np.array_equal(pixels, to_rgb(tmp_path / "in" / name, 8))
            assert name.startswith(prepared.classes[label])
    assert "3 undecodable left out" in describe(prepared)


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", {"a": 10, "b": 90})
    path = tmp_path / "in" / "a" / "004.png"
    path.write_text("no image")
    with pytest.raises(UserError) as caught:
        run(source, tmp_path / "out")
    assert str(caught.value) == (
        "1 of the 10 images of class 'a' cannot be decoded, but data.max_bad=0.05 allows 5%; "
        f"the first: {path} cannot be decoded: not an image file."
    )
    for path in (tmp_path / "in" / "a").iterdir():
        path.write_text("no image")
    with pytest.raises(UserError, match="10 of the 100 images of the data set cannot"):
        run(source, tmp_path / "out")
    with pytest.raises(UserError, match="Too many images of the train split"):
        run(source, tmp_path / "out", max_bad=1)


def test_the_share_of_bad_images_may_be_exactly_that(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", {"a": 100, "b": 100})
    for name in "ab":
        for i in range(29):
            (tmp_path / "in" / name / f"{i:03}.png").write_text("x")
    assert len(run(source, tmp_path / "out", max_bad=0.29).skipped) == 58
    with pytest.raises(UserError, match=r"allows 28\.9%"):
        run(source, tmp_path / "out", max_bad=0.289)


def test_the_bad_image_that_is_named_is_one_of_the_split(tmp_path: Path) -> None:
    whole = photos(tmp_path / "in", {"a": 20, "b": 20})
    last = whole.train.subset(np.array([19, 39]))
    first = whole.train.subset(np.array([*range(19), *range(20, 39)]))
    for path in (first.images[0], *last.images):
        Path(path).write_text("x")
    with pytest.raises(UserError, match=r"of the test split .*: .*a/019\.png cannot be decoded"):
        run(Source(whole.classes, first, test=last), tmp_path / "out", max_bad=1)


def test_an_interrupted_decoding_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(image: object, size: int, interpolation: str) -> None:
        raise KeyboardInterrupt

    source = photos(tmp_path / "in", {"a": 5, "b": 5})
    monkeypatch.setattr(images, "to_rgb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    prepare(
        Source(("a", "b"), in_memory(np.zeros((600, 4, 4), np.uint8), np.arange(600) % 2, "x")),
        image_size=4,
        split_seed=0,
        max_bad=0,
        folder=tmp_path,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (600, 600)
    assert calls == sorted(calls)
    assert len(calls) > 3


def test_describe(tmp_path: Path) -> None:
    def lines(counts: list[int]) -> str:
        labels = np.repeat(np.arange(len(counts)), counts)
        pixels = np.zeros((len(labels), 4, 4), np.uint8)
        return describe(run(Source(("a", "b"), in_memory(pixels, labels, "x")), tmp_path))

    assert lines([20, 20]) == "2 classes · train 28 · val 6 · test 6 · 8 px · balanced"
    assert lines([60, 50]).endswith(" · largest class 1.2 times the smallest")
    assert lines([20, 100]).endswith(
        "largest class 5.0 times the smallest (data.class_weights=true makes them count alike)"
    )


def test_preparing_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gatl.data import digits, folder, images;"
        "images.prepare(digits.load(), image_size=8, split_seed=0, max_bad=0,"
        f" folder=Path({str(tmp_path)!r}));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
