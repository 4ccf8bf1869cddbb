"""What gatl is measured against: the script that one writes with Optuna and Lightning.

It is put together as the documentation of both shows: an objective that asks the trial
for its settings, torchvision's `ImageFolder`, `DataLoader`, one `Trainer` a trial,
`self.log`. `DataLoader` has no worker processes, its default: with two of them, fits of three
epochs took 6 to 20 % longer on two cores. Network, weights, freezing, optimizer, batches and epochs
are those of gatl, so that the losses are the same but for noise.
"""

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning
import numpy as np
import optuna
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from gatl.chromosome import Gene, Value
from gatl.classifier import Classifier
from gatl.config import Config
from gatl.data.folder import load
from gatl.errors import UserError
from gatl.evaluation import EVAL_BATCH_SIZE, load_pretrained
from gatl.models.layered import LayeredNetwork
from gatl.streams import Purpose, generator

Genes = dict[str, Value]


def subset(root: str, folder: Path, n_train: int, n_val: int, n_classes: int | None = None) -> None:
    """Copy some photographs into ``folder/{train,val,test}/<class>/``, the classes alike.

    Args:
        root: Holds a folder of images for each class.
        folder: Where to; made anew.
        n_train: Training images, in all.
        n_val: Validation images, in all, and as many test images.
        n_classes: So many classes, the first by name; None: all.

    Raises:
        UserError: If a class has too few.
    """
    shutil.rmtree(folder, ignore_errors=True)
    source = load(root)
    classes = source.classes[:n_classes]
    n_classes = len(classes)
    for index, name in enumerate(classes):
        members = np.flatnonzero(source.train.labels == index)
        order = iter(generator(0, Purpose.SPLIT, index).permutation(members).tolist())
        sizes = {"train": n_train // n_classes, "val": n_val // n_classes}
        for split, size in (sizes | {"test": sizes["val"]}).items():
            target = folder / split / name
            target.mkdir(parents=True)
            for _ in range(size):
                if (i := next(order, None)) is None:
                    raise UserError(f"Class {name!r} of {root} has too few images: give fewer.")
                path = source.train.images[i]
                assert isinstance(path, Path)
                shutil.copy(path, target)


def build_network(config: Config, genes: Genes, n_classes: int) -> LayeredNetwork:
    """Build the network of a chromosome, cut, frozen, its weights loaded."""
    network = Classifier(
        config.model.network, genes, [str(i) for i in range(n_classes)], {}
    ).network
    load_pretrained(config, network)
    return network.to(memory_format=torch.contiguous_format)  # what PyTorch does by itself


class Module(lightning.LightningModule):
    """A LightningModule as the documentation shows."""

    def __init__(self, network: LayeredNetwork, learning_rate: float) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate
        self.val_losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch."""
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the loss of the epoch."""
        self.val_losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over what is not frozen."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, lr=self.learning_rate)


class Objective:
    """Optuna's objective: one fit, its lowest val_loss.

    Args:
        config: gatl's configuration; its folder holds ``train`` and ``val``.
        folder: Where the logs go.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder

    def __call__(self, trial: optuna.Trial) -> float:
        """Fit what the trial suggests."""
        config = self.config
        genes = {gene.name: _suggest(trial, gene) for gene in config.space.genes}
        genes["frozen_layers"] = min(genes["frozen_layers"], genes["included_layers"])
        size = config.data.image_size
        transform = transforms.Compose(
            [
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(config.model.mean, config.model.std),
            ]
        )
        root = Path(config.data.source["root"])
        train, val = (
            DataLoader(
                datasets.ImageFolder(root / split, transform),
                batch_size=config.data.batch_size if split == "train" else EVAL_BATCH_SIZE,
                shuffle=split == "train",
            )
            for split in ("train", "val")
        )
        lightning.seed_everything(trial.number + 1000 * config.seed, verbose=False)
        network = build_network(config, genes, len(train.dataset.classes))
        network.fit_neck_statistics(images for images, _ in train)  # of a linear probe
        module = Module(network, genes["learning_rate"])
        trainer = lightning.Trainer(
            max_epochs=config.trainer.max_epochs,
            accelerator=config.trainer.accelerator,
            devices=1,
            logger=CSVLogger(self.folder, name="", version=str(trial.number)),
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, train, val)
        return min(module.val_losses)


def _suggest(trial: optuna.Trial, gene: Gene) -> Value:
    if gene.kind is int:
        return trial.suggest_int(gene.name, int(gene.low), int(gene.high))
    return trial.suggest_float(gene.name, gene.low, gene.high, log=gene.log)


def quiet() -> None:
    """Let neither library repeat itself with every fit."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def bare_fit(
    config: Config,
    network: LayeredNetwork,
    genes: Genes,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    behind_prefix: bool = False,
) -> float:
    """Fit in a bare loop over tensors in memory.

    Args:
        config: gatl's configuration, for batch size and epochs.
        network: What to fit.
        genes: The chromosome, for its learning rate.
        train: Images (N, 3, S, S), normalised, or boundary tensors; labels (N,).
        val: The same.
        behind_prefix: Whether they are boundary tensors.

    Returns:
        The lowest val_loss of the epochs.
    """
    forward = network.suffix if behind_prefix else network
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=float(genes["learning_rate"]), fused=True)
    losses = []
    for _ in range(config.trainer.max_epochs):
        network.train()
        for indices in torch.randperm(len(train[0])).split(config.data.batch_size):
            if len(indices) == 1:
                continue  # no variance over maps of 1 x 1
            loss = F.cross_entropy(forward(train[0][indices]), train[1][indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            total = sum(
                F.cross_entropy(forward(images), labels, reduction="sum")
                for images, labels in zip(*(x.split(EVAL_BATCH_SIZE) for x in val), strict=True)
            )
        losses.append(float(total) / len(val[0]))
    return min(losses)


def suggest_all(study: optuna.Study, chromosomes: Sequence[Genes]) -> None:
    """Let a study's first trials be these."""
    for genes in chromosomes:
        study.enqueue_trial(genes)
