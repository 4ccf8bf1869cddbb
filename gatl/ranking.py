"""The order of trials, best first, wherever gatl compares them.

COMPLETE trials come first, by val_loss. PRUNED ones follow: their fitness is
censored, so they rank behind every chromosome that went further, by the epochs
they reached and then by loss. FAIL comes last. Ties go to the lower number, so
the order is total and does not depend on when a trial ended.
"""

import math
from collections.abc import Iterable

from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Chromosome, SearchSpace

RankKey = tuple[int, int, float, int]


def rank_key(trial: FrozenTrial) -> RankKey:
    """Return the sort key of a finished trial; the smaller, the better.

    Args:
        trial: COMPLETE with its val_loss as value; PRUNED with the user
            attribute ``outcome`` holding ``epochs`` and ``val_loss``; or FAIL.
    """
    if trial.state is TrialState.COMPLETE and trial.value is not None:
        return 0, 0, trial.value, trial.number
    if trial.state is TrialState.PRUNED:
        outcome = trial.user_attrs.get("outcome", {})
        loss = outcome.get("val_loss")
        return 1, -outcome.get("epochs", 0), math.inf if loss is None else loss, trial.number
    return 2, 0, 0.0, trial.number


def incumbent(record: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the best COMPLETE trial, or None if there is none."""
    complete = (trial for trial in record if trial.state is TrialState.COMPLETE)
    return min(complete, key=rank_key, default=None)


def best_distinct(
    record: Iterable[FrozenTrial], space: SearchSpace, k: int
) -> dict[Chromosome, FrozenTrial]:
    """Return the best distinct canonical chromosomes, each with its best trial.

    Args:
        record: Finished trials, in any order; every state takes part.
        space: The space that repairs what the trials hold.
        k: How many, at least 0; fewer come back if the record has no more.

    Returns:
        Chromosome to trial, in the order of rank.
    """
    best: dict[Chromosome, FrozenTrial] = {}
    for trial in sorted(record, key=rank_key):
        if len(best) == k:
            break
        best.setdefault(space.from_dict(trial.params), trial)
    return best
