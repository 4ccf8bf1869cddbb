"""The benchmarks: they do what they say, go on where they stopped, and name a mistake in a line."""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import safetensors.torch
from omegaconf import OmegaConf
from PIL import Image

from gatl.cli import compose, one_line_errors
from gatl.config import checked
from gatl.models.se_densenet import se_densenet
from gatl.models.weight_files import CARD_KEY

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = {"growth_rate": 4, "init_features": 8, "block_config": [2, 2]}
OVERRIDES = (
    *(f"model.network.{key}={value}".replace(" ", "") for key, value in TINY.items()),
    "model.n_layers=4",
    "model.n_freezable=2",
    "data.image_size=32",
    "trainer.accelerator=cpu",
)


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """Work in a folder that holds images and weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 128, (32, 32, 3)) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    network = se_densenet(
        4, 2, 0.0, **TINY, se_placement="block", se_init="identity", dropout_at="head"
    )
    tensors = {k: v for k, v in network.state_dict().items() if not k.startswith("classifier.")}
    card = {"se": {"placement": "block", "gate": "2*sigmoid"}}
    safetensors.torch.save_file(tensors, "tiny.safetensors", {CARD_KEY: json.dumps(card)})


def run(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *words])
    importlib.import_module(name).main()


def test_transfer_compares_all_variants_and_goes_on(tmp_path, monkeypatch, capsys):
    words = ("root=photos", "epochs=1", "workers=1", "weights=tiny.safetensors", "output=out")
    words = (*words, f"results={tmp_path / 'r.json'}", *OVERRIDES)
    run(monkeypatch, "transfer", *words, "seeds=1", "only=none,bundled")
    assert "2 fits, 0 of which are done" in capsys.readouterr().out
    run(monkeypatch, "transfer", *words, "seeds=2")
    again = capsys.readouterr().out
    assert "16 fits, 2 of which are done" in again
    assert again.count(": val_loss ") == 14

    text = (tmp_path / "r.json").read_text()
    assert str(tmp_path) not in text
    result = json.loads(text)
    assert {"command", "commit", "versions", "hardware"} < result.keys()
    assert result["data"] == {"classes": 2, "train": 28, "val": 6}
    assert len(result["fits"]) == 16
    pretrained, se, dropout = (found["variants"] for found in result["tables"])
    assert pretrained["bundled"]["val_loss"]["n"] == 2
    losses = {(f["variant"], f["seed"]): f["val_loss"] for f in result["fits"]}
    paired = [losses["bundled", seed] - losses["none", seed] for seed in range(2)]
    difference = pretrained["bundled"]["val_loss_difference"]
    assert difference["mean"] == pytest.approx(np.mean(paired))
    assert difference["sd"] == pytest.approx(np.std(paired, ddof=1))
    assert len({row["val_loss"]["mean"] for row in se.values()}) > 4  # placement and init count
    assert set(dropout) == {"block_identity", "dropout_layers"}
    hashes = {f["variant"]: f["weights_sha256"] for f in result["fits"]}
    assert hashes["none"] is None
    assert hashes["bundled"] != hashes["block_identity"] == hashes["layer_kaiming"]


def save_run(folder, genes):
    (folder / ".hydra").mkdir(parents=True)
    overrides = ("data=folder", "data.root=photos", "model=se_densenet121_k12", *OVERRIDES)
    settings = ("model.weights=none", "final.max_epochs=1", "evaluator.workers=1")
    OmegaConf.save(compose([*overrides, *settings]), folder / ".hydra" / "config.yaml")
    candidate = {"trial": 1, "genes": genes, "val_losses": [0.5, None, 0.7], "mean": None}
    result = {
        "best": {"genes": genes, "val_loss": 0.5, "trial": 1},
        "reevaluation": [candidate],
        **{"trials": 3, "seed": 0, "versions": {}, "hardware": {}},
    }
    (folder / "result.json").write_text(json.dumps(result))
    rows = [(0, 0, "COMPLETE", 0.9), (1, 0, "COMPLETE", 0.5), (2, 0, "FAIL", ""), (3, 1, "FAIL", 1)]
    with (folder / "history.csv").open("w") as file:
        csv.writer(file).writerows([("number", "generation", "state", "val_loss"), *rows])


def test_recipe_compares_the_winner_with_the_plain_recipe(tmp_path, monkeypatch, capsys):
    winner = {"included_layers": 2, "frozen_layers": 1, "learning_rate": 0.01, "dropout": 0.3}
    save_run(tmp_path / "run", winner)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    run(monkeypatch, "recipe", "run=run", "seeds=2", f"results={tmp_path / 'r.json'}")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    printed = capsys.readouterr().out
    assert "| mean of the first generation | 0.700 |" in printed
    assert "| the winner, 2 fresh seeds | 0.600 ± 0.141 |" in printed
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(f["recipe"], f["seed"]) for f in result["fits"]] == [
        *(("winner", 1000), ("plain recipe", 1000)),
        *(("winner", 1001), ("plain recipe", 1001)),
    ]
    losses = [f["val_loss"] for f in result["fits"] if f["recipe"] == "winner"]
    assert result["recipes"]["winner"]["val_loss"]["mean"] == pytest.approx(np.mean(losses))


def test_the_committed_result_of_recipe_is_what_it_writes():
    recipe = importlib.import_module("recipe")
    result = json.loads((FOLDER / "results" / "recipe.json").read_text())
    origin = recipe.origin()
    search = {k: v for k, v in result["search"].items() if k not in ("epochs", "winner_again")}
    config = SimpleNamespace(
        trainer=SimpleNamespace(max_epochs=result["search"]["epochs"]),
        final=SimpleNamespace(**result["final"]),
    )
    assert list(result)[: len(origin)] == list(origin)
    assert {k: v for k, v in result.items() if k not in origin} == recipe.summary(
        config, search, result["fits"]
    )


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("recipe", [], "run=outputs/DATE/TIME"),
        ("recipe", ["run=photos"], "is no run folder"),
        ("recipe", ["run=unfinished"], r"has no final model yet.*gatl\.final run="),
        ("recipe", ["run=unfinished", "seed=3"], "seed=3 is no option"),
        ("recipe", ["run=unfinished", "seeds=three"], "seeds must be a whole number"),
        ("transfer", [], "root=PATH"),
        ("halving", [], "root=PATH"),
        ("evaluation", [], "root=PATH"),
        ("evaluation", ["root=photos", "only=all"], "only=all is none of peer; bare"),
        ("evaluation", ["root=photos", "images=1000"], "has too few images"),
        ("search", [], "root=PATH"),
        ("driver", ["trials=99"], "trials must be at least 100, but got 99"),
        ("driver", ["pop=120"], "pop - n_elites must be at most 50, but got 60"),
        ("search", ["root=photos", "initial=maybe"], "initial must be yes or no, but got maybe"),
        ("transfer", ["root=photos", "only=all"], "only=all is no variant"),
        ("transfer", ["root=photos", "epochs=0"], "epochs must be a whole number"),
        ("transfer", ["root=photos", "workers=0"], "workers must be"),
        ("transfer", ["root=nowhere", "only=none"], "nowhere does not exist"),
        ("transfer", ["root=photos", "weights=none"], "weights=none has no SE"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, name, words, message):
    save_run(tmp_path / "unfinished", {})
    (tmp_path / "unfinished" / "result.json").unlink()
    with pytest.raises(SystemExit) as error, one_line_errors():
        run(monkeypatch, name, *words)
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert printed.count("\n") == 1


SPEED = (
    *("model=se_densenet121_k12", "model.weights=tiny.safetensors", *OVERRIDES),
    *("space.learning_rate.high=1e-2", "evaluator.workers=1"),
)


def test_evaluation_measures_the_same_fits_in_every_way(tmp_path, monkeypatch):
    evaluation, peer = importlib.import_module("evaluation"), importlib.import_module("peer")
    peer.subset("photos", tmp_path / "some", 20, 8)
    sizes = {p.name: len(list(p.glob("*/*.png"))) for p in (tmp_path / "some").iterdir()}
    assert sizes == {"train": 20, "val": 8, "test": 8}
    words = ("data=folder", f"data.root={tmp_path / 'some'}", *SPEED, "trainer.max_epochs=2")
    config = checked(compose([*words, "data.batch_size=8"]))
    chromosomes = evaluation.spread(config, 10)
    assert chromosomes[:2] == list(config.initial)
    assert {g["included_layers"] for g in chromosomes} == {1, 2, 3, 4}
    assert {g["frozen_layers"] for g in chromosomes} == {0, 1, 2}
    chosen = [*chromosomes[:3], {**chromosomes[0], "included_layers": 2, "frozen_layers": 2}]
    chosen = [{**genes, "learning_rate": 1e-3} for genes in chosen]  # higher ones amplify rounding
    losses = {
        name: evaluation.measure(name, config, chosen, tmp_path / "out", 0).losses
        for name in ("peer", "bare", "bare, cached", "gatl, 1 worker")
    }
    # The cache of the bare loop changes nothing, for no F.
    assert losses["bare, cached"] == pytest.approx(losses["bare"], abs=1e-3)
    for found in losses.values():
        assert len(found) == 4
        assert all(0 < loss < 1.5 for loss in found)  # of other seeds, on few images
    twice = [evaluation.Measured(2.0, losses["bare"]), evaluation.Measured(6.0, losses["bare"])]
    once = [evaluation.Measured(1.0, [0.5, None, 0.5, 0.5])] * 2
    result = evaluation.summary(chosen, {"bare": twice, "gatl": once})
    assert result["seconds"]["bare"] == {"median": 4.0, "min": 2.0, "max": 6.0, "n": 2}
    assert result["times_as_fast"]["gatl"] == {"median": 4.0, "min": 2.0, "max": 6.0, "n": 2}
    printed = evaluation.markdown(result)
    assert "| gatl | 1.0 | 1.0 to 1.0 | 4.00 (2.00 to 6.00) |" in printed
    assert "| diverged |" in printed


def test_search_finds_when_the_best_of_the_peer_was_reached(tmp_path, monkeypatch, capsys):
    search = importlib.import_module("search")
    peer = search.Searched(100.0, [(10.0, 0.9), (60.0, 0.7)])
    gatl = search.Searched(30.0, [(5.0, 0.8), (20.0, 0.6)])
    run_ = search.compared(3, {"peer": peer, "gatl": gatl})
    assert (run_["peer_best_reached_by_gatl"], run_["share_of_peer_time"]) == (20.0, 0.2)
    assert run_["gatl"] == {"seconds": 30.0, "curve": gatl.curve, "best": 0.6}
    assert "| 3 | 100 | 30 | 3.33 | 0.7000 | 0.6000 | 20 s, 20% of the peer's time |" in (
        search.markdown([run_])
    )
    never = search.compared(3, {"peer": gatl, "gatl": peer})
    assert never["share_of_peer_time"] is None
    assert "| never |" in search.markdown([never])


def test_search_searches_in_both_ways(tmp_path, monkeypatch):
    search, peer = importlib.import_module("search"), importlib.import_module("peer")
    peer.subset("photos", tmp_path / "some", 20, 8)
    words = ("data=folder", f"data.root={tmp_path / 'some'}", *SPEED, "trainer.max_epochs=2")
    config = checked(compose([*words, "data.batch_size=8", "budget.trials=3", "ga.pop=3"]))
    for name in search.SEARCHES:
        found = search.search(name, config, tmp_path / "run", initial=True)
        losses = [loss for _, loss in found.curve]
        assert 0 < found.curve[-1][0] <= found.seconds
        assert losses == sorted(losses, reverse=True)
        assert 0 < found.best < 2


def test_driver_counts_the_writes_of_each_search_and_times_them(tmp_path, monkeypatch, capsys):
    words = ("trials=100", "pop=4", "repeats=1", "output=out", f"results={tmp_path / 'r.json'}")
    run(monkeypatch, "driver", *words)
    driver, result = (
        importlib.import_module("driver"),
        json.loads((tmp_path / "r.json").read_text()),
    )
    assert (result["trials"], list(result["searches"])) == (108, list(driver.SEARCHES))
    writes = {name: found["writes_per_trial"] for name, found in result["searches"].items()}
    assert writes["gatl"] == (1 + 3 * 108 + 1) / 108  # and the study, and its seconds in the end
    assert writes["gatl"] < writes["gatl, successive halving"] < writes[driver.BASELINE]
    assert writes[driver.BASELINE] == pytest.approx(1 + 4 + 1 + 1, abs=0.02)
    for found in result["searches"].values():
        (around,) = found["around"]
        assert (around["trials"], around["ms_per_trial"]["n"]) == (100, 4)
        assert around["ms_per_trial"]["min"] > 0
    assert "| gatl | 3.02 |" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_driver_takes_stretches_around_a_number_of_trials():
    driver = importlib.import_module("driver")
    ends = [0.001 * n**2 for n in range(21)]
    assert driver.milliseconds(ends, 10, 5) == pytest.approx([5.0, 15.0, 25.0, 35.0])
    runs = {driver.BASELINE: [driver.Timed(ends, 42)], "gatl": [driver.Timed([0.0, *ends], 21)]}
    found = driver.summary(runs, [10], 4)["searches"]
    assert found[driver.BASELINE]["around"][0]["times_the_baseline"]["median"] == 1
    assert found[driver.BASELINE]["writes_per_trial"] == 2
    assert found["gatl"]["around"][0]["times_the_baseline"]["median"] == pytest.approx(0.9)


def test_memory_measures_between_fits_and_finds_what_is_left(tmp_path, monkeypatch):
    memory, peer = importlib.import_module("memory"), importlib.import_module("peer")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert len(list(memory.save_digits(tmp_path / "digits").glob("*/*.png"))) == 1797
    peer.subset(str(tmp_path / "digits"), tmp_path / "some", 20, 10)
    words = ("data=folder", f"data.root={tmp_path / 'some'}", *SPEED, "trainer.max_epochs=1")
    found = memory.measure(checked(compose(words)), 6, tmp_path / "run")
    assert [row["fits"] for row in found["memory"]] == [1, 2, 3, 4, 6]
    assert all(0 < row["uss_mib"] < row["rss_mib"] for row in found["memory"])
    assert found["failed"] == 0
    assert found["left_behind"] == {"run folder": []}
    (tmp_path / "run" / "trials" / "0" / "rung.ckpt").touch()
    assert memory.remains(tmp_path / "run") == ["trials/0/rung.ckpt"]
    alive, dead = f"torch_{os.getpid()}_1_0", "sem.loky-99999999-a"
    assert memory.orphans([alive, dead, "psm_a"]) == [dead, "psm_a"]
    found["left_behind"] |= {"temporary files": [], "shared memory": [dead]}
    assert "| 0 | 0 | 0 | 1 |" in memory.markdown([{"workers": 1, **found}])


def test_a_long_search_is_watched_from_outside(tmp_path):
    """A process that takes ever more of everything shows so, in proportion to its trials."""
    long = importlib.import_module("long")
    (tmp_path / "run").mkdir()
    script = """
