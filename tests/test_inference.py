"""`gatl.load`: a final model classifies as its run did, and says what it does not take."""

import csv
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gatl import load
from gatl.errors import UserError


@pytest.fixture(scope="module")
def model(final_run):
    return load(final_run.folder)


@pytest.fixture
def photo():
    """An RGB image that is neither square nor of the network's size."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))


def test_it_classifies_as_the_run_did(final_run, model):
    with (final_run.folder / "final" / "predictions.csv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {Path(row["image"]).suffix for row in rows} == {".png", ".jpg", ".gif"}
    assert len({row["probability"] for row in rows}) > 3
    for row in rows:
        label, probability = model(final_run.images / row["image"])
        assert label == row["predicted"]
        assert probability == pytest.approx(float(row["probability"]), abs=1e-5)


def test_path_image_and_tensor_are_the_same(model, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    expected = model(photo)
    assert isinstance(expected[0], str)
    assert isinstance(expected[1], float)
    for image in (
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        pixels,
        pixels / 255,
        (pixels / 255).double().requires_grad_(),
    ):
        assert model(image) == expected


def test_probabilities_are_those_of_the_classes_in_order(model, photo):
    pixels = model.pixels(photo)
    assert pixels.shape == (32, 32, 3)
    probabilities = model.probabilities([pixels, 255 - pixels, pixels])
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-6)
    assert probabilities[0] == pytest.approx(probabilities[2], abs=1e-6)
    label, probability = model(photo)
    assert model.classes[probabilities[0].argmax()] == label
    assert probabilities[0].max() == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(1, 8, 8), ValueError, r"\(3, H, W\), but got \(1, 8, 8\)"),
        (torch.zeros(8, 8, 3), ValueError, r"but got \(8, 8, 3\)"),
        (torch.zeros(2, 3, 8, 8), ValueError, r"one RGB image .* but got \(2, 3, 8, 8\)"),
        (torch.zeros(3, 0, 8), ValueError, r"but got \(3, 0, 8\)"),
        (torch.full((3, 8, 8), 1.1), ValueError, r"\[0, 1\] .* in \[1.1, 1.1\]"),
        (torch.full((3, 8, 8), -0.1), ValueError, r"not normalised"),
        (torch.full((3, 8, 8), float("nan")), ValueError, r"\[nan, nan\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, r"uint8 .* but got torch.int64"),
        (np.zeros((8, 8, 3), np.uint8), TypeError, r"ndarray; .*fromarray"),
        ("no such photo.png", ValueError, "no such photo.png cannot be decoded"),
    ],
)
def test_what_is_no_image_is_an_error(model, image, error, message):
    with pytest.raises(error, match=message):
        model(image)


def test_there_must_be_a_model(final_run, tmp_path):
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"gatl\.final run={re.escape(str(tmp_path))}"):
        load(tmp_path)
    torch.save({"hyper_parameters": Path("x")}, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"best.ckpt is no checkpoint by gatl") as error:
        load(tmp_path)
    assert "weights_only" not in str(error.value)


def test_a_checkpoint_will_do(final_run, model, photo):
    assert load(final_run.folder / "best.ckpt")(photo) == model(photo)


def changed(final_run, folder, **hyper_parameters):
    """Write a copy of the checkpoint in which some hyperparameters are others."""
    content = torch.load(final_run.folder / "best.ckpt", weights_only=True)
    content["hyper_parameters"] |= hyper_parameters
    torch.save(content, folder / "best.ckpt")
    return folder


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 10**9},
        {"image_size": "32"},
        {"interpolation": "__class__"},
        {"std": [1.0, 0.0, 1.0]},
        {"mean": [0.5]},
        {"mean": [0.5, float("nan"), 0.5]},
        {"mean": "abc"},
    ],
)
def test_senseless_preprocessing_is_a_damaged_checkpoint(final_run, tmp_path, wrong):
    good = {"image_size": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    load(changed(final_run, tmp_path, preprocessing=good))
    with pytest.raises(UserError, match=r"best.ckpt is damaged"):
        load(changed(final_run, tmp_path, preprocessing=good | wrong))


def test_only_what_is_trusted_builds_the_network(final_run, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda *_, **__: pytest.fail("it was run"))
    folder = changed(final_run, tmp_path, network={"_target_": "platform.node"})
    with pytest.raises(UserError, match=r"trust=platform\.node"):
        load(folder)
    with pytest.raises(UserError, match=r"trust=platform\.node"):
        load(folder, trust="platform.no,platform")
    with pytest.raises(pytest.fail.Exception):
        load(folder, trust="numpy.load,platform.node")
