"""What comes in a run folder or a checkpoint is data, whoever made it: none of it is run.

A configuration names functions by ``_target_``, which are called. What the user composes may
name any. What lies in a folder may name those that gatl's own YAML names, each where gatl names
it, and those that the user lists in ``trust=``: exact names, because what begins alike (numpy's
and torch's own loaders, say) may unpickle.
"""

import contextlib
import functools
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from gatl.config import Config
from gatl.errors import UserError
from gatl.files import is_unwritable

UNPICKLING = frozenset({"optuna.samplers.CmaEsSampler"})
"""What gatl's own YAML names and yet unpickles: CMA-ES, of Optuna's samplers alone, keeps its
state in the study as a pickle. gatl gives it a study in memory; this is the second lock."""

MAX_DEPTH = 50
"""Of groups and lists in one another; gatl's own has six."""
MAX_YAML = 2**18
"""Bytes; gatl's own have a fiftieth, and the parser takes seconds for more."""
MAX_BITS = 1024
"""Of a whole number: larger ones are no floats, and Python may refuse to write them."""
_LOCK = "study.journal.lock"  # Optuna's, a link; a killed driver leaves it
_FOLDERS = frozenset({".features", ".hydra", ".images", "final", "search", "trials"})
_FILES = frozenset(
    {_LOCK, "MODEL_CARD.md", "best.ckpt", "classes.json", "history.csv", "images.csv", "model.onnx"}
    | {"report.html", "result.json", "study.journal", "study.json"}
)
_TARGET = "_target_"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # commands to a terminal


def words_of(words: Collection[str]) -> tuple[frozenset[str], list[str]]:
    """Take ``trust=NAME,NAME`` out of the words of a command line.

    Returns:
        The names, and the other words.
    """
    given = [word for word in words if word.startswith("trust=")]
    names = ",".join(word.removeprefix("trust=") for word in given).split(",")
    return frozenset(filter(None, names)), [word for word in words if word not in given]


def word_for(config: Config, *, record: bool = True) -> list[str]:
    """Return the ``trust=`` with which a run of this configuration can go on; often none.

    Args:
        config: The configuration.
        record: Whether its record and its evaluator are needed, which may lie elsewhere.
    """
    names = sorted({name for _, name in _foreign(asdict(config))})
    if record:
        names += sorted(_addresses(config)) + (
            [config.study.storage] if config.study.storage else []
        )
    return [f"trust={','.join(names)}"] if names else []


def read_yaml(path: Path) -> Any:  # noqa: ANN401
    """Return what a YAML file of a run folder holds, nothing resolved.

    Raises:
        UserError: If it cannot be read, or holds more than plain values.
    """
    with whole(path):
        if path.stat().st_size > MAX_YAML:
            raise ValueError(f"it is larger than {MAX_YAML} bytes")
        depth = 0
        for event in yaml.parse(path.read_text(encoding="utf-8")):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError("its groups lie too deep in one another")
            # gatl writes none, and a few lines of them are gigabytes when they are followed.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it holds an alias")
        content = OmegaConf.to_container(OmegaConf.load(path))
        for leaf in _leaves(content):
            if not isinstance(
                leaf, str | int | float | None
            ):  # OmegaConf makes paths and bytes, too
                raise ValueError(f"it holds a {type(leaf).__name__}")
            if isinstance(leaf, int) and leaf.bit_length() > MAX_BITS:
                raise ValueError("it holds a number that is too large")
        return content


