"""Files that are there whole or not at all, what a full disk says, and where a model lies."""

import contextlib
import csv
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gatl.errors import UserError

CHECKPOINT = "best.ckpt"
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def is_unwritable(error: BaseException) -> bool:
    """Whether an error says that the disk takes no more: it is full, or a limit is reached."""
    return isinstance(error, OSError) and error.errno in _UNWRITABLE


def is_passing(error: BaseException) -> bool:
    """Whether an error says nothing of the file that is read, and may be gone the next time."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _PASSING


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let the error of a write, which names no file, name this one."""
    try:
        yield
    except OSError as error:
        if is_unwritable(error) and error.filename is None:
            error.filename = str(path)
        raise


def unwritable(error: OSError, way_on: str) -> UserError:
    """Return what the user reads when the disk takes no more.

    Args:
        error: See `is_unwritable`.
        way_on: What to do when there is room again.
    """
    what = f"{error.filename} cannot be written" if error.filename else "Nothing can be written"
    return UserError(f"{what} ({error.strerror}): make room, then {way_on}")


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that has its name only when it is on the disk: no kill, no power cut tears it.

    Raises:
        OSError: If it cannot be written; what has the name stays as it was.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def csv_of(rows: Iterable[Sequence[object]]) -> bytes:
    """Return the content of a CSV file, a line for each row.

    Names of files need not be text: what is none stays the bytes that it is.
    """
    lines: list[str] = []
    # The module quotes only those ends of lines that it writes itself, and yet reads all of them.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerows(rows)
    text = "".join(line.removesuffix("\r\n") + "\n" for line in lines)
    return text.encode(errors="surrogateescape")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole."""
    write_whole(path, (json.dumps(content, indent=2, default=float) + "\n").encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file whole, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, csv_of([header, *rows]))


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_in(run: str | Path) -> Path:
    """Return the checkpoint of a run's final model.

    Args:
        run: The run folder, or a checkpoint; ``~`` is the home folder.

    Raises:
        UserError: If there is none.
    """
    path = Path(run)
    with contextlib.suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"run={run} is neither a run folder nor a checkpoint.")
    if not (path / CHECKPOINT).is_file():
        raise UserError(
            f"run={run} holds no {CHECKPOINT}: if it is a run folder, make its final model with "
            f"python -m gatl.final run={run}"
        )
    return path / CHECKPOINT
