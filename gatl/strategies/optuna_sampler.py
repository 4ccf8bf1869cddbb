"""Optuna's samplers as strategies: the baselines."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.ranking import rank_key
from gatl.strategies.base import Strategy
from gatl.streams import Purpose, generator


@dataclass
class _Replay:
    """A study in memory in which the sampler has asked for trials 0 ... n - 1.

    Attributes:
        study: That study. What the sampler leaves in it for itself stays in memory.
        record: The trials, of the run's study, whose results it has.
        asked: The chromosomes of all its trials, as the run's study has them.
    """

    study: optuna.Study
    record: list[FrozenTrial] = field(default_factory=list)
    asked: list[Chromosome] = field(default_factory=list)


class OptunaSampler(Strategy):
    """A sampler of Optuna's, made a function of the record.

    The sampler works on a study of its own, in memory, and a new one with a seed of its
    own is built for each trial. Where that study is missing, on resume, it is made anew:
    the sampler is asked for all trials once more, in order, and told what came of them.
    So nothing that a sampler remembers (CMA-ES keeps a pickle) goes into the record.

    Trials up to ``lag`` older are RUNNING to it, whether or not they are, so that
    ``lag + 1`` fits can run at once and the search does not depend on how many do.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that are tried first.
        sampler: Builds the sampler, given ``seed``.
        lag: In [0, inf).
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        seed: int,
        initial: Sequence[Mapping[str, Value]] = (),
        sampler: Callable[..., BaseSampler],
        lag: int,
    ) -> None:
        if not (isinstance(lag, int) and lag >= 0):
            raise ValueError(f"`lag >= 0` must hold, a whole number, but got {lag!r}.")
        super().__init__(space=space, seed=seed, initial=initial)
        self.sampler = sampler
        self.lag = lag
        self._build(0)  # what is wrong with its settings is known at once
        self._replay = self._new()

    def horizon(self, number: int) -> int:
        """Return where the trials end whose results the sampler may know."""
        return max(0, number - self.lag)

    def propose(
        self,
        number: int,
        record: Sequence[FrozenTrial],
        pending: Sequence[Chromosome] = (),
    ) -> Chromosome:
        """Return the chromosome of a trial, see `Strategy.propose`."""
        replay = self._replay
        told = len(replay.record)
        later = [*(self.space.from_dict(trial.params) for trial in record[told:]), *pending]
        same = replay.record == list(record[:told])  # by identity, so fast
        if not (same and replay.asked[told:] == later[: len(replay.asked) - told]):
            replay, told = self._new(), 0
            later = [*(self.space.from_dict(trial.params) for trial in record), *pending]
        recorded = dict(enumerate(later, start=told))
        for ahead in range(len(replay.asked), number + 1):
            for trial in record[len(replay.record) : self.horizon(ahead)]:
                self._tell(replay, trial)
            chromosome = self._ask(replay, recorded.get(ahead))
        self._replay = replay
        return chromosome

    def _new(self) -> _Replay:
        replay = _Replay(optuna.create_study(sampler=self._build(0)))
        for genes in self.initial:
            clipped = {g.name: g.clip(genes[g.name]) for g in self.space.genes if g.name in genes}
            replay.study.enqueue_trial(clipped)
        return replay

    def _build(self, number: int) -> BaseSampler:
        with warnings.catch_warnings():
            # That a sampler is experimental, or draws some genes by itself, is no news.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            seed = int(generator(self.seed, Purpose.SAMPLER, number).integers(2**32))
            return self.sampler(seed=seed)

    def _ask(self, replay: _Replay, recorded: Chromosome | None) -> Chromosome:
        """Ask for the next trial; if it has been, it is what the record says."""
        number = len(replay.asked)
        distributions = self.distributions()
        replay.study.sampler = self._build(number)
        trial = replay.study.ask(fixed_distributions=distributions)
        proposed = self.space.from_dict(trial.params)
        chromosome = proposed if recorded is None else recorded
        if chromosome != proposed:  # another version of Optuna, perhaps, asked for it
            for name, value in self.space.to_dict(chromosome).items():
                internal = distributions[name].to_internal_repr(value)
                replay.study._storage.set_trial_param(
                    trial._trial_id, name, internal, distributions[name]
                )
        replay.asked.append(chromosome)
        return chromosome

    def _tell(self, replay: _Replay, trial: FrozenTrial) -> None:
        """Tell what came of a trial; what was stopped early, as what its epochs are worth."""
        number = len(replay.record)
        if trial.state is TrialState.COMPLETE:
            replay.study.tell(number, trial.values)
        elif trial.state is TrialState.PRUNED:
            _, epochs, loss, _ = rank_key(trial)
            if math.isfinite(loss):
                replay.study._storage.set_trial_intermediate_value(
                    replay.study._storage.get_trial_id_from_study_id_trial_number(
                        replay.study._study_id, number
                    ),
                    -epochs,
                    loss,
                )
            replay.study.tell(number, state=TrialState.PRUNED)
        else:
            replay.study.tell(number, state=TrialState.FAIL)
        replay.record.append(trial)
