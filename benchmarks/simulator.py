"""Searches over a recorded landscape: real strategies and the real driver, fits foretold.

    python benchmarks/simulator.py

A landscape is a table of real fits that `landscape` made. Regressors foretell the logarithm of
the lowest val_loss up to each epoch: gradient-boosted trees, and a Gaussian process; each
flatters other strategies, so there are results for both. A classifier foretells divergence,
a third regressor the time. The noise between seeds is drawn from what the fits with several
seeds show, and is the same for the same run's seed and chromosome. `SimulatedEvaluator` puts
them in the place of fits, with a clock of its own, so that a search of hundreds of trials takes
about a second.

As a command: how well what is foretold agrees with fits that were held back, and the noise,
printed and written to ``results=FILE``, by default ``benchmarks/results/simulator.json``.

Options and their defaults: ``names=`` of landscapes, separated by commas (all), ``folds=10``.
"""

import csv
import functools
import heapq
import math
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from common import RESULTS, options, origin, table, whole
from landscape import LANDSCAPES
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from scipy.stats import spearmanr
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel
from sklearn.model_selection import KFold

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.errors import UserError
from gatl.evaluation import Fit
from gatl.files import write_json
from gatl.outcome import Outcome
from gatl.progress import View
from gatl.search import Search
from gatl.strategies.build import build_strategy

Array = NDArray[np.float64]
GENES = ("included_layers", "frozen_layers", "learning_rate", "dropout")
N_LAYERS = 58
"""Layers of the DenseNets; a landscape is of one of them."""
NEAR = (0.02, 0.05, 0.1)
FEW = 16
"""Chromosomes up to which walking the trees here is faster than scikit-learn."""
SHRINKAGE = 0.05
"""Of the boosted trees."""
BANDWIDTH = 0.5
"""Decades of learning rate over which the noise is told alike."""
DEFAULTS = {"names": "", "folds": "10", "results": str(RESULTS / "simulator.json")}


@dataclass(frozen=True)
class Table:
    """The fits of a landscape.

    Attributes:
        chromosomes: (n_fits,) the number in the design.
        genes: (n_fits, 4) in the order of `GENES`.
        losses: (n_fits, epochs) log of the lowest val_loss up to each epoch; NaN of a failed fit.
        seconds: (n_fits,) of an epoch; NaN of a failed fit.
    """

    chromosomes: NDArray[np.int64]
    genes: Array
    losses: Array
    seconds: Array

    @property
    def failed(self) -> NDArray[np.bool_]:
        """(n_fits,) whether a fit diverged."""
        return np.isnan(self.losses[:, -1])

    @property
    def repeated(self) -> list[tuple[Array, Array]]:
        """Genes (4,) and losses (n_seeds, epochs) of the chromosomes with several whole fits."""
        of = self.chromosomes
        several = [of == n for n in np.unique(of) if np.sum(of == n) > 1]
        return [(self.genes[i][0], self.losses[i]) for i in several if not self.failed[i].any()]

    def means(self, values: Array) -> tuple[Array, Array]:
        """Return genes and mean values of each chromosome that did not diverge."""
        of = self.chromosomes
        numbers = [n for n in np.unique(of) if not self.failed[of == n].any()]
        return (
            np.array([self.genes[of == n][0] for n in numbers]),
            np.array([values[of == n].mean(0) for n in numbers]),
        )


