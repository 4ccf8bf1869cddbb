"""How good the strategies are: many searches of each over recorded landscapes.

    python benchmarks/strategies.py

Every strategy searches every landscape (see `simulator`; tables are made by `landscape`) with
many seeds, with and without initial chromosomes: gatl's driver, two simulated workers. Its
regret after n trials is how much worse the chromosome with the lowest val_loss that it has seen
is, without noise, than the best of a dense grid, in nats. A trial is one, however early halving
stops it, and though it repeats another; what that saves shows against simulated time.

Prints tables, draws ``plot=FILE`` and writes ``results=FILE``, by default
``benchmarks/results/strategies.json``. What is done is kept in ``output``, and the same command
goes on with it.

Options and their defaults: ``seeds=100 slow_seeds=10`` (of ``gp``, which thinks for a second a
trial and so makes half as many) ``trials=200 workers=2``, ``names=`` of landscapes, separated by
commas (all), ``only=`` for some of the strategies, separated by semicolons,
``output=outputs/simulated``, ``plot=docs/strategies.png``. ``add=NAME:WORD+WORD`` adds a variant,
the words being Hydra overrides; several are separated by semicolons.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simulator
from common import RESULTS, options, origin, table, whole
from landscape import LANDSCAPES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import TrialState
from scipy.stats import rankdata, wilcoxon
from simulator import Array

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.errors import UserError
from gatl.files import write_json

DEFAULTS = {
    **{"seeds": "100", "slow_seeds": "10", "trials": "200", "workers": "2", "names": ""},
    **{"only": "", "add": "", "output": "outputs/simulated", "plot": "docs/strategies.png"},
    "results": str(RESULTS / "strategies.json"),
}
STRATEGIES = {
    "genetic": "",
    "genetic, steady state": "ga.mode=steady_state",
    "genetic, original": "ga=original pruner=none",
    "annealing": "search=annealing",
    "regularized evolution": "search=regularized_evolution",
    "random": "search=random",
    "tpe": "search=tpe",
    "cmaes": "search=cmaes",
    "nsga2": "search=nsga2",
    "gp": "search=gp",
}
SLOW = {"gp": 100}
"""The most trials of a strategy that thinks long."""
NAMES = {"trees": "gradient-boosted trees", "process": "Gaussian process"}
WORST = 10.0
"""The val_loss of a search in which nothing has come to its end yet."""
AT = (50, 100, 200)
BASES = ("random", "tpe", "genetic")
FIRST_DRAWN = 10
"""Trials before which the initial chromosomes tell most."""


class Cell(NamedTuple):
    """The searches of one strategy over one landscape.

    Attributes:
        landscape: Its name.
        family: Of the regressors.
        initial: Whether there are initial chromosomes.
        strategy: Its name.
        words: Its overrides.
    """

    landscape: str
    family: str
    initial: bool
    strategy: str
    words: str

    @property
    def path(self) -> Path:
        """Where its results are kept, in ``output``."""
        names = (self.landscape, self.family, "initial" if self.initial else "none")
        return Path(*names, f"{self.strategy.replace(', ', '_').replace(' ', '_')}.jsonl")


class Curves(NamedTuple):
    """What came of the searches of a cell.

    Attributes:
        regret: (seeds, trials), in nats.
        seconds: (seeds, trials) simulated, until each trial and all before it had ended.
    """

    regret: Array
    seconds: Array

    def at_seconds(self, seconds: Array) -> Array:
        """Return the regret at the simulated times, (seeds, n); NaN before the first trial."""
        rows = []
        for regret, ends in zip(self.regret, self.seconds, strict=True):
            done = np.searchsorted(ends, seconds, side="right")
            rows.append(np.where(done > 0, regret[np.maximum(done - 1, 0)], np.nan))
        return np.array(rows)


def main() -> None:
    """Do the searches that are missing; print, draw and save what came of them."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if extra:
        raise UserError(f"{extra[0]!r} is no option; they are {', '.join(DEFAULTS)}.")
    n_seeds, n_slow, n_trials, n_workers = (
        whole(name, given[name]) for name in ("seeds", "slow_seeds", "trials", "workers")
    )
    if n_trials < AT[0]:
        raise UserError(f"trials must be at least {AT[0]}, but got {n_trials}.")
    cells = wanted(given, n_seeds, n_slow)
    found = search_all(cells, n_trials, n_workers, Path(given["output"]))
    rows = summary(found)
    about = {"trials": n_trials, "workers": n_workers, "rows": rows}
    write_json(Path(given["results"]), {**origin(), **about})
    draw(found, Path(given["plot"]))
    print(markdown(rows))


