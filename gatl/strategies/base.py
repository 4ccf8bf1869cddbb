"""What every strategy is: an Optuna sampler that is a pure function of the record."""

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.streams import Purpose, generator

MAX_WHOLE = 1_000_000
"""No setting has a use for more, and a slip of the hand exceeds it."""

MAX_STEP = 1000.0
"""Ranges of a gene that a step may be wide; beyond a few, every value is as near as any other."""


def require_whole(name: str, value: object, low: int) -> None:
    """Raise a `ValueError` unless a setting is a whole number in [low, 1,000,000]."""
    if type(value) is not int or not low <= value <= MAX_WHOLE:
        raise ValueError(
            f"{name} must be a whole number in [{low}, {MAX_WHOLE}], but got {value!r}"
        )


def require_within(name: str, value: object, low: float, high: float, *, ends: str) -> None:
    """Raise a `ValueError` unless a setting is a number in an interval, such as ends="(]"."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = number and (
        low < value < high  # type: ignore[operator]
        or (value == low and ends[0] == "[")
        or (value == high and ends[1] == "]")
    )
    if not inside:
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"{name} must be a number in {interval}, but got {value!r}")


class Strategy(BaseSampler):
    """A search strategy: what trial n is follows from the seed, n, and the trials before it.

    A strategy holds its settings and no state, so the same seed gives the same
    search, a resumed search is the search that was never killed, and the number
    of workers does not matter.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that are tried first. A gene that one does not name
            is drawn; values outside the space move to its edge.
    """

    def __init__(
        self, *, space: SearchSpace, seed: int, initial: Sequence[Mapping[str, Value]] = ()
    ) -> None:
        self.space = space
        self.seed = seed
        self.initial = tuple(initial)

    @abstractmethod
    def horizon(self, number: int) -> int:
        """Return the number below which all trials must have ended before this one is asked for.

        Args:
            number: A trial's number.

        Returns:
            At most ``number``; the trial is a function of the trials below it.
        """

    @abstractmethod
    def propose(
        self,
        number: int,
        record: Sequence[FrozenTrial],
        pending: Sequence[Chromosome] = (),
    ) -> Chromosome:
        """Return the chromosome of a trial.

        Args:
            number: The trial's number.
            record: All trials numbered below ``horizon(number)``, in order, ended.
            pending: The chromosomes of the trials from there up to this one, in order;
                whether those have ended is nothing that a strategy may know.

        Returns:
            A canonical chromosome of the space.
        """

    def generation(self, number: int) -> int | None:
        """Return the generation of a trial, or None where a strategy has no generations."""
        return None

    def opening(self, number: int) -> Chromosome:
        """Return what a trial is without any record: an initial chromosome, then random draws."""
        rng = generator(self.seed, Purpose.INITIAL, number)
        values = {gene.name: gene.draw(rng) for gene in self.space.genes}
        if number < len(self.initial):
            values |= self.initial[number]
        return self.space.from_dict(values)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the space in Optuna's terms, for `Study.ask`, which then records every gene."""
        return {
            gene.name: IntDistribution(int(gene.low), int(gene.high), log=gene.log)
            if gene.kind is int
            else FloatDistribution(gene.low, gene.high, log=gene.log)
            for gene in self.space.genes
        }

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return every gene's distribution, see `distributions`."""
        return self.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the genes of a trial.

        Raises:
            RuntimeError: If a trial that it depends on has not ended.
        """
        horizon = self.horizon(trial.number)
        trials = study.get_trials(deepcopy=False)
        record, between = trials[:horizon], trials[horizon : trial.number]
        for earlier in record:
            if not earlier.state.is_finished():
                raise RuntimeError(
                    f"Trial {trial.number} depends on every trial numbered below {horizon}, "
                    f"but trial {earlier.number} is {earlier.state.name}."
                )
        # One that was cut off while it was asked for has no genes, or not all of them.
        whole = itertools.takewhile(lambda t: len(t.params) == len(self.space.names), between)
        pending = [self.space.from_dict(earlier.params) for earlier in whole]
        return self.space.to_dict(self.propose(trial.number, record, pending))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:  # noqa: ANN401 - the base class's type
        """Refuse: whatever belongs to the space came from `sample_relative`.

        Raises:
            ValueError: Always; the parameter, or its range, is not the space's.
        """
        raise ValueError(
            f"{param_name} must be a gene of the space with the space's range, but got "
            f"{param_distribution}; the space is {self.distributions()}."
        )
