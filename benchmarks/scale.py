"""How far one driver goes: simulated searches with up to thousands of workers.

    python benchmarks/scale.py

First the driver is measured: gatl's own, with fits that take no time, for each number of
workers: its CPU time a trial, and how long a write waits for the disk. Then it searches a recorded
landscape (see `simulator`) on a simulated clock on which a fit takes what was recorded, times
``hours`` in a second round, and the driver takes the CPU time measured and ``write`` milliseconds
for each of its writes (other work on the disk tells in what was measured). Every worker has
``each`` trials, with at most ``most`` in all; the settings follow the workers (see `settings`).
``before=FILE`` is an earlier result, with whose driver the genetic algorithm searches as well;
beyond the numbers of workers that it has, its CPU time is extrapolated linearly.

What is done is kept in ``output``, and the same command goes on with it. Prints tables, draws
``plot=FILE`` and writes ``results=FILE``, by default ``benchmarks/results/scale.json``.

Options and their defaults: ``workers=1,8,64,512,4096 seeds=3`` (one from ``few=512`` workers on,
and with more than that the genetic algorithm alone, since each of these searches takes a minute)
``each=8 most=8192 slow=512`` (trials of ``tpe``, which thinks the longer the more there are),
``write=1 hours=150 name=flowers5 only=search`` (or ``driver``, to measure alone) ``before=
output=outputs/scale.json``.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import driver as null_fits
import numpy as np
import simulator
import strategies
from common import RESULTS, options, origin, table, whole
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from simulator import DriverTime

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.errors import UserError
from gatl.evaluation import Fit
from gatl.files import write_json
from gatl.outcome import Outcome
from gatl.progress import View
from gatl.record import JOURNAL, open_study, outcome_of
from gatl.search import Search
from gatl.strategies.build import build_strategy

DEFAULTS = {
    **{"workers": "1,8,64,512,4096", "seeds": "3", "few": "512", "each": "8", "most": "8192"},
    **{
        "slow": "512",
        "write": "1",
        "hours": "150",
        "name": "flowers5",
        "only": "search",
        "before": "",
    },
    **{
        "output": "outputs/scale.json",
        "plot": "docs/scale.png",
        "results": str(RESULTS / "scale.json"),
    },
}
STRATEGIES = (
    *("genetic", "genetic, steady state", "genetic, steady state, twice the lag"),
    *("regularized evolution", "random", "tpe"),
)
REFERENCE = 8
"""Workers whose time for their trials, with random search, is that at which regrets are told."""
WRITES = 300
"""Writes whose wait for the disk is measured."""


def settings(strategy: str, n_workers: int) -> list[str]:
    """Return the overrides that keep so many workers busy.

    A population, and so a generation, has as many trials as there are workers, at least the
    default's 12; what a trial may not know yet, ``lag``, is as many, at least the default, or
    twice that. Random search needs to know nothing.
    """
    pop, lag = max(12, n_workers), max(4, n_workers)
    return {
        "genetic": [f"ga.pop={pop}", "ga.n_elites=6"],
        "genetic, steady state": ["ga.mode=steady_state", f"ga.pop={pop}", f"search.lag={lag}"],
        "genetic, steady state, twice the lag": [
            *("ga.mode=steady_state", f"ga.pop={pop}", f"search.lag={2 * lag}")
        ],
        "regularized evolution": [
            *("search=regularized_evolution", f"search.population_size={pop}"),
            f"search.lag={lag}",
        ],
        "random": ["search=random", f"search.lag={8 * lag}"],
        "tpe": ["search=tpe", f"search.lag={lag}"],
    }[strategy]


class Idle(null_fits.NullEvaluator):
    """Many workers, whose fits end in any order and take no time."""

    def __init__(self, n_workers: int) -> None:
        super().__init__()
        self.n_workers = n_workers
        self._rng = random.Random(0)

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        """Return the outcome of a fit, any."""
        chosen = self._rng.randrange(len(self._running))
        self._running[chosen], self._running[-1] = self._running[-1], self._running[chosen]
        key, fit = self._running.pop()
        return [(key, null_fits.outcome(fit.genes, fit.epochs))]


class Recalled:
    """A landscape whose fits are foretold once and take a multiple of their time."""

    def __init__(self, landscape: simulator.Landscape) -> None:
        self.factor = 1.0
        self._landscape = landscape
        self._known: dict[tuple[Any, ...], Outcome] = {}

    def outcome(self, fit: Fit, since: int) -> Outcome:
        """Return what a fit yields, see `simulator.Landscape.outcome`."""
        key = (fit.seed, *fit.genes.values(), fit.epochs, since)
        if key not in self._known:
            self._known[key] = self._landscape.outcome(fit, since)
        found = self._known[key]
        return dataclasses.replace(found, duration_s=self.factor * found.duration_s)


def main() -> None:
    """Measure the driver, then search; print, draw and save what came of it."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if extra:
        raise UserError(f"{extra[0]!r} is no option; they are {', '.join(DEFAULTS)}.")
    n = {name: whole(name, given[name]) for name in ("seeds", "few", "each", "most", "slow")}
    hours, write = whole("hours", given["hours"]), whole("write", given["write"])
    n_workers = [whole("workers", word) for word in given["workers"].split(",")]
    if given["only"] not in ("search", "driver"):
        raise UserError(f"only must be search or driver, but got {given['only']}.")
    (name,) = simulator.named(given["name"])
    output = Path(given["output"])
    result: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    result.setdefault("driver", {})
    for w in n_workers:
        if str(w) not in result["driver"]:
            result["driver"][str(w)] = driver_time(w, min(max(300, 2 * w), 4096))
            keep(output, result)
    if given["before"]:
        earlier = json.loads(Path(given["before"]).read_text())["driver"]
        result["driver_before"] = extended(earlier, n_workers)
    if given["only"] == "search":
        landscape = strategies.landscape_of(name, "trees")
        result |= {"landscape": name, **n, "hours": hours, "write_ms": write}
        result.setdefault("rows", [])
        for row in searches(landscape, n_workers, n, hours, result):
            result["rows"].append(row)
            keep(output, result)
        draw(result, Path(given["plot"]))
    write_json(Path(given["results"]), {**origin(), **result})
    print(markdown(result))


