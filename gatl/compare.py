"""``python -m gatl.compare``: the runs of a sweep beside one another."""

import json
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState
from rich.table import Table

from gatl.cli import folder_named, help_requested, one_line_errors
from gatl.errors import UserError, printable
from gatl.files import csv_of
from gatl.progress import format_count, format_duration, new_console
from gatl.record import (
    JOURNAL,
    PLACE,
    RESULT,
    outcome_of,
    read_study,
    seconds_of,
    told_after,
)
from gatl.trust import read_yaml, require_inside, words_of

HELP = """\
gatl.compare puts runs beside one another: those of a sweep, or all in a folder.
Runs that differ by their seed alone are one group.

  python -m gatl.compare runs=multirun/DATE/TIME [trust=URL,URL]

It prints a table and saves it, with the best val_loss so far against trials and
against time, as compare.html, compare.png and compare.csv in that folder. A
sweep does so by itself at its end. Runs whose record lies in a database are read
if trust= names it."""

MANY = 3
"""Overrides that differ, up to which they name the groups."""
NO_DIFFERENCE = (
    *("seed", "evaluator.workers", "evaluator.address", "evaluator.num_gpus"),
    *("logger", "cache", "study", "hydra"),
)
"""Overrides that make no other result, or tell repetitions apart."""
COLUMNS = (
    *("group", "runs", "trials", "evaluations", "val_loss", "val_loss_sd"),
    *("test_accuracy", "test_accuracy_sd", "search_seconds", "unfinished"),
)


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        folder: The run folder.
        overrides: What it was started with, by key, but for `NO_DIFFERENCE`.
        config: All of its configuration, and its choices of config groups, by key.
        best: The lowest val_loss after each trial that has ended, by number; infinite
            before one has completed.
        times: Seconds after which the search knew each of `best_by_time`, rising.
        best_by_time: The lowest val_loss at that time.
        seconds: What the search has taken.
        evaluations: Fits, without those whose result was known.
        test_accuracy: Of the final model, in [0, 1]; None if there is none yet.
    """

    folder: Path
    overrides: dict[str, str]
    config: dict[str, Any]
    best: list[float]
    times: list[float]
    best_by_time: list[float]
    seconds: float
    evaluations: int
    test_accuracy: float | None


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone.

    Attributes:
        name: What tells it from other groups: the value of the one override that
            differs, or all overrides that do.
        runs: At least one.
    """

    name: str
    runs: list[Run]

    def row(self) -> dict[str, Any]:
        """Return its row of the table; None where nothing is known."""
        losses = [run.best[-1] for run in self.begun]
        accuracies = [run.test_accuracy for run in self.runs if run.test_accuracy is not None]
        return {
            "group": self.name,
            "runs": len(self.runs),
            "trials": _mean([len(run.best) for run in self.runs]),
            "evaluations": _mean([run.evaluations for run in self.runs]),
            "val_loss": _mean(losses),
            "val_loss_sd": _sd(losses),
            "test_accuracy": _mean(accuracies),
            "test_accuracy_sd": _sd(accuracies),
            "search_seconds": _mean([run.seconds for run in self.runs]),
            "unfinished": len(self.runs) - len(accuracies),
        }

    @property
    def begun(self) -> list[Run]:
        """The runs in which a trial has completed."""
        return [run for run in self.runs if run.times]

    def by_trials(self) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers of trials (n,), and each begun run's best val_loss after so many.

        The second is (runs, n). From where every run has one up to where the last ends;
        one that has ended keeps what it has.
        """
        n = max((len(run.best) for run in self.begun), default=0)
        best = [[*run.best, *[run.best[-1]] * (n - len(run.best))] for run in self.begun]
        table = np.reshape(best, (len(best), n))
        known = np.isfinite(table).all(0)
        return np.flatnonzero(known) + 1, table[:, known]

    def by_time(self, until: float, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
        """Return seconds (n,), and each begun run's best val_loss then (runs, n).

        From where every run has one up to ``until``; one that has ended keeps what it has.
        """
        begin = max((run.times[0] for run in self.begun), default=until)
        seconds = np.linspace(begin, max(begin, until), points)
        best = [
            np.array(run.best_by_time)[np.searchsorted(run.times, seconds, side="right") - 1]
            for run in self.begun
        ]
        return seconds, np.reshape(best, (len(best), points))


def read_runs(folder: Path, trusted: Collection[str] = ()) -> tuple[list[Run], list[str]]:
    """Read every run folder in a folder, or the folder itself if it is one.

    Args:
        folder: The folder.
        trusted: The databases that may be connected to.

    Returns:
        The runs, and a line for each that cannot be read.

    Raises:
        UserError: If there is none that can.
    """
    runs, left_out = [], []
    records = {path.parent for name in (JOURNAL, PLACE) for path in folder.rglob(name)}
    for run in sorted(records, key=_natural):
        try:
            runs.append(_read(run, trusted))
        except Exception as error:  # whatever stands in a broken run must not cost the others
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__} "
            reason = " ".join(str(error).split())
            left_out.append(printable(f"left out: {run} ({kind}{reason})"))
    if not runs:
        raise UserError(
            left_out[0]
            if left_out
            else f"{folder} holds no run: give the folder of a sweep, runs=multirun/DATE/TIME."
        )
    return runs, left_out


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return what sorts job 10 behind job 9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in path.parts]


def _yaml(path: Path) -> Any:  # noqa: ANN401
    """Return what a YAML file holds, nothing resolved; None if it is not there."""
    return read_yaml(path) if path.is_file() else None


def _read(folder: Path, trusted: Collection[str]) -> Run:
    require_inside(folder)
    overrides: dict[str, str] = {}
    for word in _yaml(folder / ".hydra" / "overrides.yaml") or ():
        key, _, value = printable(str(word)).lstrip("+").partition("=")
        if not f"{key}.".startswith(tuple(f"{name}." for name in NO_DIFFERENCE)):
            overrides[key] = value
    hydra = _yaml(folder / ".hydra" / "hydra.yaml") or {}
    choices = hydra.get("hydra", {}).get("runtime", {}).get("choices", {})
    with read_study(folder, trusted) as study:
        trials = study.get_trials(deepcopy=False) if study else []
        seconds = seconds_of(study) if study else 0.0
    ended = [trial for trial in trials if trial.state.is_finished()]
    losses = [
        trial.values[0] if trial.state is TrialState.COMPLETE else math.inf for trial in ended
    ]
    told = sorted(
        (told_after(trial), loss)
        for trial, loss in zip(ended, losses, strict=True)
        if math.isfinite(loss)
    )
    result, accuracy = folder / RESULT, None
    if result.is_file():
        accuracy = json.loads(result.read_text(encoding="utf-8"))["test"]["accuracy"]
        if type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
            raise ValueError(f"{RESULT} holds the accuracy {accuracy}")
    return Run(
        folder,
        overrides,
        (_yaml(folder / ".hydra" / "config.yaml") or {}) | choices,
        best=list(accumulate(losses, min)),
        times=[after for after, _ in told],
        best_by_time=list(accumulate((loss for _, loss in told), min)),
        seconds=seconds,
        evaluations=sum(outcome_of(trial).reused_from is None for trial in ended),
        test_accuracy=accuracy,
    )


def grouped(runs: Sequence[Run]) -> tuple[str, list[Group]]:
    """Group runs by the overrides that differ, in the order of their first run.

    Returns:
        What to call the groups: the one override that differs, or nothing; and the groups.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides))
    differing = [key for key in keys if len({_setting(run, key) for run in runs}) > 1]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        values = {key: _setting(run, key) for key in differing}
        words = [f"{key}={value}" for key, value in values.items()]
        name = ", ".join(values.values() if len(values) == 1 else words) or "all runs"
        groups.setdefault(name, []).append(run)
    if len(differing) > MANY:  # nobody could read that: the page lists what each run was told
        named = {printable(runs[0].folder.name): runs for runs in groups.values()}
        if len(named) == len(groups):
            return "first run", [Group(name, members) for name, members in named.items()]
    heading = differing[0] if len(differing) == 1 else ""
    return heading, [Group(name, members) for name, members in groups.items()]


