"""Whether a long search stays as it begins: a thousand real fits in one run.

    python benchmarks/long.py

`python -m gatl` searches at random with LeNet-5 on scikit-learn's digits, one epoch a fit, two
workers, to its end. Whenever another tenth of the trials has ended, its processes are looked at
from outside: memory, open files, threads, and what the driver has computed; and its folder:
bytes, and those of the journal.

Prints a table, a row for each tenth; writes it to ``results=FILE``, by default
``benchmarks/results/long.json``.

Options and their defaults: ``trials=1000 output=outputs/long``. Every other word is a Hydra
override.
"""

import contextlib
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from common import RESULTS, options, origin, table, whole

from gatl.cli import one_line_errors
from gatl.errors import UserError
from gatl.files import write_json
from gatl.record import HISTORY, JOURNAL

DEFAULTS = {"trials": "1000", "output": "outputs/long", "results": str(RESULTS / "long.json")}
WORDS = (
    *("experiment=quickstart", "model=lenet5", "search=random", "search.initial=[]"),
    *("trainer.max_epochs=1", "pruner=none", "evaluator.workers=2"),
    *("final.top_k=1", "final.seeds=1", "final.max_epochs=1"),
)
COLUMNS = {
    "trials": "trials",
    "driver_mib": "driver, MiB",
    "workers_mib": "workers, MiB",
    "files": "open files",
    "threads": "threads",
    "processes": "processes",
    "folder_bytes_per_trial": "folder, bytes a trial",
    "journal_bytes_per_trial": "journal, bytes a trial",
    "driver_ms_per_trial": "driver, ms of a core a trial",
}


def main() -> None:
    """Search; print and save what was seen."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    n, folder = whole("trials", given["trials"]), Path(given["output"]).absolute()
    if n < 20:
        raise UserError(f"trials must be at least 20, but got {n}.")
    shutil.rmtree(folder, ignore_errors=True)
    words = [*WORDS, f"budget.trials={n}", f"hydra.run.dir='{folder}'", *extra]
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "gatl", *words], stdout=subprocess.DEVNULL
    ) as process:
        seen = watch(psutil.Process(process.pid), folder, [n * (i + 1) // 10 for i in range(9)])
    if process.returncode:
        raise UserError(f"The search has failed, see above: {' '.join(words)}")
    rows = differences(seen)
    about = {"trials": n, "seconds": round(time.monotonic() - started, 1), "rows": rows}
    write_json(Path(given["results"]), {**origin(), **about})
    print(markdown(rows))


def watch(driver: psutil.Process, folder: Path, numbers: Sequence[int]) -> list[dict[str, float]]:
    """Look at a search whenever so many trials have ended; whatever is missed is left out."""
    seen = []
    for number in numbers:
        while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
            if (n := n_rows(folder / HISTORY)) >= number:
                seen.append({"trials": n, **look(driver), **sizes(folder)})
                break
            time.sleep(0.02)
    return seen


def n_rows(history: Path) -> int:
    """Return how many trials have their rows."""
    return history.read_bytes().count(b"\n") - 1 if history.is_file() else 0


def look(driver: psutil.Process) -> dict[str, float]:
    """Return what a driver and its workers hold, and the CPU seconds of the driver."""
    others = driver.children(recursive=True)
    return {
        "driver_mib": driver.memory_info().rss / 2**20,
        "workers_mib": sum(process.memory_full_info().uss for process in others) / 2**20,
        "files": sum(process.num_fds() for process in (driver, *others)),
        "threads": sum(process.num_threads() for process in (driver, *others)),
        "processes": 1 + len(others),
        "driver_s": sum(driver.cpu_times()[:2]),
    }


def sizes(folder: Path) -> dict[str, float]:
    """Return the bytes of a run folder, and of its journal."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # what is written whole has another name first
            total += path.stat().st_size
    return {"folder_bytes": total, "journal_bytes": (folder / JOURNAL).stat().st_size}


def differences(seen: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return a row for each look but the first: what grows, in proportion to the trials since."""
    rows = []
    for before, now in itertools.pairwise(seen):
        n = now["trials"] - before["trials"]
        each = {
            "folder_bytes_per_trial": (now["folder_bytes"] - before["folder_bytes"]) / n,
            "journal_bytes_per_trial": (now["journal_bytes"] - before["journal_bytes"]) / n,
            "driver_ms_per_trial": 1000 * (now["driver_s"] - before["driver_s"]) / n,
        }
        rows.append({name: round((now | each)[name], 1) for name in COLUMNS})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table."""
    return table(
        tuple(COLUMNS.values()), *(tuple(f"{row[name]:.0f}" for name in COLUMNS) for row in rows)
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
