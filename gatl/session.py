"""What a run holds while it lasts: its folder, data, study, workers, and how it is stopped."""

import contextlib
import functools
import importlib
import inspect
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

import optuna
import torch
from hydra.utils import instantiate
from rich.console import Console

from gatl.classifier import Classifier
from gatl.config import Config
from gatl.data.images import PreparedData, describe, prepare
from gatl.data.manifest import MANIFEST, keep_or_compare, left_out, repeated
from gatl.errors import UserError
from gatl.evaluation import (
    Evaluator,
    load_pretrained,
    reason,
    resolve_precision,
    silence,
)
from gatl.features import is_shared, share_of, why_off
from gatl.files import sync, writing
from gatl.loggers import CURVE, require_logger
from gatl.models.layered import LayeredNetwork
from gatl.models.weights import LoadReport
from gatl.progress import advancing
from gatl.record import (
    FEATURES,
    IMAGES,
    held,
    open_study,
    place_of,
    record_in,
    remove_scratch,
    require_genes,
)
from gatl.storage import connected
from gatl.strategies.base import Strategy
from gatl.strategies.build import build_strategy
from gatl.targets import require_arguments
from gatl.trust import whole

THREADS = torch.get_num_threads()
"""Threads of the final training: what torch chose for this machine, before a search takes one."""


@dataclass(frozen=True)
class Session:
    """A run that this process holds.

    Attributes:
        config: Its configuration; without a pruner if the strategy has no generations.
        folder: Its run folder.
        data: The decoded images.
        strategy: Says what each trial is.
        study: The record.
        evaluator: Runs the fits.
        console: Where the user reads.
        stop: Set when the user asks to stop.
        cut: Set to make the evaluator's running fits end.
    """

    config: Config
    folder: Path
    data: PreparedData
    strategy: Strategy
    study: optuna.Study
    evaluator: Evaluator
    console: Console
    stop: threading.Event
    cut: Event


@contextlib.contextmanager
def opened(config: Config, folder: Path, console: Console) -> Iterator[Session]:
    """Open a run: what can be known to be wrong is found before the first fit.

    Args:
        config: The checked configuration.
        folder: The run folder, which exists.
        console: Where the user reads.

    Yields:
        The session; its workers and decoded images are gone afterwards.

    Raises:
        UserError: If the folder is in use, or device, weights or images are not
            what the configuration says.
    """
    silence()
    # OpenMP counts the threads of the whole process, and lets them wait asleep once they are more
    # than cores: a fit of two threads beside a driver that had used two took 2.4 times as long.
    torch.set_num_threads(1)
    resolve_precision(config.trainer)
    strategy = build_strategy(config)
    if config.rungs and strategy.generation(0) is None:
        config = replace(config, pruner=None)
        name = type(strategy).__name__
        console.print(f"Halving: off (it compares the fits of a generation, and {name} has none)")
    evaluator_class = _evaluator_class(config)
    require_arguments("logger", config.logger, save_dir="", name="", version="")
    require_logger(config, folder / CURVE)
    network = _largest_network(config)
    report = load_pretrained(config, network)
    images, features = folder / IMAGES, folder / FEATURES
    with (
        held(folder),
        connected(config.study.storage) as database,
        _on_signals(signal.default_int_handler),  # nothing to lose at first
    ):
        try:
            remove_scratch(folder)  # of a run that was killed
            source = instantiate(config.data.source)
            images.mkdir()
            with advancing(console, "Decoding images") as progress, writing(images):
                data = prepare(
                    source,
                    image_size=config.data.image_size,
                    interpolation=config.model.interpolation,
                    split_seed=config.data.split_seed,
                    max_bad=config.data.max_bad,
                    folder=images,
                    progress=progress,
                )
            console.print(f"Data: {config.data.name} · {describe(data)}")
            for line in filter(None, (*left_out(data), repeated(data))):
                console.print(f"  {line}", soft_wrap=True)
            if record_in(folder) and not (folder / MANIFEST).exists():
                console.print(f"{MANIFEST} is gone: the images may be others, and nobody knows")
            keep_or_compare(data, folder)
            console.print(f"Weights: {config.model.weights}, {report or 'all starts random'}")
            data = _with_features(config, data, network, report, features, console)
            study = open_study(folder, strategy, database)
            # The configuration is Hydra's, which does not wait for the disk; no record without it.
            for path in (*folder.glob(".hydra/*"), *folder.glob(".hydra"), folder):
                sync(path)
            with whole(place_of(folder) or record_in(folder)):
                require_genes(study, strategy.distributions())
            stop, cut = threading.Event(), multiprocessing.get_context("spawn").Event()
            evaluator = evaluator_class(config, data, cut)
            with _on_signals(_asking(stop, console)):
                now = False
                try:
                    yield Session(
                        config, folder, data, strategy, study, evaluator, console, stop, cut
                    )
                except KeyboardInterrupt:
                    now = True
                    raise
                finally:
                    cut.set()
                    evaluator.close(now=now)
        finally:
            remove_scratch(folder)


def _with_features(
    config: Config,
    data: PreparedData,
    network: LayeredNetwork,
    report: LoadReport | None,
    folder: Path,
    console: Console,
) -> PreparedData:
    """Say where the fits keep what crosses the boundary of frozen layers, if they can."""
    freezes = any(g.name == "frozen_layers" and g.high > 0 for g in config.space.genes)
    if not freezes or config.cache.max_gb == 0:
        return data
    if (reason := why_off(config.data.augment, data, report)) is not None:
        console.print(f"Feature cache: off ({reason})")
        return data
    if report is not None and not is_shared(network, report):
        console.print("Feature cache: off for fits that freeze layers which start random (new SE)")
    folder.mkdir()
    share = share_of(folder, config.cache.max_gb)
    return replace(data, features=folder.resolve(), features_bytes=share)


def _evaluator_class(config: Config) -> Callable[..., Evaluator]:
    """Find what ``evaluator=`` names; it takes the configuration, the data, an event to stop at.

    What else stands in its YAML, it takes as keywords.
    """
    target, settings = config.evaluator._target_, config.evaluator.settings
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        inspect.signature(found).bind(config, None, None, **settings)
        if hasattr(found, "require"):
            found.require(config, **settings)
    except UserError:
        raise
    except Exception as error:  # an import may raise anything
        raise UserError(f"evaluator._target_={target} cannot be used: {reason(error)}") from error
    return functools.partial(found, **settings)


def _largest_network(config: Config) -> LayeredNetwork:
    """Build the deepest network there can be, to know at once whether it can and weights fit."""
    largest = config.space.to_dict(config.space.repair([g.high for g in config.space.genes]))
    try:
        return Classifier(config.model.network, largest, ("a", "b"), {}).network
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.network cannot be built: {reason(error)}") from error


def _asking(stop: threading.Event, console: Console) -> Callable[[int, FrameType | None], None]:
    """Return a signal handler that asks to stop, and the second time stops at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another print
            console.print("Stopping after what is being written; Ctrl-C again stops at once.")

    return ask


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call a handler."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
