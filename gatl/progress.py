"""What the user sees of a run: a live table of the search on a terminal, plain lines elsewhere."""

import contextlib
import io
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from gatl.errors import printable
from gatl.outcome import Outcome
from gatl.ranking import incumbent
from gatl.record import outcome_of

ROWS = 16
"""Trials that the live table shows, where the terminal is high enough."""

SHORT = {
    "included_layers": "included",
    "frozen_layers": "frozen",
    "learning_rate": "lr",
    "weight_decay": "decay",
    "label_smoothing": "smooth",
}
"""Names of genes that let all of them stand in 80 columns."""

_QUIET = 30.0
"""Seconds after which plain output shows that images are still being decoded."""


class _Console(Console):
    """A console that prints texts with nothing in them that commands it."""

    def print(self, *objects: Any, **more: Any) -> None:
        """Print as rich does; a text, line by line, as `printable` writes it."""
        shown = (
            "\n".join(map(printable, o.split("\n"))) if isinstance(o, str) else o for o in objects
        )
        super().print(*shown, **more)


def new_console() -> Console:
    """Return the console of a command; it prints names and errors as they are.

    Square brackets in them are no markup, and names of files in another
    encoding than the terminal's are no error. Only a terminal has lines that end
    somewhere.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = _Console(highlight=False, markup=False, emoji=False)
    console.soft_wrap = not console.is_terminal
    return console


def format_value(value: float) -> str:
    """Write a gene's value in few characters."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def format_genes(genes: Mapping[str, float]) -> str:
    """Write a chromosome in one line, such as ``included 58, frozen 18, lr 1.0e-03``."""
    return ", ".join(f"{SHORT.get(k, k)} {format_value(v)}" for k, v in genes.items())


def format_loss(loss: float) -> str:
    """Write a loss in at most eight characters."""
    return f"{loss:.4f}" if loss < 1000 else f"{loss:.2e}"


def format_count(n: int, noun: str) -> str:
    """Write a number of things, such as ``1 epoch`` or ``2 epochs``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def format_micro_batch(n: int) -> str:
    """Say what a fit did that had run out of memory, see `Outcome.micro_batch`."""
    return (
        f"out of memory; then in micro-batches of {n} images, whose gradients add up to those of "
        f"a batch (batch normalisation sees {n} at a time)"
    )


def format_duration(seconds: float) -> str:
    """Write a duration as a person would say it, such as ``3 min``."""
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def decoding(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show how far the decoding is: a bar on a terminal, now and then a line elsewhere.

    Yields:
        What to tell how many images are done, and of how many.
    """
    printed = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal printed
        bar.update(task, completed=done, total=total)
        if bar.disable and time.monotonic() - printed > _QUIET:
            printed = time.monotonic()
            console.print(f"Decoding images: {done} of {total} ...")

    with Progress(console=console, transient=True, disable=not _is_live(console)) as bar:
        task = bar.add_task("Decoding images", total=None)
        yield report


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


