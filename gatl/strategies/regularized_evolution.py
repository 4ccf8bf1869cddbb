"""Regularized evolution, also called aging evolution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.ranking import rank_key
from gatl.strategies.base import MAX_STEP, Strategy, require_whole, require_within
from gatl.strategies.operators.neighbour import neighbour
from gatl.streams import Purpose, generator

_RETRIES = 20
"""How often a child that lives already is drawn again."""


@dataclass(frozen=True)
class _Lived:
    """What some trials leave behind.

    Attributes:
        record: Those trials.
        trials: The youngest of them that did not fail, the oldest first.
        chromosomes: Theirs.
    """

    record: list[FrozenTrial]
    trials: list[FrozenTrial]
    chromosomes: list[Chromosome]


_START = _Lived([], [], [])


class RegularizedEvolution(Strategy):
    """Regularized evolution (Real et al. 2019, Algorithm 1; the search behind AmoebaNet).

    The population is the youngest ``population_size`` trials, whatever they are worth:
    each new one lets the oldest die. Of ``sample_size`` drawn from it, with replacement,
    the best is the parent, and its child differs by a small mutation. At first the
    population is filled with the initial chromosomes and random ones. A trial that
    failed never lives; one that was stopped early lives, ranked behind the others.

    It is asynchronous: a trial looks at those that are more than ``lag`` older, so that
    ``lag + 1`` fits can run at once and the search is still a function of its record.

    Departures from the paper: genes are numbers, so a mutation moves one or a few of them
    to a neighbouring value in place of drawing one anew; and a child that equals a living
    chromosome is drawn again, a few times at most.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that are tried first.
        population_size: P, in [1, inf); more if the initial chromosomes are more.
        sample_size: S, in [1, inf); the more, the harder the selection.
        step: How far a mutation goes, as a share of each gene's range, in (0, 1000].
        lag: In [0, inf).
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        seed: int,
        initial: Sequence[Mapping[str, Value]] = (),
        population_size: int,
        sample_size: int,
        step: float,
        lag: int,
    ) -> None:
        require_whole("population_size", population_size, 1)
        require_whole("sample_size", sample_size, 1)
        require_whole("lag", lag, 0)
        require_within("step", step, 0, MAX_STEP, ends="(]")
        super().__init__(space=space, seed=seed, initial=initial)
        self.population_size = max(population_size, len(self.initial))
        self.sample_size = sample_size
        self.step = step
        self.lag = lag
        self._memo = _START  # the last population: it only saves going through the record again

    def horizon(self, number: int) -> int:
        """Return where the trials end that this one looks at."""
        return 0 if number < self.population_size else max(0, number - self.lag)

    def propose(
        self,
        number: int,
        record: Sequence[FrozenTrial],
        pending: Sequence[Chromosome] = (),
    ) -> Chromosome:
        """Return the chromosome of a trial, see `Strategy.propose`."""
        if number < self.population_size:
            return self.opening(number)
        population = self._population(list(record))
        if not population.trials:
            return self.opening(number)
        rng = generator(self.seed, Purpose.OFFSPRING, number)
        sample = rng.integers(len(population.trials), size=self.sample_size)
        parent = min((population.trials[-1 - i] for i in sample), key=rank_key)
        alive = {*population.chromosomes, *pending}
        for _ in range(_RETRIES):
            child = neighbour(self.space.from_dict(parent.params), self.space, self.step, rng)
            if child not in alive:
                break
        return child

    def _population(self, record: list[FrozenTrial]) -> _Lived:
        """Return the youngest trials of a record; what a shorter one left is used again."""
        before = self._memo
        if before.record != record[: len(before.record)]:  # by identity, so fast
            before = _START
        new = [t for t in record[len(before.record) :] if t.state is not TrialState.FAIL]
        chromosomes = [self.space.from_dict(trial.params) for trial in new]
        self._memo = _Lived(
            record,
            [*before.trials, *new][-self.population_size :],
            [*before.chromosomes, *chromosomes][-self.population_size :],
        )
        return self._memo
