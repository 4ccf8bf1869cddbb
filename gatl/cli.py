"""What the commands share: composing the configuration, and errors in one line.

Hydra's own errors run to seven lines. The configuration is therefore composed
and checked before Hydra's main function sees the command line, so that every
typing error is one line, and no run folder is made for it.
"""

import argparse
import contextlib
import difflib
import functools
import io
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gatl import __version__
from gatl.chromosome import KNOWN_GENES
from gatl.config import Config, checked, resolving
from gatl.errors import UserError, printable
from gatl.files import is_unwritable, unwritable, write_whole, writing
from gatl.trust import (
    read_yaml,
    require_inside,
    require_known_address,
    require_plain,
    whole,
)

CHANGEABLE_ON_RESUME = ("budget", "evaluator", "logger", "final", "cache")
OF_ANY_EVALUATOR = ("threads", "timeout")
"""Settings that a run keeps where it goes on with another evaluator."""
EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
}
"""Launchers of packages that gatl does not require, and the extra that installs each."""
_LITERAL = re.compile(
    r"""
    (?P<key>[^=~]+)=
    (?P<value>(?!.*\$\{)                    # no interpolation,
        [^()\[\]{},='"\\]*                  # nothing that has a meaning in Hydra's grammar,
        [^()\[\]{},='"\\\w/+.$%*@?|:\ \t-]  # but something that the grammar does not know,
        [^()\[\]{},='"\\]*)
    """,
    re.ASCII | re.VERBOSE,
)
"""An override whose value can only be meant as it stands, and yet is none to Hydra."""


def read_command_line(command: str = "python -m gatl") -> argparse.Namespace:
    """Read Hydra's options and the overrides, which may stand among each other.

    ``sys.argv`` is written anew, in the one order that Hydra reads, and with quotes
    around what its grammar has no word for.

    Args:
        command: What the user typed in front of it.

    Returns:
        What Hydra will read; the overrides are its attribute ``overrides``.

    Raises:
        UserError: If an option is wrong, or two do not go together.
        SystemExit: After ``--version``.
    """
    parser = get_args_parser()
    parser.exit_on_error = parser.allow_abbrev = False
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        sys.stdout.write(f"gatl {__version__}\n")
        sys.exit()
    try:
        args, unknown = parser.parse_known_intermixed_args()
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see {command} --help.") from error
    if unknown:
        raise UserError(
            f"{unknown[0]} is no option: write KEY=VALUE, as in ga.pop=4; see {command} --help."
        )
    if sum(map(bool, (args.run, args.multirun, args.cfg, args.info, args.shell_completion))) > 1:
        raise UserError("Give one of --run, --multirun, --cfg, --info and --shell-completion.")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve goes with --cfg.")
    options = sys.argv[1:]
    for word in args.overrides:
        options.remove(word)
    # resume=FOLDER and trust=NAMES are no overrides: their values are taken as they stand.
    args.overrides = [
        w if w.startswith(("resume=", "trust=")) else quoted(w) for w in args.overrides
    ]
    sys.argv[1:] = [*args.overrides, *options]
    return args


def quoted(word: str) -> str:
    """Quote the value of an override if Hydra's grammar lacks a letter of it, as in ``~/photos``.

    What might mean something else, a list or a function or a value in quotes, is
    left as it is.
    """
    match = _LITERAL.fullmatch(word)
    if match is None:
        return word
    key, value = match.groups()
    if key in ("hydra.run.dir", "hydra.sweep.dir"):  # Hydra itself knows no home folder
        value = str(folder_named(value))
    return f'{key}="{value}"'


def folder_named(text: str) -> Path:
    """Return the folder that a user names; ``~`` is the home folder.

    Raises:
        UserError: If it is the home folder of an unknown user.
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{text} cannot be found: there is no such user here.") from error


def own_groups(config_dir: str | None) -> list[str]:
    """Return the override that lets ``compose`` see what ``--config-dir`` adds to the groups.

    Args:
        config_dir: The user's folder, with a folder for each group that it adds a choice to.

    Returns:
        One override, or none without a folder.

    Raises:
        UserError: If there is no such folder.
    """
    if config_dir is None:
        return []
    folder = Path(config_dir).absolute()
    if not folder.is_dir():
        raise UserError(f"--config-dir={folder} is no folder.")
    # In Hydra's grammar a backslash means itself, unless a quote follows.
    path = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + m[2].replace('"', r"\""), str(folder))
    return [f'hydra.searchpath=["file://{path}"]']


def resolve_if(asked: bool, composed: DictConfig) -> None:
    """Find out, where ``--resolve`` asks for it, whether all interpolations can be resolved."""
    if asked:
        with resolving():
            OmegaConf.resolve(composed)


@contextlib.contextmanager
def narrow_output(width: int = 80) -> Iterator[None]:
    """Let no line of what is printed be longer, as Hydra's list of a group's choices may be."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            whole = len(line) <= width
            rows = [line] if whole else _breaks(line, width)
            sys.stdout.write("\n".join(rows) + "\n")


