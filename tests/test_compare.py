"""The comparison of a sweep's runs: groups, table, plots, page."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gatl import compare
from gatl.chromosome import Gene, SearchSpace
from gatl.errors import UserError
from gatl.outcome import Outcome
from gatl.record import begin, open_study, tell
from gatl.strategies.optuna_sampler import OptunaSampler

SPACE = SearchSpace(
    (
        Gene("included_layers", 1, 58),
        Gene("frozen_layers", 0, 18),
        Gene("learning_rate", 1e-6, 1e-1, log=True),
        Gene("dropout", 0.1, 0.9),
    )
)


def make_run(
    folder: Path,
    overrides: list[str],
    results: list[tuple[float | None, float]],
    accuracy: float | None = None,
) -> None:
    """Make a run folder: losses (None: failed) and the seconds at which they were told."""
    from optuna.samplers import RandomSampler

    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    strategy = OptunaSampler(space=SPACE, seed=0, sampler=RandomSampler, lag=99)
    study = open_study(folder, strategy)
    for number, (loss, seconds) in enumerate(results):
        genes = SPACE.to_dict(strategy.opening(number))
        begin(study, genes, strategy.distributions())
        outcome = Outcome(val_loss=loss, val_accuracy=0.5, epochs=1, error=None if loss else "no")
        tell(study, number, outcome, seconds)
    begin(study, SPACE.to_dict(strategy.opening(99)), strategy.distributions())  # still running
    if accuracy is not None:
        (folder / "result.json").write_text(json.dumps({"test": {"accuracy": accuracy}}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two strategies with two seeds each, and one run that has just begun."""
    sweep = tmp_path / "a sweep"
    for job, (search, seed, first) in enumerate(
        [("genetic", 1, 0.9), ("genetic", 2, 0.7), ("random", 1, 1.0), ("random", 2, 0.8)]
    ):
        losses = [(first, 10.0), (None, 20.0), (first + 1, 30.0), (first / 2, 40.0 + 10 * job)]
        words = [f"search={search}", f"seed={seed}", "data=digits", "+x.y=<b>&'"]
        make_run(sweep / str(job), words, losses, accuracy=0.5 + job / 10)
    return sweep


def test_runs_that_differ_by_their_seed_are_one_group(sweep: Path) -> None:
    heading, groups = compare.grouped(compare.read_runs(sweep))
    assert heading == "search"
    assert [(g.name, len(g.runs)) for g in groups] == [("genetic", 2), ("random", 2)]
    make_run(sweep / "4", ["data=digits", "+x.y=<b>&'", "seed=3"], [])
    heading, groups = compare.grouped(compare.read_runs(sweep))
    assert (heading, groups[2].name) == ("search", "(default)")
    make_run(sweep / "5", ["search=genetic", "ga.pop=4"], [])
    heading, groups = compare.grouped(compare.read_runs(sweep))
    assert heading == ""
    assert groups[0].name == "search=genetic, data=digits, x.y=<b>&', ga.pop=(default)"
    heading, (alone,) = compare.grouped(compare.read_runs(sweep / "0"))
    assert (heading, alone.name, len(alone.runs)) == ("", "all runs", 1)


def test_jobs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for job in (10, 9, 2):
        make_run(tmp_path / str(job), [f"ga.pop={job}"], [(1.0, 1.0)])
    assert [run.folder.name for run in compare.read_runs(tmp_path)] == ["2", "9", "10"]


def test_the_row_by_hand(sweep: Path) -> None:
    row = compare.grouped(compare.read_runs(sweep))[1][0].row()
    assert row["val_loss"] == pytest.approx((0.45 + 0.35) / 2)
    assert row["val_loss_sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert row["test_accuracy"] == pytest.approx(0.55)
    assert (row["trials"], row["evaluations"], row["unfinished"]) == (4, 4, 0)
    assert row["search_seconds"] == 45.0


def test_the_best_so_far_against_trials_and_time(sweep: Path) -> None:
    genetic = compare.grouped(compare.read_runs(sweep))[1][0]
    numbers, best = genetic.by_trials()
    assert numbers.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(best, [[0.9, 0.9, 0.9, 0.45], [0.7, 0.7, 0.7, 0.35]])
    seconds, best = genetic.by_time(until=60.0)
    assert (seconds[0], seconds[-1]) == (10.0, 60.0)
    np.testing.assert_allclose(best[:, 0], [0.9, 0.7])
    np.testing.assert_allclose(best[:, -1], [0.45, 0.35])
    halved = [seconds[np.argmax(run < 0.5)] for run in best]
    np.testing.assert_allclose(halved, [40.0, 50.0], atol=0.11)


def test_a_run_that_ends_early_keeps_what_it_has_and_one_without_results_is_named(
    sweep: Path,
) -> None:
    make_run(sweep / "4", ["search=tpe", "seed=1"], [(None, 5.0)])
    (sweep / "5").mkdir()
    (sweep / "5" / "study.journal").touch()  # of a run that is only beginning
    _, groups = compare.grouped(compare.read_runs(sweep))
    row = groups[2].row()
    assert (row["val_loss"], row["test_accuracy"], row["unfinished"]) == (None, None, 1)
    assert groups[2].by_trials()[0].size == groups[2].by_time(60.0)[0].size == 0
    assert compare._ranked(groups)[-1]["val_loss"] is None
    compare.compare(sweep)


def test_table_page_picture_and_csv(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in (sweep / "0").iterdir())
    compare.compare(sweep)
    assert sorted(path.name for path in (sweep / "0").iterdir()) == before
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert out.index("genetic") < out.index("random")
    assert "0.4000 ± 0.0707" in out
    assert "55.0% ± 7.1%" in out
    page = (sweep / "compare.html").read_text()
    assert page.count("<svg") == 1
    assert "<th>search</th>" in page
    assert "<td>genetic</td>" in page
    for outside in ("http:", "https:", "src="):  # but for names of XML's
        allowed = page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "")
        allowed = allowed.replace("http://purl.org", "").replace("http://creativecommons.org", "")
        assert outside not in allowed
    with Image.open(sweep / "compare.png") as image:
        assert image.width > 1000
    rows = list(csv.DictReader((sweep / "compare.csv").read_text().splitlines()))
    assert [row["group"] for row in rows] == ["genetic", "random"]
    assert float(rows[0]["val_loss"]) == pytest.approx(0.4)
    assert not (sweep / "compare.svg").exists()


def test_markup_in_overrides_is_text(sweep: Path) -> None:
    make_run(sweep / "4", ["+x.y=<script>alert(1)</script>"], [(1.0, 1.0)])
    compare.compare(sweep)
    page = (sweep / "compare.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(UserError, match="holds no run"):
        compare.read_runs(tmp_path)
    for words in ([], ["runs=nowhere"], ["runs=a", "runs=b"], [f"runs={tmp_path}"]):
        monkeypatch.setattr("sys.argv", ["gatl.compare", *words])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        assert ended.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["gatl.compare", "--help"])
    compare.main()
    assert "runs=multirun/DATE/TIME" in capsys.readouterr().out
