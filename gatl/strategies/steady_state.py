"""The genetic algorithm without generations."""

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.ranking import RankKey, rank_key
from gatl.strategies.base import Strategy, require_whole
from gatl.strategies.operators.breeding import Breeding, breed
from gatl.streams import Purpose, generator


@dataclass(frozen=True)
class _Lineage:
    """What some trials leave behind.

    Attributes:
        record: Those trials.
        population: The best distinct chromosomes, best first, each behind its best trial's rank.
        known: Every chromosome among them.
    """

    record: list[FrozenTrial]
    population: list[tuple[RankKey, Chromosome]]
    known: frozenset[Chromosome]


_START = _Lineage([], [], frozenset())


class SteadyState(Strategy):
    """A steady-state genetic algorithm (Whitley 1989, GENITOR; Syswerda 1991).

    After ``pop`` trials, the initial chromosomes and random ones, two parents at a time
    have two children, see `breed`. The population is the ``pop`` best distinct
    chromosomes: a child takes the place of the worst, if it is better.

    It is asynchronous: a pair looks at the trials that are more than ``lag`` older, so
    that ``lag + 1`` fits can run at once and the search is still a function of its record.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that it begins with.
        pop: Population size, in [2, inf).
        tournament_size: See `Breeding`, as the others of these.
        crossover_prob: See there.
        mutation_prob: See there.
        mutation_step: See there.
        duplicate_retries: See there.
        lag: In [0, inf).
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        seed: int,
        initial: Sequence[Mapping[str, Value]] = (),
        pop: int,
        tournament_size: int,
        crossover_prob: float,
        mutation_prob: float,
        mutation_step: float | None,
        duplicate_retries: int,
        lag: int,
    ) -> None:
        require_whole("pop", pop, 2)
        require_whole("lag", lag, 0)
        super().__init__(space=space, seed=seed, initial=initial)
        self.pop = pop
        self.lag = lag
        self.breeding = Breeding(
            tournament_size, crossover_prob, mutation_prob, mutation_step, duplicate_retries
        )
        self._memo = _START  # the last lineage: it only saves going through the record again

    def _first(self, number: int) -> int:
        """Return the number of the first child of a trial's pair."""
        return number - (number - self.pop) % 2

    def horizon(self, number: int) -> int:
        """Return where the trials end that a trial's pair looks at."""
        return 0 if number < self.pop else max(0, self._first(number) - self.lag)

    def propose(
        self,
        number: int,
        record: Sequence[FrozenTrial],
        pending: Sequence[Chromosome] = (),
    ) -> Chromosome:
        """Return the chromosome of a trial, see `Strategy.propose`."""
        if number < self.pop:
            return self.opening(number)
        lineage = self._lineage(list(record))
        if not lineage.population:
            return self.opening(number)
        first = self._first(number)
        known = set(lineage.known).union(pending[: first - len(record)])
        rng = generator(self.seed, Purpose.OFFSPRING, first)
        children: list[Chromosome] = []
        parents = [chromosome for _, chromosome in lineage.population]
        for child in breed(parents, known, self.space, self.breeding, rng):
            known.add(child)
            children.append(child)
        return children[number - first]

    def _lineage(self, record: list[FrozenTrial]) -> _Lineage:
        """Return what the record leaves behind; what a shorter one left is used again."""
        before = self._memo
        if before.record != record[: len(before.record)]:  # by identity, so fast
            before = _START
        population = list(before.population)
        ranks = {chromosome: rank for rank, chromosome in population}
        new = [(rank_key(t), self.space.from_dict(t.params)) for t in record[len(before.record) :]]
        for rank, chromosome in new:
            if (worse := ranks.get(chromosome)) is not None:
                if worse <= rank:
                    continue
                population.remove((worse, chromosome))
            ranks[chromosome] = rank
            insort(population, (rank, chromosome))
            if len(population) > self.pop:
                del ranks[population.pop()[1]]
        known = before.known.union(chromosome for _, chromosome in new)
        self._memo = _Lineage(record, population, known)
        return self._memo
