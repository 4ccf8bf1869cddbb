"""The genetic algorithm: numbering, elites, offspring, cost."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatl.chromosome import Chromosome, Gene, SearchSpace
from gatl.strategies import genetic
from gatl.strategies.genetic import Genetic
from gatl.streams import Purpose, generator

LAYERS = SearchSpace((Gene("included_layers", 1, 58), Gene("frozen_layers", 0, 18)))
A, B, C, D, E = (50, 1), (51, 2), (52, 3), (53, 4), (54, 5)


def make(space: SearchSpace = LAYERS, **changed: Any) -> Genetic:
    """A strategy whose children are copies of the best, unless told otherwise."""
    settings: dict[str, Any] = {
        "seed": 0,
        "initial": (),
        "pop": 4,
        "tournament_size": 64,
        "crossover_prob": 0.0,
        "mutation_prob": 0.0,
        "mutation_step": None,
        "n_elites": 1,
        "duplicate_retries": 0,
    }
    return Genetic(space=space, **(settings | changed))


def trials(strategy: Genetic, *ended: tuple[Chromosome, float | None]) -> list[FrozenTrial]:
    """A record: each trial's genes and val_loss, None for FAIL."""
    record = []
    for number, (chromosome, loss) in enumerate(ended):
        trial = create_trial(
            state=TrialState.FAIL if loss is None else TrialState.COMPLETE,
            value=loss,
            params=strategy.space.to_dict(chromosome),
            distributions=strategy.distributions(),
        )
        trial.number = number
        record.append(trial)
    return record


def offspring(strategy: Genetic, record: list[FrozenTrial]) -> list[Chromosome]:
    """The whole generation that follows a record."""
    begin = len(record)
    generation = strategy.generation(begin)
    end = next(n for n in range(begin, begin + 99) if strategy.generation(n) > generation)
    return [strategy.propose(number, record) for number in range(begin, end)]


def run(strategy: Genetic, n: int, loss: Callable[[Chromosome], float]) -> list[FrozenTrial]:
    """A search without a study."""
    record: list[FrozenTrial] = []
    for number in range(n):
        chromosome = strategy.propose(number, record[: strategy.horizon(number)])
        [trial] = trials(strategy, (chromosome, loss(chromosome)))
        trial.number = number
        record.append(trial)
    return record


@pytest.mark.parametrize(("pop", "n_elites"), [(2, 0), (2, 1), (6, 2), (12, 2), (5, 4), (20, 0)])
def test_numbering_follows_the_formula(pop: int, n_elites: int) -> None:
    strategy = make(pop=pop, n_elites=n_elites)
    generations = [0] * pop
    while len(generations) < 200:
        generations += [generations[-1] + 1] * (pop - n_elites)
    for number, generation in enumerate(generations):
        assert strategy.generation(number) == generation
        assert strategy.horizon(number) == generations.index(generation)
    for count in range(1, 9):  # budget.trials: null
        assert strategy.generation(pop + (count - 1) * (pop - n_elites)) == count


@pytest.mark.parametrize("n_elites", [-1, 4, 5])
def test_elites_must_leave_room_for_offspring(n_elites: int) -> None:
    with pytest.raises(ValueError, match=rf"n_elites={n_elites}, pop=4"):
        make(n_elites=n_elites)


def test_generation_0_is_initial_then_random_each_from_its_own_stream() -> None:
    strategy = make(initial=({"included_layers": 58, "frozen_layers": 3},), seed=9)
    drawn = [LAYERS.draw(generator(9, Purpose.INITIAL, number)) for number in range(4)]
    assert [strategy.propose(number, []) for number in range(4)] == [(58, 3), *drawn[1:]]


def test_a_generation_by_hand() -> None:
    """The draws of one pair, written out: two tournaments of two, one crossover, mutation."""
    strategy = make(n_elites=2, tournament_size=2, crossover_prob=0.5, mutation_prob=0.5, seed=3)
    record = trials(strategy, (A, 0.4), (B, 0.2), (C, None), (D, 0.3))
    ranked = [B, D, A, C]
    rng = generator(3, Purpose.OFFSPRING, 1, 0)
    a, b = ranked[min(rng.integers(4, size=2))], ranked[min(rng.integers(4, size=2))]
    if rng.random() < 0.5:
        i, j = sorted(rng.choice(2, size=2, replace=False))
        assert (i, j) == (0, 1)  # the one pair of gaps that a ring of two has
        a, b = (b[0], a[1]), (a[0], b[1])
    expected = []
    for child in (a, b):
        hit = rng.random(2) < 0.5
        values = [
            int(rng.integers(low, high, endpoint=True)) if redrawn else value
            for redrawn, value, (low, high) in zip(hit, child, ((1, 58), (0, 18)), strict=True)
        ]
        expected.append((values[0], min(values)))
    assert offspring(strategy, record) == expected


