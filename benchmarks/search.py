"""A whole search: gatl's defaults beside Optuna's, at the same number of trials and epochs.

    python benchmarks/search.py root=PHOTOS

PHOTOS holds a folder of images for each class, of which some are copied to ``output``.
The peer is the script of `peer` with Optuna's default sampler, TPE (Bergstra et al. 2011).
gatl is as it comes, but for the number of trials: the genetic algorithm, its initial
chromosomes, successive halving, the feature cache, all workers. Each search runs in a
process of its own; decoding and the start of the workers are timed too. ``initial=yes``
hands gatl's initial chromosomes to the peer as well.

Prints the time and the best val_loss of both, and when gatl reached the peer's best;
writes them, with the curves, to ``results=FILE``, by default
``benchmarks/results/search.json``.

Options and their defaults: ``trials=32 images=1000 val=250 epochs=3 seeds=3 initial=no``,
``output=outputs/search``. Every other word is a Hydra override.
"""

import io
import multiprocessing
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import peer
from common import RESULTS, options, origin, over_repeats, run_search, table, whole
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.errors import UserError
from gatl.files import write_json

DEFAULTS = {
    **{"root": "", "trials": "32", "images": "1000", "val": "250", "epochs": "3"},
    **{"seeds": "3", "initial": "no", "output": "outputs/search"},
    "results": str(RESULTS / "search.json"),
}


class Searched(NamedTuple):
    """One search: how long it took, and (seconds, val_loss) whenever a better one was found."""

    seconds: float
    curve: list[tuple[float, float]]

    @property
    def best(self) -> float:
        """The lowest val_loss."""
        return self.curve[-1][1]

    def reached(self, val_loss: float) -> float | None:
        """Return the seconds after which a val_loss was reached, if it was."""
        return next((at for at, loss in self.curve if loss <= val_loss), None)


def main() -> None:
    """Search; print and save."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if not given["root"]:
        raise UserError("Give a folder that holds a folder of images for each class: root=PATH")
    trials, n_train, n_val, epochs, seeds = (
        whole(name, given[name]) for name in ("trials", "images", "val", "epochs", "seeds")
    )
    if given["initial"] not in ("yes", "no"):
        raise UserError(f"initial must be yes or no, but got {given['initial']}.")
    output = Path(given["output"]).absolute()
    peer.subset(given["root"], output / "photos", n_train, n_val)
    config = checked(
        compose(
            [
                *("data=folder", f"data.root='{output / 'photos'}'", "data.image_size=64"),
                *("model=se_densenet121_k12", "model.weights=bundled", "data.batch_size=32"),
                *(f"budget.trials={trials}", f"trainer.max_epochs={epochs}"),
                *extra,
            ]
        )
    )
    runs = []
    for seed in range(seeds):
        found: dict[str, Searched] = {}
        for name in SEARCHES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                arguments = (replace(config, seed=seed), output / "run", given["initial"] == "yes")
                found[name] = pool.submit(search, name, *arguments).result()
            ended = found[name]
            print(f"seed {seed}: {name} {ended.seconds:.0f} s, best {ended.best:.4f}", flush=True)
        runs.append(compared(seed, found))
    times = [run["peer"]["seconds"] / run["gatl"]["seconds"] for run in runs]
    result = {**origin(), "runs": runs, "times_as_fast": over_repeats(times)}
    write_json(Path(given["results"]), result)
    print(f"\n{markdown(runs)}")


def search(name: str, config: Config, folder: Path, initial: bool) -> Searched:
    """Search in one way, in this process."""
    peer.quiet()
    shutil.rmtree(folder, ignore_errors=True)
    started = datetime.now()  # naive, as Optuna's own times are
    trials = SEARCHES[name](config, folder, initial)
    seconds = (datetime.now() - started).total_seconds()
    curve: list[tuple[float, float]] = []
    complete = [t for t in trials if t.state is TrialState.COMPLETE and t.datetime_complete]
    for trial in sorted(complete, key=lambda t: t.datetime_complete):
        if not curve or trial.value < curve[-1][1]:
            curve.append(((trial.datetime_complete - started).total_seconds(), trial.value))
    return Searched(seconds, curve)


def by_peer(config: Config, folder: Path, initial: bool) -> Sequence[FrozenTrial]:
    """Search with Optuna, Lightning, ImageFolder and DataLoader."""
    study = optuna.create_study(
        direction="minimize", sampler=optuna.samplers.TPESampler(seed=config.seed)
    )
    peer.suggest_all(study, config.initial if initial else ())
    study.optimize(peer.Objective(config, folder), config.n_trials)
    return study.trials


def by_gatl(config: Config, folder: Path, initial: bool) -> Sequence[FrozenTrial]:
    """Search with gatl, as it comes."""
    return run_search(config, folder, Console(file=io.StringIO()))


SEARCHES = {"peer": by_peer, "gatl": by_gatl}


def compared(seed: int, found: dict[str, Searched]) -> dict[str, Any]:
    """Return both searches of one seed, and when gatl reached the peer's best."""
    reached = found["gatl"].reached(found["peer"].best)
    return {
        "seed": seed,
        **{name: {**run._asdict(), "best": run.best} for name, run in found.items()},
        "peer_best_reached_by_gatl": reached,
        "share_of_peer_time": None if reached is None else reached / found["peer"].seconds,
    }


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Return a row for each seed."""
    return table(
        (
            *("seed", "peer, s", "gatl, s", "times as fast", "peer, best val_loss"),
            *("gatl, best val_loss", "gatl reaches the peer's best after"),
        ),
        *(
            (
                str(run["seed"]),
                *(f"{run[name]['seconds']:.0f}" for name in SEARCHES),
                f"{run['peer']['seconds'] / run['gatl']['seconds']:.2f}",
                *(f"{run[name]['best']:.4f}" for name in SEARCHES),
                "never"
                if (reached := run["peer_best_reached_by_gatl"]) is None
                else f"{reached:.0f} s, {run['share_of_peer_time']:.0%} of the peer's time",
            )
            for run in runs
        ),
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
