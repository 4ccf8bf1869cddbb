"""Simulated annealing."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Chromosome, SearchSpace, Value
from gatl.ranking import incumbent
from gatl.strategies.base import MAX_STEP, Strategy, require_whole, require_within
from gatl.strategies.operators.neighbour import neighbour
from gatl.streams import Purpose, generator

_RETRIES = 20
"""How often a neighbour that the chain has tried is drawn again."""


@dataclass(frozen=True)
class _State:
    """Where a chain stands after its trials.

    Attributes:
        trials: Those that led here.
        known: Their chromosomes.
        current: From where it moves on; None before any trial has completed.
        best: The best that it has seen.
        scale: The initial temperature, in nats.
        moves: Since it began, or began again.
        rejected: Moves in a row that were not accepted.
    """

    trials: list[FrozenTrial]
    known: frozenset[Chromosome] = frozenset()
    current: FrozenTrial | None = None
    best: FrozenTrial | None = None
    scale: float = 0.0
    moves: int = 0
    rejected: int = 0


class Annealing(Strategy):
    """Simulated annealing (Kirkpatrick, Gelatt & Vecchi 1983), in independent chains.

    Trial n belongs to chain n mod chains. A chain tries ``n_opening`` chromosomes, the
    initial ones and random ones, and starts at the best. Then it moves: from a
    chromosome to a neighbour that costs d nats more, with the acceptance probability
    min(1, exp(-d / T)), and to every better one. The temperature T falls geometrically
    with every move.

    The initial temperature is such that the median difference between the first
    chromosomes would be accepted with ``initial_acceptance`` (Johnson et al. 1989); where
    fewer than two of them have completed, it is 0 until two have. Trials that failed or
    were stopped early are never accepted.

    Departures from the paper: T falls with each move and not after many, because an
    evaluation is dear; for the same reason a neighbour that the chain has tried is drawn
    again, a few times at most; and a chain that is stuck starts again from the best it
    has seen, at the initial temperature.

    Args:
        space: The genes to search.
        seed: The run's seed, in [0, 2**32).
        initial: Chromosomes that are tried first.
        chains: Chains, and so the fits that can run at once, in [1, inf).
        n_opening: Trials of a chain before it moves, in [1, inf); more if the initial
            chromosomes are more.
        initial_acceptance: See above, in (0, 1).
        cooling: What T is multiplied with after a move, in (0, 1].
        step: How far a neighbour is, as a share of each gene's range, in (0, 1000].
        patience: Rejected moves in a row after which a chain starts again, in [1, inf).
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        seed: int,
        initial: Sequence[Mapping[str, Value]] = (),
        chains: int,
        n_opening: int,
        initial_acceptance: float,
        cooling: float,
        step: float,
        patience: int,
    ) -> None:
        for name, value in {"chains": chains, "n_opening": n_opening, "patience": patience}.items():
            require_whole(name, value, 1)
        require_within("initial_acceptance", initial_acceptance, 0, 1, ends="()")
        require_within("cooling", cooling, 0, 1, ends="(]")
        require_within("step", step, 0, MAX_STEP, ends="(]")
        super().__init__(space=space, seed=seed, initial=initial)
        self.chains = chains
        self.n_opening = max(n_opening, math.ceil(len(self.initial) / chains))
        self.initial_acceptance = initial_acceptance
        self.cooling = cooling
        self.step = step
        self.patience = patience
        # Each chain's last state: it only saves going through the chain from its beginning.
        self._memo: dict[int, _State] = {}

    def horizon(self, number: int) -> int:
        """Return what lies behind the trial before it in its chain."""
        return 0 if number < self.chains * self.n_opening else number - self.chains + 1

    def propose(
        self,
        number: int,
        record: Sequence[FrozenTrial],
        pending: Sequence[Chromosome] = (),
    ) -> Chromosome:
        """Return the chromosome of a trial, see `Strategy.propose`."""
        if number < self.chains * self.n_opening:
            return self.opening(number)
        state = self._state(number % self.chains, record)
        if state.current is None:
            return self.opening(number)
        here = self.space.from_dict(state.current.params)
        rng = generator(self.seed, Purpose.OFFSPRING, number)
        for _ in range(_RETRIES):
            there = neighbour(here, self.space, self.step, rng)
            if there not in state.known:
                break
        return there

    def temperature(self, state: _State) -> float:
        """Return the temperature of a chain's next move, in nats."""
        return state.scale * self.cooling**state.moves

    def _state(self, chain: int, record: Sequence[FrozenTrial]) -> _State:
        """Return where a chain stands after its trials in the record."""
        trials = list(record[chain :: self.chains])
        state = self._memo.get(chain, _State([]))
        if state.trials != trials[: len(state.trials)]:  # by identity, so fast
            state = _State([])
        for end in range(len(state.trials) + 1, len(trials) + 1):
            trial = trials[end - 1]
            known = state.known | {self.space.from_dict(trial.params)}
            state = replace(self._after(state, trial), trials=trials[:end], known=known)
        self._memo[chain] = state
        return state

    def _after(self, state: _State, trial: FrozenTrial) -> _State:
        """Return where a chain stands after one trial more."""
        opening = len(state.trials) < self.n_opening
        if opening or state.scale == 0:
            state = replace(state, scale=self._scale([*state.trials, trial]))
        best = incumbent(t for t in (state.best, trial) if t is not None)
        if opening or state.current is None:
            return replace(state, current=best, best=best)
        moved = replace(state, best=best, moves=state.moves + 1)
        if self._accepts(state, trial):
            return replace(moved, current=trial, rejected=0)
        if state.rejected + 1 < self.patience:
            return replace(moved, rejected=state.rejected + 1)
        return replace(moved, current=best, moves=0, rejected=0)

    def _accepts(self, state: _State, trial: FrozenTrial) -> bool:
        if trial.state is not TrialState.COMPLETE:
            return False
        assert state.current is not None
        worse = trial.values[0] - state.current.values[0]
        if worse <= 0:
            return True
        temperature = self.temperature(state)
        chance = generator(self.seed, Purpose.ACCEPTANCE, trial.number).random()
        return temperature > 0 and chance < math.exp(-worse / temperature)

    def _scale(self, opening: Sequence[FrozenTrial]) -> float:
        """Return the initial temperature that suits a chain's first trials; 0 if they tell none."""
        losses = [t.values[0] for t in opening if t.state is TrialState.COMPLETE]
        differences = [abs(a - b) for a, b in combinations(losses, 2) if math.isfinite(a - b)]
        if not differences:
            return 0.0
        return float(statistics.median(differences)) / -math.log(self.initial_acceptance)