def wanted(given: Mapping[str, str], n_seeds: int, n_slow: int) -> dict[Cell, range]:
    """Return the cells that are asked for, and the seeds of each."""
    variants = STRATEGIES | {
        name.strip(): words.replace("+", " ")
        for name, colon, words in (word.partition(":") for word in given["add"].split(";"))
        if colon
    }
    only = [name for name in given["only"].split(";") if name] or list(variants)
    if unknown := [name for name in only if name not in variants]:
        raise UserError(f"only={unknown[0]} is none of {'; '.join(variants)}.")
    places = product(simulator.named(given["names"]), simulator.FAMILIES, (True, False))
    return {
        Cell(*place, name, variants[name]): range(n_slow if name in SLOW else n_seeds)
        for place in places
        for name in only
    }


def search_all(
    cells: Mapping[Cell, range], n_trials: int, n_workers: int, output: Path
) -> dict[Cell, Curves]:
    """Do the searches that ``output`` lacks, on all cores; return all of them."""
    trials_of = {cell: min(n_trials, SLOW.get(cell.strategy, n_trials)) for cell in cells}
    kept: dict[Cell, dict[int, Any]] = {
        cell: read(output / cell.path, cell, trials_of[cell], n_workers) for cell in cells
    }
    todo = [
        (cell, seed) for cell, seeds in cells.items() for seed in seeds if seed not in kept[cell]
    ]
    print(f"{sum(map(len, cells.values()))} searches, {len(todo)} to do", file=sys.stderr)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(search, cell, seed, trials_of[cell], n_workers): (cell, seed)
            for cell, seed in todo
        }
        for future in as_completed(running):
            cell, seed = running[future]
            kept[cell][seed] = future.result()
            append(output / cell.path, kept[cell][seed])
    return {
        cell: Curves(
            *(np.array([kept[cell][seed][key] for seed in seeds]) for key in Curves._fields)
        )
        for cell, seeds in cells.items()
    }


def read(path: Path, cell: Cell, n_trials: int, n_workers: int) -> dict[int, dict[str, Any]]:
    """Return the searches that a file holds of a cell, by seed."""
    lines = path.read_text().splitlines() if path.is_file() else []
    searches = [json.loads(line) for line in lines]
    same = asked(cell, n_trials, n_workers)
    return {found["seed"]: found for found in searches if found["asked"] == same}


def asked(cell: Cell, n_trials: int, n_workers: int) -> list[Any]:
    """Return what a search that is kept has to agree in, the landscape's content included."""
    return [cell.words, n_trials, n_workers, digest(cell.landscape)]


@functools.cache
def digest(name: str) -> str:
    """Return the SHA-256 of a landscape's table."""
    return hashlib.sha256((LANDSCAPES / f"{name}.csv").read_bytes()).hexdigest()


