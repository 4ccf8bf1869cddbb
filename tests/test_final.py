"""The final model: re-evaluation, retraining, test, and what is written of them."""

import csv
import functools
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.trial import TrialState
from PIL import Image
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score

from gatl import final, heat_maps, retraining, testing
from gatl.classifier import Classifier, Diverged
from gatl.cli import compose
from gatl.config import checked
from gatl.data.images import prepare
from gatl.data.source import Source, Split
from gatl.errors import UserError
from gatl.evaluation import fit_seed, silence
from gatl.final import finish
from gatl.heat_maps import heat_map, overlay
from gatl.model_card import describe
from gatl.outcome import Outcome
from gatl.record import open_study, tell
from gatl.retraining import reevaluate
from gatl.session import Session
from gatl.streams import Purpose

CLASSES = ("[red]", "b=ü, c", "plain")
OVERRIDES = (
    "data=digits",
    "model=se_densenet121_k12",
    "model.weights=none",
    "data.image_size=32",
    "data.batch_size=16",
    "trainer.accelerator=cpu",
    "space.included_layers.high=3",
    "space.frozen_layers.high=1",
    "trainer.max_epochs=2",
    "final.top_k=3",
    "final.seeds=2",
    "final.max_epochs=3",
)


class FakeEvaluator:
    """Answers at once; `evaluate` sees the fit and its index among all fits."""

    n_workers = 2

    def __init__(self, evaluate):
        self.evaluate = evaluate
        self.fits = []
        self._waiting = []

    @property
    def n_free(self):
        return self.n_workers - len(self._waiting)

    def submit(self, key, fit):
        self._waiting.append((key, self.evaluate(fit, len(self.fits))))
        self.fits.append(fit)

    def wait(self, timeout):
        ended, self._waiting = self._waiting, []
        return ended

    def epochs_done(self, key):
        return 0.0

    def close(self, *, now=False):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of 20 images, each with a colour of its own."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    images = rng.integers(0, 120, (60, 32, 32, 3), np.uint8)
    for i, label in enumerate(labels):
        images[i, :, :, label] += 100
    names = [f"{CLASSES[label]}/fl\udcf6wer {i}.png" for i, label in enumerate(labels)]
    source = Source(CLASSES, Split(list(images), labels, names))
    folder = tmp_path_factory.mktemp("images")
    return prepare(source, image_size=32, split_seed=0, max_bad=0.0, folder=folder)


@functools.cache
def configured(*overrides):
    return checked(compose([*OVERRIDES, *overrides]))


def session_in(
    folder, data, evaluate=lambda fit, i: Outcome(0.5), losses=(0.9, 0.5, 0.7, 0.6, 0.5)
):
    """Return a session whose search has ended with these losses; None is a failure."""
    silence()
    config = configured()
    strategy = instantiate(config.search, _partial_=True, _convert_="all")(
        space=config.space, seed=config.seed, initial=config.initial
    )
    study = open_study(folder, strategy)
    for number, loss in enumerate(losses):
        study.ask(strategy.distributions())
        error = "OSError: no space" if loss is None else None
        tell(study, number, Outcome(loss, error=error, duration_s=1.0))
    return Session(
        config,
        folder,
        data,
        strategy,
        study,
        FakeEvaluator(evaluate),
        Console(file=io.StringIO(), width=250, markup=False, highlight=False),
        threading.Event(),
        threading.Event(),
    )


def printed(session):
    return session.console.file.getvalue()


def genes_of(session, number):
    trial = session.study.get_trials()[number]
    return session.config.space.to_dict(session.config.space.from_dict(trial.params))


def favouring(session, number):
    """Return an evaluate function to which one trial's chromosome is the best."""
    favourite = genes_of(session, number)
    return lambda fit, i: Outcome(0.1 if fit.genes == favourite else 0.2 + i / 100)


def read_csv(path):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def logits_of(classifier, split):
    """Return what a classifier makes of a split, by its own account of the preprocessing."""
    preprocessing = classifier.hparams["preprocessing"]
    mean, std = (torch.tensor(preprocessing[name]) for name in ("mean", "std"))
    images = torch.from_numpy(np.array(split.images.array))
    with torch.no_grad():
        return classifier.eval()(((images / 255 - mean) / std).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):
    """A session that has made its final model; in the last epoch everything got worse."""
    session = session_in(tmp_path_factory.mktemp("run"), data)
    session.evaluator.evaluate = favouring(session, 3)

    def worsen(self):
        if self.current_epoch == 2:
            self.network.classifier.weight.data.mul_(-30)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Classifier, "on_train_epoch_start", worsen)
        assert finish(session) == 0.5
    return session


