"""The genetic algorithm without generations, by hand."""

from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatl.chromosome import Chromosome, Gene, SearchSpace
from gatl.strategies.genetic import Genetic, of_mode
from gatl.strategies.steady_state import SteadyState

LAYERS = SearchSpace((Gene("included_layers", 1, 58), Gene("frozen_layers", 0, 18)))
SETTINGS: dict[str, Any] = {
    "space": LAYERS,
    "seed": 0,
    "pop": 4,
    "tournament_size": 64,  # the best, as good as certainly
    "crossover_prob": 0.0,
    "mutation_prob": 0.0,
    "mutation_step": None,
    "duplicate_retries": 0,
    "lag": 0,
}


def record(strategy: SteadyState, *ended: tuple[Chromosome, float | None]) -> list[FrozenTrial]:
    """Return trials with these genes and losses, None for FAIL."""
    found = []
    for number, (chromosome, loss) in enumerate(ended):
        trial = create_trial(
            state=TrialState.FAIL if loss is None else TrialState.COMPLETE,
            value=loss,
            params=LAYERS.to_dict(chromosome),
            distributions=strategy.distributions(),
        )
        trial.number = number
        found.append(trial)
    return found


def test_the_best_of_all_time_are_the_population() -> None:
    strategy = SteadyState(**SETTINGS)
    trials = record(
        strategy,
        *(((50, 1), 0.5), ((51, 2), 0.2), ((52, 3), 0.9), ((53, 4), 0.8)),
        *(((54, 5), 0.1), ((55, 6), None), ((56, 7), 0.7), ((51, 2), 0.2)),
    )
    assert strategy.propose(4, trials[:4]) == (51, 2)
    assert strategy.propose(6, trials[:6]) == (54, 5)
    strategy.propose(8, trials)
    best = [chromosome for _, chromosome in strategy._memo.population]
    assert best == [(54, 5), (51, 2), (50, 1), (56, 7)]  # each once


def test_a_pair_looks_at_what_is_lag_older_and_both_children_are_kept() -> None:
    strategy = SteadyState(**SETTINGS | {"lag": 2})
    assert [strategy.horizon(n) for n in range(9)] == [0, 0, 0, 0, 2, 2, 4, 4, 6]
    crossing = SETTINGS | {"crossover_prob": 1.0, "tournament_size": 1, "pop": 2}
    pairs = set()
    for seed in range(40):
        strategy = SteadyState(**crossing | {"seed": seed})
        trials = record(strategy, ((50, 1), 0.5), ((20, 9), 0.2))
        first = strategy.propose(2, trials)
        second = strategy.propose(3, trials, [first])
        pairs.add(frozenset((first, second)))
    assert pairs == {
        *(frozenset({(50, 1)}), frozenset({(20, 9)})),  # both parents the same
        frozenset({(50, 9), (20, 1)}),
    }


def test_what_is_being_tried_is_no_child_again() -> None:
    settings = SETTINGS | {"mutation_prob": 1.0, "duplicate_retries": 1000, "lag": 4}
    space = SearchSpace((Gene("included_layers", 5, 6), Gene("frozen_layers", 0, 1)))
    strategy = SteadyState(**settings | {"space": space})
    trials = record(strategy, *[((5, 0), 0.5)] * 4)
    pending = [(5, 1), (6, 0), (5, 1), (6, 0)]
    assert strategy.horizon(8) == len(trials)
    assert strategy.propose(8, trials, pending) == (6, 1)


def test_siblings_differ_where_they_can() -> None:
    settings = SETTINGS | {"mutation_prob": 1.0, "duplicate_retries": 1000}
    space = SearchSpace((Gene("included_layers", 5, 6), Gene("frozen_layers", 0, 1)))
    for seed in range(30):
        strategy = SteadyState(**settings | {"space": space, "seed": seed})
        trials = record(strategy, *[((5, 0), 0.5), ((6, 0), 0.4)] * 2)
        pair = {strategy.propose(4, trials), strategy.propose(5, trials)}
        assert pair == {(5, 1), (6, 1)}


def test_the_mode_chooses_the_algorithm() -> None:
    both = {"n_elites": 1, **SETTINGS}
    assert type(of_mode("generational", **both)) is Genetic
    assert type(of_mode("steady_state", **both)) is SteadyState
    with pytest.raises(ValueError, match="generational or steady_state"):
        of_mode("other", **both)
    with pytest.raises(
        ValueError, match=r"lag must be a whole number in \[0, 1000000\], but got 'x'"
    ):
        of_mode("generational", **both | {"lag": "x"})
    with pytest.raises(ValueError, match="lag"):
        SteadyState(**SETTINGS | {"lag": -1})
