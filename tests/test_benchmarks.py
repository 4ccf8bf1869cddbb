"""The benchmarks: they do what they say, go on where they stopped, and name a mistake in a line."""

import csv
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
from omegaconf import OmegaConf
from PIL import Image

from gatl.cli import compose, one_line_errors
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