@pytest.fixture(scope="module")
def result(made):
    return json.loads((made.folder / "result.json").read_text())


# Re-evaluation.


def test_the_best_distinct_are_evaluated_with_fresh_seeds(tmp_path, data):
    session = session_in(tmp_path, data)
    candidates = reevaluate(session, session.study.get_trials())
    assert [candidate.trial.number for candidate in candidates] == [1, 4, 3]
    fits = session.evaluator.fits
    assert [fit.genes for fit in fits] == [genes_of(session, n) for n in (1, 1, 4, 4, 3, 3)]
    assert all(fit.epochs == 2 for fit in fits)
    seeds = {fit.seed for fit in fits}
    assert len(seeds) == 6
    assert not seeds & {fit_seed(0, Purpose.FIT, genes_of(session, n)) for n in range(5)}
    assert len({fit.folder for fit in fits}) == 6


def test_equal_chromosomes_are_one_candidate(tmp_path, data):
    session = session_in(tmp_path, data)
    record = session.study.get_trials()
    record[4].params = record[1].params
    record[4].value = 0.4
    candidates = reevaluate(session, record)
    assert [candidate.trial.number for candidate in candidates] == [4, 3, 2]


def test_the_best_mean_wins_whatever_the_search_said(made, result):
    assert result["best"] == {"genes": genes_of(made, 3), "val_loss": 0.6, "trial": 3}
    means = {entry["trial"]: entry["mean"] for entry in result["reevaluation"]}
    assert means == {1: pytest.approx(0.205), 4: pytest.approx(0.225), 3: 0.1}


def test_reevaluations_that_have_lost_all_workers_wait_for_others(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data, lambda fit, i: Outcome(0.1))
    workers, n_asked = [1], itertools.count()

    def wait(timeout):
        ended, session.evaluator._waiting = session.evaluator._waiting, []
        workers[0] = int(not ended)
        return ended

    def n_free(self):
        assert next(n_asked) < 1000, "nobody waits for a worker"
        return workers[0] - len(self._waiting)

    monkeypatch.setattr(FakeEvaluator, "n_free", property(n_free))
    session.evaluator.wait = wait
    assert reevaluate(session, session.study.get_trials())[0].val_losses == (0.1, 0.1)


def test_a_failed_reevaluation_loses(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data)
    best = genes_of(session, 1)
    session.evaluator.evaluate = lambda fit, i: (
        Outcome(error="diverged", diverged=True) if fit.genes == best and i == 1 else Outcome(0.9)
    )
    candidates = reevaluate(session, session.study.get_trials())
    assert [candidate.mean for candidate in candidates] == [float("inf"), 0.9, 0.9]


def test_a_reevaluation_that_failed_in_passing_is_tried_again(tmp_path, data):
    session = session_in(tmp_path, data)
    session.evaluator.evaluate = lambda fit, i: (
        Outcome(error="OSError: no space") if i == 1 else Outcome(0.9)
    )
    assert reevaluate(session, session.study.get_trials())[0].mean == float("inf")
    assert "OSError: no space" in printed(session)
    session.evaluator.evaluate = lambda fit, i: Outcome(0.1)
    again = reevaluate(session, session.study.get_trials())
    assert [candidate.val_losses for candidate in again] == [(0.9, 0.1), (0.9, 0.9), (0.9, 0.9)]


def test_when_every_reevaluation_fails_the_searchs_score_does_not_decide(tmp_path, data):
    session = session_in(tmp_path, data, lambda fit, i: Outcome(error="OSError: no space"))
    with pytest.raises(UserError, match=r"Every candidate failed .*gatl\.final"):
        finish(session)
    assert not (tmp_path / "result.json").exists()


