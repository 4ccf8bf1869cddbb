"""The final model: re-evaluate the best, retrain the winner, test it once, save it.

``python -m gatl.final run=FOLDER`` does this for a search that was interrupted.
"""

import contextlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from optuna.trial import FrozenTrial, TrialState
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from sklearn.metrics import (
    confusion_matrix,
    precision_recall_fscore_support,
)
from torchvision.transforms.v2.functional import normalize, to_dtype

from gatl.chromosome import Value
from gatl.classifier import Classifier, Diverged
from gatl.cli import (
    folder_named,
    help_requested,
    one_line_errors,
    remember,
    resumed,
)
from gatl.config import Config
from gatl.data.images import PreparedData, PreparedSplit
from gatl.errors import UserError, printable
from gatl.evaluation import (
    PARTS,
    Fit,
    FitStopped,
    SeededEpochs,
    StopOnRequest,
    Watched,
    build_cache,
    build_classifier,
    build_data,
    build_trainer,
    can_be_parted,
    fit_seed,
    free_memory,
    is_out_of_memory,
    micro_batch,
    read_checkpoint,
    reason,
    resolve_precision,
    write_trace,
)
from gatl.files import csv_of, is_unwritable, unwritable, write_whole, writing
from gatl.model_card import MODEL_CARD, describe
from gatl.outcome import Outcome
from gatl.progress import (
    advancing,
    describe_genes,
    format_count,
    format_genes,
    format_loss,
    format_micro_batch,
    new_console,
)
from gatl.ranking import best_distinct, incumbent
from gatl.record import (
    JOURNAL,
    History,
    outcome_of,
    resume_command,
    return_to_start,
    seconds_of,
)
from gatl.report import EXAMPLES, REPORT, SAMPLE_IMAGES, kept_fresh, make
from gatl.session import Session, opened
from gatl.streams import Purpose
from gatl.trust import texts, whole, word_for, words_of

PRINTED_CLASSES = 12
"""Classes up to which the confusion matrix is printed; it is always saved."""

WRONG, RIGHT, SAMPLES, SIDE = 12, 4, 12, 96
"""Mistakes, right answers and classes with images that are kept for the report, and their side."""

THREADS = torch.get_num_threads()
"""Threads of the final training: what torch chose for this machine, before any fit set its own."""

HELP = """\
gatl.final makes the final model of a search that was interrupted: it evaluates
the best chromosomes again, retrains the winner and tests it.

  python -m gatl.final run=outputs/DATE/TIME [trust=NAME,NAME] [KEY=VALUE ...]

The overrides may change budget, evaluator, logger, final and cache, for example
final.top_k, final.seeds, final.max_epochs, final.patience, evaluator.workers.
A folder of somebody else's may run no code but gatl's and what trust= names."""

_PACKAGES = ("gatl", "torch", "torchvision", "lightning", "optuna", "hydra-core", "numpy")


@dataclass(frozen=True)
class Candidate:
    """One of the best chromosomes, evaluated again.

    Attributes:
        trial: Its best trial.
        genes: The chromosome by name.
        val_losses: One for each fresh seed; infinite where the fit failed.
    """

    trial: FrozenTrial
    genes: dict[str, Value]
    val_losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the losses, by which the winner is chosen."""
        return statistics.fmean(self.val_losses)


class Epochs(Callback):
    """Prints a line for each epoch of the final training."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's losses."""
        assert isinstance(pl_module, Classifier)
        epoch = pl_module.epochs[-1]
        self._console.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} · train_loss "
            f"{epoch['train_loss']:.4f} · val_loss {epoch['val_loss']:.4f} · accuracy "
            f"{epoch['val_accuracy']:.1%}"
        )


def finish(session: Session) -> float:
    """Make, test and save the final model; returns the search's best val_loss.

    Nothing is done again that has been done: the test split is for one model.

    Raises:
        UserError: If no trial is COMPLETE, or the final training fails.
        OSError: If the disk is full.
        KeyboardInterrupt: If the user stopped it.
    """
    started = time.monotonic()
    folder, console = session.folder, session.console
    trust = word_for(session.config)
    before = _result(folder).get("tests")
    n_tests = (before if isinstance(before, int) else 0) + 1  # of this run, this one included
    record = session.study.get_trials(deepcopy=False)
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
        _report(session)
        console.print(made, soft_wrap=True)
        return best.value
    try:
        with writing(folder / "final"):
            candidates = reevaluate(session, record)
            session.evaluator.close()
            winner, classifier, training = _retrain_best(session, candidates)
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
    seconds = seconds_of(session.study) + time.monotonic() - started
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
        "versions": _versions(),
        "hardware": _hardware(),
        "settings": asdict(session.config.final),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # Copied, not moved: whoever is killed before all is written finds what the training left.
    write_whole(folder / "best.ckpt", (_fit_folder(session, winner) / "best.ckpt").read_bytes())
    write_whole(folder / MODEL_CARD, describe(result, session.config).encode())
    _write_json(folder / "result.json", result)  # with it the model is made
    _report(session)
    for candidate in candidates:  # the logs stay
        for name in ("best.ckpt", "last.ckpt", "training.json"):
            (_fit_folder(session, candidate) / name).unlink(missing_ok=True)
    _show(session, winner, figures, matrix, n_tests)
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


