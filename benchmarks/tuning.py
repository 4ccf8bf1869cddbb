"""Better settings of the genetic algorithm: found on one landscape, confirmed on another.

    python benchmarks/tuning.py tune=flowers5 confirm=cifar20

Coordinate descent: from the defaults in ``conf/ga``, each setting in turn takes each of its
`LEVELS`, and keeps the best, until a round changes nothing. A setting's score is its mean
regret (see `strategies`) over the seeds, in proportion to that of the start: the geometric mean
over both families of regressors, 50, 100 and 200 trials, and the simulated times that the start
takes for them, so that what halving saves counts as what it loses does. Then start and end are
compared on the other landscape, which the descent has not seen, with other seeds.

Prints every step, and writes ``results=FILE``, by default ``benchmarks/results/tuning.json``.
The searches are kept in ``output``, and the same command goes on with them.

Options and their defaults: ``tune= confirm= seeds=40 confirm_seeds=100 trials=200 workers=2
rounds=3``, ``start=WORD+WORD`` (Hydra overrides), ``output=outputs/tuning``.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simulator
from common import RESULTS, options, origin, table, whole
from strategies import AT, Array, Cell, Curves, center, effect, search_all, written

from gatl.cli import one_line_errors
from gatl.errors import UserError
from gatl.files import write_json

DEFAULTS = {
    **{"tune": "", "confirm": "", "seeds": "40", "confirm_seeds": "100", "trials": "200"},
    **{"workers": "2", "rounds": "3", "start": "", "output": "outputs/tuning"},
    "results": str(RESULTS / "tuning.json"),
}
_FULL = "{{included_layers:58,frozen_layers:{},learning_rate:1e-3,dropout:{}}}"
LEVELS: dict[str, tuple[str, ...]] = {
    "ga.mutation_step": ("0.05", "null", "0.03", "0.1", "0.2", "0.3"),
    "ga.mutation_prob": ("0.8", "0.15", "0.25", "0.4", "0.6"),
    "ga.pop": ("12", "8", "16", "24"),
    "ga.n_elites": ("6", "1", "2", "4", "7"),
    "ga.tournament_size": ("2", "3", "4"),
    "ga.crossover_prob": ("0.9", "0.5", "0.0"),
    "ga.mode": ("generational", "steady_state"),
    "search.initial": (
        f"[{_FULL.format(0, 0.2)},{_FULL.format(18, 0.2)}]",
        f"[{_FULL.format(0, 0.5)},{_FULL.format(18, 0.5)}]",
        f"[{_FULL.format(0, 0.5)},{_FULL.format(18, 0.5)},{_FULL.format(9, 0.2)}]",
        "[]",
    ),
    "pruner": ("successive_halving", "none"),
}
"""What each setting can be; the first is gatl's default, so that no setting has two names."""
Settings = Mapping[str, str]
FRESH = 1000
"""The first seed of the confirmation."""


def main() -> None:
    """Descend, confirm, print and save."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if extra:
        raise UserError(f"{extra[0]!r} is no option; they are {', '.join(DEFAULTS)}.")
    if not (given["tune"] and given["confirm"]):
        raise UserError("Give two landscapes: tune=flowers5 confirm=cifar20")
    numbers = {name: whole(name, given[name]) for name in ("trials", "workers", "rounds")}
    if numbers["trials"] < AT[-1]:
        raise UserError(f"trials must be at least {AT[-1]}, but got {numbers['trials']}.")
    seeds, fresh = whole("seeds", given["seeds"]), whole("confirm_seeds", given["confirm_seeds"])
    tune, confirm = simulator.named(given["tune"]), simulator.named(given["confirm"])
    start = {name: levels[0] for name, levels in LEVELS.items()}
    start |= dict(word.partition("=")[::2] for word in given["start"].split("+") if word)

    def searched(names: Sequence[str], seeds: range, *all_settings: Settings) -> list[list[Curves]]:
        cells = [
            {
                Cell(name, family, True, key(settings), " ".join(words(settings))): seeds
                for name in names
                for family in simulator.FAMILIES
            }
            for settings in all_settings
        ]
        every = {cell: seeds for some in cells for cell, seeds in some.items()}
        found = search_all(every, numbers["trials"], numbers["workers"], Path(given["output"]))
        return [[found[cell] for cell in some] for some in cells]

    best, steps = start, []
    (base,) = searched(tune, range(seeds), start)
    for number in range(numbers["rounds"]):
        before = best
        for name, levels in LEVELS.items():
            tried = [{**best, name: level} for level in levels]
            curves = searched(tune, range(seeds), best, *tried)
            scores = [score(mine, base) for mine in curves]
            steps.append({"round": number, "setting": name, "now": dict(best)})
            steps[-1]["scores"] = dict(zip(levels, scores[1:], strict=True))
            if min(scores[1:]) < scores[0]:
                best = tried[int(np.argmin(scores[1:]))]
            shown = ", ".join(f"{level} {s:.3f}" for level, s in steps[-1]["scores"].items())
            print(f"round {number + 1}, {name}: {shown}; best so far {min(scores):.3f}", flush=True)
        if best == before:
            break
    first, last = searched(confirm, range(FRESH, FRESH + fresh), start, best)
    confirmed = [compared(*pair) for pair in zip(first, last, strict=True)]
    result = {"start": start, "best": best, "steps": steps, "confirm": confirmed}
    write_json(Path(given["results"]), {**origin(), **result})
    print(f"\nBest: {' '.join(words(best))}\n\n{markdown(confirmed)}")


def words(settings: Settings) -> list[str]:
    """Return settings as Hydra overrides."""
    return [f"{name}={value}" for name, value in settings.items()]


def key(settings: Settings) -> str:
    """Return a name for the file of a setting's searches."""
    return hashlib.sha256(" ".join(words(settings)).encode()).hexdigest()[:16]


def score(curves: Sequence[Curves], base: Sequence[Curves]) -> float:
    """Return regrets in proportion to those of a base, the geometric mean over all of them."""
    ratios = [
        mine.mean(0) / theirs.mean(0)
        for curve, other in zip(curves, base, strict=True)
        for mine, theirs in pairs(curve, other)
    ]
    return float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-9)))))


def pairs(mine: Curves, base: Curves) -> list[tuple[Array, Array]]:
    """Return regrets after the same trials, and after the same time, each (seeds, n)."""
    at = [n - 1 for n in AT]
    times = base.seconds.mean(0)[at]
    return [
        (mine.regret[:, at], base.regret[:, at]),
        (mine.at_seconds(times), base.at_seconds(times)),
    ]


def compared(first: Curves, last: Curves) -> dict[str, Any]:
    """Return regrets of the start and of the best, and the effect."""
    return {
        str(n): {
            "start": center(first.regret[:, n - 1]),
            "best": center(last.regret[:, n - 1]),
            "effect": effect(last.regret[:, n - 1], first.regret[:, n - 1]),
        }
        for n in AT
    }


def markdown(confirmed: Sequence[Mapping[str, Any]]) -> str:
    """Return the confirmation's table."""
    return table(
        ("regressor", "trials", "regret of the start", "of the best", "better", "p"),
        *(
            (
                *(family, n, written(row["start"]), written(row["best"])),
                *(f"{row['effect']['better']:.0%}", f"{row['effect']['p']:.2g}"),
            )
            for family, rows in zip(simulator.FAMILIES, confirmed, strict=False)
            for n, row in rows.items()
        ),
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
