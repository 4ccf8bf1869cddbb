"""The driver, with fits that take no time: a loss that follows from the genes."""

import csv
import functools
import hashlib
import io
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import TrialState
from sqlalchemy import event

import gatl.conf
from gatl.cli import compose, parse
from gatl.config import checked
from gatl.errors import UserError
from gatl.evaluation import RUNG, Fit, fit_seed
from gatl.outcome import Outcome
from gatl.record import begin, open_study, outcome_of, seconds_of
from gatl.search import Ending, Search
from gatl.storage import Database, connected
from gatl.streams import Purpose

CONF = Path(gatl.conf.__file__).parent
OVERRIDES = ("ga.pop=6", "ga.generations=4", "ga.n_elites=2", "pruner=none")
NARROW = (  # six chromosomes in all, so most trials are duplicates
    "space.included_layers={low: 1, high: 3}",
    "space.frozen_layers={low: 0, high: 1}",
    "space.learning_rate.value=1e-3",
    "space.dropout.value=0.5",
    "search.initial=[]",
)


@pytest.fixture(autouse=True)
def _disk_of_no_worth(monkeypatch):
    """Do not wait for the disk; nobody pulls the plug, and nobody else writes the journal."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(JournalFileSymlinkLock, "acquire", lambda lock: True)
    monkeypatch.setattr(JournalFileSymlinkLock, "release", lambda lock: None)


@functools.cache
def composed(*choices):
    return compose(choices)


@functools.cache
def configured(*overrides):
    """Compose choices of groups, and change values in that, which takes a tenth of the time."""
    parsed = parse(overrides)
    chosen = [o for o in parsed if (CONF / o.key_or_group).is_dir()]
    cfg = composed(*(override.input_line for override in chosen)).copy()
    for override in parsed:
        if override not in chosen:
            OmegaConf.update(cfg, override.key_or_group, override.value())
    return checked(cfg)


class Killed(BaseException):
    """The end of a driver that had no time to say goodbye."""


def loss_of(fit: Fit) -> float:
    """Return a loss in (0, 1) that depends on the fit's genes and seed alone."""
    text = json.dumps([sorted(fit.genes.items()), fit.seed, fit.epochs])
    return (int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) + 1) / 2**33


HALVING = (
    "pruner=successive_halving",
    "pruner.reduction_factor=3",
    "trainer.max_epochs=9",
)  # rungs at 1 and 3 epochs


def learning(fit: Fit) -> Outcome:
    """Let the lowest loss of a fit fall from rung to rung, by chance."""
    losses = [loss_of(replace(fit, epochs=epochs)) for epochs in (1, 3, 9)]
    loss = min(losses[: 1 + (1, 3, 9).index(fit.epochs)])
    return Outcome(loss, val_accuracy=0.5, epochs=fit.epochs, duration_s=1.0)


def learning_mixed(fit: Fit) -> Outcome:
    """Let some chromosomes diverge or fail, at any rung."""
    kind = int(loss_of(fit) * 2**20) % 12
    if kind == 0:
        return Outcome(error="diverged: val_loss is nan", diverged=True, epochs=fit.epochs - 1)
    return Outcome(error="OSError: a bad day") if kind == 1 else learning(fit)


def plain(fit: Fit) -> Outcome:
    return Outcome(loss_of(fit), val_accuracy=0.5, epochs=fit.epochs, duration_s=1.0)


def mixed(fit: Fit) -> Outcome:
    """Let some chromosomes diverge, always, and some fail."""
    kind = int(loss_of(fit) * 2**20) % 8
    if kind == 0:
        return Outcome(error="diverged: val_loss is nan in epoch 1", diverged=True)
    return Outcome(error="OSError: a bad day") if kind == 1 else plain(fit)


PLAIN = pytest.param(plain, marks=pytest.mark.slow)  # `mixed` has its outcomes, and others
LEARNING = pytest.param(learning, marks=pytest.mark.slow)  # and so has `learning_mixed`


class FakeEvaluator:
    """Ends one fit at a time, in random order; ends all when they are cut off."""

    def __init__(self, n_workers=1, *, seed=0, evaluate: Callable[[Fit], Outcome] = plain):
        self.n_workers = n_workers
        self.cut = threading.Event()
        self.evaluate = evaluate
        self.running: dict[int, Fit] = {}
        self.fits: list[int] = []  # every fit, in the order of their start
        self.closed = False
        self._rng = random.Random(seed)

    @property
    def n_free(self):
        return self.n_workers - len(self.running)

    def submit(self, key, fit):
        assert self.n_free > 0
        self.running[key] = fit
        self.fits.append(key)

    def wait(self, timeout):
        if self.cut.is_set():
            ended, self.running = self.running, {}
            return [(key, Outcome(stopped=True)) for key in ended]
        key = self._rng.choice(list(self.running))
        return [(key, self.evaluate(self.running.pop(key)))]

    def epochs_done(self, key):
        return 0.0

    def close(self, *, now=False):
        self.closed = True


class Spy:
    """A view that remembers, and at some point does something."""

    def __init__(
        self,
        after: int | None = None,
        action: Callable[[], None] = lambda: None,
        after_pauses: int | None = None,
    ):
        self.told: list[int] = []
        self.forecasts: list[tuple[float, float | None]] = []
        self.paused_at: list[tuple[int, int]] = []
        self._after_pauses = after_pauses
        self.resumed_with: list[int] = []
        self._after, self._action = after, action

    def resumed(self, trials):
        self.resumed_with = [t.number for t in trials if t.state.is_finished()]

    def started(self, number, genes):
        pass

    def paused(self, number, genes, outcome):
        self.paused_at.append((number, outcome.epochs))
        if len(self.paused_at) == self._after_pauses:
            self._action()

    def ended(self, trial):
        self.told.append(trial.number)
        if len(self.told) == self._after:
            self._action()

    def forecast(self, seconds, epochs):
        self.forecasts.append((time.monotonic(), seconds))

    def tick(self):
        pass


