"""Sweeps whose jobs run in other processes: joblib's, and submitit's, which are SLURM's."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hydra
import psutil
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from gatl import __main__, evaluation
from gatl.cli import _initialised, compose, hydra_setting
from gatl.config import checked
from gatl.errors import UserError
from gatl.launching import BASIC, SLURM, is_requeued, jobs_at_once
from gatl.progress import new_console
from gatl.record import JOURNAL

TINY = ("experiment=debug", "seed=1,2")


def sweep(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "FORCE_COLOR")}
    return subprocess.Popen(
        [sys.executable, "-m", "gatl", "-m", *words, f"hydra.sweep.dir={folder}/jobs"],
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def history(folder: Path) -> list[dict[str, str]]:
    """Return the rows of history.csv but for their times."""
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if k not in ("duration_s", "started_s", "fits")}
        for row in rows
    ]


def in_this_process(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gatl", "-m", *words])
    try:
        __main__.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture
def in_a_job(monkeypatch):
    """Make this process one that a launcher has started."""
    state = Singleton.get_state()

    def become(launcher: str) -> DictConfig:
        words = ["hydra.mode=MULTIRUN", f"hydra/launcher={launcher}"]
        with _initialised():
            HydraConfig.instance().set_config(
                hydra.compose("config", words, return_hydra_config=True)
            )
        OmegaConf.set_readonly(HydraConfig.instance().cfg.hydra, False)
        return HydraConfig.get().launcher

    yield become
    Singleton.set_state(state)


@pytest.mark.parametrize(
    ("name", "kind"), [("basic", BASIC), ("processes", "JoblibLauncher"), ("slurm", SLURM)]
)
def test_what_ships_builds_on_the_package_that_it_needs(name, kind):
    target = hydra_setting("hydra.launcher._target_", [f"hydra/launcher={name}"])
    assert target.rpartition(".")[2] == kind


@pytest.mark.parametrize(("name", "extra"), [("processes", "joblib"), ("slurm", "slurm")])
def test_without_the_package_one_line_says_how_to_install_it(monkeypatch, name, extra):
    compose([])  # by now Hydra has looked for plugins
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    for theirs in ("joblib.yaml", "submitit_slurm.yaml"):
        monkeypatch.delitem(launchers, theirs)
    with pytest.raises(UserError, match=rf"not installed: pip install 'gatl\[{extra}\]'"):
        compose([f"hydra/launcher={name}"])


def test_jobs_share_the_machine(monkeypatch, in_a_job):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**50))
    config = checked(compose(["experiment=debug", "data.image_size=32"]))
    assert (jobs_at_once(), evaluation.auto_workers(config)) == (1, 12)
    settings = in_a_job("processes")
    for n_jobs, n, share in ((1, 1, 12), (2, 2, 6), (5, 5, 2), (-1, 12, 1), (-2, 11, 1), (9, 9, 1)):
        settings.n_jobs = n_jobs
        assert (jobs_at_once(), evaluation.auto_workers(config)) == (n, share)
    in_a_job("slurm")  # which gives each its own
    assert (jobs_at_once(), evaluation.auto_workers(config)) == (1, 12)
    in_a_job("basic")
    assert (jobs_at_once(), evaluation.auto_workers(config)) == (1, 12)


def test_several_on_one_terminal_print_plain_lines_with_their_names(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert new_console().is_terminal
    console = new_console("job 3: ")
    assert not console.is_terminal
    console.print("[1/2] a\nb\x1b[2J")
    assert capsys.readouterr().out == "job 3: [1/2] a\njob 3: b\\x1b[2J\n"
    table = Table("class", "images", box=None, pad_edge=False)
    for row in (("daisy", "5"), ("rose", "7")):
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["job", "3:", *row] for row in (("class", "images"), ("daisy", "5"), ("rose", "7"))
    ]
    assert (
        len({line.index(cell) for line, cell in zip(lines, ("images", "5", "7"), strict=True)}) == 1
    )


def test_a_launcher_without_a_sweep_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gatl", *TINY[:1], "hydra/launcher=slurm"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert capsys.readouterr().err == (
        "gatl: hydra/launcher= starts the runs of a sweep: add -m.\n"
    )
    assert not [*tmp_path.iterdir()]


def test_a_job_that_slurm_runs_once_more_goes_on_in_its_folder(monkeypatch, capsys, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / JOURNAL).touch()
    ran = []
    monkeypatch.setattr(__main__, "run", lambda config, folder, name: ran.append(folder))
    words = ("seed=1", f"hydra.sweep.dir={tmp_path}")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # of the script that starts the sweep
    code, _, err = in_this_process(monkeypatch, capsys, *words)
    assert (code, ran) == (1, [])
    assert f"{tmp_path}/0 holds a run already" in err
    monkeypatch.setattr(__main__, "is_requeued", lambda: True)
    assert in_this_process(monkeypatch, capsys, *words) == (0, "", "")
    assert ran == [tmp_path / "0"]


def test_a_job_is_run_once_more_by_slurm_if_slurm_ran_it_before(monkeypatch, in_a_job):
    for count, again in (("0", False), ("1", True)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        for name, submitted in (("basic", False), ("processes", False), ("slurm", True)):
            in_a_job(name)
            assert is_requeued() == (again and submitted)


def test_without_slurm_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = (*TINY, "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}/jobs")
    code, out, err = in_this_process(monkeypatch, capsys, *words)
    assert (code, out) == (1, "")
    assert err == "gatl: There is no sbatch here: start the sweep where SLURM takes jobs.\n"
    assert list(tmp_path.iterdir()) == []


def test_what_a_launcher_raises_is_one_line_that_says_how_jobs_go_on(tmp_path, capsys):
    def raising(error: BaseException, launcher: str) -> None:
        with __main__._told_in_one_line(launcher, tmp_path, 3):
            raise error

    with pytest.raises(UserError, match=r"^JoblibLauncher: n_jobs has no meaning\.$"):
        raising(ValueError("n_jobs has no meaning\nmore"), "JoblibLauncher")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / JOURNAL).touch()
    with pytest.raises(UserError) as raised:
        raising(RuntimeError("A worker was killed."), "JoblibLauncher")
    assert "was killed. 1 of 3 jobs have begun; each goes on" in str(raised.value)
    assert f" resume={tmp_path}/NUMBER Then" in str(raised.value)
    assert f"gatl.compare runs={tmp_path}" in str(raised.value)
    with pytest.raises(KeyboardInterrupt):
        raising(KeyboardInterrupt(), "JoblibLauncher")
    assert f"\n  python -m gatl resume={tmp_path}/NUMBER\n" in capsys.readouterr().out
    (tmp_path / ".submitit").mkdir()
    (tmp_path / ".submitit" / "1_submitted.pkl").touch()
    with pytest.raises(UserError, match="scancel"):
        raising(RuntimeError("SLURM is down"), SLURM)
    defect = ZeroDivisionError("a job's")
    defect.add_note("Traceback")
    for error in (defect, UserError("a job's")):
        with pytest.raises(type(error), match="a job's"):
            raising(error, SLURM)
    with pytest.raises(ZeroDivisionError):  # there, the traceback is the job's own
        raising(ZeroDivisionError(), BASIC)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_jobs_of_processes_that_fail_are_a_line_each(tmp_path, full):
    for job in "01":
        (tmp_path / "jobs" / job).mkdir(parents=True)
        (tmp_path / "jobs" / job / JOURNAL).touch()
    variables = {"HYDRA_FULL_ERROR": "1"} if full else {}
    code, out, err = ended(sweep(tmp_path, *TINY, "hydra/launcher=processes", **variables))
    assert (code, out) == (1, f"{tmp_path}/jobs: 2 jobs, by JoblibLauncher\n")
    for job, seed in enumerate("12"):
        said = f"experiment=debug seed={seed}: {tmp_path}/jobs/{job} holds a run already"
        assert f"gatl: {said}" in err
    assert "A job of the sweep failed. experiment=debug seed=1: " in err
    assert ("Traceback" in err) == full
    assert ("in must_be_new" in err) == full  # where it was in the other process
    assert full or err.count("\n") == 4


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The sweep that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    code, _, err = ended(sweep(folder, *TINY))
    assert (code, err) == (0, "")
    return folder / "jobs"


def same(folder: Path, alone: Path) -> bool:
    return all(history(folder / job) == history(alone / job) for job in "01")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", "submitit_local"])
def test_a_sweep_is_the_same_wherever_its_jobs_run(tmp_path, alone, name):
    code, out, err = ended(sweep(tmp_path, *TINY, f"hydra/launcher={name}", FORCE_COLOR="1"))
    assert (code, err) == (0, "")
    assert same(tmp_path / "jobs", alone)
    assert (tmp_path / "jobs" / "compare.html").exists()
    assert not any("\x1b" in line for line in out.splitlines() if line.startswith("job "))
    where = (
        [out]
        if name == "processes"
        else [path.read_text() for path in (tmp_path / "jobs" / ".submitit").glob("*/*.out")]
    )
    for job in "01":
        assert any(f"job {job}: [3/3] trial" in text for text in where)


@pytest.mark.slow
def test_a_job_of_submitits_that_fails_tells_its_error_and_the_others_go_on(tmp_path):
    (tmp_path / "jobs" / "0").mkdir(parents=True)
    (tmp_path / "jobs" / "0" / JOURNAL).touch()
    code, _, err = ended(sweep(tmp_path, *TINY, "hydra/launcher=submitit_local"))
    assert code == 1
    line = f"A job of the sweep failed. experiment=debug seed=1: {tmp_path}/jobs/0 holds a run"
    assert line in err
    assert "Traceback" not in err
    assert (tmp_path / "jobs" / "1" / "result.json").exists()


def until(holds, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def begun(folder: Path) -> bool:
    """Whether each of two jobs has a result, and more to do."""
    paths = [folder / "jobs" / job / "history.csv" for job in "01"]
    return all(path.exists() and path.read_text().count("\n") > 1 for path in paths)


@pytest.mark.slow
def test_a_job_that_is_out_of_time_is_queued_again_and_goes_on(tmp_path, alone):
    """Submitit's own signal, which SLURM sends before a time-out and before a pre-emption."""
    words = (*TINY, "hydra/launcher=submitit_local", "ga.generations=2")
    process = sweep(tmp_path, *words, SLURM_RESTART_COUNT="1")
    until(lambda: begun(tmp_path), process)
    jobs = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "submitit.core._submit" in child.cmdline()
    ]
    assert len(jobs) == 2
    for job in jobs:
        job.send_signal(signal.SIGUSR2)
    code, _, err = ended(process)
    assert (code, err) == (0, "")
    assert same(tmp_path / "jobs", alone)
    logs = [path.read_text() for path in (tmp_path / "jobs" / ".submitit").glob("*/*.out")]
    assert all("Going on: " in text for text in logs)


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_of_processes_and_says_how_they_go_on(tmp_path):
    words = (TINY[0], "seed=1,2,3", "hydra/launcher=processes", "ga.generations=9")
    process = sweep(tmp_path, *words)
    until(lambda: begun(tmp_path), process)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = ended(process)
    assert code == 130
    assert err == ""
    assert "2 of 3 jobs have begun; each goes on with\n" in out
    assert f"\n  python -m gatl resume={tmp_path}/jobs/NUMBER\n" in out
    deadline = time.monotonic() + 60  # joblib's resource tracker ends when it finds itself alone
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_a_worker_of_joblibs_that_is_killed_is_one_line(tmp_path):
    process = sweep(tmp_path, *TINY, "hydra/launcher=processes", "ga.generations=9")
    until(lambda: begun(tmp_path), process)
    children = psutil.Process(process.pid).children(recursive=True)
    next(c for c in children if "popen_loky_posix" in " ".join(c.cmdline())).kill()
    code, _, err = ended(process)
    assert code == 1
    assert "Traceback" not in err
    assert "\ngatl: JoblibLauncher: A worker process" in f"\n{err}"
    assert f"resume={tmp_path}/jobs/NUMBER" in err