def read(path: Path) -> Table:
    """Read the table of a landscape."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name.startswith("val_loss_")]
    losses = np.array([[float(row[column] or "nan") for column in columns] for row in rows])
    failed = np.array([row["state"] != "COMPLETE" for row in rows])
    losses[failed] = np.nan
    seconds = np.array([float(row["duration_s"]) / len(columns) for row in rows])
    return Table(
        np.array([int(row["chromosome"]) for row in rows]),
        np.array([[float(row[name]) for name in GENES] for row in rows]),
        np.log(np.minimum.accumulate(losses, axis=1)),
        np.where(failed, np.nan, seconds),
    )


def features(genes: Array) -> Array:
    """Return what the regressors see of chromosomes, (n, 6): the genes, and what they train."""
    included, frozen, learning_rate, dropout = genes.T
    return np.column_stack(
        [
            *(included / N_LAYERS, frozen / N_LAYERS, np.log10(learning_rate), dropout),
            *(np.log1p(included - frozen), included == frozen),
        ]
    )


def stacked(rows: Sequence[NDArray[Any]], width: int) -> NDArray[Any]:
    """Return rows of several lengths as one array, (len(rows), width), zeros at the ends."""
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


class Trees:
    """Gradient-boosted trees (Friedman 2001), some for each column of values.

    A search asks for one chromosome at a time, of which scikit-learn spends nearly all time on
    checks; so of a few, all trees are walked at once, in arrays of (trees, nodes).
    """

    def __init__(self, x: Array, y: Array) -> None:
        self._columns = columns = [
            GradientBoostingRegressor(
                n_estimators=300,
                learning_rate=SHRINKAGE,
                max_depth=4,
                subsample=0.7,
                random_state=0,
            ).fit(x, column)
            for column in y.T
        ]
        trees = [tree.tree_ for column in columns for tree in column.estimators_[:, 0]]
        n_nodes = max(tree.node_count for tree in trees)
        self._depth = max(tree.max_depth for tree in trees)
        here = [np.arange(tree.node_count) for tree in trees]
        # A leaf has itself for both of its children.
        below = [
            np.where(tree.children_left < 0, own, side)
            for tree, own in zip(trees, here, strict=True)
            for side in (tree.children_left, tree.children_right)
        ]
        self._left, self._right = stacked(below[::2], n_nodes), stacked(below[1::2], n_nodes)
        self._feature = stacked([np.maximum(tree.feature, 0) for tree in trees], n_nodes)
        self._threshold = stacked([tree.threshold for tree in trees], n_nodes)
        self._value = stacked([SHRINKAGE * tree.value[:, 0, 0] for tree in trees], n_nodes)
        self._start = np.array([column.init_.constant_.item() for column in columns])

    def predict(self, x: Array) -> Array:
        """Foretell values, (n, columns)."""
        if len(x) > FEW:
            return np.column_stack([column.predict(x) for column in self._columns])
        x = x.astype(np.float32)  # as scikit-learn does
        trees, row = np.arange(len(self._value)), np.arange(len(x))[:, None]
        node = np.zeros((len(x), len(trees)), np.intp)
        for _ in range(self._depth):
            left = x[row, self._feature[trees, node]] <= self._threshold[trees, node]
            node = np.where(left, self._left[trees, node], self._right[trees, node])
        values = self._value[trees, node].reshape(len(x), len(self._start), -1)
        return self._start + values.sum(2)

    def again(self, x: Array, y: Array) -> "Trees":
        """Learn other values."""
        return Trees(x, y)


class Process:
    """A Gaussian process (Rasmussen & Williams 2006), one length for each feature.

    Args:
        x: Features.
        y: Values, a column each; the last one says what the lengths are.
        kernel: What is known of them.
    """

    def __init__(self, x: Array, y: Array, kernel: Kernel | None = None) -> None:
        if kernel is None:
            lengths = np.array([0.5, 0.5, 1.0, 0.5, 1.0, 1.0])
            kernel = ConstantKernel() * Matern(lengths, (1e-2, 1e2), nu=2.5) + WhiteKernel(0.01)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its limit
                kernel = GaussianProcessRegressor(kernel, normalize_y=True).fit(x, y[:, -1]).kernel_
        self._kernel = kernel
        self._model = GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True).fit(x, y)

    def predict(self, x: Array) -> Array:
        """Foretell values, (n, columns)."""
        return self._model.predict(x).reshape(len(x), -1)

    def again(self, x: Array, y: Array) -> "Process":
        """Learn other values, with the same lengths."""
        return Process(x, y, self._kernel)


FAMILIES: dict[str, type[Trees] | type[Process]] = {"trees": Trees, "process": Process}


class Noise(NamedTuple):
    """How fits of one chromosome differ by their seed.

    Attributes:
        learning_rates: (n,) log10, of the chromosomes with several seeds.
        variances: (n,) of the log of the val_loss at the end.
        factor: (epochs, epochs) turns independent normal draws into deviations at all
            epochs, whose variance at the end is 1.
    """

    learning_rates: Array
    variances: Array
    factor: Array

    def sd(self, learning_rate: float) -> float:
        """Return the standard deviation of the log of the val_loss."""
        far = (self.learning_rates - math.log10(learning_rate)) / BANDWIDTH
        weights = np.exp(-0.5 * np.minimum(far**2, 100))
        return float(np.sqrt(weights @ self.variances / weights.sum()))


def noise(data: Table) -> Noise:
    """Return the noise of the chromosomes that have several seeds."""
    rates, variances, deviations = [], [], []
    for genes, mine in data.repeated:
        rates.append(math.log10(genes[2]))
        variances.append(mine[:, -1].var(ddof=1))
        deviations.append((mine - mine.mean(0)) * math.sqrt(len(mine) / (len(mine) - 1)))
    scaled = [
        d / math.sqrt(variance)
        for d, variance in zip(deviations, variances, strict=True)
        if variance
    ]
    covariance = np.cov(np.concatenate(scaled).T, ddof=0)
    covariance /= covariance[-1, -1]
    jitter = 1e-9 * np.eye(len(covariance))
    return Noise(np.array(rates), np.array(variances), np.linalg.cholesky(covariance + jitter))


def not_rising(losses: Array) -> Array:
    """Raise losses to those of later epochs, (n, epochs); the last is foretold best."""
    return np.maximum.accumulate(losses[:, ::-1], axis=1)[:, ::-1]


class Landscape:
    """What fits would yield, foretold from a table.

    Args:
        data: The table.
        family: Of the regressors, in `FAMILIES`.

    Attributes:
        regressor: Of the logs of val_loss.
        n_epochs: Of the fits.
    """

    def __init__(self, data: Table, family: str) -> None:
        genes, losses = data.means(data.losses)
        _, seconds = data.means(np.log(data.seconds)[:, None])
        self.regressor = FAMILIES[family](features(genes), losses)
        self._seconds = Trees(features(genes), seconds)
        self._noise = noise(data)
        self._fails: GradientBoostingClassifier | None = None
        if data.failed.any():
            self._fails = GradientBoostingClassifier(n_estimators=100, max_depth=2, random_state=0)
            self._fails.fit(features(data.genes), data.failed)
        self.n_epochs = data.losses.shape[1]

    def losses(self, genes: Array) -> Array:
        """Return the log of the lowest val_loss up to each epoch, (n, epochs), without noise."""
        return not_rising(self.regressor.predict(features(genes)))

    def failure(self, genes: Array) -> Array:
        """Return the probability that each diverges, (n,)."""
        if self._fails is None:
            return np.zeros(len(genes))
        return self._fails.predict_proba(features(genes))[:, 1]

    @property
    def optimum(self) -> float:
        """The lowest val_loss of a dense grid that seldom diverges, without noise."""
        return self._best[0]

    @property
    def best(self) -> dict[str, float]:
        """The chromosome that has it."""
        return dict(zip(GENES, self._best[1], strict=True))

    @functools.cached_property
    def _best(self) -> tuple[float, tuple[float, ...]]:
        """The optimum and its chromosome: of the whole space, then closer by for its layers."""
        rates, drops = np.geomspace(1e-6, 1e-1, 51), np.linspace(0.1, 0.9, 17)
        _, (included, frozen, rate, drop) = min(
            self._lowest(list(product([included], range(min(included, 18) + 1), rates, drops)))
            for included in range(1, N_LAYERS + 1)
        )
        rates = np.clip(rate * np.geomspace(0.8, 1.25, 41), 1e-6, 1e-1)
        drops = np.clip(drop + np.linspace(-0.05, 0.05, 21), 0.1, 0.9)
        return self._lowest(list(product([included], [frozen], rates, drops)))

    def _lowest(self, genes: list[tuple[float, ...]]) -> tuple[float, tuple[float, ...]]:
        """Return the lowest val_loss of chromosomes that seldom diverge, and the chromosome."""
        grid = np.array(genes, float)
        losses = np.where(self.failure(grid) > 0.5, np.inf, self.losses(grid)[:, -1])
        return math.exp(losses.min()), tuple(grid[losses.argmin()].tolist())

    def outcome(self, fit: Fit, since: int) -> Outcome:
        """Return what a fit yields, the same for the same seed and chromosome.

        Args:
            fit: What is asked for.
            since: The epochs that it went on from.
        """
        genes = np.array([[fit.genes[name] for name in GENES]], float)
        rng = np.random.default_rng(fit.seed)
        fails, drawn = rng.random() < self.failure(genes)[0], rng.standard_normal(self.n_epochs)
        seconds = math.exp(self._seconds.predict(features(genes)).item())
        if fails:
            return Outcome(error="diverged", diverged=True, epochs=1, duration_s=seconds)
        deviations = self._noise.sd(genes[0, 2]) * self._noise.factor @ drawn
        (losses,) = not_rising(self.losses(genes) + deviations)
        return Outcome(
            val_loss=math.exp(losses[fit.epochs - 1]),
            epochs=fit.epochs,
            duration_s=seconds * (fit.epochs - since),
        )


class SimulatedEvaluator:
    """Workers whose fits end when a clock that nobody waits for says so.

    Args:
        landscape: Foretells them.
        n_workers: How many fits run at once.

    Attributes:
        now: Simulated seconds since the beginning.
    """

    def __init__(self, landscape: Landscape, n_workers: int) -> None:
        self.n_workers = n_workers
        self.now = 0.0
        self._landscape = landscape
        self._running: list[tuple[float, int, Outcome]] = []
        self._reached: dict[int, int] = {}

    @property
    def n_free(self) -> int:
        """How many more fits it takes now."""
        return self.n_workers - len(self._running)

    def submit(self, key: int, fit: Fit) -> None:
        """Foretell a fit, or the next stretch of one."""
        outcome = self._landscape.outcome(fit, self._reached.get(key, 0))
        self._reached[key] = outcome.epochs
        heapq.heappush(self._running, (self.now + outcome.duration_s, key, outcome))

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        """Put the clock to where the first fit ends, and return that."""
        end, key, outcome = heapq.heappop(self._running)
        self.now = max(self.now, end)  # a driver that is behind comes later
        return [(key, outcome)]

    def epochs_done(self, key: int) -> float:
        """Return nothing that anybody could see."""
        return 0.0

    def close(self, *, now: bool = False) -> None:
        """Do nothing: there are no workers."""


class Clocked(View):
    """Shows nothing, and remembers when each trial ended.

    Attributes:
        ends: Simulated seconds by the trial's number.
    """

    def __init__(self, evaluator: SimulatedEvaluator) -> None:
        self.ends: dict[int, float] = {}
        self._evaluator = evaluator

    def resumed(self, trials: Sequence[FrozenTrial]) -> None:
        """Show nothing."""

    def started(self, number: int, genes: Mapping[str, float]) -> None:
        """Show nothing."""

    def paused(self, number: int, genes: Mapping[str, float], outcome: Outcome) -> None:
        """Show nothing."""

    def ended(self, trial: FrozenTrial) -> None:
        """Remember when."""
        self.ends[trial.number] = self._evaluator.now

    def tick(self) -> None:
        """Show nothing."""


class DriverTime(NamedTuple):
    """What the driver takes, one trial after another: simulated seconds.

    Attributes:
        begin: To choose and record a trial.
        take: To take and record an outcome, be it of a rung.
    """

    begin: float
    take: float


class Paced(optuna.storages.InMemoryStorage):
    """A record at which the driver's time passes on the simulated clock."""

    def __init__(self, evaluator: SimulatedEvaluator, driver: DriverTime) -> None:
        super().__init__()
        self._evaluator, self._driver = evaluator, driver

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Begin a trial."""
        self._evaluator.now += self._driver.begin
        return super().create_new_trial(study_id, template_trial)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: ANN401
        """Take an outcome."""
        self._evaluator.now += self._driver.take
        super().set_trial_user_attr(trial_id, key, value)


def searched(
    config: Config,
    landscape: Landscape,
    n_workers: int,
    driver: DriverTime = DriverTime(0.0, 0.0),  # noqa: B008 - a tuple of numbers
) -> tuple[list[FrozenTrial], list[float]]:
    """Search a landscape with gatl's driver, the record in memory.

    Args:
        config: The run's configuration, with ``trainer.max_epochs`` of the landscape.
        landscape: In the place of data and network.
        n_workers: Fits at once.
        driver: What the driver itself takes; nothing, unless it is to be seen.

    Returns:
        The trials by number, and when each ended, in simulated seconds.
    """
    strategy = build_strategy(config)
    if strategy.generation(0) is None:
        config = replace(config, pruner=None)  # as a session does
    evaluator, stop = SimulatedEvaluator(landscape, n_workers), threading.Event()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=Paced(evaluator, driver), sampler=strategy)
    view = Clocked(evaluator)
    with tempfile.TemporaryDirectory() as folder:
        Search(config, study, strategy, evaluator, Path(folder), view, stop, stop).run()
    trials = study.get_trials(deepcopy=False)
    return trials, [view.ends[trial.number] for trial in trials]


def main() -> None:
    """Hold fits back, foretell them, and say how well."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if extra:
        raise UserError(f"{extra[0]!r} is no option; they are {', '.join(DEFAULTS)}.")
    result = {
        name: measured(name, whole("folds", given["folds"])) for name in named(given["names"])
    }
    write_json(Path(given["results"]), {**origin(), "landscapes": result})
    print(markdown(result))