def test_crossover_exchanges_genes_of_both_parents() -> None:
    settings: dict[str, Any] = {
        "pop": 2,
        "n_elites": 0,
        "tournament_size": 1,
        "crossover_prob": 1.0,
    }
    record = trials(make(), (A, 0.1), (B, 0.2))
    children = {frozenset(offspring(make(seed=seed, **settings), record)) for seed in range(40)}
    assert children == {frozenset({A}), frozenset({B}), frozenset({(50, 2), (51, 1)})}


def test_elites_of_all_generations_are_parents_again() -> None:
    one, none = make(n_elites=1, pop=3), make(n_elites=0, pop=3)
    first = [(A, 0.1), (B, 0.2), (C, 0.3)]
    worse = [(D, 0.9), (E, 0.8)]
    record = trials(one, *first, *worse, *worse, *worse)
    assert offspring(one, record) == [A, A]
    record = trials(none, *first, *worse, (C, 0.7), *worse, (B, None))
    assert offspring(none, record) == [E, E, E]


def test_the_best_is_never_lost() -> None:
    strategy = make(pop=6, n_elites=1, tournament_size=1, mutation_prob=0.9)
    record = run(strategy, 60, lambda chromosome: 1 / (chromosome[0] + chromosome[1] / 100))
    best = min(record, key=lambda trial: (trial.value, trial.number))
    copies = make(pop=6, n_elites=1)
    assert set(offspring(copies, record[: strategy.horizon(59)])) <= {LAYERS.from_dict(best.params)}


def test_elites_are_distinct_chromosomes() -> None:
    """A was evaluated twice; the second elite is B. (5, 9) is (5, 5), and an individual once."""
    record = trials(make(), (A, 0.1), (A, 0.2), (B, 0.3), ((5, 9), 0.4), (C, 0.8), (D, 0.9))
    parents = {
        child
        for seed in range(60)
        for child in offspring(make(n_elites=2, tournament_size=1, seed=seed), record)
    }
    assert parents == {A, B, C, D}  # both elites and generation 1's own
    record = trials(make(), ((5, 9), 0.1), ((5, 5), 0.2), (B, 0.3), (A, 0.4), (C, 0.8), (D, 0.9))
    parents = {
        child
        for seed in range(60)
        for child in offspring(make(n_elites=2, tournament_size=1, seed=seed), record)
    }
    assert parents == {(5, 5), B, C, D}


def test_ties_go_to_the_lower_number() -> None:
    strategy = make()
    assert offspring(strategy, trials(strategy, (B, 0.5), (A, 0.5), (C, 0.5), (D, 0.6)))[0] == B


def test_a_generation_of_failures_still_has_offspring() -> None:
    strategy = make()
    assert offspring(strategy, trials(strategy, (B, None), (A, None), (C, None), (D, None))) == (
        [B, B, B]
    )


def test_an_odd_last_child_is_dropped() -> None:
    settings: dict[str, Any] = {
        "tournament_size": 2,
        "crossover_prob": 1.0,
        "mutation_prob": 0.5,
        "pop": 5,
    }
    record = trials(make(), (A, 0.1), (B, 0.2), (C, 0.3), (D, 0.4), (E, 0.5))
    even = offspring(make(n_elites=1, **settings), record)  # 4 children
    odd = offspring(make(n_elites=2, **settings), record)  # 3: the same pairs, one child fewer
    assert len(even) == 4
    assert odd == even[:3]


