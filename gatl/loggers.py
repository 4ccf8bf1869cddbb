"""The loggers of fits, and of a search's own curve: Lightning's, each writing into one folder.

A logger begins anew whenever its folder is opened: what there is to log is known, from the record
or from a checkpoint, and is logged again. So nothing is there twice, however often a run goes on.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, loggers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from optuna.trial import FrozenTrial, TrialState

from gatl.classifier import Classifier
from gatl.config import Config
from gatl.errors import UserError
from gatl.files import is_unwritable
from gatl.outcome import fitness
from gatl.ranking import incumbent
from gatl.record import identity, run_folder_of

CURVE = "search"
"""The folder of the search's own curve, in the run folder."""

_EXTRAS = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}


def build_logger(config: Config, folder: Path) -> Logger:
    """Build the configured logger; it writes into ``folder``, where earlier logs are removed.

    Raises:
        UserError: See `require_logger`.
    """
    logger = require_logger(config, folder)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    return logger


def require_logger(config: Config, folder: Path) -> Logger:
    """Build the configured logger for a folder, in which nothing is changed yet.

    Raises:
        UserError: If it cannot be made, or would write elsewhere.
    """
    try:
        # Called by ourselves: Hydra would resolve what stands in the folder's name.
        build = instantiate(config.logger, _partial_=True, _convert_="all")
        logger: Logger = build(save_dir=str(folder.parent), name="", version=folder.name)
    except UserError:
        raise
    except Exception as error:  # a target may raise anything
        extra = _EXTRAS.get(config.logger["_target_"].rpartition(".")[2])
        missing = isinstance(error, ModuleNotFoundError) and extra is not None
        hint = f" (logger={extra} needs pip install 'gatl[{extra}]')" if missing else ""
        raise UserError(f"The logger cannot be made{hint}: {_in_one_line(error)}") from error
    there = logger.log_dir  # None: it writes no files
    if there is not None and not Path(there).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"The logger would write into {there}, not into {folder}: give it no other folder."
        )
    return logger


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class WandbLogger(loggers.WandbLogger):
    """Weights & Biases: one of its runs for each fit, in a group for the run folder.

    A fit that goes on, or is done again, goes on in its own one.

    Args:
        save_dir: In which folder the fit's is.
        name: Unused.
        version: The name of the fit's folder.
        project: The project on W&B.
        offline: Whether to write files alone, for ``wandb sync``; so does ``WANDB_MODE=offline``.

    Raises:
        UserError: If nobody is logged in at W&B, and files alone are not what is asked for.
    """

    def __init__(
        self, save_dir: str, name: str, version: str, project: str = "gatl", offline: bool = False
    ) -> None:
        self._folder = folder = Path(save_dir, version)
        run = run_folder_of(folder)
        place = folder.relative_to(run).as_posix()
        super().__init__(
            name=place,
            save_dir=folder,
            version=hashlib.sha256(f"{identity(run)} {place}".encode()).hexdigest()[:16],
            offline=offline,
            project=project,
            group=run.resolve().name,
        )
        import wandb

        asked = "offline" if offline else os.environ.get("WANDB_MODE", "online")
        if asked == "online" and not wandb.login(prompt=False):
            raise UserError(
                "logger=wandb finds nobody logged in at W&B: run wandb login, or write files for "
                "wandb sync with logger.offline=true."
            )
        self._wandb_init.pop("anonymous", None)  # W&B warns of it
        # Nothing of the machine but what is logged, and no words on the terminal.
        self._wandb_init["settings"] = wandb.Settings(
            silent=True,
            symlink=False,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_disable_stats=True,
        )
        self._known = -1  # the last step that W&B has of an earlier session

    @property
    def experiment(self) -> Any:  # noqa: ANN401 - the base class's type, of a package that may lack
        """The run of W&B's."""
        if self._experiment is None:
            self._folder.mkdir(parents=True, exist_ok=True)  # otherwise it writes elsewhere
            started: Any = super().experiment
            for link in self._folder.glob("wandb/*run-*/logs/*.log"):  # out of the run folder
                if link.is_symlink():
                    link.unlink()
            if started.resumed:
                self._known = int(started.summary.get("trainer/global_step", -1))
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, unless an earlier session has logged this step."""
        if self.experiment is not None and (step is None or step > self._known):
            super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        """End the run of W&B's: the next fit in this process has one of its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None


class Result(Callback):
    """Logs what a fit has come to beside its genes: TensorBoard's HParams, the summary of W&B."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the best epoch's metrics."""
        assert isinstance(pl_module, Classifier)
        if not pl_module.epochs:
            return
        best = min(pl_module.epochs, key=lambda epoch: epoch["val_loss"])
        metrics = {f"best/{name}": best[name] for name in ("val_loss", "val_accuracy")}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(pl_module.genes, metrics)
            elif isinstance(logger, WandbLogger):
                logger.log_hyperparams(pl_module.genes)
                logger.experiment.summary.update(metrics)


class Curve:
    """The curve of a search, in its run folder: the best so far, and the means of generations.

    Args:
        config: The run's configuration.
        folder: The run folder.
        generation: From a trial's number to its generation, if there are any.
        tell: Is told why the curve ends before the search does: the logger failed.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        generation: Callable[[int], int | None],
        tell: Callable[[str], object] = lambda words: None,
    ) -> None:
        shutil.rmtree(folder / CURVE, ignore_errors=True)
        self._logger: Logger | None = build_logger(config, folder / CURVE)
        self._generation, self._tell = generation, tell
        self._n_logged = 0
        self._best: FrozenTrial | None = None
        self._losses: list[float] = []  # of the generation that has not ended

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Log the trials that have ended since.

        Args:
            trials: All trials of the study, by number; those behind one that has not ended wait.

        Raises:
            OSError: If the disk is full.
        """
        with self._going_on() as logger:
            new = trials[self._n_logged :]
            ended = list(itertools.takewhile(lambda trial: trial.state.is_finished(), new))
            for trial in ended:
                if point := self._point(trial):
                    logger.log_metrics(point, trial.number + 1)
            if ended:
                logger.save()
            self._n_logged += len(ended)

    def close(self) -> None:
        """Write what has not been written."""
        with self._going_on() as logger:
            logger.finalize("success")

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[Logger]:
        """Let a logger that fails cost the curve alone: the search is worth more."""
        if self._logger is None:
            yield DummyLogger()
            return
        try:
            yield self._logger
        except Exception as error:  # a logger may raise anything
            if is_unwritable(error):
                raise
            self._logger = None
            self._tell(
                f"The logger failed, so the search's curve ends here: {_in_one_line(error)}. "
                "It is whole again once the run is resumed."
            )

    def _point(self, trial: FrozenTrial) -> dict[str, float]:
        """Return what there is to log of a trial."""
        point: dict[str, float] = {}
        if trial.state is TrialState.COMPLETE and trial.value is not None:
            self._best = incumbent([trial] if self._best is None else [self._best, trial])
            self._losses.append(trial.value)
            point["val_loss"] = trial.value
        if self._best is not None and self._best.value is not None:
            point |= {"best_val_loss": self._best.value, "best_fitness": fitness(self._best.value)}
        group = self._generation(trial.number)
        if group is not None and group != self._generation(trial.number + 1):
            point["generation"] = group
            if self._losses:
                mean = statistics.fmean(self._losses)
                point |= {"mean_val_loss": mean, "mean_fitness": fitness(mean)}
            self._losses = []
        return point
