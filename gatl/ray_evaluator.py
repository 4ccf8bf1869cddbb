"""Fits on a Ray cluster (Moritz et al. 2018, https://arxiv.org/abs/1712.05889).

The driver alone holds the study and the run folder. A worker is an actor of Ray's, see
`gatl.ray_worker`. The images and the backbone's weights reach a node once, through Ray's object
store, whose arrays all of its workers map; what frozen layers give is kept once a node, in its
folder for temporary files. Results, logs and checkpoints come back to the driver.
"""

import contextlib
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import safetensors.torch

from gatl.config import Config
from gatl.data.images import Decoded, Images, Loaded, PreparedData, PreparedSplit, Streamed
from gatl.errors import UserError
from gatl.evaluation import (
    DIED_TWICE,
    RUNG,
    Fit,
    auto_workers,
    reason,
    took_too_long,
    uses_cuda,
)
from gatl.files import is_unwritable, write_whole, writing
from gatl.models.weight_files import CARD_KEY, read_weights
from gatl.outcome import Outcome
from gatl.record import identity, run_folder_of

# Ray reads it once, and would write what it knows of a lost node, a page of it, into the progress.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
try:
    import ray
except ModuleNotFoundError as error:
    raise UserError("evaluator=ray needs Ray: pip install 'gatl[ray]'.") from error
from ray.exceptions import RayError, RayTaskError

from gatl.ray_worker import Node, Parcel, Worker, made_with

Future: TypeAlias = "ray.ObjectRef[Any]"

PATIENCE = 600.0
"""Seconds that the driver waits for a worker when there is none: a cluster may have to grow."""
ATTEMPTS = 3
"""To start a worker."""
CAPACITY_SECONDS = 5.0
"""Between two looks at how many nodes there are."""
MOMENT = 1.0
"""Seconds until a node that was killed counts as dead."""
POLLS_A_SECOND = 200
"""Questions to workers, at most, how far they are; each is asked once a second at most."""
_WAY_ON = "when that is mended, go on with resume= and the run folder"
_ADDRESS = re.compile(r"local|auto|(?:ray://)?([^\s/]+):(\d+)")
_OURS = "gatl"
"""The namespace of what `connect` connects."""


@dataclass
class Actor:
    """A worker as the driver knows it.

    Attributes:
        handle: Ray's.
        attempts: How many before it, in its place, did not start.
        node: Where it is, once it has started.
    """

    handle: Any
    attempts: int
    node: str | None = None


class _Running(NamedTuple):
    """A fit that runs."""

    actor: Actor
    ticket: int
    key: int
    fit: Fit
    since: float  # seconds, as `time.monotonic` has them


@contextlib.contextmanager
def _in_reach() -> Iterator[None]:
    """Say in one line that the cluster is gone."""
    try:
        yield
    except (ConnectionError, RayError) as error:
        raise UserError(
            f"The Ray cluster is out of reach ({_last_line(error)}): {_WAY_ON}."
        ) from error


