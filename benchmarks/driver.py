"""What a trial costs beside its fit: the driver of `gatl` and Optuna's own ask and tell.

    python benchmarks/driver.py

The fits take no time: an evaluator answers at once with a loss that follows from the genes.
Everything else is real: `gatl`'s driver with its genetic strategy, its lines of output (to
nowhere), ``history.csv``, and the journal on the disk; beside them Optuna's samplers, asked and
told as its documentation shows, with the same distributions, the same attribute on each trial and
the same kind of journal. Around trial 100, 1,000 and so on up to ``trials``, four stretches as
long as a generation's offspring are timed. Also counted are the writes to the journal, each of
which waits for the disk. Prints a table; writes it to ``results=FILE``, by default
``benchmarks/results/driver.json``.

Options and their defaults: ``trials=10000 pop=50 repeats=3``, ``output=outputs/driver`` (a folder
on the disk that is to be measured; it is emptied). Every other word is a Hydra override: with
``study.storage=URL``, `gatl`'s record is in a database, beside the journals of the others.
"""

import dataclasses
import itertools
import math
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from common import RESULTS, options, origin, over_repeats, table, whole
from hydra.utils import instantiate
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from rich.console import Console

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.errors import UserError
from gatl.evaluation import Fit
from gatl.files import write_json
from gatl.outcome import Outcome
from gatl.progress import View
from gatl.record import JOURNAL, OUTCOME, open_study
from gatl.search import Search
from gatl.storage import connected

DEFAULTS = {
    **{"trials": "10000", "pop": "50", "repeats": "3", "output": "outputs/driver"},
    "results": str(RESULTS / "driver.json"),
}
BASELINE = "Optuna, RandomSampler"
STRETCHES = 4
"""Timed around each number of trials; a multiple of 2."""


class Timed(NamedTuple):
    """One search: the time at which each trial ended, in seconds, and its journal's lines."""

    ends: list[float]
    writes: int


def main() -> None:
    """Run every search ``repeats`` times, in turn; print and save what a trial costs."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    trials, pop, repeats = (whole(name, given[name]) for name in ("trials", "pop", "repeats"))
    if trials < 100:
        raise UserError(f"trials must be at least 100, but got {trials}.")
    sizes = [10**power for power in range(2, int(math.log10(trials) + 1e-9) + 1)]
    config = checked(compose([f"ga.pop={pop}", *extra]))
    stretch = config.ga.pop - config.ga.n_elites
    if stretch > (most := sizes[0] // (STRETCHES // 2)):
        raise UserError(f"pop - n_elites must be at most {most}, but got {stretch}.")
    words = (f"ga.pop={pop}", f"budget.trials={sizes[-1] + STRETCHES * stretch}", *extra)
    folder = Path(given["output"])
    found: dict[str, list[Timed]] = {}
    for repeat in range(repeats):
        for name in SEARCHES:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            config = checked(compose([*words, f"seed={repeat}"]))
            found.setdefault(name, []).append(search(name, config, folder))
            print(f"repeat {repeat + 1} of {repeats}: {name}", file=sys.stderr)
    shutil.rmtree(folder)
    result = {"pop": pop, "trials": config.n_trials, **summary(found, sizes, stretch)}
    write_json(Path(given["results"]), {**origin(), **result})
    print(markdown(result))


def loss(genes: Mapping[str, float]) -> float:
    """Return a loss in [0, 3] that follows from the genes and takes no time."""
    far = abs(math.log10(genes["learning_rate"]) + 3) / 3 + abs(genes["dropout"] - 0.5)
    return far + genes["frozen_layers"] / (1 + genes["included_layers"])


def outcome(genes: Mapping[str, float], epochs: int) -> Outcome:
    """Return what a fit of these genes is said to yield."""
    return Outcome(loss(genes), 0.5, epochs, 0.0, 1_000_000, 7_000_000)


class NullEvaluator:
    """One worker, whose fits have ended once they are waited for."""

    n_workers = 1

    def __init__(self) -> None:
        self._running: list[tuple[int, Fit]] = []

    @property
    def n_free(self) -> int:
        """How many more fits it takes now."""
        return self.n_workers - len(self._running)

    def submit(self, key: int, fit: Fit) -> None:
        """Take a fit."""
        self._running.append((key, fit))

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        """Return the fit's outcome."""
        ended = [(key, outcome(fit.genes, fit.epochs)) for key, fit in self._running]
        self._running.clear()
        return ended

    def epochs_done(self, key: int) -> float:
        """Return nothing that anybody could see."""
        return 0.0

    def close(self, *, now: bool = False) -> None:
        """Do nothing: there are no workers."""


class TimedView(View):
    """The lines that a user sees, and when each trial ended."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ends: list[float] = []

    def ended(self, trial: FrozenTrial) -> None:
        """Show a trial's result, and remember when."""
        super().ended(trial)
        self.ends.append(time.perf_counter())


