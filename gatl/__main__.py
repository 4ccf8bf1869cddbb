"""``python -m gatl``: compose the configuration, search, retrain the winner, test it."""

import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gatl.cli import compose, compose_resumed, one_line_errors, split_jobs
from gatl.config import Config, checked
from gatl.errors import UserError


def run(config: Config, folder: Path) -> float:
    """Search, then make the final model; returns the search's best val_loss.

    Raises:
        UserError: If the run cannot go on; its message says how it can.
        KeyboardInterrupt: If the user stopped it; everything up to there is kept.
    """
    # Imported here because torch takes seconds, which a typing error need not wait for.
    from rich.console import Console

    from gatl.final import finish
    from gatl.progress import View, format_duration
    from gatl.search import Ending, Search
    from gatl.session import opened

    console = Console(highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    with opened(config, folder, console) as session:
        n_workers = session.evaluator.n_workers
        limit = "" if config.budget.time is None else f", for at most {config.budget.time}"
        console.print(
            f"Ahead: {config.n_trials} trials of {config.trainer.max_epochs} epochs over "
            f"{len(session.data.train)} images, {n_workers} at once{limit}; then "
            f"{config.final.top_k} x {config.final.seeds} re-evaluations and a final training of "
            f"up to {config.final.max_epochs} epochs.",
            soft_wrap=True,
        )
        view = View(console, config.n_trials, n_workers, session.strategy.generation)
        with view:
            search = Search(
                config,
                session.study,
                session.strategy,
                session.evaluator,
                folder,
                view,
                session.stop,
            )
            ending = search.run()
        if ending is Ending.INTERRUPTED:
            console.print(
                f"Stopped. Go on with  python -m gatl resume={folder}  or make the model of what "
                f"was found with  python -m gatl.final run={folder}",
                soft_wrap=True,
            )
            raise KeyboardInterrupt
        console.print(f"The search has ended: {ending.value} ({format_duration(search.seconds)}).")
        return finish(session)


@hydra.main(version_base="1.3", config_path="pkg://gatl.conf", config_name="config")
def job(composed: DictConfig) -> float:
    """Run one job, alone or of a multirun; returns its best val_loss for Hydra's sweepers."""
    with one_line_errors():
        return run(checked(composed), Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Check the command line as far as it can be, then hand it to Hydra."""
    args = get_args_parser().parse_args()
    resumed = [word for word in args.overrides if word.startswith("resume=")]
    informative = args.help or args.hydra_help or args.shell_completion
    with one_line_errors():
        if not (informative or args.cfg or args.info):
            if resumed:
                if args.multirun or len(resumed) > 1:
                    raise UserError("resume= goes on with one run; leave out the sweep.")
                folder = Path(resumed[0].partition("=")[2])
                others = [word for word in args.overrides if word not in resumed]
                run(checked(compose_resumed(folder, others)), folder)
                return
            for overrides in split_jobs(args.overrides) if args.multirun else [args.overrides]:
                checked(compose(overrides))
        elif args.cfg:
            compose(args.overrides)
        job()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
