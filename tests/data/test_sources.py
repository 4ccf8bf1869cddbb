"""The sources with files: small ones, made here in torchvision's own formats, on local servers."""

import gzip
import hashlib
import io
import pickle
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]
from torchvision import datasets  # type: ignore[import-untyped]

from gatl.data import cifar, digits, fashion_mnist, flowers
from gatl.data.source import Source
from gatl.errors import UserError

RNG = np.random.default_rng(0)
LOADERS: dict[str, Callable[[str], Source]] = {
    "Oxford 102 Flowers": flowers.load,
    "CIFAR-10": partial(cifar.load, n_classes=10),
    "CIFAR-100": partial(cifar.load, n_classes=100),
    "Fashion-MNIST": fashion_mnist.load,
}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address where it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let all datasets download from this address."""
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{url}cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR100, "url", f"{url}cifar.tar.gz")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [url])
    monkeypatch.setattr(datasets.Flowers102, "_download_url_prefix", url)


def fake_cifar(
    monkeypatch: pytest.MonkeyPatch, folder: Path, n_classes: int
) -> dict[str, tuple[npt.NDArray[np.uint8], list[int]]]:
    """Write cifar.tar.gz with 20 images a batch; return what is in it."""
    dataset = datasets.CIFAR10 if n_classes == 10 else datasets.CIFAR100
    inner = folder / dataset.base_folder
    inner.mkdir()
    names = [f"class {i}" for i in range(n_classes)]
    contents = {}
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for key, files in lists.items():
        for name, _ in getattr(dataset, key):
            pixels = RNG.integers(0, 256, (20, 3, 32, 32), np.uint8)
            labels = RNG.integers(0, n_classes, 20).tolist()
            label_key = "labels" if n_classes == 10 else "fine_labels"
            entry = {"data": pixels.reshape(20, -1), label_key: labels}
            (inner / name).write_bytes(pickle.dumps(entry))
            files.append([name, md5(inner / name)])
            contents[name] = pixels.transpose(0, 2, 3, 1), labels
        monkeypatch.setattr(dataset, key, files)
    meta = inner / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: names}))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        archive.add(inner, dataset.base_folder)
    monkeypatch.setattr(dataset, "filename", "cifar.tar.gz")
    monkeypatch.setattr(dataset, "tgz_md5", md5(folder / "cifar.tar.gz"))
    return contents


def fake_fashion_mnist(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> dict[str, npt.NDArray[np.uint8]]:
    """Write the four gzipped idx files; return what is in them."""
    contents, resources = {}, []
    for (name, _), n in zip(datasets.FashionMNIST.resources, (30, 30, 12, 12), strict=True):
        shape = (n, 28, 28) if "images" in name else (n,)
        array = RNG.integers(0, 10 if len(shape) == 1 else 256, shape, np.uint8)
        header = struct.pack(f">{1 + len(shape)}i", 0x800 + len(shape), *shape)
        (folder / name).write_bytes(gzip.compress(header + array.tobytes()))
        contents[name] = array
        resources.append((name, md5(folder / name)))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    return contents


def fake_flowers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Write the archive and the .mat files: images 1 to 9, of the classes 1 to 9."""
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        for i in range(1, 10):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (i, i, i)).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"jpg/image_{i:05}.jpg")
            info.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(info, buffer)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 10)})
    savemat(folder / "setid.mat", {"trnid": [3, 1, 2], "valid": [4, 5, 6], "tstid": [9, 8, 7]})
    files = {
        key: (name, md5(folder / name)) for key, (name, _) in datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)


def stacked(source: Source, split: str) -> npt.NDArray[np.uint8]:
    return np.stack(getattr(source, split).images)


def test_digits() -> None:
    source = digits.load()
    assert source.classes == tuple("0123456789")
    pixels = stacked(source, "train")
    assert pixels.shape == (1797, 8, 8)
    assert pixels.dtype == np.uint8
    assert set(np.unique(pixels)) == {round(v * 255 / 16) for v in range(17)}
    assert len(set(source.train.names)) == 1797
    assert source.val is None