def test_a_known_child_is_mutated_again() -> None:
    settings: dict[str, Any] = {"pop": 8, "mutation_prob": 0.3, "seed": 1}
    known = [(A, 0.1), (B, 0.2), (C, 0.3), (D, 0.4), (E, 0.5), (A, 0.6), (B, 0.7), (C, 0.8)]
    record = trials(make(), *known)
    kept = offspring(make(duplicate_retries=0, **settings), record)
    retried = offspring(make(duplicate_retries=200, **settings), record)
    assert A in kept
    assert len(set(retried)) == len(retried)
    assert not set(retried) & {A, B, C, D, E}


def test_siblings_differ_as_long_as_there_is_anything_new() -> None:
    small = SearchSpace((Gene("included_layers", 1, 4), Gene("frozen_layers", 0, 1)))
    record = trials(make(small), ((1, 0), 0.1), ((1, 1), 0.2))
    for seed in range(5):
        strategy = make(
            small, seed=seed, pop=8, n_elites=2, mutation_prob=0.5, duplicate_retries=500
        )
        children = offspring(strategy, [*record, *trials(strategy, *[((1, 0), 0.3)] * 8)[2:]])
        assert sorted(children) == [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]


def test_an_unrepaired_record_is_read_repaired() -> None:
    """Another sampler's (5, 18) means (5, 5), as a parent and as a known chromosome."""
    record = trials(make(), ((5, 18), 0.1), ((50, 1), 0.2))
    settings: dict[str, Any] = {"pop": 2, "n_elites": 0, "tournament_size": 1}
    children = {
        child
        for seed in range(40)
        for child in offspring(make(seed=seed, crossover_prob=1.0, **settings), record)
    }
    assert children == {(5, 5), (50, 1), (5, 1), (50, 5)}
    children = {
        child
        for seed in range(40)
        for child in offspring(
            make(seed=seed, mutation_prob=0.5, duplicate_retries=200, **settings), record
        )
    }
    assert not children & {(5, 5), (50, 1)}


def test_retries_end_where_nothing_new_can_come() -> None:
    fixed = SearchSpace((Gene("included_layers", 5, 5), Gene("frozen_layers", 2, 2)))
    strategy = make(fixed, mutation_prob=1.0, crossover_prob=1.0, duplicate_retries=1000)
    record = run(strategy, 13, lambda _: 0.5)
    assert {fixed.from_dict(trial.params) for trial in record} == {(5, 2)}


def test_selection_improves_on_random_search() -> None:
    settings: dict[str, Any] = {
        "pop": 10,
        "tournament_size": 2,
        "crossover_prob": 0.9,
        "mutation_prob": 0.25,
    }

    def loss(chromosome: Chromosome) -> float:
        return abs(chromosome[0] - 40) + abs(chromosome[1] - 9)

    for seed in range(5):
        strategy = make(n_elites=2, seed=seed, duplicate_retries=5, **settings)
        losses = [loss(LAYERS.from_dict(trial.params)) for trial in run(strategy, 74, loss)]
        assert sum(losses[-8:]) / 8 < sum(losses[:10]) / 10


def test_ten_thousand_trials_cost_linear_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation is bred once, and a trial's genes are read a fixed number of times."""
    calls = {"rank_key": 0, "generator": 0, "from_dict": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("rank_key", "generator"):
        monkeypatch.setattr(genetic, name, counted(name, getattr(genetic, name)))
    monkeypatch.setattr(SearchSpace, "from_dict", counted("from_dict", SearchSpace.from_dict))
    n = 10_000
    settings: dict[str, Any] = {
        "pop": 20,
        "n_elites": 2,
        "tournament_size": 2,
        "mutation_prob": 0.25,
    }
    strategy = make(**settings)
    template = trials(strategy, (A, 0.5))[0]
    record: list[FrozenTrial] = []
    for number in range(n):
        chromosome = strategy.propose(number, record[: strategy.horizon(number)])
        trial = copy.copy(template)
        trial.number, trial.value = number, 1 / (1 + number % 97)
        trial.params = LAYERS.to_dict(chromosome)
        record.append(trial)
    assert calls["generator"] <= n
    assert calls["rank_key"] <= 2 * n
    assert calls["from_dict"] <= 4 * n
    calls.update(dict.fromkeys(calls, 0))
    fresh = make(**settings)  # resume: once through
    fresh.propose(n - 1, record[: strategy.horizon(n - 1)])
    assert calls["from_dict"] <= 3 * n
    assert calls["generator"] <= 20
