"""Completes the splits of a source, stratified."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gatl.data.source import Source
from gatl.errors import UserError
from gatl.streams import Purpose, generator

HELD_OUT = 0.15
"""The share of train that a missing validation or test split takes."""


def complete_splits(source: Source, split_seed: int) -> Source:
    """Take the splits that a source lacks from its training split.

    Each missing split gets 15 % of every class, at least one image, so a source
    with one split becomes 70/15/15. Which images depends on the seed and on the
    source's order alone; the order is kept within the splits.

    Args:
        source: Images with a training split at least.
        split_seed: In [0, 2**32).

    Returns:
        The source with three disjoint splits that together hold all its images.

    Raises:
        UserError: If there is only one class, a split is empty, or a class has
            too few training images to leave one in every split.
    """
    if len(source.classes) < 2:
        raise UserError(
            f"At least 2 classes are needed, but got {len(source.classes)}"
            f" ({', '.join(source.classes) or 'none'})."
        )
    given: dict[str, Any] = {"train": source.train, "val": source.val, "test": source.test}
    for name, split in given.items():
        if split is not None and len(split) == 0:
            raise UserError(f"The {name} split has no images; add some or leave the split out.")
    missing = [name for name, split in given.items() if split is None]
    parts: dict[str, list[npt.NDArray[np.intp]]] = {"train": [], **{name: [] for name in missing}}
    for index, label in enumerate(source.classes):
        members = np.flatnonzero(source.train.labels == index)
        n = len(members)
        if n <= len(missing):
            raise UserError(
                f"Class {label!r} has too few images to split: "
                f"at least {len(missing) + 1} are needed in train, but got {n}."
            )
        shuffled = generator(split_seed, Purpose.SPLIT, index).permutation(members)
        size = max(1, int(HELD_OUT * n + 0.5))
        for k, name in enumerate(missing):
            parts[name].append(shuffled[k * size : (k + 1) * size])
        parts["train"].append(shuffled[len(missing) * size :])
    taken = {
        name: source.train.subset(np.sort(np.concatenate(part))) for name, part in parts.items()
    }
    return Source(source.classes, **(given | taken)) if missing else source
