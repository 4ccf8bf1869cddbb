"""Two-point crossover."""

import numpy as np

from gatl.chromosome import Chromosome


def two_point_crossover(
    a: Chromosome, b: Chromosome, rng: np.random.Generator
) -> tuple[Chromosome, Chromosome]:
    """Exchange the genes between two cut points.

    De Jong 1975, "An Analysis of the Behavior of a Class of Genetic Adaptive
    Systems", after Holland 1975, "Adaptation in Natural and Artificial
    Systems": the chromosome is a ring, cut at two of its n gaps, every pair of
    gaps being as likely as any other. The last gene never moves; as both
    children are kept, moving a segment or the rest gives the same pair.

    Departure: Holland keeps one child and discards the other.

    Args:
        a: One parent, n genes.
        b: The other, n genes.
        rng: The source of chance.

    Returns:
        Both children, not yet repaired: each gene is one of a parent's, but F
        may come from one and L from the other.
    """
    if len(a) < 2:
        return a, b
    i, j = sorted(rng.choice(len(a), size=2, replace=False).tolist())
    return a[:i] + b[i:j] + a[j:], b[:i] + a[i:j] + b[j:]
