"""Whether the first epochs of a fit tell how it ends, and what successive halving saves.

    python benchmarks/halving.py root=PHOTOS

PHOTOS holds a folder of images for each class. Random chromosomes are fitted to the
end, as one generation of `gatl`, in the run folder ``output``; the same command goes on
with it, and reads it once it is whole. From the learning curves follow the rank
correlation of each epoch with the end, and, over many generations drawn from these
chromosomes, what halving them would have saved and lost. Prints tables; writes them to
``results=FILE``, by default ``benchmarks/results/halving.json``.

Options and their defaults: ``trials=48 epochs=6 pop=12 draws=2000``,
``output=outputs/halving``. Every other word is a Hydra override, such as ``seed=1``.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import RESULTS, options, origin, run_search, table, whole
from rich.console import Console
from scipy.stats import spearmanr

from gatl.cli import compose, one_line_errors
from gatl.config import checked
from gatl.errors import UserError
from gatl.files import write_json
from gatl.halving import rungs, survivors
from gatl.record import HISTORY

DEFAULTS = {
    **{"root": "", "trials": "48", "epochs": "6", "pop": "12", "draws": "2000"},
    "output": "outputs/halving",
    "results": str(RESULTS / "halving.json"),
}
FACTORS = (2, 3, 4)


class Curve(NamedTuple):
    """One fit: the lowest val_loss up to each epoch, and what it took, in seconds."""

    losses: tuple[float, ...]
    seconds: float


def main() -> None:
    """Do the fits that are missing; print and save what follows from them."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    folder = Path(given["output"])
    trials, epochs, pop, draws = (whole(n, given[n]) for n in ("trials", "epochs", "pop", "draws"))
    search(given["root"], trials, epochs, folder, extra)
    curves = read(folder, epochs)
    ends = [n for n in (3, 6, 9) if n < epochs] + [epochs]
    ranks = [correlations(curves, end) for end in ends]
    halved = [
        {"epochs": end, "reduction_factor": factor} | halve(curves, end, factor, pop, draws)
        for end in ends
        for factor in FACTORS
    ]
    about = {"fits": len(curves), "failed": trials - len(curves), "pop": pop, "draws": draws}
    fits = [curve._asdict() for curve in curves]
    result = {**origin(), **about, "correlations": ranks, "halving": halved, "curves": fits}
    write_json(Path(given["results"]), result)
    print(f"{len(curves)} random chromosomes, {trials - len(curves)} more failed\n")
    print(markdown(ranks, halved))


def search(root: str, trials: int, epochs: int, folder: Path, extra: Sequence[str]) -> None:
    """Fit random chromosomes to the end, going on with what the folder holds."""
    if (folder / HISTORY).is_file() and len(rows(folder / HISTORY)) >= trials:
        return
    if not root:
        raise UserError("Give a folder that holds a folder of images for each class: root=PATH")
    config = checked(
        compose(
            [
                *("data=folder", f"data.root={Path(root).resolve()}", "data.image_size=64"),
                *("model=se_densenet121_k12", "model.weights=bundled", "pruner=none"),
                *(f"ga.pop={trials}", "ga.generations=1", "search.initial=[]"),
                *(f"trainer.max_epochs={epochs}", *extra),
            ]
        )
    )
    run_search(config, folder, Console(highlight=False, markup=False))


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(folder: Path, epochs: int) -> list[Curve]:
    """Return the learning curves of the fits that came to their end."""
    curves = []
    for trial in rows(folder / HISTORY):
        if trial["state"] != "COMPLETE" or trial["reused_from"]:
            continue
        log = rows(folder / "trials" / trial["number"] / "metrics.csv")
        losses = np.minimum.accumulate([float(row["val_loss"]) for row in log])
        if len(losses) != epochs:
            raise UserError(f"{folder} has fits of {len(losses)} epochs: give epochs={len(losses)}")
        curves.append(Curve(tuple(losses.tolist()), float(trial["duration_s"])))
    return curves


def correlations(curves: Sequence[Curve], end: int) -> dict[str, Any]:
    """Return Spearman's rank correlation of each epoch with the end."""
    losses = np.array([curve.losses for curve in curves])
    best = losses[:, end - 1] <= np.quantile(losses[:, end - 1], 0.5)
    found: dict[str, Any] = {"epochs": end}
    for name, some in (("all", slice(None)), ("better half", best)):
        found[name] = [
            float(spearmanr(losses[some, epoch], losses[some, end - 1]).statistic)
            for epoch in range(end)
        ]
    return found


def halve(curves: Sequence[Curve], end: int, factor: int, pop: int, draws: int) -> dict[str, float]:
    """Halve generations drawn from the curves, the first rung after one epoch.

    Returns:
        Shares of epochs and of time that are saved; how often the best chromosome is
        found; and by how much the best loss is worse in the mean, in nats.
    """
    rng = np.random.default_rng(0)
    epochs, seconds, full, found, worse = 0.0, 0.0, 0.0, 0, 0.0
    for _ in range(draws):
        drawn = [curves[i] for i in rng.choice(len(curves), pop, replace=False)]
        left, before = frozenset(range(pop)), 0
        for rung in (*rungs(1, factor, end), end):
            epochs += len(left) * (rung - before)
            seconds += sum(drawn[i].seconds for i in left) * (rung - before)
            before = rung
            if rung < end:
                left = survivors({i: drawn[i].losses[rung - 1] for i in left}, factor)
        full += sum(curve.seconds for curve in drawn) * end
        best = min(curve.losses[end - 1] for curve in drawn)
        kept = min(drawn[i].losses[end - 1] for i in left)
        found += kept == best
        worse += kept - best
    return {
        "epochs_saved": 1 - epochs / (draws * pop * end),
        "time_saved": 1 - seconds / full,
        "best_found": found / draws,
        "loss_worse_by": worse / draws,
    }


def markdown(ranks: Sequence[dict[str, Any]], halved: Sequence[dict[str, Any]]) -> str:
    """Return both tables."""
    first = table(
        ("fit", "chromosomes", "rank correlation of epoch 1, 2, ... with the end"),
        *(
            (f"{row['epochs']} epochs", name, ", ".join(f"{rho:.2f}" for rho in row[name]))
            for row in ranks
            for name in ("all", "better half")
        ),
    )
    second = table(
        ("fit", "factor", "epochs saved", "time saved", "best found", "loss worse by"),
        *(
            (
                *(f"{row['epochs']} epochs", str(row["reduction_factor"])),
                *(f"{row[name]:.0%}" for name in ("epochs_saved", "time_saved", "best_found")),
                f"{row['loss_worse_by']:.4f}",
            )
            for row in halved
        ),
    )
    return f"{first}\n\n{second}"


if __name__ == "__main__":
    with one_line_errors():
        main()
