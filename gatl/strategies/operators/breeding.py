"""From parents to children: selection, crossover and mutation in a row."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gatl.chromosome import Chromosome, SearchSpace
from gatl.strategies.base import MAX_STEP, require_whole, require_within
from gatl.strategies.operators.crossover import two_point_crossover
from gatl.strategies.operators.mutation import mutate
from gatl.strategies.operators.tournament import tournament


@dataclass(frozen=True)
class Breeding:
    """How two parents have two children.

    Attributes:
        tournament_size: Individuals in a tournament, in [1, inf).
        crossover_prob: Probability that the pair crosses over, in [0, 1].
        mutation_prob: Probability that a gene is mutated, in [0, 1].
        mutation_step: How far it moves then, as a share of its range, in (0, 1000];
            None: it is redrawn.
        duplicate_retries: How often at most a known child is mutated again, in [0, inf).
    """

    tournament_size: int
    crossover_prob: float
    mutation_prob: float
    mutation_step: float | None
    duplicate_retries: int

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        require_whole("tournament_size", self.tournament_size, 1)
        require_within("crossover_prob", self.crossover_prob, 0, 1, ends="[]")
        require_within("mutation_prob", self.mutation_prob, 0, 1, ends="[]")
        if self.mutation_step is not None:
            require_within("mutation_step", self.mutation_step, 0, MAX_STEP, ends="(]")
        require_whole("duplicate_retries", self.duplicate_retries, 0)


def breed(
    population: Sequence[Chromosome],
    known: Container[Chromosome],
    space: SearchSpace,
    settings: Breeding,
    rng: np.random.Generator,
) -> Iterator[Chromosome]:
    """Select two parents and yield their two children.

    Departure from the textbook: a child that equals a chromosome already tried teaches
    nothing, so it may be mutated again a few times.

    Args:
        population: Where the parents come from, best first.
        known: The chromosomes tried so far, looked at when a child is asked for.
        space: The ranges.
        settings: The probabilities.
        rng: The source of chance.

    Yields:
        Canonical chromosomes of the space.
    """
    a = population[tournament(len(population), settings.tournament_size, rng)]
    b = population[tournament(len(population), settings.tournament_size, rng)]
    if rng.random() < settings.crossover_prob:
        a, b = two_point_crossover(a, b, rng)
    for crossed in (a, b):
        child = mutate(crossed, space, settings.mutation_prob, rng, settings.mutation_step)
        for _ in range(settings.duplicate_retries):
            if child not in known:
                break
            child = mutate(child, space, settings.mutation_prob, rng, settings.mutation_step)
        yield child
