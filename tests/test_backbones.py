"""Every model that ships: a whole small search on the embedded digits, to a tested model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gatl.__main__ import run
from gatl.classifier import Classifier
from gatl.cli import compose
from gatl.config import checked
from gatl.data import digits
from gatl.data.source import Source

MODELS = [
    ("model=se_densenet121_k12",),
    ("model=se_densenet121",),
    ("model=densenet121", "model.dropout_at=layers"),
    ("model=lenet5",),
    ("model=efficientnet_lite0",),
    ("model=timm", "model.name=resnet18"),
    ("model=timm", "model.name=mobilenetv3_small_050"),
    ("model=timm", "model.name=convnext_atto"),
    ("model=timm", "model.name=vit_tiny_patch16_224"),
]
OVERRIDES = (
    "model.weights=none",
    "data=digits",
    "data.image_size=32",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "evaluator.workers=1",
    "ga.pop=2",
    "ga.generations=2",
    "final.top_k=1",
    "final.seeds=1",
    "final.max_epochs=1",
)
CONF = Path(__file__).parents[1] / "conf"


def test_every_model_is_among_them():
    shipped = {f"model={path.stem}" for path in (CONF / "model").glob("*.yaml")}
    assert {model for model, *_ in MODELS} == shipped


SLOW = {"model.dropout_at=layers", "model.name=resnet18"}


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=pytest.mark.slow) if m[-1] in SLOW else m for m in MODELS],
    ids=lambda model: model[-1],
)
def test_a_whole_search(tmp_path, monkeypatch, model):
    load = digits.load

    def load_few():
        source = load()
        return Source(source.classes, source.train.subset(np.arange(0, len(source.train), 20)))

    monkeypatch.setattr(digits, "load", load_few)
    threads = torch.get_num_threads()
    config = checked(compose([*model, *OVERRIDES]))
    try:
        best = run(config, tmp_path)
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best"]["val_loss"] == best
    assert result["trials"] == config.n_trials
    assert result["weights"] == {"from": "none"}
    genes = result["best"]["genes"]
    assert 0 <= genes["frozen_layers"] <= genes["included_layers"] <= config.model.n_layers
    classifier = Classifier.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert len(classifier.network.layers) == genes["included_layers"]
    assert classifier.hparams["preprocessing"] == config.preprocessing
