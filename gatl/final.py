"""The final model: re-evaluate the best, retrain the winner, test it once, save it.

``python -m gatl.final run=FOLDER`` does this for a search that was interrupted.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from gatl.chromosome import Value
from gatl.cli import (
    folder_named,
    help_requested,
    one_line_errors,
    remember,
    resumed,
)
from gatl.config import Config
from gatl.data.images import PreparedData
from gatl.errors import UserError, printable
from gatl.files import is_unwritable, unwritable, write_json, write_whole, writing
from gatl.model_card import MODEL_CARD, describe
from gatl.progress import describe_genes, new_console
from gatl.ranking import incumbent
from gatl.record import (
    JOURNAL,
    PLACE,
    RESULT,
    History,
    final_command,
    held,
    located,
    outcome_of,
    record_in,
    remove_scratch,
    resume_command,
    return_to_start,
    seconds_of,
)
from gatl.report import REPORT, kept_fresh, make
from gatl.storage import StorageError
from gatl.trust import word_for, words_of

if TYPE_CHECKING:  # torch takes seconds, which a typing error need not wait for
    from gatl.session import Session

PRINTED_CLASSES = 12
"""Classes up to which the confusion matrix is printed; it is always saved."""

HELP = """\
gatl.final makes the final model of a search that was interrupted: it evaluates
the best chromosomes again, retrains the winner and tests it.

  python -m gatl.final run=outputs/DATE/TIME [trust=NAME,NAME] [KEY=VALUE ...]