def test_a_failed_reevaluation_is_null_in_the_result(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data)
    session.evaluator.evaluate = lambda fit, i: (
        Outcome(error="diverged", diverged=True) if i == 0 else Outcome(0.9)
    )
    cheaply(monkeypatch)
    finish(session)
    text = (tmp_path / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["reevaluation"][0]["val_losses"] == [None, 0.9]
    assert result["reevaluation"][0]["mean"] is None


def test_an_interrupted_reevaluation_goes_on_where_it_was(tmp_path, data):
    session = session_in(tmp_path, data)

    def evaluate(fit, i):
        if i == 2:
            session.stop.set()
        return Outcome(stopped=True) if i >= 2 else Outcome(i / 10)

    session.evaluator.evaluate = evaluate
    with pytest.raises(KeyboardInterrupt):
        finish(session)
    assert session.cut.is_set()
    n_begun = len(session.evaluator.fits)
    again = session_in(tmp_path, data, lambda fit, i: Outcome(0.5), losses=())
    candidates = reevaluate(again, again.study.get_trials())
    assert n_begun == 4
    assert len(again.evaluator.fits) == 4
    assert candidates[0].val_losses == (0.0, 0.1)
    assert candidates[2].val_losses == (0.5, 0.5)


# What a test says.


def test_the_interval_is_wilsons():
    """Wilson (1927): (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n); 8 of 10 are right."""
    logits = torch.eye(2)[[0] * 8 + [1] * 2]
    test = testing.measure(logits, np.zeros(10, np.int64), ("a", "b"))
    assert test["accuracy"] == 0.8
    assert test["accuracy_ci95"] == pytest.approx([0.490162, 0.943318], abs=1e-6)


def test_the_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(50, 4))).float()
    labels = rng.integers(0, 3, 50)  # class 3 has no image
    test = testing.measure(logits, labels, ("a", "b", "c", "d"))
    predicted = logits.numpy().argmax(1)
    probabilities = torch.softmax(logits, 1).numpy().astype(np.float64)
    probabilities /= probabilities.sum(1, keepdims=True)
    assert test["n"] == 50
    assert test["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(4)), 1e-5)
    assert test["accuracy"] == accuracy_score(labels, predicted)
    options = {"labels": range(4), "average": None, "zero_division": 0}
    f1 = f1_score(labels, predicted, **options)
    assert test["f1_macro"] == pytest.approx(f1.mean())
    assert [row["class"] for row in test["per_class"]] == ["a", "b", "c", "d"]
    assert [row["f1"] for row in test["per_class"]] == pytest.approx(f1)
    for name, score in (("precision", precision_score), ("recall", recall_score)):
        expected = score(labels, predicted, **options)
        assert [row[name] for row in test["per_class"]] == pytest.approx(expected)
    assert [row["n"] for row in test["per_class"]] == np.bincount(labels, minlength=4).tolist()


# What is written.


def test_result_json_has_what_the_contract_names(result):
    assert result.keys() >= {
        *("best", "test", "trials", "evaluations", "seconds", "seed", "versions", "hardware")
    }
    assert result["best"].keys() == {"genes", "val_loss", "trial"}
    assert result["test"].keys() >= {
        *("loss", "accuracy", "accuracy_ci95", "f1_macro", "per_class")
    }
    assert result["trials"] == 5
    assert result["evaluations"] == 5
    assert result["tests"] == 1
    assert result["seed"] == 0
    assert result["classes"] == list(CLASSES)
    assert result["versions"]["torch"] == torch.__version__
    assert result["seconds"] > 0


def test_the_model_card_stands_beside_it(made, data, result):
    card = (made.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card == describe(result, made.config)
    assert result["images"] == {
        **{name: np.bincount(getattr(data, name).labels).tolist() for name in ("train", "val")},
        "test": [row["n"] for row in result["test"]["per_class"]],
        "left_out": 0,
    }
    assert sum(map(sum, list(result["images"].values())[:3])) == 60


def test_evaluations_are_the_trials_that_were_run(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data, losses=(0.5,))
    session.study.ask(session.strategy.distributions())
    tell(session.study, 1, Outcome(0.5, reused_from=0))
    session.study.ask(session.strategy.distributions())  # RUNNING
    cheaply(monkeypatch)
    finish(session)
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["trials"], written["evaluations"]) == (2, 1)


def test_the_tables_agree_with_the_result(made, data, result):
    predictions = read_csv(made.folder / "final" / "predictions.csv")
    assert [row["image"] for row in predictions] == list(data.test.names)
    assert [row["label"] for row in predictions] == [CLASSES[i] for i in data.test.labels]
    right = np.mean([row["label"] == row["predicted"] for row in predictions])
    assert right == result["test"]["accuracy"]
    matrix = read_csv(made.folder / "final" / "confusion_matrix.csv")
    assert [row["label"] for row in matrix] == list(CLASSES)
    for row, name in itertools.product(matrix, CLASSES):
        expected = [p for p in predictions if (p["label"], p["predicted"]) == (row["label"], name)]
        assert int(row[name]) == len(expected)


def test_the_checkpoint_alone_makes_the_predictions_again(made, data):
    checkpoint = torch.load(made.folder / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["genes"] == genes_of(made, 3)
    classifier = Classifier.load_from_checkpoint(made.folder / "best.ckpt", weights_only=True)
    assert classifier.classes == CLASSES
    probability, predicted = logits_of(classifier, data.test).softmax(1).max(1)
    rows = read_csv(made.folder / "final" / "predictions.csv")
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in predicted]
    written = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(probability.numpy(), written, atol=1e-4)


def test_the_best_epoch_is_the_one_that_is_kept(made, data, result):
    curve = read_csv(made.folder / "final" / "learning_curve.csv")
    losses = [float(row["val_loss"]) for row in curve]
    assert [row["epoch"] for row in curve] == ["1", "2", "3"]
    assert losses.index(min(losses)) < 2
    assert result["final"]["best_epoch"] == 1 + losses.index(min(losses))
    classifier = Classifier.load_from_checkpoint(made.folder / "best.ckpt", weights_only=True)
    loss = F.cross_entropy(logits_of(classifier, data.val), torch.from_numpy(data.val.labels))
    assert float(loss) == pytest.approx(min(losses), abs=1e-5)
    assert result["final"]["val_loss"] == min(losses)


def test_the_folder_holds_what_the_contract_names_and_nothing_odd(made):
    assert {path.name for path in made.folder.iterdir()} == {
        *("study.journal", "result.json", "best.ckpt", "MODEL_CARD.md", "final")
    }
    assert {path.name for path in (made.folder / "final").iterdir()} == {
        *("confusion_matrix.csv", "fit", "learning_curve.csv", "predictions.csv"),
        *("reevaluation.json", "examples", "samples"),
    }
    (fit,) = (made.folder / "final" / "fit").iterdir()
    assert {path.name for path in fit.iterdir()} == {*("hparams.yaml", "metrics.csv")}


def test_images_of_the_surest_answers_are_kept_for_the_report(made, data):
    rows = read_csv(made.folder / "final" / "predictions.csv")
    order = sorted(range(len(rows)), key=lambda i: -float(rows[i]["probability"]))
    right = [i for i in order if rows[i]["label"] == rows[i]["predicted"]]
    wrong = [i for i in order if i not in right]
    examples = made.folder / "final" / "examples"
    kept = {int(p.stem): p for p in examples.iterdir() if p.stem.isdecimal()}
    first = {rows[i]["label"]: i for i in reversed(right)}  # the surest of each class
    assert kept.keys() == {*wrong[:12], *first.values()}
    for i, path in kept.items():
        pixels = np.asarray(Image.open(path))
        assert (pixels == data.test.images.batch(np.array([i]))[0].permute(1, 2, 0).numpy()).all()
    assert {p.stem for p in examples.iterdir()} == {f"{i}{e}" for i in kept for e in ("", "_heat")}


def test_heat_maps_are_of_the_answer_that_was_given(made, data):
    classifier = Classifier.load_from_checkpoint(made.folder / "best.ckpt", map_location="cpu")
    config = made.config
    for path in (made.folder / "final" / "examples").glob("*_heat.png"):
        row = int(path.stem.removesuffix("_heat"))
        pixels = data.test.images.batch(np.array([row]))[0]
        mean, std = (torch.tensor(x)[:, None, None] for x in (config.model.mean, config.model.std))
        image = (pixels / 255 - mean) / std
        answer = int(classifier.eval()(image[None]).argmax())
        heat = heat_map(classifier.network, image, answer)
        expected = overlay(Image.fromarray(pixels.permute(1, 2, 0).numpy()), heat)
        difference = np.asarray(Image.open(path)).astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 2


def test_a_training_image_of_each_class_is_kept_for_the_report(made, data):
    kept = {int(p.stem): p for p in (made.folder / "final" / "samples").iterdir()}
    assert kept.keys() == {0, 1, 2}
    for label, path in kept.items():
        row = data.train.labels.tolist().index(label)
        pixels = data.train.images.batch(np.array([row]))[0].permute(1, 2, 0).numpy()
        assert (np.asarray(Image.open(path)) == pixels).all()


def test_heat_maps_that_cannot_be_made_cost_nothing_else(tmp_path, data, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(heat_maps, "heat_map", broken)
    cheaply(monkeypatch)
    session = session_in(tmp_path, data)
    finish(session)
    assert "No heat maps could be made: RuntimeError: no such layer" in printed(session)
    assert (tmp_path / "result.json").is_file()
    assert not list((tmp_path / "final" / "examples").glob("*_heat.png"))


def test_what_was_found_is_printed(made, result):
    out = printed(made)
    assert "Found: the first" in out
    assert f"{result['test']['accuracy']:.1%} are classified right" in out
    for name in CLASSES:
        assert len([line for line in out.splitlines() if line.startswith(name)]) == 2
    assert str(made.folder / "best.ckpt") in out


def test_the_next_commands_name_the_run_and_what_it_trusts(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "report.html").write_text("found")
    config = configured("search=cmaes")
    trust = "trust=optuna.samplers.CmaEsSampler"
    page, *others = final._whereabouts(folder, config).splitlines()[-3:]
    run = shlex.quote(f"run={folder}")
    assert others == [
        f"  python -m gatl.predict {run} images=PHOTOS {trust}",
        f"  python -m gatl.export {run} format=onnx {trust}",
    ]
    _, _, module, uri = page.split()
    assert module == "webbrowser"
    assert urlopen(uri).read() == b"found"
    (folder / "report.html").unlink()
    said = final._whereabouts(folder, configured())
    assert f"  python -m gatl.report {run}\n" in said
    assert "trust=" not in said


# What can go wrong.


def cheaply(monkeypatch):
    """Let the final training learn nothing from one batch."""
    monkeypatch.setattr(retraining, "build_trainer", only_a_batch(retraining.build_trainer))


def only_a_batch(build_trainer):
    def build(config, epochs, *args, **kwargs):
        return build_trainer(config, min(epochs, 1), *args, limit_train_batches=1, **kwargs)

    return build


def test_a_winner_that_diverges_gives_way_to_the_next(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data)
    session.evaluator.evaluate = favouring(session, 3)
    winner = genes_of(session, 3)
    end_of_epoch = Classifier.on_validation_epoch_end

    def diverge(self):
        if self.genes == winner:
            raise Diverged("diverged: val_loss is nan in epoch 1")
        end_of_epoch(self)

    monkeypatch.setattr(Classifier, "on_validation_epoch_end", diverge)
    cheaply(monkeypatch)
    finish(session)
    assert "The final training of trial 3 diverged: val_loss is nan in epoch 1" in printed(session)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["best"]["trial"] == 1
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["genes"] == genes_of(session, 1)


def refuse(*args):
    raise AssertionError("this was not to be called")


def raising(error):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


def test_when_all_diverge_one_line_says_so(tmp_path, data, monkeypatch):
    monkeypatch.setattr(retraining, "retrain", raising(Diverged("diverged: ...")))
    with pytest.raises(UserError, match="all 3 candidates diverged"):
        finish(session_in(tmp_path, data))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower data.batch_size"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
    ],
)
def test_any_other_error_is_one_line_and_a_file(tmp_path, data, monkeypatch, error, said):
    monkeypatch.setattr(Classifier, "training_step", raising(error))
    session = session_in(tmp_path, data)
    with pytest.raises(UserError) as raised:
        finish(session)
    message = str(raised.value)
    assert "\n" not in message
    assert said in message
    assert str(tmp_path / "final" / "error.txt") in message
    assert f"python -m gatl.final run={tmp_path}" in message
    assert "Traceback" in (tmp_path / "final" / "error.txt").read_text()
    assert not (tmp_path / "result.json").exists()


