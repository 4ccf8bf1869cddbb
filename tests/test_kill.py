"""Killed at any moment, or without room on the disk, it is the same search: real processes."""

import collections
import contextlib
import csv
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow

COMMON = (
    "data=folder",
    "data.batch_size=8",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=4",
    "final.max_epochs=5",
    "final.seeds=2",
    "final.top_k=2",
)
LENET = ("model=lenet5", "budget.trials=10")
SEARCHES = {
    # Frozen layers and pretrained weights for the feature cache, generations for halving.
    "genetic": (
        "model=se_densenet121_k12",
        "data.image_size=32",
        "space.included_layers.high=3",
        "space.frozen_layers.high=2",
        "ga.pop=5",
        "ga.generations=3",
        "ga.n_elites=1",
    ),
    "steady_state": ("ga.mode=steady_state", "ga.pop=4", *LENET),
    "annealing": ("search=annealing", "search.chains=3", *LENET),
    "regularized_evolution": ("search=regularized_evolution", "search.population_size=4", *LENET),
}
# What is seen to happen in the run folder, in the order of a run, and up to how often.
MOMENTS = (
    (".hydra/config.yaml", 1),
    (".images", 1),
    (".images/*.npy", 3),
    ("study.journal", 1),
    ("study.journal", 12),
    ("trials/*", 5),
    ("trials/*/metrics.csv", 5),
    ("history.csv", 5),
    ("study.journal", 15),
    ("final/reevaluation.json", 3),
    ("final/fit/*/training.json", 1),
    ("final/fit/*/.last.ckpt.part", 3),
    ("final/fit/*/best.ckpt", 2),
    ("final/fit/*/last.ckpt", 4),
    ("final/predictions.csv", 1),
    (".best.ckpt.part", 1),
    ("best.ckpt", 1),
    (".result.json.part", 1),
    ("result.json", 1),
)
WITH_RUNGS_AND_CACHE = (
    *MOMENTS[:8],
    (".features/*.part", 2),
    (".features/*.npy", 2),
    ("trials/*/.rung.ckpt.part", 3),
    ("trials/*/rung.ckpt", 4),
    *MOMENTS[8:],
)
VICTIMS = ("driver", "worker", "both", "group")
KILLS = 5
"""Planned for each search; a moment in which no victim is there kills nobody."""


@dataclass
class Run:
    """A search in a folder of its own, in processes of its own."""

    folder: Path
    words: tuple[str, ...]
    temporary: Path  # where its processes put temporary files
    kills: list[tuple[str, str]] = field(default_factory=list)  # phase and victim

    def __post_init__(self) -> None:
        self.log_path = self.folder.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes]:
        begun = (self.folder / "study.journal").exists()
        words = [f"resume={self.folder}"] if begun else [*self.words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gatl", *words],
                cwd=self.folder.parent,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def phase(self) -> str:
        if not (self.folder / "study.journal").exists():
            return "start"
        if not (self.folder / "final" / "reevaluation").exists():
            return "search"
        return "final training" if (self.folder / "final" / "fit").exists() else "re-evaluation"

    def changes(self, pattern: str) -> set[tuple[str, int]]:
        found = set()
        for path in self.folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found.add((str(path), path.stat().st_mtime_ns))
        return found

    def reaches(self, process, pattern: str, times: int) -> bool:
        """Wait until files have changed so often; False if the run ends before."""
        seen = self.changes(pattern)
        while process.poll() is None:
            time.sleep(0.002)
            new = self.changes(pattern) - seen
            times -= len(new)
            if times <= 0:
                return True
            seen |= new
        return False

    def kill(self, process, victim: str) -> bool:
        """Kill, and see that nothing goes on when the driver is dead; False if nobody was there."""
        try:
            driver = psutil.Process(process.pid)
            workers = [worker for server in driver.children() for worker in server.children()]
            shared = [m.path for m in driver.memory_maps() if m.path.startswith("/dev/shm/")]
            phase = self.phase
            if victim == "group":
                os.killpg(process.pid, signal.SIGKILL)
            if victim in ("worker", "both"):
                workers[0].kill()
            if victim in ("driver", "both"):
                driver.kill()
        except (psutil.NoSuchProcess, IndexError):
            return False
        self.kills.append((phase, victim))
        if victim == "worker":
            return True
        process.wait()
        if victim == "group":  # nobody is left to remove semaphores, of 32 bytes each
            shared = []
        deadline = time.monotonic() + 60
        while group_lives(process.pid) or any(map(os.path.exists, shared)):
            assert time.monotonic() < deadline, "something outlives the driver"
            time.sleep(0.01)
        return True

    def finish(self) -> None:
        process = self.start()
        assert process.wait(timeout=300) == 0, self.log[-3000:]


def group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def killed_again_and_again(run: Run, seed: str) -> None:
    """Let a search begin and go on, and kill it each time at another moment, to its end."""
    rng = random.Random(seed)
    moments = WITH_RUNGS_AND_CACHE if seed.startswith("genetic") else MOMENTS
    process, victim = run.start(), ""
    for pattern, times in sorted(rng.sample(moments, KILLS), key=moments.index):
        if not run.reaches(process, pattern, rng.randint(1, times)):
            break  # it has come to its end
        time.sleep(rng.choice((0, 0, rng.uniform(0, 0.5))))
        # A fit that loses its worker twice fails, as it should: one a session.
        victim = rng.choice([v for v in VICTIMS if (victim, v) != ("worker", "worker")])
        if run.kill(process, victim) and victim != "worker":
            process = run.start()
    assert process.wait(timeout=300) == 0, run.log[-3000:]
    run.finish()  # nothing is left to do


def result(folder: Path) -> dict[str, object]:
    """Return all that a search found, but for what it took."""
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("duration_s", "started_s", "fits"):
            del row[name]
    found = json.loads((folder / "result.json").read_text())
    del found["final"]["seconds"]
    logs = {path.parent.name: path.read_text() for path in folder.glob("trials/*/metrics.csv")}
    weights = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # Killed after the result, it leaves what it would have tidied up.
    files = {name for name in files if not name.startswith("final/fit/")}
    return {
        "history": rows,
        **{key: found[key] for key in ("best", "test", "final", "reevaluation", "trials")},
        "predictions": (folder / "final" / "predictions.csv").read_text(),
        "curve": (folder / "final" / "learning_curve.csv").read_text(),
        "logs": logs,
        "files": files,
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three classes of 24 images."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate("abc"):
        (root / name).mkdir()
        for i in range(24):
            pixels = rng.integers(0, 200, (32, 32, 3), np.uint8)
            pixels[:, :, label] += 40
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def runs(tmp_path, photos):
    """From the name of a search, workers and a word to a run of it."""
    with contextlib.ExitStack() as stack:

        def make(name: str, workers: int, word: str) -> Run:
            # A short path: the fork server's socket lies there.
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="gatl-"))
            folder = tmp_path / f"{name}-{word}-{workers}"
            words = (*COMMON, *SEARCHES[name], f"data.root={photos}")
            words = (*words, f"evaluator.workers={workers}", f"hydra.run.dir={folder}")
            return Run(folder, words, Path(temporary))

        yield make


