"""Fits in a process of Ray's, on any node: see `gatl.ray_evaluator`."""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
import torch

from gatl.config import Config
from gatl.data.images import PreparedData, Streamed
from gatl.environment import versions
from gatl.errors import UserError
from gatl.evaluation import RUNG, Fit, Fitter, reason, resolve_precision, silence
from gatl.features import share_of
from gatl.files import is_unwritable, write_whole, writing
from gatl.outcome import Outcome
from gatl.record import JOURNAL

_FOLDERS = "gatl-ray-"
_WEIGHTS = "weights.safetensors"


class Node(NamedTuple):
    """Where a worker runs, as it says itself.

    Attributes:
        id: Ray's.
        name: The host's.
        made_with: What results depend on, see `made_with`.
    """

    id: str
    name: str
    made_with: Mapping[str, str]


def made_with(config: Config) -> dict[str, str]:
    """Return what the results of fits depend on beside the configuration, by name."""
    return {**versions(), "precision": resolve_precision(config.trainer)}


@dataclass(frozen=True)
class Parcel:
    """What goes to a node with a fit.

    Attributes:
        run: The name of the run folder.
        place: Of the fit's folder in it.
        identity: Of the run, see `gatl.record.identity`.
        rung: The checkpoint from which the fit goes on, if it does.
    """

    run: str
    place: str
    identity: str
    rung: bytes | None


class Worker:
    """Runs fits one after another.

    Args:
        config: The run's configuration.
        data: The images, arrays in the place of files.
        weights: What ``model.weights`` names, as a safetensors file; empty if nothing.
        token: No other run has it.
    """

    def __init__(self, config: Config, data: PreparedData, weights: bytes, token: str) -> None:
        self._config, self._data, self._weights, self._token = config, data, weights, token
        self._stops: dict[int, threading.Event] = {}  # by ticket
        self._epochs = 0.0

    def start(self) -> Node:
        """Prepare this process and its node.

        Raises:
            UserError: If no fit can run here.
        """
        silence()
        torch.set_num_threads(self._config.evaluator.threads)
        node = ray.get_runtime_context().get_node_id()
        self._folder = Path(tempfile.gettempdir(), f"{_FOLDERS}{self._token}-{node[:16]}")
        remove_abandoned(self._folder.parent)
        self._held = hold(self._folder)
        if self._weights:
            path = self._folder / _WEIGHTS
            with _alone(self._folder):
                if not path.exists():
                    write_whole(path, self._weights)
            self._weights = b""
            self._config = replace(
                self._config, model=replace(self._config.model, weights=str(path))
            )
        if self._data.features is not None:
            features = self._folder / "features"
            features.mkdir(exist_ok=True)
            share = share_of(features, self._config.cache.max_gb)
            self._data = replace(self._data, features=features, features_bytes=share)
        for split in (self._data.train, self._data.val):
            _require_readable(split.images)
        return Node(node, socket.gethostname(), made_with(self._config))

    def fit(self, ticket: int, fit: Fit, parcel: Parcel) -> tuple[Outcome, dict[str, bytes]]:
        """Run a fit.

        Args:
            ticket: What `cut` calls it.
            fit: The fit; its folder is the driver's.
            parcel: What else it needs.

        Returns:
            Its outcome, and by name the files that it left in its folder; none if it was cut off.

        Raises:
            UserError: If no fit of this run can work.
            OSError: If the disk is full.
        """
        self._epochs = 0.0
        stop = self._stops.setdefault(ticket, threading.Event())
        run = self._folder / parcel.run
        folder = run / parcel.place
        shutil.rmtree(folder, ignore_errors=True)  # of a worker that was killed
        try:
            with writing(folder):
                folder.mkdir(parents=True)
                with _alone(self._folder):  # else another worker here might read half of it
                    if not (run / JOURNAL).exists():
                        (run / JOURNAL).write_text(parcel.identity, encoding="utf-8")
                if parcel.rung is not None:
                    (folder / RUNG).write_bytes(parcel.rung)
            fitter = Fitter(self._config, self._data, stop, tell=self._count)
            outcome = fitter(replace(fit, folder=folder))
            if outcome.stopped:
                return outcome, {}
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file() and (fit.goes_on or path.name != RUNG)
            }
            return outcome, files
        except OSError as error:
            if is_unwritable(error):
                error.filename = f"{socket.gethostname()}:{error.filename}"
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            del self._stops[ticket]

    def _count(self, epochs: float) -> None:
        self._epochs = epochs

    # While a fit runs, a thread of its own answers what follows.

    @ray.method(concurrency_group="beside")
    def epochs(self) -> float:
        """Return how many epochs the running fit has done."""
        return self._epochs

    @ray.method(concurrency_group="beside")
    def cut(self, ticket: int) -> None:
        """Cut a fit off, whether it has begun or will."""
        self._stops.setdefault(ticket, threading.Event()).set()

    @ray.method(concurrency_group="beside")
    def clear(self) -> None:
        """Remove what lies on this node; no fit will run there any more."""
        shutil.rmtree(self._folder, ignore_errors=True)


def hold(folder: Path) -> int:
    """Make a folder, and keep it from `remove_abandoned` as long as this process lives.

    Returns:
        The descriptor that does so; any number of processes can.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed, as if abandoned
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
            os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of workers that were killed: no process holds them."""
    for folder in parent.glob(f"{_FOLDERS}*"):
        with contextlib.suppress(OSError):  # held, gone, or somebody else's
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), folder.stat()):  # not made anew
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only process of a node that writes what all of its workers read."""
    with (folder / ".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_readable(images: object) -> None:
    """Raise if images that are streamed, from where the driver finds them, are not there."""
    if not isinstance(images, Streamed):
        return
    try:
        images.batch(np.zeros(1, int))
    except Exception as error:  # whatever this node's disks and libraries say
        raise UserError(
            f"{socket.gethostname()} cannot read the images where the driver does, and they are "
            f"too many to be sent: {reason(error)}."
        ) from error
