"""The protocol of all backbones: an ordered network that can be cut and frozen.

Shapes: B images, C channels, H by W pixels, K classes.
"""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn


class LayeredNetwork(nn.Module):
    """A network in order: stem, layers, neck, dropout, classifier.

    Cut: only the included layers are handed over, nothing behind them exists.
    Frozen: `freeze` turns the stem and the first layers into a fixed function
    of their input.

    Args:
        stem: What stands in front of the layers; takes images (B, 3, H, W).
        layers: The included layers, each taking what the one before returns.
        neck: Maps what the last layer returns to pooled vectors (B, n_features).
        n_features: Width of the pooled vectors.
        n_classes: K, the classifier's outputs.
        dropout: Probability of dropping a pooled feature, in [0, 1).
        fixed_neck: Whether the neck's normalisation came with pretrained
            weights, so that a linear probe leaves it as it is.
        names: How the backbone's tensors, but for the classifier's, are called by the
            library that its weights come from, and here. All those of the whole
            backbone are listed, so that another network's weights are told.
    """

    def __init__(
        self,
        stem: nn.Module,
        layers: Iterable[nn.Module],
        neck: nn.Module,
        n_features: int,
        n_classes: int,
        dropout: float,
        *,
        fixed_neck: bool,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.neck = neck
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(n_features, n_classes)
        self.fixed_neck = fixed_neck
        self.names = dict(names or {})
        self.n_frozen = 0

    @property
    def n_parameters(self) -> int:
        """The number of parameters, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_trainable(self) -> int:
        """The number of parameters that training moves."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def freeze(self, n_frozen: int) -> None:
        """Make the stem and the first layers a fixed function of their input.

        Their parameters get no gradient, and they stay in eval mode: without
        that, training would still move BN's statistics and drop features. If
        all layers are frozen (a linear probe), the neck is frozen with them.
        An earlier call is undone.

        Args:
            n_frozen: F, the frozen layers, in [0, L]; 0 freezes nothing, not
                even the stem.

        Raises:
            ValueError: If `n_frozen` is outside [0, L].
        """
        if not 0 <= n_frozen <= len(self.layers):
            raise ValueError(f"0 <= n_frozen <= {len(self.layers)} must hold, but got {n_frozen}.")
        self.n_frozen = n_frozen
        self.requires_grad_(True)
        for module in self.frozen():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything but the frozen prefix, which stays in eval mode."""
        super().train(mode)
        for module in self.frozen():
            module.eval()
        return self

    def prefix(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Apply what is frozen, or a part of it.

        Args:
            x: Images (B, 3, H, W), normalised; or what frozen module `start - 1` returns.
            start: The first of the frozen modules to apply.
            stop: The one to stop at; None applies all.

        Returns:
            What crosses the boundary: `x` itself if nothing is frozen, the
            pooled vectors (B, n_features) if all layers are, and otherwise
            what the last frozen layer returns.
        """
        for module in self.frozen()[start:stop]:
            x = module(x)
        return x

    def suffix(self, z: Tensor) -> Tensor:
        """Apply what is trained to a boundary tensor; returns logits (B, K)."""
        for module in self.trained()[:-1]:
            z = module(z)
        logits: Tensor = self.classifier(self.dropout(z))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, K)."""
        return self.suffix(self.prefix(x))

    @property
    def needs_neck_statistics(self) -> bool:
        """Whether `fit_neck_statistics` has something to do: a probe whose BN is new."""
        probe = self.n_frozen == len(self.layers)
        return probe and not self.fixed_neck and bool(self._neck_norms())

    @torch.no_grad()
    def fit_neck_statistics(self, batches: Iterable[Tensor], start: int = 0) -> None:
        """Give a linear probe's BN its statistics, so that pooled vectors are fixed.

        A BN in the neck that brought no pretrained statistics gets the exact
        mean and (biased) variance of its input over all images, with scale 1
        and shift 0. Nothing is done, and no batch is drawn, if some layer is
        trained, if the neck is pretrained, or if it has no BN.

        Args:
            batches: Images (B, 3, H, W), normalised, on the network's device;
                each image of the training split once, in batches of any size.
            start: The first frozen module that they have not passed yet, see `prefix`.

        Raises:
            ValueError: If there are no batches.
        """
        if not self.needs_neck_statistics:
            return
        norm = self._neck_norms()[0]
        norm.reset_parameters()
        sums: list[Tensor] = []  # per batch: count, sum, sum of squares, each (C,)

        def record(_: nn.Module, inputs: tuple[Tensor]) -> None:
            z = (inputs[0].cpu() if inputs[0].is_mps else inputs[0]).double()  # MPS lacks float64
            total = z.sum((0, 2, 3))  # (B, C, H, W) -> (C,)
            count = torch.full_like(total, z.numel() // z.shape[1])
            sums.append(torch.stack((count, total, z.square().sum((0, 2, 3)))))

        hook = norm.register_forward_pre_hook(record)
        try:
            for batch in batches:
                self.prefix(batch, start)
        finally:
            hook.remove()
        if not sums:
            raise ValueError("fit_neck_statistics needs at least one batch.")
        count, total, squares = torch.stack(sums).sum(0)
        mean = total / count
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_((squares / count - mean.square()).clamp(min=0))

    @property
    def _n_fixed(self) -> int:
        """How many of stem, layers and neck are frozen."""
        probe = self.n_frozen == len(self.layers)
        return 1 + self.n_frozen + probe if self.n_frozen else 0

    def frozen(self) -> list[nn.Module]:
        """Return the frozen modules in order: stem, layers, and a linear probe's neck."""
        return [self.stem, *self.layers, self.neck][: self._n_fixed]

    def _neck_norms(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.neck.modules() if isinstance(m, nn.BatchNorm2d)]

    def trained(self) -> list[nn.Module]:
        """Return the modules that training moves, in order; the classifier is the last."""
        return [*[self.stem, *self.layers, self.neck][self._n_fixed :], self.classifier]
