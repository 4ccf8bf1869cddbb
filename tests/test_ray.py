"""Fits on a Ray cluster are those of the local evaluator, whatever becomes of its nodes."""

import contextlib
import csv
import dataclasses
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from gatl import ray_evaluator
from gatl.cli import compose
from gatl.config import Config, checked
from gatl.data.images import Decoded, PreparedData, Streamed
from gatl.errors import UserError
from gatl.evaluation import RUNG, Fit, Fitter
from gatl.models.weight_files import read_weights
from gatl.ray_evaluator import RayEvaluator, packed_weights, portable, room, unpack
from gatl.ray_worker import hold, remove_abandoned

pytestmark = pytest.mark.usefixtures("as_in_a_worker")

LENET = ("model=lenet5", "data.image_size=32", "data.batch_size=8", "trainer.accelerator=cpu")
GENES = {"included_layers": 5, "frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.3}
FOREVER = 10**6
PATIENCE = 600.0
"""Seconds until a test gives up."""


def configure(*overrides: str) -> Config:
    return checked(compose([*LENET, "evaluator=ray", *overrides]))


@pytest.mark.parametrize(
    ("has", "needs", "count"),
    [
        ({"CPU": 8.0}, {"CPU": 3, "GPU": 0.0}, 2),
        ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1, "GPU": 1.0}, 2),
        ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1, "GPU": 0.4}, 4),  # no share spans two devices
        ({"CPU": 8.0, "GPU": 1.0}, {"CPU": 1, "GPU": 0.1}, 8),
        ({"CPU": 8.0}, {"CPU": 1, "GPU": 1.0}, 0),
        ({"memory": 8.0}, {"CPU": 1, "GPU": 0.0}, 0),
    ],
)
def test_a_node_has_room_for_whole_workers(has, needs, count):
    assert room(has, needs) == count


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpus": -1},
        {"num_gpus": 1.5},
        {"num_gpus": "many"},
        {"num_gpus": float("nan")},
        {"num_gpus": True},
        {"address": 3},
        {"address": ""},
        {"address": "nonsense"},
        {"address": "http://127.0.0.1:8265"},
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_started(settings):
    with pytest.raises(UserError, match=r"evaluator\.(num_gpus|address) must be"):
        RayEvaluator.require(configure(), **settings)
    assert not ray.is_initialized()


def test_images_travel_as_arrays_and_without_the_test_split(data):
    sent = portable(data)
    for split in ("train", "val"):
        before, after = (getattr(each, split) for each in (data, sent))
        indices = np.arange(len(before))[::-1]
        assert isinstance(before.images, Decoded)
        assert not isinstance(after.images, Decoded)
        assert torch.equal(before.images.batch(indices), after.images.batch(indices))
        assert after.digest == before.digest
    assert len(sent.test) == len(sent.test.images) == 0


def test_streamed_arrays_travel_and_streamed_files_stay(data, tmp_path):
    spilled = Streamed(data.train.images, 32)
    files = Streamed([tmp_path / "1.png"], 32)
    split = dataclasses.replace(data.train, images=spilled)
    sent = portable(dataclasses.replace(data, train=split)).train.images
    assert not isinstance(sent.images, Decoded)
    assert torch.equal(sent.batch(np.arange(3)), spilled.batch(np.arange(3)))
    split = dataclasses.replace(data.val, images=files)
    assert portable(dataclasses.replace(data, val=split)).val.images is files


def test_weights_travel_with_their_card(tmp_path):
    config = checked(compose(["model=se_densenet121_k12"]))
    path = tmp_path / "sent.safetensors"
    path.write_bytes(packed_weights(config))
    before, after = (read_weights(spec, config.model.sources) for spec in ("bundled", str(path)))
    assert after.card == before.card
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in after.tensors)
    assert packed_weights(configure("model.weights=none")) == b""


def test_the_files_of_a_fit_take_the_place_of_older_ones(tmp_path):
    folder = tmp_path / "trials" / "3"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "old").write_text("old")
    (folder / RUNG).write_text("old")
    unpack(folder, {RUNG: b"new", "a/metrics.csv": b"1,2\n"})
    assert (folder / RUNG).read_bytes() == b"new"
    assert (folder / "a" / "metrics.csv").read_bytes() == b"1,2\n"
    assert not (folder / "deep" / "old").exists()