The overrides may change budget, evaluator, logger, final and cache, for example
final.top_k, final.seeds, final.max_epochs, final.patience, evaluator.workers.
A folder of somebody else's may run no code but gatl's and what trust= names, and
connect to no database but one that trust= names."""


def finish(session: "Session") -> float:
    """Make, test and save the final model; returns the search's best val_loss.

    Nothing is done again that has been done: the test split is for one model.

    Raises:
        UserError: If no trial is COMPLETE, or the final training fails.
        OSError: If the disk is full.
        KeyboardInterrupt: If the user stopped it.
    """
    from gatl.environment import hardware, versions
    from gatl.evaluation import FitStopped, reason, resolve_precision, write_trace
    from gatl.retraining import fit_folder, reevaluate, retrain_best
    from gatl.testing import test

    started = time.monotonic()
    folder, console = session.folder, session.console
    trust = word_for(session.config)
    before = _result(folder).get("tests")
    n_tests = (before if isinstance(before, int) else 0) + 1  # of this run, this one included
    record = session.study.get_trials(deepcopy=False)
    searched = seconds_of(session.study)
    best = incumbent(record)
    ended = [trial for trial in record if trial.state.is_finished()]
    if not ended:
        raise UserError(f"No trial of {folder} has ended yet: {resume_command(folder, *trust)}")
    if best is None or best.value is None:
        raise UserError(
            f"No trial of {folder} completed, so there is no best one: go on with "
            f"{resume_command(folder, *trust)}, or see the column error of history.csv."
        )
    if (made := made_before(folder, session.config, len(ended))) is not None:
        _report(folder, console)
        _remove_checkpoints(folder)
        console.print(made, soft_wrap=True)
        return best.value
    try:
        with writing(folder / "final"):
            candidates = reevaluate(session, record)
            session.evaluator.close()
            winner, classifier, training = retrain_best(session, candidates)
            figures, matrix = test(session, classifier)
    except (FitStopped, SystemExit):  # Lightning makes a SystemExit of a KeyboardInterrupt
        raise KeyboardInterrupt from None
    except UserError:
        raise
    except Exception as error:
        if is_unwritable(error):
            raise
        write_trace(folder / "final")
        raise UserError(
            f"The final training failed: {reason(error)} (see {folder / 'final' / 'error.txt'}). "
            f"When that is mended, go on with: {final_command(folder, *trust)}"
        ) from error
    seconds = searched + time.monotonic() - started
    result = {
        "best": {
            "genes": winner.genes,
            "val_loss": winner.trial.value,
            "trial": winner.trial.number,
        },
        "test": figures,
        "tests": n_tests,
        "final": training,
        "reevaluation": [
            {
                "trial": c.trial.number,
                "genes": c.genes,
                "val_losses": [loss if loss < math.inf else None for loss in c.val_losses],
                "mean": c.mean if c.mean < math.inf else None,
            }
            for c in candidates
        ],
        "trials": len(ended),
        "evaluations": sum(outcome_of(trial).reused_from is None for trial in ended),
        "seconds": round(seconds, 1),
        "seed": session.config.seed,
        "classes": list(session.data.classes),
        "images": _counts(session.data),
        "weights": {
            "from": session.config.model.weights,
            **training.pop("weights"),
        },
        "precision": resolve_precision(session.config.trainer),
        "versions": versions(),
        "hardware": hardware(),
        "settings": asdict(session.config.final),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # Copied, not moved: whoever is killed before all is written finds what the training left.
    write_whole(folder / "best.ckpt", (fit_folder(session, winner) / "best.ckpt").read_bytes())
    write_whole(folder / MODEL_CARD, describe(result, session.config).encode())
    write_json(folder / RESULT, result)  # with it the model is made
    _report(folder, console)
    _remove_checkpoints(folder)
    _show(session, winner.genes, figures, matrix, n_tests)
    return best.value


def made_before(folder: Path, config: Config, n_ended: int) -> str | None:
    """Say where the final model is, if it has been made of so many trials with these settings."""
    result = _result(folder)
    try:
        if result["trials"] < n_ended or result["settings"] != asdict(config.final):
            return None
        accuracy = result["test"]["accuracy"]
        if type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
            return None
        return (
            f"Nothing is left to do: the model of these {result['trials']:d} trials is made and "
            f"tested (accuracy {accuracy:.1%}).\n{_whereabouts(folder, config)}"
        )
    except (KeyError, TypeError, ValueError):  # damaged
        return None


def nothing_left(folder: Path, config: Config, overrides: Sequence[str], console: Console) -> bool:
    """Say where the final model is, if it is made; whoever calls holds the folder.

    A run that was killed behind its result has left its scratch files, and the page of a run in
    progress.

    Args:
        folder: The run folder.
        config: Its configuration, the overrides applied.
        overrides: With which the run was to go on; they are remembered.
        console: Where the user reads.

    Returns:
        Whether it is made, and so nothing is left to do.
    """
    if made_before(folder, config, config.n_trials) is None:
        return False
    remember(folder, overrides)
    remove_scratch(folder)
    _remove_checkpoints(folder)
    page = folder / REPORT
    if not page.is_file() or page.stat().st_mtime_ns < (folder / RESULT).stat().st_mtime_ns:
        _report(folder, console)
    made = made_before(folder, config, config.n_trials)
    assert made is not None
    console.print(made, soft_wrap=True)
    return True


def _remove_checkpoints(folder: Path) -> None:
    """Remove what final trainings would have needed to go on; their logs stay."""
    for path in folder.glob("final/fit/*/*"):
        if path.name in ("best.ckpt", "last.ckpt", "training.json"):
            path.unlink(missing_ok=True)


def _result(folder: Path) -> dict[str, Any]:
    """Read ``result.json``; empty if no final model has been made, or it is damaged."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return result if isinstance(result, dict) else {}


