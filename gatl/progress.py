"""What the user sees of a run: a live table of the search on a terminal, plain lines elsewhere."""

import contextlib
import io
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
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
"""Seconds after which plain output shows that something still goes on."""

_REDRAW = 0.5
"""Seconds for which what a terminal shows stands at least."""

_ANY_WIDTH = 10_000
"""Columns, more than any table has."""


class _Console(Console):
    """A console that prints texts with nothing in them that commands it.

    Args:
        name: Stands in front of each line.
        settings: As rich has them.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._name = name

    def print(self, *objects: Any, **more: Any) -> None:
        """Print as rich does; a text, line by line, as `printable` writes it."""
        super().print(*(self._shown(what, **more) for what in objects), **more)

    def _shown(self, what: object, **more: Any) -> object:
        if self._name and not isinstance(what, str):  # a table
            with self.capture() as drawn:
                super().print(what, **more)
            what = drawn.get().rstrip("\n")
        if not isinstance(what, str):
            return what
        return "\n".join(self._name + printable(line) for line in what.split("\n"))


def new_console(name: str = "") -> Console:
    """Return the console of a command; it prints names and errors as they are.

    Square brackets in them are no markup, and names of files in another
    encoding than the terminal's are no error. Only a terminal has lines that end
    somewhere.

    Args:
        name: Of a run that is not alone on its terminal, and therefore prints plain lines; it
            stands in front of each.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = _Console(
        name, highlight=False, markup=False, emoji=False, force_terminal=False if name else None
    )
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


def describe_genes(genes: Mapping[str, float], n_layers: int) -> str:
    """Write a chromosome as words, such as ``all 58 layers, 18 frozen, lr 1.0e-03``.

    Args:
        genes: The chromosome by name.
        n_layers: Of the network.
    """
    included, frozen = (int(genes[name]) for name in ("included_layers", "frozen_layers"))
    layers = f"all {n_layers}" if included == n_layers else f"the first {included} of {n_layers}"
    others = {name: value for name, value in genes.items() if not name.endswith("_layers")}
    return f"{layers} layers, {frozen or 'nothing'} frozen, {format_genes(others)}"


@contextlib.contextmanager
def advancing(
    console: Console, what: str, left: str = "about {} left", before: float = 0.0
) -> Iterator[Callable[[float, float], None]]:
    """Show how far some work is: a bar on a terminal, now and then a line elsewhere.

    Args:
        console: Where to.
        what: The work.
        left: How to say what it still takes, told from what it has taken.
        before: How much had been done before.

    Yields:
        What to tell how much is done, and of how much.
    """
    began = printed = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[state]}"))
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not _is_live(console),
        refresh_per_second=1 / _REDRAW,
    )

    def report(done: float, total: float) -> None:
        nonlocal printed
        now = time.monotonic()
        state = f"{int(done)} of {int(total)}"
        if before < done < total:
            duration = format_duration((now - began) * (total - done) / (done - before))
            state += f" · {left.format(duration)}"
        bar.update(task, completed=done, total=total, state=state)
        if bar.disable and now - printed > _QUIET:
            printed = now
            console.print(f"{what}: {state} ...")

    with bar:
        task = bar.add_task(what, total=None, state="")
        yield report


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


