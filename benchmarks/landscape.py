"""A landscape: what real fits yield all over the search space, recorded once.

    python benchmarks/landscape.py root=PHOTOS name=flowers5

PHOTOS holds a folder of images for each class, of which some are copied to ``output``.
The chromosomes are the two that every search tries first, the corners and edges that
matter (`EDGES`), and a scrambled Sobol design of the space. Each is fitted by `gatl` to its
end, as one generation; then some of them, spread over the ranks and the denser the better
they are, are fitted with other seeds, so that the noise is known. The run folders stay in
``output``, and the same command goes on with what they hold.

Writes ``landscapes/NAME.csv`` beside this file: a row for each fit, with val_loss and
val_accuracy after every epoch, and ``landscapes/NAME.json``: where they come from. What can
be done with such a table is in `simulator` and `strategies`.

Options and their defaults: ``name= fits=256 repeated=30 seeds=3 images=2000 val=500 classes=``
(the first by name; all) ``epochs=3 size=64``, ``output=outputs/landscape``. Every other word is
a Hydra override.
"""

import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peer
from common import options, origin, run_search, whole
from evaluation import sobol
from optuna.trial import FrozenTrial
from peer import Genes
from rich.console import Console

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.errors import UserError
from gatl.files import write_json
from gatl.ranking import rank_key
from gatl.record import outcome_of

LANDSCAPES = Path(__file__).resolve().parent / "landscapes"
DEFAULTS = {
    **{"root": "", "name": "", "fits": "256", "repeated": "30", "seeds": "3"},
    **{"images": "2000", "val": "500", "classes": "", "epochs": "3", "size": "64"},
    "output": "outputs/landscape",
}
EDGES: list[Genes] = [
    {
        **{"included_layers": included, "frozen_layers": frozen},
        **{"learning_rate": learning_rate, "dropout": dropout},
    }
    for (included, frozen), (learning_rate, dropout) in itertools.product(
        [(58, 0), (58, 18), (42, 0), (42, 18), (18, 0), (18, 18), (6, 0), (1, 0)],
        [(1e-4, 0.1), (1e-3, 0.1), (1e-2, 0.5)],
    )
]
"""All layers, whole blocks, and one layer, of the DenseNets, with nothing and all frozen."""


