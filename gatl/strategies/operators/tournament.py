"""Tournament selection."""

import numpy as np


def tournament(n: int, size: int, rng: np.random.Generator) -> int:
    """Select one of n individuals that are ordered by rank.

    ``size`` of them are drawn at random and the best wins: Goldberg & Deb 1991,
    "A Comparative Analysis of Selection Schemes Used in Genetic Algorithms". Of
    the paper's two ways, this draws with replacement.

    Departure: only the rank counts, so pruned and failed individuals need no
    made-up fitness, and no tie is left to chance.

    Args:
        n: Number of individuals, in [1, inf).
        size: Individuals drawn, in [1, inf); 1 is a uniform choice, more presses harder.
        rng: The source of chance.

    Returns:
        The winner's rank, in [0, n); 0 is the best.
    """
    return int(rng.integers(n, size=size).min())