def test_a_final_training_out_of_memory_goes_on_in_halves_from_its_last_epoch(
    tmp_path, data, monkeypatch
):
    session = session_in(tmp_path, data)
    session.evaluator.evaluate = favouring(session, 3)
    logits, seen = Classifier._logits, []

    def limited(self, x):
        if self.training:
            seen.append((self.current_epoch, len(x)))
            if self.current_epoch == 1 and len(x) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(self, x)

    monkeypatch.setattr(Classifier, "_logits", limited)
    finish(session)
    first = [size for epoch, size in seen if epoch == 0]
    assert max(first) == 16
    assert sum(first) == len(data.train)  # the first epoch is not done again
    assert [size for epoch, size in seen if epoch == 1][:3] == [16, 8, 8]
    assert max(size for epoch, size in seen if epoch == 2) == 8
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["final"]["micro_batch"] == 8
    assert printed(session).count("final training: out of memory; then in micro-batches of 8") == 1


def test_re_evaluations_tell_their_micro_batches(tmp_path, data):
    outcomes = [Outcome(0.5, micro_batch=8), *[Outcome(0.5)] * 5]
    session = session_in(tmp_path, data, lambda fit, i: outcomes[i])
    reevaluate(session, session.study.get_trials())
    assert "re-evaluation of 1_0: out of memory; then in micro-batches of 8" in printed(session)
    kept = json.loads((tmp_path / "final" / "reevaluation.json").read_text())
    assert sorted(o["micro_batch"] or 0 for o in kept.values()) == [0, 0, 0, 0, 0, 8]


