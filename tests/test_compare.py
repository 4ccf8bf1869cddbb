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
    heading, groups = compare.grouped(compare.read_runs(sweep)[0])
    assert heading == "search"
    assert [(g.name, len(g.runs)) for g in groups] == [("genetic", 2), ("random", 2)]
    make_run(sweep / "4", ["data=digits", "+x.y=<b>&'", "seed=3"], [])
    heading, groups = compare.grouped(compare.read_runs(sweep)[0])
    assert (heading, groups[2].name) == ("search", "(default)")
    make_run(sweep / "5", ["search=genetic", "data=digits", "+x.y=<b>&'", "ga.pop=4"], [])
    heading, groups = compare.grouped(compare.read_runs(sweep)[0])
    assert heading == ""
    assert groups[0].name == "search=genetic, ga.pop=(default)"
    heading, (alone,) = compare.grouped(compare.read_runs(sweep / "0")[0])
    assert (heading, alone.name, len(alone.runs)) == ("", "all runs", 1)


def test_one_poor_first_result_does_not_flatten_the_curves(tmp_path: Path) -> None:
    losses = [(50.0, 1.0), *((0.9 - number / 100, 10.0 * number) for number in range(1, 9))]
    make_run(tmp_path / "0", ["search=genetic"], losses)
    make_run(tmp_path / "1", ["search=random"], losses)
    _, groups = compare.grouped(compare.read_runs(tmp_path)[0])
    compare._picture(groups, tmp_path / "p.svg", tmp_path / "p.png")
    assert ">0.84</text>" in (tmp_path / "p.svg").read_text()  # a tick of a scale from 0.82 to 0.9


def test_runs_that_differ_in_much_are_named_by_their_folders(sweep: Path, capsys) -> None:
    make_run(sweep / "4", ["data=flowers", "a=1", "b=2", "seed=3"], [(2.0, 1.0)])
    heading, groups = compare.grouped(compare.read_runs(sweep)[0])
    assert heading == "first run"
    assert [(g.name, len(g.runs)) for g in groups] == [("0", 2), ("2", 2), ("4", 1)]
    compare.compare(sweep)
    assert "The runs differ in their data" in capsys.readouterr().out
    page = (sweep / "compare.html").read_text()
    assert "<li>4: data=flowers a=1 b=2</li>" in page
    assert "The runs differ in their data" in page


def test_jobs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for job in (10, 9, 2):
        make_run(tmp_path / str(job), [f"ga.pop={job}"], [(1.0, 1.0)])
    assert [run.folder.name for run in compare.read_runs(tmp_path)[0]] == ["2", "9", "10"]


