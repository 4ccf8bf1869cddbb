"""What the commands share: composing the configuration, and errors in one line.

Hydra's own errors run to seven lines. The configuration is therefore composed
and checked before Hydra's main function sees the command line, so that every
typing error is one line, and no run folder is made for it.
"""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gatl.chromosome import KNOWN_GENES
from gatl.errors import UserError

CHANGEABLE_ON_RESUME = ("budget", "evaluator", "logger", "final")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError` as one line and exit with status 1.

    With the environment variable ``HYDRA_FULL_ERROR=1`` the traceback is shown.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.stderr.write("gatl: " + " ".join(str(error).split()) + "\n")
        sys.exit(1)


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose ``conf/config.yaml`` with overrides.

    Args:
        overrides: In Hydra's ``key=value`` syntax.

    Returns:
        The composed configuration, unchecked, interpolations unresolved.

    Raises:
        UserError: If Hydra cannot compose it; names the nearest valid key.
    """
    parse(overrides)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("gatl.conf", version_base="1.3"):
            return hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except ValueError as error:  # what Hydra raises for a group that is given no name
        raise UserError(f"{' '.join(overrides)}: {error}") from error


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides; a syntax error is a `UserError`."""
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UserError(
            f"{error.override!r} is no override: write KEY=VALUE, and quote what the shell or "
            "Hydra takes apart (see python -m gatl --help)."
        ) from error
    return parsed


def split_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a multirun, as Hydra's own sweeper makes them."""
    batches = BasicSweeper.split_arguments(parse(overrides), max_batch_size=None)
    return [list(job) for batch in batches for job in batch]


def compose_resumed(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of a run that goes on.

    Args:
        folder: The run folder; its ``.hydra/config.yaml`` is the base.
        overrides: Changes to the groups budget, evaluator, logger and final.

    Returns:
        The composed configuration, unchecked.

    Raises:
        UserError: If the folder holds no run, or an override may not change.
    """
    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no .hydra/config.yaml.")
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is no configuration.")
    OmegaConf.set_struct(config, True)
    for override in parse(overrides):
        key = override.key_or_group
        group = key.partition(".")[0]
        if group not in CHANGEABLE_ON_RESUME or override.is_add() or override.is_delete():
            raise UserError(
                f"{override.input_line} cannot change on resume, because the finished search must "
                f"be the same; only {', '.join(CHANGEABLE_ON_RESUME)} can."
            )
        changed = compose([override.input_line or ""])
        value = OmegaConf.select(changed, key)
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(_explain(error)) from error
    return config


def _explain(error: Exception) -> str:
    """Say in one line what was wrong with an override, and the nearest thing that is right."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = sorted(option for option in error.options if not option.startswith("_"))
        return f"{group}={choice} is no choice{_nearest(choice, options)}; there are: " + ", ".join(
            options
        )
    text = str(error)
    match = re.search(r"Could not (?:override|append to config. An item is already at) '(.+?)'", text)
    if match is None:
        return text.strip().splitlines()[0]
    key = match.group(1).split("@")[0]
    if "No match in the defaults list" in text or "An item is already at" not in text:
        gene = re.fullmatch(r"space\.(\w+)(\..*)?", key)
        if gene and gene.group(1) in KNOWN_GENES:
            name = gene.group(1)
            return f"{key}: add the gene whole, +space.{name}={{low: LOW, high: HIGH}}."
        return f"{key} is no setting{_nearest(key, _valid_keys())}; see python -m gatl --help."
    return f"{key} is set already: leave out the +."


def _nearest(word: str, words: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (nearest: {found[0]})" if found else ""


def _valid_keys() -> list[str]:
    """Return every dotted key of the default configuration, groups included."""

    def keys(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in node:
            yield f"{prefix}{name}"
            if not OmegaConf.is_missing(node, str(name)):
                child = node._get_node(str(name))
                if isinstance(child, DictConfig) and not child._is_none():
                    yield from keys(child, f"{prefix}{name}.")

    return list(keys(compose([]), ""))
