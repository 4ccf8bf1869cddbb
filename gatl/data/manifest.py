"""``images.csv``: every image of a run, by which a resumed one knows that they are the same."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gatl.data.images import PreparedData
from gatl.errors import UserError, printable
from gatl.files import csv_of, write_whole

MANIFEST = "images.csv"
COLUMNS = ("split", "class", "image", "digest", "error")
SPLITS = ("train", "val", "test")
Row = tuple[str, ...]

_LISTED = 5
"""Images left out that are printed; the file has all."""


def keep_or_compare(data: PreparedData, folder: Path) -> None:
    """Write down which images a run has; if it is one that goes on, compare them.

    Args:
        data: The images as decoded.
        folder: The run folder.

    Raises:
        UserError: If they are not the images that the run began with.
    """
    path, rows = folder / MANIFEST, _rows(data)
    if not path.is_file():
        write_whole(path, csv_of([COLUMNS, *rows]))
    elif (changes := _changes(_read(path), rows)) is not None:
        raise UserError(
            f"The images are not those that this run began with: {changes}. Bring them back as "
            f"they were, see {path}, or start a new run."
        )


def left_out(data: PreparedData) -> list[str]:
    """Say in a line each what cannot be decoded; of many, the first few."""
    lines = [image.error for image in data.skipped[:_LISTED]]
    more = len(data.skipped) - _LISTED
    return [f"left out: {line}" for line in (*lines, *([f"{more} more"] if more > 0 else []))]


def repeated(data: PreparedData) -> str | None:
    """Say in one line which pictures are there twice, where it matters.

    Two are the same if their pixels are, as decoded. One that is in two splits makes
    the test easier than life; one in two classes is mislabelled in one of them.

    Returns:
        How many are in several splits, and in several classes, with the first pair;
        None if there are none.
    """
    splits = [getattr(data, name) for name in SPLITS]
    names = [name for split in splits for name in split.names]
    owners = np.repeat(range(len(splits)), [len(split) for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    digests = np.concatenate([split.digests for split in splits])
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.diff(digests[order])) + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1]
    by_split = [pair for group in groups if (pair := _first_other(group, owners))]
    by_class = [pair for group in groups if (pair := _first_other(group, labels))]
    if not (by_split or by_class):
        return None
    first, second = (printable(names[i]) for i in min(by_split + by_class))
    return (
        f"the same pictures: {len(by_split)} in several splits, {len(by_class)} in several "
        f"classes; the first: {first} and {second}"
    )


def _first_other(
    group: npt.NDArray[np.intp], kinds: npt.NDArray[np.int64]
) -> tuple[int, int] | None:
    """Return the first image of a group and the first of another kind; None if all are of one."""
    others = group[kinds[group] != kinds[group[0]]]
    return (int(group[0]), int(others[0])) if len(others) else None


def _rows(data: PreparedData) -> list[Row]:
    """Return the images of each split in order, then those that are left out."""
    rows: list[Row] = []
    for name in SPLITS:
        split = getattr(data, name)
        columns = split.labels.tolist(), split.names, split.digests.tolist()
        rows += [
            (name, data.classes[label], image, f"{digest:016x}", "")
            for label, image, digest in zip(*columns, strict=True)
        ]
    return rows + [(s.split, data.classes[s.label], s.name, "", s.error) for s in data.skipped]


def _read(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = (tuple(row) for row in csv.reader(file))
    except (csv.Error, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; restore it from a copy.") from error
    if header != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise UserError(f"{path} is damaged: its columns must be {', '.join(COLUMNS)}.")
    return rows


def _changes(before: Sequence[Row], now: Sequence[Row]) -> str | None:
    """Say how two lists of images differ; None if they do not."""
    old, new = ({row[2]: row for row in rows} for rows in (before, now))
    changed = {
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "changed": [n for n, row in new.items() if n in old and _content(row) != _content(old[n])],
    }
    said = [f"{len(names)} {what}" for what, names in changed.items() if names]
    if not said:
        same = [row[:4] for row in before] == [row[:4] for row in now]
        return None if same else "their order or their splits are others"
    first = next(names[0] for names in changed.values() if names)
    hint = ", perhaps by another version of Pillow" if len(changed["changed"]) == len(old) else ""
    return f"{', '.join(said)}{hint}; the first: {printable(first)}"


def _content(row: Row) -> Row:
    """Return the class and the digest of an image."""
    return row[1], row[3]
