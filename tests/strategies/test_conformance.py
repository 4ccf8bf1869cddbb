"""What every strategy must keep, whatever it searches by.

A strategy is a pure function of (seed, number, record). A new one adds a line
to `STRATEGIES`.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatl.chromosome import Chromosome, Gene, SearchSpace
from gatl.strategies.base import Strategy
from gatl.strategies.genetic import Genetic

optuna.logging.set_verbosity(optuna.logging.ERROR)
INITIAL = ({"included_layers": 58, "frozen_layers": 0, "learning_rate": 1e-3}, {"dropout": 0.5})
Make = Callable[[SearchSpace, int], Strategy]


def genetic(space: SearchSpace, seed: int) -> Strategy:
    return Genetic(
        space=space,
        seed=seed,
        initial=INITIAL,
        pop=5,
        tournament_size=2,
        crossover_prob=0.9,
        mutation_prob=0.25,
        n_elites=2,
        duplicate_retries=3,
    )


STRATEGIES: dict[str, Make] = {"genetic": genetic}


@pytest.fixture(params=list(STRATEGIES))
def make(request: pytest.FixtureRequest) -> Make:
    return STRATEGIES[request.param]


def new_study(strategy: Strategy, storage: BaseStorage | None = None) -> optuna.Study:
    return optuna.create_study(
        study_name="gatl", storage=storage, sampler=strategy, load_if_exists=True
    )


def tell(study: optuna.Study, trial: FrozenTrial) -> None:
    """End a trial in a way that follows from its number and genes, now and then badly."""
    loss = abs(math.log10(trial.params["learning_rate"]) + 3) + trial.params["dropout"]
    if trial.number % 5 == 3:
        study.tell(trial.number, state=TrialState.FAIL)
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
    for _ in range(len(study.trials), n_trials):
        number = study.ask(fixed_distributions=strategy.distributions()).number
        tell(study, study.trials[number])
    return [tuple(t.params[name] for name in strategy.space.names) for t in study.trials]


def test_the_same_seed_gives_the_same_search_and_another_seed_another(
    make: Make, space: SearchSpace
) -> None:
    first = search(make(space, 7), 20)
    assert search(make(space, 7), 20) == first
    assert search(make(space, 8), 20) != first


def test_another_process_finds_the_same(make: Make, space: SearchSpace, tmp_path: Path) -> None:
    script = (
        "import importlib.util, json, sys\n"
        "def load(name, path):\n"
        "    spec = importlib.util.spec_from_file_location(name, path)\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    return module\n"
        "tests = load('conformance', sys.argv[1])\n"
        "space = tests.SearchSpace(tuple(tests.Gene(*gene) for gene in json.loads(sys.argv[2])))\n"
        "found = tests.search(getattr(tests, sys.argv[3])(space, 7), 15)\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(found))\n"
    )
    genes = json.dumps([[gene.name, gene.low, gene.high, gene.log] for gene in space.genes])
    done = subprocess.run(
        [sys.executable, "-c", script, __file__, genes, make.__name__],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [tuple(values) for values in json.loads(done.stdout)] == search(make(space, 7), 15)


@pytest.mark.parametrize("fresh_after", range(1, 15))
def test_a_resumed_search_is_the_one_never_killed(
    make: Make, space: SearchSpace, tmp_path: Path, fresh_after: int
) -> None:
    journal = str(tmp_path / "study.journal")
    strategy = make(space, 3)
    search(strategy, fresh_after, new_study(strategy, JournalStorage(JournalFileBackend(journal))))
    strategy = make(space, 3)  # a fresh object on a freshly opened journal
    study = new_study(strategy, JournalStorage(JournalFileBackend(journal)))
    assert search(strategy, 15, study) == search(make(space, 3), 15)


def test_a_used_object_serves_another_study(make: Make, space: SearchSpace) -> None:
    strategy = make(space, 3)
    study = new_study(strategy)
    for number in range(20):  # the same numbers with other outcomes
        study.ask(fixed_distributions=strategy.distributions())
        study.tell(number, 1 / (1 + number))
    assert search(strategy, 20) == search(make(space, 3), 20)


def test_the_order_of_asking_and_ending_does_not_matter(make: Make, space: SearchSpace) -> None:
    """All trials whose horizon allows it are asked at once and end in the opposite order."""
    strategy = make(space, 5)
    study = new_study(strategy)
    running: list[int] = []
    while len(study.trials) < 20 or running:
        asked = len(study.trials)
        if asked < 20 and all(number >= strategy.horizon(asked) for number in running):
            running.append(study.ask(fixed_distributions=strategy.distributions()).number)
        else:
            tell(study, study.trials[running.pop()])
    found = [tuple(trial.params[name] for name in space.names) for trial in study.trials]
    assert found == search(make(space, 5), 20)


def test_proposals_are_a_function_of_their_arguments(make: Make, space: SearchSpace) -> None:
    strategy = make(space, 5)
    study = new_study(strategy)
    expected = search(strategy, 20, study)
    record = study.trials  # deep copies: equal, but other objects
    for number in reversed(range(20)):
        assert strategy.propose(number, record[: strategy.horizon(number)]) == expected[number]
    assert strategy.propose(19, record[: strategy.horizon(19)]) == expected[19]
    other = study.trials[: strategy.horizon(19)]  # as long, with other outcomes
    for trial in other:
        trial.state, trial.value = TrialState.COMPLETE, 1 / (1 + trial.number)
    assert strategy.propose(19, other) == make(space, 5).propose(19, other) != expected[19]


def test_horizon_is_never_beyond_the_trial(make: Make, space: SearchSpace) -> None:
    strategy = make(space, 0)
    assert all(0 <= strategy.horizon(number) <= number for number in range(100))
    assert strategy.horizon(0) == 0


def test_asking_too_early_is_refused(make: Make, space: SearchSpace) -> None:
    strategy = make(space, 0)
    study = new_study(strategy)
    number = next(number for number in range(100) if strategy.horizon(number))
    for _ in range(number):
        study.ask()
    with pytest.raises(RuntimeError, match=rf"Trial {number} depends on .* trial 0 is RUNNING"):
        study.ask(fixed_distributions=strategy.distributions())


def test_both_ways_of_asking_give_every_gene_exactly(make: Make, space: SearchSpace) -> None:
    fixed = Gene("learning_rate", 1e-3, 1e-3)
    added = Gene("weight_decay", 1e-6, 1e-2, log=True)
    space = SearchSpace((*space.genes[:2], fixed, space.genes[3], added))
    strategy = make(space, 1)
    study = new_study(strategy)
    for number in range(12):
        trial = study.ask()
        record = study.get_trials(deepcopy=False)[: strategy.horizon(number)]
        proposed = space.to_dict(strategy.propose(number, record))
        assert trial.relative_params == proposed
        for name, distribution in strategy.distributions().items():
            trial._suggest(name, distribution)
        params = study.trials[number].params
        assert params == proposed
        assert [type(params[gene.name]) for gene in space.genes] == [g.kind for g in space.genes]
        assert params["learning_rate"] == 1e-3
        study.tell(number, params["weight_decay"])


@pytest.mark.parametrize("n_recorded", range(5))
def test_a_trial_killed_during_ask_gets_the_same_genes(
    make: Make, space: SearchSpace, n_recorded: int
) -> None:
    expected = search(make(space, 2), 9)
    strategy = make(space, 2)
    study = new_study(strategy)
    search(strategy, 8, study)
    killed = study.ask()
    recorded = list(strategy.distributions().items())[:n_recorded]
    for name, distribution in recorded:
        killed._suggest(name, distribution)
    study.sampler = make(space, 2)
    again = optuna.Trial(study, killed._trial_id)
    for name, distribution in strategy.distributions().items():
        again._suggest(name, distribution)
    assert tuple(study.trials[8].params[name] for name in space.names) == expected[8]


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
    strategy = data.draw(st.sampled_from(list(STRATEGIES.values())))(
        space, data.draw(st.integers(0, 2**32 - 1))
    )
    states = data.draw(st.sampled_from([(1,), (2,), (3,), (1, 2, 3)]))
    record: list[FrozenTrial] = []
    for number in range(data.draw(st.integers(1, 20))):
        proposed = strategy.propose(number, record[: strategy.horizon(number)])
        assert proposed == space.repair(proposed)
        assert [type(value) for value in proposed] == [gene.kind for gene in space.genes]
        params = space.to_dict(proposed)
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
    make: Make, space: SearchSpace, tmp_path: Path
) -> None:
    strategy = make(space, 6)

    def opened() -> optuna.Study:
        return new_study(strategy, JournalStorage(JournalFileBackend(str(tmp_path / "j"))))

    asked = search(strategy, 10, opened())
    read: Sequence[FrozenTrial] = opened().trials
    assert [tuple(trial.params[name] for name in space.names) for trial in read] == asked
    assert isinstance(read[0].distributions["dropout"], FloatDistribution)