def _show(
    session: "Session",
    genes: Mapping[str, Value],
    test: Mapping[str, Any],
    matrix: npt.NDArray[np.int64],
    n_tests: int,
) -> None:
    """Print what was found, in a sentence and in tables; say if others were tested before."""
    console = session.console
    table = Table("class", box=None, pad_edge=False, header_style="bold")
    for column in ("precision", "recall", "F1", "images"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in test["per_class"]:
        figures = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(printable(row["class"]), *figures, str(row["n"]))
    console.print(table, soft_wrap=False)
    if len(matrix) <= PRINTED_CLASSES:
        names = heads = tuple(map(printable, session.data.classes))
        if sum(len(name) + 2 for name in names) > console.width / 2:  # long ones stand once only
            heads = tuple(f"({number})" for number in range(1, len(names) + 1))
            names = tuple(f"{head} {name}" for head, name in zip(heads, names, strict=True))
        table = Table("is \\ taken for", box=None, pad_edge=False, header_style="bold")
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for name, counts in zip(names, matrix, strict=True):
            table.add_row(name, *map(str, counts))
        console.print(table, soft_wrap=False)
    low, high = test["accuracy_ci95"]
    console.print(
        f"Found: {describe_genes(genes, session.config.model.n_layers)}. "
        f"Of {test['n']} images that "
        + ("nothing before has seen" if n_tests == 1 else "no training has seen")
        + f", {test['accuracy']:.1%} are classified right "
        f"(95% interval {low:.1%} to {high:.1%})."
    )
    if n_tests > 1:
        console.print(
            f"This is final model {n_tests} of this run: whoever picks the best of them by these "
            "figures makes them optimistic."
        )
    console.print(_whereabouts(session.folder, session.config), soft_wrap=True)


def _report(folder: Path, console: Console) -> None:
    """Make the page. The model is made: whatever goes wrong here must not seem to cost it."""
    try:
        make(folder)
    except Exception as error:
        if is_unwritable(error):
            raise
        from gatl.evaluation import reason

        console.print(f"The report could not be made: {reason(error)}", soft_wrap=True)


def _whereabouts(folder: Path, config: Config) -> str:
    """Say where everything lies and what can be done with it, to be copied."""
    page, run, trust = folder / REPORT, f"run={folder}", word_for(config, record=False)
    read = ["webbrowser", page.absolute().as_uri()] if page.is_file() else ["gatl.report", run]
    commands = (
        read,
        ["gatl.predict", run, "images=PHOTOS", *trust],
        ["gatl.export", run, "format=onnx", *trust],
    )
    return "\n".join(
        [
            f"Report:       {page if page.is_file() else 'none yet'}",
            f"Model:        {folder / 'best.ckpt'}",
            f"All figures:  {folder / RESULT}",
            f"Every trial:  {folder / 'history.csv'}",
            "Read the report, classify images, export the model:",
            *(f"  {shlex.join(['python', '-m', *words])}" for words in commands),
        ]
    )


def _counts(data: PreparedData) -> dict[str, Any]:
    """Count the images of each class in each split, and those that are left out."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    counts = {
        name: np.bincount(split.labels, minlength=len(data.classes)).tolist()
        for name, split in splits.items()
    }
    return counts | {"left_out": len(data.skipped)}


def main() -> None:
    """Make the final model of a run folder."""
    words = sys.argv[1:]
    if help_requested(words, HELP):
        return
    trusted, words = words_of(words)
    given = [word for word in words if word.startswith("run=")]
    overrides = [word for word in words if word not in given]
    with one_line_errors():
        if len(given) != 1:
            raise UserError("Give one run folder: python -m gatl.final run=outputs/DATE/TIME")
        folder = folder_named(given[0].removeprefix("run="))
        config = resumed(folder, overrides, trusted)
        if record_in(folder) is None:
            raise UserError(f"{folder} holds no search yet: it has neither {JOURNAL} nor {PLACE}.")
        console = new_console()
        with held(folder):  # to be refused needs no torch
            if nothing_left(folder, config, overrides, console):
                return
        config = located(folder, config, trusted)
        from gatl.session import opened

        return_to_start(folder)
        try:
            with opened(config, folder, console) as session, kept_fresh(folder) as refresh:
                remember(folder, overrides)
                record = session.study.get_trials(deepcopy=False)
                History(folder, config.space.names).update(record, session.strategy.generation)
                refresh()
                finish(session)
        except KeyboardInterrupt:
            command = final_command(folder, *word_for(config))
            console.print(f"Stopped. Go on with\n  {command}", soft_wrap=True)
            raise
        except StorageError as error:
            command = final_command(folder, *overrides, *word_for(config))
            raise StorageError(error.what, f"go on with {command}") from error
        except OSError as error:
            if not is_unwritable(error):
                raise
            command = final_command(folder, *overrides, *word_for(config))
            raise unwritable(error, f"go on with {command}") from error


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