def keep(path: Path, result: Mapping[str, Any]) -> None:
    """Keep what is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def driver_time(n_workers: int, n_trials: int) -> dict[str, float]:
    """Measure what the driver takes for a trial of the genetic algorithm without halving.

    Returns:
        ``cpu_ms`` a trial, ``write_ms`` that one of its three writes waits for the disk (the
        median of some), ``journal_bytes`` a trial, and ``trials`` that it was measured on.
    """
    words = [*settings("genetic", n_workers), "pruner=none", f"budget.trials={n_trials}"]
    config = checked(compose(words))
    strategy, stop = build_strategy(config), threading.Event()
    shown = (config.n_trials, config.trainer.max_epochs, config.model.n_layers)
    with (
        tempfile.TemporaryDirectory(dir=".") as name,
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
    ):
        folder = Path(name)
        with View(Console(file=nowhere, soft_wrap=True), *shown, strategy.generation) as view:
            study = open_study(folder, strategy)
            search = Search(
                config, study, strategy, Idle(n_workers), folder, view, stop, threading.Event()
            )
            began = time.process_time()
            with mock.patch("os.fsync", functools.partial(timed, os.fsync, waits := [])):
                search.run()
            cpu = time.process_time() - began
        n_bytes = (folder / JOURNAL).stat().st_size
    return {
        "cpu_ms": 1000 * cpu / n_trials,
        "write_ms": 1000 * statistics.median(waits),
        "journal_bytes": n_bytes / n_trials,
        "trials": n_trials,
    }


def timed(fsync: Callable[[int], None], waits: list[float], descriptor: int) -> None:
    """Wait for the disk and note how long, a few times; then do not, since it takes as long."""
    if len(waits) < WRITES:
        began = time.perf_counter()
        fsync(descriptor)
        waits.append(time.perf_counter() - began)


def extended(
    measured: Mapping[str, Mapping[str, Any]], n_workers: Sequence[int]
) -> dict[str, Mapping[str, Any]]:
    """Add the CPU time with more workers: on the line through the two largest numbers measured."""
    (few, less), (many, more) = sorted((int(w), found["cpu_ms"]) for w, found in measured.items())[
        -2:
    ]
    each = (more - less) / (many - few)
    beyond = {str(w): {"cpu_ms": more + each * (w - many)} for w in n_workers if w > many}
    return {**measured, **beyond}


def time_of(measured: Mapping[str, float], write_ms: float) -> DriverTime:
    """Return what the driver takes, of whose three writes one begins a trial."""
    write = (measured["cpu_ms"] / 3 + write_ms) / 1000
    return DriverTime(write, 2 * write)


def searches(
    landscape: simulator.Landscape,
    n_workers: Sequence[int],
    n: Mapping[str, int],
    hours: int,
    result: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Search with every strategy and number of workers where ``result`` lacks it; yield rows."""
    recalled, optimum = Recalled(landscape), landscape.optimum
    keys = ("workers", "strategy", "driver", "factor", "trials")
    done = {tuple(row[key] for key in keys) for row in result["rows"]}
    budget = configured("random", REFERENCE, n["each"] * REFERENCE, landscape, 0)
    until = result["until"] = max(simulator.searched(budget, recalled, REFERENCE)[1])
    for workers, strategy in itertools.product(n_workers, STRATEGIES):
        n_trials = min(n["each"] * workers, n["most"])
        slow = strategy == "tpe" and n_trials > n["slow"]
        if slow or (workers > n["few"] and not strategy.startswith("genetic")):
            continue
        rounds = [("after", 1)]
        if strategy == "genetic" and workers >= n["few"]:
            rounds += [("after", hours)]
            rounds += [("before", 1)] if str(workers) in result.get("driver_before", {}) else []
        for which, factor in rounds:
            if (workers, strategy, which, factor, n_trials) in done:
                continue
            measured = result["driver" if which == "after" else "driver_before"][str(workers)]
            found = []
            for seed in range(n["seeds"] if workers < n["few"] else 1):
                config = configured(strategy, workers, n_trials, landscape, seed)
                recalled.factor = factor
                pace = time_of(measured, result["write_ms"])
                trials, ends = simulator.searched(config, recalled, workers, pace)
                figures = told(trials, ends, workers, pace)
                best = [
                    trial
                    for trial, end in zip(trials, ends, strict=True)
                    if end <= factor * until and trial.state is TrialState.COMPLETE
                ]
                figures["regret"] = regret(best, landscape, optimum)
                found.append(figures)
            print(f"{workers} workers, {strategy}, {n_trials} trials", file=sys.stderr)
            yield {
                **dict(zip(keys, (workers, strategy, which, factor, n_trials), strict=True)),
                **{key: [one[key] for one in found] for key in found[0]},
            }


