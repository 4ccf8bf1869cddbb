"""What a fit costs, told from those that have ended."""

import itertools
import random

import numpy as np
import pytest

from gatl.cost import Cost, expected_costs, generation_seconds, makespan


def genes(included, frozen):
    return {"included_layers": included, "frozen_layers": frozen}


def test_with_nothing_known_it_is_the_number_of_trained_layers_and_the_stem():
    fits = [genes(58, 0), genes(58, 18), genes(3, 3), genes(1, 0)]
    assert expected_costs(fits, []) == pytest.approx([59, 40, 0, 2])
    assert expected_costs([], []) == []


def test_one_fit_gives_the_scale():
    known = [Cost(genes(10, 2), 4.0)]
    assert expected_costs([genes(10, 2), genes(6, 2)], known) == pytest.approx([4.0, 2.0])


def test_fits_of_no_cost_or_of_nothing_trained_are_no_trouble():
    costs = expected_costs([genes(5, 0), genes(5, 5)], [Cost(genes(5, 5), 3.0)])
    assert np.isfinite(costs).all()
    assert expected_costs([genes(5, 0)], [Cost(genes(5, 1), 0.0)]) == pytest.approx([6.0])


def test_it_learns_that_early_layers_cost_more():
    """Of two fits that train as many layers, the one of dear layers is told from few trials."""
    cost = [3.0, *(5.0 if k <= 6 else 0.5 for k in range(1, 59))]  # of the stem, of each layer
    rng = random.Random(0)

    def seconds(included, frozen):
        return sum(cost[frozen + 1 if frozen else 0 : included + 1]) * rng.uniform(0.95, 1.05)

    drawn = [(rng.randint(1, 58), rng.randint(0, 18)) for _ in range(12)]
    known = [Cost(genes(L, min(F, L)), seconds(L, min(F, L))) for L, F in drawn]
    early, late = expected_costs([genes(6, 0), genes(24, 18)], known)
    assert early > 3 * late

    others = [(L, F) for L, F in itertools.product((10, 25, 40, 58), (0, 3, 6, 12)) if F <= L]
    expected = expected_costs([genes(L, F) for L, F in others], known)
    actual = [seconds(L, F) for L, F in others]
    ranks = [np.argsort(np.argsort(x)) for x in (expected, actual)]
    assert np.corrcoef(*ranks)[0, 1] > 0.8


def test_makespan_is_that_of_the_longest_first():
    """Graham (1969), table 1: 4/3 - 1/(3m) times the optimum, here 11 against 9."""
    assert makespan([5, 5, 4, 4, 3, 3, 3], 3) == 11
    assert makespan([], 3) == 0
    assert makespan([2, 2, 2], 2) == 4


def test_a_generation_is_halved_at_its_rungs():
    # 8 fits of 1 epoch on 2 workers, 4 more epochs for 4 ... : 4 + 2 + 1 * 2 (4 epochs are 2 more)
    assert generation_seconds([(0, 1.0)] * 8, (1, 2, 4), 2, 2) == 4 + 2 + 2
    assert generation_seconds([(0, 1.0)] * 8, (4,), 1, 2) == 16
    assert generation_seconds([], (1, 2, 4), 2, 2) == 0


def test_what_a_generation_has_done_is_not_ahead():
    # At the first rung are two; two have half an epoch left for it; one of two dear ones goes on.
    fits = [(1, 1.0), (1, 1.0), (0.5, 3.0), (0.5, 3.0)]
    assert generation_seconds(fits, (1, 2), 2, 2) == 1.5 + 2.0
    assert generation_seconds([(1.5, 2.0), (1.25, 2.0)], (1, 2), 2, 2) == 1.5
