"""What crosses the boundary of a frozen prefix, computed once and shared by all fits.

With nothing random in front of it a frozen prefix is a fixed function, the same for
every chromosome with the same F. Its boundary tensors are kept in ``.npy`` files that
all worker processes map; a fit reads them in place of images and trains what lies
behind. A file's name is the SHA-256 of all that its content depends on, so that a
changed image, weight or setting never meets an old one.

Shapes: N images of a split, B a batch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation
from torchvision.transforms import v2

from gatl.classifier import Classifier, Diverged
from gatl.data.images import Images, PreparedData, PreparedSplit, Streamed
from gatl.data.module import ImageData
from gatl.launching import jobs_at_once
from gatl.models.layered import LayeredNetwork
from gatl.models.se_densenet import DoubleSigmoid
from gatl.models.weights import LoadReport

CHUNK = 64
"""Images that pass the prefix at once, always: another size gives other rounding errors."""

POLL_SECONDS = 0.05
"""Between two looks at whether another worker has finished, or the user asked to stop."""

Array = npt.NDArray[Any]
Check = Callable[[], None]
"""Raises if the fit shall stop."""


@dataclass(frozen=True)
class FeatureFiles:
    """Arrays in a folder, least recently used ones removed, shared by processes.

    A removed file goes on to exist for whoever has mapped it; while such fits run, the
    folder's share of the disk can be exceeded by what they use.

    Attributes:
        folder: Exists; nothing else lies in it.
        max_bytes: What the files may take together.
    """

    folder: Path
    max_bytes: int

    def find(self, key: str) -> Array | None:
        """Return an array, mapped, and note that it was used; None if it is not there."""
        path = self.folder / f"{key}.npy"
        try:
            os.utime(path)
            found: Array = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            return None
        return found

    def get(
        self, key: str, n: int, compute: Callable[[], Iterator[Array]], check: Check
    ) -> Array | None:
        """Return an array, computed by one process if it is not there.

        Args:
            key: Its name.
            n: N, its rows.
            compute: Yields its rows in pieces (B, ...), none empty.
            check: Called while another process computes it; may raise.

        Returns:
            The array (N, ...), mapped; None if it does not fit.
        """
        part = self.folder / f"{key}.part"  # one that a killed process left is overwritten
        try:
            with self._locked(key, check):  # kept by the kernel until we leave, or die
                if (found := self.find(key)) is not None:
                    return found
                try:
                    return self._write(part, n, compute(), check)
                finally:
                    part.unlink(missing_ok=True)
        except OSError:  # the disk is full
            return None

    def _write(self, part: Path, n: int, pieces: Iterator[Array], check: Check) -> Array | None:
        first = next(pieces)
        shape, dtype = (n, *first.shape[1:]), np.lib.format.dtype_to_descr(first.dtype)
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        with part.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            n_bytes = file.tell() + n * first[0].nbytes
            if not self._reserve(part, n_bytes, check):
                return None
            file.write(first.tobytes())
            for piece in pieces:
                file.write(piece.tobytes())
            if file.tell() != n_bytes:
                raise ValueError(f"{n} rows must fill {n_bytes} bytes, but got {file.tell()}.")
        found: Array = np.load(part, mmap_mode="r")  # once it has its name, others may remove it
        part.replace(part.with_suffix(".npy"))
        return found

    def _reserve(self, part: Path, n_bytes: int, check: Check) -> bool:
        """Remove what was used least recently until there is room; wait for other writers."""
        if n_bytes > self.max_bytes:
            return False
        while True:
            with self._locked("all", check):
                others = [p for p in self.folder.glob("*.part") if p != part and self._alive(p)]
                taken = n_bytes + sum(map(_size, others))
                whole = sorted(self.folder.glob("*.npy"), key=_used, reverse=True)
                for path in whole:
                    taken += _size(path)
                    if taken > self.max_bytes:
                        taken -= _size(path)
                        path.unlink(missing_ok=True)
                if taken <= self.max_bytes:
                    os.truncate(part, n_bytes)
                    return True
            check()
            time.sleep(POLL_SECONDS)

    def _alive(self, part: Path) -> bool:
        """Whether somebody writes a file; what a killed process left is removed."""
        with _try_lock(part.with_suffix(".lock")) as free:
            if free:
                part.unlink(missing_ok=True)
            return not free

    @contextlib.contextmanager
    def _locked(self, name: str, check: Check) -> Iterator[None]:
        while True:
            with _try_lock(self.folder / f"{name}.lock") as mine:
                if mine:
                    yield
                    return
            check()
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Hold a file's lock, if nobody else does."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def share_of(folder: Path, max_gb: float | None) -> int:
    """Return what the boundary tensors may take in a folder, in bytes.

    Args:
        folder: It exists.
        max_gb: ``cache.max_gb``; None: a quarter of the free disk, or of the free memory if that is
            less, since what is mapped lies there too as long as nothing else needs it. Other jobs
            of a sweep that run beside this one have their part of it.
    """
    if max_gb is not None:
        return int(max_gb * 10**9)
    free = min(shutil.disk_usage(folder).free, psutil.virtual_memory().available)
    return int(free // 4 // jobs_at_once())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class Features:
    """Boundary tensors in place of the images of a split; of two variants, if two are given."""

    def __init__(self, *variants: Array) -> None:
        """Take arrays as `FeatureFiles` has them."""
        self._variants = variants

    def __len__(self) -> int:
        """The number of images."""
        return len(self._variants[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of the boundary tensors."""
        return _to_tensor(np.empty((), self._variants[0].dtype)).dtype

    def batch(self, indices: npt.NDArray[np.integer]) -> Tensor:
        """Gather boundary tensors.

        Args:
            indices: Shape (B,), each in [0, N).

        Returns:
            Shape (B, ...); (2, B, ...) of two variants.
        """
        gathered = [np.take(array, indices, axis=0) for array in self._variants]
        spatial = gathered[0].ndim == 4
        tensor = _to_tensor(np.stack(gathered) if len(gathered) > 1 else gathered[0])
        return tensor.movedim(-1, -3) if spatial else tensor


