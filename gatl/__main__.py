"""``python -m gatl``: compose the configuration, search, retrain the winner, test it."""

import contextlib
import functools
import multiprocessing
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from gatl.cli import (
    compose,
    folder_named,
    hydra_setting,
    in_one_line,
    make_folder,
    narrow_output,
    new_folder,
    one_line_errors,
    own_groups,
    parse,
    read_command_line,
    remember,
    require_room,
    resolve_if,
    resumed,
    split_jobs,
)
from gatl.completion import shell_completion
from gatl.config import Config, checked
from gatl.data import folder as image_folder
from gatl.errors import UserError, printable
from gatl.files import is_unwritable, unwritable
from gatl.launching import BASIC, SLURM, is_launched, is_requeued
from gatl.targets import require_arguments
from gatl.trust import word_for, words_of

if TYPE_CHECKING:  # Optuna takes a while, which a typing error need not wait for
    from gatl.strategies.base import Strategy

LARGE = 128
"""Pixels of a side from which on a search takes long without a GPU."""


def run(config: Config, folder: Path, again: Sequence[str] = (), name: str = "") -> float:
    """Search, then make the final model; returns the search's best val_loss.

    Args:
        config: The checked configuration.
        folder: The run folder.
        again: The overrides with which the run goes on; they are kept for the next time.
        name: What tells its lines from those of other runs on the same terminal.

    Raises:
        UserError: If the run cannot go on; its message says how it can.
        KeyboardInterrupt: If the user stopped it; everything up to there is kept.
    """
    # Imported here because torch takes seconds, which a typing error need not wait for.
    from gatl.final import finish
    from gatl.loggers import Curve
    from gatl.progress import View, format_duration, new_console
    from gatl.record import any_complete, final_command, resume_command, way_on
    from gatl.report import kept_fresh
    from gatl.search import Ending, Search
    from gatl.session import opened
    from gatl.storage import StorageError

    console = new_console(name)
    left = again  # to be remembered
    try:
        with opened(config, folder, console) as session, kept_fresh(folder) as refresh:
            remember(folder, again)
            left = ()
            config = session.config
            n_workers = session.evaluator.n_workers
            console.print(f"Run folder: {folder}", soft_wrap=True)
            for line in _ahead(config, len(session.data.train), n_workers, session.strategy):
                console.print(line)
            view = View(
                console,
                config.n_trials,
                config.trainer.max_epochs,
                config.model.n_layers,
                session.strategy.generation,
            )
            tell = functools.partial(console.print, soft_wrap=True)
            curve = Curve(config, folder, session.strategy.generation, tell)
            with view, contextlib.closing(curve):
                search = Search(
                    config,
                    session.study,
                    session.strategy,
                    session.evaluator,
                    folder,
                    view,
                    session.stop,
                    session.cut,
                    curve,
                    refresh,
                )
                ending = search.run()
            if ending is Ending.INTERRUPTED:
                raise KeyboardInterrupt
            spent = format_duration(search.seconds)
            console.print(f"The search has ended: {ending.value} ({spent}).")
            refresh(at_once=True)
            return finish(session)
    except KeyboardInterrupt:
        # Commands stand on lines of their own, to be copied.
        trust = word_for(config)
        command = resume_command(folder, *trust, *left)
        console.print(f"Stopped. Go on with\n  {command}", soft_wrap=True)
        if any_complete(folder):
            command = final_command(folder, *trust)
            made = f"or make the model of what was found with\n  {command}"
            console.print(made, soft_wrap=True)
        raise
    except StorageError as error:
        raise StorageError(error.what, way_on(folder, *word_for(config), *left)) from error
    except OSError as error:
        if not is_unwritable(error):
            raise
        raise unwritable(error, way_on(folder, *word_for(config), *again)) from error


def _ahead(config: Config, n_images: int, n_workers: int, strategy: "Strategy") -> list[str]:
    """Say what a run will do, and what is better done otherwise."""
    import torch

    from gatl.progress import format_count

    epochs = format_count(config.trainer.max_epochs, "epoch")
    epochs = f"up to {epochs}" if config.rungs else epochs
    limit = "" if config.budget.time is None else f", for at most {config.budget.time}"
    lines = [
        f"Ahead: {format_count(config.n_trials, 'trial')} of {epochs} over "
        f"{format_count(n_images, 'image')}, {n_workers} at once{limit};",
        f"then {format_count(config.final.top_k * config.final.seeds, 're-evaluation')} and a "
        f"final training of up to {format_count(config.final.max_epochs, 'epoch')}.",
    ]
    if strategy.horizon(config.n_trials - 1) == 0:
        lines += [
            "All of them are the search's first ones, initial or drawn at random: raise",
            "budget.trials or ga.generations for it to go on from them.",
        ]
    if strategy.generation(0) is None:
        at_once = config.n_trials - strategy.horizon(config.n_trials) + 1
        if n_workers > at_once:
            lines += [
                f"Of {n_workers} workers {at_once} will be busy, because a trial waits for earlier "
                "ones:",
                "raise search.lag or search.chains.",
            ]
    gpu = config.trainer.accelerator != "cpu" and torch.accelerator.is_available()
    if config.data.image_size >= LARGE and not gpu:
        lines += [
            f"Without a GPU, images of {config.data.image_size} px take very long. "
            "model=se_densenet121_k12 suits",
            "a CPU (64 px), and experiment=quickstart is a whole run in minutes.",
        ]
    return lines


