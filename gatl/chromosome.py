"""Chromosomes: genes and their ranges, the search space, repair and canonical form.

A chromosome is an immutable tuple of numbers, one for each gene of the space
and in the space's order. Nothing here imports torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Value = int | float
Chromosome = tuple[Value, ...]


@dataclass(frozen=True)
class KnownGene:
    """What a gene of the classifier can be: its kind, and the limits that give it a meaning.

    Attributes:
        kind: ``int`` or ``float``, the native type of its values.
        low: Lower limit.
        high: Upper limit; infinite where only the network sets one.
        open_low: Whether ``low`` itself is excluded.
        open_high: Whether ``high`` itself is excluded.
    """

    kind: type[int] | type[float]
    low: Value
    high: Value
    open_low: bool = False
    open_high: bool = False

    def allows(self, value: Value) -> bool:
        """Return whether a value lies within the limits."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    @property
    def interval(self) -> str:
        """The limits in interval notation, such as ``[0, 1)``."""
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


KNOWN_GENES = {
    "included_layers": KnownGene(int, 1, math.inf, open_high=True),
    "frozen_layers": KnownGene(int, 0, math.inf, open_high=True),
    "learning_rate": KnownGene(float, 0, 1, open_low=True),
    "dropout": KnownGene(float, 0, 1, open_high=True),
    "weight_decay": KnownGene(float, 0, 1),
    "label_smoothing": KnownGene(float, 0, 1, open_high=True),
}
"""The genes that the classifier understands."""


@dataclass(frozen=True)
class Gene:
    """One gene: a range [low, high], both ends included; a fixed gene has ``low == high``.

    Attributes:
        name: One of `KNOWN_GENES`.
        low: Smallest value.
        high: Largest value.
        log: Whether values are drawn log-uniformly; then ``low`` is above 0.

    Raises:
        ValueError: If the name is unknown or the range is none.
    """

    name: str
    low: Value
    high: Value
    log: bool = False

    def __post_init__(self) -> None:
        """Check the invariants."""
        got = f"but got (low={self.low}, high={self.high}) for {self.name}."
        if self.name not in KNOWN_GENES:
            raise ValueError(
                f"A gene must be one of {', '.join(KNOWN_GENES)}, but got {self.name}."
            )
        if not self.low <= self.high:
            raise ValueError(f"`low <= high` must hold, {got}")
        if self.log and not self.low > 0:
            raise ValueError(f"`low > 0` must hold for `log=True`, {got}")

    @property
    def kind(self) -> type[int] | type[float]:
        """The native type of the gene's values."""
        return KNOWN_GENES[self.name].kind

    def draw(self, rng: np.random.Generator) -> Value:
        """Draw a value: uniform, or log-uniform if `log`; every integer of a range alike."""
        if self.log:
            # An integer owns the reals that round to it, so that the two ends get their share.
            margin = 0.5 if self.kind is int else 0.0
            ends = math.log(self.low - margin), math.log(self.high + margin)
            return self.clip(math.exp(rng.uniform(*ends)))  # exp(log(x)) may leave the range
        if self.kind is int:
            return int(rng.integers(int(self.low), int(self.high), endpoint=True))
        return self.clip(rng.uniform(self.low, self.high))

    def clip(self, value: Value) -> Value:
        """Return the nearest value of the range, in the gene's native type.

        Raises:
            ValueError: If the value is NaN.
        """
        kind = self.kind
        if type(value) is kind and self.low <= value <= self.high:  # as nearly all are
            return value
        if math.isnan(value):
            raise ValueError(f"A value of {self.name} must be a number, but got {value}.")
        nearest = min(max(value, self.low), self.high)
        return round(nearest) if kind is int else float(nearest)


@dataclass(frozen=True)
class SearchSpace:
    """The genes of a search, in a fixed order.

    ``included_layers`` L and ``frozen_layers`` F are always among them. A
    chromosome with F > L is repaired to F = L (a linear probe: everything that
    exists is frozen); that form is the *canonical* one, and two chromosomes
    with one canonical form are the same individual.

    Attributes:
        genes: Distinct genes.

    Raises:
        ValueError: If genes are missing or doubled, or F's lowest value
            exceeds L's, so that a repaired chromosome could leave the space.
    """

    genes: tuple[Gene, ...]

    def __post_init__(self) -> None:
        """Check the invariants."""
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"Genes must be distinct, but got {', '.join(self.names)}.")
        if not {"included_layers", "frozen_layers"} <= set(self.names):
            raise ValueError(
                f"included_layers and frozen_layers must be genes, but got {', '.join(self.names)}."
            )
        included, frozen = (self.genes[i].low for i in self._depths)
        if frozen > included:
            raise ValueError(
                "`frozen_layers.low <= included_layers.low` must hold, "
                f"but got (frozen_layers.low={frozen}, included_layers.low={included})."
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The genes' names, in order."""
        return tuple(gene.name for gene in self.genes)

    @cached_property
    def _depths(self) -> tuple[int, int]:
        return self.names.index("included_layers"), self.names.index("frozen_layers")

    def draw(self, rng: np.random.Generator) -> Chromosome:
        """Draw every gene, then repair."""
        return self.repair([gene.draw(rng) for gene in self.genes])

    def repair(self, values: Sequence[Value]) -> Chromosome:
        """Return the canonical form: each gene inside its range and native, and F <= L.

        Args:
            values: One number for each gene, in order.

        Raises:
            ValueError: If a value is NaN, or there are more or fewer than genes.
        """
        repaired = [gene.clip(value) for gene, value in zip(self.genes, values, strict=True)]
        included, frozen = self._depths
        repaired[frozen] = min(repaired[frozen], repaired[included])
        return tuple(repaired)

    def to_dict(self, chromosome: Chromosome) -> dict[str, Value]:
        """Name the values of a chromosome."""
        return dict(zip(self.names, chromosome, strict=True))

    def from_dict(self, values: Mapping[str, Value]) -> Chromosome:
        """Return the canonical chromosome of named values.

        Raises:
            ValueError: If the names are not exactly those of the genes.
        """
        if values.keys() != set(self.names):
            raise ValueError(
                f"A chromosome must name {', '.join(self.names)}, but got {', '.join(values)}."
            )
        return self.repair([values[name] for name in self.names])
