"""The genetic algorithm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.ranking import best_distinct, rank_key
from gatl.strategies.base import Strategy
from gatl.strategies.operators.crossover import two_point_crossover
from gatl.strategies.operators.mutation import mutate
from gatl.strategies.operators.tournament import tournament
from gatl.streams import Purpose, generator


@dataclass(frozen=True)
class _Lineage:
    """What a generation's offspring follow from: the whole generations before it.

    Attributes:
        record: Their trials.
        population: The last one's population, best first: its trials and the
            elites of all generations before it.
        known: Every chromosome tried so far.
    """

    record: list[FrozenTrial]
    population: list[FrozenTrial]
    known: frozenset[Chromosome]


_START = _Lineage([], [], frozenset())


class Genetic(Strategy):
    """A generational genetic algorithm with elites (Holland 1975; De Jong 1975).

    Generation 0 is ``pop`` trials: the initial chromosomes, then random ones.
    Every later generation is ``pop - n_elites`` trials, the offspring of the
    population before it: its own trials and its elites, which are the best
    distinct chromosomes of all earlier generations and are not tried again.
    Parents come from tournaments; two cross over into two children, and both
    are mutated and kept.

    Departure from the textbook: a child that equals a chromosome already tried
    teaches nothing, so it may be mutated again a few times.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that generation 0 begins with.
        pop: Population size, in [2, inf).
        tournament_size: Individuals in a tournament, in [1, inf).
        crossover_prob: Probability that a pair crosses over, in [0, 1].
        mutation_prob: Probability that a gene is redrawn, in [0, 1].
        n_elites: Elites, in [0, pop).
        duplicate_retries: How often at most a known child is mutated again, in [0, inf).
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
        n_elites: int,
        duplicate_retries: int,
    ) -> None:
        if not 0 <= n_elites < pop:
            raise ValueError(
                f"`0 <= n_elites < pop` must hold, but got (n_elites={n_elites}, pop={pop})."
            )
        super().__init__(space=space, seed=seed, initial=initial)
        self.pop = pop
        self.tournament_size = tournament_size
        self.crossover_prob = crossover_prob
        self.mutation_prob = mutation_prob
        self.n_elites = n_elites
        self.duplicate_retries = duplicate_retries
        # The last result and what it came from: no state, it only saves doing the same again.
        self._memo: tuple[_Lineage, list[Chromosome]] = _START, []

    @property
    def _n_offspring(self) -> int:
        return self.pop - self.n_elites

    def _first(self, generation: int) -> int:
        """Return the number of a generation's first trial."""
        return 0 if generation == 0 else self.pop + (generation - 1) * self._n_offspring

    def generation(self, number: int) -> int:
        """Return the generation of a trial, counted from 0."""
        return 0 if number < self.pop else 1 + (number - self.pop) // self._n_offspring

    def horizon(self, number: int) -> int:
        """Return the first number of the trial's generation: it depends on no later trial."""
        return self._first(self.generation(number))

    def propose(self, number: int, record: Sequence[FrozenTrial]) -> Chromosome:
        """Return the chromosome of a trial, see `Strategy.propose`."""
        generation = self.generation(number)
        if generation == 0:
            return self.opening(number)
        return self._offspring(generation, list(record))[number - self._first(generation)]

    def _offspring(self, generation: int, record: list[FrozenTrial]) -> list[Chromosome]:
        """Return all chromosomes of a generation above 0, breeding them once."""
        lineage, offspring = self._memo
        if lineage.record == record:  # by identity, so fast: storages keep ended trials as they are
            return offspring
        if lineage.record != record[: len(lineage.record)]:
            lineage = _START
        while len(lineage.record) < len(record):
            lineage = self._extended(lineage, record)
        offspring = self._bred(generation, lineage)
        self._memo = lineage, offspring
        return offspring

    def _extended(self, lineage: _Lineage, record: list[FrozenTrial]) -> _Lineage:
        """Return the lineage with one generation more.

        The elites of all generations are those of the last population, because
        the earlier elites are part of it.
        """
        begin = len(lineage.record)
        end = self._first(self.generation(begin) + 1)
        trials = record[begin:end]
        elites = best_distinct(lineage.population, self.space, self.n_elites)
        return _Lineage(
            record[:end],
            sorted([*elites.values(), *trials], key=rank_key),
            lineage.known.union(self.space.from_dict(trial.params) for trial in trials),
        )

    def _bred(self, generation: int, lineage: _Lineage) -> list[Chromosome]:
        """Select, cross over and mutate until the generation is full."""
        parents = [self.space.from_dict(trial.params) for trial in lineage.population]
        known = set(lineage.known)
        offspring: list[Chromosome] = []
        for pair in range((self._n_offspring + 1) // 2):
            rng = generator(self.seed, Purpose.OFFSPRING, generation, pair)
            a = parents[tournament(len(parents), self.tournament_size, rng)]
            b = parents[tournament(len(parents), self.tournament_size, rng)]
            if rng.random() < self.crossover_prob:
                a, b = two_point_crossover(a, b, rng)
            for crossed in (a, b)[: self._n_offspring - len(offspring)]:  # an odd last one is lost
                child = mutate(crossed, self.space, self.mutation_prob, rng)
                for _ in range(self.duplicate_retries):
                    if child not in known:
                        break
                    child = mutate(child, self.space, self.mutation_prob, rng)
                known.add(child)
                offspring.append(child)
        return offspring
