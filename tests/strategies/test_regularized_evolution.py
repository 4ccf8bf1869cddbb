"""Regularized evolution, by hand."""

import math
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatl.chromosome import SearchSpace
from gatl.strategies.regularized_evolution import RegularizedEvolution

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "population_size": 5,
    "sample_size": 64,  # all of the population, as good as certainly
    "step": 1e-9,  # whole numbers move by one, and the others hardly
    "lag": 0,
}


def drawn(strategy: RegularizedEvolution, losses: list[float | None]) -> list[FrozenTrial]:
    """Return trials far from one another, with these losses."""
    record = []
    for number, loss in enumerate(losses):
        pruned = loss is not None and loss < 0
        trial = create_trial(
            state=TrialState.FAIL
            if loss is None
            else TrialState.PRUNED
            if pruned
            else TrialState.COMPLETE,
            value=None if pruned else loss,
            params=strategy.space.to_dict(strategy.opening(1000 + number)),
            distributions=strategy.distributions(),
            user_attrs={"outcome": {"epochs": 1, "val_loss": 0.0}},
        )
        trial.number = number
        record.append(trial)
    return record


def parent(strategy: RegularizedEvolution, record: list[FrozenTrial]) -> int:
    """Return which trial the next one is a mutation of."""
    child = strategy.space.to_dict(strategy.propose(len(record), record))
    rates = [abs(math.log(t.params["learning_rate"] / child["learning_rate"])) for t in record]
    found = rates.index(min(rates))
    assert rates[found] < 1e-6
    old = record[found].params
    assert 0 < sum(abs(old[k] - child[k]) for k in ("included_layers", "frozen_layers")) <= 2 or (
        old["dropout"] != child["dropout"] or old["learning_rate"] != child["learning_rate"]
    )
    return found


def test_the_best_of_the_youngest_is_the_parent_and_the_oldest_dies(space: SearchSpace) -> None:
    strategy = RegularizedEvolution(space=space, **SETTINGS)
    losses: list[float | None] = [0.1, 0.5, 0.9, 0.3, 0.8, 0.7, 0.6, 0.9, 0.8]
    record = drawn(strategy, losses)
    assert parent(strategy, record[:5]) == 0  # the best of all five
    assert parent(strategy, record[:6]) == 3  # the best has died of age
    assert parent(strategy, record[:8]) == 3
    assert parent(strategy, record[:9]) == 6


def test_failures_never_live_and_stopped_trials_rank_last(space: SearchSpace) -> None:
    strategy = RegularizedEvolution(space=space, **SETTINGS)
    record = drawn(strategy, [0.1, None, 0.9, -1.0, None, 0.8, 0.7, None])
    assert parent(strategy, record) == 0  # of trials 0, 2, 3, 5, 6
    record = drawn(strategy, [0.1, -1.0, -1.0, None, -1.0, -1.0, 5.0])
    assert parent(strategy, record) == 6
    nothing = drawn(strategy, [None] * 7)
    assert strategy.propose(7, nothing) == strategy.opening(7)


def test_a_larger_sample_presses_harder(space: SearchSpace) -> None:
    def mean_rank(sample_size: int) -> float:
        ranks = []
        for seed in range(60):
            settings = SETTINGS | {"sample_size": sample_size, "seed": seed}
            strategy = RegularizedEvolution(space=space, **settings)
            ranks.append(parent(strategy, drawn(strategy, [0.1, 0.2, 0.3, 0.4, 0.5])))
        return sum(ranks) / len(ranks)

    assert mean_rank(1) == pytest.approx(2.0, abs=0.6)
    of_three = sum((k / 5) ** 3 for k in (1, 2, 3, 4))  # the least of three, with replacement
    assert mean_rank(3) == pytest.approx(of_three, abs=0.4)
    assert mean_rank(64) == 0


def test_it_looks_lag_trials_back(space: SearchSpace) -> None:
    strategy = RegularizedEvolution(space=space, **SETTINGS | {"lag": 3})
    assert [strategy.horizon(n) for n in (0, 4, 5, 6, 20)] == [0, 0, 2, 3, 17]


@pytest.mark.parametrize(
    ("name", "value"),
    [("population_size", 0), ("sample_size", 0), ("lag", -1), ("lag", 1.5), ("step", 0.0)],
)
def test_settings_out_of_range_are_refused(space: SearchSpace, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        RegularizedEvolution(space=space, **SETTINGS | {name: value})