def _result(folder: Path) -> dict[str, Any]:
    """Read ``result.json``; empty if no final model has been made, or it is damaged."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return result if isinstance(result, dict) else {}


def final_command(folder: Path, *words: str) -> str:
    """Return what a user types to make the final model of what a search has found."""
    return shlex.join(["python", "-m", "gatl.final", f"run={folder}", *words])


def reevaluate(session: Session, record: Iterable[FrozenTrial]) -> list[Candidate]:
    """Evaluate the best distinct chromosomes again, each with fresh seeds.

    The search's own score does not count: the best of many is the luckiest too.
    What was evaluated before an interruption is read back.
    """
    config = session.config
    complete = [trial for trial in record if trial.state is TrialState.COMPLETE]
    best = best_distinct(complete, config.space, config.final.top_k)
    fits = [
        Fit(
            genes=(genes := config.space.to_dict(chromosome)),
            epochs=config.trainer.max_epochs,
            seed=fit_seed(config.seed, Purpose.REEVALUATION, genes, index),
            folder=session.folder / "final" / "reevaluation" / f"{trial.number}_{index}",
        )
        for chromosome, trial in best.items()
        for index in range(config.final.seeds)
    ]
    session.console.print(
        f"Evaluating the best {len(best)} again, with "
        f"{format_count(config.final.seeds, 'fresh seed')} each ..."
    )
    losses = _evaluate_all(session, fits)
    k = config.final.seeds
    candidates = [
        Candidate(trial, config.space.to_dict(chromosome), tuple(losses[i * k : (i + 1) * k]))
        for i, (chromosome, trial) in enumerate(best.items())
    ]
    for c in candidates:
        sd = f" ± {statistics.stdev(c.val_losses):.4f}" if k > 1 and c.mean < math.inf else ""
        session.console.print(
            f"trial {c.trial.number} · {format_genes(c.genes)} · val_loss {format_loss(c.mean)}{sd}"
        )
    return candidates


def _evaluate_all(session: Session, fits: Sequence[Fit]) -> list[float]:
    """Return the val_loss of each fit; an interrupted run reads back what it had."""
    path = session.folder / "final" / "reevaluation.json"
    path.parent.mkdir(exist_ok=True)
    known: dict[str, Any] = {}
    if path.is_file():
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):  # damaged
            kept = json.loads(path.read_text(encoding="utf-8"))
            for outcome in kept.values():
                Outcome.from_json(outcome)
            known = kept
    waiting = [i for i, fit in enumerate(fits) if str(fit.seed) not in known]
    total = len(waiting)
    running: set[int] = set()
    with advancing(session.console, "Re-evaluations") as progress:
        while waiting or running:
            if session.stop.is_set():
                session.cut.set()
                waiting.clear()
            while waiting and session.evaluator.n_free:
                session.evaluator.submit(waiting[0], fits[waiting[0]])
                running.add(waiting.pop(0))
            for i, outcome in session.evaluator.wait(timeout=0.2) if running else []:
                running.remove(i)
                if outcome.stopped:
                    continue
                known[str(fits[i].seed)] = outcome.to_json()
                name = f"re-evaluation of {fits[i].folder.name}"
                if outcome.micro_batch is not None:
                    session.console.print(f"{name}: {format_micro_batch(outcome.micro_batch)}")
                if outcome.error is not None:
                    session.console.print(f"{name}: {outcome.error}")
                # A failure that may pass is tried again the next time.
                lasting = {k: o for k, o in known.items() if o["error"] is None or o["diverged"]}
                _write_json(path, lasting)
            parts = (session.evaluator.epochs_done(i) / fits[i].epochs for i in running)
            progress(total - len(waiting) - len(running) + sum(parts), total)
    if session.stop.is_set():
        raise FitStopped
    outcomes = [Outcome.from_json(known[str(fit.seed)]) for fit in fits]
    return [math.inf if o.val_loss is None else o.val_loss for o in outcomes]


def _retrain_best(
    session: Session, candidates: Sequence[Candidate]
) -> tuple[Candidate, Classifier, dict[str, Any]]:
    """Retrain the candidate with the best mean; one that diverges gives way to the next."""
    if all(candidate.mean == math.inf for candidate in candidates):
        raise UserError(
            "Every candidate failed in its re-evaluation, for the reasons above. When that is "
            f"mended, go on with  {final_command(session.folder, *word_for(session.config))}"
        )
    for candidate in sorted(candidates, key=lambda candidate: candidate.mean):
        try:
            folder = _fit_folder(session, candidate)
            return candidate, *retrain(session, candidate.genes, folder)
        except Diverged as error:
            session.console.print(
                f"The final training of trial {candidate.trial.number} {error}; the next best ..."
            )
    raise UserError(
        f"The final training of all {len(candidates)} candidates diverged: raise final.top_k, or "
        "search again with a lower space.learning_rate.high."
    )


def _fit_folder(session: Session, candidate: Candidate) -> Path:
    """Return where a candidate's final training is kept, each in a folder of its own."""
    return session.folder / "final" / "fit" / str(candidate.trial.number)


