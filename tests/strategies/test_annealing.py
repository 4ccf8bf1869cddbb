"""Simulated annealing, by hand."""

import itertools
import math
import statistics
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatl.chromosome import SearchSpace
from gatl.strategies.annealing import Annealing
from gatl.streams import Purpose, generator

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "chains": 2,
    "n_opening": 3,
    "initial_acceptance": 0.5,
    "cooling": 0.5,
    "step": 0.1,
    "patience": 4,
}


def ended(strategy: Annealing, number: int, genes: dict[str, Any], loss: float | None):
    trial = create_trial(
        state=TrialState.FAIL if loss is None else TrialState.COMPLETE,
        value=loss,
        params=genes,
        distributions=strategy.distributions(),
    )
    trial.number = number
    return trial


def run(strategy: Annealing, losses: list[float | None]) -> list[FrozenTrial]:
    """Run a search whose trials have these losses, whatever they are."""
    record: list[FrozenTrial] = []
    for number, loss in enumerate(losses):
        chromosome = strategy.propose(number, record[: strategy.horizon(number)])
        record.append(ended(strategy, number, strategy.space.to_dict(chromosome), loss))
    return record


def near(strategy: Annealing, trial: FrozenTrial, others: list[FrozenTrial]) -> FrozenTrial:
    """Return the trial from which this one is a small move."""

    def distance(other: FrozenTrial) -> float:
        total = 0.0
        for gene in strategy.space.genes:
            a, b = (
                math.log(t.params[gene.name]) if gene.log else t.params[gene.name]
                for t in (trial, other)
            )
            low, high = (math.log(x) if gene.log else x for x in (gene.low, gene.high))
            total += abs(a - b) / (high - low)
        return total

    return min(others, key=distance)


def test_chains_are_independent(space: SearchSpace) -> None:
    strategy = Annealing(space=space, **SETTINGS)
    losses: list[float | None] = [1.0 + number * 7 % 5 for number in range(20)]
    record = run(strategy, losses)
    changed = [x if number % 2 else 9.0 - x for number, x in enumerate(losses)]  # type: ignore[operator]
    other = run(Annealing(space=space, **SETTINGS), changed)
    assert [t.params for t in record[1::2]] == [t.params for t in other[1::2]]
    assert [t.params for t in record[0::2]] != [t.params for t in other[0::2]]
    assert [strategy.horizon(n) for n in (0, 5, 6, 7, 19)] == [0, 0, 5, 6, 18]


def test_a_chain_starts_at_its_best_and_moves_to_every_better_one(space: SearchSpace) -> None:
    strategy = Annealing(space=space, **SETTINGS | {"chains": 1, "step": 0.01})
    record = run(strategy, [3.0, 1.0, 2.0, *(0.9 - 0.1 * i for i in range(6))])
    assert near(strategy, record[3], record[:3]) is record[1]
    for trial in record[4:]:
        assert near(strategy, trial, record[: trial.number]) is record[trial.number - 1]


def test_the_temperature_by_hand(space: SearchSpace) -> None:
    strategy = Annealing(space=space, **SETTINGS | {"chains": 1})
    record = run(strategy, [3.0, 1.0, 2.5, 5.0, 5.0])
    scale = statistics.median(abs(a - b) for a, b in itertools.combinations((3, 1, 2.5), 2))
    state = strategy._state(0, record[:3])
    assert state.scale == pytest.approx(scale / math.log(2))
    assert math.exp(-scale / strategy.temperature(state)) == pytest.approx(0.5)
    state = strategy._state(0, record)
    assert state.moves == 2
    assert strategy.temperature(state) == pytest.approx(scale / math.log(2) / 4)


@pytest.mark.parametrize("seed", range(10))
def test_worse_moves_are_accepted_as_metropolis_says(space: SearchSpace, seed: int) -> None:
    settings = SETTINGS | {"chains": 1, "seed": seed, "cooling": 0.7}
    strategy = Annealing(space=space, **settings)
    losses = [1.0, 1.4, 1.8, *(1.0 + 0.1 * (7 * i % 4) for i in range(12))]
    record = run(strategy, losses)  # type: ignore[arg-type]
    current, best, rejected, moves = 0, 0, 0, 0
    scale = statistics.median((0.4, 0.8, 0.4)) / math.log(2)
    for number in range(3, 15):
        assert strategy._state(0, record[:number]).current is record[current]
        worse = losses[number] - losses[current]
        chance = generator(seed, Purpose.ACCEPTANCE, number).random()
        accepted = worse <= 0 or chance < math.exp(-worse / (scale * 0.7**moves))
        if losses[number] < losses[best]:
            best = number
        moves += 1
        if accepted:
            current, rejected = number, 0
        elif rejected + 1 == 4:
            current, rejected, moves = best, 0, 0
        else:
            rejected += 1


def test_a_chain_that_is_stuck_starts_again_from_its_best(space: SearchSpace) -> None:
    strategy = Annealing(space=space, **SETTINGS | {"chains": 1, "cooling": 0.01, "step": 0.01})
    # One worse move is accepted at first, perhaps; then it is too cold for any.
    record = run(strategy, [1.0, 1.1, 1.2, *[50.0] * 9])
    state = strategy._state(0, record[:7])
    assert (state.current, state.moves, state.rejected) == (record[0], 0, 0)
    assert strategy._state(0, record[:6]).rejected == 3


def test_failures_are_never_where_a_chain_stands(space: SearchSpace) -> None:
    strategy = Annealing(space=space, **SETTINGS | {"chains": 1, "step": 0.01})
    record = run(strategy, [None, None, None, None, 1.0, None, None, 0.5, 3.0])
    assert strategy._state(0, record[:4]).current is None  # and so it goes on drawing
    assert strategy._state(0, record[:5]).current is record[4]
    assert strategy._state(0, record[:7]).current is record[4]
    assert strategy._state(0, record[:7]).scale == 0  # one loss tells no differences
    assert strategy._state(0, record[:8]).current is record[7]
    assert strategy._state(0, record[:8]).scale == pytest.approx(0.5 / math.log(2))
    assert strategy._state(0, record).scale == pytest.approx(0.5 / math.log(2))  # and stays


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("chains", 0), ("chains", True), ("n_opening", 0), ("patience", 1.5), ("cooling", 0.0)),
        *(("cooling", None), ("step", "abc"), ("step", math.nan)),
        *(("cooling", 1.1), ("initial_acceptance", 1.0), ("step", 0.0), ("step", math.inf)),
    ],
)
def test_settings_out_of_range_are_refused(space: SearchSpace, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Annealing(space=space, **SETTINGS | {name: value})
