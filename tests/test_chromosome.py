"""Genes, the search space, repair and canonical form."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from gatl.chromosome import KNOWN_GENES, Chromosome, Gene, SearchSpace, Value

SPACE = SearchSpace(
    (
        Gene("included_layers", 1, 58),
        Gene("frozen_layers", 0, 18),
        Gene("learning_rate", 1e-6, 1e-1, log=True),
        Gene("dropout", 0.1, 0.9),
    )
)


def is_canonical(chromosome: Chromosome, space: SearchSpace) -> bool:
    values = space.to_dict(chromosome)
    return values["frozen_layers"] <= values["included_layers"] and all(
        type(value) is gene.kind and gene.low <= value <= gene.high
        for gene, value in zip(space.genes, chromosome, strict=True)
    )


@given(
    lows=st.tuples(st.integers(0, 58), st.integers(1, 58)).map(sorted),
    spans=st.tuples(st.integers(0, 57), st.integers(0, 57)),
    rate=st.tuples(st.floats(1e-12, 1), st.floats(1e-12, 1)).map(sorted),
    log=st.booleans(),
    values=st.tuples(*[st.integers(-100, 100)] * 2, *[st.floats(allow_nan=False)] * 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_space_draws_and_repairs_to_canonical_chromosomes(
    lows: list[int],
    spans: tuple[int, int],
    rate: list[float],
    log: bool,
    values: tuple[Value, ...],
    seed: int,
) -> None:
    frozen, included = lows[0], max(1, lows[1])
    space = SearchSpace(
        (
            Gene("dropout", 0.5, 0.5),
            Gene("frozen_layers", frozen, frozen + spans[0]),
            Gene("included_layers", included, included + spans[1], log=log),
            Gene("learning_rate", rate[0], rate[1], log=log),
        )
    )
    repaired = space.repair((values[2], values[0], values[1], values[3]))
    for chromosome in (repaired, space.draw(np.random.default_rng(seed))):
        assert is_canonical(chromosome, space)
        assert space.repair(chromosome) == chromosome
        assert space.from_dict(space.to_dict(chromosome)) == chromosome
        assert chromosome[0] == 0.5


def test_repair_freezes_no_more_than_there_is() -> None:
    assert SPACE.repair((7, 18, 1e-3, 0.5)) == (7, 7, 1e-3, 0.5)
    assert SPACE.repair((58, 18, 1e-3, 0.5)) == (58, 18, 1e-3, 0.5)


def test_repair_clips_and_makes_native() -> None:
    repaired = SPACE.repair((np.float64(99.0), True, 1, math.inf))
    assert repaired == (58, 1, 0.1, 0.9)
    assert [type(value) for value in repaired] == [int, int, float, float]


def test_repair_refuses_nan_and_a_wrong_length() -> None:
    with pytest.raises(ValueError, match="dropout must be a number, but got nan"):
        SPACE.repair((7, 3, 1e-3, math.nan))
    with pytest.raises(ValueError, match="argument"):
        SPACE.repair((7, 3, 1e-3))


def test_from_dict_takes_any_order_and_refuses_other_names() -> None:
    values = {"dropout": 0.5, "learning_rate": 1e-3, "frozen_layers": 9, "included_layers": 5}
    assert SPACE.from_dict(values) == (5, 5, 1e-3, 0.5)
    with pytest.raises(ValueError, match=r"must name included_layers, .* but got dropout"):
        SPACE.from_dict({"dropout": 0.5})
    with pytest.raises(ValueError, match="colour"):
        SPACE.from_dict({**values, "colour": 1})


def test_integers_are_drawn_alike_ends_included() -> None:
    rng = np.random.default_rng(1)
    counts = np.bincount([Gene("frozen_layers", 0, 18).draw(rng) for _ in range(19_000)])
    assert len(counts) == 19
    assert stats.chisquare(counts).pvalue > 1e-3


def test_log_uniform_draws_every_decade_alike() -> None:
    rng = np.random.default_rng(2)
    draws = [math.log10(Gene("learning_rate", 1e-6, 1e-1, log=True).draw(rng)) for _ in range(5000)]
    assert stats.kstest(draws, stats.uniform(-6, 5).cdf).pvalue > 1e-3


def test_uniform_floats_are_drawn_uniformly() -> None:
    rng = np.random.default_rng(3)
    draws = [Gene("dropout", 0.1, 0.9).draw(rng) for _ in range(5000)]
    assert stats.kstest(draws, stats.uniform(0.1, 0.8).cdf).pvalue > 1e-3


def test_log_integers_reach_both_ends() -> None:
    rng = np.random.default_rng(4)
    draws = [Gene("included_layers", 1, 4, log=True).draw(rng) for _ in range(4000)]
    shares = np.diff(np.log([0.5, 1.5, 2.5, 3.5, 4.5])) / math.log(9)
    assert stats.chisquare(np.bincount(draws)[1:], shares * 4000).pvalue > 1e-3


@pytest.mark.parametrize(
    ("gene", "message"),
    [
        (("dropout", 0.9, 0.1, False), r"`low <= high` must hold, but got \(low=0.9, high=0.1\)"),
        (("dropout", math.nan, 0.1, False), "`low <= high` must hold"),
        (("dropout", 0.0, 0.1, True), "`low > 0` must hold for `log=True`"),
        (("colour", 0.0, 0.1, False), "but got colour"),
    ],
)
def test_a_gene_refuses_what_is_no_range(
    gene: tuple[str, float, float, bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Gene(*gene)


def test_a_space_refuses_genes_that_repair_could_not_keep_inside() -> None:
    with pytest.raises(ValueError, match=r"frozen_layers.low=6, included_layers.low=5"):
        SearchSpace((Gene("included_layers", 5, 9), Gene("frozen_layers", 6, 9)))
    with pytest.raises(ValueError, match="distinct"):
        SearchSpace((Gene("dropout", 0, 0.5),) * 2)
    with pytest.raises(ValueError, match="must be genes, but got dropout"):
        SearchSpace((Gene("dropout", 0, 0.5),))


def test_known_genes_say_what_they_allow() -> None:
    assert KNOWN_GENES["dropout"].interval == "[0, 1)"
    assert KNOWN_GENES["learning_rate"].interval == "(0, 1]"
    assert KNOWN_GENES["included_layers"].interval == "[1, inf)"
    assert KNOWN_GENES["dropout"].allows(0)
    assert not KNOWN_GENES["dropout"].allows(1)
    assert not KNOWN_GENES["learning_rate"].allows(0)
    assert KNOWN_GENES["learning_rate"].allows(1)
    assert not KNOWN_GENES["included_layers"].allows(math.inf)
    assert not KNOWN_GENES["dropout"].allows(math.nan)
