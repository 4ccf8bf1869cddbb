"""The driver of a search: ask, evaluate, tell, until the budget is spent."""

import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from multiprocessing.synchronize import Event
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Chromosome, Value
from gatl.config import Config
from gatl.errors import UserError
from gatl.evaluation import Evaluator, Fit, fit_seed
from gatl.outcome import Outcome
from gatl.progress import View
from gatl.record import SECONDS, History, outcome_of, resume_command, tell
from gatl.strategies.base import Strategy
from gatl.streams import Purpose

MAX_FAILURES = 5
"""Failures in a row that stop a search; divergence is a result, no such failure."""

_TICK = 0.2
"""Seconds after which the driver looks whether it is to stop."""


class Ending(Enum):
    """Why a search ended."""

    COMPLETE = "all trials are done"
    TIME = "the time budget is spent"
    INTERRUPTED = "it was interrupted"


class Search:
    """One search over one study; it goes on from whatever the study holds.

    Args:
        config: The run's configuration.
        study: The record, whose sampler is ``strategy``.
        strategy: Says what each trial is.
        evaluator: Runs the fits.
        folder: The run folder.
        view: What the user sees.
        stop: Set by Ctrl-C.
        cut: The driver sets it to make running fits end, when it is to stop or
            the time budget is spent. Their trials stay RUNNING, to be finished
            on resume.
    """

    def __init__(
        self,
        config: Config,
        study: optuna.Study,
        strategy: Strategy,
        evaluator: Evaluator,
        folder: Path,
        view: View,
        stop: threading.Event,
        cut: Event,
    ) -> None:
        self._config, self._study, self._strategy = config, study, strategy
        self._evaluator, self._folder, self._view = evaluator, folder, view
        self._stop, self._cut = stop, cut
        self._space = config.space
        self._history = History(folder, config.space.names)
        self._queue: deque[int] = deque()  # asked for, not yet evaluated
        self._chromosomes: dict[int, Chromosome] = {}  # of the trials that have not ended
        self._running: dict[Chromosome, int] = {}
        self._known: dict[Chromosome, int] = {}  # evaluated: the first trial with that result
        self._n_leading = 0  # trials 0 ... n - 1 have all ended
        self._any_complete = False  # in this session: the first fit always finishes
        self._failures = 0

    def run(self) -> Ending:
        """Search until the budget is spent, or the user stops it.

        Returns:
            Why it ended.

        Raises:
            UserError: If no fit can work, or too many in a row failed.
        """
        self._since = time.monotonic() - float(self._study.user_attrs.get(SECONDS, 0.0))
        deadline = time.monotonic() + self._config.budget.seconds
        self._take_up()
        while True:
            interrupted = self._stop.is_set()
            late = time.monotonic() >= deadline and self._any_complete
            if interrupted or late:
                self._cut.set()
            else:
                self._ask()
                self._start()
            if self._running:
                for number, outcome in self._evaluator.wait(_TICK):
                    self._end(number, outcome)
                self._view.tick()
            elif interrupted or late or not (self._queue or self._askable):
                break  # otherwise all were known already
        self._study.set_user_attr(SECONDS, self.seconds)
        if interrupted:
            return Ending.INTERRUPTED
        self._cut.clear()  # the final model's fits follow
        return Ending.COMPLETE if self._n_leading >= self._config.n_trials else Ending.TIME

    @property
    def seconds(self) -> float:
        """Seconds that the search has taken, those of earlier sessions included."""
        return time.monotonic() - self._since

    @property
    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _take_up(self) -> None:
        """Go on from the record: known results, and trials that were cut off."""
        trials = self._trials
        for trial in trials:
            if trial.state.is_finished():
                self._learn(trial)
            elif trial.number < self._config.n_trials:  # the budget may have shrunk
                self._enqueue(trial)
        self._publish(trials)
        self._view.resumed(trials)

    def _ask(self) -> None:
        """Ask for every trial whose horizon has been reached, a generation as a whole."""
        while self._askable:
            asked = self._study.ask(self._strategy.distributions())
            self._enqueue(self._trials[asked.number])

    def _enqueue(self, trial: FrozenTrial) -> None:
        """Put a trial in the queue; if asking for it was cut off, ask for the rest."""
        if len(trial.params) < len(self._space.names):
            again = optuna.Trial(self._study, trial._trial_id)
            for name, distribution in self._strategy.distributions().items():
                again._suggest(name, distribution)
            trial = self._trials[trial.number]
        self._chromosomes[trial.number] = self._space.from_dict(trial.params)
        self._queue.append(trial.number)

    def _start(self) -> None:
        """Give queued trials to free workers; of equal ones the lowest number runs."""
        for number in tuple(self._queue):
            if not self._evaluator.n_free:
                break
            chromosome = self._chromosomes[number]
            if chromosome in self._known:
                self._queue.remove(number)
                self._reuse(number, self._known[chromosome])
            elif chromosome not in self._running:
                self._queue.remove(number)
                self._running[chromosome] = number
                self._submit(number, self._space.to_dict(chromosome))

    def _submit(self, number: int, genes: Mapping[str, Value]) -> None:
        folder = self._folder / "trials" / str(number)
        shutil.rmtree(folder, ignore_errors=True)  # of a fit that was cut off
        seed = fit_seed(self._config.seed, Purpose.FIT, genes)
        self._evaluator.submit(number, Fit(genes, self._config.trainer.max_epochs, seed, folder))
        self._view.started(number, genes)

    def _reuse(self, number: int, source: int) -> None:
        """Tell a trial the result of an equal chromosome."""
        known = outcome_of(self._trials[source])
        self._tell(number, replace(known, duration_s=0.0, reused_from=source))

    def _end(self, number: int, outcome: Outcome) -> None:
        """Take the outcome of a fit."""
        del self._running[self._chromosomes[number]]
        if outcome.stopped:
            self._queue.appendleft(number)
            return
        self._tell(number, outcome)
        self._any_complete |= outcome.error is None
        if self._failures >= MAX_FAILURES:
            raise UserError(
                f"{MAX_FAILURES} trials in a row failed; the last, {number}: {outcome.error} "
                f"(see {self._folder / 'trials' / str(number) / 'error.txt'}). When that is "
                f"mended, go on with: {resume_command(self._folder)}"
            )

    def _tell(self, number: int, outcome: Outcome) -> None:
        tell(self._study, number, outcome)
        self._study.set_user_attr(SECONDS, self.seconds)  # now, for a run that is killed
        if not outcome.diverged:
            self._failures = 0 if outcome.error is None else self._failures + 1
        del self._chromosomes[number]
        trials = self._trials
        self._learn(trials[number])
        self._publish(trials)
        self._view.ended(trials[number])

    def _learn(self, trial: FrozenTrial) -> None:
        """Remember a result that counts for every equal chromosome."""
        if trial.state is TrialState.COMPLETE or outcome_of(trial).diverged:
            self._known.setdefault(self._space.from_dict(trial.params), trial.number)

    def _publish(self, trials: list[FrozenTrial]) -> None:
        while self._n_leading < len(trials) and trials[self._n_leading].state.is_finished():
            self._n_leading += 1
        self._history.update(trials, self._strategy.generation)

    @property
    def _askable(self) -> bool:
        """Whether the trials that the next one depends on have ended."""
        number = len(self._trials)
        return number < self._config.n_trials and self._strategy.horizon(number) <= self._n_leading
