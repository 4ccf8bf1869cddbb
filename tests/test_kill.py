"""Killed at any moment, a search is the one that was never killed: real processes, real kills."""

import collections
import contextlib
import csv
import itertools
import json
import os
import random
import signal
import subprocess
import sys
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
    (".features/*.part", 2),
    (".features/*.npy", 2),
    ("trials/*/.rung.ckpt.part", 3),
    ("trials/*/rung.ckpt", 4),
    ("study.journal", 20),
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
VICTIMS = ("driver", "worker", "both", "group")
KILLS = 8
"""Planned for each search; a moment that is over when its turn comes kills nobody."""


@dataclass
class Run:
    """A search in a folder of its own, in processes of its own."""

    folder: Path
    words: tuple[str, ...]
    kills: list[tuple[str, str]] = field(default_factory=list)  # phase and victim

    def start(self) -> subprocess.Popen[bytes]:
        resumable = (self.folder / ".hydra" / "config.yaml").exists()
        words = [f"resume={self.folder}"] if resumable else [*self.words]
        temporary = self.folder.with_suffix(".tmp")
        temporary.mkdir(exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        with self.folder.with_suffix(".log").open("ab") as log:
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
        return self.folder.with_suffix(".log").read_text()

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
            new = self.changes(pattern) - seen
            times -= len(new)
            if times <= 0:
                return True
            seen |= new
            time.sleep(0.0005)
        return False

    def kill(self, process, victim: str) -> bool:
        """Kill, and see that nothing goes on when the driver is dead; False if nobody was there."""
        driver = psutil.Process(process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = [w for server in driver.children() for w in server.children()]
            if victim == "worker" and not workers:
                return False
            shared = {m.path for m in driver.memory_maps() if m.path.startswith("/dev/shm/")}
            self.kills.append((self.phase, victim))
            if victim == "group":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                for victims, names in ((workers[:1], ("worker", "both")), ([driver], ("driver",))):
                    if victim in names:
                        for one in victims:
                            one.kill()
                if victim == "both":
                    driver.kill()
            if victim == "worker":
                return True
            process.wait()
            deadline = time.monotonic() + 60
            while group_lives(process.pid) or (
                victim != "group" and any(Path(path).exists() for path in shared)
            ):
                assert time.monotonic() < deadline, "something outlives the driver"
                time.sleep(0.01)
            return True
        return False

    def finish(self) -> None:
        process = self.start()
        assert process.wait(timeout=300) == 0, self.log[-3000:]


def group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def killed_again_and_again(run: Run, rng: random.Random) -> None:
    """Let a search begin and go on, and kill it each time at another moment, to its end."""
    process, lost_worker = run.start(), False
    for pattern, times in sorted(rng.sample(MOMENTS, KILLS), key=MOMENTS.index):
        if not run.reaches(process, pattern, rng.randint(1, times)):
            process = run.start()  # it had come to its end; what is left to do?
            continue
        time.sleep(rng.choice((0, 0, rng.uniform(0, 0.5))))
        # A fit that loses its worker twice fails, as it should: one a session.
        victim = rng.choice([v for v in VICTIMS if not (lost_worker and v == "worker")])
        if not run.kill(process, victim):
            continue
        lost_worker = victim == "worker"
        if victim != "worker":
            process = run.start()
    assert process.wait(timeout=300) == 0, run.log[-3000:]
    run.finish()


def result(folder: Path) -> dict[str, object]:
    """Return all that a search found, but for what it took."""
    with (folder / "history.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "duration_s"} for row in csv.DictReader(file)]
    found = json.loads((folder / "result.json").read_text())
    del found["final"]["seconds"]
    logs = {path.parent.name: path.read_text() for path in folder.glob("trials/*/metrics.csv")}
    weights = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    return {
        "history": rows,
        **{key: found[key] for key in ("best", "test", "final", "reevaluation", "trials")},
        "predictions": (folder / "final" / "predictions.csv").read_text(),
        "curve": (folder / "final" / "learning_curve.csv").read_text(),
        "logs": logs,
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


def test_killed_at_any_moment_it_is_the_same_search(tmp_path, photos, capsys):
    def make(name: str, workers: int) -> Run:
        folder = tmp_path / f"{name}-{workers}"
        words = (*COMMON, *SEARCHES[name], f"data.root={photos}", f"evaluator.workers={workers}")
        return Run(folder, (*words, f"hydra.run.dir={folder}"))

    def search(name: str, workers: int) -> Run:
        run = make(name, workers)
        if workers:
            killed_again_and_again(run, random.Random(f"{name} {workers}"))
        return run

    started = time.monotonic()
    whole = {name: make(f"{name}", 1) for name in SEARCHES}
    for name, run in whole.items():
        run.folder = tmp_path / f"{name}-whole"
        run.words = (*run.words[:-1], f"hydra.run.dir={run.folder}")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Run.finish, whole.values()))
        runs = list(pool.map(lambda case: search(*case), itertools.product(SEARCHES, (1, 2))))
    expected = {name: result(run.folder) for name, run in whole.items()}
    kills = [kill for run in runs for kill in run.kills]
    for run, (name, _) in zip(runs, itertools.product(SEARCHES, (1, 2)), strict=True):
        found = result(run.folder)
        for key in found:
            assert found[key] == expected[name][key], (run.folder.name, key)
    with capsys.disabled():
        phases = collections.Counter(phase for phase, _ in kills)
        victims = collections.Counter(victim for _, victim in kills)
        print(f"\n{len(kills)} kills in {time.monotonic() - started:.0f} s: {phases} {victims}")
    assert len(kills) >= 20
