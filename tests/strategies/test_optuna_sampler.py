"""Optuna's samplers behind gatl's interface, against Optuna itself."""

import functools
import math
from typing import Any

import optuna
import pytest
from optuna.samplers import CmaEsSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatl.chromosome import SearchSpace
from gatl.errors import UserError
from gatl.strategies.optuna_sampler import OptunaSampler
from gatl.streams import Purpose, generator

optuna.logging.set_verbosity(optuna.logging.ERROR)
SEED = 5


def loss_of(genes: dict[str, Any]) -> float:
    return abs(math.log10(genes["learning_rate"]) + 3) + genes["dropout"]


def by_gatl(strategy: OptunaSampler, n: int) -> list[FrozenTrial]:
    """Search without a study of gatl's; every fourth trial fails, every fifth is stopped early."""
    record: list[FrozenTrial] = []
    for number in range(n):
        horizon = strategy.horizon(number)
        pending = [strategy.space.from_dict(t.params) for t in record[horizon:]]
        genes = strategy.space.to_dict(strategy.propose(number, record[:horizon], pending))
        state = state_of(number)
        trial = create_trial(
            state=state,
            value=loss_of(genes) if state is TrialState.COMPLETE else None,
            params=genes,
            distributions=strategy.distributions(),
            user_attrs={"outcome": {"epochs": 2, "val_loss": loss_of(genes)}},
        )
        trial.number = number
        record.append(trial)
    return record


def state_of(number: int) -> TrialState:
    if number % 4 == 3:
        return TrialState.FAIL
    return TrialState.PRUNED if number % 5 == 4 else TrialState.COMPLETE


@pytest.mark.parametrize("sampler", [RandomSampler, TPESampler, CmaEsSampler, NSGAIISampler])
def test_it_is_what_optuna_would_do(space: SearchSpace, sampler: Any) -> None:
    """An Optuna study by hand, its sampler built anew for each trial."""
    n = 30
    record = by_gatl(OptunaSampler(space=space, seed=SEED, sampler=sampler, lag=0), n)
    study = optuna.create_study()
    distributions = OptunaSampler(space=space, seed=0, sampler=sampler, lag=0).distributions()
    for number in range(n):
        seed = int(generator(SEED, Purpose.SAMPLER, number).integers(2**32))
        study.sampler = sampler(seed=seed)
        trial = study.ask(distributions)
        genes = space.to_dict(space.from_dict(trial.params))
        assert genes == record[number].params, number
        frozen = distributions["frozen_layers"]
        study._storage.set_trial_param(  # repaired
            trial._trial_id, "frozen_layers", genes["frozen_layers"], frozen
        )
        state = state_of(number)
        if state is TrialState.PRUNED:
            trial.report(loss_of(genes), 2)
        study.tell(trial, loss_of(genes) if state is TrialState.COMPLETE else None, state)


@pytest.mark.parametrize("lag", [0, 3])
def test_a_record_that_the_sampler_would_not_have_made_counts(space: SearchSpace, lag: int) -> None:
    """Another version of Optuna began the search, say: its chromosomes are what was tried."""
    strategy = OptunaSampler(space=space, seed=SEED, sampler=TPESampler, lag=lag)
    record = by_gatl(strategy, 14)
    for trial in record[:10]:
        trial.params = space.to_dict(strategy.opening(500 + trial.number))
    horizon = strategy.horizon(14)
    pending = [space.from_dict(t.params) for t in record[horizon:]]
    fresh = OptunaSampler(space=space, seed=SEED, sampler=TPESampler, lag=lag)
    fresh.propose(14, record[:horizon], pending)
    told = fresh._replay.study.trials
    for trial in record:
        assert space.from_dict(told[trial.number].params) == space.from_dict(trial.params)
    assert [t.state for t in told[horizon:]] == [TrialState.RUNNING] * (lag + 1)
    assert [t.state for t in told[:horizon]] == [t.state for t in record[:horizon]]


def test_nothing_of_the_sampler_goes_into_the_record(space: SearchSpace) -> None:
    strategy = OptunaSampler(space=space, seed=SEED, sampler=CmaEsSampler, lag=0)
    study = optuna.create_study(sampler=strategy)
    for _ in range(20):
        trial = study.ask(strategy.distributions())
        study.tell(trial, loss_of(trial.params))
    assert all(not trial.system_attrs for trial in study.trials)
    assert any(trial.system_attrs for trial in strategy._replay.study.trials)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (functools.partial(NSGAIISampler, population_size=1), "population_size"),
        (functools.partial(CmaEsSampler, popsize=0), "sampler cannot work: AssertionError"),
        (functools.partial(TPESampler, n_startup_trials="abc"), "sampler cannot work: TypeError"),
        (functools.partial(TPESampler, seed=3), "seed"),
        (None, "_partial_: true, but got None"),
    ],
)
def test_what_is_wrong_with_a_sampler_is_known_at_once(space, sampler, message) -> None:
    with pytest.raises(ValueError, match=message):
        OptunaSampler(space=space, seed=0, sampler=sampler, lag=0)
    with pytest.raises(ValueError, match="lag must be"):
        OptunaSampler(space=space, seed=0, sampler=RandomSampler, lag=-1)


def test_what_a_sampler_raises_later_is_one_line(space: SearchSpace) -> None:
    sampler = functools.partial(TPESampler, n_ei_candidates=0)
    with pytest.raises(
        UserError, match=r"search\.sampler cannot say what trial 1\d is: IndexError"
    ):
        by_gatl(OptunaSampler(space=space, seed=0, sampler=sampler, lag=0), 20)