class View:
    """Shows a search: a live table on a terminal, a line a trial elsewhere.

    Args:
        console: Where to.
        n_trials: The trials that end the search.
        n_workers: Fits at once.
        generation: From a trial's number to its generation, if there are any.
        seconds: The time budget, which bounds the time left.
    """

    def __init__(
        self,
        console: Console,
        n_trials: int,
        n_workers: int,
        generation: Callable[[int], int | None],
        seconds: float = float("inf"),
    ) -> None:
        self._console, self._n_trials, self._n_workers = console, n_trials, n_workers
        self._generation = generation
        self._deadline = time.monotonic() + seconds
        self._live = Live(console=console, auto_refresh=False) if _is_live(console) else None
        self._running: dict[int, tuple[Mapping[str, float], float]] = {}
        self._waiting: set[int] = set()  # at a rung
        self._recent: deque[FrozenTrial] = deque(maxlen=ROWS)
        self._losses: dict[int, list[float]] = {}  # by generation
        self._open: dict[int, int] = {}  # by generation: trials that have not ended
        self._best: FrozenTrial | None = None
        self._told_uncached = False
        self._n_ended = 0
        self._n_timed, self._seconds = 0, 0.0  # fits that came to an end, and what they took
        for number in range(n_trials):
            group = generation(number)
            if group is not None:
                self._open[group] = self._open.get(group, 0) + 1

    def __enter__(self) -> Self:
        """Start the live table, where there is one."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the table as it stands."""
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def resumed(self, trials: Sequence[FrozenTrial]) -> None:
        """Take up the trials that had ended before this session."""
        for trial in trials:
            if trial.state.is_finished():
                self._count(trial)
            elif outcome_of(trial).epochs and trial.number < self._n_trials:
                self._waiting.add(trial.number)
        if self._n_ended:
            done = f"{self._n_ended} of {self._n_trials} trials done"
            self._print(f"Going on: {done}{self._so_far}")

    def started(self, number: int, genes: Mapping[str, float]) -> None:
        """Show that a fit runs."""
        self._waiting.discard(number)
        self._running[number] = genes, time.monotonic()

    def paused(self, number: int, genes: Mapping[str, float], outcome: Outcome) -> None:
        """Show that a fit has come to a rung, where it waits for the others."""
        self._running.pop(number, None)
        self._waiting.add(number)
        if self._live is None:
            done = f"after {format_count(outcome.epochs, 'epoch')}"
            parts = (f"trial {number}", format_genes(genes), f"{self._result(outcome)} {done}")
            self._print(" · ".join(parts))

    def ended(self, trial: FrozenTrial) -> None:
        """Show a trial's result."""
        self._running.pop(trial.number, None)
        self._waiting.discard(trial.number)
        self._count(trial)
        outcome = outcome_of(trial)
        if outcome.uncached and not self._told_uncached:
            self._told_uncached = True
            self._print(
                f"Feature cache: full, so trial {trial.number} computed its frozen layers in each "
                "epoch (cache.max_gb, or the disk, has no room)"
            )
        if outcome.micro_batch is not None and outcome.reused_from is None:
            self._print(f"trial {trial.number}: {format_micro_batch(outcome.micro_batch)}")
        if self._live is None:
            self._print(self._line(trial, outcome))
        elif outcome.error and not outcome.diverged and outcome.reused_from is None:
            self._print(f"trial {trial.number} failed: {outcome.error}")
        if (summary := self._summary(trial)) is not None:
            self._print(summary)

    def tick(self) -> None:
        """Draw the live table again."""
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def _count(self, trial: FrozenTrial) -> None:
        self._n_ended += 1
        self._recent.append(trial)
        self._best = incumbent([trial] if self._best is None else [self._best, trial])
        outcome = outcome_of(trial)
        if outcome.reused_from is None:
            self._n_timed += 1
            self._seconds += outcome.duration_s
        group = self._generation(trial.number)
        if group is not None:
            self._open[group] = self._open.get(group, 0) - 1
            if trial.state is TrialState.COMPLETE and trial.value is not None:
                self._losses.setdefault(group, []).append(trial.value)

    @property
    def _so_far(self) -> str:
        """The best so far, as the end of a line."""
        if self._best is None or self._best.value is None:
            return ""
        return f" · best so far {format_loss(self._best.value)} (trial {self._best.number})"

    def _mean(self, group: int) -> str:
        losses = self._losses.get(group)
        return (
            f"mean val_loss {format_loss(sum(losses) / len(losses))}"
            if losses
            else "none completed"
        )

    def _line(self, trial: FrozenTrial, outcome: Outcome) -> str:
        """Write a trial in one line."""
        group = self._generation(trial.number)
        result = self._result(outcome)
        if outcome.pruned:
            result = f"stopped after {format_count(outcome.epochs, 'epoch')}: {result}"
        if outcome.reused_from is not None:
            result += f" (as trial {outcome.reused_from})"
        parts = [
            f"[{self._n_ended}/{self._n_trials}] trial {trial.number}",
            *([] if group is None else [f"generation {group}"]),
            format_genes(trial.params),
            result,
            format_duration(outcome.duration_s),
            *self._time_left(),
        ]
        return " · ".join(parts)

    @staticmethod
    def _result(outcome: Outcome) -> str:
        if outcome.val_loss is None:
            return f"failed: {outcome.error}"
        return f"val_loss {format_loss(outcome.val_loss)}, accuracy {outcome.val_accuracy or 0:.1%}"

    def _summary(self, trial: FrozenTrial) -> str | None:
        """Sum a generation up when its last trial has ended."""
        group = self._generation(trial.number)
        if group is None or self._open[group] > 0:
            return None
        return f"generation {group} done · {self._mean(group)}{self._so_far}"

    def _time_left(self) -> list[str]:
        left = self._n_trials - self._n_ended
        seconds = self._deadline - time.monotonic()
        if left <= 0 or seconds <= 0 or not self._n_timed:
            return []
        seconds = min(seconds, self._seconds / self._n_timed * left / self._n_workers)
        return [f"about {format_duration(seconds)} left"]

    def _table(self) -> RenderableType:
        """Draw what runs, the latest results above it, and where the search stands below."""
        n_rows = max(4, min(ROWS, self._console.height - 5))
        running = sorted(self._running.items())[: n_rows // 2]
        recent = list(self._recent)[-(n_rows - len(running)) :]
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
        genes = [*(trial.params for trial in recent), *(params for _, (params, _) in running)]
        names = (SHORT.get(gene, gene) for gene in (genes[0] if genes else ()))
        for column in ("trial", "gen", *names, "val_loss", "acc", "time"):
            table.add_column(column, justify="right", no_wrap=True)
        for trial in recent:
            outcome = outcome_of(trial)
            if outcome.val_loss is None:
                loss = "diverged" if outcome.diverged else "failed"
            else:
                loss = format_loss(outcome.val_loss)
            accuracy = "" if outcome.val_accuracy is None else f"{outcome.val_accuracy:.1%}"
            spent = format_duration(outcome.duration_s)
            if outcome.reused_from is not None:
                spent = f"= {outcome.reused_from}"
            elif outcome.pruned:
                spent = f"{outcome.epochs} ep"
            best = self._best is not None and trial.number == self._best.number
            style = "green" if best else "dim" if outcome.pruned else ""
            self._add(table, trial.number, trial.params, (loss, accuracy, spent), style)
        for number, (params, since) in running:
            spent = format_duration(time.monotonic() - since)
            self._add(table, number, params, ("...", "", spent), "dim")
        return Group(table, *(Text(line, no_wrap=True) for line in self._status()))

    def _add(
        self,
        table: Table,
        number: int,
        genes: Mapping[str, float],
        result: tuple[str, str, str],
        style: str,
    ) -> None:
        group = self._generation(number)
        values = (format_value(value) for value in genes.values())
        table.add_row(
            str(number), "" if group is None else str(group), *values, *result, style=style
        )

    def _status(self) -> list[str]:
        """The lines below the table: where the search stands."""
        done = [
            f"{self._n_ended} of {self._n_trials} trials done",
            f"{len(self._running)} running",
            *([f"{len(self._waiting)} waiting at a rung"] if self._waiting else []),
            *self._time_left(),
        ]
        lines = [" · ".join(done)]
        if self._losses:
            group = max(self._losses)
            lines.append(f"generation {group}: {self._mean(group)}{self._so_far}")
        elif self._so_far:
            lines.append(self._so_far.removeprefix(" · "))
        return lines
