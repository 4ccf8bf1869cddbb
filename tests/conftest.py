"""What tests share: a final model in use, and an environment that each leaves as it was."""

import os
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import lightning
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from gatl import testing
from gatl.cli import compose
from gatl.config import checked
from gatl.data import folder as image_folder
from gatl.data.images import PreparedData, prepare
from gatl.data.source import Source, Split, in_memory
from gatl.evaluation import build_classifier, silence
from gatl.session import Session

CLASSES = ("<b>|`_[red]", "\x1b[31m stripes", "ünlike")


class FinalRun(NamedTuple):
    """A run folder, and where its images lie."""

    folder: Path
    images: Path


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A command may set variables for the processes that it starts; other tests start some too."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def as_in_a_worker() -> Iterator[None]:
    """Fit with one thread and no words, as a worker process does."""
    silence()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Noise in two classes, which nothing changes."""

    def split(n: int, seed: int) -> Split:
        rng = np.random.default_rng(seed)
        return in_memory(
            rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 2, str(seed)
        )

    source = Source(("a", "b"), split(24, 0), split(10, 1), split(4, 2))
    folder = tmp_path_factory.mktemp("images")
    return prepare(source, image_size=32, split_seed=0, max_bad=0, folder=folder)


def save_images(root: Path) -> None:
    """Write images of every kind that a preparation could treat in two ways."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(10):
            height, width = rng.integers(20, 90, 2)
            pixels = rng.integers(0, 120, (height, width, 4), np.uint8)
            pixels[:, :, label] += 100
            rgb = Image.fromarray(pixels[:, :, :3])
            path = root / name / f"{i} ümage"
            match i % 5:
                case 0:
                    rgb.save(f"{path}.png")
                case 1:
                    exif = Image.Exif()
                    exif[0x0112] = 6  # lies on its side
                    rgb.resize((400, 300)).save(f"{path}.jpg", exif=exif)
                case 2:
                    rgb.convert("L").save(f"{path}.png")
                case 3:
                    Image.fromarray(pixels).save(f"{path}.png")  # transparent
                case 4:
                    rgb.convert("P").save(f"{path}.gif")


@pytest.fixture(scope="session")
def final_run(tmp_path_factory: pytest.TempPathFactory) -> FinalRun:
    """A run whose final model is untrained, but tested as that of any other run is."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    root = tmp_path_factory.mktemp("photos") / "all"
    save_images(root)
    composed = compose(
        [
            *("data=folder", f'data.root="{root}"', "model=lenet5", "trainer.accelerator=cpu"),
            "model.interpolation=bilinear",
        ]
    )
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(composed, folder / ".hydra" / "config.yaml")
    silence()
    config = checked(composed)
    scratch = tmp_path_factory.mktemp("scratch")
    data = prepare(
        image_folder.load(str(root)),
        image_size=config.data.image_size,
        interpolation=config.model.interpolation,
        split_seed=0,
        max_bad=0.0,
        folder=scratch,
    )
    torch.manual_seed(0)
    genes = {"included_layers": 5, "frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.5}
    classifier, _ = build_classifier(config, data, genes)
    classifier.network.classifier.weight.data.mul_(20)  # probabilities that tell images apart
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(folder / "best.ckpt", weights_only=True)
    nothing = None  # of the rest of a session a test needs none
    console, event = Console(file=StringIO()), threading.Event()
    session = Session(config, folder, data, nothing, nothing, nothing, console, event, event)
    testing.test(session, classifier)
    return FinalRun(folder, root)