@pytest.mark.parametrize("n_classes", [10, 100])
def test_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[Path, str], n_classes: int
) -> None:
    folder, url = server
    point_at(monkeypatch, url)
    contents = fake_cifar(monkeypatch, folder, n_classes)
    timeout = socket.getdefaulttimeout()
    source = cifar.load(str(tmp_path / "root"), n_classes)
    assert socket.getdefaulttimeout() == timeout
    train = [v for name, v in contents.items() if "test" not in name]
    assert np.array_equal(stacked(source, "train"), np.concatenate([pixels for pixels, _ in train]))
    assert source.train.labels.tolist() == [label for _, labels in train for label in labels]
    (pixels, labels) = contents["test_batch" if n_classes == 10 else "test"]
    assert source.test is not None
    assert np.array_equal(stacked(source, "test"), pixels)
    assert source.test.labels.tolist() == labels
    assert source.classes[-1] == f"class {n_classes - 1}"
    assert source.val is None
    point_at(monkeypatch, "http://127.0.0.1:1/")  # now it is there, and nothing is asked for
    assert len(cifar.load(str(tmp_path / "root"), n_classes).train) == len(source.train)


def test_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[Path, str]
) -> None:
    folder, url = server
    point_at(monkeypatch, url)
    images, labels, test_images, test_labels = fake_fashion_mnist(monkeypatch, folder).values()
    source = fashion_mnist.load(str(tmp_path))
    assert source.test is not None
    assert np.array_equal(stacked(source, "train"), images)
    assert np.array_equal(stacked(source, "test"), test_images)
    assert np.array_equal(source.train.labels, labels)
    assert np.array_equal(source.test.labels, test_labels)
    assert source.classes[0] == "T-shirt/top"
    raw = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    for size in (1000, 6, 0):  # killed while it unpacked
        raw.write_bytes(raw.read_bytes()[:size])
        with pytest.raises(
            UserError, match=r"of Fashion-MNIST in .* incomplete or damaged"
        ) as caught:
            fashion_mnist.load(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[Path, str]) -> None:
    folder, url = server
    point_at(monkeypatch, url)
    fake_flowers(monkeypatch, folder)
    source = flowers.load(str(tmp_path))
    assert source.val is not None
    assert source.test is not None
    jpg = tmp_path / "flowers-102" / "jpg"
    assert source.train.images == [jpg / f"image_0000{i}.jpg" for i in (3, 1, 2)]
    assert source.train.labels.tolist() == [2, 0, 1]
    assert list(source.test.names) == [f"image_0000{i}.jpg" for i in (9, 8, 7)]
    assert source.val.labels.tolist() == [3, 4, 5]
    assert len(source.classes) == 102
    (jpg / "image_00009.jpg").unlink()
    with pytest.raises(
        UserError, match=r"1 images of Oxford 102 Flowers are missing, .*00009\.jpg"
    ):
        flowers.load(str(tmp_path))


@pytest.mark.parametrize("name", LOADERS)
def test_unreachable_download_is_one_line_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_at(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(UserError) as caught:
            LOADERS[name](str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be downloaded (")
    folders = {"Oxford 102 Flowers": "flowers-102", "Fashion-MNIST": "FashionMNIST/raw"}
    assert message.endswith(
        f"): put its files into {tmp_path / folders.get(name, '')}, "
        "or use data=folder data.root=PATH or data=digits, which need no download."
    )
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", LOADERS)
def test_a_wrong_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[Path, str], name: str
) -> None:
    """As behind a portal, which answers every request with its own page."""
    folder, url = server
    point_at(monkeypatch, url)
    for dataset in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(dataset, "filename", "cifar.tar.gz")
    files = [f for f, _ in datasets.FashionMNIST.resources]
    files += [f for f, _ in datasets.Flowers102._file_dict.values()]
    for file in ["cifar.tar.gz", *files]:
        (folder / file).write_text("<html>please log in</html>")
    with pytest.raises(UserError) as caught:
        LOADERS[name](str(tmp_path / "root"))
    assert "corrupted" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatl.data.download.TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(UserError, match=r"CIFAR-10 cannot be downloaded \(.*timed out\)"):
            cifar.load(str(tmp_path), 10)
    assert socket.getdefaulttimeout() is None


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.touch()
    for load in LOADERS.values():
        with pytest.raises(UserError, match=r"cannot be kept in .*: set data\.root\."):
            load(str(root))