def test_the_row_by_hand(sweep: Path) -> None:
    row = compare.grouped(compare.read_runs(sweep)[0])[1][0].row()
    assert row["val_loss"] == pytest.approx((0.45 + 0.35) / 2)
    assert row["val_loss_sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert row["test_accuracy"] == pytest.approx(0.55)
    assert (row["trials"], row["evaluations"], row["unfinished"]) == (4, 4, 0)
    assert row["search_seconds"] == 45.0


def test_the_best_so_far_against_trials_and_time(sweep: Path) -> None:
    genetic = compare.grouped(compare.read_runs(sweep)[0])[1][0]
    numbers, best = genetic.by_trials()
    assert numbers.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(best, [[0.9, 0.9, 0.9, 0.45], [0.7, 0.7, 0.7, 0.35]])
    seconds, best = genetic.by_time(until=60.0)
    assert (seconds[0], seconds[-1]) == (10.0, 60.0)
    np.testing.assert_allclose(best[:, 0], [0.9, 0.7])
    np.testing.assert_allclose(best[:, -1], [0.45, 0.35])
    halved = [seconds[np.argmax(run < 0.5)] for run in best]
    np.testing.assert_allclose(halved, [40.0, 50.0], atol=0.11)


def test_a_run_without_results_is_named(sweep: Path, capsys) -> None:
    make_run(sweep / "4", ["search=tpe", "seed=1"], [(None, 5.0)])
    (sweep / "5").mkdir()
    (sweep / "5" / "study.journal").touch()  # of a run that is only beginning
    _, groups = compare.grouped(compare.read_runs(sweep)[0])
    row = groups[2].row()
    assert (row["val_loss"], row["test_accuracy"], row["unfinished"]) == (None, None, 1)
    assert groups[2].by_trials()[1].size == groups[2].by_time(60.0)[1].size == 0
    assert compare._ranked(groups)[-1]["val_loss"] is None
    compare.compare(sweep)
    assert (
        "search=tpe, data=(default), x.y=(default): 1 of 1 run unfinished"
        in capsys.readouterr().out
    )


def test_a_run_in_the_middle_does_not_cut_the_curves_of_its_group(sweep: Path) -> None:
    words = ["search=genetic", "data=digits", "+x.y=<b>&'"]
    make_run(sweep / "4", [*words, "seed=3"], [(0.8, 12.0), (None, 900.0)])
    make_run(sweep / "5", [*words, "seed=4"], [])
    genetic = compare.grouped(compare.read_runs(sweep)[0])[1][0]
    numbers, best = genetic.by_trials()
    assert numbers.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(best[2], [0.8] * 4)
    row = genetic.row()
    assert (row["runs"], row["unfinished"]) == (4, 2)
    assert row["val_loss"] == pytest.approx((0.45 + 0.35 + 0.8) / 3)
    # what failed takes time too
    assert row["search_seconds"] == pytest.approx((40 + 50 + 900 + 0) / 4)
    assert genetic.by_time(900.0)[0][-1] == 900.0


def test_overrides_that_make_no_other_result_make_no_group(sweep: Path) -> None:
    words = ["search=genetic", "data=digits", "+x.y=<b>&'", "evaluator.workers=4", "logger=csv"]
    make_run(sweep / "4", [*words, "seed=3"], [(0.8, 12.0)])
    groups = compare.grouped(compare.read_runs(sweep)[0])[1]
    assert [len(group.runs) for group in groups] == [3, 2]


def test_a_default_that_is_given_is_the_default(tmp_path: Path) -> None:
    for job, words in enumerate((["ga.pop=12"], [], ["ga.pop=4"], ["search=random"], [])):
        make_run(tmp_path / str(job), words, [(1.0, 1.0)])
        hydra = tmp_path / str(job) / ".hydra"
        (hydra / "config.yaml").write_text("ga: {pop: 12, other: '${no.such.key}'}")
        (hydra / "hydra.yaml").write_text("hydra: {runtime: {choices: {search: genetic}}}")
    heading, groups = compare.grouped(compare.read_runs(tmp_path)[0])
    assert heading == ""
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("ga.pop=12, search=genetic", 3),
        ("ga.pop=4, search=genetic", 1),
        ("ga.pop=12, search=random", 1),
    ]


BROKEN = {
    "result.json": ("", "{}", '{"test": null}'),
    ".hydra/overrides.yaml": ("[a: {", "[1: 2"),
    "study.journal": ('{"op_code": 4}\n', "nonsense\n{}\n"),
}


def test_a_broken_run_does_not_cost_the_others(sweep: Path, capsys) -> None:
    words = ["search=genetic", "data=digits", "+x.y=<b>&'"]
    n = 4
    for name, contents in BROKEN.items():
        for content in contents:
            make_run(sweep / str(n), words, [(0.1, 1.0)])
            (sweep / str(n) / name).write_text(content)
            n += 1
    (sweep / str(n) / "study.journal").mkdir(parents=True)
    compare.compare(sweep)
    out = capsys.readouterr().out
    assert "0.4000 ± 0.0707" in out
    for k in range(4, n + 1):
        assert out.count(f"left out: {sweep / str(k)} (") == 1
    with pytest.raises(UserError, match="left out: "):
        compare.read_runs(sweep / str(n))


def test_dollars_and_interpolations_are_letters(sweep: Path) -> None:
    make_run(sweep / "4", [r"data.root=$\foo$", "x=${oc.env:NO_SUCH}", "y=${now:%Y}"], [(1.0, 1.0)])
    compare.compare(sweep)
    page = (sweep / "compare.html").read_text()
    assert r"data.root=$\foo$" in page
    assert "x=${oc.env:NO_SUCH}" in page


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
