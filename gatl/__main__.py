"""``python -m gatl``: compose the configuration, search, retrain the winner, test it."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from gatl.cli import compose, compose_resumed, one_line_errors, parse, split_jobs
from gatl.config import Config, checked
from gatl.errors import UserError


def run(config: Config, folder: Path, again: Sequence[str] = ()) -> float:
    """Search, then make the final model; returns the search's best val_loss.

    Args:
        config: The checked configuration.
        folder: The run folder.
        again: The overrides that going on with this run needs.

    Raises:
        UserError: If the run cannot go on; its message says how it can.
        KeyboardInterrupt: If the user stopped it; everything up to there is kept.
    """
    # Imported here because torch takes seconds, which a typing error need not wait for.
    from gatl.final import final_command, finish
    from gatl.progress import View, format_duration, new_console
    from gatl.record import HISTORY, resume_command
    from gatl.search import Ending, Search
    from gatl.session import opened

    console = new_console()
    console.print(f"Run folder: {folder}", soft_wrap=True)
    try:
        with opened(config, folder, console) as session:
            n_workers = session.evaluator.n_workers
            limit = "" if config.budget.time is None else f", for at most {config.budget.time}"
            console.print(
                f"Ahead: {config.n_trials} trials of {config.trainer.max_epochs} epochs over "
                f"{len(session.data.train)} images, {n_workers} at once{limit}; then "
                f"{config.final.top_k} x {config.final.seeds} re-evaluations and a final training "
                f"of up to {config.final.max_epochs} epochs."
            )
            view = View(
                console,
                config.n_trials,
                n_workers,
                session.strategy.generation,
                config.budget.seconds,
            )
            with view:
                search = Search(
                    config,
                    session.study,
                    session.strategy,
                    session.evaluator,
                    folder,
                    view,
                    session.stop,
                    session.cut,
                )
                ending = search.run()
            if ending is Ending.INTERRUPTED:
                raise KeyboardInterrupt
            spent = format_duration(search.seconds)
            console.print(f"The search has ended: {ending.value} ({spent}).")
            return finish(session)
    except KeyboardInterrupt:
        line = f"Stopped. Go on with  {resume_command(folder, *again)}"
        if (folder / HISTORY).exists():
            line += f"  or make the model of what was found with  {final_command(folder)}"
        console.print(line, soft_wrap=True)
        raise


def resume(folder: Path, overrides: Sequence[str]) -> None:
    """Go on with a run, as `run` does."""
    config = checked(compose_resumed(folder, overrides))
    from gatl.record import held, original_folder

    with held(folder):  # to be refused needs no torch
        pass
    from gatl.final import made_before
    from gatl.progress import new_console

    if (made := made_before(folder, config, config.n_trials)) is not None:
        new_console().print(made, soft_wrap=True)
        return
    os.chdir(original_folder(folder))
    run(config, folder, overrides)


def must_be_new(folder: Path) -> None:
    """Refuse a folder that another run uses or has used.

    Raises:
        UserError: If so.
    """
    from gatl.record import JOURNAL, held, resume_command

    if folder.is_dir():
        with held(folder):
            if (folder / JOURNAL).exists():
                raise UserError(
                    f"{folder} holds a run already: go on with {resume_command(folder)} or give "
                    "another hydra.run.dir."
                )


@hydra.main(version_base="1.3", config_path="pkg://gatl.conf", config_name="config")
def job(composed: DictConfig) -> float:
    """Run one job, alone or of a multirun; returns its best val_loss for Hydra's sweepers."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = checked(composed)
        must_be_new(folder)
        return run(config, folder)
    except (UserError, InstantiationException) as error:  # Hydra wraps what a data source raises
        _discard_unused(folder)
        if HydraConfig.get().mode is RunMode.MULTIRUN:  # the other jobs go on
            overrides = " ".join(HydraConfig.get().overrides.task)
            cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
            sys.stderr.write(f"gatl: {overrides}: {cause}\n")
            raise UserError("A job of the sweep failed; its error stands above.") from error
        with one_line_errors():
            raise


def _discard_unused(folder: Path) -> None:
    """Remove a run folder in which nothing has begun."""
    from gatl.record import held

    with contextlib.suppress(UserError), held(folder):
        if {path.name for path in folder.iterdir()} <= {".hydra"} and folder != Path.cwd():
            shutil.rmtree(folder)


def main() -> None:
    """Check the command line as far as it can be, then hand it to Hydra."""
    args = get_args_parser().parse_args()
    words: list[str] = args.overrides
    resumed = [word for word in words if word.startswith("resume=")]
    informative = args.help or args.hydra_help or args.shell_completion
    elsewhere = args.config_dir or args.config_name or args.config_path
    with one_line_errors():
        if elsewhere or informative or args.info:
            job()
        elif args.cfg:
            compose(words)
            job()
        elif resumed:
            if args.multirun or len(resumed) > 1:
                raise UserError("resume= goes on with one run; leave out the sweep.")
            folder = Path(resumed[0].removeprefix("resume=")).expanduser().absolute()
            resume(folder, [word for word in words if word not in resumed])
        elif args.multirun:
            for overrides in split_jobs(words):
                checked(compose(overrides))
            with _hydra_raises():
                job()
        else:
            checked(compose(words))
            for override in parse(words):
                if override.key_or_group == "hydra.run.dir":  # before Hydra writes into it
                    must_be_new(Path(str(override.value())))
            job()


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
