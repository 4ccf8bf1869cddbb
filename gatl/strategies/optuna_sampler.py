"""Optuna's samplers as strategies: the baselines."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.errors import UserError
from gatl.ranking import rank_key
from gatl.strategies.base import Strategy, require_whole
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
    the sampler is asked for all trials once more, in order, and told what came of them
    (at 1,000 trials a few seconds; for a Gaussian process as long as the first time).
    So nothing that a sampler remembers (CMA-ES keeps a pickle) goes into the record. It
    sees chromosomes as they were evaluated, that is, repaired.

    Trials up to ``lag`` older are RUNNING to it, whether or not they are, so that
    ``lag + 1`` fits can run at once and the search does not depend on how many do.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that are tried first.
        sampler: Builds the sampler, given ``seed``.
        lag: In [0, inf).

    Raises:
        ValueError: If a setting is out of range, or the sampler cannot ask.
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
        require_whole("lag", lag, 0)
        if not callable(sampler):
            raise ValueError(
                f"sampler must have a _target_ and _partial_: true, but got {sampler!r}"
            )
        if "seed" in getattr(sampler, "keywords", {}):
            raise ValueError("sampler.seed cannot be set: give seed=NUMBER, the run's")
        super().__init__(space=space, seed=seed, initial=initial)
        self.sampler = sampler
        self.lag = lag
        self._rehearse()
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
            try:
                chromosome = self._ask(replay, recorded.get(ahead))
            except Exception as error:  # a sampler may raise anything
                raise UserError(
                    f"search.sampler cannot say what trial {ahead} is: "
                    f"{type(error).__name__} {error}"
                ) from error
        self._replay = replay
        return chromosome

    def _rehearse(self) -> None:
        """Let a sampler ask for a few trials, so that most of what is wrong is known at once."""
        replay = self._new()
        try:
            for _ in range(3):
                self._ask(replay, None)
                replay.study.tell(len(replay.asked) - 1, 1.0 / len(replay.asked))
        except Exception as error:  # a sampler may raise anything
            raise ValueError(f"sampler cannot work: {type(error).__name__} {error}") from error

    def _new(self) -> _Replay:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # not that a study was created
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
        distributions = self.distributions()
        replay.study.sampler = self._build(len(replay.asked))
        trial = replay.study.ask(fixed_distributions=distributions)
        chromosome = self.space.from_dict(trial.params) if recorded is None else recorded
        for name, value in self.space.to_dict(chromosome).items():
            if trial.params[name] != value:  # repaired, or asked for by another version of Optuna
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