def retrain(
    session: Session, genes: Mapping[str, Value], folder: Path
) -> tuple[Classifier, dict[str, Any]]:
    """Train a chromosome for longer, with early stopping; keep the best epoch.

    All cores take part, since no other fit runs. A training that was cut off goes on
    from its last whole epoch, as if it had not been. One that runs out of memory goes
    on from there too, once, in parts of batches.

    Args:
        session: The run.
        genes: The chromosome by name.
        folder: Where its checkpoints and logs go.

    Returns:
        The classifier of the best epoch, and what there is to say of the training.

    Raises:
        Diverged: If a loss, a weight or a feature was not finite in the first epoch.
        FitStopped: If the user stopped it.
    """
    try:
        return _retrain(session, genes, folder)
    except Exception as error:
        if not (is_out_of_memory(error) and can_be_parted(session.config)):
            raise
    free_memory()  # out of there, where the exception holds on to it
    return _retrain(session, genes, folder, PARTS)


def _retrain(
    session: Session, genes: Mapping[str, Value], folder: Path, n_parts: int = 1
) -> tuple[Classifier, dict[str, Any]]:
    config = session.config
    settings = {"genes": dict(genes), "patience": config.final.patience}
    begun = _begun(folder, settings, config.final.max_epochs)
    curve = begun["epochs"] if begun else []
    n_parts = max(n_parts, begun.get("n_parts", 1) if begun else 1)
    started = time.monotonic()
    torch.set_num_threads(THREADS)
    seed = fit_seed(config.seed, Purpose.FINAL, genes)
    torch.manual_seed(seed)
    classifier, report = build_classifier(config, session.data, genes)
    classifier.train_in_parts(n_parts)
    if (n := micro_batch(config, classifier)) is not None:
        session.console.print(f"final training: {format_micro_batch(n)}")
    if not _is_over(curve, config.final.max_epochs, config.final.patience):
        done = f", {len(curve)} of them done" if curve else ""
        session.console.print(
            f"Retraining the winner ({format_genes(genes)}) for up to "
            f"{format_count(config.final.max_epochs, 'epoch')}{done} ..."
        )
        stopper = StopOnRequest(session.stop)  # type: ignore[arg-type]  # it needs is_set alone
        callbacks: list[Callback] = [
            SeededEpochs(seed),
            stopper,
            *build_cache(config, session.data, classifier, report, stopper),
            EarlyStopping("val_loss", patience=config.final.patience),
            ModelCheckpoint(
                folder,
                "best",
                monitor="val_loss",
                save_weights_only=True,
                enable_version_counter=False,
            ),
            ModelCheckpoint(folder, "last", enable_version_counter=False),
            Epochs(session.console),
        ]
        images = build_data(config, session.data, seed, n_parts)
        last = folder / "last.ckpt" if begun else None
        # At most: it may stop early.
        with advancing(
            session.console, "Final training", "at most {} left", len(curve)
        ) as progress:
            callbacks.append(Watched(lambda done: progress(done, config.final.max_epochs)))
            trainer = build_trainer(config, config.final.max_epochs, folder, callbacks, 0)
            try:
                trainer.fit(classifier, datamodule=images, ckpt_path=last, weights_only=True)
            except Diverged as error:
                if not classifier.epochs:
                    raise
                session.console.print(f"The final training {error}; its best epoch is kept.")
        curve = classifier.epochs
    _write_csv(
        session.folder / "final" / "learning_curve.csv",
        ("epoch", *curve[0]),
        ((i + 1, *epoch.values()) for i, epoch in enumerate(curve)),
    )
    with whole(folder / "best.ckpt"):
        kept = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)
        classifier.on_load_checkpoint(kept)
        classifier.load_state_dict(kept["state_dict"])
    return classifier, {
        "epochs": len(curve),
        "best_epoch": len(kept["epochs"]),
        **{name: kept["epochs"][-1][name] for name in ("val_loss", "val_accuracy")},
        "trainable_params": classifier.network.n_trainable,
        "total_params": classifier.network.n_parameters,
        "micro_batch": micro_batch(config, classifier),
        "threads": THREADS,
        "seconds": round(time.monotonic() - started, 1),
        "weights": report.to_json() if report else {},
    }


