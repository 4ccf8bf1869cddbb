"""What one evaluation yields, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LARGEST = 1e100
"""No loss or duration is larger, and sums and squares of them are still numbers."""


def fitness(val_loss: float) -> float:
    """Return the fitness, -val_loss: higher is better. The one place that negates."""
    return -val_loss


@dataclass(frozen=True)
class Outcome:
    """The result of one fit, or why there is none.

    Attributes:
        val_loss: Lowest mean cross-entropy over the validation split of the
            fit's epochs, in nats; None if the evaluation failed.
        val_accuracy: Accuracy in [0, 1] at that epoch.
        epochs: Epochs that the fit finished.
        duration_s: Seconds, from building the network to the last epoch.
        trainable_params: Parameters that the optimizer moved.
        total_params: Parameters of the network.
        error: Why the evaluation failed, in one line; None if it did not.
        diverged: Whether it failed because a loss, a weight or a feature was not
            finite. Such a result is as final as a loss; other failures may pass.
        stopped: Whether the fit was cut off on request; it has no result then.
        pruned: Whether it was stopped at a rung; what it has is of the epochs up to there.
        micro_batch: Images that passed the network at once, where memory did not suffice
            for whole batches; their gradients were added up. BN saw no more at a time,
            so the result is not that of whole batches. None otherwise.
        uncached: Whether it could not keep what its frozen layers give: there was no room.
        reused_from: The number of the trial whose result this is, if it was not
            evaluated again.
    """

    val_loss: float | None = None
    val_accuracy: float | None = None
    epochs: int = 0
    duration_s: float = 0.0
    trainable_params: int | None = None
    total_params: int | None = None
    error: str | None = None
    diverged: bool = False
    stopped: bool = False
    pruned: bool = False
    micro_batch: int | None = None
    uncached: bool = False
    reused_from: int | None = None

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Outcome":
        """Return what `to_json` made, wherever it has lain meanwhile.

        Raises:
            TypeError, ValueError: If it cannot have made that.
        """
        outcome = cls(**kept)
        for field in fields(cls):
            value = getattr(outcome, field.name)
            kind = type(value)
            if kind is int and isinstance(0.0, field.type):  # type: ignore[arg-type]
                kind = float  # JSON has one kind of number
            if not issubclass(kind, field.type) or (kind is bool) != (field.type is bool):  # type: ignore[arg-type]
                raise TypeError(f"{field.name} is {value!r}")
            if kind in (int, float) and not abs(value) <= LARGEST:
                raise ValueError(f"{field.name} is no number that can be")
        return outcome

    def to_json(self) -> dict[str, Any]:
        """Return what the study keeps, as JSON data."""
        kept = asdict(self)
        del kept["stopped"]  # a fit that was cut off is not told
        return kept
