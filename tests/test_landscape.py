"""The benchmarks over a recorded landscape: its table, the simulator, and what they conclude."""

import csv
import importlib
import json
import math
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import optuna
import pytest
import safetensors.torch
from optuna.trial import TrialState
from PIL import Image
from sklearn.ensemble import GradientBoostingRegressor

from gatl.cli import compose, one_line_errors
from gatl.config import checked
from gatl.errors import UserError
from gatl.evaluation import Fit
from gatl.models.se_densenet import se_densenet
from gatl.models.weight_files import CARD_KEY
from gatl.outcome import Outcome
from gatl.strategies.base import Strategy
from gatl.strategies.build import build_strategy

FOLDER = Path(__file__).parent.parent / "benchmarks"
NOISE = 0.05


@pytest.fixture(autouse=True)
def landscapes(tmp_path, monkeypatch):
    """Work in a folder of its own, landscapes included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("landscape", "simulator", "strategies"):
        monkeypatch.setattr(importlib.import_module(name), "LANDSCAPES", tmp_path / "tables")
    (tmp_path / "tables").mkdir()


def run(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *words])
    importlib.import_module(name).main()


def log_loss(genes, epoch):
    """A bowl with its ground at a learning rate of 1e-3, all layers, and no dropout to speak of."""
    depth = (58 - genes["included_layers"]) / 58
    far = math.log10(genes["learning_rate"]) + 3
    return 0.1 * far**2 + 0.3 * depth**2 + 0.1 * genes["dropout"] + 0.2 / epoch - 0.5


def write_table(path, n=96, seeds=3, noise=NOISE):
    """Write a landscape whose truth is known; those with a learning rate above 0.03 diverge."""
    config = checked(compose(["model=se_densenet121_k12"]))
    design = importlib.import_module("landscape").design(config, n)
    rng = np.random.default_rng(1)
    rows = []
    for seed in range(seeds):
        for i, genes in enumerate(design):
            if seed and i % 3:
                continue
            failed = genes["learning_rate"] > 0.03
            shift = noise * rng.standard_normal()
            losses = {
                f"val_loss_{e}": "" if failed else math.exp(log_loss(genes, e) + shift)
                for e in (1, 2, 3)
            }
            seconds = 3 * (1 + genes["included_layers"] - genes["frozen_layers"])
            rows.append(
                {
                    **{"chromosome": i, "seed": seed, **genes},
                    **{"state": "FAIL" if failed else "COMPLETE", **losses},
                    **{f"val_accuracy_{e}": "" if failed else 0.5 for e in (1, 2, 3)},
                    **{"duration_s": seconds, "trainable_params": 1, "error": ""},
                }
            )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def bowl(tmp_path):
    """A landscape of the process, and its module."""
    simulator = importlib.import_module("simulator")
    write_table(tmp_path / "tables" / "bowl.csv")
    data = simulator.read(tmp_path / "tables" / "bowl.csv")
    return simulator, data, simulator.Landscape(data, "process")


def save_photos(folder):
    rng = np.random.default_rng(0)
    for name in ("a", "dark", "light"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 128, (32, 32, 3)) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def tiny_network(weights):
    """Save weights, and return the words that make a network of them."""
    tiny = {"growth_rate": 4, "init_features": 8, "block_config": [2, 2]}
    network = se_densenet(
        4, 2, 0.0, **tiny, se_placement="block", se_init="identity", dropout_at="head"
    )
    tensors = {k: v for k, v in network.state_dict().items() if not k.startswith("classifier.")}
    card = {"se": {"placement": "block", "gate": "2*sigmoid"}}
    safetensors.torch.save_file(tensors, weights, {CARD_KEY: json.dumps(card)})
    return (
        *(f"model.network.{key}={value}".replace(" ", "") for key, value in tiny.items()),
        *("model.n_layers=4", "model.n_freezable=2", f"model.weights={weights}"),
        *("trainer.accelerator=cpu", "evaluator.workers=1", "data.batch_size=8"),
    )


def test_landscape_records_real_fits_and_goes_on(tmp_path, monkeypatch, capsys):
    save_photos(tmp_path / "photos")
    words = (
        *("root=photos", "name=tiny", "images=18", "val=9", "classes=3", "epochs=2", "size=32"),
        *tiny_network(tmp_path / "tiny.safetensors"),
        *("repeated=3", "seeds=2", "output=out"),
    )
    with pytest.raises(SystemExit), one_line_errors():
        run(monkeypatch, "landscape", *words, "fits=10")
    assert "fits must be at least 12, but got 10" in capsys.readouterr().err
    run(monkeypatch, "landscape", *words, "fits=16")
    assert "19 fits of 16 chromosomes" in capsys.readouterr().out
    with (tmp_path / "tables" / "tiny.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    genes = [
        tuple(row[name] for name in importlib.import_module("simulator").GENES) for row in rows
    ]
    assert len(set(genes[:16])) == 16
    assert [row["seed"] for row in rows] == ["0"] * 16 + ["1"] * 3
    by_number = {row["chromosome"]: row for row in rows[:16]}
    for row in rows[16:]:  # the same chromosome, another fit
        first = by_number[row["chromosome"]]
        assert row["learning_rate"] == first["learning_rate"]
        assert row["val_loss_2"] != first["val_loss_2"]
    for trial, row in enumerate(rows[:16]):
        with (tmp_path / f"out/tiny/seed0/trials/{trial}/metrics.csv").open(newline="") as file:
            log = [float(epoch["val_loss"]) for epoch in csv.DictReader(file)]
        assert [float(row[f"val_loss_{e}"]) for e in (1, 2)] == pytest.approx(log, rel=1e-5)
    losses = [float(row["val_loss_2"]) for row in rows[:16]]
    best = min(range(16), key=lambda i: min(losses[i], float(rows[i]["val_loss_1"])))
    assert rows[16]["chromosome"] == rows[best]["chromosome"]  # the first to be repeated

    before = (tmp_path / "tables" / "tiny.csv").read_bytes()
    logs = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.csv")}
    run(monkeypatch, "landscape", *words, "fits=16")
    assert (tmp_path / "tables" / "tiny.csv").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.csv")} == logs


@pytest.mark.parametrize(("n", "m"), [(256, 30), (96, 30), (16, 8), (60, 30), (5, 2), (2, 1)])
def test_what_is_repeated_is_distinct_and_mostly_good(n, m):
    ranks = importlib.import_module("landscape").repeated(n, m)
    assert ranks[0] == 0
    assert ranks == sorted(set(ranks))
    assert len(ranks) == m
    assert ranks[-1] < n
    assert sum(rank < max(n / 4, m / 2) for rank in ranks) >= m // 2


def test_a_fit_that_diverged_is_a_row_and_one_that_failed_is_none(tmp_path):
    landscape = importlib.import_module("landscape")

    def trial(**outcome):
        attributes = {"outcome": Outcome(**outcome).to_json()}
        return optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attributes)

    diverged = trial(error="val_loss is nan", diverged=True, duration_s=1.5)
    row = landscape.row(2, tmp_path, 7, 0, diverged)
    assert (row["chromosome"], row["state"], row["error"]) == (7, "FAIL", "val_loss is nan")
    assert (row["val_loss_1"], row["val_loss_2"], row["duration_s"]) == ("", "", "1.500")
    with pytest.raises(UserError, match=r"A fit of seed 0 failed \(no memory\)"):
        landscape.row(2, tmp_path, 7, 0, trial(error="no memory"))
    with pytest.raises(UserError, match=r"must have 2 epochs, but has 0"):  # no log of its own
        landscape.row(2, tmp_path, 7, 0, trial(val_loss=0.5, epochs=2))


def test_tuning_starts_from_the_defaults():
    tuning = importlib.import_module("tuning")
    start = {name: levels[0] for name, levels in tuning.LEVELS.items()}
    assert checked(compose(tuning.words(start))) == checked(compose([]))


@pytest.mark.slow
def test_tuning_takes_levels_that_gatl_takes():
    tuning = importlib.import_module("tuning")
    start = {name: levels[0] for name, levels in tuning.LEVELS.items()}
    for name, levels in tuning.LEVELS.items():
        assert len(set(levels)) == len(levels)
        for level in levels:
            checked(compose([*tuning.words(start), f"{name}={level}"]))


def test_trees_foretell_what_those_of_scikit_learn_do(bowl):
    simulator, data, _ = bowl
    genes, losses = data.means(data.losses)
    x = simulator.features(genes)
    rng = np.random.default_rng(0)
    others = rng.uniform(x.min(0) - 0.1, x.max(0) + 0.1, (500, x.shape[1]))
    settings = {"n_estimators": 300, "learning_rate": 0.05, "max_depth": 4, "subsample": 0.7}
    theirs = [GradientBoostingRegressor(**settings, random_state=0).fit(x, y) for y in losses.T]
    trees, expected = (
        simulator.Trees(x, losses),
        np.column_stack([t.predict(others) for t in theirs]),
    )
    np.testing.assert_allclose(trees.predict(others), expected)
    few = [trees.predict(row) for row in np.array_split(others, 100)]
    np.testing.assert_allclose(np.concatenate(few), expected)


def test_the_simulator_foretells_what_it_was_not_shown(bowl):
    simulator, data, landscape = bowl
    genes, losses = data.means(data.losses)
    assert len(genes) == sum(row[2] <= 0.03 for row in {tuple(row) for row in data.genes.tolist()})
    held = simulator.held_out(landscape.regressor, genes, losses, 5)
    found = simulator.agreement(held[:, -1], losses[:, -1])
    assert found["spearman"] > 0.9
    assert found["rmse"] < 3 * NOISE
    assert simulator.agreement(losses[:, -1], losses[:, -1])["rmse"] == 0
    asked = {"included_layers": 50, "frozen_layers": 9, "learning_rate": 4e-4, "dropout": 0.3}
    row = np.array([list(asked.values())])
    truth = [log_loss(asked, e) for e in (1, 2, 3)]
    assert landscape.losses(row)[0] == pytest.approx(truth, abs=2 * NOISE)
    assert np.array_equal(
        simulator.not_rising(np.array([[3.0, 1.0, 2.0], [0.0, 1.0, 0.5]])),
        [[3.0, 2.0, 2.0], [1.0, 1.0, 0.5]],  # the last one stays
    )
    assert landscape.failure(np.array([[58, 0, 0.09, 0.5]]))[0] > 0.9
    assert landscape.failure(row)[0] < 0.1
    assert landscape.best["included_layers"] > 50
    assert 3e-4 < landscape.best["learning_rate"] < 3e-3
    assert landscape.optimum == pytest.approx(math.exp(-0.5 + 0.01 + 0.2 / 3), rel=0.1)


def test_the_shape_of_a_bowl_is_told(bowl):
    """Of its variance the learning rate has nearly all, the dropout a little, F nothing."""
    simulator, _, landscape = bowl
    found = simulator.shape(landscape, 2000)
    near, effects = found["near"], found["main_effects"]
    assert 0 < near["0.02"] < near["0.05"] < near["0.1"] < 0.5
    assert effects["learning_rate"] > 0.8 > 0.2 > effects["included_layers"]
    assert effects["frozen_layers"] < 0.02
    assert sum(effects.values()) < 1.05


def test_the_noise_is_that_of_the_seeds(bowl):
    simulator, data, landscape = bowl
    found = simulator.of_noise(data)
    assert found["sd_pooled"] == pytest.approx(NOISE, rel=0.3)
    genes = {"included_layers": 40, "frozen_layers": 5, "learning_rate": 1e-3, "dropout": 0.5}
    fits = [Fit(genes, 3, seed, Path()) for seed in range(400)]
    drawn = [math.log(landscape.outcome(fit, 0).val_loss) for fit in fits]
    clean = landscape.losses(np.array([list(genes.values())]))[0, -1]
    assert np.std(drawn) == pytest.approx(simulator.noise(data).sd(1e-3), rel=0.15)
    assert np.mean(drawn) == pytest.approx(clean, abs=0.01)
    assert landscape.outcome(fits[7], 0) == landscape.outcome(fits[7], 0)
    early = landscape.outcome(Fit(genes, 1, 7, Path()), 0)  # the same fit, stopped early
    assert early.val_loss > landscape.outcome(fits[7], 0).val_loss


def test_the_simulated_clock_is_that_of_two_workers(bowl):
    simulator, _, landscape = bowl
    evaluator = simulator.SimulatedEvaluator(landscape, 2)
    genes = {"frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.5}
    long, short = (Fit({"included_layers": n, **genes}, 3, 1, Path()) for n in (58, 5))
    one_long, one_short = (landscape.outcome(fit, 0).duration_s for fit in (long, short))
    assert one_long == pytest.approx(177, rel=0.2)
    evaluator.submit(0, long)
    evaluator.submit(1, short)
    assert evaluator.n_free == 0
    assert [key for key, _ in evaluator.wait(0)] == [1]
    assert evaluator.now == one_short
    evaluator.submit(2, short)
    assert [key for key, _ in evaluator.wait(0)] == [2]
    assert evaluator.now == 2 * one_short
    assert [key for key, _ in evaluator.wait(0)] == [0]
    assert evaluator.now == one_long
    first = landscape.outcome(Fit(short.genes, 1, 1, Path()), 0).duration_s
    assert first + landscape.outcome(short, 1).duration_s == pytest.approx(one_short)


def test_strategies_compares_searches_and_goes_on(tmp_path, monkeypatch, capsys):
    strategies = importlib.import_module("strategies")
    write_table(tmp_path / "tables" / "bowl.csv", 64)
    monkeypatch.setattr(strategies, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(strategies.simulator, "FAMILIES", {"process": strategies.simulator.Process})
    monkeypatch.setattr(strategies, "SLOW", {"big": 55})
    strategies.landscape_of.cache_clear()
    words = (
        *("seeds=1", "slow_seeds=1", "trials=60", "names=bowl", "only=random;big"),
        *("add=big:ga.pop=30+pruner=none", f"results={tmp_path / 'r.json'}", "output=out"),
        f"plot={tmp_path / 'plots' / 'p.png'}",
    )
    run(monkeypatch, "strategies", *words)
    printed = capsys.readouterr()
    assert "4 searches, 4 to do" in printed.err
    assert "bowl, Gaussian process, with initial chromosomes, 1 seeds" in printed.out
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        assert set(row["regret"]) == {"50"}
        assert 0 <= row["regret"]["50"]["median"] < 0.3
    assert (tmp_path / "plots" / "p.png").stat().st_size > 20_000
    lines = (tmp_path / "out/bowl/process/initial/random.jsonl").read_text().splitlines()
    found = json.loads(lines[0])
    assert len(found["regret"]) == 60
    lines = (tmp_path / "out/bowl/process/none/big.jsonl").read_text().splitlines()
    assert len(json.loads(lines[0])["regret"]) == 55
    assert found["seconds"] == sorted(found["seconds"])
    run(monkeypatch, "strategies", *words, "seeds=2")
    assert "6 searches, 2 to do" in capsys.readouterr().err


@pytest.mark.slow
def test_tuning_descends_and_confirms_with_other_seeds(tmp_path, monkeypatch, capsys):
    tuning, strategies = importlib.import_module("tuning"), importlib.import_module("strategies")
    for name in ("bowl", "other"):
        write_table(tmp_path / "tables" / f"{name}.csv", 64, noise=1e-3)
    monkeypatch.setattr(strategies, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(strategies.simulator, "FAMILIES", {"process": strategies.simulator.Process})
    # One level ruins the search: every child is a copy of a parent.
    monkeypatch.setattr(tuning, "LEVELS", {"ga.mutation_prob": ("0.0", "0.3")})
    strategies.landscape_of.cache_clear()
    words = ("tune=bowl", "confirm=other", "seeds=2", "confirm_seeds=2", "rounds=1", "output=out")
    words = (*words, "start=ga.mutation_prob=0.0+ga.pop=8")
    run(monkeypatch, "tuning", *words, f"results={tmp_path / 'r.json'}")
    result = json.loads((tmp_path / "r.json").read_text())
    (step,) = result["steps"]
    assert step["scores"]["0.0"] == 1  # the start's own
    assert step["scores"]["0.3"] < 0.95
    assert result["best"] == {"ga.mutation_prob": "0.3", "ga.pop": "8"}
    assert "Best: ga.mutation_prob=0.3 ga.pop=8" in capsys.readouterr().out
    seeds = {
        json.loads(line)["seed"]
        for path in (tmp_path / "out" / "other").rglob("*.jsonl")
        for line in path.read_text().splitlines()
    }
    assert seeds == {1000, 1001}  # which the descent has not seen
    (confirmed,) = result["confirm"]
    assert confirmed["200"]["effect"]["n"] == 2


class InThisProcess:
    """Runs what is submitted at once; processes of their own would not see the test's tables."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_effects_ranks_and_times_are_what_they_say():
    strategies = importlib.import_module("strategies")
    mine, base = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 5.0, 1.0])
    found = strategies.effect(mine, base)
    assert (found["better"], found["difference"], found["n"]) == ((2 + 0.5) / 4, -0.5, 4)
    assert strategies.effect(mine, mine) == {"better": 0.5, "difference": 0.0, "p": 1.0, "n": 4}
    lower = strategies.effect(np.zeros(20), np.linspace(1, 2, 20))
    assert (lower["better"], lower["p"]) == (1, pytest.approx(2 * 0.5**20))

    def cell(name, last, n=2):
        regret = np.array([[9.0, value] for value in last[:n]])
        seconds = np.array([[10.0, 20.0]] * n)
        return strategies.Cell("x", "trees", True, name, ""), strategies.Curves(regret, seconds)

    found = dict([cell("a", [1, 2]), cell("b", [2, 2]), cell("c", [3, 3]), cell("d", [0], 1)])
    assert strategies.mean_ranks(found) == {"a": 1.25, "b": 1.75, "c": 3.0}
    _, curves = cell("a", [1, 2])
    at = curves.at_seconds(np.array([5.0, 10.0, 19.0, 25.0]))
    assert np.array_equal(at, [[np.nan, 9, 9, 1], [np.nan, 9, 9, 2]], equal_nan=True)
    center = strategies.center(np.arange(101.0))
    assert center["median"] == center["mean"] == 50
    assert 35 < center["low"] < 50 < center["high"] < 65