def named(names: str) -> list[str]:
    """Return the names of landscapes, separated by commas, or all that there are."""
    found = [name for name in names.split(",") if name]
    found = found or sorted(path.stem for path in LANDSCAPES.glob("*.csv"))
    if not found:
        raise UserError("There is no landscape: make one with benchmarks/landscape.py")
    if missing := [name for name in found if not (LANDSCAPES / f"{name}.csv").is_file()]:
        raise UserError(
            f"There is no landscape {missing[0]!r}: make it with benchmarks/landscape.py"
        )
    return found


def measured(name: str, folds: int) -> dict[str, Any]:
    """Return the agreement of each family with held-out fits, the noise, and the optimum."""
    data = read(LANDSCAPES / f"{name}.csv")
    genes, losses = data.means(data.losses)
    _, seconds = data.means(np.log(data.seconds)[:, None])
    found: dict[str, Any] = {
        "fits": len(data.genes),
        "chromosomes": len(np.unique(data.chromosomes)),
        "failed": int(data.failed.sum()),
        "noise": of_noise(data),
        "families": {},
    }
    for family in FAMILIES:
        landscape = Landscape(data, family)
        held = held_out(landscape.regressor, genes, losses, folds)
        found["families"][family] = {
            **agreement(held[:, -1], losses[:, -1]),
            "optimum": landscape.optimum,
            "at": landscape.best,
            **shape(landscape),
        }
    held = held_out(Trees(features(genes), seconds), genes, seconds, folds)
    found["seconds_spearman"] = float(spearmanr(held[:, 0], seconds[:, 0]).statistic)
    return found


