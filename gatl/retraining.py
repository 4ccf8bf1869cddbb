"""The best chromosomes evaluated again, and the winner trained for longer."""

import contextlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from gatl.chromosome import Value
from gatl.classifier import Classifier, Diverged
from gatl.config import MAX_PARALLEL
from gatl.errors import UserError
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
)
from gatl.files import write_csv, write_json
from gatl.outcome import Outcome
from gatl.progress import (
    advancing,
    format_count,
    format_genes,
    format_loss,
    format_micro_batch,
)
from gatl.ranking import best_distinct
from gatl.record import final_command
from gatl.session import THREADS, Session
from gatl.streams import Purpose
from gatl.trust import texts, whole, word_for


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
            for i, outcome in session.evaluator.wait(timeout=0.2):
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
                write_json(path, lasting)
            parts = (session.evaluator.epochs_done(i) / fits[i].epochs for i in running)
            progress(total - len(waiting) - len(running) + sum(parts), total)
    if session.stop.is_set():
        raise FitStopped
    outcomes = [Outcome.from_json(known[str(fit.seed)]) for fit in fits]
    return [math.inf if o.val_loss is None else o.val_loss for o in outcomes]


def retrain_best(
    session: Session, candidates: Sequence[Candidate]
) -> tuple[Candidate, Classifier, dict[str, Any]]:
    """Retrain the candidate with the best mean; one that diverges gives way to the next."""
    if all(candidate.mean == math.inf for candidate in candidates):
        command = final_command(session.folder, *word_for(session.config))
        raise UserError(
            "Every candidate failed in one of its re-evaluations, for the reasons above. When that "
            f"is mended, or with a higher final.top_k, go on with  {command}"
        )
    for candidate in sorted(candidates, key=lambda candidate: candidate.mean):
        try:
            folder = fit_folder(session, candidate)
            return candidate, *retrain(session, candidate.genes, folder)
        except Diverged as error:
            session.console.print(
                f"The final training of trial {candidate.trial.number} {error}; the next best ..."
            )
    raise UserError(
        f"The final training of all {len(candidates)} candidates diverged: raise final.top_k, or "
        "search again with a lower space.learning_rate.high."
    )


def fit_folder(session: Session, candidate: Candidate) -> Path:
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
    threads = begun["threads"] if begun else THREADS
    torch.set_num_threads(threads)
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
        stopper = StopOnRequest(session.stop)
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
    write_csv(
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
        "threads": threads,
        "seconds": round(time.monotonic() - started, 1),
        "weights": report.to_json() if report else {},
    }


def _begun(folder: Path, settings: Mapping[str, Any], max_epochs: int) -> dict[str, Any] | None:
    """Return the last checkpoint of a training with these settings, to go on from.

    It goes on with as many threads as it began with, since their number decides in which
    order numbers are added up. If there is none, the folder is made empty: what lies there is
    another training's.
    """
    kept = folder / "training.json"
    content, best = (read_checkpoint(folder / f"{name}.ckpt") for name in ("last", "best"))
    with contextlib.suppress(Exception):  # nothing is there yet, or it is damaged
        before = json.loads(kept.read_text(encoding="utf-8"))
        threads = before.pop("threads")
        if content and best and before == settings and threads in range(1, MAX_PARALLEL + 1):
            curve, states = content["epochs"], content.get("callbacks", {})
            # Whoever was killed between the two left a best one that is an epoch ahead.
            in_step = len(best["epochs"]) in (_best_epoch(curve) + 1, len(curve) + 1)
            if len(curve) <= max_epochs and in_step and _names_own_files(states, folder):
                return content | {"threads": int(threads)}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(kept, {**settings, "threads": THREADS})
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
