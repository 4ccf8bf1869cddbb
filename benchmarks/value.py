"""Whether a search pays: what it finds, beside what one would do without it.

    python benchmarks/value.py root=PHOTOS name=flowers5

PHOTOS holds a folder of images for each class. With each seed, `gatl` as it comes searches,
retrains its winner and tests it; so do random search and TPE (Bergstra et al. 2011), with as
many trials and without initial chromosomes, which belong to gatl; and recipes that search
nothing are trained in the same way: a linear probe, all layers frozen, and full fine-tuning.
Every run is a run folder in ``output``, and the same command goes on with what is missing.

Prints a table: test accuracy and val_loss of the final models, epochs trained, and time; writes
it to ``results=FILE``, by default ``benchmarks/results/value_NAME.json``.

Options and their defaults: ``root= name= seeds=3 trials=16 size=64``, ``only=`` for some of the
above, separated by semicolons, ``output=outputs/value``. Every other word is a Hydra override
of all runs.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, options, origin, over_seeds, table, whole, written

from gatl.cli import one_line_errors
from gatl.errors import UserError
from gatl.files import write_json
from gatl.record import HISTORY, JOURNAL

DEFAULTS = {
    **{"root": "", "name": "", "seeds": "3", "trials": "16", "size": "64", "only": ""},
    **{"output": "outputs/value", "results": ""},
}
BASELINE = "genetic"


def recipe(frozen: str, learning_rate: str, *more: str) -> tuple[str, ...]:
    """Return the words of a run that trains one chromosome and searches nothing."""
    genes = (
        *("included_layers:${model.n_layers}", f"frozen_layers:{frozen}"),
        *(f"learning_rate:{learning_rate}", "dropout:0.2"),
    )
    only_one = ("budget.trials=1", "final.top_k=1", "final.seeds=1", "pruner=none")
    return (f"search.initial=[{{{','.join(genes)}}}]", *only_one, *more)


ALL = "${model.n_layers}"
PROBE = (f"model.n_freezable={ALL}",)
"""A linear probe lies outside of the space: no more than 18 layers can be frozen in it."""
METHODS: dict[str, tuple[str, ...]] = {
    "genetic": (),
    "random": ("search=random", "search.initial=[]"),
    "tpe": ("search=tpe", "search.initial=[]"),
    "linear probe, lr 1e-3": recipe(ALL, "1e-3", *PROBE),
    "linear probe, lr 1e-2": recipe(ALL, "1e-2", *PROBE),
    "full fine-tuning, lr 1e-3": recipe("0", "1e-3"),
    "full fine-tuning, lr 1e-4": recipe("0", "1e-4"),
}


def main() -> None:
    """Do the runs that are missing; print and save what came of them."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if not (given["root"] and given["name"]):
        raise UserError(
            "Give a folder that holds a folder of images for each class: root=PATH name=NAME"
        )
    n_seeds, trials, size = (whole(name, given[name]) for name in ("seeds", "trials", "size"))
    names = [name for name in given["only"].split(";") if name] or list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"only={unknown[0]} is none of {'; '.join(METHODS)}.")
    output = Path(given["output"]).absolute() / given["name"]
    words = (
        *("data=folder", f"data.root='{Path(given['root']).absolute()}'"),
        *("model=se_densenet121_k12", f"data.image_size={size}", f"budget.trials={trials}"),
    )
    runs = []
    for seed in range(n_seeds):
        for name in names:
            folder = output / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}"
            # A later word wins.
            once(folder, [*words, *extra, *METHODS[name], f"seed={seed}"])
            runs.append({"method": name, "seed": seed, **figures(folder)})
            print(f"seed {seed}: {name} {runs[-1]['test_accuracy']:.1%}", file=sys.stderr)
    result = {"name": given["name"], "trials": trials, "methods": summary(runs), "runs": runs}
    path = Path(given["results"] or RESULTS / f"value_{given['name']}.json")
    write_json(path, {**origin(), **result})
    print(markdown(result["methods"]))


def once(folder: Path, words: Sequence[str]) -> None:
    """Make a run, or go on with it, unless it is whole.

    Raises:
        UserError: If it fails.
    """
    if (folder / "result.json").is_file():
        return
    fresh = [*words, f"hydra.run.dir='{folder}'"]
    what = [f"resume={folder}"] if (folder / JOURNAL).is_file() else fresh
    done = subprocess.run([sys.executable, "-m", "gatl", *what], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"The run {folder.name} has failed, see above: {' '.join(what)}")


def figures(folder: Path) -> dict[str, Any]:
    """Return what a run came to, and what it took."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    with (folder / HISTORY).open(newline="", encoding="utf-8") as file:
        trials = [row for row in csv.DictReader(file) if not row["reused_from"]]
    searched = sum(int(row["epochs"] or 0) for row in trials)
    each = max(int(row["epochs"] or 0) for row in trials)
    again = sum(len(candidate["val_losses"]) for candidate in result["reevaluation"])
    return {
        "genes": result["best"]["genes"],
        "test_accuracy": result["test"]["accuracy"],
        "test_images": result["test"]["n"],
        "val_loss": result["final"]["val_loss"],
        "epochs": searched + again * each + result["final"]["epochs"],
        "seconds": result["seconds"],
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return figures over the seeds, and how accuracies differ from gatl's, paired by seed."""
    of: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        of.setdefault(run["method"], {})[run["seed"]] = run
    base = of.get(BASELINE, {})
    return {
        name: {
            **{
                key: over_seeds([run[key] for run in mine.values()])
                for key in ("test_accuracy", "val_loss", "epochs", "seconds")
            },
            "less_than_genetic": over_seeds(
                [
                    base[seed]["test_accuracy"] - run["test_accuracy"]
                    for seed, run in mine.items()
                    if seed in base and name != BASELINE
                ]
            ),
        }
        for name, mine in of.items()
    }


def markdown(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table, the best first."""
    ranked = sorted(methods, key=lambda name: -methods[name]["test_accuracy"]["mean"])
    return table(
        ("what", "test accuracy", "less than genetic", "final val_loss", "epochs", "minutes"),
        *(
            (
                *(name, written(methods[name]["test_accuracy"], ".1f", 100, " %")),
                written(methods[name]["less_than_genetic"], "+.1f", 100, " %")
                if name != BASELINE
                else "",
                written(methods[name]["val_loss"]),
                written(methods[name]["epochs"], ".0f"),
                written(methods[name]["seconds"], ".1f", 1 / 60),
            )
            for name in ranked
        ),
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
