"""What the user sees of a search while it runs: a live table, or plain lines."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gatl.outcome import Outcome
from gatl.ranking import incumbent
from gatl.record import outcome_of

ROWS = 12
"""Trials that the live table shows."""

SHORT = {
    "included_layers": "included",
    "frozen_layers": "frozen",
    "learning_rate": "lr",
    "weight_decay": "decay",
    "label_smoothing": "smoothing",
}


def format_value(value: float) -> str:
    """Write a gene's value in few characters."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def format_genes(genes: Mapping[str, float]) -> str:
    """Write a chromosome in one line, such as ``included 58, frozen 18, lr 1.0e-03``."""
    return ", ".join(f"{SHORT.get(k, k)} {format_value(v)}" for k, v in genes.items())


def format_duration(seconds: float) -> str:
    """Write a duration as a person would say it, such as ``3 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class View:
    """Shows a search: a live table on a terminal, a line a trial elsewhere.

    Args:
        console: Where to.
        n_trials: The trials that end the search.
        n_workers: Fits at once.
        generation: From a trial's number to its generation, if there are any.
    """

    def __init__(
        self,
        console: Console,
        n_trials: int,
        n_workers: int,
        generation: Callable[[int], int | None],
    ) -> None:
        self._console, self._n_trials, self._n_workers = console, n_trials, n_workers
        self._generation = generation
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._running: dict[int, tuple[Mapping[str, float], float]] = {}
        self._recent: deque[FrozenTrial] = deque(maxlen=ROWS)
        self._losses: dict[int, list[float]] = {}  # by generation
        self._open: dict[int, int] = {}  # by generation: trials that have not ended
        self._best: FrozenTrial | None = None
        self._n_ended = 0
        self._durations: list[float] = []  # of this session's fits
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
        ended = [trial for trial in trials if trial.state.is_finished()]
        for trial in ended:
            self._count(trial)
        if ended and self._best:
            self._console.print(
                f"Going on: {len(ended)} of {self._n_trials} trials are done, "
                f"best val_loss {self._best.value:.4f} (trial {self._best.number})."
            )

    def started(self, number: int, genes: Mapping[str, float]) -> None:
        """Show that a fit runs."""
        self._running[number] = genes, time.monotonic()

    def ended(self, trial: FrozenTrial) -> None:
        """Show a trial's result."""
        self._running.pop(trial.number, None)
        self._count(trial)
        outcome = outcome_of(trial)
        if outcome.reused_from is None:
            self._durations.append(outcome.duration_s)
        if self._live is None:
            self._console.print(self._line(trial, outcome), soft_wrap=True, highlight=False)
            if (summary := self._summary(trial)) is not None:
                self._console.print(summary, soft_wrap=True, highlight=False)

    def tick(self) -> None:
        """Draw the live table again."""
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _count(self, trial: FrozenTrial) -> None:
        self._n_ended += 1
        self._recent.append(trial)
        self._best = incumbent([trial] if self._best is None else [self._best, trial])
        group = self._generation(trial.number)
        if group is not None:
            self._open[group] = self._open.get(group, 0) - 1
            if trial.state is TrialState.COMPLETE and trial.value is not None:
                self._losses.setdefault(group, []).append(trial.value)

    def _result(self, trial: FrozenTrial, outcome: Outcome) -> str:
        result = trial.state.name.lower()
        if trial.value is not None:
            result = f"val_loss {trial.value:.4f}, accuracy {outcome.val_accuracy or 0:.1%}"
        elif outcome.error:
            result = f"failed: {outcome.error}"
        if outcome.reused_from is not None:
            result += f" (as trial {outcome.reused_from})"
        return result

    def _line(self, trial: FrozenTrial, outcome: Outcome) -> str:
        group = self._generation(trial.number)
        where = "" if group is None else f" · generation {group}"
        time_left = self._time_left()
        return (
            f"[{self._n_ended}/{self._n_trials}] trial {trial.number}{where} · {format_genes(trial.params)}"
            f" · {self._result(trial, outcome)} · {format_duration(outcome.duration_s)}"
            + (f" · {time_left}" if time_left else "")
        )

    def _summary(self, trial: FrozenTrial) -> str | None:
        """Sum a generation up when its last trial has ended."""
        group = self._generation(trial.number)
        if group is None or self._open[group] > 0 or self._best is None:
            return None
        losses = self._losses.get(group, [])
        mean = f"mean val_loss {sum(losses) / len(losses):.4f}" if losses else "all failed"
        return (
            f"generation {group} done · {mean} · best so far {self._best.value:.4f} "
            f"(trial {self._best.number})"
        )

    def _time_left(self) -> str:
        left = self._n_trials - self._n_ended
        if left <= 0 or not self._durations:
            return ""
        mean = sum(self._durations) / len(self._durations)
        return f"about {format_duration(mean * left / self._n_workers)} left"

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        genes = tuple(self._recent[-1].params if self._recent else ())
        if not genes and self._running:
            genes = tuple(next(iter(self._running.values()))[0])
        for column in ("trial", "gen", *(SHORT.get(g, g) for g in genes), "val_loss", "acc", "time"):
            table.add_column(column, justify="right", no_wrap=True)
        for trial in self._recent:
            outcome = outcome_of(trial)
            best = self._best is not None and trial.number == self._best.number
            loss = "failed" if trial.value is None else f"{trial.value:.4f}"
            accuracy = "" if outcome.val_accuracy is None else f"{outcome.val_accuracy:.1%}"
            spent = format_duration(outcome.duration_s)
            if outcome.reused_from is not None:
                spent = f"= {outcome.reused_from}"
            self._row(
                table, trial.number, trial.params, loss, accuracy, spent, "green" if best else ""
            )
        for number, (params, since) in sorted(self._running.items()):
            spent = format_duration(time.monotonic() - since)
            self._row(table, number, params, "...", "", spent, "dim")
        return Group(table, Text(self._status()))

    def _row(
        self,
        table: Table,
        number: int,
        genes: Mapping[str, float],
        loss: str,
        accuracy: str,
        spent: str,
        style: str,
    ) -> None:
        group = self._generation(number)
        values = (format_value(value) for value in genes.values())
        table.add_row(
            *(str(number), "" if group is None else str(group)),
            *values,
            *(loss, accuracy, spent),
            style=style,
        )

    def _status(self) -> str:
        """The line below the table: where the search stands."""
        parts = [f"{self._n_ended} of {self._n_trials} trials"]
        if self._losses:
            group = max(self._losses)
            losses = self._losses[group]
            parts.append(f"generation {group}: mean {sum(losses) / len(losses):.4f}")
        if self._best is not None:
            parts.append(f"best {self._best.value:.4f} (trial {self._best.number})")
        if time_left := self._time_left():
            parts.append(time_left)
        return " · ".join(parts)
