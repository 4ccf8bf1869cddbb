"""What every strategy must keep, whatever it searches by.

A strategy is a pure function of (seed, number, record). Every YAML in conf/search is
one; a new one adds a line to `SMALL`.
"""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

import gatl.conf
from gatl.chromosome import Chromosome, Gene, SearchSpace
from gatl.cli import compose
from gatl.config import checked
from gatl.strategies.base import Strategy

optuna.logging.set_verbosity(optuna.logging.ERROR)
INITIAL = ({"included_layers": 58, "frozen_layers": 0, "learning_rate": 1e-3}, {"dropout": 0.5})
Make = Callable[[SearchSpace, int], Strategy]

# What makes each strategy show in a few trials what it does.
SMALL = {
    "genetic": ["ga.pop=5", "ga.n_elites=2", "ga.duplicate_retries=3"],
    "steady_state": ["ga.mode=steady_state", "ga.pop=4", "search.lag=2"],
    "annealing": ["search.chains=2", "search.n_opening=2", "search.patience=2"],
    "regularized_evolution": ["search.population_size=4", "search.lag=2"],
    "tpe": ["search.lag=2", "+search.sampler.n_startup_trials=4"],
    "cmaes": ["search.lag=2"],
    "gp": ["search.lag=2", "+search.sampler.n_startup_trials=4"],
    "nsga2": ["search.lag=2", "ga.pop=4"],
    "random": ["search.lag=3"],
}
YAMLS = sorted(path.stem for path in (Path(gatl.conf.__file__).parent / "search").glob("*.yaml"))
STRATEGIES = [*YAMLS, "steady_state"]
SLOW = {"gp"}
"""It thinks for a good part of a second a trial."""
BLIND = {"random"}
"""It looks at no result."""


@functools.cache
def settings_of(name: str) -> dict[str, Any]:
    search = "genetic" if name == "steady_state" else name
    return checked(compose([f"search={search}", *SMALL[name]])).search


def build(name: str, space: SearchSpace, seed: int) -> Strategy:
    """Build a strategy as a run does, from its YAML."""
    partial = instantiate(settings_of(name), _partial_=True, _convert_="all")
    strategy: Strategy = partial(space=space, seed=seed, initial=INITIAL)
    return strategy