class Run:
    """One session of a search over a folder."""

    def __init__(
        self,
        folder: Path,
        evaluator=None,
        view=None,
        overrides: Sequence[str] = (),
        database: Database | None = None,
    ):
        self.config = configured(*OVERRIDES, *overrides)
        self.folder = folder
        self.strategy = instantiate(self.config.search, _partial_=True, _convert_="all")(
            space=self.config.space, seed=self.config.seed, initial=self.config.initial
        )
        self.study = open_study(folder, self.strategy, database)
        self.evaluator = evaluator or FakeEvaluator()
        self.view = view or Spy()
        self.stop = threading.Event()
        self.search = Search(
            self.config,
            self.study,
            self.strategy,
            self.evaluator,
            folder,
            self.view,
            self.stop,
            self.evaluator.cut,
        )

    def __call__(self) -> Ending:
        return self.search.run()

    @property
    def trials(self):
        return self.study.get_trials(deepcopy=False)

    @property
    def history(self) -> str:
        return without_times(self.folder / "history.csv")


class Lossy(FakeEvaluator):
    """Loses its worker behind each fit, until somebody waits for another."""

    lost, n_asked = False, 0

    @property
    def n_free(self):
        self.n_asked += 1
        assert self.n_asked < 1000, "nobody waits for a worker"
        return 0 if self.lost else super().n_free

    def wait(self, timeout):
        self.lost = bool(self.running)
        return super().wait(timeout) if self.running else []


def test_a_search_that_has_lost_all_its_workers_waits_for_others(tmp_path):
    (tmp_path / "lost").mkdir()
    (tmp_path / "kept").mkdir()
    lost, kept = Run(tmp_path / "lost", Lossy()), Run(tmp_path / "kept")
    assert lost() is kept() is Ending.COMPLETE
    assert lost.history == kept.history


def kill():
    raise Killed


def whole(folder: Path, *args, **kwargs) -> Run:
    """Return a run that has come to its end."""
    folder.mkdir()
    run = Run(folder, *args, **kwargs)
    assert run() is Ending.COMPLETE
    return run


def without_times(path: Path) -> str:
    """Return a history but for when fits ran."""
    kept = io.StringIO()
    with path.open(newline="") as file:
        csv.writer(kept).writerows(row[:-2] for row in csv.reader(file))
    return kept.getvalue()


def rows(history: str) -> list[dict[str, str]]:
    return list(csv.DictReader(history.splitlines()))


