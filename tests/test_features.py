"""The feature cache: the same fits as without it, and nothing stale, torn or too large."""

import dataclasses
import functools
import io
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from gatl import evaluation, features
from gatl.cli import compose
from gatl.config import Config, checked
from gatl.data.images import PreparedData, Streamed, prepare
from gatl.data.source import Source, Split, in_memory
from gatl.evaluation import Fit, Fitter, LocalEvaluator, build_classifier
from gatl.features import FeatureFiles, is_shared, prefix_digests, why_off
from gatl.models.layered import LayeredNetwork
from gatl.models.weights import LoadReport
from gatl.session import opened

BASE = (
    "model=se_densenet121_k12",
    "data.image_size=32",
    "data.batch_size=16",
    "trainer.accelerator=cpu",
    "evaluator.workers=1",
)

pytestmark = pytest.mark.usefixtures("as_in_a_worker")
ROOMY = 10**9
SEED = 3


@functools.cache
def configure(*overrides: str) -> Config:
    return checked(compose([*BASE, *overrides]))


def genes(frozen: int, included: int) -> dict[str, float]:
    return {
        "included_layers": included,
        "frozen_layers": frozen,
        "learning_rate": 2e-4,  # a higher one multiplies what rounding changes, on some processors
        "dropout": 0.4,
    }


def never() -> None:
    """Let the fit go on."""


