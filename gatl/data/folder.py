"""A user's own images: a folder a class, with or without folders for the splits."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gatl.data.decode import FORMATS, UNREAD
from gatl.data.source import Source, Split
from gatl.errors import UserError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""The names of split folders, and which split each is."""

_EXPECTED = "give a folder with one folder a class"


def load(root: str) -> Source:
    """Find the images below a folder; open none.

    The layout is ``root/<class>/*``, or ``root/train/<class>/*`` beside ``val``
    (or ``valid``, ``validation``) and ``test``, of which either may be missing.
    Images may lie in nested folders of a class. Hidden files and folders, and
    files that are no images by their extension, are ignored. Links are followed,
    into each folder once; one that leads nowhere counts as an image that cannot
    be decoded, and so does one of `UNREAD`.

    Args:
        root: The folder; a leading ``~`` is expanded.

    Returns:
        The splits that there are; class names are the sorted folder names, image
        names the paths below the root.

    Raises:
        UserError: If the folder is not laid out like this, a class is empty, or a
            folder cannot be read.
    """
    found, path = find_splits(root), _absolute(root)
    classes = tuple(_folders(found["train"]))
    return Source(classes, **{name: _split(path, folder) for name, folder in found.items()})


def find_splits(root: str) -> dict[str, Path]:
    """Find the folders of the splits and compare their classes; look at no image.

    Args:
        root: The folder; a leading ``~`` is expanded.

    Returns:
        The folder of ``train``, and those of ``val`` and ``test`` where they are.

    Raises:
        UserError: If the folder is not laid out as `load` says.
    """
    path = _absolute(root)
    try:
        if not path.exists():
            raise UserError(f"data.root={path} does not exist; {_EXPECTED}.")
        if not path.is_dir():
            raise UserError(f"data.root={path} is no folder; {_EXPECTED}.")
        found = _split_folders(path) or {"train": path}
        classes = {name: _folders(folder) for name, folder in found.items()}
    except OSError as error:
        raise UserError(f"data.root={path} cannot be read: {error.strerror}.") from error
    expected = classes["train"]
    if len(expected) < 2:
        got = f"only {expected[0]!r}" if expected else "none"
        raise UserError(
            f"{found['train']} must hold a folder for each of 2 or more classes: {got}."
        )
    for name, others in classes.items():
        if different := sorted(set(others) ^ set(expected)):
            lacks = name if different[0] in expected else "train"
            raise UserError(
                f"{path}: the classes of {name} and train must be the same, "
                f"but {lacks} has no folder {different[0]!r}."
            )
    return found


def _absolute(root: str) -> Path:
    path = Path(root)
    with contextlib.suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    return path.absolute()


def _folders(path: Path) -> list[str]:
    visible = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    for link in filter(_leads_nowhere, visible):  # perhaps to a class, on a disk that is not there
        raise UserError(f"{link} is a link that leads nowhere: mend it or remove it.")
    return [p.name for p in visible if p.is_dir()]


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not os.path.exists(path)  # noqa: PTH110 - never raises


def _split_folders(root: Path) -> dict[str, Path] | None:
    """Return the folders of the splits; None if the folders of the root are classes.

    A class may be called "train", so that name alone beside others means nothing.
    """
    names = _folders(root)
    known = [name for name in names if name in SPLITS]
    others = [name for name in names if name not in SPLITS]
    if not known or (others and (len(known) < 2 or "train" not in known)):
        return None
    if others:
        raise UserError(f"{root} holds {' and '.join(known)}, so {others[0]!r} must not be there.")
    if "train" not in known:
        raise UserError(f"{root} holds {' and '.join(known)}, but no folder 'train'.")
    found = {SPLITS[name]: root / name for name in known}
    if len(found) < len(known):
        raise UserError(f"{root} must hold one validation folder, but got {', '.join(known)}.")
    return found


def _split(root: Path, folder: Path) -> Split:
    """Collect the images of a split, class by class, each in sorted order."""
    members = {label: images_below(folder / label) for label in _folders(folder)}
    if not any(members.values()):
        raise UserError(
            f"{folder} holds no images; files that end in {', '.join(extensions())} count."
        )
    for label, paths in members.items():
        if not paths:
            raise UserError(f"{folder / label} holds no images; add some or remove the folder.")
    images = [path for paths in members.values() for path in paths]
    labels = np.repeat(np.arange(len(members)), [len(paths) for paths in members.values()])
    names = [path.relative_to(root).as_posix() for path in images]
    return Split(images, labels.astype(np.int64), names)


def extensions() -> list[str]:
    """Return, sorted, the endings of file names that make a file an image."""
    return sorted(e for e, name in Image.registered_extensions().items() if name in FORMATS)


def images_below(folder: Path) -> list[Path]:
    """Find the images in a folder and in those below it, as `load` does for a class.

    Returns:
        Their paths, sorted, which begin with the folder's.

    Raises:
        UserError: If a folder cannot be read.
    """
    known = {*extensions(), *UNREAD}
    return sorted(
        path for path in _files(folder) if path.suffix.lower() in known or _leads_nowhere(path)
    )


def _files(folder: Path) -> Iterator[Path]:
    """Yield the visible files below a folder; like torchvision's ImageFolder, follow links.

    A folder is entered once, so that links in a circle end.
    """
    entered: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        status = Path(parent).stat()
        if (key := (status.st_dev, status.st_ino)) in entered:
            folders.clear()
            continue
        entered.add(key)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
