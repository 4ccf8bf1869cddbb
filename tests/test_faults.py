"""Real faults of real processes: fits that hang, workers that are killed, memory that runs out.

What a fit itself does about them is in test_evaluation.py, what the search does in test_search.py.
"""

import functools
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pytest

from gatl import evaluation
from gatl.cli import compose
from gatl.config import Config, checked
from gatl.data.images import PreparedData, prepare
from gatl.data.source import Source, Split, in_memory
from gatl.errors import UserError
from gatl.evaluation import Fit, LocalEvaluator
from gatl.outcome import Outcome

GENES = {"included_layers": 5, "frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.3}
FOREVER = 10**6


@functools.cache
def configure(*overrides: str) -> Config:
    common = ("model=lenet5", "data.batch_size=8", "trainer.accelerator=cpu", "evaluator.workers=1")
    return checked(compose([*common, *overrides]))


def make_data(folder: Path, n: int = 24, side: int = 32) -> PreparedData:
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        pixels = rng.integers(0, 256, (n, side, side, 3), np.uint8)
        return in_memory(pixels, np.arange(n) % 2, str(n))

    source = Source(("a", "b"), split(n), split(10), split(4))
    folder.mkdir(exist_ok=True)
    return prepare(source, image_size=side, split_seed=0, max_bad=0, folder=folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_data(tmp_path_factory.mktemp("images"))


class Workers:
    """A LocalEvaluator, and what a test does with it."""

    def __init__(self, config: Config, data: PreparedData, folder: Path) -> None:
        self.stop = multiprocessing.get_context("spawn").Event()
        self.evaluator, self.folder = LocalEvaluator(config, data, self.stop), folder

    def submit(self, key: int, epochs: int = 1) -> int:
        """Start a fit; returns the process id of its worker."""
        self.evaluator.submit(key, Fit(GENES, epochs, 3, self.folder / str(key)))
        return self.pid(key)

    def pid(self, key: int) -> int:
        """Return the process id of the worker that has a fit now."""
        worker = next(fit.worker for fit in self.evaluator._running.values() if fit.key == key)
        (pid,) = self.evaluator._pools[worker]._processes
        return int(pid)

    def drain(self, n: int = 1) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + 100
        while len(outcomes) < n and time.monotonic() < deadline:
            outcomes |= dict(self.evaluator.wait(0.1))
        return outcomes

    def begun(self, key: int) -> None:
        """Wait until a fit trains."""
        since, log = time.time(), self.folder / str(key) / "metrics.csv"
        while not (log.exists() and log.stat().st_mtime > since):
            assert self.evaluator.wait(0.05) == []


@pytest.fixture
def workers(data: PreparedData, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(configure("evaluator.workers=2", "evaluator.timeout=5s"), data, tmp_path)
    yield made
    made.stop.set()
    made.evaluator.close(now=True)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def gone(pid: int) -> bool:
    """Whether a process ends soon."""
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_fit_that_hangs_is_killed_and_no_other(workers):
    """A stopped process does nothing and hears no signal but SIGKILL."""
    workers.submit(0), workers.submit(1)
    assert all(outcome.error is None for outcome in workers.drain(2).values())
    hanging = workers.submit(2)
    os.kill(hanging, signal.SIGSTOP)
    sound = workers.submit(3)
    outcomes = workers.drain(2)
    assert outcomes[2].error == "killed after evaluator.timeout=5s"
    assert 5 < outcomes[2].duration_s < 30
    assert outcomes[3].error is None
    assert gone(hanging)
    assert alive(sound)
    assert workers.evaluator.n_free == 2
    workers.submit(4), workers.submit(5)  # it is replaced
    assert all(outcome.error is None for outcome in workers.drain(2).values())


@pytest.mark.slow
def test_fit_that_takes_too_long_is_killed_even_when_all_are_to_stop(workers):
    workers.submit(0, FOREVER)
    hanging = workers.submit(1)
    os.kill(hanging, signal.SIGSTOP)
    workers.begun(0)
    workers.stop.set()
    outcomes = workers.drain(2)
    assert outcomes[0].stopped
    assert outcomes[1].error == "killed after evaluator.timeout=5s"


@pytest.mark.slow
def test_closing_waits_no_longer_than_the_timeout(workers):
    hanging = workers.submit(0)
    os.kill(hanging, signal.SIGSTOP)
    started = time.monotonic()
    workers.evaluator.close()
    assert time.monotonic() - started < 30
    assert gone(hanging)


@pytest.fixture
def unlimited(data: PreparedData, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(configure("evaluator.workers=2"), data, tmp_path)
    yield made
    made.stop.set()
    made.evaluator.close(now=True)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_worker_that_is_killed_while_it_starts_is_replaced(unlimited):
    kill(unlimited.submit(0))
    assert unlimited.drain()[0].error is None


@pytest.mark.slow
def test_fork_server_that_is_killed_again_and_again_costs_no_fit(unlimited):
    """It takes all workers with it, so that says nothing of a fit."""
    pids = [unlimited.submit(key, FOREVER) for key in (0, 1)]
    for _ in range(3):
        for key in (0, 1):
            unlimited.begun(key)
        kill(forkserver._forkserver._forkserver_pid)
        deadline = time.monotonic() + 60
        while set(pids) & {unlimited.pid(0), unlimited.pid(1)} and time.monotonic() < deadline:
            assert unlimited.evaluator.wait(0.1) == []
        assert all(gone(pid) for pid in pids)  # nobody else writes where these fits write
        pids = [unlimited.pid(key) for key in (0, 1)]
    for key, pid in enumerate(pids):
        assert alive(pid), key
    unlimited.stop.set()
    assert all(outcome.stopped for outcome in unlimited.drain(2).values())


@pytest.mark.slow
def test_fork_server_that_is_killed_while_workers_are_idle_costs_no_fit(unlimited):
    unlimited.submit(0), unlimited.submit(1)
    expected = unlimited.drain(2)
    kill(forkserver._forkserver._forkserver_pid)
    unlimited.submit(2), unlimited.submit(3)
    outcomes = unlimited.drain(2)
    assert outcomes[2].val_loss == outcomes[3].val_loss == expected[0].val_loss


@pytest.mark.slow
def test_fork_server_that_is_killed_while_it_starts_is_started_again(unlimited):
    unlimited.submit(0)
    unlimited.drain()
    kill(forkserver._forkserver._forkserver_pid)

    def kill_the_next(before: int = forkserver._forkserver._forkserver_pid) -> None:
        while forkserver._forkserver._forkserver_pid in (before, None):
            time.sleep(0.001)
        time.sleep(0.1)  # it imports torch now, and the driver waits for it
        kill(forkserver._forkserver._forkserver_pid)

    killer = threading.Thread(target=kill_the_next)
    killer.start()
    unlimited.submit(1)
    killer.join()
    assert unlimited.drain()[1].error is None


def address_space(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().vms)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits other processes")
@pytest.mark.parametrize(
    ("more", "error", "micro_batch"),
    [
        (2000, None, None),
        (570, None, 128),
        (100, "out of memory: lower data.batch_size or data.image_size, or evaluator.workers", 128),
    ],
)
def test_real_want_of_memory_in_a_worker(tmp_path, more, error, micro_batch):
    """A step takes 700 MiB, one in halves 430, of what is shared with JIT code and the like."""
    data = make_data(tmp_path / "images", n=256, side=128)
    config = configure("data.image_size=128", "data.batch_size=256")
    workers = Workers(config, data, tmp_path)
    small = {**GENES, "included_layers": 1, "frozen_layers": 1}
    workers.evaluator.submit(0, Fit(small, 1, 3, tmp_path / "0"))
    pid = workers.pid(0)
    assert workers.drain()[0].error is None
    limit = address_space(pid) + more * 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    assert workers.submit(1) == pid
    outcome = workers.drain()[1]
    if error is None:
        assert outcome.error is None
        assert outcome.val_loss == pytest.approx(0.693, abs=0.05)
    else:
        assert outcome.error.startswith(error)
        resource.prlimit(pid, resource.RLIMIT_AS, 2 * (resource.RLIM_INFINITY,))
        assert workers.submit(2) == pid  # it has survived that, and still works
        assert workers.drain()[2].micro_batch is None
    assert outcome.micro_batch == micro_batch
    assert (tmp_path / "1" / "error.txt").exists() == (micro_batch is not None)
    workers.evaluator.close()


def test_when_no_worker_can_be_started_one_line_says_so(unlimited, monkeypatch):
    def refuse(*args: object) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(evaluation, "MOMENT", 0.001)
    monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse)
    with pytest.raises(UserError, match=r"can be started \(EOFError: unexpected EOF\)") as error:
        unlimited.submit(0)
    assert "\n" not in str(error.value)