@pytest.mark.parametrize("overrides", [(), NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("evaluate", [PLAIN, mixed])
def test_workers_and_the_order_of_completion_change_nothing(tmp_path, evaluate, overrides):
    expected = whole(tmp_path / "1", FakeEvaluator(evaluate=evaluate), overrides=overrides)
    assert len(rows(expected.history)) == 6 + 3 * 4
    for workers, seed in itertools.product((2, 5), range(3)):
        evaluator = FakeEvaluator(workers, seed=seed, evaluate=evaluate)
        run = whole(tmp_path / f"{workers}-{seed}", evaluator, overrides=overrides)
        assert run.history == expected.history


SEARCHES = (
    ("ga.mode=steady_state",),
    ("search=annealing",),
    ("search=regularized_evolution", "search.population_size=6"),
    *((f"search={name}",) for name in ("random", "tpe", "cmaes", "nsga2")),
)


@pytest.mark.parametrize("evaluate", [PLAIN, mixed])
@pytest.mark.parametrize("search", SEARCHES, ids=" ".join)
def test_no_search_depends_on_workers_or_on_when_it_was_killed(tmp_path, search, evaluate):
    """Nor the one nor the other at once: killed with two workers, it goes on with four."""
    for narrow in ((), NARROW[:2]):
        overrides = (*search, *narrow)
        name = f"{len(narrow)}"
        one = whole(tmp_path / name, FakeEvaluator(evaluate=evaluate), overrides=overrides)
        expected = one.history
        n_trials = len(rows(expected))
        assert n_trials == 6 + 3 * 4
        assert {row["generation"] for row in rows(expected)} == {""}
        for seed in range(2):
            evaluator = FakeEvaluator(4, seed=seed, evaluate=evaluate)
            run = whole(tmp_path / f"{name}-{seed}", evaluator, overrides=overrides)
            assert run.history == expected
        for k in range(1 + len(narrow), n_trials, 6):
            folder = tmp_path / f"{name}-killed-{k}"
            folder.mkdir()
            evaluator = FakeEvaluator(2, seed=k, evaluate=evaluate)
            with pytest.raises(Killed):
                Run(folder, evaluator, Spy(k, kill), overrides)()
            again = Run(folder, FakeEvaluator(4, seed=-k, evaluate=evaluate), overrides=overrides)
            assert again() is Ending.COMPLETE
            assert again.history == expected


def test_without_generations_no_worker_waits(tmp_path):
    """Between generations workers would be idle; fits end here in any order, some much later."""

    class Watching(FakeEvaluator):
        def wait(self, timeout):
            self.busy.append(len(self.running))
            return super().wait(timeout)

    for search, n_workers in ((SEARCHES[0], 4), (SEARCHES[1], 4), (SEARCHES[2], 5)):
        evaluator = Watching(n_workers)
        evaluator.busy = []
        whole(tmp_path / search[0], evaluator, overrides=(*search, "budget.trials=60"))
        middle = evaluator.busy[10:-n_workers]
        assert sum(middle) / len(middle) > 0.6 * n_workers


def test_another_seed_is_another_search(tmp_path):
    first, second = (whole(tmp_path / s, overrides=[f"seed={s}"]).history for s in "12")
    assert first != second


def test_a_fit_gets_what_its_trial_says_and_nothing_of_its_number(tmp_path):
    fits = []

    def evaluate(fit):
        fits.append(fit)
        return plain(fit)

    run = whole(tmp_path / "run", FakeEvaluator(evaluate=evaluate), overrides=["seed=5"])
    assert len(fits) == len(run.trials)
    fits.sort(key=lambda fit: int(fit.folder.name))
    for number, (fit, trial) in enumerate(zip(fits, run.trials, strict=True)):
        assert fit.genes == run.config.space.to_dict(run.config.space.from_dict(trial.params))
        assert fit.seed == fit_seed(5, Purpose.FIT, fit.genes)
        assert fit.epochs == run.config.trainer.max_epochs
        assert fit.folder == tmp_path / "run" / "trials" / str(number)


@pytest.mark.parametrize("evaluate", [PLAIN, mixed])
def test_killed_after_any_trial_it_resumes_to_the_same_history(tmp_path, evaluate):
    expected = whole(
        tmp_path / "whole", FakeEvaluator(evaluate=evaluate), overrides=NARROW[:2]
    ).history
    n_trials = len(rows(expected))
    for k in range(1, n_trials):
        folder = tmp_path / str(k)
        folder.mkdir()
        killed = Run(folder, FakeEvaluator(2, seed=k, evaluate=evaluate), Spy(k, kill), NARROW[:2])
        with pytest.raises(Killed):
            killed()
        again = Run(folder, FakeEvaluator(3, seed=-k, evaluate=evaluate), overrides=NARROW[:2])
        assert again() is Ending.COMPLETE
        assert len(again.view.resumed_with) == k
        assert again.history == expected
        assert not set(again.evaluator.fits) & set(again.view.resumed_with)


def test_cut_anywhere_in_the_journal_it_resumes_to_the_same_history(tmp_path):
    """Every line and half line that a kill can leave: created trials, half of the genes, ..."""
    overrides = ["ga.pop=3", "ga.generations=3", "ga.n_elites=1"]
    run = whole(tmp_path / "whole", overrides=overrides)
    lines = (tmp_path / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    for k in range(len(lines)):
        folder = tmp_path / str(k)
        folder.mkdir()
        half = lines[k][: len(lines[k]) // 2]
        (folder / "study.journal").write_bytes(b"".join(lines[:k]) + half)
        again = Run(folder, FakeEvaluator(2, seed=k), overrides=overrides)
        assert again() is Ending.COMPLETE
        assert again.history == run.history


def test_only_the_lowest_of_equal_chromosomes_runs(tmp_path):
    run = whole(tmp_path / "run", FakeEvaluator(5), overrides=NARROW)
    chromosomes = [run.config.space.from_dict(trial.params) for trial in run.trials]
    first = {c: n for n, c in reversed(list(enumerate(chromosomes)))}
    assert sorted(run.evaluator.fits) == sorted(first.values())
    assert len(first) < len(chromosomes)
    for number, (row, chromosome) in enumerate(zip(rows(run.history), chromosomes, strict=True)):
        original = rows(run.history)[first[chromosome]]
        assert row["val_loss"] == original["val_loss"]
        assert row["reused_from"] == ("" if number in first.values() else original["number"])


@pytest.mark.parametrize("pruner", [("pruner=none",), HALVING], ids=["none", "halving"])
def test_the_longest_fits_of_a_generation_start_first(tmp_path, pruner):
    """At first by what they train; then by what fits took: here only the first layers cost."""

    def cost(number):
        genes = run.trials[number].params
        return max(0, min(genes["included_layers"], 18) - genes["frozen_layers"])

    def evaluate(fit):
        outcome = plain(fit) if pruner == ("pruner=none",) else learning(fit)
        dear = max(0, min(fit.genes["included_layers"], 18) - fit.genes["frozen_layers"])
        return replace(outcome, epochs=fit.epochs, duration_s=fit.epochs * dear)

    run = whole(tmp_path / "run", FakeEvaluator(evaluate=evaluate), overrides=pruner)
    started = {
        g: dict.fromkeys(n for n in run.evaluator.fits if run.strategy.generation(n) == g)
        for g in range(4)
    }
    genes = [run.trials[number].params for number in started[0]]
    trained = [g["included_layers"] - g["frozen_layers"] + (g["frozen_layers"] == 0) for g in genes]
    assert trained == sorted(trained, reverse=True)
    for generation in (1, 2, 3):
        costs = [cost(number) for number in started[generation]]
        assert costs[0] == max(costs), costs
        assert costs[-1] == min(costs), costs


def test_a_reused_result_has_no_duration_of_its_own(tmp_path):
    run = whole(tmp_path / "run", overrides=NARROW)
    for row in rows(run.history):
        assert float(row["duration_s"]) == (1.0 if row["reused_from"] == "" else 0.0)


def test_a_divergence_is_reused_and_a_failure_is_tried_again(tmp_path):
    def evaluate(fit):
        if fit.genes["included_layers"] == 1:
            return Outcome(error="diverged: ...", diverged=True)
        if (fit.genes["included_layers"], fit.genes["frozen_layers"]) == (2, 0):
            return Outcome(error="OSError: no space left")
        return plain(fit)

    overrides = [*NARROW, "ga.generations=12", "ga.tournament_size=1"]
    run = whole(tmp_path / "run", FakeEvaluator(3, evaluate=evaluate), overrides=overrides)
    by_depth: dict[str, list[dict[str, str]]] = {"1": [], "2": [], "3": []}
    for row in rows(run.history):
        if row["frozen_layers"] == "0":
            by_depth[row["included_layers"]].append(row)
    assert {row["state"] for row in by_depth["1"]} == {"FAIL"}
    assert len(by_depth["1"]) > 1
    assert sum(row["reused_from"] == "" for row in by_depth["1"]) == 1
    assert len(by_depth["2"]) > 1
    assert all(row["reused_from"] == "" for row in by_depth["2"])
    assert {row["error"] for row in by_depth["1"]} == {"diverged: ..."}


def test_generations_of_nothing_but_duplicates_do_not_end_the_search(tmp_path):
    fixed = ["space.included_layers.value=3", "space.frozen_layers.value=1", *NARROW[2:]]
    run = whole(tmp_path / "run", overrides=fixed)
    assert run.evaluator.fits == [0]
    assert len(rows(run.history)) == 18


def fails(fit):
    fit.folder.mkdir(parents=True, exist_ok=True)
    (fit.folder / "error.txt").touch()
    return Outcome(error="OSError: no space left")


def test_five_failures_in_a_row_stop_the_search(tmp_path):
    run = Run(tmp_path, FakeEvaluator(evaluate=fails))
    with pytest.raises(UserError, match="5 trials in a row failed") as error:
        run()
    message = str(error.value)
    assert "OSError: no space left" in message
    folders = [str(tmp_path / "trials" / number / "error.txt") for number in "45"]
    assert any(folder in message for folder in folders)  # the sixth may have ended before a fifth
    assert f"python -m gatl resume={tmp_path}" in message
    assert {0, 1, 2, 3, 4} <= {int(row["number"]) for row in rows(run.history)}
    again = Run(tmp_path)  # what was wrong is mended
    assert again() is Ending.COMPLETE
    states = {int(row["number"]): row["state"] for row in rows(again.history)}
    assert len(states) == 18
    assert {n for n in states if states[n] == "FAIL"} == set(run.evaluator.fits)


def test_five_failures_in_a_row_stop_the_search_in_whatever_order_they_come(tmp_path):
    """The sixth trial has ended well before the fifth failure is known."""

    def evaluate(fit):
        return fails(fit) if int(fit.folder.name) < 5 else plain(fit)

    for workers in (1, 6):
        (tmp_path / str(workers)).mkdir()
        evaluator = FakeEvaluator(workers, evaluate=evaluate)
        with pytest.raises(UserError, match=r"5 trials in a row .* the last, 4: OSError"):
            Run(tmp_path / str(workers), evaluator)()


def in_turn(*errors):
    """Fail for these reasons, by the trial's number."""
    return lambda fit: Outcome(error=errors[int(fit.folder.name) % len(errors)])


def test_failures_of_one_kind_stop_the_search_whatever_their_particulars(tmp_path):
    said = "OSError: [Errno 2] No such file or directory: '/run/trials/{}/metrics.csv'"
    run = Run(tmp_path, FakeEvaluator(evaluate=in_turn(*map(said.format, range(18)))))
    with pytest.raises(UserError, match="5 trials in a row failed for one reason") as error:
        run()
    assert "error.txt" not in str(error.value)  # there is none


def test_failures_of_several_kinds_do_not_stop_the_search(tmp_path):
    errors = [*["OSError: a bad day"] * 4, "killed after evaluator.timeout=1m"]
    run = Run(tmp_path, FakeEvaluator(evaluate=in_turn(*errors)))
    assert run() is Ending.COMPLETE
    assert {row["state"] for row in rows(run.history)} == {"FAIL"}


def test_divergence_does_not_end_a_row_of_failures(tmp_path):
    def evaluate(fit):
        diverged = int(fit.folder.name) % 3 == 0
        return Outcome(error="diverged: ...", diverged=True) if diverged else fails(fit)

    run = Run(tmp_path, FakeEvaluator(evaluate=evaluate))
    with pytest.raises(UserError, match=r"the last, [78]: OSError: no space left"):
        run()


def test_micro_batches_are_in_the_record_and_in_the_history(tmp_path):
    def evaluate(fit):
        halved = int(fit.folder.name) % 2
        return replace(plain(fit), micro_batch=16 if halved else None)

    run = whole(tmp_path / "run", FakeEvaluator(evaluate=evaluate), overrides=NARROW)
    for row, trial in zip(rows(run.history), run.trials, strict=True):
        source = int(row["reused_from"] or row["number"])
        assert row["micro_batch"] == ("16" if source % 2 else "")
        assert outcome_of(trial).micro_batch == (16 if source % 2 else None)
    assert {row["micro_batch"] for row in rows(run.history)} == {"", "16"}


def test_a_success_between_failures_lets_the_search_go_on(tmp_path):
    def evaluate(fit):
        return plain(fit) if int(fit.folder.name) % 5 == 4 else fails(fit)

    assert Run(tmp_path, FakeEvaluator(evaluate=evaluate))() is Ending.COMPLETE


def test_that_the_largest_fits_start_and_fail_first_does_not_end_the_search(tmp_path):
    """They find no memory, and there are more than five of them, but not in a row by number."""
    overrides = ("ga.pop=12", "ga.generations=1", "search.initial=[]")
    order = whole(tmp_path / "whole", overrides=overrides).evaluator.fits
    large = set(order[:6])
    assert not any({n, n + 1, n + 2, n + 3, n + 4} <= large for n in range(8))

    def evaluate(fit):
        return fails(fit) if int(fit.folder.name) in large else plain(fit)

    run = whole(tmp_path / "run", FakeEvaluator(evaluate=evaluate), overrides=overrides)
    assert run.evaluator.fits == order


def test_a_reused_result_between_failures_is_a_success_too(tmp_path):
    failing = itertools.count()

    def evaluate(fit):
        if (fit.genes["included_layers"], fit.genes["frozen_layers"]) == (2, 0):
            next(failing)
            return fails(fit)
        return plain(fit)

    overrides = [*NARROW, "ga.generations=12", "ga.tournament_size=1"]
    run = Run(tmp_path, FakeEvaluator(evaluate=evaluate), overrides=overrides)
    assert run() is Ending.COMPLETE
    assert next(failing) >= 5


def test_divergences_do_not_count_as_failures(tmp_path):
    calls = itertools.count()

    def evaluate(fit):
        diverged = next(calls) >= 4
        return Outcome(error="diverged: ...", diverged=True) if diverged else fails(fit)

    run = Run(tmp_path, FakeEvaluator(evaluate=evaluate))
    assert run() is Ending.COMPLETE
    assert {row["state"] for row in rows(run.history)} == {"FAIL"}


def test_budget_trials_cuts_or_extends_the_same_search(tmp_path):
    expected = whole(tmp_path / "long", overrides=["budget.trials=30"])
    for n in (1, 5, 6, 9, 18, 25):
        folder = tmp_path / str(n)
        run = whole(folder, FakeEvaluator(2), overrides=[f"budget.trials={n}"])
        assert rows(run.history) == rows(expected.history)[:n]
        again = Run(folder, FakeEvaluator(2), overrides=["budget.trials=30"])
        assert again() is Ending.COMPLETE
        assert again.history == expected.history


@pytest.mark.parametrize("search", SEARCHES, ids=" ".join)
def test_budget_trials_cuts_or_extends_every_search(tmp_path, search):
    """Be it in the first trials, of which there would be more."""
    expected = whole(tmp_path / "long", overrides=[*search, "budget.trials=20"])
    for n in (1, 4, 13):
        folder = tmp_path / str(n)
        run = whole(folder, FakeEvaluator(2), overrides=[*search, f"budget.trials={n}"])
        assert rows(run.history) == rows(expected.history)[:n]
        again = Run(folder, FakeEvaluator(4), overrides=[*search, "budget.trials=20"])
        assert again() is Ending.COMPLETE
        assert again.history == expected.history


def test_a_smaller_budget_on_resume_leaves_what_lies_beyond_it(tmp_path):
    with pytest.raises(Killed):
        Run(tmp_path, view=Spy(2, kill))()
    again = Run(tmp_path, overrides=["budget.trials=4"])
    assert again() is Ending.COMPLETE
    assert [trial.state.name for trial in again.trials] == ["COMPLETE"] * 4 + ["RUNNING"] * 2


def test_ctrl_c_leaves_running_trials_for_resume(tmp_path):
    expected = whole(tmp_path / "whole").history
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(folder, FakeEvaluator(3), Spy(8, lambda: run.stop.set()))
    assert run() is Ending.INTERRUPTED
    states = [trial.state for trial in run.trials]
    assert states.count(TrialState.RUNNING) == 10 - 8
    assert run.evaluator.cut.is_set()
    assert Run(folder)() is Ending.COMPLETE
    assert without_times(folder / "history.csv") == expected


def test_a_result_that_comes_in_spite_of_ctrl_c_is_kept(tmp_path):
    class Deaf(FakeEvaluator):
        def wait(self, timeout):
            self.cut, cut = threading.Event(), self.cut
            try:
                return super().wait(timeout)
            finally:
                self.cut = cut

    run = Run(tmp_path, Deaf(3), Spy(1, lambda: run.stop.set()))
    assert run() is Ending.INTERRUPTED
    assert sum(trial.state is TrialState.COMPLETE for trial in run.trials) == 3


def test_a_fit_that_stops_unasked_is_done_again(tmp_path):
    calls = itertools.count()

    def evaluate(fit):
        return Outcome(stopped=True) if next(calls) in (2, 5) else plain(fit)

    expected = whole(tmp_path / "whole").history
    run = whole(tmp_path / "run", FakeEvaluator(2, evaluate=evaluate))
    assert run.history == expected


def in_no_time(monkeypatch):
    """Let any time budget be spent at once."""
    clock = itertools.count()
    monkeypatch.setattr("gatl.search.time.monotonic", lambda: float(next(clock) * 3600))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_spent_time_budget_lets_the_first_fit_finish_and_cuts_off_the_others(
    tmp_path, monkeypatch, workers
):
    in_no_time(monkeypatch)
    run = Run(tmp_path, FakeEvaluator(workers), overrides=["budget.time=1s"])
    assert run() is Ending.TIME
    states = [trial.state.name for trial in run.trials]
    assert sorted(states) == ["COMPLETE"] + ["RUNNING"] * 5
    assert len(rows(run.history)) == 1
    assert not run.evaluator.cut.is_set()  # the fits of the final model are to run
    monkeypatch.undo()
    again = Run(tmp_path)
    assert again() is Ending.COMPLETE
    assert again.history == whole(tmp_path / "whole").history


def test_in_every_session_the_first_fit_finishes(tmp_path, monkeypatch):
    in_no_time(monkeypatch)
    for n in (1, 2, 3):
        run = Run(tmp_path, FakeEvaluator(1), overrides=["budget.time=1s"])
        assert run() is Ending.TIME
        assert len(rows(run.history)) == n


def test_a_failed_fit_is_not_the_first_that_finishes(tmp_path, monkeypatch):
    in_no_time(monkeypatch)
    outcomes = iter([Outcome(error="diverged", diverged=True), Outcome(error="OSError: x")])
    evaluator = FakeEvaluator(1, evaluate=lambda fit: next(outcomes, None) or plain(fit))
    run = Run(tmp_path, evaluator, overrides=["budget.time=1s"])
    assert run() is Ending.TIME
    assert [row["state"] for row in rows(run.history)] == ["FAIL", "FAIL", "COMPLETE"]


def test_ctrl_c_after_the_time_budget_counts(tmp_path, monkeypatch):
    in_no_time(monkeypatch)
    evaluator = FakeEvaluator(2)
    run = Run(tmp_path, evaluator, overrides=["budget.time=1s"])
    wait = evaluator.wait

    def wait_and_interrupt(timeout):
        if evaluator.cut.is_set():
            run.stop.set()
        return wait(timeout)

    evaluator.wait = wait_and_interrupt
    assert run() is Ending.INTERRUPTED
    assert evaluator.cut.is_set()


def test_seconds_of_all_sessions_add_up_even_when_killed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("gatl.search.time.monotonic", lambda: clock[0])

    def evaluate(fit):
        clock[0] += 10
        return plain(fit)

    with pytest.raises(Killed):
        Run(tmp_path, FakeEvaluator(evaluate=evaluate), Spy(3, kill))()
    clock[0] += 1000  # nobody searched
    run = Run(tmp_path, FakeEvaluator(evaluate=evaluate))
    assert run() is Ending.COMPLETE
    assert run.study.user_attrs["seconds"] == run.search.seconds == 18 * 10


def test_what_a_fit_left_when_it_was_cut_off_is_gone_when_it_runs_again(tmp_path):
    leftover = tmp_path / "trials" / "0" / "metrics.csv"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("of a fit that was killed")
    Run(tmp_path)()
    assert not leftover.exists()


def test_a_finished_search_is_not_done_again(tmp_path):
    expected = whole(tmp_path / "run").history
    again = Run(tmp_path / "run")
    assert again() is Ending.COMPLETE
    assert again.evaluator.fits == []
    assert again.history == expected


def test_trials_without_genes_or_with_some_get_the_rest(tmp_path):
    """Of a journal in which `Study.ask` was cut off: it writes gene after gene."""
    expected = whole(tmp_path / "whole").history
    folder = tmp_path / "run"
    folder.mkdir()
    half = Run(folder)
    half.study.ask()
    some = list(half.strategy.distributions().items())[:2]
    assert len(half.study.ask(dict(some)).params) == 2
    again = Run(folder, FakeEvaluator(2))
    assert again() is Ending.COMPLETE
    assert again.history == expected


def test_a_trial_is_three_lines_of_the_journal_and_a_rung_is_two(tmp_path):
    """Each waits for the disk: its beginning with all genes, its outcome, its state."""
    run = whole(tmp_path / "run", FakeEvaluator(2), overrides=NARROW)
    around = 2  # the study's beginning, the seconds at the session's end
    lines = (tmp_path / "run" / "study.journal").read_bytes().count(b"\n")
    assert lines == around + 3 * len(run.trials)
    run = whole(tmp_path / "halved", FakeEvaluator(2, evaluate=learning), overrides=HALVED[0])
    n_rungs = len(run.view.paused_at)
    assert n_rungs > len(run.trials)
    lines = (tmp_path / "halved" / "study.journal").read_bytes().count(b"\n")
    assert lines == around + 3 * len(run.trials) + 2 * n_rungs


def test_the_driver_does_not_read_the_record_again(tmp_path, monkeypatch):
    """Reading all trials is what would grow with them."""
    reads, looked_at = itertools.count(), itertools.count()
    get_trials = optuna.Study.get_trials

    def counted(*args, **kwargs):
        next(reads)
        return get_trials(*args, **kwargs)

    def counted_outcome(trial):
        next(looked_at)
        return outcome_of(trial)

    monkeypatch.setattr(optuna.Study, "get_trials", counted)
    monkeypatch.setattr("gatl.search.outcome_of", counted_outcome)
    monkeypatch.setattr("gatl.record.outcome_of", counted_outcome)
    run = Run(tmp_path, overrides=["ga.pop=20", "ga.generations=6"])
    assert run() is Ending.COMPLETE
    assert next(reads) <= 3  # at the beginning: whether it is sound, the record, the seconds
    n_trials = len(run.trials)
    assert (
        next(looked_at) < 20 * n_trials
    )  # a row is written again while one before it in its generation runs


HALVED = [(*HALVING, "ga.pop=7"), (*HALVING, *NARROW, "ga.pop=7")]


@pytest.mark.parametrize("overrides", HALVED, ids=["wide", "narrow"])
@pytest.mark.parametrize("evaluate", [LEARNING, learning_mixed])
def test_halving_does_not_depend_on_workers_or_the_order_of_completion(
    tmp_path, evaluate, overrides
):
    expected = whole(tmp_path / "1", FakeEvaluator(evaluate=evaluate), overrides=overrides)
    assert "PRUNED" in {row["state"] for row in rows(expected.history)}
    for workers, seed in itertools.product((2, 5), range(3)):
        evaluator = FakeEvaluator(workers, seed=seed, evaluate=evaluate)
        run = whole(tmp_path / f"{workers}-{seed}", evaluator, overrides=overrides)
        assert run.history == expected.history


def test_the_best_third_of_a_generation_goes_on_from_each_rung(tmp_path):
    run = whole(tmp_path / "run", FakeEvaluator(3, evaluate=learning), overrides=HALVED[0])
    table = rows(run.history)
    for generation in range(4):
        trials = [row for row in table if row["generation"] == str(generation)]
        fits = {int(row["number"]): fit_of(run, row) for row in trials}
        left = sorted(fits)
        for epochs, factor in ((1, 3), (3, 3), (9, 1)):
            losses = {n: learning(replace(fits[n], epochs=epochs)).val_loss for n in left}
            ranked = sorted(losses, key=losses.__getitem__)
            go_on = ranked[: -(-len(ranked) // factor)]
            for row in trials:
                if (number := int(row["number"])) in left and (number not in go_on or epochs == 9):
                    assert row["state"] == ("COMPLETE" if epochs == 9 else "PRUNED")
                    assert row["epochs"] == str(epochs)
                    assert float(row["val_loss"]) == losses[number]
                    assert float(row["duration_s"]) == 1 + (1, 3, 9).index(epochs)
            left = go_on
        assert len(left) == 1


def test_the_record_says_when_each_fit_ran(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("gatl.search.time.monotonic", lambda: now[0])
    began: dict[tuple[int, int], float] = {}  # by trial and epochs; each takes a second

    class Timed(FakeEvaluator):
        def wait(self, timeout):
            now[0] += 1.5
            ((key, outcome),) = super().wait(timeout)
            began[key, outcome.epochs] = now[0] - before - 1
            return [(key, outcome)]

    before = now[0]
    folder = tmp_path / "run"
    folder.mkdir()
    overrides = (*HALVED[1], "ga.generations=4")
    with pytest.raises(Killed):
        Run(folder, Timed(3, evaluate=learning), Spy(10, kill), overrides)()
    spent = seconds_of(open_study(folder, None))
    now[0] += 10_000  # nobody searches
    before = now[0] - spent
    run = Run(folder, Timed(2, evaluate=learning), overrides=overrides)
    assert run() is Ending.COMPLETE
    with (folder / "history.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert any(row["reused_from"] for row in table)
    workers = set()
    for row in table:
        if row["reused_from"]:
            assert (row["started_s"], row["fits"]) == ("", "")
            continue
        fits = json.loads(row["fits"])
        ends = (1, 3, 9)[: 1 + (1, 3, 9).index(int(row["epochs"]))]
        expected = [began[int(row["number"]), end] for end in ends]
        assert [fit[0] for fit in fits] == expected
        assert float(row["started_s"]) == expected[0]
        assert sum(fit[1] for fit in fits) == float(row["duration_s"])
        workers |= {fit[2] for fit in fits}
    assert workers == {2, 3}


def fit_of(run: Run, row: dict[str, str]) -> Fit:
    genes = run.config.space.to_dict(
        run.config.space.from_dict({name: float(row[name]) for name in run.config.space.names})
    )
    return Fit(genes, 9, fit_seed(run.config.seed, Purpose.FIT, genes), Path())


def test_fits_leave_a_checkpoint_where_they_may_go_on_and_it_is_gone_in_the_end(tmp_path):
    asked = []

    def evaluate(fit):
        asked.append((int(fit.folder.name), fit.epochs, fit.goes_on))
        checkpoint = fit.folder / RUNG
        assert checkpoint.exists() == (fit.epochs > 1)
        fit.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        return learning(fit)

    run = whole(tmp_path / "run", FakeEvaluator(2, evaluate=evaluate), overrides=HALVED[0])
    for row in rows(run.history):
        ran = [ask[1:] for ask in asked if ask[0] == int(row["number"])]
        ends = [(1, True), (3, True), (9, False)]
        assert ran == ends[: 1 + [1, 3, 9].index(int(row["epochs"]))]
    assert not list((tmp_path / "run").rglob(RUNG))


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(HALVED[0], marks=pytest.mark.slow), HALVED[1]],  # the second with duplicates
    ids=["wide", "narrow"],
)
@pytest.mark.parametrize("evaluate", [LEARNING, learning_mixed])
def test_killed_at_any_rung_or_end_a_halved_search_resumes_to_the_same(
    tmp_path, evaluate, overrides
):
    expected = whole(tmp_path / "whole", FakeEvaluator(evaluate=evaluate), overrides=overrides)
    ended, paused = len(expected.view.told), len(expected.view.paused_at)
    spies = [Spy(k, kill) for k in range(1, ended)]
    spies += [Spy(None, kill, k) for k in range(1, paused + 1)]
    for k, spy in enumerate(spies):
        folder = tmp_path / str(k)
        folder.mkdir()
        with pytest.raises(Killed):
            Run(folder, FakeEvaluator(2, seed=k, evaluate=evaluate), spy, overrides)()
        again = Run(folder, FakeEvaluator(3, seed=-k, evaluate=evaluate), overrides=overrides)
        assert again() is Ending.COMPLETE
        assert again.history == expected.history
        assert not set(again.view.paused_at) & set(spy.paused_at)  # no rung is climbed twice


def test_cut_anywhere_in_the_journal_a_halved_search_resumes_to_the_same(tmp_path):
    overrides = [*HALVING, "ga.pop=4", "ga.generations=2", "ga.n_elites=1"]
    run = whole(tmp_path / "whole", FakeEvaluator(evaluate=learning), overrides=overrides)
    lines = (tmp_path / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    for k in range(len(lines)):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:k]))
        again = Run(folder, FakeEvaluator(2, seed=k, evaluate=learning), overrides=overrides)
        assert again() is Ending.COMPLETE
        assert [{**row, "duration_s": ""} for row in rows(again.history)] == [
            {**row, "duration_s": ""} for row in rows(run.history)
        ]


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_commit_to_a_database_it_resumes_to_the_same_history(tmp_path, step):
    """What a kill leaves is the commits before it, each whole: of a trial, of its rung, its end."""
    overrides = [*HALVING[:2], "trainer.max_epochs=3", "ga.pop=3", "ga.generations=2"]
    overrides += ["ga.n_elites=1"]

    def learnt(fit):
        return replace(plain(fit), val_loss=loss_of(replace(fit, epochs=1)))

    def search(name, database, kill_at=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run = Run(folder, FakeEvaluator(evaluate=learnt), None, overrides, database)
        commits, changes = itertools.count(), 0

        def committing(connection):
            nonlocal changes
            written = connection.connection.total_changes
            if written > changes and next(commits) == kill_at:
                raise Killed
            changes = written

        if kill_at is not None:
            event.listen(database.engine, "commit", committing)
            with pytest.raises(Killed):
                run()
            event.remove(database.engine, "commit", committing)
        else:
            assert run() is Ending.COMPLETE
        return run

    expected = search("journal", None)
    n_commits = (tmp_path / "journal" / "study.journal").read_bytes().count(b"\n") - 1
    assert n_commits > 5 * len(expected.trials)  # each with a rung
    with connected(f"sqlite:///{tmp_path}/studies.db") as database:
        with database.engine.connect() as only:  # the pool has no other
            only.exec_driver_sql("PRAGMA synchronous = OFF")
        for k in range(0, n_commits, step):
            search(str(k), database, k)
            again = search(str(k), database)
            assert again.history == expected.history
            assert [t.params for t in again.trials] == [t.params for t in expected.trials]
            assert [t.values for t in again.trials] == [t.values for t in expected.trials]


def test_two_drivers_of_one_study_are_noticed(tmp_path):
    """A copy of the folder leads to the same study in the database."""
    with connected(f"sqlite:///{tmp_path}/studies.db") as database:
        run = Run(tmp_path, overrides=["ga.pop=3", "ga.generations=2"], database=database)

        def interfere():
            trial = run.trials[0]
            begin(open_study(tmp_path, run.strategy, database), trial.params, trial.distributions)

        run.view = run.search._view = Spy(2, interfere)
        with pytest.raises(UserError, match="a trial 4 where 3 should come next"):
            run()


def test_an_equal_of_a_stopped_trial_is_stopped_with_it_and_runs_again_later(tmp_path):
    overrides = [*HALVED[1], "ga.generations=12"]
    run = whole(tmp_path / "run", FakeEvaluator(3, evaluate=learning), overrides=overrides)
    pruned = [row for row in rows(run.history) if row["state"] == "PRUNED"]
    reused = [row for row in pruned if row["reused_from"]]
    assert reused
    for row in reused:
        source = rows(run.history)[int(row["reused_from"])]
        same = ("generation", "state", "epochs", "val_loss", *run.config.space.names)
        assert [row[name] for name in same] == [source[name] for name in same]
    evaluated = [
        tuple(row[name] for name in run.config.space.names)
        for row in pruned
        if not row["reused_from"]
    ]
    assert len(set(evaluated)) < len(evaluated)  # of another generation: against others


def test_ctrl_c_leaves_what_waits_at_a_rung_for_resume(tmp_path):
    expected = whole(tmp_path / "whole", FakeEvaluator(evaluate=learning), overrides=HALVED[0])
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(folder, FakeEvaluator(3, evaluate=learning), None, HALVED[0])
    run.view = run.search._view = Spy(None, lambda: run.stop.set(), 4)
    assert run() is Ending.INTERRUPTED
    assert [trial.state for trial in run.trials] == [TrialState.RUNNING] * 7
    again = Run(folder, FakeEvaluator(evaluate=learning), overrides=HALVED[0])
    assert again() is Ending.COMPLETE
    assert again.history == expected.history
    assert not set(again.view.paused_at) & set(run.view.paused_at)


def test_a_fit_that_reaches_a_rung_between_failures_is_a_success(tmp_path):
    def evaluate(fit):
        return learning(fit) if int(fit.folder.name) % 2 else fails(fit)

    overrides = [*HALVED[0], "ga.pop=12", "budget.trials=12"]
    run = Run(tmp_path, FakeEvaluator(evaluate=evaluate), overrides=overrides)
    assert run() is Ending.COMPLETE
    assert [row["state"] for row in rows(run.history)].count("FAIL") >= 6


def test_budget_trials_that_ends_with_a_generation_cuts_or_extends_a_halved_search(tmp_path):
    expected = whole(tmp_path / "whole", FakeEvaluator(evaluate=learning), overrides=HALVED[0])
    for n in (7, 12, 17):
        folder, cut = tmp_path / str(n), [*HALVED[0], f"budget.trials={n}"]
        run = whole(folder, FakeEvaluator(2, evaluate=learning), overrides=cut)
        assert rows(run.history) == rows(expected.history)[:n]
        again = Run(folder, FakeEvaluator(evaluate=learning), overrides=HALVED[0])
        assert again() is Ending.COMPLETE
        assert again.history == expected.history


def test_a_smaller_budget_on_resume_halves_among_the_trials_that_it_leaves(tmp_path):
    run = Run(tmp_path, FakeEvaluator(evaluate=learning), None, HALVED[0])
    run.view = run.search._view = Spy(None, kill, 7)
    with pytest.raises(Killed):
        run()
    smaller = [*HALVED[0], "budget.trials=2"]
    again = Run(tmp_path, FakeEvaluator(evaluate=learning), overrides=smaller)
    assert again() is Ending.COMPLETE
    assert sorted(row["state"] for row in rows(again.history)) == ["COMPLETE", "PRUNED"]


def test_a_divergence_whose_telling_was_cut_off_does_not_wait_at_a_rung(tmp_path):
    def evaluate(fit):
        diverged = Outcome(error="diverged: ...", diverged=True, epochs=1)
        return diverged if fit.genes["included_layers"] % 2 else learning(fit)

    expected = whole(tmp_path / "whole", FakeEvaluator(evaluate=evaluate), overrides=HALVED[0])
    lines = (tmp_path / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    cuts = [i for i, line in enumerate(lines, 1) if b"diverged: ..." in line]
    assert cuts
    for cut in cuts:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:cut]))
        again = Run(folder, FakeEvaluator(evaluate=evaluate), overrides=HALVED[0])
        assert again() is Ending.COMPLETE
        assert again.history == expected.history


# The time left.


class ClockedEvaluator(FakeEvaluator):
    """Fits that end when a clock says so, which moves on by at most 20 seconds a look."""

    def __init__(self, n_workers, seconds_of_an_epoch):
        super().__init__(n_workers)
        self.now = 0.0
        self._seconds = seconds_of_an_epoch
        self._since: dict[int, float] = {}
        self._reached: dict[int, int] = {}

    def submit(self, key, fit):
        super().submit(key, fit)
        self._since[key] = self.now

    def epochs_done(self, key):
        seconds = self._seconds(self.running[key].genes)
        return self._reached.get(key, 0) + (self.now - self._since[key]) / seconds

    def wait(self, timeout):
        def end(key):
            epochs = self.running[key].epochs - self._reached.get(key, 0)
            return self._since[key] + epochs * self._seconds(self.running[key].genes)

        key = min(self.running, key=end)
        if end(key) > self.now + 20:
            self.now += 20
            return []
        self.now = end(key)
        fit = self.running.pop(key)
        self._reached[key] = fit.epochs
        return [(key, replace(learning(fit), duration_s=self.now - self._since[key]))]


@pytest.mark.parametrize(
    ("workers", "more"),
    [(3, HALVING), (1, ()), (3, ("search=random",))],
    ids=["halved", "whole", "without generations"],
)
def test_the_time_left_is_about_what_it_then_took(tmp_path, monkeypatch, workers, more):
    evaluator = ClockedEvaluator(
        workers, lambda genes: 1 + (genes["included_layers"] - genes["frozen_layers"]) / 4
    )
    monkeypatch.setattr("gatl.search._FORECAST", 0.0)
    monkeypatch.setattr("gatl.search.time.monotonic", lambda: evaluator.now)
    overrides = ("ga.pop=12", "ga.n_elites=4", "trainer.max_epochs=9", *more)
    run = Run(tmp_path, evaluator, overrides=overrides)
    assert run() is Ending.COMPLETE
    known = [(now, left) for now, left in run.view.forecasts if left is not None]
    assert known[0][0] < 9 * 8  # no whole fit has ended by then
    assert known[-1][1] == 0
    assert max(abs(now + left - evaluator.now) for now, left in known) < 0.3 * evaluator.now


def test_the_time_left_is_at_most_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("gatl.search._FORECAST", 0.0)
    run = whole(tmp_path / "run", overrides=("budget.time=15s",))
    told = [left for _, left in run.view.forecasts if left is not None]
    assert 10 < max(told) <= 15  # 18 fits of a second