class View:
    """Shows a search: a live table on a terminal, a line a trial elsewhere.

    Args:
        console: Where to.
        n_trials: The trials that end the search.
        n_epochs: Of a fit that is not stopped.
        n_layers: Of the network.
        generation: From a trial's number to its generation, if there are any.
    """

    def __init__(
        self,
        console: Console,
        n_trials: int,
        n_epochs: int,
        n_layers: int,
        generation: Callable[[int], int | None],
    ) -> None:
        self._console, self._n_trials, self._n_epochs = console, n_trials, n_epochs
        self._n_layers, self._generation = n_layers, generation
        self._live = Live(console=console, auto_refresh=False) if _is_live(console) else None
        self._drawn = -math.inf  # when it was
        self._running: dict[int, tuple[Mapping[str, float], float]] = {}
        self._waiting: dict[int, float] = {}  # at a rung, with the epochs done
        self._epochs: Mapping[int, float] = {}  # that the running fits have done
        self._left: float | None = None  # seconds
        self._recent: deque[FrozenTrial] = deque(maxlen=ROWS)
        self._losses: dict[int, list[float]] = {}  # by generation
        self._sizes: dict[int, int] = {}  # by generation: trials
        self._open: dict[int, int] = {}  # by generation: trials that have not ended
        self._best: FrozenTrial | None = None
        self._told_best: FrozenTrial | None = None
        self._told_uncached = False
        self._n_ended = 0
        for number in range(n_trials):
            group = generation(number)
            if group is not None:
                self._sizes[group] = self._open[group] = self._sizes.get(group, 0) + 1

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
            elif (epochs := outcome_of(trial).epochs) and trial.number < self._n_trials:
                self._waiting[trial.number] = epochs
        if self._n_ended:
            done = f"{self._n_ended} of {self._n_trials} trials done"
            self._print(f"Going on: {done}{self._so_far}")

    def started(self, number: int, genes: Mapping[str, float]) -> None:
        """Show that a fit runs."""
        self._waiting.pop(number, None)
        self._running[number] = genes, time.monotonic()

    def forecast(self, seconds: float | None, epochs: Mapping[int, float]) -> None:
        """Take up what is known of the rest.

        Args:
            seconds: That the search still takes; None if nobody can tell.
            epochs: That the running fits have done, by the trial's number.
        """
        self._left, self._epochs = seconds, epochs

    def paused(self, number: int, genes: Mapping[str, float], outcome: Outcome) -> None:
        """Show that a fit has come to a rung, where it waits for the others."""
        self._running.pop(number, None)
        self._waiting[number] = outcome.epochs
        if self._live is None:
            done = f"after {format_count(outcome.epochs, 'epoch')}"
            parts = (f"trial {number}", format_genes(genes), f"{self._result(outcome)} {done}")
            self._print(" · ".join(parts))

    def ended(self, trial: FrozenTrial) -> None:
        """Show a trial's result."""
        self._running.pop(trial.number, None)
        self._waiting.pop(trial.number, None)
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
        group = self._generation(trial.number)
        if group is not None:
            if self._open[group] > 0:
                return
            self._print(f"generation {group} done · {self._mean(group)}{self._so_far}")
        if self._live is None and self._best is not self._told_best:
            self._told_best = self._best
            self._print(self._sentence())

    def tick(self) -> None:
        """Draw the live table again, if it has stood for a while."""
        if self._live and time.monotonic() - self._drawn >= _REDRAW:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def _count(self, trial: FrozenTrial) -> None:
        self._n_ended += 1
        self._recent.append(trial)
        self._best = incumbent([trial] if self._best is None else [self._best, trial])
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

    def _sentence(self) -> str:
        """Say what is best so far."""
        if self._best is None:
            return "Best so far: no trial has come to its end yet"
        return (
            f"Best so far: {describe_genes(self._best.params, self._n_layers)}: "
            f"{self._result(outcome_of(self._best))} (trial {self._best.number})"
        )

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

    def _time_left(self) -> list[str]:
        if self._left is None or self._left <= 0 or self._n_ended >= self._n_trials:
            return []
        return [f"about {format_duration(self._left)} left"]

    def _table(self) -> RenderableType:
        """Draw what runs, the latest results above it, and where the search stands below."""
        below = Group(self._bars(), Text(self._sentence()))
        n_below = len(self._console.render_lines(below, pad=False))
        n_rows = max(3, min(ROWS, self._console.height - n_below - 2))
        running = sorted(self._running.items())[: n_rows // 2]
        recent = list(self._recent)[-(n_rows - len(running)) :]
        rows = [
            *(self._ended_row(trial) for trial in recent),
            *(self._running_row(number, *known) for number, known in running),
        ]
        genes = recent[0].params if recent else running[0][1][0] if running else {}
        short = [SHORT.get(gene, gene) for gene in genes]
        names = ["trial", "gen", *short, "val_loss", "acc", "time"]
        # A narrow terminal goes without what it can, the generation first: it stands below as well.
        dispensable = ["gen", "acc", "time", *reversed(short)]
        for n_left_out in range(len(dispensable) + 1):
            table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
            kept = [i for i, name in enumerate(names) if name not in dispensable[:n_left_out]]
            for i in kept:
                table.add_column(names[i], justify="right", no_wrap=True)
            for cells, style in rows:
                table.add_row(*(cells[i] for i in kept), style=style)
            wide = self._console.options.update(max_width=_ANY_WIDTH)
            if self._console.measure(table, options=wide).maximum <= self._console.width:
                break
        return Group(table, below)

    def _ended_row(self, trial: FrozenTrial) -> tuple[list[str], str]:
        """Return the cells of a trial, and their style."""
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
        return self._row(trial.number, trial.params, loss, accuracy, spent), style

    def _running_row(
        self, number: int, genes: Mapping[str, float], since: float
    ) -> tuple[list[str], str]:
        """Return the cells of a fit that runs: in which epoch, of how many, and for how long."""
        epoch = min(int(self._epochs.get(number, 0)) + 1, self._n_epochs)
        spent = format_duration(time.monotonic() - since)
        return self._row(number, genes, f"{epoch}/{self._n_epochs} ep", "", spent), "dim"

    def _row(self, number: int, genes: Mapping[str, float], *result: str) -> list[str]:
        group = self._generation(number)
        values = (format_value(value) for value in genes.values())
        return [str(number), "" if group is None else str(group), *values, *result]

    def _bars(self) -> RenderableType:
        """Draw how far the generation and the search are."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, max_width=40)
        grid.add_column(no_wrap=True)
        parts = {n: self._epochs.get(n, 0) / self._n_epochs for n in self._running}
        parts |= {n: epochs / self._n_epochs for n, epochs in self._waiting.items()}
        state = [f"{len(self._running)} running"]
        if self._waiting:
            state.append(f"{len(self._waiting)} at a rung")
        groups = [group for group in map(self._generation, parts) if group is not None]
        if groups or self._losses:
            group = min(groups) if groups else max(self._losses)
            size, n_open = self._sizes.get(group, 0), self._open.get(group, 0)
            done = size - n_open + sum(x for n, x in parts.items() if self._generation(n) == group)
            text = " · ".join([f"{size - n_open} of {size}", *state])
            grid.add_row(f"generation {group}", ProgressBar(size, done), text)
            state = []
        done = self._n_ended + sum(parts.values())
        text = f"{self._n_ended} of {self._n_trials} trials"
        text = " · ".join([text, *state, *self._time_left()])
        grid.add_row("search", ProgressBar(self._n_trials, done), text)
        return grid