def resume(folder: Path, overrides: Sequence[str], trusted: Collection[str]) -> None:
    """Go on with a run, as `run` does."""
    config = resumed(folder, overrides, trusted)
    from gatl.final import nothing_left
    from gatl.progress import new_console
    from gatl.record import held, located, return_to_start

    with held(folder):  # to be refused needs no torch
        if nothing_left(folder, config, overrides, new_console()):
            return
    config = located(folder, config, trusted)
    return_to_start(folder)
    run(config, folder, overrides)


def _check(config: Config) -> None:
    """Look for the user's own images and database, and at the strategy's settings.

    What is wrong there need not wait seconds for torch, or hours for the other jobs of a sweep.
    """
    require_arguments("data.source", config.data.source)
    if config.data.source["_target_"] == f"{image_folder.__name__}.{image_folder.load.__name__}":
        image_folder.find_splits(config.data.source["root"])
    from gatl.storage import connected
    from gatl.strategies.build import build_strategy

    build_strategy(config)
    with connected(config.study.storage):
        pass


def must_be_new(folder: Path) -> None:
    """Refuse a folder that another run uses or has used.

    Raises:
        UserError: If so.
    """
    from gatl.record import held, record_in, resume_command

    if folder.is_dir():
        with held(folder):
            if record_in(folder):
                raise UserError(
                    f"{folder} holds a run already: go on with {resume_command(folder)} or give "
                    "another hydra.run.dir."
                )


@hydra.main(version_base="1.3", config_path="pkg://gatl.conf", config_name="config")
def job(composed: DictConfig) -> float:
    """Run one job, alone or of a multirun; returns its best val_loss for Hydra's sweepers."""
    folder, launched = Path(HydraConfig.get().runtime.output_dir), is_launched()
    name = f"job {HydraConfig.get().job.num}: " if launched else ""
    if launched:  # joblib's workers have a default of their own, in which none of ours can start
        multiprocessing.set_start_method("spawn", force=True)
    try:
        config = checked(composed)
        if not is_requeued():  # what the folder holds then is this job's own, and goes on
            must_be_new(folder)
        return run(config, folder, name=name)
    except (UserError, InstantiationException, OSError) as error:  # Hydra wraps a data source's
        _discard_unused(folder)
        if HydraConfig.get().mode is RunMode.MULTIRUN:  # the other jobs go on
            overrides = " ".join(HydraConfig.get().overrides.task)
            line = f"{printable(overrides)}: {in_one_line(error)}"
            sys.stderr.write(f"gatl: {line}\n")
            failed = UserError(f"A job of the sweep failed. {line}")
            raise _carrying(failed) if launched else failed from error
        with one_line_errors():
            raise
    except Exception as error:  # a defect
        if launched:
            _carrying(error)
        raise


def _carrying(error: Exception) -> Exception:
    """Let an exception take the traceback of the one that is handled to another process."""
    error.add_note(traceback.format_exc())
    return error


def _discard_unused(folder: Path) -> None:
    """Remove a run folder in which nothing has begun."""
    from gatl.record import held

    with contextlib.suppress(UserError), held(folder):
        if {path.name for path in folder.iterdir()} <= {".hydra"} and folder != Path.cwd():
            shutil.rmtree(folder)