def main() -> None:
    """Do the fits that are missing, and write the table."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    n, n_repeated, n_seeds = (whole(name, given[name]) for name in ("fits", "repeated", "seeds"))
    if not given["name"]:
        raise UserError("Give the landscape a name: name=flowers5")
    output = Path(given["output"]).absolute() / given["name"]
    epochs, size = whole("epochs", given["epochs"]), whole("size", given["size"])
    words = (
        *("data=folder", f"data.root='{output / 'photos'}'", f"data.image_size={size}"),
        *("model=se_densenet121_k12", "model.weights=bundled", "pruner=none"),
        *(f"trainer.max_epochs={epochs}", "ga.generations=1", *extra),
    )
    everything, ranks = design(checked(compose([*words])), n), repeated(n, n_repeated)
    copy_photos(given, output / "photos")
    trials = [fitted(everything, words, output, seed=0)]
    ranked = [trial.params for trial in sorted(trials[0], key=rank_key)]
    again = [ranked[rank] for rank in ranks]
    trials += [fitted(again, words, output, seed) for seed in range(1, n_seeds)]
    rows = [row(epochs, output, *fit) for fit in in_order(everything, trials)]
    LANDSCAPES.mkdir(exist_ok=True)
    with (LANDSCAPES / f"{given['name']}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    failed = sum(row["state"] == "FAIL" for row in rows)
    about = {"fits": len(rows), "failed": failed, "chromosomes": n}
    write_json(LANDSCAPES / f"{given['name']}.json", {**origin(), **about})
    print(f"{len(rows)} fits of {n} chromosomes, {failed} failed: {given['name']}.csv")


def copy_photos(given: dict[str, str], folder: Path) -> None:
    """Copy the images unless they are there."""
    n_train, n_val = whole("images", given["images"]), whole("val", given["val"])
    if not folder.is_dir():
        if not given["root"]:
            raise UserError("Give a folder that holds a folder of images for each class: root=PATH")
        n_classes = whole("classes", given["classes"]) if given["classes"] else None
        peer.subset(given["root"], folder, n_train, n_val, n_classes)


def design(config: Config, n: int) -> list[Genes]:
    """Return so many distinct chromosomes: initial ones, edges, and a Sobol design.

    Raises:
        UserError: If that is too few for the first two.
    """
    space = config.space
    first = [space.to_dict(space.from_dict(genes)) for genes in (*config.initial, *EDGES)]
    distinct: dict[tuple[tuple[str, float], ...], Genes] = {}
    for genes in (*first, *sobol(space, 2 * n)):
        distinct.setdefault(tuple(genes.items()), genes)
    least = len({tuple(genes.items()) for genes in first}) + 1
    if n < least:
        raise UserError(f"fits must be at least {least}, but got {n}.")
    return list(itertools.islice(distinct.values(), n))


def repeated(n: int, m: int) -> list[int]:
    """Return m distinct ranks below n, of which half are among the better quarter.

    Raises:
        UserError: If there are too few.
    """
    if m > n // 2:
        raise UserError(f"repeated must be at most half of fits={n}, but got {m}.")
    return [max(i, int(n * (i / m) ** 2)) for i in range(m)]


def fitted(
    chromosomes: Sequence[Genes], words: Sequence[str], output: Path, seed: int
) -> list[FrozenTrial]:
    """Fit chromosomes in the run folder of a seed, going on with what it holds."""
    config = checked(compose([*words, f"ga.pop={len(chromosomes)}", f"seed={seed}"]))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return run_search(replace(config, initial=tuple(chromosomes)), output / f"seed{seed}", console)


def in_order(
    chromosomes: Sequence[Genes], trials: Sequence[Sequence[FrozenTrial]]
) -> Iterator[tuple[int, int, FrozenTrial]]:
    """Yield the number in the design, the seed, and the trial of every fit."""
    number = {tuple(genes.items()): i for i, genes in enumerate(chromosomes)}
    for seed, of_seed in enumerate(trials):
        for trial in of_seed:
            yield number[tuple(trial.params.items())], seed, trial


def row(n_epochs: int, output: Path, number: int, seed: int, trial: FrozenTrial) -> dict[str, Any]:
    """Return a fit's row.

    Raises:
        UserError: If it failed, and not because it diverged, or has no whole log.
    """
    outcome = outcome_of(trial)
    if outcome.error and not outcome.diverged:
        raise UserError(
            f"A fit of seed {seed} failed ({outcome.error}): remove {output}/seed{seed}"
        )
    log = output / f"seed{seed}" / "trials" / str(trial.number) / "metrics.csv"
    epochs: list[dict[str, str]] = []
    if log.is_file():  # not of a fit that diverged in its first epoch
        with log.open(newline="") as file:
            epochs = list(csv.DictReader(file))
    if outcome.error is None and len(epochs) != n_epochs:
        raise UserError(
            f"{log} must have {n_epochs} epochs, but has {len(epochs)}: remove {output}/seed{seed}"
        )
    found: dict[str, Any] = {"chromosome": number, "seed": seed, **trial.params}
    found |= {"state": trial.state.name}
    for name in ("val_loss", "val_accuracy"):
        for epoch in range(n_epochs):
            value = epochs[epoch][name] if epoch < len(epochs) else ""
            found[f"{name}_{epoch + 1}"] = value and f"{float(value):.6g}"
    found |= {
        "duration_s": f"{outcome.duration_s:.3f}",
        "trainable_params": outcome.trainable_params,
        "error": outcome.error or "",
    }
    return found


if __name__ == "__main__":
    with one_line_errors():
        main()