def _begun(folder: Path, settings: Mapping[str, Any], max_epochs: int) -> dict[str, Any] | None:
    """Return the last checkpoint of a training with these settings, to go on from.

    If there is none, the folder is made empty: what lies there is another training's.
    """
    kept = folder / "training.json"
    content, best = (read_checkpoint(folder / f"{name}.ckpt") for name in ("last", "best"))
    with contextlib.suppress(Exception):  # nothing is there yet, or it is damaged
        if content and best and json.loads(kept.read_text(encoding="utf-8")) == settings:
            curve, states = content["epochs"], content.get("callbacks", {})
            # Whoever was killed between the two left a best one that is an epoch ahead.
            in_step = len(best["epochs"]) in (_best_epoch(curve) + 1, len(curve) + 1)
            if len(curve) <= max_epochs and in_step and _names_own_files(states, folder):
                return content
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_json(kept, settings)
    return None


def _names_own_files(states: Mapping[str, object], folder: Path) -> bool:
    """Whether the states of the callbacks name no files but the training's own.

    Lightning deletes the checkpoint that it replaces, wherever a state says that it lies.
    """
    root = Path(os.path.realpath(folder))
    own = {"", str(root), *(str(root / name) for name in ("best.ckpt", "last.ckpt"))}
    found = (text for state in states.values() for text in texts(state))
    return all(text in own or text.isidentifier() for text in found)  # the others are words


def _best_epoch(curve: Sequence[Mapping[str, float]]) -> int:
    return min(range(len(curve)), key=lambda i: curve[i]["val_loss"])


def _is_over(curve: Sequence[Mapping[str, float]], max_epochs: int, patience: int) -> bool:
    """Whether a training of these epochs has reached its end, as early stopping sees it."""
    if not curve:
        return False
    return len(curve) >= max_epochs or len(curve) - 1 - _best_epoch(curve) >= patience


