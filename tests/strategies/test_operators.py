"""The operators: inside the space always, and in distribution what DEAP's are."""

import math
import random
from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np
import pytest
from deap import tools  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from gatl.chromosome import Chromosome, Gene, SearchSpace
from gatl.strategies.operators.crossover import two_point_crossover
from gatl.strategies.operators.mutation import mutate
from gatl.strategies.operators.neighbour import neighbour
from gatl.strategies.operators.tournament import tournament


def p_same(ours: Iterable[Hashable], theirs: Iterable[Hashable]) -> float:
    """Return the p-value of both samples coming from one distribution."""
    a, b = Counter(ours), Counter(theirs)
    outcomes = list(a | b)
    if len(outcomes) == 1:
        return 1.0
    table = [[counts[outcome] for outcome in outcomes] for counts in (a, b)]
    return float(stats.chi2_contingency(table).pvalue)


class _Ranked:
    """An individual as DEAP compares it: by its fitness."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.fitness = -rank


@pytest.mark.parametrize(("n", "size"), [(10, 1), (10, 2), (7, 3), (5, 12), (1, 2)])
def test_tournament_selects_as_deap_does(n: int, size: int) -> None:
    rng = np.random.default_rng(n * size)
    random.seed(size)
    ours = [tournament(n, size, rng) for _ in range(20_000)]
    individuals = [_Ranked(rank) for rank in range(n)]
    theirs = [one.rank for one in tools.selTournament(individuals, 20_000, size)]
    assert set(ours) <= set(range(n))
    assert p_same(ours, theirs) > 1e-3


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_crossover_makes_the_pairs_that_deap_makes(n: int) -> None:
    rng = np.random.default_rng(n)
    random.seed(n)
    a, b = tuple(range(n)), tuple(range(10, 10 + n))
    ours = [frozenset(two_point_crossover(a, b, rng)) for _ in range(12_000)]
    theirs = [
        frozenset(tuple(child) for child in tools.cxTwoPoint(list(a), list(b)))
        for _ in range(12_000)
    ]
    assert len(set(ours)) == n * (n - 1) // 2  # every pair of a ring's gaps
    assert p_same(ours, theirs) > 1e-3


def test_crossover_of_one_gene_returns_the_parents() -> None:
    assert two_point_crossover((1,), (2,), np.random.default_rng(0)) == ((1,), (2,))


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_mutation_redraws_each_gene_as_deap_does(prob: float) -> None:
    space = SearchSpace((Gene("included_layers", 20, 24), Gene("frozen_layers", 0, 3)))
    rng = np.random.default_rng(5)
    random.seed(5)
    ours = [mutate((22, 1), space, prob, rng) for _ in range(10_000)]
    theirs = [tuple(tools.mutUniformInt([22, 1], [20, 0], [24, 3], prob)[0]) for _ in range(10_000)]
    assert p_same(ours, theirs) > 1e-3  # jointly: the genes are hit independently


def test_mutation_rate_is_per_gene(space: SearchSpace) -> None:
    rng = np.random.default_rng(6)
    start = (58, 0, 1e-3, 0.5)
    children = [mutate(start, space, 0.3, rng) for _ in range(10_000)]
    for index, same in ((2, 0.0), (3, 0.0), (0, 1 / 58), (1, 1 / 19)):
        changed = sum(child[index] != start[index] for child in children)
        assert stats.binomtest(changed, 10_000, 0.3 * (1 - same)).pvalue > 1e-3


def test_a_mutation_with_a_step_is_normal_in_the_scale_of_the_gene(space: SearchSpace) -> None:
    """Small steps from the middle, which no end of a range reflects."""
    rng = np.random.default_rng(8)
    start = (30, 9, 10**-3.5, 0.5)
    children = [mutate(start, space, 0.3, rng, 0.05) for _ in range(10_000)]
    moves = np.array([[c[2], c[3]] for c in children])
    scaled = (np.log10(moves[:, 0]) + 3.5) / 5, (moves[:, 1] - 0.5) / 0.8
    for moved in scaled:
        hit = moved[np.abs(moved) > 1e-12]
        assert stats.binomtest(len(hit), 10_000, 0.3).pvalue > 1e-3
        assert stats.kstest(hit, stats.norm(0, 0.05).cdf).pvalue > 1e-3
    for index in (0, 1):  # whole numbers that are hit do move
        changed = sum(child[index] != start[index] for child in children)
        assert stats.binomtest(changed, 10_000, 0.3).pvalue > 1e-3


@given(data=st.data())
def test_children_are_inside_the_space(
    spaces: st.SearchStrategy[SearchSpace], data: st.DataObject
) -> None:
    space = data.draw(spaces)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    a, b = space.draw(rng), space.draw(rng)
    crossed = two_point_crossover(a, b, rng)
    for genes in zip(a, b, *crossed, strict=True):
        assert sorted(genes[:2]) == sorted(genes[2:])  # nothing lost, nothing new
    for child in crossed:
        step = data.draw(st.none() | st.floats(1e-3, 10))
        mutant = mutate(child, space, data.draw(st.floats(0, 1)), rng, step)
        assert mutant == space.repair(mutant)
        for gene, value in zip(space.genes, mutant, strict=True):
            assert type(value) is gene.kind
            assert gene.low <= value <= gene.high


def test_a_fixed_gene_never_changes() -> None:
    space = SearchSpace(
        (Gene("included_layers", 9, 58), Gene("frozen_layers", 9, 9), Gene("dropout", 0.5, 0.5))
    )
    rng = np.random.default_rng(7)
    for step in (None, 0.5):
        mutants = {mutate((58, 9, 0.5), space, 1.0, rng, step)[1:] for _ in range(300)}
        assert mutants == {(9, 0.5)}


def shares(space: SearchSpace, chromosome: Chromosome) -> list[float]:
    """Return where each gene stands in its range, in its own scale, in [0, 1]."""
    found = []
    for gene, value in zip(space.genes, chromosome, strict=True):
        low, high, x = (math.log(v) if gene.log else float(v) for v in (gene.low, gene.high, value))
        found.append((x - low) / (high - low))
    return found


def test_neighbours_are_near_and_differ(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    here = (40, 9, 1e-4, 0.5)
    start = shares(space, here)
    moves = np.array(
        [
            [
                b - a
                for a, b in zip(
                    start, shares(space, neighbour(here, space, 0.05, rng)), strict=True
                )
            ]
            for _ in range(4000)
        ]
    )
    moved = moves != 0
    # of four genes: each with probability 1/4, and one that is drawn for certain
    assert moved.mean(0) == pytest.approx(np.full(4, 1 - 0.75 * 0.75), abs=0.03)
    assert moved.any(1).all()
    for column in (2, 3):  # normal, in the gene's own scale
        sizes = moves[moved[:, column], column]
        assert sizes.std() == pytest.approx(0.05, rel=0.06)
        assert sizes.mean() == pytest.approx(0.0, abs=0.005)


def test_whole_numbers_move_by_one_at_least(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    found = [neighbour((40, 9, 1e-4, 0.5), space, 1e-6, rng) for _ in range(400)]
    assert {c[0] for c in found} == {39, 40, 41}
    assert {c[1] for c in found} == {8, 9, 10}
    for start, values in ((1, {0, 1, 2}), (0, {0, 1}), (18, {17, 18})):
        found = [neighbour((58, start, 1e-4, 0.5), space, 0.1, rng) for _ in range(2000)]
        assert {c[1] for c in found} >= values
        moved = [c for c in found if c[:1] + c[2:] == (58, 1e-4, 0.5)]
        assert start not in {c[1] for c in moved}  # what moves alone does not stay


def test_moves_are_reflected_at_the_ends() -> None:
    space = SearchSpace(
        (Gene("included_layers", 1, 2), Gene("frozen_layers", 0, 0), Gene("dropout", 0.0, 0.5))
    )
    rng = np.random.default_rng(0)
    found = [neighbour((1, 0, 0.5), space, 0.2, rng) for _ in range(500)]
    assert {c[0] for c in found} == {1, 2}
    assert {c[1] for c in found} == {0}
    dropouts = [c[2] for c in found if c[2] != 0.5]
    assert all(0 <= x < 0.5 for x in dropouts)
    # half a normal distribution: nothing piles up at the end
    assert np.mean([0.5 - x for x in dropouts]) == pytest.approx(
        0.1 * math.sqrt(2 / math.pi), rel=0.1
    )


def test_where_all_is_fixed_there_is_no_neighbour() -> None:
    space = SearchSpace((Gene("included_layers", 7, 7), Gene("frozen_layers", 2, 2)))
    assert neighbour((7, 2), space, 0.5, np.random.default_rng(0)) == (7, 2)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), step=st.floats(1e-9, 1e3))
def test_neighbours_are_inside_the_space(
    spaces: st.SearchStrategy[SearchSpace], data: st.DataObject, seed: int, step: float
) -> None:
    space, rng = data.draw(spaces), np.random.default_rng(seed)
    found = neighbour(space.draw(rng), space, step, rng)
    assert found == space.repair(found)
    assert [type(value) for value in found] == [gene.kind for gene in space.genes]