@pytest.mark.slow
def test_value_makes_real_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    save_photos(tmp_path / "photos")
    words = (
        *("root=photos", "name=tiny", "seeds=1", "trials=2", "size=32", "output=out"),
        *("only=genetic;linear probe, lr 1e-2", "trainer.max_epochs=1", "final.max_epochs=2"),
        *(*tiny_network(tmp_path / "tiny.safetensors"), "ga.pop=2"),
        f"results={tmp_path / 'r.json'}",
    )
    run(monkeypatch, "value", *words)
    printed = capsys.readouterr()
    assert "| linear probe, lr 1e-2 |" in printed.out
    result = json.loads((tmp_path / "r.json").read_text())
    genetic, probe = result["runs"]
    assert probe["genes"] == {
        **{"included_layers": 4, "frozen_layers": 4, "learning_rate": 0.01, "dropout": 0.2}
    }
    assert probe["epochs"] == 1 + 1 + 2  # the trial, the re-evaluation, the final model
    assert genetic["epochs"] == 2 + 6 + 2  # two of the best, three seeds each
    assert probe["test_images"] == genetic["test_images"] == 9
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    run(monkeypatch, "value", *words)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_value_pairs_the_seeds():
    value = importlib.import_module("value")

    def one(method, seed, accuracy):
        figures = {"test_accuracy": accuracy, "val_loss": 1.0, "epochs": 10, "seconds": 60.0}
        return {"method": method, "seed": seed, **figures}

    runs = [one("genetic", 0, 0.8), one("genetic", 1, 0.7), one("tpe", 0, 0.7), one("tpe", 1, 0.69)]
    found = value.summary(runs)
    assert found["genetic"]["less_than_genetic"]["n"] == 0
    assert found["tpe"]["less_than_genetic"]["mean"] == pytest.approx((0.1 + 0.01) / 2)
    assert found["tpe"]["less_than_genetic"]["sd"] == pytest.approx(0.09 / 2**0.5)
    assert "| genetic | 75.0 ± 7.1 % |  | 1.000 ± 0.000 | 10 ± 0 | 1.0 ± 0.0 |" in (
        value.markdown(found)
    )


