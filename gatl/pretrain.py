"""``python -m gatl.pretrain``: train a whole backbone from scratch, write its weights.

The folder ``output`` gets ``NAME.safetensors``, the backbone without its classifier,
whose header holds the card; ``NAME.md``, the card to read; ``metrics.csv``, a row an
epoch; and ``last.ckpt``, from which the same command goes on, bit for bit.

Recipe: SGD with Nesterov momentum (Sutskever et al. 2013), a linear warm-up and a
cosine (Goyal et al. 2017; Loshchilov & Hutter 2017), label smoothing (Szegedy et al.
2016), no weight decay on biases and normalisation (He et al. 2019).
"""

import contextlib
import json
import math
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import lightning
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from gatl.classifier import WeightedMean
from gatl.cli import (
    compose,
    folder_named,
    one_line_errors,
    own_groups,
    read_command_line,
    resolve_if,
    split_jobs,
)
from gatl.config import (
    DataConfig,
    ModelConfig,
    TrainerConfig,
    _require,
    _require_range,
    _section,
    resolving,
)
from gatl.data.images import PreparedData, prepare
from gatl.data.manifest import left_out
from gatl.data.module import ImageData
from gatl.data.source import Source
from gatl.data.splits import complete_splits
from gatl.errors import UserError
from gatl.evaluation import resolve_precision, silence
from gatl.models.layered import LayeredNetwork
from gatl.models.weight_files import CARD_KEY, read_safetensors
from gatl.models.weights import backbone_of, describe_se, load
from gatl.progress import format_count, format_duration
from gatl.record import held
from gatl.streams import Purpose, generator
from gatl.targets import call

BATCHES_BETWEEN_CHECKS = 25
"""Looking at a loss makes a GPU wait for it, so it is looked at now and then."""

FIRST_SIGN_S = 60.0
"""Seconds after which a log shows, once, how fast the first epoch goes."""

_PACKAGES = ("gatl", "torch", "torchvision", "lightning", "numpy")


