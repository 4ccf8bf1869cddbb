"""Mutation."""

import numpy as np

from gatl.chromosome import Chromosome, Gene, SearchSpace, Value
from gatl.strategies.operators.neighbour import moved


def mutate(
    chromosome: Chromosome,
    space: SearchSpace,
    prob: float,
    rng: np.random.Generator,
    step: float | None = None,
) -> Chromosome:
    """Redraw or move each gene with a probability of its own, then repair.

    Holland 1975, "Adaptation in Natural and Artificial Systems", where a mutated
    gene becomes another of its alleles at random.

    Departure: a gene is a number with a range, not one of a few alleles, so it
    is redrawn from its distribution (log-uniform where the gene says so), and
    may be what it was. With a step it moves to a value nearby instead, as in
    evolution strategies, see `neighbour`. A fixed gene keeps its one value.

    Args:
        chromosome: One number for each gene of the space.
        space: The ranges to draw from.
        prob: Probability per gene, in [0, 1].
        rng: The source of chance.
        step: Standard deviation of a move, as a share of the gene's range, in
            (0, inf); None: a gene is redrawn.

    Returns:
        A canonical chromosome of the space.
    """

    def mutated(gene: Gene, value: Value) -> Value:
        return gene.draw(rng) if step is None else moved(gene, value, step, rng)

    hit = rng.random(len(chromosome)) < prob
    return space.repair(
        [
            mutated(gene, value) if is_hit else value
            for gene, value, is_hit in zip(space.genes, chromosome, hit, strict=True)
        ]
    )
