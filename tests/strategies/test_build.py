"""What is wrong with a strategy's settings is one line, and known before anything runs."""

import pytest

from gatl import __main__
from gatl.cli import compose
from gatl.config import checked
from gatl.errors import UserError
from gatl.strategies.build import build_strategy

MISTAKES = {
    ("search=annealing", "search.chains=0"): r"chains must be a whole number in \[1, 1000000\]",
    ("search=annealing", "search.cooling=null"): r"cooling must be a number in \(0, 1\]",
    ("search=annealing", "search.step=.nan"): r"step must be a number in \(0, 1000\]",
    (
        "search=regularized_evolution",
        "search.lag=-1",
    ): r"lag must be a whole number in \[0, 1000000\]",
    ("search.lag=abc",): r"lag must be a whole number in \[0, 1000000\], but got 'abc'",
    ("search=tpe", "search.sampler=null"): "sampler must have a _target_",
    ("search=tpe", "+search.sampler.seed=3"): "sampler.seed cannot be set",
    ("search=tpe", "+search.sampler.no_such=3"): "no_such",
    ("search=cmaes", "+search.sampler.popsize=0"): "popsize must be non-zero",
    ("search=random", "search.sampler._target_=optuna.samplers.NoSuch"): "NoSuch",
    ("+search.no_such=3",): "no_such",
    ("search.mutation_step=-1",): r"mutation_step must be a number in \(0, 1000\], but got -1",
    ("ga.mutation_step=1e308",): r"mutation_step must be a number in \(0, 1000\]",
    ("search.crossover_prob=abc",): r"crossover_prob must be a number in \[0, 1\], but got 'abc'",
    ("search.mutation_prob=[1]",): r"mutation_prob must be a number in \[0, 1\], but got \[1\]",
    ("search.tournament_size=0",): r"tournament_size must be a whole number in \[1, 1000000\]",
    ("search.duplicate_retries=x",): r"duplicate_retries must be a whole number in \[0, 1000000\]",
    ("search.pop=null",): r"pop must be a whole number in \[2, 1000000\], but got None",
    ("ga.mode=steady_state", "search.pop=x"): r"pop must be a whole number in \[2, 1000000\]",
    ("search=regularized_evolution", "search.sample_size=1000001"): (
        r"sample_size must be a whole number in \[1, 1000000\]"
    ),
    ("search._target_=builtins.dict",): "builtins.dict makes no strategy",
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_a_wrong_setting_is_one_line(overrides):
    with pytest.raises(UserError, match=MISTAKES[overrides]) as raised:
        build_strategy(checked(compose(overrides)))
    assert "\n" not in str(raised.value)


def test_a_wrong_setting_of_a_later_job_stops_a_sweep_before_its_first(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gatl", "-m", "search=annealing", "search.chains=4,0"])
    monkeypatch.setattr(__main__, "job", lambda: pytest.fail("a job has started"))
    with pytest.raises(SystemExit):
        __main__.main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "chains must be" in error
