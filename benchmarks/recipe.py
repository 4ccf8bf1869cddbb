"""The winner of a search beside the plain recipe, under the same final training.

    python benchmarks/recipe.py run=outputs/DATE/TIME seeds=3

The plain recipe is what one would write by hand: all layers, nothing frozen,
learning rate 1e-3, dropout 0.5. Both are trained and tested as the final model
is, once for each seed: same epochs, early stopping, data and seeds, none of which the
run has used. The run folder is only read. Prints two tables; writes ``results=PATH``,
by default ``benchmarks/results/recipe.json``.
"""

import csv
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, options, origin, over_seeds, table, whole, written

from gatl.chromosome import Value
from gatl.classifier import Diverged
from gatl.cli import compose_resumed, one_line_errors
from gatl.config import Config, checked
from gatl.errors import UserError
from gatl.evaluation import FitStopped
from gatl.files import write_json
from gatl.progress import new_console
from gatl.record import HISTORY, final_command, return_to_start
from gatl.retraining import retrain
from gatl.session import Session, opened
from gatl.testing import test

DEFAULTS = {"run": "", "seeds": "3", "results": str(RESULTS / "recipe.json")}

LABELS = {
    "winner": "the winner",
    "plain recipe": "plain recipe: all layers, nothing frozen, lr 1e-3, dropout 0.5",
}


def main() -> None:
    """Train and test both recipes for each seed; print and save the figures."""
    given, others = options(sys.argv[1:], DEFAULTS)
    if others:
        raise UserError(f"{others[0]} is no option; there are {', '.join(DEFAULTS)}.")
    if not given["run"]:
        raise UserError("Give the folder of a finished run: run=outputs/DATE/TIME")
    n_seeds = whole("seeds", given["seeds"])
    folder, results = (Path(given[name]).expanduser().absolute() for name in ("run", "results"))
    config = checked(compose_resumed(folder, []))
    search = searched(folder)
    plain = {
        "included_layers": config.model.n_layers,
        "frozen_layers": 0,
        "learning_rate": 1e-3,
        "dropout": 0.5,
    }
    recipes = {"winner": search["best"]["genes"], "plain recipe": plain}
    return_to_start(folder)
    fits: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        opened(config, Path(scratch), new_console()) as session,
    ):
        for seed in range(1000, 1000 + n_seeds):  # none that a run is likely to have
            for name, genes in recipes.items():
                trained = replace(
                    session,
                    config=replace(config, seed=seed),
                    folder=Path(scratch, f"{name} {seed}"),
                )
                fits.append({"recipe": name, "seed": seed, **train(trained, genes)})
                session.console.print(", ".join(f"{k} {v}" for k, v in fits[-1].items()))
    result = {**origin(), **summary(config, search, fits)}
    print(tables(result))
    write_json(results, result)


def searched(folder: Path) -> dict[str, Any]:
    """Return what the run found, and the mean val_loss of its first generation.

    Raises:
        UserError: If the run has no final model yet.
    """
    try:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        kept = "seed", "trials", "best", "reevaluation", "versions", "hardware"
        search = {key: found[key] for key in kept}
        with (folder / HISTORY).open(encoding="utf-8", newline="") as file:
            first = [row for row in csv.DictReader(file) if row["generation"] == "0"]
        losses = [float(row["val_loss"]) for row in first if row["state"] == "COMPLETE"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} has no final model yet, or its result.json or {HISTORY} is damaged "
            f"({type(error).__name__}: {error}): finish the run with {final_command(folder)}"
        ) from error
    return {**search, "first_generation": over_seeds(losses)}


def train(session: Session, genes: Mapping[str, Value]) -> dict[str, Any]:
    """Train and test as the final model is; return the figures."""
    (session.folder / "final").mkdir(parents=True)
    try:
        classifier, training = retrain(session, genes, session.folder / "fit")
        figures, _ = test(session, classifier)
    except Diverged as error:
        raise UserError(f"{session.folder.name}: the training {error}.") from error
    except (FitStopped, SystemExit):  # Lightning makes a SystemExit of a KeyboardInterrupt
        raise KeyboardInterrupt from None
    return {
        "val_loss": training["val_loss"],
        "test_loss": figures["loss"],
        "test_accuracy": figures["accuracy"],
        "epochs": training["epochs"],
    }


def summary(config: Config, search: dict[str, Any], fits: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together what there is to say of a run and of the trainings, beside their origin."""
    winner = search["best"]["trial"]
    again = next(c["val_losses"] for c in search["reevaluation"] if c["trial"] == winner)
    return {
        "search": {
            **search,
            "epochs": config.trainer.max_epochs,
            "winner_again": over_seeds([loss for loss in again if loss is not None]),
        },
        "final": {"max_epochs": config.final.max_epochs, "patience": config.final.patience},
        "fits": fits,
        "recipes": {
            name: {
                figure: over_seeds([fit[figure] for fit in fits if fit["recipe"] == name])
                for figure in ("val_loss", "test_loss", "test_accuracy", "epochs")
            }
            for name in dict.fromkeys(fit["recipe"] for fit in fits)
        },
    }


def tables(result: dict[str, Any]) -> str:
    """Write the two tables of a result."""
    search, recipes = result["search"], result["recipes"]
    first, again = search["first_generation"], search["winner_again"]
    found = [
        (f"after {search['epochs']} epochs", "val_loss"),
        ("mean of the first generation", written({**first, "sd": None})),  # not of seeds
        (f"the winner, {again['n']} fresh seeds", written(again)),
    ]
    n = recipes["winner"]["val_loss"]["n"]
    rows = [(f"after the final training, {n} seeds, mean ± sd", "val_loss", "test accuracy")]
    for name, figures in recipes.items():
        accuracy = written(figures["test_accuracy"], ".1f", 100, " %")
        rows.append((LABELS[name], written(figures["val_loss"]), accuracy))
    return "\n\n".join((table(*found), table(*rows)))


if __name__ == "__main__":
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt:
        sys.exit(130)