def test_what_a_killed_worker_leaves_on_a_node_is_removed_and_no_more(tmp_path):
    script = (
        "import pathlib, sys, time; from gatl.ray_worker import hold; "
        "hold(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    held, abandoned, other = (tmp_path / name for name in ("gatl-ray-1", "gatl-ray-2", "mine"))
    for folder in (abandoned, other):
        folder.mkdir()
    worker = subprocess.Popen([sys.executable, "-c", script, held], stdout=subprocess.PIPE)
    try:
        assert worker.stdout.readline() == b"held\n"
        remove_abandoned(tmp_path)
        assert not abandoned.exists()
        assert held.exists()
        assert other.exists()
        os.close(hold(held))  # several workers share a node's
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    remove_abandoned(tmp_path)
    assert not held.exists()


def test_a_workers_folder_that_is_made_anew_is_not_taken_for_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "gatl-ray-1"
    folder.mkdir()

    def lock(descriptor, how):  # too late
        folder.rmdir()
        folder.mkdir()

    monkeypatch.setattr(fcntl, "flock", lock)
    remove_abandoned(tmp_path)
    assert folder.exists()


@contextlib.contextmanager
def evaluator_on(
    config: Config, data: PreparedData, **settings: object
) -> Iterator[tuple[RayEvaluator, multiprocessing.synchronize.Event]]:
    stop = multiprocessing.get_context("spawn").Event()
    evaluator = RayEvaluator(config, data, stop, **settings)
    try:
        yield evaluator, stop
    finally:
        stop.set()
        evaluator.close(now=True)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def all_of(evaluator: RayEvaluator, keys: set[int]) -> dict:
    """Wait for fits; return their outcomes without the durations, which nothing determines."""
    ended = {}
    deadline = time.monotonic() + PATIENCE
    while ended.keys() != keys:
        assert time.monotonic() < deadline
        ended |= dict(evaluator.wait(1.0))
    return {key: dataclasses.replace(outcome, duration_s=0) for key, outcome in ended.items()}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the nodes of this test keep temporary files; Ray's sockets allow no long path."""
    with tempfile.TemporaryDirectory(prefix="gatl-nodes-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_on_a_ray_of_this_machine_fits_are_as_anywhere(data, tmp_path, nodes, monkeypatch):
    config = configure("evaluator.workers=2")
    here = Fitter(config, data, multiprocessing.get_context("spawn").Event())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.journal").write_text("first\nsecond\n")
    before = signal.getsignal(signal.SIGTERM)
    with evaluator_on(config, data) as (evaluator, stop):
        assert signal.getsignal(signal.SIGTERM) is before
        assert evaluator.n_workers == 2
        until(lambda: evaluator.wait(0.1) == [] and evaluator.n_free == 2)
        # Up to a rung, and from there to the end.
        for epochs, goes_on in ((1, True), (2, False)):
            fit = Fit(GENES, epochs, 3, tmp_path / "run" / "trials" / "0", goes_on)
            evaluator.submit(7, fit)
            assert evaluator.n_free == 1
            there = all_of(evaluator, {7})[7]
            locally = dataclasses.replace(fit, folder=tmp_path / "local" / "trials" / "0")
            assert there == dataclasses.replace(here(locally), duration_s=0)
            assert there.epochs == epochs
            for path in locally.folder.iterdir():
                if path.name != RUNG or goes_on:
                    came = fit.folder / path.name
                    assert came.is_file()
                    assert path.name == RUNG or came.read_bytes() == path.read_bytes()
        assert not (fit.folder / RUNG).exists()
        # One fails, one runs for ever until it is cut off; both workers go on.
        broken = Fit(GENES | {"learning_rate": "x"}, 1, 3, tmp_path / "run" / "trials" / "1")
        evaluator.submit(1, broken)
        evaluator.submit(2, Fit(GENES, FOREVER, 3, tmp_path / "run" / "trials" / "2"))
        assert "TypeError" in all_of(evaluator, {1})[1].error
        assert "Traceback" in (broken.folder / "error.txt").read_text()
        until(lambda: evaluator.wait(0.1) == [] and evaluator.epochs_done(2) > 1)
        stop.set()
        assert all_of(evaluator, {2})[2].stopped
        stop.clear()
        evaluator.submit(2, Fit(GENES, 1, 3, tmp_path / "run" / "trials" / "2"))
        assert all_of(evaluator, {2})[2].epochs == 1
        assert len([*nodes.glob("gatl-ray-*")]) == 1
        evaluator.submit(3, Fit(GENES, 1, 3, tmp_path / "run" / "trials" / "3"))
        with monkeypatch.context() as patch:
            gone = Mock(side_effect=ConnectionError("Client is shutting down."))
            patch.setattr(ray, "wait", gone)
            with pytest.raises(UserError, match=r"out of reach \(Client .*\): .* resume="):
                evaluator.wait(0.1)
        evaluator.close()
        assert not ray.is_initialized()
    assert [*nodes.glob("gatl-ray-*")] == []


@pytest.mark.parametrize("kind", ["", "ray://"])
def test_where_nobody_listens_is_one_line_and_soon(kind):
    begun = time.monotonic()
    with pytest.raises(
        UserError, match=r"evaluator\.address=.*127.* cannot be reached .*ray start"
    ):
        RayEvaluator.require(configure(), f"{kind}127.0.0.1:1")
    assert not ray.is_initialized()
    assert time.monotonic() - begun < 5  # Ray itself takes 40 seconds, or 14 minutes


@pytest.mark.parametrize("kind", ["", "ray://"])
def test_a_cluster_that_refuses_is_told_from_none(kind, monkeypatch):
    monkeypatch.setattr(ray, "init", Mock(side_effect=ConnectionError("ray client timeout")))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{kind}127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=r"\(ray client timeout\): .*RAY_AUTH_MODE=token"):
            RayEvaluator.require(configure(), address)


def test_room_that_there_is_not_is_waited_for_where_it_may_come(monkeypatch, capsys):
    evaluator = RayEvaluator.__new__(RayEvaluator)
    evaluator._needs, evaluator._starting = {"CPU": 1, "GPU": 1}, {}
    monkeypatch.setattr("gatl.ray_evaluator._resources", lambda: {"CPU": 2.0})
    lack = r"takes 1 CPU, 1 GPU: there are 2 CPU, 0 GPU; ask for less \(evaluator\.num_gpus"
    with pytest.raises(UserError, match=lack + r".*evaluator\.workers=1"):
        evaluator._require_growth("auto")
    evaluator._starting = {Mock(): Mock()}  # as many as evaluator.workers says
    with pytest.raises(UserError, match=lack + r", evaluator\.threads\)\.$"):
        evaluator._require_growth("local")
    evaluator._require_growth("auto")
    assert "there are 2 CPU, 0 GPU; waiting 10 minutes for one.\n" in capsys.readouterr().err


def test_a_worker_that_cannot_start_is_one_line(monkeypatch):
    evaluator = RayEvaluator.__new__(RayEvaluator)
    for cause, said in (
        (UserError("no images there"), r"^no images there$"),
        (PermissionError(13, "Permission denied"), r"worker of Ray's cannot start: Permission.*13"),
    ):
        evaluator._starting = {"future": ray_evaluator.Actor(None, 0)}
        error = ray.exceptions.RayTaskError("start", "Traceback", cause)
        monkeypatch.setattr(ray, "get", lambda future, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match=said):
            evaluator._welcome("future")


@pytest.mark.slow
def test_on_somebody_elses_ray_what_cannot_be_is_one_line_and_it_stays(data, nodes, monkeypatch):
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with (
            pytest.raises(UserError, match="room for a worker, which takes 2 CPU, 0 GPU: there"),
            evaluator_on(configure("evaluator.threads=2"), data),
        ):
            pass
        other = {**ray_evaluator.made_with(configure()), "torch": "0.1"}
        monkeypatch.setattr(ray_evaluator, "made_with", lambda config: other)
        with (
            pytest.raises(UserError, match=r"Results would depend on .* torch is .*, 0\.1 here\."),
            evaluator_on(configure(), data),
        ):
            pass
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def workers(nodes: Path) -> list[psutil.Process]:
    """Return the workers that are here, of whatever node, by the folder of it that they hold."""
    found = []
    for process in psutil.process_iter():
        for link in Path("/proc", str(process.pid)).glob("fd/*"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if link.readlink().parent == nodes and process not in found:
                    found.append(process)
    return found


def busiest(nodes: Path) -> psutil.Process:
    """Return the worker that computes most."""
    before = {worker: sum(worker.cpu_times()[:2]) for worker in workers(nodes)}
    time.sleep(1)
    return max(before, key=lambda worker: sum(worker.cpu_times()[:2]) - before[worker])


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_costs_its_fit_alone(data, tmp_path, nodes):
    config = configure("evaluator.workers=2", "evaluator.timeout=90s")
    forever = Fit(GENES, FOREVER, 3, tmp_path / "trials" / "0")
    with evaluator_on(config, data) as (evaluator, _):
        evaluator.submit(0, forever)
        until(lambda: evaluator.wait(0.1) == [] and evaluator.epochs_done(0) > 0)
        busiest(nodes).kill()
        until(lambda: evaluator.wait(0.1) == [] and evaluator.epochs_done(0) == 0)
        until(lambda: evaluator.wait(0.1) == [] and evaluator.epochs_done(0) > 0)  # once more
        busiest(nodes).kill()
        assert "died twice" in all_of(evaluator, {0})[0].error
        until(lambda: evaluator.wait(0.1) == [] and evaluator.n_free == 2)
        begun = time.monotonic()
        evaluator.submit(0, forever)
        evaluator.submit(1, Fit(GENES, 1, 3, tmp_path / "trials" / "1"))
        outcomes = all_of(evaluator, {0, 1})
        assert outcomes[0].error == "killed after evaluator.timeout=90s"
        assert time.monotonic() - begun > 90
        assert outcomes[1].error is None
        until(lambda: evaluator.wait(0.1) == [] and evaluator.n_free == 2)


SEARCH = (
    *("data=digits", "model=se_densenet121_k12", "data.image_size=32", "data.batch_size=32"),
    *("trainer.accelerator=cpu", "space.included_layers.high=3", "space.frozen_layers.high=2"),
    *("ga.pop=5", "ga.generations=2", "final.top_k=1", "final.seeds=1", "final.max_epochs=1"),
)


def start(words: tuple[str, ...], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "gatl", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=file,
            stderr=file,
        )


def told(folder: Path) -> list[dict[str, str]]:
    """Return the rows of ``history.csv`` without what nothing determines."""
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("duration_s", "started_s", "fits"):
            del row[name]
    return rows


@pytest.mark.slow
def test_with_a_node_and_the_driver_killed_it_is_the_search_of_one_local_worker(tmp_path, nodes):
    log = tmp_path / "log"
    for n_workers in (1, 2):
        words = (*SEARCH, f"evaluator.workers={n_workers}", f"hydra.run.dir={tmp_path}/{n_workers}")
        assert start(words, log).wait() == 0, log.read_text()
    folder = tmp_path / "ray"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        others = [cluster.add_node(num_cpus=1) for _ in range(2)]
        at = ("evaluator=ray", f"evaluator.address={cluster.address}")
        driver = start((*SEARCH, *at, f"hydra.run.dir={folder}"), log)
        history = folder / "history.csv"
        until(lambda: history.is_file() and len(told(folder)) >= 1)
        # A node goes, as if its machine were switched off: all of its processes at once.
        raylets = {node.all_processes["raylet"][0].process.pid for node in others}
        while (parent := busiest(nodes).ppid()) not in raylets:
            assert driver.poll() is None, log.read_text()
        raylet = psutil.Process(parent)
        for process in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        n_told = len(told(folder))
        until(lambda: len(told(folder)) > n_told + 1 or driver.poll() is not None)
        assert driver.poll() is None, log.read_text()
        driver.kill()
        driver.wait()
        until(lambda: not workers(nodes))  # workers end with their driver
        again = (f"resume={folder}", f"trust={cluster.address}")
        assert start(again, log).wait() == 0, log.read_text()
    finally:
        cluster.shutdown()
    assert told(folder) == told(tmp_path / "1") == told(tmp_path / "2")
    assert all(row["error"] == "" for row in told(folder))
    assert "Traceback" not in log.read_text()
    ours, locally = (
        torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
        for run in (folder, tmp_path / "1")
    )
    assert all(torch.equal(value, locally[name]) for name, value in ours.items())
    for trial in (tmp_path / "1" / "trials").iterdir():
        theirs = folder / "trials" / trial.name
        assert sorted(p.name for p in theirs.iterdir()) == sorted(p.name for p in trial.iterdir())
        for log in trial.glob("metrics.csv"):
            assert (theirs / log.name).read_text() == log.read_text()
    # The folder of the node that was killed was found by the next worker on this machine.
    assert [*nodes.glob("gatl-ray-*")] == []