def _breaks(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def help_requested(words: Sequence[str], text: str) -> bool:
    """Print what a command's ``--help``, ``-h`` or ``--version`` asks for.

    Args:
        words: The command line.
        text: The help.

    Returns:
        Whether it was asked for, so that the command has nothing else to do.
    """
    if "--help" in words or "-h" in words:
        sys.stdout.write(f"{text}\n")
        return True
    if "--version" in words:
        sys.stdout.write(f"gatl {__version__}\n")
        return True
    return False


def settings_in(
    words: Sequence[str], needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, str]:
    """Read the ``KEY=VALUE`` words of a command that composes no configuration.

    Args:
        words: The command line, without ``trust=``.
        needed: The keys that must be there.
        optional: Those that may be.

    Returns:
        The value of each key that was given, as it stands.

    Raises:
        UserError: If a word is none of these, or if a key is missing or given twice.
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in (*needed, *optional):
            valid = ", ".join(f"{name}=" for name in (*needed, *optional, "trust"))
            raise UserError(f"{word!r} is no word of this command, which takes {valid}.")
        if key in found:
            raise UserError(f"{key}= is given twice: {found[key]} and {value}.")
        found[key] = value
    for key in needed:
        if not found.get(key):
            raise UserError(f"{key}= is missing; see --help.")
    return found


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError` as one line and exit with status 1.

    So too what goes wrong with a file that has a name, and what Hydra says when a `_target_` of
    the configuration cannot be called. With the environment variable ``HYDRA_FULL_ERROR=1`` the
    traceback is shown.
    """
    try:
        yield
    except (UserError, InstantiationException, OSError) as error:
        line = in_one_line(error)
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.stderr.write(f"gatl: {line}\n")
        sys.exit(1)


def in_one_line(error: Exception) -> str | None:
    """Return what a user reads of an error; None if it is no user's.

    Args:
        error: What a target raised stands behind Hydra's own.
    """
    cause = error.__cause__
    wrapped = isinstance(error, InstantiationException) and isinstance(cause, UserError | OSError)
    shown = cause if wrapped else error
    if isinstance(shown, OSError):
        if is_unwritable(shown):
            return str(unwritable(shown, "try again."))
        return shown.filename and printable(f"{shown.filename}: {shown.strerror}.")
    return printable(" ".join(str(shown).split()))


def compose(overrides: Sequence[str], config_name: str = "config") -> DictConfig:
    """Compose a main configuration of ``conf/`` with overrides.

    Args:
        overrides: In Hydra's ``key=value`` syntax.
        config_name: The file, without its extension.

    Returns:
        The composed configuration, unchecked, interpolations unresolved.

    Raises:
        UserError: If Hydra cannot compose it; names the nearest valid key.
    """
    parsed = parse(overrides)
    try:
        with _initialised() as loader:
            for override in parsed:
                _require_one_value(override)
                key, value = override.key_or_group, override.value()
                options = loader.get_group_options(key)
                names = value if isinstance(value, list) else [value]
                named = isinstance(value, dict) or all(
                    isinstance(name, str) and "${" not in name for name in names
                )
                if options and not named and not override.is_delete():
                    raise UserError(f"{key} must be one of {', '.join(options)}, but got {value}.")
            composed = hydra.compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, config_name)) from error
    if any(override.key_or_group == "model.name" for override in parsed):
        network = OmegaConf.select(composed, "model.network")
        if not (isinstance(network, DictConfig) and "name" in network) or not (
            OmegaConf.is_interpolation(network, "name")
        ):
            raise UserError("model.name chooses among timm's models: add model=timm.")
    return composed


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides; a syntax error is a `UserError`."""
    with _initialised() as loader:
        parser = OverridesParser.create(loader)  # needs the loader for glob()
    parsed: list[Override] = []
    for line in overrides:
        try:
            parsed += parser.parse_overrides([line])
        except (HydraException, ValueError) as error:  # a number of thousands of digits is none
            raise UserError(
                f"{line!r} is no override: write KEY=VALUE; a value with blanks, brackets, "
                "commas, quotes or = needs quotes, as in 'data.root=\"my photos (1)\"'."
            ) from error
        if not parsed[-1].key_or_group:
            raise UserError(f"{line!r} is no override: write KEY=VALUE.")
    return parsed


def split_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a multirun, as Hydra's own sweeper makes them.

    What only another sweeper can draw from, such as ``interval(0, 1)``, is left
    out: it is checked when its job starts.

    Raises:
        UserError: If an override cannot be parsed, or no sweeper is there to draw from it.
    """
    parsed = parse(overrides)
    drawn = [o for o in parsed if o.is_sweep_override() and not o.is_discrete_sweep()]
    if drawn and not any(o.key_or_group == "hydra/sweeper" for o in parsed):
        raise UserError(
            f"{drawn[0].input_line} needs another sweeper than Hydra's own (hydra/sweeper=NAME); "
            "list the values instead, as in seed=1,2,3."
        )
    batches = BasicSweeper.split_arguments([o for o in parsed if o not in drawn], None)
    return [list(job) for batch in batches for job in batch]


