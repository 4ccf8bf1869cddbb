"""The one test of the final model: its figures, and what the report shows of it."""

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torchvision.transforms.v2.functional import normalize, to_dtype

from gatl.classifier import Classifier
from gatl.data.images import PreparedSplit
from gatl.evaluation import build_data, build_trainer, reason
from gatl.files import is_unwritable, write_csv, write_whole
from gatl.report import EXAMPLES, SAMPLE_IMAGES
from gatl.session import Session

WRONG, RIGHT, SAMPLES, SIDE = 12, 4, 12, 96
"""Mistakes, right answers and classes with images that are kept for the report, and their side."""


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
    write_csv(
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
    write_csv(
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
            if heat is not None and heat.any():  # something spoke for the answer
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