def _to_array(tensor: Tensor) -> Array:
    """Turn a tensor into what a file holds: (B, H, W, C) of maps, the bits of bfloat16."""
    if tensor.ndim == 4:
        tensor = tensor.movedim(1, -1)
    tensor = tensor.contiguous().cpu()
    array: Array = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _to_tensor(array: Array) -> Tensor:
    """Take the bits of bfloat16, which numpy lacks, for what they are."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype is torch.int16 else tensor


def why_off(augment: str, data: PreparedData, report: LoadReport | None) -> str | None:
    """Say why the frozen prefix is not the same function of the same input in several fits.

    Args:
        augment: ``data.augment``.
        data: The images.
        report: What was loaded into the network; None if all of it starts random.

    Returns:
        A phrase; None if it is the same.
    """
    if report is None:
        return "model.weights=none: every fit has another prefix"
    if augment not in ("none", "flip"):
        return f"data.augment={augment}: no image enters the prefix twice"
    if isinstance(data.train.images, Streamed):
        return "the images are streamed"
    return None


def is_shared(network: LayeredNetwork, report: LoadReport) -> bool:
    """Whether the frozen prefix has the same weights in every fit: none of them were drawn.

    SE at identity computes nothing, whatever its first layer was drawn as. A probe's new
    neck is not drawn.
    """
    frozen = ["stem", *(f"layers.{i}" for i in range(network.n_frozen))] if network.n_frozen else []
    idle = _idle_parts(network)
    drawn = [name for name in report.left_random if not name.startswith(idle)]
    return not any(name.startswith(f"{module}.") for name in drawn for module in frozen)


def prefix_digests(network: LayeredNetwork, settings: Mapping[str, Any]) -> list[str]:
    """Return what tells apart the functions that the first 0, 1, 2, ... frozen modules are.

    Args:
        network: Frozen, its weights loaded.
        settings: What else the result depends on, as plain data.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digests = [digest.hexdigest()]
    for index, module in enumerate(network.frozen(), start=1):
        idle = _idle_parts(module)
        for name, tensor in module.state_dict().items():
            if not name.startswith(idle):
                digest.update(f"{index} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_to_array(tensor).tobytes())
        # The last included layer has no transition; let it be another one in any backbone.
        last = "last" if index > len(network.layers) else ""
        digests.append(hashlib.sha256(digest.digest() + last.encode()).hexdigest())
    return digests


def _idle_parts(module: nn.Module) -> tuple[str, ...]:
    """Name the SE whose gate is exactly 1: its first layer, perhaps drawn, changes nothing."""
    return tuple(
        f"{name}."
        for name, part in module.named_modules()
        if isinstance(part, SqueezeExcitation)
        and isinstance(part.scale_activation, DoubleSigmoid)
        and not part.fc2.weight.any()
        and (part.fc2.bias is None or not part.fc2.bias.any())
    )


class CachedPrefix(Callback):
    """Lets a fit start behind its frozen prefix, if what crosses the boundary fits.

    Args:
        files: Where boundary tensors are kept.
        settings: What they depend on beside weights, pixels and device, as plain data.
        check: Raises if the fit shall stop; asked before each chunk.

    What the frozen layers give is kept only if it is finite; otherwise the fit has `Diverged`.
    """

    def __init__(self, files: FeatureFiles, settings: Mapping[str, Any], check: Check) -> None:
        self._files, self._settings, self._check = files, dict(settings), check

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Get the boundary tensors, and have the fit begin with them."""
        assert isinstance(pl_module, Classifier)
        images: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        with trainer.precision_plugin.forward_context():
            prefix = _Prefix(self._files, self._settings, self._check, pl_module, images)
            boundary = prefix.boundary()
        if boundary is not None:
            images.start_behind_prefix(*boundary, boundary[0].dtype)
            pl_module.behind_prefix = True


class _Prefix:
    """The frozen prefix of one fit."""

    def __init__(
        self,
        files: FeatureFiles,
        settings: Mapping[str, Any],
        check: Check,
        classifier: Classifier,
        images: ImageData,
    ) -> None:
        self._files, self._check, self._images = files, check, images
        self._network, self._device = classifier.network, classifier.device
        self._settings = {
            **settings,
            "device": self._device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "chunk": CHUNK,
        }
        self._digests = prefix_digests(self._network, self._settings)

    def boundary(self) -> tuple[Features, Features] | None:
        """Return the boundary tensors of training and validation images, if they fit."""
        data = self._images.prepared
        self._fit_neck(data.train)
        depth = len(self._network.frozen())
        mirrors = (False, True) if self._images.augment == "flip" else (False,)
        wanted = [(data.train, mirrored) for mirrored in mirrors] + [(data.val, False)]
        arrays = []
        for split, mirrored in wanted:
            if (array := self._get(split, mirrored, depth)) is None:
                return None
            arrays.append(array)
        return Features(*arrays[:-1]), Features(arrays[-1])

    def _fit_neck(self, train: PreparedSplit) -> None:
        """Give a linear probe's new BN the statistics of what the last layer returns."""
        network = self._network
        if not network.needs_neck_statistics:
            return
        depth = 1 + len(network.layers)

        def compute() -> Iterator[Array]:
            self._get(train, False, depth)  # for the pooled vectors, which are next
            network.fit_neck_statistics(self._chunks(train, False, depth), start=depth)
            yield np.stack([_to_array(_finite(buffer)) for buffer in buffers])

        norm = next(m for m in network.neck.modules() if isinstance(m, nn.BatchNorm2d))
        buffers = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        key = self._key(train, False, depth, "statistics")
        found = self._files.get(key, 2, compute, self._check)
        if found is None:
            next(compute())
        else:
            norm.reset_parameters()
            for buffer, values in zip(buffers, found, strict=True):
                buffer.copy_(torch.from_numpy(np.array(values)))
        self._digests = prefix_digests(network, self._settings)

    def _key(self, split: PreparedSplit, mirrored: bool, depth: int, what: str = "") -> str:
        parts = (self._digests[depth], split.digest, "mirrored" if mirrored else "", what)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _get(self, split: PreparedSplit, mirrored: bool, depth: int) -> Array | None:
        def compute() -> Iterator[Array]:
            return map(_to_array, self._chunks(split, mirrored, depth))

        return self._files.get(self._key(split, mirrored, depth), len(split), compute, self._check)

    def _chunks(self, split: PreparedSplit, mirrored: bool, depth: int) -> Iterator[Tensor]:
        """Yield what the first `depth` frozen modules return for the images in order."""
        start, base = self._nearest(split, mirrored, depth)
        for first in range(0, len(split), CHUNK):
            self._check()
            rows = np.arange(first, min(first + CHUNK, len(split)))
            x = base.batch(np.pad(rows, (0, CHUNK - len(rows)), mode="edge")).to(self._device)
            yield _finite(self._cross(x, mirrored, start, depth)[: len(rows)])

    def _nearest(self, split: PreparedSplit, mirrored: bool, depth: int) -> tuple[int, Images]:
        """Return the deepest boundary up to `depth` that is kept, or the images."""
        for start in range(depth, 0, -1):
            if (array := self._files.find(self._key(split, mirrored, start))) is not None:
                return start, Features(array)
        return 0, split.images

    @torch.inference_mode()
    def _cross(self, x: Tensor, mirrored: bool, start: int, depth: int) -> Tensor:
        """Apply modules one by one, each to a tensor laid out as one from a file would be."""
        if start == 0:
            images = v2.functional.horizontal_flip(x) if mirrored else x
            x = self._images.prepare(images)
        for module in range(start, depth):
            x = self._network.prefix(_laid_out(x), module, module + 1)
        return x


def _finite(x: Tensor) -> Tensor:
    """Return what frozen layers give, if it may be kept."""
    if not x.isfinite().all():
        raise Diverged("diverged: what the frozen layers give is not finite")
    return x


def _laid_out(x: Tensor) -> Tensor:
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def cached_prefix(
    data: PreparedData,
    classifier: Classifier,
    report: LoadReport | None,
    *,
    augment: str,
    settings: Mapping[str, Any],
    check: Check,
) -> list[CachedPrefix]:
    """Return the callback that lets a fit start behind its prefix; none where it cannot.

    Args:
        data: The images, and where boundary tensors are kept.
        classifier: Built for the fit.
        report: What was loaded into it; None if all of it starts random.
        augment: ``data.augment``.
        settings: See `CachedPrefix`.
        check: Raises if the fit shall stop.
    """
    if data.features is None or classifier.network.n_frozen == 0:
        return []
    if report is None or why_off(augment, data, report) is not None:
        return []
    if not is_shared(classifier.network, report):
        return []
    files = FeatureFiles(data.features, data.features_bytes)
    return [CachedPrefix(files, settings, check)]