def held_out(model: Trees | Process, genes: Array, values: Array, folds: int) -> Array:
    """Return what is foretold of chromosomes that were held back."""
    x, held = features(genes), np.empty_like(values)
    for learn, leave in KFold(folds, shuffle=True, random_state=0).split(x):
        held[leave] = model.again(x[learn], values[learn]).predict(x[leave])
    return held


def shape(landscape: Landscape, n: int = 8192, bins: int = 16) -> dict[str, Any]:
    """Return how much of the space is good, and what each gene alone explains.

    Args:
        landscape: The landscape.
        n: Chromosomes drawn at random.
        bins: Of equal size, for each gene.

    Returns:
        ``near``: the share of the space within 2, 5 and 10 % of the lowest val_loss;
        ``main_effects``: Var(E[y | gene]) / Var(y) of y = log val_loss, the first-order
        index of Sobol' (1993), estimated over bins.
    """
    space, rng = checked(compose(["model=se_densenet121_k12"])).space, np.random.default_rng(0)
    genes = np.array([space.draw(rng) for _ in range(n)], float)
    y = landscape.losses(genes)[:, -1]
    effects = {}
    for i, name in enumerate(GENES):
        some = np.array_split(y[np.argsort(genes[:, i], kind="stable")], bins)
        # What bins of random draws would have is not the gene's.
        by_chance = np.mean([part.var(ddof=1) / len(part) for part in some])
        means = np.array([part.mean() for part in some])
        effects[name] = float(max(0.0, means.var(ddof=1) - by_chance) / y.var())
    near = {str(s): float(np.mean(np.exp(y) <= landscape.optimum * (1 + s))) for s in NEAR}
    return {"near": near, "main_effects": effects}