import pathlib, sys, threading, time
folder, kept = pathlib.Path(sys.argv[1]), []
(folder / "history.csv").write_text("header\\n")
for trial in range(40):
    kept += [open("/dev/null"), bytearray(2**20)]
    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
    with (folder / "study.journal").open("a") as file:
        file.write("x" * 100)
    with (folder / "history.csv").open("a") as file:
        file.write("1\\n")
    time.sleep(0.05)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")]) as process:
        numbers = [4, 12, 20, 28, 400]  # the last never comes
        seen = long.watch(psutil.Process(process.pid), tmp_path / "run", numbers)
    rows = long.differences(seen)
    assert [row["trials"] >= n for row, n in zip(rows, numbers[1:-1], strict=True)] == [True] * 3
    first, *_, last = rows
    trials = last["trials"] - first["trials"]
    for name in ("files", "threads"):
        assert abs(last[name] - first[name] - trials) <= 2
    assert last["driver_mib"] - first["driver_mib"] > trials / 2
    assert all(90 <= row["journal_bytes_per_trial"] <= 110 for row in rows)
    assert all(row["folder_bytes_per_trial"] > row["journal_bytes_per_trial"] for row in rows)
    assert {row["processes"] for row in rows} == {1}
    assert long.markdown(rows).count("\n") == 4
