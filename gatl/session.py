"""What a run holds while it lasts: its folder, data, study, workers, and how it is stopped."""

import contextlib
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

import optuna
from hydra.utils import get_class, instantiate
from rich.console import Console

from gatl.config import Config
from gatl.data.images import PreparedData, describe, prepare
from gatl.evaluation import Evaluator, build_classifier, resolve_precision, silence
from gatl.models.weights import read_weights
from gatl.record import held, open_study
from gatl.strategies.base import Strategy


@dataclass(frozen=True)
class Session:
    """A run that this process holds.

    Attributes:
        config: Its configuration.
        folder: Its run folder.
        data: The decoded images.
        strategy: Says what each trial is.
        study: The record.
        evaluator: Runs the fits.
        console: Where the user reads.
        stop: Set when the user asks to stop.
    """

    config: Config
    folder: Path
    data: PreparedData
    strategy: Strategy
    study: optuna.Study
    evaluator: Evaluator
    console: Console
    stop: Event


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
    resolve_precision(config.trainer)
    read_weights(config.model.weights)
    images = folder / ".images"
    with held(folder), _interruptible(console) as stop:
        source = instantiate(config.data.source)
        try:
            shutil.rmtree(images, ignore_errors=True)  # of a run that was killed
            images.mkdir()
            data = prepare(
                source,
                image_size=config.data.image_size,
                split_seed=config.data.split_seed,
                max_bad=config.data.max_bad,
                folder=images,
            )
            console.print(f"Data: {config.data.name} · {describe(data)}", soft_wrap=True)
            for line in data.skipped[:5]:
                console.print(f"  left out: {line}", soft_wrap=True, markup=False)
            if config.model.weights != "none":  # find out now whether they fit
                genes = config.space.to_dict(tuple(gene.high for gene in config.space.genes))
                build_classifier(config, data, genes)
            strategy = instantiate(config.search, _partial_=True, _convert_="all")(
                space=config.space, seed=config.seed, initial=config.initial
            )
            study = open_study(folder, strategy)
            evaluator = get_class(config.evaluator._target_)(config, data, stop)
            try:
                yield Session(config, folder, data, strategy, study, evaluator, console, stop)
            finally:
                stop.set()
                evaluator.close()
        finally:
            shutil.rmtree(images, ignore_errors=True)


@contextlib.contextmanager
def _interruptible(console: Console) -> Iterator[Event]:
    """Let Ctrl-C (and SIGTERM) ask the fits to stop; a second one stops at once."""
    stop = multiprocessing.get_context("spawn").Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.print("Stopping after what is being written; Ctrl-C again stops at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