def append(path: Path, found: Mapping[str, Any]) -> None:
    """Add a search to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{json.dumps(found)}\n")


def search(cell: Cell, seed: int, n_trials: int, n_workers: int) -> dict[str, Any]:
    """Search once."""
    landscape = landscape_of(cell.landscape, cell.family)
    words = (f"budget.trials={n_trials}", f"trainer.max_epochs={landscape.n_epochs}")
    config = replace(configuration(cell.words, words), seed=seed)
    config = config if cell.initial else replace(config, initial=())
    trials, ends = simulator.searched(config, landscape, n_workers)
    best, incumbents = np.inf, []
    for trial in trials:
        if trial.state is TrialState.COMPLETE and trial.value < best:
            best, genes = trial.value, [trial.params[name] for name in simulator.GENES]
        incumbents.append(genes if best < np.inf else [])
    true = np.exp(landscape.losses(np.array([g for g in incumbents if g], float))[:, -1])
    true = np.concatenate([np.full(len(incumbents) - len(true), WORST), true])
    return {
        "seed": seed,
        "asked": asked(cell, n_trials, n_workers),
        "regret": np.round(true - landscape.optimum, 6).tolist(),
        "seconds": np.round(np.maximum.accumulate(ends), 2).tolist(),
    }


@functools.cache
def landscape_of(name: str, family: str) -> simulator.Landscape:
    """Return a landscape, made once a process."""
    return simulator.Landscape(simulator.read(LANDSCAPES / f"{name}.csv"), family)


@functools.cache
def configuration(words: str, more: Sequence[str]) -> Config:
    """Return the configuration of a strategy, composed once a process."""
    return checked(compose(["model=se_densenet121_k12", *words.split(), *more]))


def summary(found: Mapping[Cell, Curves]) -> list[dict[str, Any]]:
    """Return a row for each cell: regret at some trials and times, ranks, and effects."""
    rows = []
    for cell, curves in found.items():
        peers = {other.strategy: mine for other, mine in found.items() if other[:3] == cell[:3]}
        row: dict[str, Any] = {**cell._asdict(), "seeds": len(curves.regret)}
        row["regret"] = {str(n): center(curves.regret[:, n - 1]) for n in at(curves)}
        if "random" in peers:
            times = peers["random"].seconds.mean(0)[[n - 1 for n in at(peers["random"])]]
            row["seconds_of_random"] = times.round(1).tolist()
            row["regret_at_seconds"] = [center(of) for of in curves.at_seconds(times).T]
        row["effects"] = {
            base: {
                str(n): effect(curves.regret[:, n - 1], peers[base].regret[:, n - 1])
                for n in at(min(curves, peers[base], key=lambda of: of.regret.shape[1]))
            }
            for base in BASES
            if base in peers and base != cell.strategy
        }
        rows.append(row)
    for row in rows:
        ranks = mean_ranks(
            {c: v for c, v in found.items() if list(c[:3]) == list(row.values())[:3]}
        )
        row["rank"] = ranks.get(row["strategy"])
    return rows


def at(curves: Curves) -> list[int]:
    """Return the numbers of trials at which regrets are told."""
    return [n for n in AT if n <= curves.regret.shape[1]]


def center(values: Array) -> dict[str, float]:
    """Return the median with its 95 % interval (bootstrap), and the mean."""
    low, high = band(values[:, None])
    return {
        "median": float(np.median(values)),
        **{"low": float(low[0]), "high": float(high[0])},
        "mean": float(values.mean()),
    }


def band(values: Array) -> tuple[Array, Array]:
    """Return the 95 % bootstrap interval of the median over the rows, (n, m) to two of (m,)."""
    drawn = np.random.default_rng(0).integers(len(values), size=(400, len(values)))
    medians = np.array([np.median(values[rows], axis=0) for rows in drawn])
    return np.quantile(medians, 0.025, axis=0), np.quantile(medians, 0.975, axis=0)


def effect(mine: Array, base: Array) -> dict[str, float]:
    """Compare regrets with a base's, paired by seed.

    Returns:
        ``better``: how often mine is the lower one, ties half (0.5: no difference);
        ``difference``: the median of mine less the base's, in nats; ``p``: of Wilcoxon's
        signed-rank test (1945), two-sided.
    """
    n = min(len(mine), len(base))
    difference = mine[:n] - base[:n]
    p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    better = float(np.mean(difference < 0) + np.mean(difference == 0) / 2)
    return {"better": better, "difference": float(np.median(difference)), "p": p, "n": n}


def mean_ranks(found: Mapping[Cell, Curves]) -> dict[str, float]:
    """Return the mean rank of each strategy by its last regret, 1 the best.

    Only those with the most seeds and trials take part, since a rank is among all of them.
    """
    most = max(curves.regret.shape for curves in found.values())
    last = {c.strategy: v.regret[:, -1] for c, v in found.items() if v.regret.shape == most}
    ranks = rankdata(np.array(list(last.values())), axis=0).mean(1)
    return dict(zip(last, ranks.tolist(), strict=True))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each landscape, family, and choice of initial chromosomes."""
    texts = []
    for place in dict.fromkeys((r["landscape"], r["family"], r["initial"]) for r in rows):
        mine = [r for r in rows if (r["landscape"], r["family"], r["initial"]) == place]
        numbers = list(max((row["regret"] for row in mine), key=len))
        at_middle = len(numbers) // 2
        header = [
            *("strategy", *(f"regret at {n}" for n in numbers)),
            *(f"in random's time of {numbers[at_middle]}", "rank"),
            *(f"better than {base} at {', '.join(numbers)}" for base in BASES),
        ]
        lines = [
            [
                *(row["strategy"], *(written(row["regret"].get(n)) for n in numbers)),
                f"{row['regret_at_seconds'][at_middle]['median']:.3f}"
                if "regret_at_seconds" in row
                else "",
                "" if row["rank"] is None else f"{row['rank']:.1f}",
                *(
                    ", ".join(
                        written_effect(row["effects"][base][n])
                        for n in numbers
                        if n in row["effects"][base]
                    )
                    if base in row["effects"]
                    else ""
                    for base in BASES
                ),
            ]
            for row in sorted(mine, key=lambda row: last_mean(row, numbers))
        ]
        seeds = sorted({row["seeds"] for row in mine})
        texts.append(
            f"{place[0]}, {NAMES[place[1]]}, {'with' if place[2] else 'without'} initial "
            f"chromosomes, {' or '.join(map(str, seeds))} seeds:"
        )
        texts.append(table(header, *lines))
    return "\n\n".join(texts)