def test_a_re_evaluation_that_was_killed_has_failed_and_the_others_count(tmp_path, data):
    def evaluate(fit, i):
        return Outcome(error="killed after evaluator.timeout=1m") if i == 0 else Outcome(0.5)

    session = session_in(tmp_path, data, evaluate)
    best, *others = reevaluate(session, session.study.get_trials())
    assert best.mean == np.inf
    assert [other.mean for other in others] == [0.5, 0.5]
    assert "re-evaluation of 1_0: killed after evaluator.timeout=1m" in printed(session)


def test_a_full_disk_in_the_final_training_is_the_disks_fault(tmp_path, data, monkeypatch):
    monkeypatch.setattr(Classifier, "training_step", raising(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left") as raised:
        finish(session_in(tmp_path, data))
    assert raised.value.filename == str(tmp_path / "final")
    assert not (tmp_path / "final" / "error.txt").exists()


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((), "has ended yet: python -m gatl resume="),
        ((None, None), "completed, so there is no best one"),
    ],
)
def test_without_a_complete_trial_there_is_nothing_to_train(tmp_path, data, losses, said):
    session = session_in(tmp_path, data, losses=losses)
    with pytest.raises(UserError, match=said) as error:
        finish(session)
    assert "\n" not in str(error.value)
    assert session.evaluator.fits == []