def test_killed_at_any_moment_it_is_the_same_search(runs, capsys):
    started = time.monotonic()
    cases = list(itertools.product(SEARCHES, (1, 2)))
    killed = [runs(name, workers, "killed") for name, workers in cases]
    whole = {name: runs(name, 1, "whole") for name in SEARCHES}
    with ThreadPoolExecutor(2) as pool:  # two at a time, for two cores
        ends = [pool.submit(run.finish) for run in whole.values()]
        ends += [pool.submit(killed_again_and_again, run, run.folder.name) for run in killed]
        for end in ends:
            end.result()
    for (name, _), run in zip(cases, killed, strict=True):
        expected, found = result(whole[name].folder), result(run.folder)
        for key in expected:
            assert found[key] == expected[key], (run.folder, key)
    kills = [kill for run in killed for kill in run.kills]
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\n{len(kills)} kills in {seconds:.0f} s; {len(killed)} searches, each the same as")
        print(f"one of {len(whole)} that were never killed. {count(kills, 0)}; {count(kills, 1)}.")
    assert len(kills) >= 20
    assert {victim for _, victim in kills} == set(VICTIMS)
    assert {phase for phase, _ in kills} >= {"search", "final training"}


def count(kills: list[tuple[str, str]], part: int) -> str:
    counted = collections.Counter(kill[part] for kill in kills)
    return ", ".join(f"{name} {n}" for name, n in counted.most_common())


FULL_AT = (
    (".images/*.npy", 1),
    ("study.journal", 1),
    ("study.journal", 4),
    ("history.csv", 3),
    ("trials/*/rung.ckpt", 2),
    ("final/reevaluation.json", 1),
    ("final/fit/*/last.ckpt", 2),
    ("final/predictions.csv", 1),
)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 32 MB."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a worker's end may take a moment


def fill(disk: Path) -> Path:
    """Take all room of a disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.fixture(scope="module")
def unhindered(tmp_path_factory, photos):
    """What a search finds that always has room."""
    run = on_disk(tmp_path_factory.mktemp("roomy"), photos)
    run.finish()
    return result(run.folder)


def on_disk(disk: Path, photos: Path) -> Run:
    """Return a run whose folder is on a disk; without a cache, which a fit does without."""
    folder = disk / "run"
    words = ("ga.pop=5", "ga.generations=2", "ga.n_elites=1", "model=lenet5")
    words = (*COMMON, *words, f"data.root={photos}", "evaluator.workers=2")
    return Run(folder, (*words, f"hydra.run.dir={folder}"), Path(tempfile.gettempdir()))


@pytest.mark.parametrize(("pattern", "times"), FULL_AT)
def test_a_full_disk_is_one_line_and_the_search_goes_on_when_there_is_room(
    tmp_path, photos, small_disk, unhindered, pattern, times
):
    run = on_disk(small_disk, photos)
    run.log_path = tmp_path / "log"
    process = run.start()
    assert run.reaches(process, pattern, times), run.log
    ballast = fill(small_disk)
    assert process.wait(timeout=300) == 1, run.log
    way_on = f"go on with python -m gatl resume={run.folder}"
    if not (run.folder / "study.journal").exists():
        way_on = r"start the run again\."
    *_, last = run.log.splitlines()
    full = r"cannot be written \(No space left on device\): make room, then"
    assert re.fullmatch(rf"gatl: {run.folder}\S* {full} {way_on}", last), run.log
    assert "Traceback" not in run.log
    for line in lines(run.folder / "study.journal"):
        json.loads(line)
    ballast.unlink()
    run.finish()
    assert result(run.folder) == unhindered
    shutil.rmtree(run.folder)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_on_a_disk_without_any_room_no_run_begins(tmp_path, photos, small_disk):
    ballast = fill(small_disk)
    run = on_disk(small_disk, photos)
    run.log_path = tmp_path / "log"
    assert run.start().wait(timeout=300) == 1
    assert re.fullmatch(r"gatl: \S*run cannot be \S+ \(?No space left on device.*\n", run.log)
    assert not run.folder.exists()
    ballast.unlink()