class Known:
    """A landscape whose fits take the seconds that their included layers say, at no loss."""

    def outcome(self, fit, since):
        return Outcome(val_loss=1.0, epochs=fit.epochs, duration_s=fit.genes["included_layers"])


class Given(Strategy):
    """Trials of 10, 4, 4 and 4 seconds, which depend on nothing."""

    def horizon(self, number):
        return 0

    def propose(self, number, record, pending=()):
        return ((10, 4, 4, 4)[number], 0, 1e-3, 0.1 * (number + 1))


@pytest.mark.parametrize(
    ("n_workers", "begin", "take", "ends"),
    [
        (1, 0.0, 0.0, [10, 14, 18, 22]),
        (2, 0.0, 0.0, [10, 4, 8, 12]),
        # All are begun by 4; the outcomes wait for a second each, and so do the fits behind them.
        (2, 1.0, 1.0, [15, 9, 14, 19]),
        # Fits end at 14, 8, 8 and 8, but a driver that takes 10 for each outcome is behind.
        (4, 1.0, 10.0, [48, 18, 28, 38]),
    ],
)
def test_the_time_of_the_driver_is_on_the_clock(monkeypatch, n_workers, begin, take, ends):
    scale, simulator = importlib.import_module("scale"), importlib.import_module("simulator")
    config = checked(compose(["model=se_densenet121_k12", "budget.trials=4", "pruner=none"]))
    monkeypatch.setattr(
        simulator, "build_strategy", lambda config: Given(space=config.space, seed=0)
    )
    driver = simulator.DriverTime(begin, take)
    trials, found = simulator.searched(config, Known(), n_workers, driver)
    assert found == ends
    figures = scale.told(trials, found, n_workers, driver)
    assert figures["seconds"] == max(ends)
    assert figures["utilisation"] == 22 / (n_workers * max(ends))
    assert figures["speed_up"] == (22 + 4 * (begin + take)) / max(ends)


