"""The genetic algorithm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from optuna.trial import FrozenTrial

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.ranking import best_distinct, rank_key
from gatl.strategies.base import Strategy, require_whole
from gatl.strategies.operators.breeding import Breeding, breed
from gatl.strategies.steady_state import SteadyState
from gatl.streams import Purpose, generator


def of_mode(mode: str, *, n_elites: int, lag: int, **settings: Any) -> Strategy:
    """Build a genetic algorithm: `Genetic` for ``generational``, `SteadyState` for that.

    Args:
        mode: One of the two.
        n_elites: Of the first; the second keeps its best anyway.
        lag: Of the second.
        settings: What both take.

    Raises:
        ValueError: If the mode is neither, or the lag is none.
    """
    require_whole("lag", lag, 0)
    if mode == "generational":
        return Genetic(n_elites=n_elites, **settings)
    if mode == "steady_state":
        return SteadyState(lag=lag, **settings)
    raise ValueError(f"mode must be generational or steady_state, but got {mode!r}.")


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
    are mutated and kept, see `breed`.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that generation 0 begins with.
        pop: Population size, in [2, inf).
        tournament_size: See `Breeding`, as the others of these.
        crossover_prob: See there.
        mutation_prob: See there.
        mutation_step: See there.
        n_elites: Elites, in [0, pop).
        duplicate_retries: See there.
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
        n_elites: int,
        duplicate_retries: int,
    ) -> None:
        require_whole("pop", pop, 2)
        if not 0 <= n_elites < pop:
            raise ValueError(
                f"`0 <= n_elites < pop` must hold, but got (n_elites={n_elites}, pop={pop})."
            )
        require_whole("n_elites", n_elites, 0)
        super().__init__(space=space, seed=seed, initial=initial)
        self.pop = pop
        self.n_elites = n_elites
        self.breeding = Breeding(
            tournament_size, crossover_prob, mutation_prob, mutation_step, duplicate_retries
        )
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

    def propose(
        self,
        number: int,
        record: Sequence[FrozenTrial],
        pending: Sequence[Chromosome] = (),
    ) -> Chromosome:
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
            # An odd last one is lost.
            children = breed(parents, known, self.space, self.breeding, rng)
            for child in islice(children, self._n_offspring - len(offspring)):
                known.add(child)
                offspring.append(child)
        return offspring