@pytest.fixture
def _signals():
    """Undo what Lightning does to signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_final_training_leaves_no_model(tmp_path, data, monkeypatch, times):
    session = session_in(tmp_path, data)

    def interrupt(self):
        session.stop.set()
        if times == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "on_train_epoch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finish(session)
    assert not (tmp_path / "best.ckpt").exists()
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    cheaply(monkeypatch)
    again = session_in(tmp_path, data, refuse, losses=())
    finish(again)
    assert (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("when", ["in an epoch", "after the last"])
def test_a_final_training_goes_on_as_if_it_had_not_been_cut_off(
    tmp_path, data, made, monkeypatch, when
):
    """`made` spoils its last epoch in a hook; so does this one, in the session that ends it."""
    session = session_in(tmp_path, data)
    session.evaluator.evaluate = favouring(session, 3)
    interrupting = when == "in an epoch"

    def spoil(self):
        if self.current_epoch == 2:
            if interrupting:
                session.stop.set()
            self.network.classifier.weight.data.mul_(-30)

    monkeypatch.setattr(Classifier, "on_train_epoch_start", spoil)
    if interrupting:
        with pytest.raises(KeyboardInterrupt):
            finish(session)
        interrupting = False
    else:
        tested = testing.test
        monkeypatch.setattr(testing, "test", lambda *args: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(UserError, match="full"):
            finish(session)
        monkeypatch.setattr(testing, "test", tested)
        monkeypatch.setattr("lightning.Trainer.fit", refuse)
    session.stop.clear()
    finish(session)
    assert ("2 of them done" in printed(session)) == (when == "in an epoch")
    for name in ("learning_curve.csv", "predictions.csv"):
        assert (tmp_path / "final" / name).read_bytes() == (
            made.folder / "final" / name
        ).read_bytes()


def test_what_a_training_goes_on_from(tmp_path):
    folder, begun = tmp_path / "fit", {"genes": {"dropout": 0.5}, "patience": 2}
    curve = [{"val_loss": 0.5}, {"val_loss": 0.4}]
    whole = {"epochs": curve, "threads": retraining.THREADS}

    def leave(n_best=2):
        torch.save({"epochs": curve}, folder / "last.ckpt")
        torch.save({"epochs": [*curve, {"val_loss": 0.3}][:n_best]}, folder / "best.ckpt")

    assert retraining._begun(folder, begun, 3) is None
    leave()
    for max_epochs in (2, 3, 9):
        assert retraining._begun(folder, begun, max_epochs) == whole
    assert retraining._begun(folder, begun, 1) is None  # it is beyond its end
    assert not (folder / "last.ckpt").exists()
    leave(3)  # it was killed between the two: the third epoch comes again
    assert retraining._begun(folder, begun, 3) == whole
    leave(1)  # a power cut left the one before
    assert retraining._begun(folder, begun, 3) is None
    for name in ("last.ckpt", "best.ckpt", "training.json"):
        leave()
        content = (folder / name).read_bytes()
        for n in (0, 1, len(content) // 2, len(content) - 1):
            leave()
            (folder / name).write_bytes(content[:n] + bytes(n == 1))
            is_whole = name == "training.json" and n == len(content) - 1  # but for the line's end
            assert retraining._begun(folder, begun, 3) == (whole if is_whole else None)
        leave()
        (folder / name).unlink()
        assert retraining._begun(folder, begun, 3) is None
    leave()
    assert retraining._begun(folder, begun | {"patience": 3}, 3) is None
    assert not (folder / "last.ckpt").exists()


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_what_cannot_be_read_just_now_is_not_deleted(tmp_path, monkeypatch, error):
    folder = tmp_path / "fit"
    assert retraining._begun(folder, {}, 3) is None
    for name in ("best.ckpt", "last.ckpt"):
        torch.save({"epochs": [{"val_loss": 0.5}]}, folder / name)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", raising(error))
        with pytest.raises(type(error)):
            retraining._begun(folder, {}, 3)
    assert retraining._begun(folder, {}, 3)["epochs"] == [{"val_loss": 0.5}]


def test_a_training_goes_on_with_the_threads_it_began_with(tmp_path, monkeypatch):
    assert retraining._begun(tmp_path, {}, 3) is None
    for name in ("best.ckpt", "last.ckpt"):
        torch.save({"epochs": [{"val_loss": 0.5}]}, tmp_path / name)
    began = retraining.THREADS
    monkeypatch.setattr(retraining, "THREADS", began + 3)  # of another machine, or a launcher's job
    assert retraining._begun(tmp_path, {}, 3)["threads"] == began
    for lie in ("0", "1025", '"2"', "null", "1e400", "[]"):
        (tmp_path / "training.json").write_text(f'{{"threads": {lie}}}')
        assert retraining._begun(tmp_path, {}, 3) is None
        for name in ("best.ckpt", "last.ckpt"):
            torch.save({"epochs": [{"val_loss": 0.5}]}, tmp_path / name)


def test_a_kill_while_the_result_is_written_loses_no_training(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data)
    write = final.write_json

    def killed(path, content):
        if path.name == "result.json":
            raise SystemExit
        write(path, content)

    monkeypatch.setattr(final, "write_json", killed)
    with pytest.raises(SystemExit):
        finish(session)
    assert (tmp_path / "best.ckpt").exists()
    monkeypatch.undo()
    monkeypatch.setattr("lightning.Trainer.fit", refuse)
    finish(session)
    assert json.loads((tmp_path / "result.json").read_text())["final"]["epochs"] == 3


def test_a_diverging_candidate_does_not_cost_the_next_one_its_epochs(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data)
    session.evaluator.evaluate = favouring(session, 3)
    first = genes_of(session, 3)
    interrupting = True

    def disturb(self):
        if self.genes == first:
            self.network.classifier.weight.data.fill_(float("nan"))
        elif self.current_epoch == 2 and interrupting:
            session.stop.set()

    monkeypatch.setattr(Classifier, "on_train_epoch_start", disturb)
    with pytest.raises(KeyboardInterrupt):
        finish(session)
    interrupting = False
    session.stop.clear()
    finish(session)
    assert "2 of them done" in printed(session)
    assert json.loads((tmp_path / "result.json").read_text())["best"]["trial"] != 3


def test_a_training_that_diverges_late_keeps_its_best_epoch(tmp_path, data, monkeypatch):
    session = session_in(tmp_path, data)

    def diverge(self):
        if self.current_epoch == 1:
            self.network.classifier.weight.data.fill_(float("nan"))

    monkeypatch.setattr(Classifier, "on_train_epoch_start", diverge)
    finish(session)
    assert "its best epoch is kept" in printed(session)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["final"]["epochs"], result["final"]["best_epoch"]) == (1, 1)
    classifier = Classifier.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert logits_of(classifier, data.test).isfinite().all()


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([], False),
        ([3, 2, 1], False),
        ([3, 2, 1, 0.5], True),  # max_epochs
        ([1, 2], False),
        ([1, 2, 1], True),  # an equal loss is no better one
        ([2, 1, 3], False),
    ],
)
def test_a_training_is_over_when_early_stopping_says_so(losses, over):
    curve = [{"val_loss": loss} for loss in losses]
    assert retraining._is_over(curve, max_epochs=4, patience=2) == over


def test_what_is_made_is_not_made_again(made, data, monkeypatch):
    monkeypatch.setattr(testing, "test", refuse)
    monkeypatch.setattr(retraining, "retrain", refuse)
    again = session_in(made.folder, data, refuse, losses=())
    assert finish(again) == 0.5
    assert "Nothing is left to do" in printed(again)
    assert str(made.folder / "result.json") in printed(again)


def test_what_a_kill_behind_the_result_left_is_put_in_order(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    for name in (".images", ".features"):
        (folder / name).mkdir()
        (folder / name / "scratch.npy").touch()
    kept = {path for path in (folder / "final").rglob("*") if path.is_file()}
    for name in ("best.ckpt", "last.ckpt", "training.json"):
        (folder / "final" / "fit" / "99").mkdir(parents=True, exist_ok=True)
        (folder / "final" / "fit" / "99" / name).touch()
    page = folder / "report.html"
    composed = compose([*OVERRIDES, "budget.trials=5"])
    config = checked(composed)
    (folder / ".hydra").mkdir()
    OmegaConf.save(composed, folder / ".hydra" / "config.yaml")
    for left in (lambda: page.unlink(missing_ok=True), lambda: os.utime(page, ns=(0, 0))):
        left()
        console = Console(file=io.StringIO())
        assert final.nothing_left(folder, config, [], console)
        assert f"Report:       {page}" in console.file.getvalue()
        assert page.stat().st_mtime_ns >= (folder / "result.json").stat().st_mtime_ns
        assert not list(folder.glob(".[if]*"))
        assert {path for path in (folder / "final").rglob("*") if path.is_file()} == kept
    before = page.stat().st_mtime_ns
    assert final.nothing_left(folder, config, [], console)
    assert page.stat().st_mtime_ns == before
    more = configured("budget.trials=6")
    assert not final.nothing_left(folder, more, [], console)


def test_more_trials_or_other_settings_make_another_model(made, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    before = (folder / "best.ckpt").read_bytes()
    session = session_in(folder, data, losses=())
    session.study.ask(session.strategy.distributions())
    tell(session.study, 5, Outcome(0.1))
    assert session.study.get_trials()[5].state is TrialState.COMPLETE
    monkeypatch.setattr(Classifier, "on_train_epoch_start", lambda self: session.stop.set())
    with pytest.raises(KeyboardInterrupt):  # the earlier model stays until there is another
        finish(session)
    assert (folder / "best.ckpt").read_bytes() == before
    monkeypatch.undo()
    cheaply(monkeypatch)
    session.stop.clear()
    assert finish(session) == 0.1
    written = json.loads((folder / "result.json").read_text())
    assert written["trials"] == 6
    assert written["tests"] == 2
    assert "nothing before has seen" not in printed(session)
    assert "final model 2 of this run" in printed(session)
    assert (folder / "best.ckpt").read_bytes() != before
    config = configured("final.max_epochs=4")
    assert final.made_before(folder, session.config, 6) is not None
    assert final.made_before(folder, config, 6) is None
    assert final.made_before(folder, session.config, 7) is None


@pytest.mark.parametrize("content", ["", "{", "{}", '{"trials": 3}'])
def test_a_damaged_result_counts_as_none(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    assert final.made_before(tmp_path, configured(), 1) is None


# The command.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Give one run folder"),
        (["run=a", "run=b"], "Give one run folder"),
        (["run=missing folder=x"], "is no run folder"),
    ],
)
def test_the_command_says_in_one_line_what_it_lacks(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["gatl.final", *words])
    with pytest.raises(SystemExit) as ended:
        final.main()
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_the_command_refuses_a_folder_without_a_search(monkeypatch, capsys, tmp_path):
    (tmp_path / ".hydra").mkdir()
    source = Path(__file__).parent
    monkeypatch.chdir(source)
    OmegaConf.save(compose(OVERRIDES), tmp_path / ".hydra" / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["gatl.final", f"run={tmp_path}"])
    with pytest.raises(SystemExit):
        final.main()
    assert "holds no search yet" in capsys.readouterr().err
    assert not (tmp_path / "study.journal").exists()