def configured(
    strategy: str, n_workers: int, n_trials: int, landscape: simulator.Landscape, seed: int
) -> Config:
    """Return the configuration of a search."""
    words = (f"budget.trials={n_trials}", f"trainer.max_epochs={landscape.n_epochs}")
    config = strategies.configuration(" ".join(settings(strategy, n_workers)), words)
    return dataclasses.replace(config, seed=seed)


def told(
    trials: Sequence[FrozenTrial], ends: Sequence[float], n_workers: int, driver: DriverTime
) -> dict[str, float]:
    """Return the figures of a search.

    Returns:
        ``seconds`` until its end; ``speed_up``: how many times as long one worker would have
        taken for the same fits; ``utilisation`` of the workers, in [0, 1]; ``fit``: mean seconds
        of a trial's fits.
    """
    busy = sum(outcome_of(trial).duration_s for trial in trials)
    steps = sum(1 + len(trial.intermediate_values) for trial in trials)
    alone = busy + len(trials) * driver.begin + steps * driver.take
    seconds = max(ends)
    return {
        "seconds": seconds,
        "speed_up": alone / seconds,
        "utilisation": busy / (n_workers * seconds),
        "fit": busy / len(trials),
    }


def regret(
    trials: Sequence[FrozenTrial], landscape: simulator.Landscape, optimum: float
) -> float | None:
    """Return how much worse than the optimum the best of some trials is, without noise."""
    if not trials:
        return None
    best = min(trials, key=lambda trial: trial.values[0])
    genes = np.array([[best.params[name] for name in simulator.GENES]], float)
    return math.exp(landscape.losses(genes)[0, -1]) - optimum


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables."""
    drivers = [
        ["driver", "workers", "CPU, ms a trial", "wait of a write, ms", "journal, bytes a trial"]
    ]
    for which in ("driver_before", "driver"):
        for workers, found in result.get(which, {}).items():
            name = "before" if which == "driver_before" else "after"
            figures = [f"{found['cpu_ms']:.1f}" + ("" if "trials" in found else ", extrapolated")]
            for key, spec in (("write_ms", ".1f"), ("journal_bytes", ",.0f")):
                figures.append(format(found[key], spec) if key in found else "")
            drivers.append([name, f"{int(workers):,}", *figures])
    header = ["workers", "strategy", "driver", "mean fit", "trials", "speed-up", "utilisation"]
    rows = [
        [
            *(f"{row['workers']:,}", row["strategy"], row["driver"]),
            *(f"{statistics.fmean(row['fit']):,.0f} s", f"{row['trials']:,}"),
            spread(row["speed_up"], ",.1f"),
            spread(row["utilisation"], ".0%"),
            spread([x for x in row["regret"] if x is not None], ".3f"),
        ]
        for row in result.get("rows", [])
    ]
    return "\n\n".join([table(*drivers), table([*header, "regret"], *rows)])


def spread(values: Sequence[float], spec: str) -> str:
    """Write the median, and the least and the most of several."""
    if not values:
        return ""
    middle = format(statistics.median(values), spec)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), spec)} to {format(max(values), spec)})"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the speed-up and the regret against the workers."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = [(s, "after", 1) for s in STRATEGIES]
    kinds += [("genetic", "before", 1), ("genetic", "after", result["hours"])]
    for i, (strategy, which, factor) in enumerate(kinds):
        mine = [
            row
            for row in result["rows"]
            if (row["strategy"], row["driver"], row["factor"]) == (strategy, which, factor)
        ]
        if not mine:
            continue
        about = "driver as it was" if which == "before" else f"fits {factor} times as long"
        label = strategy if i < len(STRATEGIES) else f"{strategy}, {about}"
        style = {"color": f"C{i}", "marker": "o", "ms": 4, "ls": "-" if i < len(STRATEGIES) else ""}
        workers = [row["workers"] for row in mine]
        left.plot(workers, [statistics.median(r["speed_up"]) for r in mine], label=label, **style)
        if i < len(STRATEGIES):
            known = [r for r in mine if None not in r["regret"]]
            right.plot(
                [r["workers"] for r in known],
                [statistics.median(r["regret"]) for r in known],
                **style,
            )
    ends = [min(r["workers"] for r in result["rows"]), max(r["workers"] for r in result["rows"])]
    left.plot(ends, ends, color="grey", lw=0.8, ls="--", label="as many as workers")
    left.set(xscale="log", yscale="log", xlabel="workers", ylabel="speed-up over one worker")
    right.set(
        xscale="log", xlabel="workers", ylabel=f"regret after {result['until']:.0f} s, nats", ylim=0
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with one_line_errors():
        main()
