"""What the benchmarks share: their options, figures over seeds, tables, and where they ran."""

import functools
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from optuna.trial import FrozenTrial
from rich.console import Console

from gatl.config import Config
from gatl.data.images import PreparedData, prepare
from gatl.environment import hardware, versions
from gatl.errors import UserError
from gatl.evaluation import Evaluator, Fit
from gatl.outcome import Outcome
from gatl.progress import View
from gatl.search import Search
from gatl.session import opened

RESULTS = Path(__file__).resolve().parent / "results"


def options(words: Iterable[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into the options, defaults filled in, and the other words."""
    pairs = {word: word.partition("=") for word in words}
    given = {key: value for key, equals, value in pairs.values() if equals and key in defaults}
    return defaults | given, [word for word, pair in pairs.items() if pair[0] not in given]


def whole(name: str, text: str) -> int:
    """Return the number that an option gives.

    Raises:
        UserError: If it is not whole, or below 1.
    """
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise UserError(f"{name} must be a whole number of at least 1, but got {text!r}.")
    return int(text)


def over_seeds(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean, the sample's standard deviation (None where there is none), and n."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def over_repeats(values: Sequence[float]) -> dict[str, float | int]:
    """Return the median, the least and the most, and n."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def written(figure: dict[str, Any], spec: str = ".3f", factor: float = 1, unit: str = "") -> str:
    """Write what `over_seeds` returns, as ``mean ± sd``."""
    if figure["mean"] is None:
        return "none"
    sd = "" if figure["sd"] is None else f" ± {format(factor * figure['sd'], spec.lstrip('+'))}"
    return f"{format(factor * figure['mean'], spec)}{sd}{unit}"


def table(*rows: Sequence[str]) -> str:
    """Return rows, the first of which is the header, as a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


@functools.cache  # before the benchmark has written its own result
def commit() -> str | None:
    """Return the commit of the source, with ``-dirty`` if it was changed; None outside of git."""
    words = ("git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(
            (*words, "--dirty"), cwd=RESULTS.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def origin() -> dict[str, Any]:
    """Return what made a result: command, commit, versions and hardware.

    Of a folder elsewhere on the machine only the name is kept.
    """
    words = []
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        elsewhere = value.startswith(("/", "~", ".."))
        words.append(f"{key}={Path(value).name}" if elsewhere else word)
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def decoded(config: Config, folder: Path) -> PreparedData:
    """Decode the images of a configuration into a folder."""
    return prepare(
        instantiate(config.data.source),
        image_size=config.data.image_size,
        interpolation=config.model.interpolation,
        split_seed=config.data.split_seed,
        max_bad=config.data.max_bad,
        folder=folder,
    )


def evaluated(evaluator: Evaluator, fits: Sequence[Fit]) -> Iterator[tuple[int, Outcome]]:
    """Run fits, as many at once as the evaluator takes; yield the index of each that has ended."""
    ahead, running = list(range(len(fits))), 0
    while ahead or running:
        while ahead and evaluator.n_free:
            index = ahead.pop(0)
            evaluator.submit(index, fits[index])
            running += 1
        for ended in evaluator.wait(timeout=1):
            running -= 1
            yield ended


def run_search(
    config: Config, folder: Path, console: Console, driver: type[Search] = Search
) -> list[FrozenTrial]:
    """Search as gatl does, without a final model; go on with what the folder holds.

    Returns:
        The trials.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with opened(config, folder, console) as session:
        shown = (config.n_trials, config.trainer.max_epochs, config.model.n_layers)
        with View(console, *shown, session.strategy.generation) as view:
            driver(
                *(config, session.study, session.strategy, session.evaluator, folder, view),
                *(session.stop, session.cut),
            ).run()
        if session.stop.is_set():
            raise KeyboardInterrupt
        return session.study.get_trials(deepcopy=False)