def _mixed_data(runs: Sequence[Run]) -> list[str]:
    """Say so, if the runs have not the same images, so that their losses cannot be compared."""
    keys = {key for run in runs for key in run.overrides if f"{key}.".startswith("data.")}
    if all(len({_setting(run, key) for run in runs}) == 1 for key in keys):
        return []
    return ["The runs differ in their data: their losses and accuracies cannot be compared."]


def _setting(run: Run, key: str) -> str:
    """Return what a run was told of a key, or what is so by default."""
    if key in run.overrides:
        return run.overrides[key]
    node: Any = run.config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return "(default)" if node is None or isinstance(node, dict) else printable(str(node))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _ranked(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the rows, lowest mean val_loss first."""
    rows = [group.row() for group in groups]
    return sorted(rows, key=lambda r: math.inf if r["val_loss"] is None else r["val_loss"])


def _told(run: Run, folder: Path) -> str:
    """Write where a run lies and what it was told."""
    words = " ".join(f"{key}={value}" for key, value in run.overrides.items())
    return f"{printable(str(run.folder.relative_to(folder)))}: {words or '(nothing)'}"


def _short(name: str, width: int = 100) -> str:
    """Cut what no table has room for."""
    return name if len(name) <= width else f"{name[:width]} ..."


def _cells(row: dict[str, Any]) -> list[str]:
    """Write a row for people."""

    def spread(name: str, form: str) -> str:
        mean, sd = row[name], row[f"{name}_sd"]
        if mean is None:
            return "-"
        return format(mean, form) + ("" if sd is None else f" ± {format(sd, form)}")

    return [
        _short(row["group"]),
        str(row["runs"]),
        f"{row['trials']:.0f}",
        f"{row['evaluations']:.0f}",
        spread("val_loss", ".4f"),
        spread("test_accuracy", ".1%"),
        format_duration(row["search_seconds"]),
    ]


HEADERS = ("runs", "trials", "evals", "best val_loss", "test acc.", "search time")


def _unfinished(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say which groups have runs without a final model."""
    return [
        f"{_short(row['group'])}: {row['unfinished']} of {format_count(row['runs'], 'run')} "
        "unfinished"
        for row in rows
        if row["unfinished"]
    ]


def _picture(groups: Sequence[Group], svg: Path, png: Path) -> None:
    """Draw the best val_loss so far against trials and against time."""
    import matplotlib as mpl

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # that it looks for fonts
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "gatl", "font.size": 10}
    style["text.parse_math"] = False  # $ is a letter in an override
    with mpl.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
        longest = max(run.seconds for group in groups for run in group.runs)
        unit, name = (60.0, "minutes") if longest > 180 else (1.0, "seconds")
        lines: dict[str, Any] = {}
        limits: list[float] = []
        for i, group in enumerate(group for group in groups if group.begun):
            look = {"color": f"C{i % 10}", "linestyle": ("-", "--", "-.", ":")[i % 4]}
            for ax, (x, best), scale in (
                (axes[0], group.by_trials(), 1.0),
                (axes[1], group.by_time(longest), unit),
            ):
                mean, sd = best.mean(0), best.std(0, ddof=len(best) > 1)
                low, high = mean - sd, mean + sd
                (lines[_short(group.name)],) = ax.step(x / scale, mean, where="post", **look)
                ax.fill_between(
                    x / scale, low, high, step="post", color=look["color"], alpha=0.15, lw=0
                )
                later = x >= x[-1] / 4
                limits += [low[later].min(), high[later].max()]
        if limits:  # the first, poor results may leave the picture
            margin = 0.05 * (max(limits) - min(limits)) or 0.01
            axes[0].set_ylim(min(limits) - margin, max(limits) + margin)
        axes[0].set(xlabel="trials", ylabel="best val_loss so far")
        axes[1].set(xlabel=f"time, {name}")
        for ax in axes:
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        figure.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=2, frameon=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            figure.savefig(svg, metadata={"Date": None})
            figure.savefig(png, dpi=150)
        plt.close(figure)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gatl: {title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; }}
