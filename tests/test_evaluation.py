"""From a chromosome to its outcome: reproducible, silent, and failing in good order."""

import dataclasses
import functools
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from gatl import evaluation
from gatl.classifier import Classifier
from gatl.cli import compose
from gatl.config import Config, TrainerConfig, checked
from gatl.data.images import PreparedData
from gatl.errors import UserError
from gatl.evaluation import (
    Fit,
    Fitter,
    LocalEvaluator,
    fit_seed,
    reason,
    resolve_precision,
)
from gatl.outcome import Outcome
from gatl.session import opened
from gatl.streams import Purpose

OVERRIDES = (
    "model.weights=none",
    "model.n_layers=4",
    "model.n_freezable=2",
    "model.network.growth_rate=4",
    "model.network.init_features=8",
    "model.network.block_config=[2,2]",
    "data.image_size=32",
    "data.batch_size=8",
    "data.augment=crop_flip",
    "trainer.accelerator=cpu",
)

pytestmark = pytest.mark.usefixtures("as_in_a_worker")
GENES = {"included_layers": 3, "frozen_layers": 1, "learning_rate": 1e-2, "dropout": 0.3}
OTHER = {"included_layers": 4, "frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.1}
FOREVER = 10**6
FIT_SEED = 325503755


@functools.cache
def configure(*overrides: str) -> Config:
    return checked(compose([*OVERRIDES, *overrides]))


def fit(folder: Path, genes: dict[str, float] = GENES, epochs: int = 1, seed: int = 3) -> Fit:
    return Fit(genes, epochs, seed, folder)


def same(outcome: Outcome) -> Outcome:
    """Return an outcome without its duration, which nothing determines."""
    return dataclasses.replace(outcome, duration_s=0)


@pytest.fixture(scope="module")
def config() -> Config:
    return configure()


@pytest.fixture
def stop() -> Event:
    return multiprocessing.get_context("spawn").Event()


@pytest.fixture
def fitter(config: Config, data: PreparedData, stop: Event) -> Fitter:
    return Fitter(config, data, stop)


def failing_fit(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(lightning.Trainer, "fit", broken)


# Seeds


def test_fit_seed_depends_on_its_arguments_alone():
    genes = {"included_layers": 3, "dropout": 0.5}
    seeds = {
        fit_seed(seed, purpose, g, index)
        for seed in (0, 1, 2**32 - 1)
        for purpose in (Purpose.FIT, Purpose.REEVALUATION, Purpose.FINAL)
        for g in (genes, genes | {"dropout": 0.25}, genes | {"included_layers": 4})
        for index in (0, 1)
    }
    assert len(seeds) == 3 * 3 * 3 * 2
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    turned = {"dropout": 0.5, "included_layers": 3}
    assert fit_seed(0, Purpose.FIT, genes) == fit_seed(0, Purpose.FIT, turned, 0)


def test_fit_seed_stays_what_it_was():
    """A run that is resumed by a later version goes on as it would have."""
    assert fit_seed(7, Purpose.FIT, GENES) == FIT_SEED


# One fit


def test_outcome_of_a_fit(fitter, tmp_path):
    outcome = fitter(fit(tmp_path / "0", OTHER, epochs=3))
    assert outcome.error is None
    assert not outcome.diverged
    assert not outcome.stopped
    assert outcome.epochs == 3
    assert outcome.duration_s > 0
    assert 0 <= outcome.val_accuracy <= 1
    assert outcome.trainable_params == outcome.total_params > 1000
    rows = (tmp_path / "0" / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    table = [dict(zip(columns, map(float, row.split(",")), strict=True)) for row in rows[1:]]
    assert len(table) == 3
    best = min(table, key=lambda row: row["val_loss"])
    assert outcome.val_loss == pytest.approx(best["val_loss"], rel=1e-6)
    assert outcome.val_accuracy == pytest.approx(best["val_accuracy"], rel=1e-6)
    assert {"train_loss", "val_loss", "val_accuracy", "val_f1", "epoch"} <= set(columns)
    hparams = (tmp_path / "0" / "hparams.yaml").read_text()
    assert "learning_rate: 0.001" in hparams


def test_val_loss_is_the_lowest_epochs(config, data, stop, tmp_path, monkeypatch):
    losses = iter([0.7, 0.4, 0.9])
    compute = evaluation.Classifier.on_validation_epoch_end

    def prescribed(self: Classifier) -> None:
        compute(self)
        self.epochs[-1] |= {"val_loss": next(losses), "val_accuracy": len(self.epochs)}

    monkeypatch.setattr(Classifier, "on_validation_epoch_end", prescribed)
    outcome = Fitter(config, data, stop)(fit(tmp_path / "0", epochs=3))
    assert (outcome.val_loss, outcome.val_accuracy, outcome.epochs) == (0.4, 2, 3)


def test_same_chromosome_and_seed_give_the_same_bits_whatever_ran_before(fitter, tmp_path):
    first = fitter(fit(tmp_path / "0", epochs=2))
    fitter(fit(tmp_path / "1", OTHER, seed=8))
    torch.rand(3)
    assert same(fitter(fit(tmp_path / "2", epochs=2))) == same(first)
    assert fitter(fit(tmp_path / "3", epochs=2, seed=4)).val_loss != first.val_loss


def test_longer_fit_continues_a_shorter_one(config, data, stop, tmp_path):
    def metrics(epochs: int) -> list[str]:
        folder = tmp_path / str(epochs)
        Fitter(config, data, stop)(fit(folder, epochs=epochs))
        return (folder / "metrics.csv").read_text().splitlines()

    assert metrics(4)[:3] == metrics(2)


@pytest.mark.parametrize(
    ("augment", "logger"),
    [
        ("crop_flip", "csv"),
        pytest.param("none", "csv", marks=pytest.mark.slow),
        ("crop_flip", "tensorboard"),
    ],
)
def test_fit_that_waits_at_rungs_is_the_one_that_never_stopped(
    data, stop, tmp_path, augment, logger
):
    fitter = Fitter(configure(f"data.augment={augment}", f"logger={logger}"), data, stop)
    expected = fitter(fit(tmp_path / "whole", epochs=4))
    parts = [
        fitter(dataclasses.replace(fit(tmp_path / "parts", epochs=n), goes_on=n < 4))
        for n in (1, 2, 4)
    ]
    assert [part.epochs for part in parts] == [1, 2, 4]
    assert same(parts[-1]) == same(expected)
    assert parts[0].val_loss >= parts[1].val_loss >= parts[2].val_loss
    if logger == "csv":
        logs = [(tmp_path / folder / "metrics.csv").read_text() for folder in ("whole", "parts")]
        assert logs[0] == logs[1]


def test_checkpoint_that_is_already_there_is_not_trained_again(fitter, tmp_path):
    """The driver was killed before it had recorded the rung."""
    waiting = dataclasses.replace(fit(tmp_path / "fit", epochs=2), goes_on=True)
    assert same(fitter(waiting)) == same(fitter(waiting))
    assert same(fitter(fit(tmp_path / "fit", epochs=3))) == same(fitter(fit(tmp_path, epochs=3)))


def torn(content: bytes) -> list[bytes]:
    """Return what a power cut can leave of a file."""
    half = len(content) // 2
    return [b"", content[:-1], content[:half], content[:half] + bytes(half), bytes(len(content))]


def test_from_a_torn_checkpoint_a_fit_begins_anew(fitter, tmp_path):
    expected = fitter(fit(tmp_path / "whole", epochs=3))
    checkpoint = tmp_path / "fit" / evaluation.RUNG
    fitter(dataclasses.replace(fit(tmp_path / "fit", epochs=2), goes_on=True))
    for content in torn(checkpoint.read_bytes()):
        checkpoint.write_bytes(content)
        assert same(fitter(fit(tmp_path / "fit", epochs=3))) == same(expected)
        assert (tmp_path / "fit" / "metrics.csv").read_text() == (
            tmp_path / "whole" / "metrics.csv"
        ).read_text()


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_full_disk_is_no_fault_of_a_fit(fitter, tmp_path, goes_on):
    """It would fail, and count, although any fit would: the run ends, and leaves it for resume."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 1000 if goes_on else 10  # the checkpoint does not fit; the log does not
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            fitter(dataclasses.replace(fit(tmp_path / "fit"), goes_on=goes_on))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    named = tmp_path / "fit" / (evaluation.RUNG if goes_on else "")
    assert raised.value.filename == str(named)
    assert not (tmp_path / "fit" / "error.txt").exists()


def test_frozen_and_total_parameters(fitter, tmp_path):
    outcome = fitter(fit(tmp_path / "0", {**GENES, "frozen_layers": 3}))
    n_features = (8 + 4 + 4) // 2 + 4  # stem, two layers, transition, a layer
    assert outcome.trainable_params == 2 * n_features + 2  # the classifier alone
    assert outcome.total_params > outcome.trainable_params


def test_second_fit_into_a_folder_leaves_its_own_log(fitter, tmp_path):
    """A trial that was cut off is evaluated again under its own number."""
    fitter(fit(tmp_path / "0", epochs=2))
    fitter(fit(tmp_path / "0", epochs=1))
    assert len((tmp_path / "0" / "metrics.csv").read_text().splitlines()) == 2


def test_tensorboard_writes_events(data, stop, tmp_path):
    pytest.importorskip("tensorboard")
    config = configure("logger=tensorboard")
    assert Fitter(config, data, stop)(fit(tmp_path / "0")).error is None
    assert list((tmp_path / "0").glob("events.out.tfevents.*"))
    assert (tmp_path / "0" / "hparams.yaml").is_file()


def test_bf16_mixed_fit(data, stop, tmp_path):
    outcome = Fitter(configure("trainer.precision=bf16-mixed"), data, stop)(fit(tmp_path / "0"))
    assert outcome.error is None
    exact = Fitter(configure("trainer.precision=32"), data, stop)(fit(tmp_path / "1"))
    assert outcome.val_loss == pytest.approx(exact.val_loss, rel=0.1)
    assert outcome.val_loss != exact.val_loss


SCRIPT = """
import multiprocessing, pickle, sys, torch
from pathlib import Path
from gatl.evaluation import Fitter, silence
config, data, fits = pickle.loads(sys.stdin.buffer.read())
silence()
torch.set_num_threads(1)
fitter = Fitter(config, data, multiprocessing.get_context("spawn").Event())
outcomes = [fitter(fit) for fit in fits]
Path(sys.argv[1]).write_bytes(pickle.dumps(outcomes))
"""


def test_fits_print_nothing_and_equal_those_of_another_process(fitter, config, data, tmp_path):
    fits = [fit(tmp_path / str(i), genes) for i, genes in enumerate((GENES, OTHER))]
    result = tmp_path / "outcomes"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", SCRIPT, str(result)],
        input=pickle.dumps((config, data, fits)),
        capture_output=True,
        check=False,
    )
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if "lightning" in line or "Trainer" in line] == []
    assert lines == []
    assert [same(o) for o in pickle.loads(result.read_bytes())] == [same(fitter(f)) for f in fits]


# Failures


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("mat1 and mat2\nshapes"), "RuntimeError: mat1 and mat2"),
        (RuntimeError("bad allocation of layers"), "RuntimeError: bad allocation of layers"),
        (KeyError("alloc"), "KeyError: 'alloc'"),
        (ValueError(), "ValueError: no message"),
    ],
)
def test_failure_is_an_outcome_with_its_reason(fitter, tmp_path, monkeypatch, error, reason):
    failing_fit(monkeypatch, error)
    outcome = fitter(fit(tmp_path / "0"))
    assert outcome.error == reason
    assert (outcome.val_loss, outcome.epochs, outcome.diverged) == (None, 0, False)
    trace = (tmp_path / "0" / "error.txt").read_text()
    assert trace.startswith("Traceback")
    assert type(error).__name__ in trace


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_want_of_memory_is_told_in_the_users_terms(error):
    assert reason(error).startswith("out of memory: lower data.batch_size or data.image_size")


def test_want_of_memory_of_half_a_batch_is_a_failure(fitter, tmp_path, monkeypatch):
    failing_fit(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."))
    outcome = fitter(fit(tmp_path / "0"))
    assert outcome.error == (
        "out of memory: lower data.batch_size or data.image_size, or evaluator.workers "
        "(half a batch was too much as well)"
    )
    assert (outcome.val_loss, outcome.epochs, outcome.diverged) == (None, 0, False)
    assert outcome.micro_batch == 4


def test_real_want_of_memory_on_a_cpu(fitter, tmp_path, monkeypatch):
    for allocate in (torch.empty, np.empty):
        monkeypatch.setattr(lightning.Trainer, "fit", lambda *a, make=allocate, **k: make(2**58))
        assert fitter(fit(tmp_path / "0")).error.startswith("out of memory")


def memory_for(monkeypatch: pytest.MonkeyPatch, n_images: int) -> list[int]:
    """Let a network raise, as a GPU does, when more images come at once; note how many come."""
    seen: list[int] = []
    logits = Classifier._logits

    def limited(self: Classifier, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > n_images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits(self, x)

    monkeypatch.setattr(Classifier, "_logits", limited)
    return seen


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_fit_out_of_memory_is_tried_once_more_in_halves_of_the_same_batches(
    data, stop, tmp_path, monkeypatch, augment
):
    """The network has no BN, so it comes to the same: order, augmentation and gradients."""
    overrides = (f"data.augment={augment}", "data.batch_size=8", "trainer.accelerator=cpu")
    config = checked(compose(["model=lenet5", *overrides]))
    fitter = Fitter(config, data, stop)
    genes = {"included_layers": 5, "frozen_layers": 0, "learning_rate": 1e-2, "dropout": 0.0}
    expected = fitter(fit(tmp_path / "whole", genes, epochs=3))
    monkeypatch.setattr(evaluation, "EVAL_BATCH_SIZE", 8)
    seen = memory_for(monkeypatch, 4)
    outcome = fitter(fit(tmp_path / "halves", genes, epochs=3))
    assert outcome.error is None
    assert outcome.micro_batch == 4
    assert outcome.val_loss == pytest.approx(expected.val_loss, rel=1e-4)
    assert seen == [8, *3 * (3 * [4, 4] + [4, 4, 2])]  # training, then validation
    assert "CUDA out of memory" in (tmp_path / "halves" / "error.txt").read_text()
    assert len((tmp_path / "halves" / "metrics.csv").read_text().splitlines()) == 1 + 3
    assert expected.micro_batch is None


def test_out_of_memory_in_validation_is_mended_too(fitter, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "EVAL_BATCH_SIZE", 10)
    memory_for(monkeypatch, 9)
    outcome = fitter(fit(tmp_path / "0"))
    assert (outcome.error, outcome.micro_batch) == (None, 4)


def test_memory_is_free_before_the_second_try(fitter, tmp_path, monkeypatch):
    memory_for(monkeypatch, 4)
    made: list[weakref.ref[Classifier]] = []
    build = evaluation.build_classifier

    def spied(*args: Any) -> Any:
        assert [ref() for ref in made] == [None] * len(made)
        found = build(*args)
        made.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(evaluation, "build_classifier", spied)
    fitter(fit(tmp_path / "0"))
    assert len(made) == 2
    assert [ref() for ref in made] == [None, None]


def test_an_error_that_is_no_text_is_kept_as_well_as_can_be(fitter, tmp_path, monkeypatch):
    def fail(*args: Any) -> Any:
        raise ValueError("fl\udcf6wers")

    monkeypatch.setattr(evaluation, "build_classifier", fail)
    assert "ValueError" in str(fitter(fit(tmp_path / "0")).error)
    assert "fl\\udcf6wers" in (tmp_path / "0" / "error.txt").read_text()


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batch_whose_halves_would_be_single_images_is_not_halved(
    data, stop, tmp_path, monkeypatch, batch_size
):
    seen = memory_for(monkeypatch, 1)
    config = configure(f"data.batch_size={batch_size}")
    outcome = Fitter(config, data, stop)(fit(tmp_path / "0"))
    assert outcome.error == "out of memory: lower data.batch_size or data.image_size"
    assert outcome.micro_batch is None
    assert seen == [batch_size]


def test_what_went_on_in_halves_stays_in_halves_at_the_next_rung(fitter, tmp_path, monkeypatch):
    """From the rung before: what was done is not done again."""

    def climb(epochs: int) -> Outcome:
        return fitter(dataclasses.replace(fit(tmp_path / "0", epochs=epochs), goes_on=True))

    assert climb(1).micro_batch is None
    seen = memory_for(monkeypatch, 4)
    monkeypatch.setattr(evaluation, "EVAL_BATCH_SIZE", 8)
    second = climb(2)
    assert (second.error, second.epochs, second.micro_batch) == (None, 2, 4)
    assert seen == [8, *3 * [4, 4], 4, 4, 2]
    seen.clear()  # with as little memory: nothing is tried in whole batches again
    third = climb(4)
    assert (third.error, third.epochs, third.micro_batch) == (None, 4, 4)
    assert seen == 2 * [*3 * [4, 4], 4, 4, 2]


def test_divergence_is_a_result(fitter, tmp_path):
    outcome = fitter(fit(tmp_path / "0", GENES | {"learning_rate": 1e30}))
    assert outcome.diverged
    assert outcome.duration_s > 0
    sound = fitter(fit(tmp_path / "1"))
    for name in ("trainable_params", "total_params"):
        assert getattr(outcome, name) == getattr(sound, name) > 0
    assert outcome.error.startswith("diverged: ")
    assert outcome.val_loss is None
    assert not (tmp_path / "0" / "error.txt").exists()


def test_user_error_of_a_network_passes(data, stop, tmp_path):
    config = configure("model.n_layers=5")
    with pytest.raises(UserError, match=r"included_layers must be in \[1, 4\]"):
        Fitter(config, data, stop)(fit(tmp_path / "0", GENES | {"included_layers": 5}))


def test_logger_that_cannot_be_made_ends_the_search(data, stop, tmp_path):
    evaluator = LocalEvaluator(
        configure("logger._target_=no.such.Logger", "evaluator.workers=1"), data, stop
    )
    evaluator.submit(0, fit(tmp_path / "0"))
    with pytest.raises(UserError, match="The logger cannot be made") as raised:
        evaluator.wait(60)
    assert "\n" not in str(raised.value)
    evaluator.close()


def test_fit_is_cut_off_in_training(fitter, stop, tmp_path):
    threading.Timer(0.5, stop.set).start()
    assert fitter(fit(tmp_path / "0", epochs=FOREVER)) == Outcome(stopped=True)


def test_fit_is_cut_off_in_validation(fitter, stop, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "EVAL_BATCH_SIZE", 1)
    seen = []
    step = Classifier.validation_step

    def stopping(self: Classifier, batch: Any, batch_idx: int) -> None:
        seen.append(batch_idx)
        stop.set()
        step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "validation_step", stopping)
    assert fitter(fit(tmp_path / "0")).stopped
    assert seen == [0]


# Devices


@pytest.mark.parametrize(
    ("accelerator", "precision", "gpu", "native_bf16", "expected"),
    [
        ("auto", "auto", False, False, "32-true"),
        ("cpu", "auto", True, True, "32-true"),
        ("auto", "auto", True, True, "bf16-mixed"),
        ("auto", "auto", True, False, "16-mixed"),
        ("gpu", "auto", True, True, "bf16-mixed"),
        ("gpu", "32", True, True, "32-true"),
        ("auto", "16-mixed", True, True, "16-mixed"),
        ("auto", "bf16-mixed", False, False, "bf16-mixed"),
        ("auto", "16-mixed", False, False, "trainer.precision=16-mixed needs a GPU"),
        ("cpu", "16-mixed", True, True, "trainer.precision=16-mixed needs a GPU"),
        ("gpu", "auto", False, False, "trainer.accelerator=gpu, but torch sees no GPU"),
        ("mps", "auto", False, False, "trainer.accelerator=mps, but torch sees no MPS"),
    ],
)
def test_precision(monkeypatch, accelerator, precision, gpu, native_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: gpu and (including_emulation or native_bf16),
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    config = TrainerConfig(1, accelerator, precision, False)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            resolve_precision(config)
    else:
        assert resolve_precision(config) == expected


def test_half_precision_on_a_cpu_is_refused_before_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = checked(compose(["trainer.precision=16-mixed", "data=folder", "data.root=nowhere"]))
    with pytest.raises(UserError, match="needs a GPU"), opened(config, tmp_path, Console()):
        pass


@pytest.mark.parametrize(
    ("gib", "cores", "overrides", "workers"),
    [
        (1000, 8, [], 8),
        (1000, 8, ["evaluator.threads=3"], 2),
        (1000, 2, ["evaluator.threads=3"], 1),
        (4, 8, [], 3),
        (0.1, 8, [], 1),
        (20, 8, ["data.batch_size=32", "data.image_size=224"], 3),
        (1, 8, ["evaluator.workers=5"], 5),
    ],
)
def test_workers_are_as_many_as_cores_and_memory_allow(
    data, stop, monkeypatch, gib, cores, overrides, workers
):
    class Memory:
        available = int(gib * 2**30)

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    evaluator = LocalEvaluator(configure(*overrides), data, stop)
    assert evaluator.n_workers == evaluator.n_free == workers
    evaluator.close()


# Workers


def drain(evaluator: LocalEvaluator, n: int) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + 100
    while len(outcomes) < n and time.monotonic() < deadline:
        outcomes |= dict(evaluator.wait(0.2))
    return outcomes


def kill(evaluator: LocalEvaluator, worker: int) -> None:
    (process,) = evaluator._pools[worker]._processes.values()  # type: ignore[attr-defined]
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.fixture
def processes(data: PreparedData, stop: Event) -> Iterator[LocalEvaluator]:
    evaluator = LocalEvaluator(configure("evaluator.workers=2"), data, stop)
    yield evaluator
    stop.set()
    evaluator.close()


def test_worker_processes(fitter, processes, stop, tmp_path):
    expected = [same(fitter(fit(tmp_path / f"x{i}", g))) for i, g in enumerate((GENES, OTHER))]
    # They give the bits that this process gives.
    processes.submit(0, fit(tmp_path / "0", GENES))
    processes.submit(1, fit(tmp_path / "1", OTHER))
    assert processes.n_free == 0
    outcomes = drain(processes, 2)
    assert processes.n_free == 2
    assert processes.wait(0) == []
    assert [same(outcomes[0]), same(outcomes[1])] == expected
    assert (tmp_path / "1" / "metrics.csv").is_file()

    # One that dies idle is replaced; one that dies at work is too, and its fit starts again.
    idle = processes._idle[0]
    kill(processes, idle)
    while not processes._pools[idle]._broken:  # type: ignore[attr-defined]
        time.sleep(0.01)
    processes.submit(2, fit(tmp_path / "2", GENES))
    kill(processes, idle)
    other = processes._idle[0]
    processes.submit(3, fit(tmp_path / "3", epochs=FOREVER))
    outcomes = drain(processes, 1)
    assert processes.epochs_done(2) == 0  # it runs no more
    while processes.epochs_done(3) <= 1:
        time.sleep(0.01)
    batches = processes.epochs_done(3) * 3
    assert batches == pytest.approx(round(batches))
    assert {key: same(o) for key, o in outcomes.items()} == {2: expected[0]}

    # A fit whose worker dies twice has failed; the other worker goes on.
    processes.submit(4, fit(tmp_path / "4"))
    kill(processes, idle)
    while processes._lost.get(4) != 1:
        assert processes.wait(0.1) == []
    kill(processes, idle)
    outcomes = drain(processes, 1)
    reason = "its worker process died twice, killed perhaps for want of memory"
    assert outcomes == {4: Outcome(error=reason)}

    # On request the rest ends, be it because its worker got the signal too.
    stop.set()
    processes.submit(5, fit(tmp_path / "5"))
    kill(processes, idle)
    assert idle != other
    assert drain(processes, 2) == {3: Outcome(stopped=True), 5: Outcome(stopped=True)}


def test_to_close_now_waits_for_no_fit(data, stop, tmp_path):
    evaluator = LocalEvaluator(configure("evaluator.workers=2"), data, stop)
    evaluator.submit(0, fit(tmp_path / "0", epochs=FOREVER))
    while not (tmp_path / "0").exists():
        assert evaluator.wait(0.1) == []
    evaluator.close(now=True)
    assert not stop.is_set()
    assert [pool._processes for pool in evaluator._pools] == [None, None]