@contextlib.contextmanager
def whole(path: object) -> Iterator[None]:
    """Turn whatever goes wrong with a file of a run folder into a `UserError`.

    Args:
        path: The file, or what else is read; it is named in the message.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        if is_unwritable(error):
            raise
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): when that is mended, try again."
        ) from error
    except Exception as error:  # a file that anybody may have written can raise anything
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is damaged and cannot be read ({type(error).__name__}: {message}): restore it "
            "from a copy, or begin a new run."
        ) from error


def require_plain(path: Path, config: DictConfig, trusted: Collection[str]) -> None:
    """Refuse a configuration from a run folder if using it could run something of its own.

    Args:
        path: The file, for the message.
        config: What it holds, interpolations unresolved.
        trusted: The targets that the user listed in ``trust=``.

    Raises:
        UserError: If it names another target, or a resolver that gatl's own YAML does not use.
    """
    # Every call of a resolver has a colon. Texts count whole: a piece could be put together.
    for text in texts(OmegaConf.to_container(config)):
        if _CONTROL.search(text):
            raise UserError(f"{path} holds control characters, in {text!r}: remove them.")
        if "${" in text and ":" in text and text not in _own_resolvers():
            raise UserError(
                f"{path} holds the interpolation {text!r}, which is none of gatl's own: write its "
                "value there."
            )
    with whole(path):
        resolved = OmegaConf.to_container(config, resolve=True)
    require_own(path, resolved, trusted)


def require_own(path: Path, node: object, trusted: Collection[str] = ()) -> None:
    """Refuse data that name a target which is neither gatl's own, at its place, nor trusted.

    Args:
        path: The file that holds them, for the message.
        node: Plain data; its groups are those of the configuration.
        trusted: The targets that the user trusts.

    Raises:
        UserError: If so, or if a text is an interpolation, which could be resolved to one.
    """
    for text in texts(node):
        if "${" in text:
            raise UserError(f"{path} holds the interpolation {text!r}: write its value there.")
    names = {name: place for place, name in _foreign(node) if name not in trusted}
    if names:
        listed = ", ".join(f"{place}.{_TARGET}={name}" for name, place in names.items())
        raise UserError(
            f"{path} would run {listed}: if you trust whoever made it, and know what that does, "
            f"add trust={','.join(names)}."
        )


def require_known_address(path: Path, config: Config, trusted: Collection[str]) -> None:
    """Refuse to connect to where a run folder says: those machines could run anything here.

    Args:
        path: The file that says it, for the message.
        config: The run's configuration.
        trusted: What the user listed in ``trust=``.

    Raises:
        UserError: If it names an address that is not trusted.
    """
    for address in _addresses(config) - set(trusted):
        raise UserError(
            f"{path} would connect to {address}, whose machines could then run code here: if you "
            f"trust them, add trust={address}; or give another evaluator.address."
        )


def _addresses(config: Config) -> set[str]:
    """Return where an evaluator connects to, unless this machine decides that."""
    return {str(config.evaluator.settings.get("address", "local"))} - {"local", "auto"}


def require_inside(folder: Path) -> None:
    """Refuse a run folder with a link that leaves it: what is written there would go elsewhere.

    Raises:
        UserError: If so, or if something in it is neither a file nor a folder, or not the one
            of the two that a run makes.
    """
    root = os.path.realpath(folder)
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path == folder / _LOCK and path.is_symlink():
                continue
            if path.is_symlink():
                to = Path(os.path.realpath(path))
                if not to.is_relative_to(root):
                    raise UserError(
                        f"{path} is a link to {to}, out of the run folder: replace it by what it "
                        "points to, or remove it."
                    )
            elif not (path.is_dir() or path.is_file()):
                raise UserError(f"{path} is neither a file nor a folder: remove it.")
            if path.parent == folder and path.name in (_FILES if path.is_dir() else _FOLDERS):
                kind = "folder" if path.is_dir() else "file"
                raise UserError(f"{path} is a {kind}, as no run makes it: remove it.")


def _foreign(node: object) -> list[tuple[str, str]]:
    """Return place and name of the targets that are not gatl's own."""
    return [found for found in _targets(node) if found not in _own_targets()]


def _targets(node: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield each target with the dotted key of the group that names it."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == _TARGET:
                yield place, str(value)
            yield from _targets(value, f"{place}.{name}" if place else str(name))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _targets(value, f"{place}[{index}]")


def _leaves(node: object) -> Iterator[object]:
    """Yield all that is neither a group nor a list, keys among them."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield name
            yield from _leaves(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value)
    else:
        yield node


def texts(node: object) -> Iterator[str]:
    """Yield all texts in plain data, keys among them."""
    return (leaf for leaf in _leaves(node) if isinstance(leaf, str))


@functools.cache
def _own() -> list[tuple[str, Any]]:
    """Return each file of ``conf/``: the group that it fills, and what it holds."""
    with as_file(files("gatl.conf")) as folder:
        return [
            (".".join(path.relative_to(folder).parent.parts), read_yaml(path))
            for path in folder.rglob("*.yaml")
        ]


@functools.cache
def _own_targets() -> frozenset[tuple[str, str]]:
    found = {pair for group, content in _own() for pair in _targets(content, group)}
    return frozenset((place, name) for place, name in found if name not in UNPICKLING)


@functools.cache
def _own_resolvers() -> frozenset[str]:
    found = (text for _, content in _own() for text in texts(content))
    return frozenset(text for text in found if "${" in text and ":" in text)
