"""The winner of a search beside the plain recipe, under the same final training.

    python benchmarks/recipe.py run=outputs/DATE/TIME seeds=3

The plain recipe is what one would write by hand: all layers, nothing frozen,
learning rate 1e-3, dropout 0.5. Both are trained and tested as the final model
is, once for each seed: same epochs, early stopping, data and seeds. Writes
``benchmarks/results/recipe.json``.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gatl.cli import compose_resumed, one_line_errors
from gatl.config import checked
from gatl.errors import UserError
from gatl.final import retrain, test
from gatl.session import opened

RESULTS = Path(__file__).parent / "results" / "recipe.json"


def main() -> None:
    """Train and test both for each seed; print and save the figures."""
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if "run" not in words:
        raise UserError("Give the folder of a finished run: run=outputs/DATE/TIME")
    folder = Path(words["run"])
    found = json.loads((folder / "result.json").read_text())
    config = checked(compose_resumed(folder, []))
    space = config.space
    plain = {
        "included_layers": config.model.n_layers,
        "frozen_layers": 0,
        "learning_rate": 1e-3,
        "dropout": 0.5,
    }
    recipes = {"winner": found["best"]["genes"], "plain recipe": plain}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    console = Console(highlight=False)
    with opened(config, folder, console) as session:
        for seed in range(int(words.get("seeds", "3"))):
            for name, genes in recipes.items():
                with tempfile.TemporaryDirectory() as scratch:
                    (Path(scratch) / "final").mkdir()
                    trained = replace(
                        session,
                        config=replace(config, seed=1000 + seed),  # none that the run has used
                        folder=Path(scratch),
                    )
                    classifier, training = retrain(trained, space.to_dict(space.from_dict(genes)))
                    figures, _ = test(trained, classifier)
                runs[name].append(
                    {
                        "val_loss": training["val_loss"],
                        "test_loss": figures["loss"],
                        "test_accuracy": figures["accuracy"],
                        "epochs": training["epochs"],
                    }
                )
                console.print(f"{name}, seed {seed}: {runs[name][-1]}")
    for name, trainings in runs.items():
        for figure in ("val_loss", "test_accuracy"):
            values = [run[figure] for run in trainings]
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            console.print(f"{name}: {figure} {statistics.fmean(values):.4f} ± {sd:.4f}")
    RESULTS.parent.mkdir(exist_ok=True)
    kept = {
        key: found[key]
        for key in ("best", "reevaluation", "trials", "versions", "hardware", "seed")
    }
    RESULTS.write_text(json.dumps(kept | {"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
