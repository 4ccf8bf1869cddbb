"""Whole runs of the command, most of them in processes of their own."""

import csv
import functools
import html
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from gatl import __main__
from gatl.cli import compose, compose_resumed
from gatl.config import checked
from gatl.strategies.build import build_strategy

N_TRIALS = 8
OVERRIDES = (
    "data=folder",
    "model=se_densenet121_k12",
    "data.image_size=32",
    "trainer.accelerator=cpu",
    "space.included_layers.high=4",
    "space.frozen_layers.high=1",
    "ga.pop=4",
    "ga.generations=3",  # 4 + 2 * (4 - 2) trials
    "trainer.max_epochs=2",
    "final.max_epochs=2",
    "final.seeds=1",
    "final.top_k=1",
)
SPY = """
from hydra.experimental.callback import Callback

class Spy(Callback):
    def __init__(self, path):
        self.path = path

    def on_job_end(self, config, job_return, **kwargs):
        with open(self.path, "a") as file:
            print(job_return.return_value, file=file)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three classes of 16 images."""
    root = tmp_path_factory.mktemp("data") / "my photos"
    rng = np.random.default_rng(0)
    for label, name in enumerate(("[red]", "green = 2", "blue")):
        (root / name).mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 150, (32, 32, 3), np.uint8)
            pixels[:, :, label] += 60
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def start(*words, cwd, module="gatl", **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("FORCE_COLOR", "HYDRA_FULL_ERROR"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment | env,
    )


def complete(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (out, err)
    return out, err


def history(folder):
    """Return the rows of history.csv but for their times."""
    times = ("duration_s", "started_s", "fits")
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def until(holds, process):
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@functools.cache
def configured(*words):
    return checked(compose(words))


def n_rows(folder):
    path = folder / "history.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def in_this_process(monkeypatch, capfd, *words, module=__main__):
    """Run a command here; return its exit status and what it prints."""
    monkeypatch.setattr(sys, "argv", ["gatl", *words])
    try:
        module.main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, photos):
    """A multirun over two seeds and one job that fails, with one worker."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "spy.py").write_text(SPY)
    _, err = complete(
        start(
            "-m",
            *OVERRIDES,
            f'data.root="{photos}"',
            "evaluator.workers=1",
            "seed=0,1",
            f"hydra.sweep.dir={folder}/jobs",
            "+hydra.callbacks.spy._target_=spy.Spy",
            f"+hydra.callbacks.spy.path={folder}/returned",
            cwd=folder,
            PYTHONPATH=str(folder),
        )
    )
    assert err == ""
    return folder


@pytest.fixture(scope="module")
def once(sweep):
    return sweep / "jobs" / "0"


def test_a_multirun_makes_a_folder_a_job_and_returns_the_best_val_loss(sweep):
    returned = [float(line) for line in (sweep / "returned").read_text().splitlines()]
    assert len(returned) == 2
    for job, value in enumerate(returned):
        folder = sweep / "jobs" / str(job)
        assert json.loads((folder / "result.json").read_text())["seed"] == job
        assert value == min(float(row["val_loss"]) for row in history(folder) if row["val_loss"])


def test_a_sweep_compares_its_runs_by_itself(sweep):
    page = (sweep / "jobs" / "compare.html").read_text()
    assert "<td>all runs</td><td>2</td>" in page
    (row,) = csv.DictReader((sweep / "jobs" / "compare.csv").read_text().splitlines())
    best = [
        min(float(r["val_loss"]) for r in history(sweep / "jobs" / j) if r["val_loss"])
        for j in "01"
    ]
    assert float(row["val_loss"]) == pytest.approx(sum(best) / 2)
    assert float(row["trials"]) == N_TRIALS
    assert (sweep / "jobs" / "compare.png").stat().st_size > 10_000


def test_another_seed_is_another_search(sweep, once):
    assert len(history(once)) == N_TRIALS
    assert history(sweep / "jobs" / "1") != history(once)


def test_a_run_leaves_what_the_contract_names(once):
    assert {path.name for path in once.iterdir()} == {
        *(".hydra", "study.journal", "history.csv", "trials", "result.json", "final", "best.ckpt"),
        *("images.csv", "MODEL_CARD.md", "report.html", "search"),
    }
    evaluated = {row["number"] for row in history(once) if not row["reused_from"]}
    assert {path.name for path in (once / "trials").iterdir()} == evaluated
    for number in evaluated:
        names = {path.name for path in (once / "trials" / number).iterdir()}
        assert names == {"metrics.csv", "hparams.yaml"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, photos):
    """A run of two workers that was killed, in a folder whose name needs quotes."""
    cwd, temporary = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("t")
    folder = cwd / "a run = 1"
    process = start(
        *OVERRIDES,
        f'data.root="{os.path.relpath(photos, cwd)}"',
        "evaluator.workers=2",
        f'hydra.run.dir="{folder}"',
        cwd=cwd,
        TMPDIR=str(temporary),
    )
    until(lambda: n_rows(folder) >= 2, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while True:  # its workers end by themselves
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(temporary.glob("pymp-*")) == []
    assert n_rows(folder) < N_TRIALS
    shutil.copy(folder / "report.html", cwd / "killed.html")
    return folder


@pytest.fixture(scope="module")
def interrupted(killed, tmp_path_factory):
    """The killed run, gone on with from elsewhere, and stopped by Ctrl-C; with what it printed."""
    before = n_rows(killed)
    process = start(
        f"resume={os.path.relpath(killed, killed.parent.parent)}/",
        "evaluator.workers=3",
        cwd=killed.parent.parent,
    )
    until(lambda: n_rows(killed) > before, process)
    os.killpg(process.pid, signal.SIGSTOP)  # lest it end too early
    _, refusal = complete(start(f"resume={killed}", cwd=killed.parent), 1)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    out, err = complete(process, 130)
    shutil.copy(killed / "report.html", killed.parent / "interrupted.html")
    return out, err, refusal


def test_a_second_driver_is_refused_in_one_line(interrupted, killed):
    refusal = interrupted[2]
    assert refusal == (
        f"gatl: {killed} is in use by another run: wait for its end, or stop it with Ctrl-C.\n"
    )


def test_ctrl_c_saves_and_says_how_to_go_on(interrupted, killed):
    out, err, _ = interrupted
    assert err == ""
    assert "Going on: " in out
    *_, stopped, command, or_else, other = out.splitlines()
    assert (stopped, or_else) == (
        "Stopped. Go on with",
        "or make the model of what was found with",
    )
    assert command == f"  {shlex.join(['python', '-m', 'gatl', f'resume={killed}'])}"
    assert other == f"  {shlex.join(['python', '-m', 'gatl.final', f'run={killed}'])}"
    assert not (killed / ".images").exists()


@pytest.mark.parametrize(
    ("how", "heading"), [("killed", "In progress"), ("interrupted", "No final model yet")]
)
def test_the_page_of_a_run_that_broke_off_says_how_it_goes_on(interrupted, killed, how, heading):
    page = (killed.parent / f"{how}.html").read_text()
    assert f"<h2>{heading}</h2>" in page
    assert ('http-equiv="refresh"' in page) == (how == "killed")  # it had no time to say so
    command = shlex.join(["python", "-m", "gatl", f"resume={killed}"])
    assert html.escape(command, quote=False).replace("'", "&#39;") in page


def test_what_a_run_is_told_when_it_goes_on_holds_the_next_time_too(interrupted, killed):
    assert checked(compose_resumed(killed, [])).evaluator.workers == "3"
    assert "evaluator.workers=3" in (killed / ".hydra" / "overrides.yaml").read_text()


@pytest.fixture(scope="module")
def resumed(interrupted, killed):
    """The run after the command that Ctrl-C printed."""
    words = shlex.split(interrupted[0].splitlines()[-3])
    assert words[:3] == ["python", "-m", "gatl"]
    complete(start(*words[3:], cwd=killed.parent))
    return killed


def test_killed_interrupted_and_with_two_workers_it_is_the_same_search(resumed, once):
    assert history(resumed) == history(once)
    one, other = (json.loads((f / "result.json").read_text()) for f in (resumed, once))
    assert one["test"] == other["test"]
    assert one["best"] == other["best"]


def test_a_finished_run_is_not_done_again(resumed, monkeypatch, capfd):
    before = {path: path.stat().st_mtime_ns for path in resumed.rglob("*")}
    code, out, err = in_this_process(monkeypatch, capfd, f"resume={resumed}")
    assert (code, err) == (0, "")
    assert out.startswith("Nothing is left to do: ")
    assert str(resumed / "best.ckpt") in out
    assert {path: path.stat().st_mtime_ns for path in resumed.rglob("*")} == before


def test_a_folder_that_holds_a_run_is_not_used_for_another(once, monkeypatch, capfd):
    before = (once / ".hydra" / "config.yaml").read_bytes()
    code, out, err = in_this_process(monkeypatch, capfd, "seed=7", f"hydra.run.dir={once}")
    assert (code, out) == (1, "")
    assert "holds a run already: go on with python -m gatl resume=" in err
    assert err.count("\n") == 1
    assert (once / ".hydra" / "config.yaml").read_bytes() == before


def test_a_spent_time_budget_still_ends_with_a_tested_model(tmp_path, photos, monkeypatch, capfd):
    code, out, err = in_this_process(
        monkeypatch,
        capfd,
        *OVERRIDES,
        f'data.root="{photos}"',
        "budget.time=0.01s",
        "evaluator.workers=1",
        f"hydra.run.dir={tmp_path}/run",
    )
    assert (code, err) == (0, "")
    assert "The search has ended: the time budget is spent" in out
    # The first generation goes on to the first fit that ends; the other that could is cut off.
    states = [row["state"] for row in history(tmp_path / "run")]
    assert sorted(states) == ["COMPLETE", "PRUNED", "PRUNED"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trials"] == 3
    assert result["test"]["n"] > 0


def test_a_job_of_a_sweep_that_fails_does_not_end_the_others(tmp_path, photos, monkeypatch, capfd):
    few(photos, tmp_path / "few", 3, 2)
    code, _, err = in_this_process(
        monkeypatch,
        capfd,
        "-m",
        *OVERRIDES,
        f'data.root="{tmp_path}/few","{photos}"',
        "budget.trials=1",
        "evaluator.workers=1",
        f"hydra.sweep.dir={tmp_path}/jobs",
    )
    assert code == 1
    assert f"gatl: {' '.join(OVERRIDES[:2])} " in err
    assert "at least" in err
    assert "Traceback" not in err
    assert not (tmp_path / "jobs" / "0").exists()
    assert (tmp_path / "jobs" / "1" / "result.json").exists()


def few(photos, folder, classes, images):
    for name in sorted(path.name for path in photos.iterdir())[:classes]:
        (folder / name).mkdir(parents=True)
        for path in sorted((photos / name).iterdir())[:images]:
            (folder / name / path.name).write_bytes(path.read_bytes())
    return [f'data.root="{folder}"']


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (lambda p, t: [f"data.root={t}/missing"], "does not exist"),
        (lambda p, t: few(p, t / "one", 1, 16), "2 or more classes"),
        (lambda p, t: few(p, t / "few", 3, 2), "at least"),
        (lambda p, t: [f'data.root="{p}"', "trainer.precision=16-mixed"], "needs a GPU"),
        (lambda p, t: [f'data.root="{p}"', "trainer.accelerator=gpu"], "torch sees no GPU"),
    ],
    ids=["missing", "one-class", "few-images", "16-mixed", "gpu"],
)
def test_a_mistake_is_one_line_and_leaves_no_run_folder(
    tmp_path, photos, monkeypatch, capfd, words, said
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = tmp_path / "run"
    code, _, err = in_this_process(
        monkeypatch, capfd, *OVERRIDES, *words(photos, tmp_path), f"hydra.run.dir={run}"
    )
    assert code == 1
    assert err.startswith("gatl: ")
    assert said in err
    assert err.count("\n") == 1
    assert not run.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resume=nowhere"], "nowhere is no run folder"),
        (["resume=a", "resume=b"], "resume= goes on with one run"),
        (["-m", "resume=a", "seed=1,2"], "resume= goes on with one run"),
        (["ga.pop=1"], "ga.pop must be"),
    ],
)
def test_a_typing_error_is_one_line(tmp_path, monkeypatch, capfd, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = in_this_process(monkeypatch, capfd, *words)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_begin_is_one_line_and_leaves_no_folder(
    tmp_path, photos, monkeypatch, capfd
):
    """Where the folder is Hydra's to name."""
    monkeypatch.chdir(tmp_path)
    words = (*OVERRIDES, f'data.root="{photos}"', "model.weights=nowhere.pt")
    code, out, err = in_this_process(monkeypatch, capfd, *words)
    assert (code, out) == (1, "")
    assert "nowhere.pt" in err
    assert err.count("\n") == 1
    assert list(tmp_path.glob("outputs/*/*")) == []


def test_a_resumed_run_cannot_change_its_seed(once, monkeypatch, capfd):
    code, out, err = in_this_process(monkeypatch, capfd, f"resume={once}", "seed=3")
    assert (code, out) == (1, "")
    assert "seed=3 cannot change on resume" in err


@pytest.mark.slow
def test_output_into_a_pipe_that_closes_is_no_traceback(tmp_path, photos):
    with start(
        *OVERRIDES,
        f'data.root="{photos}"',
        "evaluator.workers=1",
        f"hydra.run.dir={tmp_path}/run",
        cwd=tmp_path,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert not (tmp_path / "run" / ".images").exists()


@pytest.mark.parametrize(
    ("overrides", "large"),
    [(["data.image_size=128"], True), (["data.image_size=64"], False), ([], True)],
)
@pytest.mark.parametrize("gpu", [True, False])
def test_large_images_without_a_gpu_are_advised_against(monkeypatch, overrides, large, gpu):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    for accelerator in ("auto", "cpu"):
        words = ["trainer.max_epochs=1", f"trainer.accelerator={accelerator}", *overrides]
        config = configured(*words)
        lines = __main__._ahead(config, 3019, 2, build_strategy(config))
        advised = large and not (gpu and accelerator == "auto")
        assert max(map(len, lines)) <= 80
        assert ("model=se_densenet121_k12" in " ".join(lines[2:])) == advised
        assert ("experiment=quickstart" in " ".join(lines[2:])) == advised
        assert lines[:2] == [
            "Ahead: 60 trials of 1 epoch over 3019 images, 2 at once;",
            "then 9 re-evaluations and a final training of up to 30 epochs.",
        ]


@pytest.mark.parametrize(
    ("search", "first"), [("genetic", 12), ("annealing", 12), ("regularized_evolution", 12)]
)
def test_a_budget_that_ends_before_a_search_has_begun_is_named(search, first):
    for n_trials, named in ((first, True), (first + 5, False)):
        words = [f"search={search}", f"budget.trials={n_trials}", "data.image_size=32"]
        config = configured(*words)
        lines = __main__._ahead(config, 3019, 2, build_strategy(config))
        assert max(map(len, lines)) <= 80
        assert ("raise budget.trials" in " ".join(lines)) == named


@pytest.mark.parametrize(
    ("search", "at_once"),
    [("search=annealing", 4), ("search=tpe", 5), ("search=random", 16), ("search=genetic", None)],
)
def test_more_workers_than_a_search_can_use_are_named(search, at_once):
    config = configured(search, "data.image_size=32")
    for n_workers in (2, 20):
        lines = __main__._ahead(config, 3019, n_workers, build_strategy(config))
        assert max(map(len, lines)) <= 80
        found = [line for line in lines if "will be busy" in line]
        few = at_once is not None and n_workers > at_once
        assert [line.split()[:5] for line in found] == (
            [["Of", str(n_workers), "workers", str(at_once), "will"]] if few else []
        )