def agreement(foretold: Array, true: Array) -> dict[str, float]:
    """Return root mean squared error and rank correlations of logs of val_loss."""
    better = true <= np.quantile(true, 0.5)
    return {
        "rmse": float(np.sqrt(np.mean((foretold - true) ** 2))),
        "rmse_better_half": float(np.sqrt(np.mean((foretold - true)[better] ** 2))),
        "spearman": float(spearmanr(foretold, true).statistic),
        "spearman_better_half": float(spearmanr(foretold[better], true[better]).statistic),
    }


def of_noise(data: Table) -> dict[str, Any]:
    """Return how fits of the same chromosomes agree."""
    found = noise(data)
    sds = np.sqrt(found.variances)
    several = [losses[:, -1] for _, losses in data.repeated]
    pairs = [
        spearmanr([mine[a] for mine in several], [mine[b] for mine in several]).statistic
        for a, b in combinations(range(min(map(len, several))), 2)
    ]
    return {
        "chromosomes": len(sds),
        "sd_median": float(np.median(sds)),
        "sd_pooled": float(np.sqrt(np.mean(found.variances))),
        "sd_at": {f"{rate:g}": found.sd(rate) for rate in (1e-5, 1e-4, 1e-3, 1e-2)},
        "spearman_between_seeds": float(np.mean(pairs)),
    }