def make_data(folder: Path, *, changed: bool = False) -> PreparedData:
    def split(n: int, seed: int) -> Split:
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        labels = np.arange(n) % 2
        pixels[:, :16, :, 0] //= (1 + labels).astype(np.uint8)[:, None, None]
        if changed and seed == 0:
            pixels[-1, -1, -1, -1] ^= 1
        return in_memory(pixels, labels, str(seed))

    source = Source(("a", "b"), split(70, 0), split(20, 1), split(4, 2))
    folder.mkdir(exist_ok=True)
    return prepare(source, image_size=32, split_seed=0, max_bad=0, folder=folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_data(tmp_path_factory.mktemp("images"))


@pytest.fixture
def cached(data: PreparedData, tmp_path: Path) -> PreparedData:
    """The same images, with a cache."""
    return with_cache(data, tmp_path / "features")


def with_cache(data: PreparedData, folder: Path, max_bytes: int = ROOMY) -> PreparedData:
    folder.mkdir(exist_ok=True)
    return dataclasses.replace(data, features=folder, features_bytes=max_bytes)


def run(
    config: Config,
    data: PreparedData,
    folder: Path,
    which: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    epochs: int = 2,
) -> tuple[list[dict[str, float]], bool]:
    """Run a fit; return its epochs, and whether it began behind the prefix."""
    built = []

    def spied(*args: Any) -> Any:
        made = build_classifier(*args)
        built.append(made[0])
        return made

    monkeypatch.setattr(evaluation, "build_classifier", spied)
    stop = multiprocessing.get_context("spawn").Event()
    outcome = Fitter(config, data, stop)(Fit(which, epochs, SEED, folder))
    assert outcome.error is None, (folder / "error.txt").read_text()
    return built[-1].epochs, built[-1].behind_prefix  # of the last try


def assert_same(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for name in ("train_loss", "val_loss"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)


# The same fits


QUICK = {(1, 58), (6, 0), (7, 1), (18, 0)}
"""Of each depth one."""


@pytest.mark.parametrize(
    ("frozen", "ahead"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product((1, 6, 7, 18), (0, 1, 58))
    ],
)
def test_a_cached_fit_is_the_uncached_one(frozen, ahead, data, cached, tmp_path, monkeypatch):
    which = genes(frozen, min(frozen + ahead, 58))
    config = configure()
    plain, behind = run(config, data, tmp_path / "plain", which, monkeypatch)
    assert not behind
    first, behind = run(config, cached, tmp_path / "first", which, monkeypatch)
    assert behind
    assert_same(first, plain)
    monkeypatch.setattr(features._Prefix, "_cross", None)  # nothing is computed again
    again, _ = run(config, cached, tmp_path / "again", which, monkeypatch)
    assert again == first


@pytest.mark.parametrize(
    ("frozen", "included"), [(6, 6), pytest.param(7, 58, marks=pytest.mark.slow)]
)
def test_mirrored_images_are_drawn_alike(frozen, included, data, cached, tmp_path, monkeypatch):
    which, config = genes(frozen, included), configure("data.augment=flip")
    plain, _ = run(config, data, tmp_path / "plain", which, monkeypatch)
    first, behind = run(config, cached, tmp_path / "first", which, monkeypatch)
    assert behind
    assert_same(first, plain)
    unvaried, _ = run(configure(), cached, tmp_path / "none", which, monkeypatch)
    assert unvaried[1]["train_loss"] != pytest.approx(first[1]["train_loss"], abs=1e-4)


def test_bfloat16_is_kept_as_it_is(data, cached, tmp_path, monkeypatch):
    which, config = genes(7, 9), configure("trainer.precision=bf16-mixed")
    plain, _ = run(config, data, tmp_path / "plain", which, monkeypatch)
    first, behind = run(config, cached, tmp_path / "first", which, monkeypatch)
    assert behind
    kept = [np.load(path) for path in cached.features.glob("*.npy")]
    assert {array.dtype for array in kept} == {np.dtype(np.int16)}
    assert_same(first, plain)


def test_from_a_shallower_boundary_come_the_same_bits(data, tmp_path, monkeypatch):
    config = configure()
    straight = with_cache(data, tmp_path / "straight")
    run(config, straight, tmp_path / "a", genes(18, 19), monkeypatch, epochs=1)
    stepwise = with_cache(data, tmp_path / "stepwise")
    for frozen in (3, 6, 18):
        run(config, stepwise, tmp_path / f"b{frozen}", genes(frozen, 19), monkeypatch, epochs=1)
    names = {path.name for path in straight.features.glob("*.npy")}
    assert len(names) == 2
    assert names < {path.name for path in stepwise.features.glob("*.npy")}
    for name in names:
        contents = [(d.features / name).read_bytes() for d in (straight, stepwise)]
        assert contents[0] == contents[1]


def test_the_images_start_at_the_deepest_boundary_there_is(cached, tmp_path, monkeypatch):
    starts = set()
    cross = features._Prefix._cross

    def spied(self: Any, x: Any, mirrored: bool, start: int, depth: int) -> Any:
        starts.add((start, depth))
        return cross(self, x, mirrored, start, depth)

    monkeypatch.setattr(features._Prefix, "_cross", spied)
    for frozen in (6, 3, 8):
        run(configure(), cached, tmp_path / str(frozen), genes(frozen, 12), monkeypatch, epochs=1)
    assert starts == {(0, 7), (0, 4), (7, 9)}


def test_one_included_depth_shares_with_another(cached, tmp_path, monkeypatch):
    run(configure(), cached, tmp_path / "a", genes(6, 7), monkeypatch, epochs=1)
    before = set(cached.features.glob("*.npy"))
    run(configure(), cached, tmp_path / "b", genes(6, 58), monkeypatch, epochs=1)
    assert set(cached.features.glob("*.npy")) == before
    run(configure(), cached, tmp_path / "c", genes(6, 6), monkeypatch, epochs=1)
    assert len(set(cached.features.glob("*.npy"))) > len(before)  # no transition behind layer 6


def test_two_workers_give_the_bits_of_one(data, tmp_path):
    fits = [genes(6, 9), genes(6, 12), genes(7, 7), genes(8, 10)]

    def outcomes(workers: int) -> list[float | None]:
        prepared = with_cache(data, tmp_path / str(workers), 700_000)  # not enough for all
        config = configure(f"evaluator.workers={workers}")
        stop = multiprocessing.get_context("spawn").Event()
        evaluator = LocalEvaluator(config, prepared, stop)
        ended: dict[int, float | None] = {}
        waiting = list(enumerate(fits))
        while len(ended) < len(fits):
            while waiting and evaluator.n_free:
                key, which = waiting.pop(0)
                evaluator.submit(key, Fit(which, 1, SEED, tmp_path / f"{workers}_{key}"))
            for key, outcome in evaluator.wait(1.0):
                assert outcome.error is None
                ended[key] = outcome.val_loss
        evaluator.close()
        assert list(prepared.features.glob("*.npy"))
        return [ended[key] for key in range(len(fits))]

    assert outcomes(1) == outcomes(2)


# What is not kept


@pytest.mark.parametrize(("frozen", "included"), [(6, 8), (1, 1)])
def test_features_that_are_not_finite_end_the_fit_and_are_not_kept(
    frozen, included, cached, tmp_path, monkeypatch
):
    """Weights are finite, and what they give is not: the last one overflows."""

    def overflowing(*args: Any) -> Any:
        classifier, report = build_classifier(*args)
        stem = next(m for m in classifier.network.stem.modules() if isinstance(m, nn.BatchNorm2d))
        stem.weight.data.fill_(3e38)
        stem.bias.data.fill_(3e38)
        return classifier, report

    monkeypatch.setattr(evaluation, "build_classifier", overflowing)
    stop = multiprocessing.get_context("spawn").Event()
    fit = Fit(genes(frozen, included), 1, SEED, tmp_path / "fit")
    outcome = Fitter(configure(), cached, stop)(fit)
    assert outcome.error == "diverged: what the frozen layers give is not finite"
    assert outcome.diverged
    assert not outcome.uncached  # there was room
    assert [path for path in cached.features.iterdir() if path.suffix != ".lock"] == []


def test_a_fit_out_of_memory_goes_on_in_halves_behind_its_prefix(cached, tmp_path, monkeypatch):
    which = genes(6, 8)
    plain, _ = run(configure(), cached, tmp_path / "plain", which, monkeypatch)
    kept = {path: path.stat().st_ino for path in cached.features.glob("*.npy")}
    suffix, seen = LayeredNetwork.suffix, []

    def limited(self: LayeredNetwork, z: Any) -> Any:
        if len(z) > 10 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.training:
            seen.append(len(z))
        return suffix(self, z)

    monkeypatch.setattr(LayeredNetwork, "suffix", limited)
    halves, behind = run(configure(), cached, tmp_path / "halves", which, monkeypatch)
    assert behind
    assert seen == 2 * [8, 8, 8, 8, 8, 8, 8, 8, 3, 3]
    assert {path: path.stat().st_ino for path in cached.features.glob("*.npy")} == kept
    assert halves[1]["val_loss"] == pytest.approx(plain[1]["val_loss"], rel=0.3)


# When there is no cache


def test_a_fit_says_that_its_boundary_does_not_fit(data, tmp_path):
    stop = multiprocessing.get_context("spawn").Event()
    small = with_cache(data, tmp_path / "small", 1000)
    for where, frozen, uncached in ((small, 6, True), (small, 0, False), (data, 6, False)):
        fit = Fit(genes(frozen, 8), 1, SEED, tmp_path / f"{id(where)}{frozen}")
        assert Fitter(configure(), where, stop)(fit).uncached is uncached


def test_what_does_not_fit_is_computed_as_without_a_cache(data, tmp_path, monkeypatch):
    small = with_cache(data, tmp_path / "small", 1000)
    for frozen, included in ((6, 8), (1, 1)):
        name, which = f"{frozen}", genes(frozen, included)
        plain, _ = run(configure(), data, tmp_path / f"p{name}", which, monkeypatch, epochs=1)
        fit, behind = run(configure(), small, tmp_path / f"s{name}", which, monkeypatch, epochs=1)
        assert not behind
        assert fit == plain
    assert all(path.stat().st_size < 1000 for path in small.features.iterdir())


@pytest.mark.parametrize(
    ("overrides", "which"),
    [
        (("data.augment=crop_flip",), genes(6, 8)),
        (("model.weights=none",), genes(6, 8)),
        ((), genes(0, 8)),
        (("model.se.init=kaiming",), genes(7, 7)),  # layer 7's SE is drawn
    ],
)
def test_fits_whose_prefix_is_not_shared_see_images(
    overrides, which, cached, tmp_path, monkeypatch
):
    _, behind = run(configure(*overrides), cached, tmp_path / "a", which, monkeypatch, epochs=1)
    assert not behind
    assert not list(cached.features.iterdir())


def test_why_the_cache_is_off(data):
    report = LoadReport(1, (), ())
    assert why_off("none", data, report) is None
    assert why_off("flip", data, report) is None
    assert "data.augment=trivial" in str(why_off("trivial", data, report))
    assert "model.weights=none" in str(why_off("none", data, None))
    streamed = dataclasses.replace(data.train, images=Streamed([], 32))
    streaming = dataclasses.replace(data, train=streamed)
    assert "streamed" in str(why_off("none", streaming, report))


@pytest.mark.parametrize(
    ("overrides", "line", "on"),
    [
        ((), "", True),
        (("model.weights=none",), "Feature cache: off (model.weights=none", False),
        (("data.augment=trivial",), "Feature cache: off (data.augment=trivial", False),
        (("cache.max_gb=0",), "", False),
        (("space.frozen_layers.value=0",), "", False),
        (("model.se.init=kaiming",), "Feature cache: off for fits that freeze layers which", True),
    ],
)
def test_a_session_says_once_that_the_cache_is_off(overrides, line, on, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    with opened(configure("data=digits", *overrides), tmp_path, console) as session:
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert said.count("Feature cache") == bool(line)
        assert line in said
        assert (session.data.features is not None) == on
        assert (tmp_path / ".features").exists() == on
    assert not (tmp_path / ".features").exists()


# Keys


def digests(config: Config, data: PreparedData, which: dict[str, float]) -> list[str]:
    torch.manual_seed(SEED)
    return prefix_digests(build_classifier(config, data, which)[0].network, {"precision": "32"})


def test_nothing_stale_is_met(data, tmp_path):
    config = configure()
    base = digests(config, data, genes(7, 20))
    assert len(base) == len(set(base)) == 9
    torch.manual_seed(SEED + 1)
    network = build_classifier(config, data, genes(7, 20))[0].network
    assert prefix_digests(network, {"precision": "32"}) == base
    assert not set(prefix_digests(network, {"precision": "bf16-mixed"})) & set(base)
    with torch.no_grad():
        network.layers[3].dense.norm1.running_mean[0] += 1e-6  # type: ignore[union-attr]
    other = prefix_digests(network, {"precision": "32"})
    assert other[:5] == base[:5]  # settings, stem, three layers
    assert not set(other[5:]) & set(base)
    cut = digests(config, data, genes(7, 7))
    assert cut[:8] == base[:8]
    assert cut[8] != base[8]  # layer 7 is the last, its SE behind it
    assert make_data(tmp_path / "same").train.digest == data.train.digest
    changed = make_data(tmp_path / "changed", changed=True)
    assert changed.train.digest != data.train.digest
    assert changed.val.digest == data.val.digest


def test_another_setting_gets_entries_of_its_own(cached, tmp_path, monkeypatch):
    others = ("model.mean=[0.5,0.5,0.5]", "model.std=[1,1,1]", "trainer.precision=bf16-mixed")
    for n, overrides in enumerate([(), *((other,) for other in others)], 1):
        run(configure(*overrides), cached, tmp_path / f"{n}", genes(2, 3), monkeypatch, epochs=1)
        assert len(list(cached.features.glob("*.npy"))) == 2 * n


def test_only_drawn_weights_make_a_prefix_a_fits_own(data):
    classifier, report = build_classifier(configure(), data, genes(7, 7))
    assert report is not None
    assert any("layers.6.se" in name for name in report.left_random)
    assert is_shared(classifier.network, report)  # its gate is exactly 1
    classifier, report = build_classifier(configure("model.se.init=kaiming"), data, genes(7, 7))
    assert report is not None
    assert not is_shared(classifier.network, report)


# Files


def rows(n: int, value: float = 0) -> Iterator[np.ndarray]:
    yield from np.full((n, 1, 250), value, np.float32)


def test_least_recently_used_files_go_first(tmp_path):
    files = FeatureFiles(tmp_path, 3400)  # three of 1128 bytes
    for index, key in enumerate("abc"):
        assert files.get(key, 1, lambda: rows(1), never) is not None
        os.utime(tmp_path / f"{key}.npy", (index, index))
    mapped = files.find("a")  # and so used last
    assert mapped is not None
    assert files.get("d", 1, lambda: rows(1, 4), never) is not None
    assert {path.stem for path in tmp_path.glob("*.npy")} == {"a", "c", "d"}
    assert files.get("e", 3, lambda: rows(3), never) is not None  # all that there is room for
    assert {path.stem for path in tmp_path.glob("*.npy")} == {"e"}
    assert mapped.sum() == 0  # it is mapped still
    assert files.get("f", 4, lambda: rows(4), never) is None
    assert {path.stem for path in tmp_path.glob("*.npy")} == {"e"}


def test_what_another_worker_removes_at_once_is_still_there_for_whoever_wrote_it(
    tmp_path, monkeypatch
):
    def replace_and_evict(path: Path, target: Path) -> None:
        path.rename(target)
        target.unlink()

    monkeypatch.setattr(Path, "replace", replace_and_evict)
    found = FeatureFiles(tmp_path, ROOMY).get("a", 2, lambda: rows(2, 3), never)
    assert found is not None
    assert (found == 3).all()
    assert not list(tmp_path.glob("*.npy"))


def test_what_fails_leaves_nothing(tmp_path):
    files = FeatureFiles(tmp_path, ROOMY)

    def broken() -> Iterator[np.ndarray]:
        yield from rows(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.get("a", 2, broken, never)
    with pytest.raises(ValueError, match="2 rows must fill"):
        files.get("a", 2, lambda: rows(1), never)
    assert not list(tmp_path.glob("*.npy"))
    assert not list(tmp_path.glob("*.part"))


def test_a_torn_file_is_never_read_and_takes_no_room(tmp_path):
    files = FeatureFiles(tmp_path, 1200)
    for key in "ab":
        (tmp_path / f"{key}.part").write_bytes(b"x" * 1100)
    found = files.get("a", 1, lambda: rows(1, 7), never)
    assert found is not None
    assert np.all(found == 7)
    assert not list(tmp_path.glob("*.part"))


def slow(folder: Path, ready: Any, computed: Any, die: bool) -> None:
    """Compute one entry, in a process of its own; leave as a killed one does."""

    def compute() -> Iterator[np.ndarray]:
        with computed.get_lock():
            computed.value += 1
        yield from rows(1, 5)
        ready.set()
        time.sleep(0.5)
        if die:
            os._exit(1)
        yield from rows(1, 6)

    found = FeatureFiles(folder, ROOMY).get("a", 2, compute, never)
    assert found is not None
    os._exit(0 if [array.mean() for array in found] == [5, 6] else 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("die", [False, True])
def test_two_processes_compute_once(die, tmp_path):
    context = multiprocessing.get_context("fork")  # they need no torch: nothing to start anew
    ready, computed = context.Event(), context.Value("i", 0)
    processes = []
    for dies in (die, False):
        process = context.Process(target=slow, args=(tmp_path, ready, computed, dies))
        process.start()
        processes.append(process)
        assert ready.wait(60)  # the first holds the entry
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [int(die), 0]
    assert computed.value == 1 + die


def test_waiting_for_another_worker_can_be_stopped(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def held() -> Iterator[np.ndarray]:
        entered.set()
        leave.wait(60)
        yield from rows(1)

    def stopped() -> None:
        raise evaluation.FitStopped

    files = FeatureFiles(tmp_path, ROOMY)
    thread = threading.Thread(target=files.get, args=("a", 1, held, never))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(evaluation.FitStopped):
        files.get("a", 1, lambda: rows(1), stopped)
    leave.set()
    thread.join()


def test_a_fit_can_be_stopped_between_chunks(cached, tmp_path, monkeypatch):
    stop = multiprocessing.get_context("spawn").Event()
    cross = features._Prefix._cross

    def spied(*args: Any) -> Any:
        stop.set()
        return cross(*args)

    monkeypatch.setattr(features._Prefix, "_cross", spied)
    outcome = Fitter(configure(), cached, stop)(Fit(genes(6, 8), 1, SEED, tmp_path / "fit"))
    assert outcome.stopped
    assert not list(cached.features.glob("*.npy"))
    assert not list(cached.features.glob("*.part"))