def test_the_settings_follow_the_workers():
    scale = importlib.import_module("scale")
    strategies = importlib.import_module("strategies")
    for name in scale.STRATEGIES:
        config = strategies.configuration(
            " ".join(scale.settings(name, 64)), ("budget.trials=200",)
        )
        strategy = build_strategy(config)
        at_once = 199 - strategy.horizon(199) if strategy.generation(0) is None else strategy.pop
        assert at_once >= 64


def test_the_driver_is_measured_and_extended(tmp_path, monkeypatch, capsys):
    scale = importlib.import_module("scale")
    write_table(tmp_path / "tables" / "flowers5.csv", 32)
    words = ("only=driver", "workers=1,16", f"results={tmp_path / 'r.json'}", "output=o.json")
    monkeypatch.setattr(scale, "driver_time", lambda w, n: {"cpu_ms": 4.0 + w, "trials": n})
    run(monkeypatch, "scale", *words)
    assert "| after | 16 | 20.0 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())["driver"]
    assert scale.extended(found, [1, 32])["32"] == {"cpu_ms": 36.0}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    measured = scale.driver_time(16, 24)
    assert 0 < measured["cpu_ms"] < 1000
    assert 1000 < measured["journal_bytes"] < 2500
    assert list(tmp_path.glob("tmp*")) == []


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("landscape", [], "name=flowers5"),
        ("landscape", ["name=x"], "root=PATH"),
        ("landscape", ["name=x", "root=photos", "fits=9"], "fits must be at least 27, but got 9"),
        ("landscape", ["name=x", "root=photos", "fits=40"], "repeated must be at most half of"),
        ("simulator", [], "There is no landscape"),
        ("simulator", ["names=x"], "There is no landscape 'x'"),
        ("simulator", ["fold=2"], "fold=2' is no option"),
        ("strategies", ["trials=49"], "trials must be at least 50, but got 49"),
        ("strategies", ["only=tabu"], "only=tabu is none of genetic; "),
        ("strategies", ["names=x", "only=random"], "There is no landscape 'x'"),
        ("tuning", [], "tune=flowers5 confirm=cifar20"),
        ("tuning", ["tune=x", "confirm=x", "trials=100"], "trials must be at least 200"),
        ("scale", ["only=all"], "only must be search or driver, but got all"),
        ("scale", ["workers=0"], "workers must be a whole number of at least 1, but got '0'"),
        ("value", [], "root=PATH"),
        ("value", ["root=x", "name=x", "only=luck"], "only=luck is none of genetic; random"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, name, words, message):
    with pytest.raises(SystemExit) as error, one_line_errors():
        run(monkeypatch, name, *words)
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