def main() -> None:
    """Check the command line as far as it can be, then hand it to Hydra."""
    with one_line_errors():
        args = read_command_line()
        trusted, words = words_of(args.overrides)
        folders = [word for word in words if word.startswith("resume=")]
        if trusted and not folders:
            raise UserError("trust= goes with resume=: what you compose yourself may name any.")
        words += own_groups(args.config_dir)  # Hydra itself reads the option
        elsewhere = args.config_name or args.config_path
        if args.help or args.info or args.cfg:
            if not elsewhere:
                resolve_if(args.resolve, compose(words))
            with narrow_output() if args.help else contextlib.nullcontext():
                job()
        elif args.shell_completion:
            if not shell_completion(words):
                job()
        elif elsewhere or args.hydra_help:
            job()
        elif folders:
            if args.multirun or len(folders) > 1:
                raise UserError("resume= goes on with one run; leave out the sweep.")
            if args.config_dir:
                raise UserError("resume= goes on with the run's own: leave out --config-dir.")
            folder = folder_named(folders[0].removeprefix("resume="))
            resume(folder, [word for word in words if word not in folders], trusted)
        elif args.multirun:
            jobs = split_jobs(words)
            configs = [checked(compose(overrides)) for overrides in jobs]
            for config in configs:
                _check(config)
            launcher = hydra_setting("hydra.launcher._target_", jobs[0]).rpartition(".")[2]
            if launcher == SLURM and shutil.which("sbatch") is None:
                raise UserError("There is no sbatch here: start the sweep where SLURM takes jobs.")
            databases = {config.study.storage or "" for config in configs}
            folder = _use_new_folder("hydra.sweep.dir", words, jobs[0])
            if launcher != BASIC:
                # What a killed job leaves is cleaned up, which is nothing to be warned of.
                os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
                sys.stdout.write(f"{printable(folder)}: {len(jobs)} jobs, by {launcher}\n")
                sys.stdout.flush()  # before what the jobs print
            try:
                with _hydra_raises(), _told_in_one_line(launcher, folder, len(jobs)):
                    job()
            except UserError:  # of one job; the others are there
                _compare(folder, databases)
                raise
            _compare(folder, databases)
        else:
            if any(word.startswith("hydra/launcher=") for word in words):
                raise UserError("hydra/launcher= starts the runs of a sweep: add -m.")
            _check(checked(compose(words)))
            require_room(_use_new_folder("hydra.run.dir", words, words))
            job()


def _compare(folder: Path, databases: Collection[str]) -> None:
    """Put the runs of the sweep that has just ended beside one another, if they are several."""
    if len(list(folder.rglob("history.csv"))) > 1:
        from gatl.compare import compare

        compare(folder, databases)


def _use_new_folder(key: str, words: Sequence[str], overrides: Sequence[str]) -> Path:
    """See to it that Hydra writes into no other run's folder.

    Args:
        key: What names the folder to Hydra.
        words: The overrides of the command line, those of a sweep among them.
        overrides: Those of a run, or of one job of the sweep.

    Returns:
        The folder.

    Raises:
        UserError: If the user named a folder that holds a run.
    """
    given = [override for override in parse(words) if override.key_or_group == key]
    if not given:
        folder = new_folder(Path(hydra_setting(key, overrides)))
        sys.argv.insert(1, f"{key}={folder}")
        return folder.absolute()
    value = str(given[-1].value())
    if "${" in value:  # as Hydra will resolve it, but once: the time goes on
        value = hydra_setting(key, [*overrides, str(given[-1].input_line)])
        sys.argv[sys.argv.index(str(given[-1].input_line))] = f"{key}={value}"
    folder = Path(value).absolute()
    if key == "hydra.run.dir":  # each job of a sweep has one inside, which it looks at itself
        make_folder(folder)
        must_be_new(folder)
    return folder


@contextlib.contextmanager
def _told_in_one_line(launcher: str, folder: Path, n_jobs: int) -> Iterator[None]:
    """Say what has happened to a launcher that runs jobs elsewhere, and how they go on."""
    if launcher == BASIC:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        sys.stdout.write(f"{_way_on(launcher, folder, n_jobs)}\n".lstrip())
        raise
    except UserError:
        raise
    except Exception as error:
        if hasattr(error, "__notes__"):  # of a job, with its traceback: a defect
            raise
        said = str(error).strip().partition("\n")[0].rstrip(".")
        way_on = " ".join(_way_on(launcher, folder, n_jobs).split())
        raise UserError(f"{launcher}: {said}. {way_on}".rstrip()) from error


def _way_on(launcher: str, folder: Path, n_jobs: int) -> str:
    """Say what becomes of a sweep whose command ends before its jobs; nothing if none has begun."""
    from gatl.record import record_in

    compare = shlex.join(["python", "-m", "gatl.compare", f"runs={folder}"])
    if launcher == SLURM and any(folder.rglob("*_submitted.pkl")):
        return (
            "The jobs are SLURM's and go on (squeue, scancel); their output is in "
            f"{folder}/.submitit. When they have ended, compare them with\n  {compare}"
        )
    n_begun = sum(map(bool, map(record_in, folder.glob("*/"))))
    if not n_begun:
        return ""
    resume = shlex.join(["python", "-m", "gatl", f"resume={folder}/NUMBER"])
    begun = f"{n_begun} of {n_jobs} jobs have begun; each goes on with\n  {resume}"
    return f"{begun}\nThen compare them with\n  {compare}"


@contextlib.contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra hand on the exception of a job instead of printing it."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
