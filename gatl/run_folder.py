"""Reading what a run wrote, whoever wrote it: what is damaged is told, never trusted or raised."""

import base64
import contextlib
import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatl.chromosome import KNOWN_GENES, Value
from gatl.errors import UserError, printable
from gatl.outcome import LARGEST
from gatl.record import HISTORY
from gatl.trust import read_yaml, require_inside, whole

MAX_TRIALS = 10_000
"""Trials that are read; more make a page too large to open."""
MAX_CLASSES = 2_000
MAX_FITS = 20
"""Of a trial: one for each rung."""
MAX_WORKERS = 10_000
MAX_ROWS = 2_000_000
"""Of any other table."""
MAX_JSON = 2**26
"""Bytes."""
MAX_PICTURE = 2**15
"""Bytes; no 96 by 96 pixels take more."""
MAX_NAME = 200
"""Characters of a name that are shown."""

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # OmegaConf's, without its resolvers


def number(value: object) -> float | None:
    """Return a number that can be one of a run's; None for anything else.

    Args:
        value: A number of a JSON or YAML file, or its text in a table.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if type(value) not in (int, float):
        return None
    assert isinstance(value, int | float)
    return value if abs(value) <= LARGEST else None  # NaN is no number either


def whole_number(value: object, high: float = 1e15) -> int | None:
    """Return a whole number in [0, high]; None for anything else."""
    found = number(value)
    if found is None or not 0 <= found <= high or found != int(found):
        return None
    return int(found)


def share(value: object) -> float | None:
    """Return a number in [0, 1]; None for anything else."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def name_of(value: object) -> str:
    """Write a name in one line of bounded length."""
    text = value if isinstance(value, str) else str(number(value))
    return printable(text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]} ...")