def resumed(folder: Path, overrides: Sequence[str], trusted: Collection[str]) -> Config:
    """Return the checked configuration of a run that goes on, see `compose_resumed`."""
    composed, path = compose_resumed(folder, [], trusted), _config_of(folder)
    with whole(path):
        try:
            config = checked(composed)
        except UserError as error:
            raise UserError(
                f"{path} is damaged, or another version's ({str(error).rstrip('.')}): restore it "
                "from a copy, or begin a new run."
            ) from error
    if overrides:
        threads = config.evaluator.threads
        config = checked(compose_resumed(folder, overrides, trusted))
        if config.evaluator.threads != threads:
            raise UserError(
                f"evaluator.threads={config.evaluator.threads} cannot change on resume, because "
                f"the finished search must be the same: it is {threads}."
            )
    given = {override.key_or_group for override in parse(overrides)}
    if "evaluator.address" not in given:  # evaluator=NAME comes with its own, evaluator={...} not
        require_known_address(path, config, trusted)
    return config


def compose_resumed(
    folder: Path, overrides: Sequence[str], trusted: Collection[str] = ()
) -> DictConfig:
    """Compose the configuration of a run that goes on.

    Args:
        folder: The run folder; its ``.hydra/config.yaml`` is the base.
        overrides: Changes to the groups budget, evaluator, logger, final and cache.
        trusted: The targets that the folder may name beside gatl's own.

    Returns:
        The composed configuration, unchecked.

    Raises:
        UserError: If the folder holds no run, or one that could run something of its
            own, or if an override may not change.
    """
    path = _config_of(folder)
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no .hydra/config.yaml.")
    require_inside(folder)
    config = OmegaConf.create(read_yaml(path))
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is no configuration.")
    require_plain(path, config, trusted)
    return _changed(config, overrides)


def _config_of(folder: Path) -> Path:
    return folder / ".hydra" / "config.yaml"


def _changed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply the overrides with which a run goes on."""
    OmegaConf.set_struct(config, True)
    for override in parse(overrides):
        key, line = override.key_or_group, override.input_line
        if key.partition(".")[0] not in CHANGEABLE_ON_RESUME or override.is_delete():
            raise UserError(
                f"{line} cannot change on resume, because the finished search must be the same; "
                f"only {', '.join(CHANGEABLE_ON_RESUME)} can."
            )
        _require_one_value(override)
        value = override.value()
        try:
            if isinstance(value, str) and key in CHANGEABLE_ON_RESUME:  # the choice of a group
                chosen = compose([line or ""])[key]
                if key == "evaluator":
                    before = {n: OmegaConf.select(config, f"{key}.{n}") for n in OF_ANY_EVALUATOR}
                    with open_dict(chosen):
                        chosen.update({n: v for n, v in before.items() if v is not None})
                OmegaConf.update(config, key, chosen, merge=False)
            else:
                OmegaConf.update(config, key, value, force_add=override.is_add())
        except OmegaConfBaseException as error:
            raise UserError(_no_setting(str(error.full_key), "config")) from error
    return config


def remember(folder: Path, overrides: Sequence[str]) -> None:
    """Keep what a run was told when it went on, so that the next time needs no word of it.

    Args:
        folder: The run folder, which this process holds.
        overrides: What `compose_resumed` took.
    """
    if not overrides:
        return
    kept = folder / ".hydra" / "overrides.yaml"
    before = read_yaml(kept) if kept.is_file() else []
    if not isinstance(before, list):
        raise UserError(f"{kept} is no list of overrides: restore it from a copy, or remove it.")
    keys = {override.key_or_group for override in parse(overrides)}
    stay = [w for w in before if str(w).partition("=")[0].lstrip("+") not in keys]
    config = _changed(OmegaConf.create(read_yaml(_config_of(folder))), overrides)
    for path, content in {
        kept.with_name("config.yaml"): config,
        kept: OmegaConf.create([*stay, *overrides]),
    }.items():
        write_whole(path, OmegaConf.to_yaml(content).encode())


def hydra_setting(key: str, overrides: Sequence[str]) -> str:
    """Return what a setting of Hydra's own, such as ``hydra.run.dir``, is now."""
    with _initialised():
        composed = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
        return str(OmegaConf.select(composed, key))


