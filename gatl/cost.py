"""How long fits take, told from those that have ended.

A generation ends when its slowest fit ends, so the longest start first: of the list
schedules the one whose end is never more than a third later than the earliest that
there is (Graham 1969, https://doi.org/10.1137/0117039).
"""

import heapq
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_PRIOR = 1.0
"""How strongly layers are held to cost alike, in the variance of a fit over that of a layer."""


class Cost(NamedTuple):
    """What a fit took.

    Attributes:
        genes: The chromosome by name.
        seconds: Seconds an epoch.
    """

    genes: Mapping[str, float]
    seconds: float


def expected_costs(
    chromosomes: Sequence[Mapping[str, float]], known: Sequence[Cost]
) -> list[float]:
    """Estimate what fits cost, by the layers that they train.

    A fit's cost is the sum of its trained layers' (the stem is one of them), each near
    their mean unless what is known says otherwise: ridge regression (Hoerl & Kennard
    1970) around equal costs. With nothing known it is the number of trained layers.

    Args:
        chromosomes: Whose costs to estimate, each with ``included_layers`` and
            ``frozen_layers``.
        known: Fits that have ended.

    Returns:
        Seconds an epoch, or numbers in proportion to them if nothing is known.
    """
    both = [*(fit.genes for fit in known), *chromosomes]
    included = np.array([genes["included_layers"] for genes in both])
    frozen = np.array([genes["frozen_layers"] for genes in both])
    n_layers = int(included.max(initial=0))
    layer = np.arange(n_layers + 1)  # 0 is the stem, which only F = 0 trains
    first = np.where(frozen > 0, frozen + 1, 0)
    trained = ((first[:, None] <= layer) & (layer <= included[:, None])).astype(float)
    done, asked = trained[: len(known)], trained[len(known) :]
    seconds = np.array([fit.seconds for fit in known])
    counts = done.sum(1)  # (n_known,)
    layers = np.ones(n_layers + 1)
    if counts @ seconds > 0:
        layers *= counts @ seconds / (counts @ counts)  # as if all cost alike
        spread = done.T @ done + _PRIOR * np.eye(n_layers + 1)
        layers += np.linalg.solve(spread, done.T @ (seconds - done @ layers))
    return [float(cost) for cost in asked @ layers]


def makespan(seconds: Iterable[float], n_workers: int) -> float:
    """Return the seconds that fits take on so many workers, the longest first."""
    ends = [0.0] * n_workers
    for fit in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + fit)
    return max(ends)


def generation_seconds(
    fits: Sequence[tuple[float, float]], ends: Sequence[int], reduction_factor: int, n_workers: int
) -> float:
    """Estimate how long a generation still takes whose fits wait for one another at rungs.

    Who will go on from a rung is not known: as many as will, of mean cost.

    Args:
        fits: Of each, the epochs that it has done, and what an epoch of it costs in seconds.
        ends: The rungs, then the epochs of a whole fit; ascending.
        reduction_factor: One fit in so many goes on from a rung, rounded up.
        n_workers: Fits at once, at least 1.
    """
    total = 0.0
    for end in ends:
        left = [(end - done) * cost for done, cost in fits if done < end]
        if left:
            total += makespan(left, n_workers)
            mean = statistics.fmean(cost for _, cost in fits)
            fits = [(end, mean)] * math.ceil(len(fits) / reduction_factor)
    return total
