"""Whether memory stays flat over many fits, and what they leave behind on the disk.

    python benchmarks/memory.py

Chromosomes spread over the space are fitted for an epoch each by `gatl`'s own workers, with the
feature cache: once by one worker, and once by two. After
some of the fits, while none runs, the memory of the processes that fit is added up: what is
resident (RSS: pages of mapped files too) and what is theirs alone (USS: what a leak would grow).
Afterwards whatever is new in the folder for temporary files, which is the run's own, in
``/dev/shm``, and beside the fits' logs in the run folder is counted.

The images are scikit-learn's digits, or those of ``root=PHOTOS``, which holds a folder for each
class. Prints tables; writes them to ``results=FILE``, by default
``benchmarks/results/memory.json``.

Options and their defaults: ``fits=200 images=160 val=40 size=32``, ``output=outputs/memory``.
Every other word is a Hydra override.
"""

import io
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peer
import psutil
from common import RESULTS, evaluated, options, origin, table, whole
from evaluation import spread
from PIL import Image
from rich.console import Console

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.data.digits import load
from gatl.data.manifest import MANIFEST
from gatl.evaluation import Fit, fit_seed
from gatl.files import write_json
from gatl.record import JOURNAL
from gatl.session import opened
from gatl.streams import Purpose

DEFAULTS = {
    **{"root": "", "fits": "200", "images": "160", "val": "40", "size": "32"},
    **{"output": "outputs/memory", "results": str(RESULTS / "memory.json")},
}
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Of the fits, after which memory is measured."""
KEPT = {JOURNAL, MANIFEST, "metrics.csv", "hparams.yaml"}
SHARED_MEMORY = Path("/dev/shm")


def main() -> None:
    """Fit with one worker and with two; print and save."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    fits, n_train, n_val, size = (
        whole(name, given[name]) for name in ("fits", "images", "val", "size")
    )
    output = Path(given["output"]).absolute()
    root = given["root"] or str(save_digits(output / "digits"))
    peer.subset(root, output / "photos", n_train, n_val)
    config = checked(
        compose(
            [
                *("data=folder", f"data.root='{output / 'photos'}'", f"data.image_size={size}"),
                *("model=se_densenet121_k12", "model.weights=bundled", "pruner=none"),
                *("data.batch_size=16", "trainer.max_epochs=1", *extra),
            ]
        )
    )
    runs = []
    for workers in (1, 2):
        there = replace(config, evaluator=replace(config.evaluator, workers=str(workers)))
        before = entries(SHARED_MEMORY)  # of other programs
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            run = pool.submit(measure, there, fits, output / "run").result()
        # By now that process has ended, and the fork server's socket should be gone with it.
        run["left_behind"]["temporary files"] = sorted(entries(output / "temporary"))
        run["left_behind"]["shared memory"] = sorted(orphans(entries(SHARED_MEMORY) - before))
        runs.append({"workers": workers, **run})
    result = {"fits": fits, "images": n_train, "val": n_val, "image_size": size, "runs": runs}
    write_json(Path(given["results"]), {**origin(), **result})
    print(markdown(runs))


def save_digits(folder: Path) -> Path:
    """Save scikit-learn's digits as a folder of images for each class."""
    shutil.rmtree(folder, ignore_errors=True)
    source = load()
    for i, label in enumerate(source.train.labels):
        (folder / source.classes[label]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.asarray(source.train.images[i]))
        image.save(folder / source.classes[label] / f"{i}.png")
    return folder


def entries(folder: Path) -> set[str]:
    """Return what lies below a folder, which need not exist."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def orphans(names: Iterable[str]) -> list[str]:
    """Return the names in shared memory that do not name a process that is alive."""
    owners = ((name, re.search(r"[-_](\d+)[-_]", name)) for name in names)
    return [name for name, owner in owners if not (owner and psutil.pid_exists(int(owner[1])))]


def remains(folder: Path) -> list[str]:
    """Return what lies in a run folder and is neither the record nor a fit's log."""
    return sorted(name for name in entries(folder) if Path(name).name not in KEPT)


def measure(config: Config, n: int, folder: Path) -> dict[str, Any]:
    """Do the fits in this process; return its memory with that of its workers, and the remains."""
    temporary = folder.with_name("temporary")
    for path in (folder, temporary):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None  # of the workers, and here
    # As many as make a balanced design, of which the first are spread over the space too.
    chromosomes = spread(config, len(config.initial) + 2 ** math.ceil(math.log2(n)))[:n]
    fits = [
        Fit(genes, 1, fit_seed(config.seed, Purpose.FIT, genes), folder / "trials" / str(i))
        for i, genes in enumerate(chromosomes)
    ]
    memory, done, errors = [], 0, 0
    started = time.monotonic()
    with opened(config, folder, Console(file=io.StringIO())) as session:
        for share in SHARES:
            end = max(1, round(share * n))
            for _, outcome in evaluated(session.evaluator, fits[done:end]):
                errors += outcome.error is not None and not outcome.diverged
            done = end
            memory.append({"fits": done, **memory_now()})
        cached = sum(path.stat().st_size for path in (folder / ".features").rglob("*"))
    first, last = memory[0], memory[-1]
    return {
        "seconds": round(time.monotonic() - started, 1),
        "failed": errors,
        "feature_cache_mib": round(cached / 2**20, 1),
        "memory": memory,
        "rss_last_to_first": last["rss_mib"] / first["rss_mib"],
        "uss_last_to_first": last["uss_mib"] / first["uss_mib"],
        "left_behind": {
            "run folder": remains(folder),
        },
    }


def memory_now() -> dict[str, float]:
    """Return the MiB of the processes that fit."""
    infos = [process.memory_full_info() for process in psutil.Process().children(recursive=True)]
    return {
        "rss_mib": round(sum(info.rss for info in infos) / 2**20, 1),
        "uss_mib": round(sum(info.uss for info in infos) / 2**20, 1),
    }


def markdown(runs: list[Mapping[str, Any]]) -> str:
    """Return the tables."""
    first = table(
        ("workers", "memory", *(f"after {m['fits']}" for m in runs[0]["memory"]), "last to first"),
        *(
            (
                str(run["workers"]),
                f"{kind.upper()}, MiB",
                *(f"{measured[f'{kind}_mib']:.0f}" for measured in run["memory"]),
                f"{run[f'{kind}_last_to_first']:.3f}",
            )
            for run in runs
            for kind in ("rss", "uss")
        ),
    )
    second = table(
        ("workers", "seconds", "failed fits", *(f"left: {w}" for w in runs[0]["left_behind"])),
        *(
            (
                *(str(run["workers"]), f"{run['seconds']:.0f}", str(run["failed"])),
                *(str(len(names)) for names in run["left_behind"].values()),
            )
            for run in runs
        ),
    )
    return f"{first}\n\n{second}"


if __name__ == "__main__":
    with one_line_errors():
        main()
