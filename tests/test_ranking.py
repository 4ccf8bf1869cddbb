"""The order of trials."""

import math
import random

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatl.chromosome import Gene, SearchSpace
from gatl.ranking import best_distinct, incumbent, rank_key

SPACE = SearchSpace((Gene("included_layers", 1, 58), Gene("frozen_layers", 0, 18)))
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def trial(
    number: int,
    state: TrialState,
    loss: float | None = None,
    epochs: int = 0,
    genes: tuple[int, int] = (1, 0),
) -> FrozenTrial:
    made = create_trial(
        state=state,
        value=loss if state is COMPLETE else None,
        params={"included_layers": genes[0], "frozen_layers": genes[1]},
        distributions={
            "included_layers": IntDistribution(1, 58),
            "frozen_layers": IntDistribution(0, 18),
        },
        user_attrs={"outcome": {"epochs": epochs, "val_loss": loss}},
    )
    made.number = number
    return made


def test_complete_then_pruned_then_fail_and_ties_to_the_lower_number() -> None:
    best_first = [
        trial(7, COMPLETE, 0.1),
        trial(2, COMPLETE, 0.5),
        trial(3, COMPLETE, 0.5),
        trial(9, COMPLETE, math.inf),
        trial(8, PRUNED, 0.9, epochs=4),
        trial(5, PRUNED, 0.2, epochs=2),
        trial(6, PRUNED, 0.2, epochs=2),
        trial(1, PRUNED, 0.3, epochs=2),
        trial(0, PRUNED, None, epochs=2),
        trial(4, FAIL),
        trial(10, FAIL),
    ]
    shuffled = random.Random(0).sample(best_first, len(best_first))
    assert sorted(shuffled, key=rank_key) == best_first


def test_a_pruned_trial_without_an_outcome_ranks_before_fail_only() -> None:
    bare = create_trial(state=PRUNED, params={}, distributions={})
    assert rank_key(trial(1, PRUNED, 9.0, epochs=1)) < rank_key(bare) < rank_key(trial(2, FAIL))


def test_incumbent_is_the_best_complete_trial_or_none() -> None:
    assert incumbent([]) is None
    assert incumbent([trial(0, FAIL), trial(1, PRUNED, 0.1, epochs=9)]) is None
    found = incumbent([trial(0, PRUNED, 0.1, 9), trial(1, COMPLETE, 0.7), trial(2, COMPLETE, 0.7)])
    assert found is not None
    assert found.number == 1


def test_best_distinct_repairs_and_keeps_the_best_trial_of_each() -> None:
    record = [
        trial(0, FAIL, genes=(9, 9)),
        trial(1, COMPLETE, 0.5, genes=(5, 18)),  # unrepaired: (5, 5) in truth
        trial(2, COMPLETE, 0.3, genes=(5, 5)),
        trial(3, PRUNED, 0.1, epochs=1, genes=(7, 0)),
        trial(4, COMPLETE, 0.4, genes=(8, 0)),
    ]
    numbers = {genes: best.number for genes, best in best_distinct(record, SPACE, 9).items()}
    assert numbers == {(5, 5): 2, (8, 0): 4, (7, 0): 3, (9, 9): 0}
    assert list(numbers) == [(5, 5), (8, 0), (7, 0), (9, 9)]
    assert list(best_distinct(record, SPACE, 2)) == [(5, 5), (8, 0)]
    assert best_distinct(record, SPACE, 0) == {}
    assert best_distinct([], SPACE, 3) == {}


def test_a_trial_of_another_sampler_is_clipped_into_a_narrower_space() -> None:
    wide = create_trial(
        value=0.1,
        params={"included_layers": 58, "frozen_layers": 18, "dropout": 0.9},
        distributions={
            "included_layers": IntDistribution(1, 58),
            "frozen_layers": IntDistribution(0, 18),
            "dropout": FloatDistribution(0.1, 0.9),
        },
    )
    narrow = SearchSpace((*SPACE.genes, Gene("dropout", 0.2, 0.4)))
    assert list(best_distinct([wide], narrow, 1)) == [(58, 18, 0.4)]