def test(session: Session, classifier: Classifier) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Test the final model on the images that nothing before has seen.

    Writes ``final/predictions.csv``, ``final/confusion_matrix.csv`` and, in
    ``final/examples/``, the images of the answers that it was surest of, with heat maps;
    in ``final/samples/``, a training image of each of the first classes.

    Returns:
        What `measure` says, and the confusion matrix (n_classes, n_classes): a row
        for each true class.
    """
    config, data, folder = session.config, session.data, session.folder / "final"
    trainer = build_trainer(config, 1, folder / "test", [], 0, enable_checkpointing=False)
    trainer.logger = None  # what there is to keep is written below
    images = build_data(config, data, 0, classifier.n_parts)
    trainer.test(classifier, datamodule=images, verbose=False)
    logits = torch.cat(classifier.test_logits)
    labels = data.test.labels
    probability, predicted = (x.numpy() for x in logits.softmax(1).max(1))
    classes = data.classes
    _write_csv(
        folder / "predictions.csv",
        ("image", "label", "predicted", "probability"),
        zip(
            data.test.names,
            (classes[i] for i in labels),
            (classes[i] for i in predicted),
            (f"{p:.6f}" for p in probability),
            strict=True,
        ),
    )
    right = labels == predicted
    surest = np.argsort(-probability, kind="stable")
    wrong, good = surest[~right[surest]], surest[right[surest]]
    _, one_of_each = np.unique(labels[good], return_index=True)
    shown = [int(row) for row in (*wrong[:WRONG], *good[np.sort(one_of_each)][:RIGHT])]
    _write_images(data.test, {str(row): row for row in shown}, folder / EXAMPLES)
    _write_heat_maps(session, classifier, {row: int(predicted[row]) for row in shown})
    labelled, first = np.unique(data.train.labels, return_index=True)
    samples = zip(labelled[:SAMPLES].tolist(), first.tolist(), strict=False)
    _write_images(data.train, {str(label): row for label, row in samples}, folder / SAMPLE_IMAGES)
    index = list(range(len(classes)))
    matrix = confusion_matrix(labels, predicted, labels=index)
    _write_csv(
        folder / "confusion_matrix.csv",
        ("label", *classes),
        ((name, *row) for name, row in zip(classes, matrix, strict=True)),
    )
    return measure(logits, labels, classes), matrix


def _write_images(split: PreparedSplit, rows: Mapping[str, int], folder: Path) -> None:
    """Keep some images as the model saw them, small, for the report.

    Args:
        split: Where they are.
        rows: Their rows there by the names of their files.
        folder: For them alone.
    """
    shutil.rmtree(folder, ignore_errors=True)  # an earlier model's
    folder.mkdir()
    images = split.images.batch(np.array(list(rows.values()), int)).permute(0, 2, 3, 1).numpy()
    for name, pixels in zip(rows, images, strict=True):
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))
        _write_png(folder / f"{name}.png", image)


def _write_heat_maps(session: Session, classifier: Classifier, answers: Mapping[int, int]) -> None:
    """Write beside each example what spoke for the answer, if that can be told.

    The model is tested: whatever goes wrong here must not seem to cost it.

    Args:
        session: The run.
        classifier: The final model.
        answers: From the row of a test image to the class that it was taken for.
    """
    folder, images = session.folder / "final" / EXAMPLES, session.data.test.images
    model = session.config.model
    try:
        from gatl.heat_maps import heat_map, overlay  # a second, which no search need wait for

        for row, answer in answers.items():
            pixels = to_dtype(images.batch(np.array([row])), torch.float32, scale=True)
            image = normalize(pixels, list(model.mean), list(model.std))[0]
            heat = heat_map(classifier.network, image, answer)
            if heat is not None:
                small = Image.open(folder / f"{row}.png")
                _write_png(folder / f"{row}_heat.png", overlay(small, heat))
    except Exception as error:
        if is_unwritable(error):
            raise
        session.console.print(f"No heat maps could be made: {reason(error)}", soft_wrap=True)


def _write_png(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG")
    write_whole(path, content.getvalue())


def measure(
    logits: torch.Tensor, labels: npt.NDArray[np.int64], classes: Sequence[str]
) -> dict[str, Any]:
    """Return the figures of a test.

    Args:
        logits: Shape (N, n_classes).
        labels: Shape (N,).
        classes: The names of the classes.

    Returns:
        `loss` (mean cross-entropy in nats), `accuracy` with `accuracy_ci95` (Wilson
        1927), `f1_macro`, `n`, and `per_class`.
    """
    predicted = logits.argmax(1).numpy()
    index = list(range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=index, zero_division=0
    )
    right = int((predicted == labels).sum())
    interval = binomtest(right, len(labels)).proportion_ci(0.95, method="wilson")
    return {
        "loss": float(F.cross_entropy(logits, torch.from_numpy(labels))),
        "accuracy": right / len(labels),
        "accuracy_ci95": [float(interval.low), float(interval.high)],
        "f1_macro": float(np.mean(f1)),
        "n": len(labels),
        "per_class": [
            {
                "class": name,
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "n": int(support[i]),
            }
            for i, name in enumerate(classes)
        ],
    }


def _show(
    session: Session,
    winner: Candidate,
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
        f"Found: {describe_genes(winner.genes, session.config.model.n_layers)}. "
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


def _report(session: Session) -> None:
    """Make the page. The model is made: whatever goes wrong here must not seem to cost it."""
    try:
        make(session.folder)
    except Exception as error:
        if is_unwritable(error):
            raise
        session.console.print(f"The report could not be made: {reason(error)}", soft_wrap=True)


def _whereabouts(folder: Path, config: Config) -> str:
    """Say where everything lies and what can be done with it, to be copied."""
    page, run, trust = folder / REPORT, f"run={folder}", word_for(config)
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
            f"All figures:  {folder / 'result.json'}",
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


def _versions() -> dict[str, str]:
    """Return the versions of what takes part; torch's names its build, too."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "torch": torch.__version__}


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2, default=float) + "\n").encode())


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, csv_of([header, *rows]))


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
        if not (folder / JOURNAL).is_file():
            raise UserError(f"{folder} holds no search yet: it has no {JOURNAL}.")
        console = new_console()
        if (made := made_before(folder, config, config.n_trials)) is not None:
            console.print(made, soft_wrap=True)
            return
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