def markdown(result: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tables."""
    first: list[Sequence[str]] = [
        (
            *("landscape", "regressor", "RMSE of log val_loss", "of the better half"),
            *("rank correlation", "of the better half", "lowest val_loss", "at"),
        )
    ]
    third: list[Sequence[str]] = [
        (
            *("landscape", "regressor", *(f"space within {s:.0%} of the lowest" for s in NEAR)),
            *(f"variance explained by {name}" for name in GENES),
        )
    ]
    second: list[Sequence[str]] = [
        (
            *("landscape", "fits", "diverged", "sd between seeds, median", "pooled"),
            *("rank correlation between seeds", "of the time foretold"),
        )
    ]
    for name, found in result.items():
        first += [
            (
                *(name, family),
                *(f"{row[key]:.3f}" for key in ("rmse", "rmse_better_half")),
                *(f"{row[key]:.2f}" for key in ("spearman", "spearman_better_half")),
                *(f"{row['optimum']:.3f}", written_genes(row["at"].values())),
            )
            for family, row in found["families"].items()
        ]
        third += [
            (
                *(name, family, *(f"{share:.1%}" for share in row["near"].values())),
                *(f"{share:.0%}" for share in row["main_effects"].values()),
            )
            for family, row in found["families"].items()
        ]
        between = found["noise"]
        second.append(
            (
                *(name, str(found["fits"]), str(found["failed"])),
                *(f"{between[key]:.3f}" for key in ("sd_median", "sd_pooled")),
                *(f"{between['spearman_between_seeds']:.2f}", f"{found['seconds_spearman']:.2f}"),
            )
        )
    return "\n\n".join([table(*first), table(*second), table(*third)])


def written_genes(values: Iterable[float]) -> str:
    """Write a chromosome."""
    included, frozen, learning_rate, dropout = values
    return f"L {included:.0f}, F {frozen:.0f}, lr {learning_rate:.1e}, dropout {dropout:.2f}"


if __name__ == "__main__":
    with one_line_errors():
        main()