class RayEvaluator:
    """Runs fits on a Ray cluster, one on each worker at a time.

    A fit whose node is lost runs again on another, however often that happens; one whose worker
    dies on a node that lives runs once more.

    Args:
        config: The run's configuration. ``evaluator.workers=auto`` follows the cluster: as many
            workers of ``evaluator.threads`` CPUs as its nodes have room for.
        data: The decoded images.
        stop: Set to cut the running fits off.
        address: ``local``: a Ray of this machine that lasts as long as the run; ``auto``, a host
            and port, or ``ray://…``: a cluster that is there.
        num_gpus: Of each worker, perhaps a fraction; None: 1 where this process sees a GPU that
            it may use, else 0.

    Raises:
        UserError: If there is no such cluster, it has no room for a worker, or none can start.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        stop: Event,
        address: str = "local",
        num_gpus: float | None = None,
    ) -> None:
        if not ray.is_initialized():
            self.require(config, address, num_gpus)
        self._config, self._stop = config, stop
        gpus = float(uses_cuda(config.trainer)) if num_gpus is None else num_gpus
        self._needs = {"CPU": config.evaluator.threads, "GPU": gpus}
        self._idle: list[Actor] = []
        self._starting: dict[Future, Actor] = {}
        self._running: dict[Future, _Running] = {}
        self._again: list[tuple[int, Fit]] = []  # their workers were lost
        self._lost: dict[int, int] = {}  # by key: how often its worker died on a node that lives
        self._epochs: dict[int, float] = {}  # by key
        self._asked: dict[int, Future] = {}  # by key: how far it is
        self._n_tickets = 0
        self._told = False  # the running fits, that they are to stop
        self._looked = self._polled = -math.inf
        self._seen = time.monotonic()  # when there was a worker
        self._made_with = made_with(config)
        # As with local workers: huge pages, and no module from a folder that anybody may write.
        environment = {
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
            "PYTHONSAFEPATH": os.environ.get("PYTHONSAFEPATH", ""),
        }
        self._build = ray.remote(  # type: ignore[call-overload]
            num_cpus=self._needs["CPU"],
            num_gpus=gpus,
            concurrency_groups={"beside": 1},
            runtime_env={"env_vars": environment},
        )(Worker)
        try:
            self._arguments: tuple[Any, ...] = (
                config,
                ray.put(portable(data)),
                ray.put(packed_weights(config)),
                secrets.token_hex(8),
            )
            self._fill()
            if not self._capacity:
                self._require_growth(address)
            while not self._idle:
                self._take(timeout=1.0)
        except BaseException:
            self.close(now=True)
            raise

    @staticmethod
    def require(config: Config, address: str = "local", num_gpus: float | None = None) -> None:
        """Connect to the cluster, before there is anything to be evaluated.

        Args:
            config: See `RayEvaluator`, as the others.
            address: Likewise.
            num_gpus: Likewise.

        Raises:
            UserError: If there is no such cluster, or a setting is wrong.
        """
        if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
            raise UserError(
                "evaluator.address must be local, auto, HOST:PORT or ray://HOST:PORT, but got "
                f"{address}."
            )
        valid = num_gpus is None or (
            type(num_gpus) in (int, float) and (0 <= num_gpus <= 1 or num_gpus in range(1000))
        )
        if not valid:
            raise UserError(
                "evaluator.num_gpus must be a share in [0, 1], a whole number or null, but got "
                f"{num_gpus}."
            )
        connect(address, config)

    @property
    def n_workers(self) -> int:
        """How many fits run at once, when all workers have started."""
        return max(1, min(self._n_wanted, self._capacity))

    @property
    def n_free(self) -> int:
        """How many more fits it takes now."""
        return len(self._idle)

    @_in_reach()
    def submit(self, key: int, fit: Fit) -> None:
        """Start a fit on an idle worker.

        Raises:
            UserError: If the cluster is gone.
        """
        actor = self._idle.pop(0)
        self._n_tickets += 1
        self._told = False
        self._epochs[key] = 0.0
        future = actor.handle.fit.remote(self._n_tickets, fit, packed(fit))
        self._running[future] = _Running(actor, self._n_tickets, key, fit, time.monotonic())

    @_in_reach()
    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        """Return the fits that have ended, after the first one or ``timeout`` seconds.

        Raises:
            UserError: If a fit says that none can work, there is no worker any more, or the
                cluster is gone.
            OSError: If the disk is full, here or on a node.
        """
        if self._stop.is_set() and not self._told:
            self._told = True
            for running in self._running.values():
                running.actor.handle.cut.remote(running.ticket)
        ended = [*self._take(timeout), *self._give_up()]
        self._fill()
        if self._stop.is_set():
            for key, _ in self._again:
                self._forget(key)
                ended.append((key, Outcome(stopped=True)))
            self._again.clear()
        while self._again and self._idle:
            self.submit(*self._again.pop(0))
        self._poll()
        return sorted(ended, key=lambda pair: pair[0])

    def epochs_done(self, key: int) -> float:
        """Return how many epochs a running fit has done, as its worker said last."""
        return self._epochs.get(key, 0.0)

    def close(self, *, now: bool = False) -> None:
        """End the workers, once their fits have ended: set ``stop`` to make that soon.

        Args:
            now: Kill them, whatever they do; those whose fits take longer than
                ``evaluator.timeout`` to end are killed in any case.
        """
        if not ray.is_initialized():
            return
        deadline = time.monotonic() + (0 if now else self._config.evaluator.seconds)
        with contextlib.suppress(UserError, OSError, RayError):  # too late to tell
            while self._running and time.monotonic() < deadline:
                self.wait(timeout=1.0)
        one_a_node = {actor.node: actor for actor in self._idle}.values()
        busy = [running.actor for running in self._running.values()]
        with contextlib.suppress(ConnectionError, RayError):  # what is gone needs no end
            if cleared := [actor.handle.clear.remote() for actor in one_a_node]:
                ray.wait(cleared, num_returns=len(cleared), timeout=MOMENT)
            for actor in (*self._idle, *busy, *self._starting.values()):
                ray.kill(actor.handle)
        self._idle, self._starting, self._running, self._again = [], {}, {}, []
        self._asked, self._arguments = {}, ()  # so the object store lets go of the images
        if _is_ours():
            ray.shutdown()

    def _require_growth(self, address: str) -> None:
        """Say that there is no room for a worker yet; raise unless there may ever be.

        Raises:
            UserError: If so.
        """
        lack = (
            f"No node of the Ray cluster has room for a worker, {self._needed}: there are "
            f"{_said(_resources())}"
        )
        less = "ask for less (evaluator.num_gpus, evaluator.threads)"
        if address == "local":
            raise UserError(f"{lack}; {less}.")
        if not self._starting:
            raise UserError(f"{lack}; {less}, or give evaluator.workers=1 or more to wait for one.")
        sys.stderr.write(f"gatl: {lack}; waiting {PATIENCE / 60:g} minutes for one.\n")

    def _take(self, timeout: float) -> list[tuple[int, Outcome]]:
        """Take what workers have sent after so many seconds: that they have started, results."""
        ended = []
        for future in _done([*self._running, *self._starting], timeout):
            if future in self._starting:
                self._welcome(future)
            elif (result := self._result(future)) is not None:
                ended.append(result)
        if self._idle or self._running:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > PATIENCE:
            raise UserError(
                f"The Ray cluster has had no worker, {self._needed}, for {PATIENCE / 60:g} "
                f"minutes: there are {_said(_resources())}; {_WAY_ON}."
            )
        return ended

    def _welcome(self, future: Future) -> None:
        """Take a worker that has started; start another if it has not."""
        actor = self._starting.pop(future)
        try:
            node: Node = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, UserError) or is_unwritable(error.cause):
                raise error.cause from error
            raise UserError(f"A worker of Ray's cannot start: {reason(error.cause)}.") from error
        except RayError as error:
            if actor.attempts + 1 >= ATTEMPTS:
                raise UserError(
                    f"No worker of Ray's can start ({_last_line(error)}): has each node this "
                    "version of gatl?"
                ) from error
            self._start(actor.attempts + 1)
            return
        for name, ours in self._made_with.items():
            if (theirs := node.made_with.get(name)) != ours:
                hint = " (give trainer.precision)" if name == "precision" else ""
                raise UserError(
                    f"Results would depend on where a fit runs: {name} is {theirs} on {node.name}, "
                    f"{ours} here{hint}."
                )
        actor.node = node.id
        self._idle.append(actor)

    def _result(self, future: Future) -> tuple[int, Outcome] | None:
        """Take what a fit came to; None if it is to run again."""
        running = self._running.pop(future)
        try:
            outcome, files = ray.get(future)
        except RayTaskError as error:
            raise error.cause from error
        except RayError:
            return self._lose(running)
        self._idle.append(running.actor)
        self._forget(running.key)
        if not outcome.stopped:
            unpack(running.fit.folder, files)
        return running.key, outcome

    def _lose(self, running: _Running) -> tuple[int, Outcome] | None:
        """Do without a worker; its fit is to run again, unless that is why it was lost."""
        key = running.key
        ray.kill(running.actor.handle)  # it is gone, or out of reach
        self._epochs[key], self._looked = 0.0, -math.inf
        self._asked.pop(key, None)
        if self._stop.is_set():
            self._forget(key)
            return key, Outcome(stopped=True)
        self._lost[key] = self._lost.get(key, 0) + _stays_alive(running.actor.node)
        if self._lost[key] < 2:
            self._again.append((key, running.fit))
            return None
        self._forget(key)
        return key, Outcome(error=DIED_TWICE)

    def _give_up(self) -> list[tuple[int, Outcome]]:
        """Kill the workers of fits that take too long, and return these fits."""
        settings, now = self._config.evaluator, time.monotonic()
        late = [ref for ref, fit in self._running.items() if now - fit.since > settings.seconds]
        ended = []
        for future in late:
            running = self._running.pop(future)
            ray.kill(running.actor.handle)
            self._forget(running.key)
            ended.append((running.key, took_too_long(settings, now - running.since)))
        return ended

    def _forget(self, key: int) -> None:
        for known in (self._lost, self._epochs, self._asked):
            known.pop(key, None)

    def _fill(self) -> None:
        """Start workers, as many as are asked for or as the cluster has room for."""
        if time.monotonic() - self._looked > CAPACITY_SECONDS:
            self._looked = time.monotonic()
            self._capacity = sum(room(node["Resources"], self._needs) for node in _living())
            count = self._config.evaluator.workers
            self._n_wanted = self._capacity if count == "auto" else int(count)
        n_actors = len(self._idle) + len(self._running) + len(self._starting)
        for _ in range(self._n_wanted - n_actors):
            self._start()

    def _start(self, attempts: int = 0) -> None:
        actor = Actor(self._build.remote(*self._arguments), attempts)
        self._starting[actor.handle.start.remote()] = actor

    def _poll(self) -> None:
        """Ask the workers now and then how far they are, and take what they have answered."""
        if time.monotonic() - self._polled < max(1.0, len(self._running) / POLLS_A_SECOND):
            return
        self._polled = time.monotonic()
        answers = _done([*self._asked.values()])
        for key, answer in [*self._asked.items()]:
            if answer in answers:
                del self._asked[key]
                with contextlib.suppress(RayError):  # it is lost
                    self._epochs[key] = ray.get(answer)
        for running in self._running.values():
            if running.key not in self._asked:
                self._asked[running.key] = running.actor.handle.epochs.remote()

    @property
    def _needed(self) -> str:
        return f"which takes {_said(self._needs)}"


def connect(address: str, config: Config) -> None:
    """Connect this process to a Ray cluster, unless somebody else has connected it.

    Raises:
        UserError: If that cannot be done.
    """
    if ray.is_initialized() and not _is_ours():
        return
    ray.shutdown()  # of a job that failed
    local: dict[str, Any] = {}
    if address == "local":
        local["include_dashboard"] = False
        count = config.evaluator.workers
        if count != "auto" or not uses_cuda(config.trainer):  # else GPUs are what counts
            n_workers = auto_workers(config) if count == "auto" else int(count)
            local["num_cpus"] = n_workers * config.evaluator.threads
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    before = signal.getsignal(signal.SIGTERM)
    listens = False
    try:
        if (there := _ADDRESS.fullmatch(address)) and there[2]:  # Ray would try for 14 minutes
            socket.create_connection((there[1].strip("[]"), int(there[2])), timeout=10).close()
            listens = True
        with warnings.catch_warnings(action="ignore"):  # its error says the same
            ray.init(
                address, namespace=_OURS, log_to_driver=False, configure_logging=False, **local
            )
    except Exception as error:  # Ray raises many kinds
        if address == "local":
            raise UserError(
                f"evaluator=ray: Ray cannot be started on this machine ({_last_line(error)})."
            ) from error
        way_out = (
            "something listens there; if it is a Ray cluster with a token, this process needs "
            "RAY_AUTH_MODE=token and the cluster's ~/.ray/auth_token"
            if listens
            else "start a Ray cluster there (ray start --head), or give evaluator.address=local"
        )
        raise UserError(
            f"evaluator.address={address} cannot be reached ({_last_line(error)}): {way_out}."
        ) from error
    signal.signal(signal.SIGTERM, before)  # Ray has one of its own


def _is_ours() -> bool:
    """Whether `connect` has connected this process, or the connection is of no use to anybody."""
    try:
        return bool(ray.is_initialized() and ray.get_runtime_context().namespace == _OURS)
    except ConnectionError:  # Ray's client asks the cluster
        return True


def portable(data: PreparedData) -> PreparedData:
    """Return the images of a run for other machines: arrays in place of files, no test split.

    Streamed images stay where they are.
    """
    train, val = (replace(split, images=_loaded(split.images)) for split in (data.train, data.val))
    nothing = np.zeros((0, data.image_size, data.image_size, 3), np.uint8)
    test = PreparedSplit(Loaded(nothing), data.test.labels[:0], (), data.test.digests[:0])
    return replace(data, train=train, val=val, test=test)


def _loaded(images: Images) -> Images:
    if isinstance(images, Streamed) and isinstance(images.images, Decoded):
        return replace(images, images=Loaded(np.asarray(images.images.array)))
    return Loaded(np.asarray(images.array)) if isinstance(images, Decoded) else images


def packed_weights(config: Config) -> bytes:
    """Return what ``model.weights`` names as a safetensors file; empty for ``none``."""
    weights = read_weights(config.model.weights, config.model.sources)
    if weights is None:
        return b""
    tensors = {name: tensor.clone().contiguous() for name, tensor in weights.tensors.items()}
    return safetensors.torch.save(tensors, metadata={CARD_KEY: json.dumps(dict(weights.card))})


def packed(fit: Fit) -> Parcel:
    """Return what a worker needs of the run folder."""
    run, rung = run_folder_of(fit.folder), fit.folder / RUNG
    content = rung.read_bytes() if rung.is_file() else None
    return Parcel(run.name, fit.folder.relative_to(run).as_posix(), identity(run), content)


def unpack(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put the files of a fit where they belong; no others stay."""
    with writing(folder):
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        for path in [*folder.rglob("*")]:
            if path.is_file() and path.relative_to(folder).as_posix() not in files:
                path.unlink()


