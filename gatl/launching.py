"""What a job of a sweep knows of Hydra's launcher, which may run it in another process."""

import os

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

BASIC = BasicLauncher.__name__
"""The launcher that runs the jobs of a sweep one after another, in the process of the command."""

SLURM = "SlurmLauncher"
"""Submitit's, whose jobs outlive the command."""


_LOCAL = "LocalLauncher"
"""Submitit's, too: the same jobs on this machine, to try."""


def is_launched() -> bool:
    """Whether this process runs a job of a sweep that another process has launched."""
    return _launcher() != BASIC


def _launcher() -> str:
    """Return the launcher of this job; `BASIC` where there is none."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return BASIC
    return str(HydraConfig.get().launcher._target_).rpartition(".")[2]


def jobs_at_once() -> int:
    """Return how many jobs of a sweep share this machine, this one among them."""
    if not is_launched():
        return 1
    # Joblib's; -1: all cores, -2: but one.
    n_jobs = int(HydraConfig.get().launcher.get("n_jobs", 1))
    return n_jobs if n_jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + n_jobs)


def is_requeued() -> bool:
    """Whether SLURM runs this job once more, after a time-out or because it was pre-empted.

    It may also run, once more, a script in which somebody starts another sweep.
    """
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return _launcher() in (SLURM, _LOCAL) and count != "0"