def at(node: object, *keys: str) -> Any:  # noqa: ANN401
    """Return what lies in groups under these keys; None if nothing does."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def list_at(node: object, *keys: str) -> list[Any]:
    """Return the list that lies in groups under these keys, or an empty one."""
    found = at(node, *keys)
    return found if isinstance(found, list) else []


def setting(config: object, *keys: str) -> Any:  # noqa: ANN401
    """Return a value of a configuration, see `resolved`."""
    return resolved(config, at(config, *keys))


def resolved(config: object, value: object) -> Any:  # noqa: ANN401
    """Follow plain references such as ``${model.n_layers}``, a few steps.

    Nothing is resolved that could say more than the file does, such as an environment variable.
    """
    for _ in range(3):
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return value
        value = at(config, *match[1].split("."))
    return None


@dataclass(frozen=True)
class Trial:
    """A row of ``history.csv``; None where it says nothing, or nothing that can be.

    Attributes:
        number: The trial's number.
        generation: Its generation, if the strategy has any.
        state: COMPLETE, PRUNED or FAIL.
        genes: Values by name, in the order of `KNOWN_GENES`.
        val_loss: Lowest mean cross-entropy over the validation split.
        val_accuracy: In [0, 1].
        epochs: Of its fit.
        duration_s: Seconds of its fit.
        trainable_params: Parameters that were trained.
        reused: Whether it is the result of an earlier trial.
        fits: Its fits: when each began, in seconds of the search; its own seconds; and the
            workers that there were.
    """

    number: int
    generation: int | None
    state: str
    genes: dict[str, Value]
    val_loss: float | None
    val_accuracy: float | None
    epochs: int | None
    duration_s: float | None
    trainable_params: int | None
    reused: bool
    fits: tuple[tuple[float, float, int], ...] = ()

    @property
    def loss(self) -> float:
        """The val_loss; infinite if there is none."""
        return math.inf if self.val_loss is None else self.val_loss

    @property
    def complete(self) -> bool:
        """Whether it has a val_loss of a whole fit."""
        return self.state == "COMPLETE" and self.val_loss is not None


class RunFolder:
    """The files of a run folder as plain data.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        notes: A line for each file that is damaged or is not shown whole.

    Raises:
        UserError: If it is no run folder, or something in it leads out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        known = (HISTORY, ".hydra/config.yaml")
        if not any((path / name).is_file() for name in known):
            raise UserError(f"{path} is no run folder: it has neither {' nor '.join(known)}.")
        require_inside(path)

    def yaml(self, name: str) -> Any:  # noqa: ANN401
        """Return what a YAML file holds; None if it is not there or damaged."""
        try:
            return read_yaml(self.path / name) if (self.path / name).is_file() else None
        except UserError as error:
            self._note(error)
            return None

    def json(self, name: str) -> dict[str, Any]:
        """Return what a JSON file holds; nothing if it is not there or damaged."""
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            with whole(path):
                if path.stat().st_size > MAX_JSON:
                    raise ValueError(f"it is larger than {MAX_JSON} bytes")
                content = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(content, dict):
                    raise ValueError("it is no object")
                return content
        except UserError as error:
            self._note(error)
            return {}

    def table(self, name: str, limit: int = MAX_ROWS) -> list[list[str]]:
        """Return the rows of a CSV file, the header first; none if it is not there or damaged.

        Args:
            name: The file's name.
            limit: Rows behind the header that are read.
        """
        path = self.path / name
        if not path.is_file():
            return []
        try:
            with whole(path), path.open(encoding="utf-8", errors="replace", newline="") as file:
                rows = list(itertools.islice(csv.reader(file), limit + 2))
        except UserError as error:
            self._note(error)
            return []
        if len(rows) > limit + 1:
            self.notes.append(f"{name} is long: its first {limit} rows are shown.")
        return rows[: limit + 1]

    def records(self, name: str, limit: int = MAX_ROWS) -> list[dict[str, str]]:
        """Return the rows of a CSV file by the names of its columns, see `table`."""
        header, *rows = self.table(name, limit) or [[]]
        return [dict(zip(header, row, strict=False)) for row in rows]

    def trials(self) -> list[Trial]:
        """Return the trials of ``history.csv`` that can be read, by number."""
        rows = self.records(HISTORY, MAX_TRIALS)
        found = {trial.number: trial for row in rows if (trial := _trial(row))}
        if lost := len(rows) - len(found):
            self.notes.append(f"{HISTORY} has rows that are no trials: {lost} left out.")
        return [found[n] for n in sorted(found)]

    def curve(self, name: str, first: int) -> dict[str, list[tuple[int, float]]]:
        """Return the points (epoch from 1, loss) of train_loss and val_loss in a log.

        Args:
            name: The file's name.
            first: What it calls the first epoch: Lightning's logs begin with 0.
        """
        rows = self.records(name, 10_000)
        curves: dict[str, list[tuple[int, float]]] = {}
        for metric in ("train_loss", "val_loss"):
            points = ((whole_number(row.get("epoch")), number(row.get(metric))) for row in rows)
            curves[metric] = [
                (epoch + 1 - first, loss)
                for epoch, loss in points
                if epoch is not None and loss is not None
            ]
        return curves

    def picture(self, name: str) -> str | None:
        """Return a small PNG file as a ``data:`` URI; None if it is not there, or no such file."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            with whole(path):
                content = path.read_bytes() if path.stat().st_size <= MAX_PICTURE else b""
        except UserError as error:
            self._note(error)
            return None
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            self.notes.append(f"{name} is no small PNG file.")
            return None
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"

    def _note(self, error: UserError) -> None:
        self.notes.append(str(error))


def _trial(row: Mapping[str, str]) -> Trial | None:
    trial_number = whole_number(row.get("number"))
    if trial_number is None or row.get("state") not in ("COMPLETE", "PRUNED", "FAIL"):
        return None
    genes: dict[str, Value] = {}
    for name, gene in KNOWN_GENES.items():
        value = whole_number(row.get(name)) if gene.kind is int else number(row.get(name))
        if value is not None and gene.allows(value):
            genes[name] = value
    loss = number(row.get("val_loss"))
    seconds = number(row.get("duration_s"))
    return Trial(
        trial_number,
        whole_number(row.get("generation"), MAX_TRIALS),
        row["state"],
        genes,
        loss if loss is not None and loss >= 0 else None,
        share(row.get("val_accuracy")),
        whole_number(row.get("epochs")),
        seconds if seconds is not None and seconds >= 0 else None,
        whole_number(row.get("trainable_params")),
        bool(row.get("reused_from")),
        tuple(_fits(row.get("fits") or "[]")),
    )


def _fits(text: str) -> Iterator[tuple[float, float, int]]:
    """Yield the fits that a cell tells of, but for what cannot be one."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        for fit in found[:MAX_FITS] if isinstance(found, list) else []:
            kept = fit if isinstance(fit, list) and len(fit) == 3 else [None] * 3
            began, seconds, n_workers = *map(number, kept[:2]), whole_number(kept[2], MAX_WORKERS)
            if began is None or seconds is None or not n_workers or min(began, seconds) < 0:
                continue
            yield began, seconds, n_workers


def square(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[int]]] | None:
    """Return the classes and counts of a confusion matrix as it was written; None if it is none."""
    if len(rows) < 2:
        return None
    classes = rows[0][1:]
    counts = [[n for cell in row[1:] if (n := whole_number(cell)) is not None] for row in rows[1:]]
    names = [row[0] for row in rows[1:] if len(row) == len(classes) + 1]
    if names != list(classes) or any(len(row) != len(classes) for row in counts):
        return None
    return list(map(name_of, classes)), counts


def mean(values: Iterable[float]) -> float | None:
    """Return the mean; None of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None