@dataclass(frozen=True)
class RecipeConfig:
    """How the backbone is trained."""

    learning_rate: float
    warmup: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    test_every: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        rate = self.learning_rate
        _require(0 < rate <= 10, "recipe.learning_rate", rate, "in (0, 10]")
        _require_range("recipe.warmup", self.warmup, 0, 1, open_high=True)
        # Nesterov's form needs a momentum
        _require(0 < self.momentum < 1, "recipe.momentum", self.momentum, "in (0, 1)")
        _require_range("recipe.weight_decay", self.weight_decay, 0, 1)
        _require_range("recipe.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
        _require_range("recipe.test_every", self.test_every, 1)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that one pretraining is told."""

    seed: int
    output: str
    bits: int
    data: DataConfig
    model: ModelConfig
    trainer: TrainerConfig
    recipe: RecipeConfig

    def __post_init__(self) -> None:
        """Check what stands alone and what spans several groups."""
        _require_range("seed", self.seed, 0, 2**32, open_high=True)
        _require(self.bits in (16, 32), "bits", self.bits, "16 or 32")
        _require(
            self.model.weights == "none",
            "model.weights",
            self.model.weights,
            "none, because pretraining starts from scratch",
        )
        if self.data.image_size < self.model.min_image_size:
            raise UserError(
                f"data.image_size must be at least {self.model.min_image_size} for "
                f"model={self.model.name}, but got {self.data.image_size}."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, as plain data: all but the folder."""
        return {key: value for key, value in asdict(self).items() if key != "output"}


def checked(composed: DictConfig) -> PretrainConfig:
    """Turn a composed configuration into the checked one.

    Raises:
        UserError: For the first value that is missing, of another type, or out
            of its range; one line.
    """
    cfg = composed.copy()
    if not isinstance(cfg.get("data"), DictConfig):
        raise UserError(f"data must be a group of settings, but got {cfg.get('data')!r}.")
    if OmegaConf.is_missing(cfg.data, "root"):
        raise UserError(f"data.root is required with data={cfg.data.name}: give data.root=PATH.")
    with resolving():
        OmegaConf.resolve(cfg)
    for name in ("seed", "bits"):
        whole = isinstance(cfg[name], int) and not isinstance(cfg[name], bool)
        _require(whole, name, cfg[name], "a whole number")
    _require(isinstance(cfg.output, str) and cfg.output != "", "output", cfg.output, "a folder")
    return PretrainConfig(
        seed=cfg.seed,
        output=cfg.output,
        bits=cfg.bits,
        data=_section(DataConfig, cfg.data, "data"),
        model=_section(ModelConfig, cfg.model, "model"),
        trainer=_section(TrainerConfig, cfg.trainer, "trainer"),
        recipe=_section(RecipeConfig, cfg.recipe, "recipe"),
    )


def pretraining_splits(source: Source, split_seed: int) -> Source:
    """Waste no image: nothing is chosen by validation, so only a test split is held out.

    Args:
        source: Images with a training split at least.
        split_seed: In [0, 2**32); draws the test split where the source has none.

    Returns:
        The source with its test split, which takes the place of validation too, to
        show in the log how training goes. An official validation split stays unused.
    """
    test = complete_splits(source, split_seed).test
    assert test is not None
    train = source.train
    if source.test is None:
        held_out = set(test.names)
        train = train.subset(np.flatnonzero([name not in held_out for name in train.names]))
    return Source(source.classes, train, val=test, test=test)


def choose_precision(trainer: TrainerConfig) -> str:
    """Return Lightning's name of the precision; `auto` is bf16-mixed where that is faster.

    On a CPU that is where it computes bfloat16 itself (AMX or AVX512-BF16). Measured
    with SE-DenseNet-121, k = 12, at 64 pixels, batches of 128, two threads of an AMD
    EPYC with AVX512-BF16: 216 images/s against 85 in 32 bits, the fastest of 20 steps
    each. Elsewhere bfloat16 is emulated.

    Raises:
        UserError: If the device that was asked for is missing or cannot do it.
    """
    precision = resolve_precision(trainer)
    if trainer.precision == "auto" and precision == "32-true" and trainer.accelerator != "mps":
        # older versions of torch cannot tell
        features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        if features.get("avx512_bf16") or features.get("amx_bf16"):
            return "bf16-mixed"
    return precision


def learning_rate_factor(step: int, n_steps: int, warmup: float) -> float:
    """Return the learning rate of a step, as a share of its peak.

    Args:
        step: In [0, n_steps].
        n_steps: All steps of the training.
        warmup: The share of them in which the rate rises linearly, in [0, 1);
            afterwards it falls as half a cosine, to 0 at the end.
    """
    n_warmup = warmup * n_steps
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))