def new_folder(path: Path) -> Path:
    """Make a folder of this name, or with a number behind it if another run has just done so.

    Raises:
        UserError: If it cannot be made.
    """
    make_folder(path.parent)
    folder, number = path, 1
    while folder.exists():
        number += 1
        folder = path.with_name(f"{path.name}_{number}")
    try:
        folder.mkdir()
    except FileExistsError:  # another run was faster
        return new_folder(path)
    except OSError as error:
        raise _unmakable(folder, error) from error
    return folder


def make_folder(path: Path) -> None:
    """Make a folder, with those it lies in, unless it is there.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unmakable(path, error) from error


def require_room(folder: Path) -> None:
    """Look whether a new folder takes the few small files with which a run begins.

    Hydra writes them, and shows a traceback where it cannot.

    Raises:
        UserError: If it does not; the folder is removed if it is empty.
    """
    probe = folder / ".room"
    try:
        with writing(folder):
            probe.write_bytes(bytes(2**16))
    except OSError as error:
        if not is_unwritable(error):
            raise
        probe.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise unwritable(error, "start again, or give another hydra.run.dir.") from error
    probe.unlink()


def _unmakable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder} cannot be made: {error.strerror}; give another with hydra.run.dir=PATH."
    )


@contextlib.contextmanager
def _initialised() -> Iterator[ConfigLoader]:
    """Point Hydra at ``conf/``."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("gatl.conf", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _require_one_value(override: Override) -> None:
    if override.is_sweep_override():
        raise UserError(
            f"{override.input_line} gives several values: sweep over them with python -m gatl -m, "
            "or write one list as [a,b]."
        )


def _explain(error: Exception, config_name: str) -> str:
    """Say in one line what was wrong with an override, and the nearest thing that is right."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file in EXTRAS:
        name, extra = error.missing_cfg_file, EXTRAS[error.missing_cfg_file]
        return f"{name} is not installed: pip install 'gatl[{extra}]'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = sorted(error.options)
        return f"{group}={choice} is no choice{_nearest(choice, options)}; there are: " + ", ".join(
            options
        )
    text = str(error).strip()
    if match := re.match(r"(?:.*already at '|Multiple values for )([\w.@/]*\w)", text):
        return f"{match.group(1)} is set already: leave out the +."
    if match := re.match(r"Could not override '(.+)'", text):
        inner = str(getattr(error.__cause__, "full_key", ""))  # for KEY={a: 1}, the key of a
        key = inner if inner.startswith(match.group(1)) else match.group(1)
        return _no_setting(key, config_name)
    first = text.splitlines()[0]
    return f"{first}: {str(error.__cause__).splitlines()[0]}" if error.__cause__ else first


def _no_setting(key: str, config_name: str) -> str:
    """Say that there is no such key, and which one is near."""
    gene = re.fullmatch(r"space\.(\w+)(\..*)?", key)
    if gene and gene[1] in KNOWN_GENES:
        return f'{key}: add the gene whole, "+space.{gene[1]}={{low: LOW, high: HIGH}}".'
    near = "" if key.startswith("hydra.") else _nearest(key, _valid_keys(config_name))
    return f"{key} is no setting{near}; see python -m gatl --help."


def _nearest(word: str, words: Sequence[str]) -> str:
    others = [other for other in words if other != word]  # a key of another choice of its group
    found = difflib.get_close_matches(word, others, n=1, cutoff=0.52)
    return f" (nearest: {found[0]})" if found else ""


@functools.cache
def _valid_keys(config_name: str) -> list[str]:
    """Return every dotted key of a default configuration, groups included."""

    def keys(node: object, prefix: str) -> Iterator[str]:
        for name, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{name}"
            yield from keys(value, f"{prefix}{name}.")

    return list(keys(OmegaConf.to_container(compose([], config_name)), ""))