def room(has: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """Return how many workers a node has room for.

    Args:
        has: Its resources.
        needs: A worker's. Less than one is a share of a single device.
    """
    counts = [
        math.floor(has.get(what, 0)) * math.floor(1 / n + 1e-9)
        if n < 1
        else math.floor(has.get(what, 0) / n)
        for what, n in needs.items()
        if n > 0
    ]
    return min(counts)


def _done(futures: list[Future], timeout: float = 0.0) -> list[Future]:
    """Return those that are there, after the first one or so many seconds."""
    if not futures:
        time.sleep(timeout)
        return []
    ray.wait(futures, timeout=timeout)
    done: list[Future] = ray.wait(futures, num_returns=len(futures), timeout=0)[0]
    return done


def _living() -> list[dict[str, Any]]:
    """Return the nodes of the cluster that live."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _resources() -> dict[str, float]:
    """Return what the cluster has."""
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _stays_alive(node: str | None) -> bool:
    """Whether a node, of which a worker was lost, lives on."""
    deadline = time.monotonic() + MOMENT
    while any(known["NodeID"] == node for known in _living()):
        if time.monotonic() > deadline:
            return True
        time.sleep(MOMENT / 10)
    return False


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _said(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(what, 0):g} {what}" for what in ("CPU", "GPU"))