def drive(config: Config, folder: Path) -> list[float]:
    """Search with `gatl`'s driver; return when each trial ended."""
    build = instantiate(config.search, _partial_=True, _convert_="all")
    strategy = build(space=config.space, seed=config.seed, initial=config.initial)
    stop = threading.Event()
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        connected(config.study.storage) as database,
    ):
        study = open_study(folder, strategy, database)
        console = Console(file=nowhere, soft_wrap=True)
        shown = (config.n_trials, config.trainer.max_epochs, config.model.n_layers)
        with TimedView(console, *shown, strategy.generation) as view:
            Search(config, study, strategy, NullEvaluator(), folder, view, stop, stop).run()
    return view.ends


def ask_and_tell(
    config: Config, folder: Path, sampler: BaseSampler, *, attribute: bool = True
) -> list[float]:
    """Search with one of Optuna's samplers; return when each trial ended."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    build = instantiate(config.search, _partial_=True, _convert_="all")
    distributions = build(space=config.space, seed=config.seed).distributions()
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(storage=storage, sampler=sampler)
    ends = []
    for _ in range(config.n_trials):
        trial = study.ask(distributions)
        found = outcome(trial.params, config.trainer.max_epochs)
        assert found.val_loss is not None
        if attribute:
            trial.set_user_attr(OUTCOME, found.to_json())
        study.tell(trial, found.val_loss)
        ends.append(time.perf_counter())
    return ends


SEARCHES = (
    *("gatl", "gatl, successive halving", BASELINE, f"{BASELINE}, no attribute"),
    "Optuna, NSGAIISampler",
)


def search(name: str, config: Config, folder: Path) -> Timed:
    """Search in one of the `SEARCHES`."""
    if name.startswith("gatl"):
        pruner = config.pruner if "halving" in name else None
        ends = drive(dataclasses.replace(config, pruner=pruner), folder)
    elif "NSGA" in name:
        peer = NSGAIISampler(population_size=config.ga.pop, seed=config.seed)
        ends = ask_and_tell(config, folder, peer)
    else:
        peer = RandomSampler(seed=config.seed)
        ends = ask_and_tell(config, folder, peer, attribute="no attribute" not in name)
    journal = folder / JOURNAL
    return Timed(ends, journal.read_bytes().count(b"\n") if journal.is_file() else 0)


def milliseconds(ends: Sequence[float], size: int, stretch: int) -> list[float]:
    """Return what a trial took in each stretch around a number of trials."""
    first = size - STRETCHES // 2 * stretch
    marks = [ends[first + i * stretch] for i in range(STRETCHES + 1)]
    return [1000 * (after - before) / stretch for before, after in itertools.pairwise(marks)]


def summary(
    found: Mapping[str, Sequence[Timed]], sizes: Sequence[int], stretch: int
) -> dict[str, Any]:
    """Return milliseconds a trial, how they compare with the baseline's, and writes a trial."""
    times = {
        name: [[milliseconds(run.ends, size, stretch) for run in runs] for size in sizes]
        for name, runs in found.items()
    }
    return {
        "searches": {
            name: {
                "writes_per_trial": statistics.fmean(run.writes / len(run.ends) for run in runs),
                "around": [
                    {
                        "trials": size,
                        "ms_per_trial": over_repeats([ms for run in mine for ms in run]),
                        "times_the_baseline": over_repeats(
                            [
                                statistics.median(run) / statistics.median(base)
                                for run, base in zip(mine, bases, strict=True)
                            ]
                        ),
                    }
                    for size, mine, bases in zip(sizes, times[name], times[BASELINE], strict=True)
                ],
            }
            for name, runs in found.items()
        }
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table."""
    searches = result["searches"]
    sizes = [around["trials"] for around in searches[BASELINE]["around"]]
    header = [
        *("search", "journal writes a trial"),
        *(f"ms a trial, around {size:,} trials" for size in sizes),
        *(f"times the baseline, {size:,}" for size in sizes),
    ]
    rows = [
        [
            name,
            f"{row['writes_per_trial']:.2f}",
            *(spread(around["ms_per_trial"]) for around in row["around"]),
            *(spread(around["times_the_baseline"]) for around in row["around"]),
        ]
        for name, row in searches.items()
    ]
    n = searches[BASELINE]["around"][0]["ms_per_trial"]["n"]
    about = f"Median (least to most) of {n} stretches; baseline: {BASELINE}."
    return f"{table(header, *rows)}\n\n{about}"


def spread(figure: Mapping[str, float]) -> str:
    """Write what `over_repeats` returns."""
    return f"{figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})"


if __name__ == "__main__":
    with one_line_errors():
        main()
