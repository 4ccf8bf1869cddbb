"""``python -m gatl.export``: the ONNX file computes what the checkpoint does, without gatl."""

import json
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps

from gatl import export, load
from gatl.cli import compose
from gatl.errors import UserError
from gatl.inference import Probabilities
from gatl.models.se_densenet import se_densenet
from gatl.models.timm_network import timm_network


@pytest.fixture(scope="module")
def exported(final_run, tmp_path_factory):
    """A copy of the run folder with its export."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(final_run.folder, folder)
    export.export(folder)
    return folder


@pytest.fixture
def quick(exported, monkeypatch):
    """Take what has been exported for what the exporter returns."""
    onnx = (exported / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "to_onnx", lambda model: onnx)


def test_it_computes_what_the_checkpoint_does(exported, final_run):
    """Prepared as its metadata say, by Pillow alone."""
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    meta = session.get_modelmeta().custom_metadata_map
    classes, preprocessing = json.loads(meta["classes"]), json.loads(meta["preprocessing"])
    assert preprocessing == {"image_size": 32, "interpolation": "bilinear"}
    assert json.loads((exported / "classes.json").read_text()) == classes
    photos = sorted(final_run.images.rglob("0*.png"))  # RGB
    assert len(photos) == 3
    batch = np.stack(
        [
            np.asarray(ImageOps.fit(Image.open(photo), (32, 32), Image.Resampling.BILINEAR))
            for photo in photos
        ]
    )
    (probabilities,) = session.run(["probabilities"], {"images": batch})
    assert probabilities.dtype == np.float32
    model = load(exported)
    assert classes == list(model.classes)
    for photo, row in zip(photos, probabilities, strict=True):
        label, probability = model(photo)
        assert classes[row.argmax()] == label
        assert row.max() == pytest.approx(probability, abs=1e-4)
        assert row.sum() == pytest.approx(1, abs=1e-6)
    (alone,) = session.run(None, {"images": batch[1:2]})
    assert alone == pytest.approx(probabilities[1:2], abs=1e-6)


@pytest.mark.usefixtures("quick")
def test_it_says_on_what_it_was_compared(final_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(final_run.folder, folder)
    config = folder / ".hydra" / "config.yaml"
    composed = OmegaConf.load(config)
    composed.evaluator = compose(["evaluator=ray", "evaluator.address=ray://far:10001"]).evaluator
    OmegaConf.save(composed, config)  # to which an export does not connect
    export.export(folder)
    assert "On 6 images of the test split" in capsys.readouterr().out
    config.write_text(config.read_text().replace(str(final_run.images), "/gone"))
    export.export(folder)
    assert "On 64 images drawn at random" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("value", [2e-4, float("nan")])
def test_what_computes_something_else_is_not_written(final_run, tmp_path, monkeypatch, value):
    folder = tmp_path / "run"
    shutil.copytree(final_run.folder, folder)
    model = load(folder)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert export.difference(model, export.to_onnx(model), images) < 1e-6
    model.network.network.classifier.bias.data[0] += value
    assert not export.difference(model, export.to_onnx(model), images) < 1e-6
    monkeypatch.setattr(export, "difference", lambda *_: value)
    with pytest.raises(UserError, match=r"differ by up to (0\.0002|nan) .* not written"):
        export.export(folder)
    assert not list(folder.rglob("*.onnx"))
    assert not (folder / "classes.json").exists()


def test_a_network_that_cannot_be_exported_is_one_line(final_run, monkeypatch):
    def branch(self, images):
        return images if images.sum() > 0 else -images

    monkeypatch.setattr(Probabilities, "forward", branch)
    with pytest.raises(UserError, match=r"cannot be exported \(\w+: [^\n]+\)\."):
        export.to_onnx(load(final_run.folder))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run= is missing"),
        (["run={run}", "format=coreml"], "format must be onnx, but got coreml"),
        (["run={run}/best.ckpt"], "is no run folder"),
        (["run={run}/final"], "holds no best.ckpt"),
        (["run={run}", "output=x"], "takes run=, format=, trust=."),
    ],
)
def test_a_mistake_is_one_line(final_run, monkeypatch, capsys, words, message):
    words = [word.format(run=final_run.folder) for word in words]
    monkeypatch.setattr(sys, "argv", ["gatl.export", *words])
    with pytest.raises(SystemExit, match="1"):
        export.main()
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_without_the_extra_it_says_how_to_get_it(final_run, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else 1)
    with pytest.raises(UserError, match=r"package onnxruntime: pip install 'gatl\[export\]'"):
        export.export(final_run.folder)


def test_it_writes_through_no_link(final_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(final_run.folder, folder)
    (folder / ".model.onnx.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="out of the run folder"):
        export.export(folder)
    assert not (tmp_path / "elsewhere").exists()


def k12(included_layers, n_classes, dropout):
    return se_densenet(
        included_layers,
        n_classes,
        dropout,
        growth_rate=12,
        init_features=24,
        block_config=(6, 12, 24, 16),
        se_placement="block",
        se_init="identity",
        dropout_at="head",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("se_densenet121_k12", 20),
        ("se_densenet121_k12", 58),
        ("resnet18", 8),
        ("mobilenetv3_small_050", 3),
        ("tf_efficientnet_lite0", 16),
        ("convnext_atto", 4),
        ("vit_tiny_patch16_224", 12),
    ],
)
def test_every_family_of_networks_can_be_exported(final_run, name, layers):
    model = load(final_run.folder)
    torch.manual_seed(0)
    if name == "se_densenet121_k12":
        network = k12(layers, 3, 0.5)
    else:
        network = timm_network(layers, 3, 0.5, name=name)
    model.image_size = 64
    model.network = Probabilities(network, [0.5, 0.4, 0.3], [0.2, 0.3, 0.2]).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    assert np.ptp(model.probabilities(images), axis=0).max() > 1e-4  # images matter
    assert export.difference(model, export.to_onnx(model), images) <= 1e-5