body {{ padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .8rem; text-align: right; white-space: nowrap; }}
th, td {{ border-bottom: 1px solid #8886; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; }}
figure {{ margin: 2rem 0; background: #fff; overflow-x: auto; }}
figure svg {{ width: 100%; min-width: 42rem; height: auto; }}
figcaption, .note {{ color: #888; font-size: .9rem; }}
figcaption {{ background: Canvas; padding-top: .5rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p class="note">Mean ± standard deviation over the runs of a group, which differ by their seed;
lowest mean val_loss first. Evals are evaluations: trials without those whose chromosome had been
evaluated before. Test acc. is the final models' accuracy on images that no search saw.</p>
<ul class="note">
{notes}
</ul>
<figure>{svg}<figcaption>The lowest val_loss so far: mean over the runs and, as a band, one standard
deviation to either side. A run that has ended keeps what it found.</figcaption>
</figure>
<h2>Runs</h2>
<ul>
{runs}
</ul>
</body>
</html>
"""


def save(heading: str, groups: Sequence[Group], folder: Path, left_out: Sequence[str] = ()) -> None:
    """Write ``compare.html``, ``compare.png`` and ``compare.csv`` into a folder.

    Raises:
        UserError: If they cannot be written, or would be written elsewhere.
    """
    for name in ("compare.html", "compare.png", "compare.csv", "compare.svg"):
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a link, and would be written through: remove it.")
    rows = _ranked(groups)
    svg = folder / "compare.svg"
    try:
        _picture(groups, svg, folder / "compare.png")
        drawing = svg.read_text()
        svg.unlink()
        table = csv_of([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)])
        (folder / "compare.csv").write_bytes(table)
        page = _PAGE.format(
            title=escape(
                format_count(sum(len(group.runs) for group in groups), "run") + " compared"
            ),
            head="".join(f"<th>{escape(name)}</th>" for name in (heading, *HEADERS)),
            rows="\n".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
                for row in rows
            ),
            notes="\n".join(f"<li>{escape(line)}</li>" for line in [*_unfinished(rows), *left_out]),
            svg=drawing[drawing.index("<svg") :],
            runs="\n".join(
                f"<li>{escape(_told(run, folder))}</li>" for group in groups for run in group.runs
            ),
        )
        (folder / "compare.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}.") from error


def compare(folder: Path, trusted: Collection[str] = ()) -> None:
    """Compare the runs in a folder: print the table, save page, picture and table.

    Args:
        folder: The folder.
        trusted: See `read_runs`.

    Raises:
        UserError: If there is nothing to compare.
    """
    runs, left_out = read_runs(folder, trusted)
    heading, groups = grouped(runs)
    left_out = [*_mixed_data(runs), *left_out]
    console = new_console()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(heading, overflow="fold")
    for name in HEADERS:
        table.add_column(name, justify="right", no_wrap=True)
    rows = _ranked(groups)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for line in (*_unfinished(rows), *left_out):
        console.print(line, soft_wrap=True)
    save(heading, groups, folder, left_out)
    console.print(f"Plots: {folder / 'compare.html'}", soft_wrap=True)


def main() -> None:
    """Compare the runs that the command line names."""
    words = sys.argv[1:]
    if help_requested(words, HELP):
        return
    with one_line_errors():
        trusted, words = words_of(words)
        if len(words) != 1 or not words[0].startswith("runs="):
            raise UserError(
                "Give one folder of runs: python -m gatl.compare runs=multirun/DATE/TIME"
            )
        folder = folder_named(words[0].removeprefix("runs="))
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give runs=multirun/DATE/TIME.")
        compare(folder, trusted)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
