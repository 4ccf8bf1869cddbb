"""Uniform mutation."""

import numpy as np

from gatl.chromosome import Chromosome, SearchSpace


def mutate(
    chromosome: Chromosome, space: SearchSpace, prob: float, rng: np.random.Generator
) -> Chromosome:
    """Redraw each gene with a probability of its own, then repair.

    Holland 1975, "Adaptation in Natural and Artificial Systems", where a mutated
    gene becomes another of its alleles at random.

    Departure: a gene is a number with a range, not one of a few alleles, so it
    is redrawn from its distribution (log-uniform where the gene says so), and
    may be what it was. A fixed gene keeps its one value.

    Args:
        chromosome: One number for each gene of the space.
        space: The ranges to draw from.
        prob: Probability per gene, in [0, 1].
        rng: The source of chance.

    Returns:
        A canonical chromosome of the space.
    """
    hit = rng.random(len(chromosome)) < prob
    return space.repair(
        [
            gene.draw(rng) if redraw else value
            for gene, value, redraw in zip(space.genes, chromosome, hit, strict=True)
        ]
    )
