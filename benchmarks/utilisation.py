"""How busy the workers are while real fits run, by the order in which they start.

    python benchmarks/utilisation.py root=PHOTOS

PHOTOS holds a folder of images for each class. With each seed the genetic search runs generation
after generation, its fits in the order of their numbers, and once more with the longest first, by
what gatl holds them to cost from (L, F); both with successive halving, at whose rungs fits wait
for one another, and without; and last in steady state, where nobody waits for a generation. The
trials of one seed are the same in both orders. Utilisation is the share of the search's time that
the workers spent in fits.

Prints a table; writes it to ``results=FILE``, by default ``benchmarks/results/utilisation.json``.

Options and their defaults: ``root= seeds=3 pop=12 generations=2 workers=2``,
``output=outputs/utilisation`` (its runs go on with what is missing). Every other word is a Hydra
override of all runs.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, options, origin, over_repeats, run_search, table, whole
from optuna.trial import FrozenTrial
from rich.console import Console

from gatl.cli import compose, one_line_errors
from gatl.config import checked
from gatl.errors import UserError
from gatl.files import write_json
from gatl.record import fits_of, told_after
from gatl.search import Search

DEFAULTS = {
    **{"root": "", "seeds": "3", "pop": "12", "generations": "2", "workers": "2"},
    **{"output": "outputs/utilisation", "results": str(RESULTS / "utilisation.json")},
}


class ByNumber(Search):
    """The driver without an order of its own."""

    def _longest_first(self) -> None:
        pass


SEARCHES: dict[str, tuple[type[Search], tuple[str, ...]]] = {
    "halving, by number": (ByNumber, ()),
    "halving, longest first": (Search, ()),
    "whole fits, by number": (ByNumber, ("pruner=none",)),
    "whole fits, longest first": (Search, ("pruner=none",)),
    "whole fits, steady state": (Search, ("ga.mode=steady_state", "pruner=none")),
}


def main() -> None:
    """Search; print and save."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if not given["root"]:
        raise UserError("Give a folder that holds a folder of images for each class: root=PATH")
    seeds, pop, generations, workers = (
        whole(name, given[name]) for name in ("seeds", "pop", "generations", "workers")
    )
    output = Path(given["output"]).absolute()
    words = (
        *("data=folder", f"data.root='{Path(given['root']).absolute()}'", "data.image_size=64"),
        *("model=se_densenet121_k12", f"ga.pop={pop}", f"ga.generations={generations}"),
        f"evaluator.workers={workers}",
    )
    runs = []
    for seed in range(seeds):
        for name, (driver, more) in SEARCHES.items():
            config = replace(checked(compose([*words, *extra, *more])), seed=seed)
            folder = output / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}"
            trials = run_search(config, folder, Console(file=io.StringIO()), driver)
            runs.append({"search": name, "seed": seed, **figures(trials, workers)})
            print(f"seed {seed}: {name} {runs[-1]['utilisation']:.1%}", file=sys.stderr)
    result = summary(runs)
    write_json(Path(given["results"]), {**origin(), "searches": result, "runs": runs})
    print(markdown(result))


def figures(trials: Sequence[FrozenTrial], workers: int) -> dict[str, Any]:
    """Return how long a search took, and which share of it its workers fitted."""
    fits = [fit for trial in trials for fit in fits_of(trial)]
    seconds = max(told_after(trial) for trial in trials)
    spent = [fit[1] for fit in fits]
    return {
        "seconds": seconds,
        "utilisation": sum(spent) / (workers * seconds),
        "fits": len(fits),
        "longest": max(spent),
        "shortest": min(spent),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians and spreads over the seeds."""
    return {
        name: {
            key: over_repeats([run[key] for run in runs if run["search"] == name])
            for key in ("utilisation", "seconds", "fits", "longest", "shortest")
        }
        for name in SEARCHES
    }


def markdown(searches: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row for each kind of search."""

    def spread(figure: Mapping[str, float], spec: str) -> str:
        numbers = (format(figure[key], spec) for key in ("median", "min", "max"))
        return "{} ({} to {})".format(*numbers)

    return table(
        ("search", "utilisation", "seconds", "fits", "longest fit, s", "shortest, s"),
        *(
            (
                *(name, spread(found["utilisation"], ".1%"), spread(found["seconds"], ".0f")),
                *(f"{found[key]['median']:.3g}" for key in ("fits", "longest", "shortest")),
            )
            for name, found in searches.items()
        ),
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
