"""The driver of a search: ask, evaluate, tell, until the budget is spent."""

import math
import shutil
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from multiprocessing.synchronize import Event
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Chromosome, Value
from gatl.config import Config
from gatl.cost import Cost, expected_costs, generation_seconds
from gatl.errors import UserError
from gatl.evaluation import RUNG, Evaluator, Fit, fit_seed
from gatl.halving import survivors
from gatl.loggers import Curve
from gatl.outcome import Outcome
from gatl.progress import View
from gatl.record import (
    SECONDS,
    FitTime,
    History,
    begin,
    fits_of,
    outcome_of,
    reach,
    resume_command,
    seconds_of,
    tell,
)
from gatl.strategies.base import Strategy
from gatl.streams import Purpose
from gatl.trust import word_for

MAX_FAILURES = 5
"""Failures in a row, by number, of one kind, that stop a search; divergence is none of them.

By number, because the largest networks start first and are the first to find no memory.
"""

_LATEST = 200
"""Fits that tell what others cost; more would tell no more."""

_LIKE = 16
"""Latest trials, at least, that those to come are held to be like, in what they cost."""

_TICK = 0.2
"""Seconds after which the driver looks whether it is to stop."""


_FORECAST = 0.5
"""Seconds between two estimates of the time left."""

_TELLING = 0.25
"""Epochs from which on a running fit tells what one costs, as long as none has ended."""


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
        curve: Logs how the search goes.
        refresh: Called again and again, while fits run, for what else is to be kept
            up to date.
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
        curve: Curve | None = None,
        refresh: Callable[[], object] = lambda: None,
    ) -> None:
        self._config, self._study, self._strategy = config, study, strategy
        self._evaluator, self._folder, self._view = evaluator, folder, view
        self._stop, self._cut, self._curve, self._refresh = stop, cut, curve, refresh
        self._space = config.space
        self._distributions = strategy.distributions()
        self._history = History(folder, config.space.names)
        self._trials: list[FrozenTrial] = []  # the record, by number: nobody else writes it
        self._asked: list[Chromosome] = []  # of the trials, as far as anybody has asked for more
        self._queue: deque[int] = deque()  # asked for, not yet evaluated
        self._chromosomes: dict[int, Chromosome] = {}  # of the trials that have not ended
        self._begun: dict[Chromosome, int] = {}  # being evaluated, at a rung perhaps
        self._running: dict[int, float] = {}  # and since when, as `time.monotonic` has it
        self._reached: dict[int, Outcome] = {}  # the last rung of trials that have not ended
        self._known: dict[Chromosome, int] = {}  # evaluated: the first trial with that result
        self._pruned: dict[tuple[Chromosome, int | None], int] = {}  # the same, by generation
        self._costs: deque[Cost] = deque(maxlen=_LATEST)  # of the fits that ended last
        self._n_ended, self._n_fitted = 0, 0  # trials; the others had another's result
        self._forecast_at = -math.inf  # when the last estimate was made
        self._n_leading = 0  # trials 0 ... n - 1 have all ended
        self._any_complete = False  # in this session: the first fit always finishes
        self._failures: list[str] = []  # kinds, in a row, of the last of the leading trials
        self._stuck: int | None = None  # the trial whose failure was one too many

    def run(self) -> Ending:
        """Search until the budget is spent, or the user stops it.

        Returns:
            Why it ended.

        Raises:
            UserError: If no fit can work, or too many in a row failed.
        """
        self._since = time.monotonic() - seconds_of(self._study)
        self._deadline = deadline = time.monotonic() + self._config.budget.seconds
        self._take_up()
        while True:
            interrupted = self._stop.is_set()
            late = time.monotonic() >= deadline and self._any_complete
            if interrupted or late:
                self._cut.set()
            else:
                self._ask()
                self._halve()
                self._start()
            lost = self._queue and not self._evaluator.n_free  # all workers; others may start
            if self._running or (lost and not (interrupted or late)):
                self._refresh()  # now that all workers are busy
                for number, outcome in self._evaluator.wait(_TICK):
                    self._end(number, outcome)
                self._forecast()
                self._view.tick()
            elif interrupted or late or not (self._chromosomes or self._askable):
                break  # otherwise all were known already, or wait at a rung
        self._study.set_user_attr(SECONDS, self.seconds)
        if interrupted:
            return Ending.INTERRUPTED
        self._cut.clear()  # the final model's fits follow
        return Ending.COMPLETE if self._n_leading >= self._config.n_trials else Ending.TIME

    @property
    def seconds(self) -> float:
        """Seconds that the search has taken, those of earlier sessions included."""
        return time.monotonic() - self._since

    def _take_up(self) -> None:
        """Go on from the record: known results, and trials that were cut off."""
        self._trials = self._study.get_trials(deepcopy=False)
        for trial in self._trials:
            if trial.state.is_finished():
                self._learn(trial)
                self._time(trial.params, outcome_of(trial))
            elif trial.number < self._config.n_trials:  # the budget may have shrunk
                self._enqueue(self._whole(trial))
        self._longest_first()
        self._publish()
        self._failures, self._stuck = [], None  # what was wrong may be mended
        self._view.resumed(self._trials)

    def _whole(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial with all of its genes; if asking was cut off, ask for the rest."""
        if len(trial.params) < len(self._space.names):
            again = optuna.Trial(self._study, trial._trial_id)
            for name, distribution in self._distributions.items():
                again._suggest(name, distribution)
            trial = self._trials[trial.number] = self._study._storage.get_trial(trial._trial_id)
        return trial

    def _ask(self) -> None:
        """Ask for every trial whose horizon has been reached, a generation as a whole."""
        if not self._askable:
            return
        while self._askable:
            number = len(self._trials)
            horizon = self._strategy.horizon(number)
            new = self._trials[len(self._asked) :]
            self._asked += [self._space.from_dict(trial.params) for trial in new]
            record, pending = self._trials[:horizon], self._asked[horizon:]
            genes = self._space.to_dict(self._strategy.propose(number, record, pending))
            trial = begin(self._study, genes, self._distributions)
            if trial.number != number:  # in a database, which a copy of the folder leads to as well
                raise UserError(
                    f"The study {self._study.study_name!r} has a trial {trial.number} where "
                    f"{number} should come next: it has lost trials, or got others from elsewhere, "
                    "such as a copy of the run folder. Begin a new run."
                )
            self._trials.append(trial)
            self._enqueue(trial)
        self._longest_first()

    def _enqueue(self, trial: FrozenTrial) -> None:
        """Put a trial in the queue, or where it waited."""
        chromosome = self._space.from_dict(trial.params)
        self._chromosomes[trial.number] = chromosome
        outcome = outcome_of(trial)  # with an error: it was killed while that was told
        if outcome.error is None and outcome.epochs in self._config.rungs:
            self._begun[chromosome] = trial.number
            self._reached[trial.number] = outcome
        else:
            self._queue.append(trial.number)

    def _halve(self) -> None:
        """Let the best go on from a rung, once every fit of the generation has come there.

        The unfinished trials are of one generation, since the next waits for its end.
        """
        if self._running:  # towards that rung, or others could not wait at it
            return
        waiting = sorted(self._reached.keys() - set(self._queue))
        if not waiting:
            return
        rung = min(self._reached[number].epochs for number in waiting)
        for number, chromosome in self._chromosomes.items():
            runs = self._begun.get(chromosome, number) == number  # else it gets another's result
            if runs and (number not in self._reached or self._reached[number].epochs < rung):
                return
        assert self._config.pruner is not None
        generation = self._strategy.generation(waiting[0])
        losses = {
            trial.number: trial.intermediate_values[rung]
            for trial in self._trials[self._strategy.horizon(waiting[0]) :]  # before its generation
            if rung in trial.intermediate_values
            and trial.number < self._config.n_trials  # the budget may have shrunk
            and self._strategy.generation(trial.number) == generation
        }
        best = survivors(losses, self._config.pruner.reduction_factor)
        for number in waiting:
            if self._reached[number].epochs > rung:
                continue
            if number in best:
                self._queue.append(number)
            else:
                pruned = replace(self._reached[number], pruned=True)
                self._tell(number, pruned, fits_of(self._trials[number]))
        self._longest_first()

    def _longest_first(self) -> None:
        """Sort the queue by what the fits cost; equal chromosomes stay in order.

        Without generations the lowest numbers go first: others wait for their end.
        """
        if not self._queue or self._strategy.generation(self._queue[0]) is None:
            return
        queue = sorted(self._queue)
        genes = [self._space.to_dict(self._chromosomes[number]) for number in queue]
        cost = dict(zip(queue, expected_costs(genes, self._costs), strict=True))
        self._queue = deque(sorted(queue, key=lambda number: -cost[number]))

    def _start(self) -> None:
        """Give queued trials to free workers; of equal ones the lowest number runs."""
        for number in tuple(self._queue):
            if not self._evaluator.n_free:
                break
            chromosome = self._chromosomes[number]
            if (source := self._source(number, chromosome)) is not None:
                self._queue.remove(number)
                self._reuse(number, source)
            elif self._begun.setdefault(chromosome, number) == number:
                self._queue.remove(number)
                self._running[number] = time.monotonic()
                self._submit(number, self._space.to_dict(chromosome))

    def _submit(self, number: int, genes: Mapping[str, Value]) -> None:
        folder = self._fit_folder(number)
        reached = self._epochs_reached(number)
        if not reached:
            shutil.rmtree(folder, ignore_errors=True)  # of a fit that was cut off
        ends = (*self._config.rungs, self._config.trainer.max_epochs)
        epochs = next(end for end in ends if end > reached)
        seed = fit_seed(self._config.seed, Purpose.FIT, genes)
        fit = Fit(genes, epochs, seed, folder, goes_on=epochs in self._config.rungs)
        self._evaluator.submit(number, fit)
        self._view.started(number, genes)

    def _epochs_reached(self, number: int) -> int:
        return self._reached[number].epochs if number in self._reached else 0

    def _fit_folder(self, number: int) -> Path:
        return self._folder / "trials" / str(number)

    def _reuse(self, number: int, source: int) -> None:
        """Tell a trial the result of an equal chromosome."""
        known = outcome_of(self._trials[source])
        self._tell(number, replace(known, duration_s=0.0, reused_from=source))

    def _end(self, number: int, outcome: Outcome) -> None:
        """Take the outcome of a fit."""
        del self._running[number]
        if outcome.stopped:
            self._queue.appendleft(number)
            return
        fits = fits_of(self._trials[number]) if number in self._reached else []
        began = max(0.0, self.seconds - outcome.duration_s)  # its worker may have had to start
        fits.append((began, outcome.duration_s, self._evaluator.n_workers))
        if number in self._reached:
            spent = self._reached[number].duration_s + outcome.duration_s
            outcome = replace(outcome, duration_s=spent)
        self._time(self._space.to_dict(self._chromosomes[number]), outcome)
        if outcome.error is None and outcome.epochs in self._config.rungs:
            self._trials[number] = reach(self._study, number, outcome, self.seconds, fits)
            self._reached[number] = outcome
            self._view.paused(number, self._space.to_dict(self._chromosomes[number]), outcome)
            return
        self._tell(number, outcome, fits)
        self._any_complete |= outcome.error is None

    def _require_some_success(self) -> None:
        if self._stuck is not None:
            last = self._stuck
            trace = self._fit_folder(last) / "error.txt"
            seen = f" (see {trace})" if trace.is_file() else ""
            raise UserError(
                f"{MAX_FAILURES} trials in a row failed for one reason; the last, {last}: "
                f"{outcome_of(self._trials[last]).error}{seen}. When that is mended, go on with: "
                + resume_command(self._folder, *word_for(self._config))
            )

    def _tell(self, number: int, outcome: Outcome, fits: Sequence[FitTime] = ()) -> None:
        trial = self._trials[number] = tell(self._study, number, outcome, self.seconds, fits)
        self._begun.pop(self._chromosomes.pop(number), None)
        self._reached.pop(number, None)
        self._learn(trial)
        self._publish()
        self._forecast()
        self._view.ended(trial)
        self._require_some_success()

    def _learn(self, trial: FrozenTrial) -> None:
        """Remember a result that counts for equal chromosomes; its fit will not go on."""
        if self._config.rungs:
            (self._fit_folder(trial.number) / RUNG).unlink(missing_ok=True)
        self._n_ended += 1
        self._n_fitted += outcome_of(trial).reused_from is None
        chromosome = self._space.from_dict(trial.params)
        if trial.state is TrialState.COMPLETE or outcome_of(trial).diverged:
            self._known.setdefault(chromosome, trial.number)
        elif trial.state is TrialState.PRUNED:
            generation = self._strategy.generation(trial.number)
            self._pruned.setdefault((chromosome, generation), trial.number)

    def _time(self, genes: Mapping[str, Value], outcome: Outcome) -> None:
        """Remember what a fit took."""
        if outcome.epochs and outcome.reused_from is None:
            self._costs.append(Cost(genes, outcome.duration_s / outcome.epochs))

    def _forecast(self) -> None:
        """Tell the view, now and then, how far the running fits are and how long the rest takes."""
        if time.monotonic() - self._forecast_at < _FORECAST:
            return
        self._forecast_at = time.monotonic()
        done = {
            number: max(self._evaluator.epochs_done(number), self._epochs_reached(number))
            for number in self._running
        }
        self._view.forecast(self._seconds_left(done), done)

    def _seconds_left(self, done: Mapping[int, float]) -> float | None:
        """Estimate what the search still takes.

        Args:
            done: Epochs that the running fits have done, by number.

        Returns:
            Seconds; None as long as no fit tells what an epoch costs.
        """
        now = time.monotonic()
        known = list(self._costs) or [
            Cost(self._trials[number].params, (now - self._running[number]) / epochs)
            for number, reached in done.items()
            if (epochs := reached - self._epochs_reached(number)) >= _TELLING
        ]
        if not known:
            return None
        last, n_trials = len(self._trials) - 1, self._config.n_trials
        n_workers, size = self._evaluator.n_workers, last + 1 - self._strategy.horizon(last)
        if self._strategy.generation(last) is None:  # no more run at once than know of no other
            at_once = n_trials - self._strategy.horizon(n_trials) + 1
            n_workers = size = min(n_workers, at_once)
        ends = (*self._config.rungs, self._config.trainer.max_epochs)
        factor = self._config.pruner.reduction_factor if self._config.pruner else 1
        fits = [
            number
            for number, chromosome in self._chromosomes.items()
            if self._begun.get(chromosome, number) == number  # else it gets another's result
        ]
        latest = self._trials[-max(size, _LIKE) :]
        genes = [trial.params for trial in (*(self._trials[number] for number in fits), *latest)]
        costs = expected_costs(genes, known)
        costs, of_latest = costs[: len(fits)], costs[len(fits) :]
        reached = [done.get(number, self._epochs_reached(number)) for number in fits]
        seconds = generation_seconds(
            list(zip(reached, costs, strict=True)), ends, factor, n_workers
        )
        # The others are like the latest; some of them have been fitted before.
        n_fits = round(size * self._n_fitted / self._n_ended) if self._n_ended else size
        alike = [(0.0, statistics.fmean(of_latest))] * n_fits
        each = generation_seconds(alike, ends, factor, n_workers)
        seconds += max(n_trials - len(self._trials), 0) / size * each
        return min(seconds, self._deadline - now)

    def _source(self, number: int, chromosome: Chromosome) -> int | None:
        """Return the trial whose result is a trial's, if there is one.

        A pruned one is it in its own generation alone: against others it may go further.
        """
        in_generation = (chromosome, self._strategy.generation(number))
        return self._known.get(chromosome, self._pruned.get(in_generation))

    def _publish(self) -> None:
        trials = self._trials
        while self._n_leading < len(trials) and trials[self._n_leading].state.is_finished():
            self._count_failure(self._n_leading)
            self._n_leading += 1
        self._history.update(trials, self._strategy.generation)
        if self._curve is not None:
            self._curve.update(trials)

    def _count_failure(self, number: int) -> None:
        """Count failures in a row; one of another kind begins anew, and a fit that ends clears."""
        outcome = outcome_of(self._trials[number])
        if outcome.error is None:
            self._failures.clear()
        elif not outcome.diverged:
            kind = outcome.error.partition(":")[0]  # the exception; what follows are particulars
            self._failures = [*(k for k in self._failures if k == kind), kind]
            if len(self._failures) >= MAX_FAILURES and self._stuck is None:
                self._stuck = number

    @property
    def _askable(self) -> bool:
        """Whether the trials that the next one depends on have ended."""
        number = len(self._trials)
        return number < self._config.n_trials and self._strategy.horizon(number) <= self._n_leading