@pytest.fixture(params=STRATEGIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def trials_of(name: str) -> int:
    """Return how many trials show what a strategy does."""
    return 8 if name in SLOW else 16


@pytest.fixture
def n(name: str) -> int:
    return trials_of(name)


@pytest.fixture
def make(name: str) -> Make:
    return functools.partial(build, name)


def proposed(strategy: Strategy, number: int, trials: Sequence[FrozenTrial]) -> Chromosome:
    """Return what a trial is, given all trials below it."""
    horizon = strategy.horizon(number)
    pending = [strategy.space.from_dict(trial.params) for trial in trials[horizon:number]]
    return strategy.propose(number, list(trials[:horizon]), pending)


def test_every_strategy_is_tested() -> None:
    assert set(SMALL) == set(STRATEGIES)


def new_study(strategy: Strategy, storage: BaseStorage | None = None) -> optuna.Study:
    return optuna.create_study(
        study_name="gatl", storage=storage, sampler=strategy, load_if_exists=True
    )


def tell(study: optuna.Study, trial: FrozenTrial) -> None:
    """End a trial in a way that follows from its number and genes, now and then badly."""
    loss = abs(math.log10(trial.params["learning_rate"]) + 3) + trial.params["dropout"]
    if trial.number % 5 == 3:
        study.tell(trial.number, state=TrialState.FAIL)
    elif trial.number % 11 == 5:
        with pytest.warns(UserWarning, match="nan is not acceptable"):
            study.tell(trial.number, math.nan)  # which makes it FAIL
    elif trial.number % 7 == 4:
        study._storage.set_trial_user_attr(
            trial._trial_id, "outcome", {"epochs": trial.number % 3, "val_loss": loss}
        )
        study.tell(trial.number, state=TrialState.PRUNED)
    else:
        study.tell(trial.number, loss)


def search(
    strategy: Strategy, n_trials: int, study: optuna.Study | None = None
) -> list[Chromosome]:
    """Run a search, or go on with one, and return the chromosomes in the order of numbers."""
    study = study or new_study(strategy)
    study.sampler = strategy
    for _ in range(len(study.get_trials(deepcopy=False)), n_trials):
        number = study.ask(fixed_distributions=strategy.distributions()).number
        tell(study, study.get_trials(deepcopy=False)[number])
    record = study.get_trials(deepcopy=False)
    return [tuple(t.params[name] for name in strategy.space.names) for t in record]


@functools.cache
def never_stopped(name: str, space: SearchSpace, n: int) -> list[Chromosome]:
    """Return a search of seed 5 in one go, made once a process."""
    return search(build(name, space, 5), n)


def test_the_same_seed_gives_the_same_search_and_another_seed_another(
    name: str, make: Make, space: SearchSpace, n: int
) -> None:
    assert search(make(space, 5), n) == never_stopped(name, space, n)
    assert search(make(space, 8), n) != never_stopped(name, space, n)


def test_another_process_finds_the_same(space: SearchSpace) -> None:
    script = (
        "import importlib.util, json, sys\n"
        "def load(name, path):\n"
        "    spec = importlib.util.spec_from_file_location(name, path)\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    return module\n"
        "tests = load('conformance', sys.argv[1])\n"
        "space = tests.SearchSpace(tuple(tests.Gene(*gene) for gene in json.loads(sys.argv[2])))\n"
        "for name, n in json.loads(sys.argv[3]):\n"
        "    found = tests.search(tests.build(name, space, 5), n)\n"
        "    assert name == 'gp' or 'torch' not in sys.modules, name\n"
        "    print(json.dumps(found))\n"
    )
    asked = [(name, trials_of(name)) for name in sorted(STRATEGIES, key=SLOW.__contains__)]
    genes = json.dumps([[gene.name, gene.low, gene.high, gene.log] for gene in space.genes])
    done = subprocess.run(
        [sys.executable, "-c", script, __file__, genes, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
    )
    for (name, n), line in zip(asked, done.stdout.splitlines(), strict=True):
        found = [tuple(values) for values in json.loads(line)]
        assert found == never_stopped(name, space, n), name


def test_resumed_after_any_trial_it_is_the_search_never_killed(
    name: str, make: Make, space: SearchSpace, tmp_path: Path, n: int, monkeypatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug
    for fresh_after in (6,) if name in SLOW else (1, 4, 7, 11, 14):
        journal = str(tmp_path / f"{fresh_after}.journal")
        strategy = make(space, 5)
        backend = JournalFileBackend(journal)
        search(strategy, fresh_after, new_study(strategy, JournalStorage(backend)))
        strategy = make(space, 5)  # a fresh object on a freshly opened journal
        study = new_study(strategy, JournalStorage(JournalFileBackend(journal)))
        assert search(strategy, n, study) == never_stopped(name, space, n)


def test_a_used_object_serves_another_study(
    name: str, make: Make, space: SearchSpace, n: int
) -> None:
    strategy = make(space, 5)
    study = new_study(strategy)
    for number in range(n):  # the same numbers with other outcomes
        study.ask(fixed_distributions=strategy.distributions())
        study.tell(number, 1 / (1 + number))
    assert search(strategy, n) == never_stopped(name, space, n)


def test_the_order_of_asking_and_ending_does_not_matter(
    name: str, make: Make, space: SearchSpace, n: int
) -> None:
    """All trials whose horizon allows it are asked at once and end in the opposite order."""
    strategy = make(space, 5)
    study = new_study(strategy)
    running: list[int] = []
    while len(study.trials) < n or running:
        asked = len(study.trials)
        if asked < n and all(number >= strategy.horizon(asked) for number in running):
            running.append(study.ask(fixed_distributions=strategy.distributions()).number)
        else:
            tell(study, study.get_trials(deepcopy=False)[running.pop()])
    found = [tuple(trial.params[name] for name in space.names) for trial in study.trials]
    assert found == never_stopped(name, space, n)


def test_proposals_are_a_function_of_their_arguments(
    name: str, make: Make, space: SearchSpace, n: int
) -> None:
    strategy = make(space, 5)
    study = new_study(strategy)
    expected = search(strategy, n, study)
    record = study.trials  # deep copies: equal, but other objects
    for number in reversed(range(n)):
        assert proposed(strategy, number, record) == expected[number]
    last = n - 1
    assert proposed(strategy, last, record) == expected[last]
    other = study.trials  # as many, with other outcomes
    for trial in other:
        trial.state, trial.value = TrialState.COMPLETE, 1 / (1 + trial.number)
    found = proposed(strategy, last, other)
    assert found == proposed(make(space, 5), last, other)
    assert name in BLIND or found != expected[last]


def test_what_lies_beyond_the_horizon_does_not_matter(
    name: str, make: Make, space: SearchSpace, n: int
) -> None:
    """The trials there run still, where in the search that is expected they have ended."""
    strategy = make(space, 5)
    study = new_study(strategy)
    for number in range(n):
        study.ask(fixed_distributions=strategy.distributions())
        if number < strategy.horizon(n - 1):
            tell(study, study.trials[number])
    found = [tuple(trial.params[gene] for gene in space.names) for trial in study.trials]
    assert found == never_stopped(name, space, n)
    running = [trial.state for trial in study.trials].count(TrialState.RUNNING)
    assert running == n - strategy.horizon(n - 1)


def test_horizon_is_never_beyond_the_trial(make: Make, space: SearchSpace) -> None:
    strategy = make(space, 0)
    assert all(0 <= strategy.horizon(number) <= number for number in range(100))
    assert strategy.horizon(0) == 0


def test_asking_too_early_is_refused(make: Make, space: SearchSpace) -> None:
    strategy = make(space, 0)
    study = new_study(strategy)
    number = next(number for number in range(100) if strategy.horizon(number))
    for _ in range(number):
        study.ask(fixed_distributions=strategy.distributions())
    with pytest.raises(RuntimeError, match=rf"Trial {number} depends on .* trial 0 is RUNNING"):
        study.ask(fixed_distributions=strategy.distributions())


def test_both_ways_of_asking_give_every_gene_exactly(
    make: Make, space: SearchSpace, n: int
) -> None:
    fixed = Gene("learning_rate", 1e-3, 1e-3)
    added = Gene("weight_decay", 1e-6, 1e-2, log=True)
    space = SearchSpace((*space.genes[:2], fixed, space.genes[3], added))
    strategy = make(space, 1)
    study = new_study(strategy)
    for number in range(min(n, 12)):
        genes = space.to_dict(proposed(strategy, number, study.get_trials(deepcopy=False)))
        trial = study.ask()
        assert trial.relative_params == genes
        for name, distribution in strategy.distributions().items():
            trial._suggest(name, distribution)
        params = study.trials[number].params
        assert params == genes
        assert [type(params[gene.name]) for gene in space.genes] == [g.kind for g in space.genes]
        assert params["learning_rate"] == 1e-3
        study.tell(number, params["weight_decay"])


def test_a_trial_killed_during_ask_gets_the_same_genes(make: Make, space: SearchSpace) -> None:
    expected = search(make(space, 2), 7)
    for n_recorded in range(5):
        strategy = make(space, 2)
        study = new_study(strategy)
        search(strategy, 6, study)
        killed = study.ask()
        recorded = list(strategy.distributions().items())[:n_recorded]
        for gene, distribution in recorded:
            killed._suggest(gene, distribution)
        study.sampler = make(space, 2)
        again = optuna.Trial(study, killed._trial_id)
        for gene, distribution in strategy.distributions().items():
            again._suggest(gene, distribution)
        assert tuple(study.trials[6].params[gene] for gene in space.names) == expected[6]


def test_a_parameter_outside_the_space_is_refused(make: Make, space: SearchSpace) -> None:
    trial = new_study(make(space, 0)).ask()
    with pytest.raises(ValueError, match="momentum must be a gene of the space"):
        trial.suggest_float("momentum", 0, 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_proposal_is_canonical_whatever_the_record(
    spaces: st.SearchStrategy[SearchSpace], data: st.DataObject
) -> None:
    """Any space, ties, every state, and chromosomes of another sampler, unrepaired."""
    space = data.draw(spaces)
    name = data.draw(st.sampled_from([name for name in STRATEGIES if name not in SLOW]))
    strategy = build(name, space, data.draw(st.integers(0, 2**32 - 1)))
    states = data.draw(st.sampled_from([(1,), (2,), (3,), (1, 2, 3)]))
    record: list[FrozenTrial] = []
    for number in range(data.draw(st.integers(1, 20))):
        found = proposed(strategy, number, record)
        assert found == space.repair(found)
        assert [type(value) for value in found] == [gene.kind for gene in space.genes]
        params = space.to_dict(found)
        if data.draw(st.booleans()):
            params["frozen_layers"] = next(
                gene.high for gene in space.genes if gene.name == "frozen_layers"
            )
        loss = data.draw(st.sampled_from([0.0, 0.5, 0.5, math.inf]))
        state = TrialState(data.draw(st.sampled_from(states)))
        ended = create_trial(
            state=state,
            value=loss if state is TrialState.COMPLETE else None,
            params=params,
            distributions=strategy.distributions(),
            user_attrs={"outcome": {"epochs": data.draw(st.integers(1, 3)), "val_loss": loss}},
        )
        ended.number = number
        record.append(ended)


def test_initial_chromosomes_come_first_and_are_completed(make: Make, space: SearchSpace) -> None:
    found = search(make(space, 4), 2)
    assert found[0][:3] == (58, 0, 1e-3)
    assert 0.1 < found[0][3] < 0.9
    assert found[1][3] == 0.5


def test_initial_chromosomes_are_clipped(make: Make) -> None:
    space = SearchSpace(
        (
            Gene("included_layers", 1, 12),
            Gene("frozen_layers", 1, 6),
            Gene("learning_rate", 1e-2, 1e-1, log=True),
            Gene("dropout", 0.6, 0.9),
        )
    )
    found = search(make(space, 4), 2)
    assert found[0][:3] == (12, 1, 1e-2)
    assert found[1][3] == 0.6


def test_the_record_survives_the_journal_to_the_bit(
    make: Make, space: SearchSpace, tmp_path: Path, n: int
) -> None:
    strategy = make(space, 6)

    def opened() -> optuna.Study:
        return new_study(strategy, JournalStorage(JournalFileBackend(str(tmp_path / "j"))))

    asked = search(strategy, min(n, 10), opened())
    read: Sequence[FrozenTrial] = opened().trials
    assert [tuple(trial.params[name] for name in space.names) for trial in read] == asked
    assert isinstance(read[0].distributions["dropout"], FloatDistribution)
