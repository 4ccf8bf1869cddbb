"""Loggers: what they write, read back; that nothing stands there twice; what they refuse."""

import csv
import errno
import functools
import math
import multiprocessing
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from optuna.trial import TrialState, create_trial

from gatl.cli import compose
from gatl.config import checked
from gatl.data.images import prepare
from gatl.data.source import Source, Split, in_memory
from gatl.errors import UserError
from gatl.evaluation import Fit, Fitter, silence
from gatl.loggers import Curve, build_logger, require_logger
from gatl.record import JOURNAL

SMALL = ("data=digits", "model=lenet5", "trainer.accelerator=cpu", "data.batch_size=8")
GENES = {"included_layers": 5, "frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.25}
LOSSES = (0.75, None, 0.5, 0.875, 0.25, None)  # None: it was pruned
POINTS = [  # step, best, mean of the generation, of three trials each
    (1, 0.75, math.nan),
    (2, 0.75, math.nan),
    (3, 0.5, 0.625),
    (4, 0.5, math.nan),
    (5, 0.25, math.nan),
    (6, 0.25, 0.5625),
]


@functools.cache
def configured(*overrides):
    return checked(compose([*SMALL, *overrides]))


def trials():
    made = []
    for number, loss in enumerate(LOSSES):
        state = TrialState.PRUNED if loss is None else TrialState.COMPLETE
        made.append(create_trial(state=state, value=loss))
        made[-1].number = number
    return made


def logged(config, folder, sessions):
    """Log a search whose sessions end after so many trials each."""
    for n in sessions:
        curve = Curve(config, folder, lambda number: number // 3)
        for i in range(n + 1):
            record = trials()  # what has ended out of turn waits for those before it
            record[i : i + 1] = [create_trial(state=TrialState.RUNNING)][: len(record) - i]
            curve.update(record)
        curve.close()


@pytest.mark.parametrize("sessions", [(6,), (2, 5, 6), (6, 6)])
def test_the_curve_as_csv_has_each_point_once(tmp_path, sessions):
    logged(configured(), tmp_path, sessions)
    with (tmp_path / "search" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = [
        (int(row["step"]), float(row["best_val_loss"]), float(row["mean_val_loss"] or "nan"))
        for row in rows
    ]
    assert np.array_equal(points, POINTS, equal_nan=True)
    assert all(float(row["best_fitness"]) == -float(row["best_val_loss"]) for row in rows)
    assert [row["generation"] for row in rows] == ["", "", "0", "", "", "1"]


def test_before_a_trial_is_complete_there_is_nothing_to_log(tmp_path):
    curve = Curve(configured(), tmp_path, lambda number: None)
    curve.update([trials()[1]])
    curve.close()
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize("failing", ["log_metrics", "save", "finalize"])
def test_a_logger_that_fails_costs_the_curve_alone(tmp_path, monkeypatch, failing):
    def fail(*args):
        raise ConnectionError("no\nroute")

    told = []
    curve = Curve(configured(), tmp_path, lambda number: None, told.append)
    curve.update(trials()[:1])
    monkeypatch.setattr(curve._logger, failing, fail)
    for n in (2, 3):
        curve.update(trials()[:n] if failing != "finalize" else trials()[:1])
    curve.close()
    (line,) = told
    assert "the search's curve ends here: ConnectionError: no route. " in line


def test_a_logger_that_fails_in_a_fit_fails_it(tmp_path, monkeypatch, data):
    def fail(*args, **more):
        raise ConnectionError("no route")

    monkeypatch.setattr(CSVLogger, "log_metrics", fail)
    silence()
    fitter = Fitter(configured(), data, multiprocessing.get_context("spawn").Event())
    assert fitter(Fit(GENES, 1, 0, tmp_path / "0")).error == "ConnectionError: no route"


def test_a_full_disk_is_no_failure_of_the_logger(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    curve = Curve(configured(), tmp_path, lambda number: None)
    monkeypatch.setattr(curve._logger, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        curve.update(trials()[:1])


def scalars(folder):
    """Return the points of each tag of the event files in a folder."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return accumulator, {
        tag: [(point.step, point.value) for point in accumulator.Scalars(tag)] for tag in tags
    }


def test_the_curve_as_tensorboard_events_has_each_point_once(tmp_path):
    logged(configured("logger=tensorboard"), tmp_path, (2, 6))
    _, points = scalars(tmp_path / "search")
    assert points["best_val_loss"] == [(step, best) for step, best, _ in POINTS]
    assert points["mean_val_loss"] == [
        (step, mean) for step, _, mean in POINTS if not math.isnan(mean)
    ]
    assert points["generation"] == [(3, 0), (6, 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        return in_memory(rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 2, str(n))

    source = Source(("a", "b"), split(24), split(10), split(4))
    folder = tmp_path_factory.mktemp("images")
    return prepare(source, image_size=32, split_seed=0, max_bad=0, folder=folder)


def fitted(config, data, folder, *ends):
    """Run one fit, which stops and goes on after so many epochs; return its outcome."""
    silence()
    fitter = Fitter(config, data, multiprocessing.get_context("spawn").Event())
    for end in ends:
        outcome = fitter(Fit(GENES, end, 3, folder, goes_on=end < ends[-1]))
        assert outcome.error is None, outcome.error
    return outcome


def test_tensorboard_has_the_genes_of_every_fit_and_what_it_came_to(tmp_path, data):
    folder = tmp_path / "trials" / "0"
    outcome = fitted(configured("logger=tensorboard"), data, folder, 1, 2, 3)
    accumulator, points = scalars(folder)
    assert [step for step, _ in points["val_loss"]] == [2, 5, 8]  # three batches an epoch
    assert points["best/val_loss"] == [(0, pytest.approx(outcome.val_loss))]
    assert points["best/val_accuracy"] == [(0, pytest.approx(outcome.val_accuracy))]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = accumulator.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    values = {k: v.number_value for k, v in start.session_start_info.hparams.items()}
    assert values == GENES
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in experiment.metric_infos} == {
        "best/val_loss",
        "best/val_accuracy",
    }


@pytest.mark.parametrize(
    ("logger", "flag"),
    [
        ("tensorboard", "lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE"),
        ("wandb", "lightning.pytorch.loggers.wandb._WANDB_AVAILABLE"),
    ],
)
def test_a_logger_that_is_not_installed_is_one_line(tmp_path, monkeypatch, logger, flag):
    monkeypatch.setattr(flag, False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(UserError, match=rf"logger={logger} needs pip install 'gatl\[{logger}\]'"):
        require_logger(configured(f"logger={logger}"), tmp_path / "search")


def test_wandb_takes_no_other_settings(tmp_path):
    """Whoever wrote a run folder sends nobody's figures anywhere else."""
    for word in ("+logger.entity=x", "+logger.settings={base_url: x}", "+logger.dir=/tmp"):
        with pytest.raises(UserError, match="unexpected keyword"):
            require_logger(configured("logger=wandb", word), tmp_path / "search")


def records(path):
    """Yield the records of a file of W&B's: LevelDB's log format, behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        room = 2**15 - position % 2**15
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(folder):
    """Return group, name and history of the only run of W&B's in a folder."""
    deadline = time.monotonic() + 30
    while True:  # W&B's own process writes it, a moment later
        (path,) = folder.rglob("*.wandb")
        found = list(records(path))
        if any(record.HasField("exit") for record in found):
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (run,) = (record.run for record in found if record.HasField("run"))
    rows = [
        {"/".join(item.nested_key) or item.key: float(item.value_json) for item in row.item}
        for row in (record.history for record in found if record.HasField("history"))
    ]
    return run, rows


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["variable", "setting"])
def test_wandb_has_a_run_for_each_fit_and_for_the_curve(tmp_path, data, monkeypatch, offline):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    words = ["logger=wandb"]
    if offline == "variable":
        monkeypatch.setenv("WANDB_MODE", "offline")
    else:
        words.append("logger.offline=true")
    config, folder = configured(*words), tmp_path / "a run"
    folder.mkdir()
    (folder / JOURNAL).write_text("its first line\n")
    for number in range(2):
        fitted(config, data, folder / "trials" / str(number), 1, 3)
    logged(config, folder, (2, 6))
    ids = set()
    for place in ("trials/0", "trials/1", "search"):
        run, rows = history(folder / place)
        assert (run.run_group, run.display_name, run.project) == ("a run", place, "gatl")
        ids.add(run.run_id)
        if place == "search":
            steps = [(row["trainer/global_step"], row["best_val_loss"]) for row in rows]
            assert steps == [(step, best) for step, best, _ in POINTS]
        else:
            assert [row["trainer/global_step"] for row in rows if "val_loss" in row] == [2, 5, 8]
    assert len(ids) == 3
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_wandb_is_told_no_step_again_that_it_has_of_an_earlier_session(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    rows = []
    run = SimpleNamespace(resumed=True, summary={"trainer/global_step": 5}, log=rows.append)
    monkeypatch.setattr("wandb.init", lambda **settings: run)
    monkeypatch.setattr("wandb.run", None)
    logger = build_logger(configured("logger=wandb", "logger.offline=true"), tmp_path / "search")
    for step in (2, 5, 8):
        logger.log_metrics({"val_loss": 0.5}, step)
    assert [row["trainer/global_step"] for row in rows] == [8]


def test_wandb_without_an_account_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    with pytest.raises(UserError, match=r"run wandb login, or .* logger\.offline=true"):
        build_logger(configured("logger=wandb"), tmp_path / "search")
