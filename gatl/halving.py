"""Successive halving within a generation (Jamieson & Talwalkar 2016).

Departure from the paper: a generation starts every fit, and of those that reach a rung
the best 1 / reduction_factor go on, from where they stopped.
"""

import math
from collections.abc import Mapping


def rungs(min_epochs: int, reduction_factor: int, max_epochs: int) -> tuple[int, ...]:
    """Return the epochs at which fits wait for one another.

    Args:
        min_epochs: The first rung, at least 1.
        reduction_factor: By how much each rung is further than the last, at least 2.
        max_epochs: Where fits end, which is no rung.

    Returns:
        ``min_epochs * reduction_factor ** i`` for all that are below max_epochs.
    """
    found = []
    while min_epochs < max_epochs:
        found.append(min_epochs)
        min_epochs *= reduction_factor
    return tuple(found)


def survivors(losses: Mapping[int, float], reduction_factor: int) -> frozenset[int]:
    """Return which trials go on from a rung.

    Args:
        losses: val_loss by number, of all trials of the generation that reached the rung.
        reduction_factor: One trial in so many goes on, rounded up.

    Returns:
        The numbers of the lowest losses; ties go to the lower number.
    """
    ranked = sorted(losses, key=lambda number: (losses[number], number))
    return frozenset(ranked[: math.ceil(len(ranked) / reduction_factor)])
