"""The LightningModule: a layered network trained as a chromosome says."""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from gatl.models.layered import LayeredNetwork
from gatl.targets import call
from gatl.trust import require_own, whole

# Looking at numbers makes a GPU wait for them, so they are looked at now and then.
BATCHES_BETWEEN_CHECKS = 25


class Diverged(ArithmeticError):
    """A loss, a weight or a feature was not finite."""


class WeightedMean(Metric):
    """The mean of losses (B,) with weights (B,), over all batches.

    Unlike torchmetrics' MeanMetric it keeps NaN: without the images that have
    no finite loss, a broken network would look better than it is.
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, losses: Tensor, weights: Tensor) -> None:
        """Add a batch."""
        self.total += (losses * weights).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        """Return the mean, shape ()."""
        return self.total / self.weight


class Classifier(lightning.LightningModule):
    """An image classifier that is built, frozen and trained from its genes.

    All arguments are plain data, so that a checkpoint is self-sufficient and
    loads with ``weights_only=True``. Images come normalised, (B, 3, H, W);
    logits are (B, n_classes).

    Args:
        network: How to build the network: `_target_` and its arguments, but for
            those that the genes and the classes give.
        genes: `included_layers`, `frozen_layers`, `learning_rate` and `dropout`;
            optionally `weight_decay` (decoupled; Loshchilov & Hutter 2019) and
            `label_smoothing` (Szegedy et al. 2016; in the training loss only).
        classes: The names of the classes, in the order of the logits.
        preprocessing: What images need before they come here; kept for prediction.
        class_weights: A weight a class that averages 1 over the training split,
            or None. Training loss and val_loss are weighted alike.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        network: Mapping[str, Any],
        genes: Mapping[str, float],
        classes: Sequence[str],
        preprocessing: Mapping[str, Any],
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.genes = dict(genes)
        self.classes = tuple(classes)
        self.network: LayeredNetwork = call(
            network,
            included_layers=int(genes["included_layers"]),
            n_classes=len(classes),
            dropout=genes["dropout"],
        )
        self.network.to(memory_format=torch.channels_last)
        self.network.freeze(int(genes["frozen_layers"]))
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.val_loss = WeightedMean()
        self.val_accuracy = MulticlassAccuracy(len(classes), average="micro")
        self.val_f1 = MulticlassF1Score(len(classes), average="macro")
        self.train_loss = WeightedMean()
        self.behind_prefix = False  # whether training and validation hand over boundary tensors
        self.n_parts = 1  # see `train_in_parts`
        self.epochs: list[dict[str, float]] = []  # the metrics of each finished epoch

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, trusted: Collection[str] = (), **kwargs: Any
    ) -> "Classifier":
        """Load a checkpoint as Lightning does, and run nothing that it brings.

        Args:
            checkpoint_path: The file.
            *args: For Lightning.
            trusted: Names of functions, beside gatl's own, that it may call to build
                its network.
            **kwargs: For Lightning.

        Raises:
            UserError: If it is no checkpoint by gatl, or is another program's to run.
        """
        path = Path(checkpoint_path)
        with whole(path):
            saved = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"]
            if not saved.keys() <= inspect.signature(cls).parameters.keys():
                raise ValueError(f"its settings are {', '.join(map(str, saved))}")
            require_own(path, {"model": saved}, trusted)
            loaded: Classifier = super().load_from_checkpoint(
                path, *args, **kwargs | {"weights_only": True}
            )
        return loaded

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, n_classes) for normalised images (B, 3, H, W)."""
        logits: Tensor = self.network(images)
        return logits

    def train_in_parts(self, n_parts: int) -> None:
        """Let each batch pass the network in parts that add their gradients up, to save memory.

        BN sees a part at a time; without BN and dropout a step is that of the whole batch.
        Images come as they would otherwise, so batches and what varies them are the same.

        Args:
            n_parts: At least 1. A batch in which some part would be a single image, for which
                BN has no variance where maps are 1 x 1, stays whole.
        """
        self.n_parts = n_parts
        # Lightning's own accumulation needs other batches, counts steps otherwise, and weighs
        # the last batch of an epoch wrongly.
        self.automatic_optimization = n_parts == 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam (Kingma & Ba 2015) over what is not frozen, at a constant rate."""
        return torch.optim.Adam(
            (p for p in self.parameters() if p.requires_grad),
            lr=self.genes["learning_rate"],
            weight_decay=self.genes.get("weight_decay", 0.0),
            decoupled_weight_decay=True,
            fused=True,
        )

    def on_fit_start(self) -> None:
        """Give a linear probe the statistics of the features that it stands on."""
        if self.behind_prefix:
            return  # the pooled vectors were computed with them
        with self.trainer.precision_plugin.forward_context():
            self.network.fit_neck_statistics(
                self.trainer.datamodule.plain_train_images(self.device)  # type: ignore[attr-defined]
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch, weighted over the whole split.

        Raises:
            Diverged: If a loss since the last check was not finite, or a weight is not.
        """
        loss = self._loss(*batch) if self.n_parts == 1 else self._step_in_parts(*batch)
        if (batch_idx + 1) % BATCHES_BETWEEN_CHECKS == 0:
            self._require_finite("train_loss", float(self.train_loss.total))  # NaN stays in sums
            self._require_finite_weights()
        return loss

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(
            self._logits(x),
            labels,
            reduction="none",
            label_smoothing=self.genes.get("label_smoothing", 0.0),
        )
        weights = self._weights(labels)
        self.train_loss.update(losses.detach(), weights)
        return (losses * weights).mean()  # not over the batch's weights: the split's average 1

    def _step_in_parts(self, x: Tensor, labels: Tensor) -> Tensor:
        """Train one step on a batch, see `train_in_parts`; returns the loss of the batch."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        n_parts = self.n_parts if len(labels) >= 2 * self.n_parts else 1
        total = torch.zeros((), device=labels.device)
        for part in zip(x.tensor_split(n_parts), labels.tensor_split(n_parts), strict=True):
            loss = self._loss(*part) * (len(part[1]) / len(labels))
            self.manual_backward(loss)
            total += loss.detach()
        optimizer.step()
        return total

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the metrics of the validation split.

        Raises:
            Diverged: If a loss since the last check was not finite.
        """
        x, labels = batch
        logits = self._logits(x)
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.val_loss.update(losses, self._weights(labels))
        self.val_accuracy.update(logits, labels)
        self.val_f1.update(logits, labels)
        if (batch_idx + 1) % BATCHES_BETWEEN_CHECKS == 0:
            self._require_finite("val_loss", float(self.val_loss.total))

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's metrics.

        Raises:
            Diverged: If a loss or a weight is not finite.
        """
        metrics = {}
        for name in ("train_loss", "val_loss", "val_accuracy", "val_f1"):
            metric = getattr(self, name)
            metrics[name] = float(metric.compute())
            metric.reset()
        for name in ("train_loss", "val_loss"):
            self._require_finite(name, metrics[name])
        self._require_finite_weights()
        self.log_dict(metrics)
        self.epochs.append(metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the learning curve, and in how many parts batches are trained."""
        checkpoint["epochs"] = self.epochs
        checkpoint["n_parts"] = self.n_parts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take both up again; what began in parts ends in parts."""
        self.epochs = checkpoint.get("epochs", [])
        self.train_in_parts(max(self.n_parts, checkpoint.get("n_parts", 1)))

    def on_train_start(self) -> None:
        """Log the epochs that a checkpoint brought, since loggers begin anew.

        Raises:
            Diverged: If a weight is not finite, a frozen one included.
        """
        self._require_finite_weights(frozen=True)
        for epoch, metrics in enumerate(self.epochs):
            step = (epoch + 1) * int(self.trainer.num_training_batches) - 1
            for logger in self.loggers:
                logger.log_metrics(metrics | {"epoch": epoch}, step)

    def on_test_start(self) -> None:
        """Forget the logits of an earlier test."""
        self.test_logits: list[Tensor] = []

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Keep the logits (B, n_classes) of a batch, in the order of the test split."""
        self.test_logits.append(self(batch[0]).float().cpu())

    def _logits(self, x: Tensor) -> Tensor:
        """Return logits (B, n_classes) for images, or for boundary tensors behind the prefix."""
        logits: Tensor = self.network.suffix(x) if self.behind_prefix else self(x)
        return logits

    def _weights(self, labels: Tensor) -> Tensor:
        """Return what each image counts (B,), for its label (B,)."""
        if self.class_weights is None:
            return torch.ones(len(labels), device=labels.device)
        return self.class_weights[labels]

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(f"diverged: {name} is {value} in epoch {self.current_epoch + 1}")

    def _require_finite_weights(self, *, frozen: bool = False) -> None:
        """Look at parameters and buffers: BN's statistics may be infinite, and no loss show it.

        Args:
            frozen: Whether to look at those that do not change, too.

        Raises:
            Diverged: If some number of them is not finite.
        """
        modules = [self.network] if frozen else self.network.trained()
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        tensors = [t for t in tensors if t.is_floating_point() and t.numel()]
        if not math.isfinite(get_total_norm(tensors, math.inf)):
            named = (*self.network.named_parameters(), *self.network.named_buffers())
            name = next(name for name, t in named if not t.isfinite().all())
            raise Diverged(f"diverged: {name} is not finite in epoch {self.current_epoch + 1}")