class Pretraining(lightning.LightningModule):
    """A whole backbone with a classifier, trained by the recipe.

    Args:
        settings: `PretrainConfig.settings`; plain data, kept in the checkpoint.
        classes: The names of the classes, in the order of the logits.
    """

    def __init__(self, settings: Mapping[str, Any], classes: Sequence[str]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.recipe: dict[str, Any] = dict(settings["recipe"])
        self.seed = int(settings["seed"])
        model = settings["model"]
        self.network: LayeredNetwork = call(
            model["network"],
            included_layers=model["n_layers"],
            n_classes=len(classes),
            dropout=0.0,
        )
        self.network.to(memory_format=torch.channels_last)
        self.train_loss, self.test_loss = WeightedMean(), WeightedMean()
        self.train_accuracy = MulticlassAccuracy(len(classes), average="micro")
        self.test_accuracy = MulticlassAccuracy(len(classes), average="micro")
        self.epochs: list[dict[str, float]] = []  # the metrics of each finished epoch

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, n_classes) for normalised images (B, 3, H, W)."""
        logits: Tensor = self.network(images)
        return logits

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        """Return SGD with its schedule; biases and normalisation do not decay."""
        parameters = list(self.network.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(
            groups,
            lr=self.recipe["learning_rate"],
            momentum=self.recipe["momentum"],
            weight_decay=self.recipe["weight_decay"],
            nesterov=True,
            fused=True,
        )
        n_steps, warmup = int(self.trainer.estimated_stepping_batches), self.recipe["warmup"]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, n_steps, warmup)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        """Seed augmentation by the epoch, so that a resumed training goes on the same."""
        torch.manual_seed(
            int(generator(self.seed, Purpose.FIT, self.current_epoch, 1).integers(2**32))
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the smoothed cross-entropy of a batch."""
        images, labels = batch
        logits = self(images)
        losses = F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.recipe["label_smoothing"]
        )
        loss = losses.mean()
        self.train_loss.update(losses.detach(), torch.ones_like(losses))
        self.train_accuracy.update(logits.detach(), labels)
        if batch_idx % BATCHES_BETWEEN_CHECKS == 0:
            self._require_finite(value := loss.item())
            self.log("loss", value, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Look at the test split, for the log."""
        self.test_step(batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the metrics of the test split."""
        images, labels = batch
        logits = self(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.test_loss.update(losses, torch.ones_like(losses))
        self.test_accuracy.update(logits, labels)

    def on_train_epoch_end(self) -> None:
        """Keep the epoch's metrics.

        Raises:
            UserError: If training diverged.
        """
        metrics = {
            "epoch": self.current_epoch + 1,
            "train_loss": _drain(self.train_loss),
            "train_accuracy": _drain(self.train_accuracy),
        }
        self._require_finite(metrics["train_loss"])
        if self.test_loss.update_called:
            metrics |= self.drain_test()
        self.epochs.append(metrics)

    def drain_test(self) -> dict[str, float]:
        """Return the metrics of the images tested since the last call."""
        return {"test_loss": _drain(self.test_loss), "test_accuracy": _drain(self.test_accuracy)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the learning curve."""
        checkpoint["epochs"] = self.epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the learning curve up again."""
        self.epochs = checkpoint["epochs"]

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"Training diverged: the loss is {loss} in epoch {self.current_epoch + 1}; "
                "give a lower recipe.learning_rate and another output=FOLDER."
            )


def _drain(metric: Metric) -> float:
    value = float(metric.compute())
    metric.reset()
    return value


class Interrupted(Exception):
    """The user asked to stop."""


class Keeper(Checkpoint):
    """Saves the training after each epoch, shows it, and stops it when asked.

    Args:
        folder: Where ``last.ckpt`` and ``metrics.csv`` go.
        console: Where a line an epoch is printed.
        stop: Set to end the training after the running batch.
    """

    def __init__(self, folder: Path, console: Console, stop: threading.Event) -> None:
        self._folder, self._console, self._stop = folder, console, stop
        self._n_images = 0
        self._started = self._epoch_started = self._last_batch = 0.0
        self._durations: list[float] = []  # of this session's epochs, testing included
        self._told = False

    def on_train_epoch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Start the clock."""
        self._epoch_started = time.monotonic()
        self._n_images = 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        """Count images; give one early sign of life where there is no progress bar."""
        if self._stop.is_set():
            raise Interrupted
        self._n_images += len(batch[1])
        self._last_batch = time.monotonic()
        seconds = self._last_batch - self._epoch_started
        if not self._told and seconds > FIRST_SIGN_S and not self._durations:
            self._told = True
            if trainer.progress_bar_callback is None:
                epoch = seconds * int(trainer.num_training_batches) / (batch_idx + 1)
                left = epoch * (trainer.max_epochs or 1) - epoch * trainer.current_epoch - seconds
                loss = float(trainer.callback_metrics["loss"])
                self._print(
                    trainer,
                    f"epoch {trainer.current_epoch + 1}, batch {batch_idx + 1} of "
                    f"{trainer.num_training_batches} · loss {loss:.3f} · "
                    f"{self._n_images / seconds:.0f} images/s · about {format_duration(left)} left",
                )

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save and show the epoch."""
        assert isinstance(pl_module, Pretraining)
        metrics = pl_module.epochs[-1]
        speed = self._n_images / (self._last_batch - self._epoch_started)
        self._durations.append(time.monotonic() - self._epoch_started)
        metrics["seconds"] = round(self._durations[-1], 1)
        path = self._folder / "last.ckpt"
        trainer.save_checkpoint(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # whole or not at all, even after kill -9
        _write_metrics(self._folder / "metrics.csv", pl_module.epochs)
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 1
        parts = [
            f"epoch {done}/{total}",
            f"loss {metrics['train_loss']:.3f}",
            f"accuracy {metrics['train_accuracy']:.1%}",
        ]
        if "test_accuracy" in metrics:
            parts.append(f"test accuracy {metrics['test_accuracy']:.1%}")
        parts.append(f"{speed:.0f} images/s")
        if done < total:
            left = (total - done) * sum(self._durations) / len(self._durations)
            parts.append(f"about {format_duration(left)} left")
        self._print(trainer, " · ".join(parts))

    def _print(self, trainer: lightning.Trainer, line: str) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar):
            bar.print(line)  # above the bar
        else:
            self._console.print(line, soft_wrap=True)


def _write_metrics(path: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    columns = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
    rows = [",".join(str(metrics.get(name, "")) for name in columns) for metrics in epochs]
    path.write_text("\n".join((",".join(columns), *rows, "")), encoding="utf-8")


def run(config: PretrainConfig, console: Console, command: str) -> Path:
    """Train, or go on training; write weights and card.

    Args:
        config: The checked configuration.
        console: Where the user reads.
        command: What the user typed, for the card.

    Returns:
        The weights file.

    Raises:
        UserError: If the images, the device or the folder are not what the
            configuration says, or training diverges.
        KeyboardInterrupt: If the user stopped it; whole epochs are kept.
    """
    silence()
    precision = choose_precision(config.trainer)
    folder = folder_named(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / ".images"
    with held(folder):
        checkpoint = _checkpoint(folder, config)
        shutil.rmtree(images, ignore_errors=True)  # of a run that was killed
        images.mkdir()
        try:
            data = prepare(
                pretraining_splits(instantiate(config.data.source), config.data.split_seed),
                image_size=config.data.image_size,
                interpolation=config.model.interpolation,
                split_seed=config.data.split_seed,
                max_bad=config.data.max_bad,
                folder=images,
            )
            module = _train(config, data, precision, checkpoint, folder, console)
            return _finish(config, data, module, precision, folder, console, command)
        finally:
            shutil.rmtree(images, ignore_errors=True)


def _checkpoint(folder: Path, config: PretrainConfig) -> Path | None:
    """Return the checkpoint to go on from, if there is one; the settings must be its own."""
    path = folder / "last.ckpt"
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        before = content["hyper_parameters"]["settings"]
    except Exception as error:  # torch raises many kinds for what is no checkpoint
        raise UserError(f"{path} is no checkpoint of a pretraining: remove it.") from error
    old, new = _flat(before), _flat(config.settings)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{folder} holds a pretraining with {key}={old.get(key)}, not {new.get(key)}: "
                "give the same settings to go on with it, or another output=FOLDER."
            )
    return path


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _image_data(config: PretrainConfig, data: PreparedData) -> ImageData:
    return ImageData(
        data,
        batch_size=config.data.batch_size,
        augment=config.data.augment,
        mean=config.model.mean,
        std=config.model.std,
        seed=config.seed,
    )


def _train(
    config: PretrainConfig,
    data: PreparedData,
    precision: str,
    checkpoint: Path | None,
    folder: Path,
    console: Console,
) -> Pretraining:
    torch.manual_seed(config.seed)
    module = Pretraining(config.settings, list(data.classes))
    console.print(
        f"Pretraining {config.model.name} ({module.network.n_parameters:,} parameters) on "
        f"{config.data.name}: {len(data.classes)} classes, {len(data.train)} images of "
        f"{data.image_size} px, {format_count(config.trainer.max_epochs, 'epoch')}, {precision}, "
        f"{torch.get_num_threads()} threads -> {folder}",
        soft_wrap=True,
    )
    for line in left_out(data):
        console.print(f"  {line}", soft_wrap=True, markup=False)
    if checkpoint is not None:
        console.print(f"Going on from {checkpoint}.", soft_wrap=True)
    bar = [TQDMProgressBar(leave=False)] if console.is_terminal else []
    with _stoppable(console) as stop:
        trainer = lightning.Trainer(
            max_epochs=config.trainer.max_epochs,
            accelerator=config.trainer.accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            deterministic=config.trainer.deterministic,
            check_val_every_n_epoch=config.recipe.test_every,
            logger=False,
            callbacks=[*bar, Keeper(folder, console, stop)],
            enable_progress_bar=bool(bar),
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(
                module,
                datamodule=_image_data(config, data),
                ckpt_path=checkpoint,
                weights_only=True,
            )
        except Interrupted:
            console.print(
                f"Stopped; {len(module.epochs)} of {config.trainer.max_epochs} epochs are kept. "
                "The same command goes on.",
                soft_wrap=True,
            )
            raise KeyboardInterrupt from None
    return module


@contextlib.contextmanager
def _stoppable(console: Console) -> Iterator[threading.Event]:
    """Let Ctrl-C (and SIGTERM) end the training after a batch; a second one ends it at once."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise Interrupted
        stop.set()
        console.print("Stopping after this batch; Ctrl-C again stops at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(
    config: PretrainConfig,
    data: PreparedData,
    module: Pretraining,
    precision: str,
    folder: Path,
    console: Console,
    command: str,
) -> Path:
    """Write the weights, read them back, and measure what was read on the test split."""
    tensors = backbone(module.network, config.bits)
    card = make_card(config, data, module, precision, command)
    path = folder / f"{config.model.name}.safetensors"
    unmeasured = path.with_suffix(".tmp.safetensors")
    _save(tensors, card, unmeasured)
    load(module.network, read_safetensors(unmeasured))
    trainer = lightning.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        deterministic=config.trainer.deterministic,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, datamodule=_image_data(config, data), verbose=False)
    measured, n = module.drain_test(), len(data.test)
    right = round(measured["test_accuracy"] * n)  # the metric is in 32 bits
    card["test"] = {"accuracy": right / n, "loss": measured["test_loss"], "images": n}
    _save(tensors, card, path)
    unmeasured.unlink()
    path.with_suffix(".md").write_text(describe(card), encoding="utf-8")
    console.print(
        f"Of {len(data.test)} test images, {card['test']['accuracy']:.2%} are classified right, "
        f"measured with the weights as written ({config.bits} bits).",
        soft_wrap=True,
    )
    console.print(
        f"Weights: {path} ({path.stat().st_size / 1e6:.1f} MB) · card: {path.with_suffix('.md')}",
        soft_wrap=True,
    )
    return path


def backbone(network: nn.Module, bits: int) -> dict[str, Tensor]:
    """Return the tensors of a network without its classifier, rounded to so many bits.

    A tensor that does not fit into 16 bits, whose range ends at 65,504, keeps 32.

    Args:
        network: A whole `LayeredNetwork`.
        bits: 16 or 32.
    """
    tensors = {}
    for name, tensor in network.state_dict().items():
        # BN's counter is no weight
        if not name.startswith("classifier.") and tensor.is_floating_point():
            rounded = tensor.half() if bits == 16 else tensor
            fits = bool(rounded.isfinite().all())
            tensors[name] = (rounded if fits else tensor).cpu().contiguous()
    return tensors


def make_card(
    config: PretrainConfig,
    data: PreparedData,
    module: Pretraining,
    precision: str,
    command: str,
) -> dict[str, Any]:
    """Say what the weights are and how they were made; plain data, without the test."""
    model = config.model
    placement, gate = describe_se(module.network)
    return {
        "model": model.name,
        "backbone": backbone_of(model.network),
        "layers": model.n_layers,
        "parameters": sum(
            p.numel() for n, p in module.network.named_parameters() if "classifier" not in n
        ),
        "se": {"placement": placement, "gate": gate},
        "bits": config.bits,
        "preprocessing": {
            "image_size": data.image_size,
            "interpolation": config.model.interpolation,
            "mean": list(model.mean),
            "std": list(model.std),
        },
        "data": {"name": config.data.name, "classes": len(data.classes), "images": len(data.train)},
        "test": None,
        "epochs": len(module.epochs),
        "recipe": {
            **asdict(config.recipe),
            "optimizer": "SGD, Nesterov momentum",
            "schedule": "linear warm-up, cosine to 0",
            "batch_size": config.data.batch_size,
            "augment": config.data.augment,
        },
        "precision": precision,
        "threads": torch.get_num_threads(),
        "hours": round(sum(metrics["seconds"] for metrics in module.epochs) / 3600, 2),
        "seed": config.seed,
        "command": command,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def describe(card: Mapping[str, Any]) -> str:
    """Write a card as Markdown, for people."""
    test, data, shape = card["test"], card["data"], card["preprocessing"]
    recipe = ", ".join(f"{key} {value}" for key, value in card["recipe"].items())
    rows = {
        "Backbone": f"{card['model']}, {card['layers']} layers, {card['parameters']:,} parameters",
        "Squeeze-and-Excitation": f"placement {card['se']['placement']}"
        + (f", gate {card['se']['gate']}" if card["se"]["gate"] else ""),
        "Trained on": f"{data['name']}: {data['classes']} classes, {data['images']:,} images",
        "Test accuracy": f"{test['accuracy']:.2%} of {test['images']:,} images "
        f"(loss {test['loss']:.4f}), measured with the weights as written, the classifier that "
        "is not in the file in 32 bits",
        "Images": f"{shape['image_size']} x {shape['image_size']} pixels in [0, 1], "
        f"{shape['interpolation']}, "
        f"mean {shape['mean']}, standard deviation {shape['std']}",
        "Numbers": f"{card['bits']} bits",
        "Epochs": f"{card['epochs']} ({card['hours']} hours, {card['threads']} threads, "
        f"{card['precision']})",
        "Recipe": recipe,
        "Seed": str(card["seed"]),
        "Command": f"`{card['command']}`",
        "Versions": ", ".join(f"{name} {number}" for name, number in card["versions"].items()),
        "Date": card["date"],
    }
    lines = [f"# {card['model']}, pretrained on {data['name']}", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items()), ""])


def _save(tensors: dict[str, Tensor], card: Mapping[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    # save_file would make a file that only its owner may read
    temporary.write_bytes(safetensors.torch.save(tensors, metadata={CARD_KEY: json.dumps(card)}))
    temporary.replace(path)


def _command() -> str:
    return shlex.join(["python", "-m", "gatl.pretrain", *sys.argv[1:]])


@hydra.main(version_base="1.3", config_path="pkg://gatl.conf", config_name="pretrain")
def job(composed: DictConfig) -> None:
    """Run one pretraining, alone or of a multirun."""
    with one_line_errors():
        run(checked(composed), Console(highlight=False), _command())


def main() -> None:
    """Check the command line as far as it can be, then hand it to Hydra."""
    with one_line_errors():
        args = read_command_line("python -m gatl.pretrain")
        words = [*args.overrides, *own_groups(args.config_dir)]
        if args.help or args.hydra_help or args.shell_completion or args.info:
            pass
        elif args.cfg:
            resolve_if(args.resolve, compose(words, "pretrain"))
        else:
            for overrides in split_jobs(words) if args.multirun else [words]:
                checked(compose(overrides, "pretrain"))
        job()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