def last_mean(row: Mapping[str, Any], numbers: Sequence[str]) -> float:
    """Return the mean regret after the most trials; those that made fewer come last."""
    return row["regret"][numbers[-1]]["mean"] if numbers[-1] in row["regret"] else np.inf


def written(found: Mapping[str, float] | None) -> str:
    """Write what `center` returns; nothing for nothing."""
    if found is None:
        return ""
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def written_effect(found: Mapping[str, float]) -> str:
    """Write what `effect` returns: how often it is better, and a star where p is below 0.01."""
    return f"{found['better']:.0%}{'*' if found['p'] < 0.01 else ''}"


def draw(found: Mapping[Cell, Curves], path: Path) -> None:
    """Draw regret against trials and against simulated time, with initial chromosomes."""
    places = list(dict.fromkeys(cell[:2] for cell in found))
    names = list(dict.fromkeys(cell.strategy for cell in found))
    figure = Figure(figsize=(12, 3.4 * len(places)), layout="constrained")
    axes = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    for (landscape, family), (by_trials, by_time) in zip(places, axes, strict=True):
        mine = {c: v for c, v in found.items() if c[:3] == (landscape, family, True)}
        end = max(v.seconds[:, -1].mean() for v in mine.values())
        times = np.linspace(end * FIRST_DRAWN / max(AT), end, 200)
        for cell, curves in mine.items():
            style = {"color": f"C{names.index(cell.strategy)}", "label": cell.strategy}
            style["lw"] = 2.4 if cell.strategy == "genetic" else 1.2
            numbers = np.arange(FIRST_DRAWN, curves.regret.shape[1] + 1)
            curve(by_trials, numbers, curves.regret[:, FIRST_DRAWN - 1 :], style)
            until = times[times <= curves.seconds[:, -1].mean()]
            curve(by_time, until, curves.at_seconds(until), style)
        title = f"{landscape}, {NAMES[family]}"
        by_trials.set(title=title, xlabel="trials", ylabel="regret, nats of val_loss")
        by_time.set(title=title, xlabel="simulated seconds")
        by_trials.set_yscale("log")
        for axis in (by_trials, by_time):
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def curve(axis: Axes, x: Array, regrets: Array, style: Mapping[str, Any]) -> None:
    """Draw a median with its band, where every search has one."""
    whole_ones = ~np.isnan(regrets).any(0)
    low, high = band(regrets[:, whole_ones])
    axis.plot(x[whole_ones], np.median(regrets[:, whole_ones], axis=0), **style)
    axis.fill_between(x[whole_ones], low, high, color=style["color"], alpha=0.15, lw=0)


if __name__ == "__main__":
    with one_line_errors():
        main()
