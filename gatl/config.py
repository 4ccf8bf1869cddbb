"""The checked configuration: frozen dataclasses, one for each config group.

Hydra composes YAML and overrides; `checked` turns the result into these
classes, which verify every type and range. All other code sees only them. The
defaults and their explanations stand in ``conf/``, nowhere else. This module
imports no torch, so that a typing error costs no start-up time.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from gatl.chromosome import KNOWN_GENES, Gene, SearchSpace
from gatl.errors import UserError

PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed")
GROUPS = ("data", "model", "space", "search", "ga", "trainer", "evaluator", "logger", "budget", "final")
ACCELERATORS = ("auto", "cpu", "gpu", "mps")
SE_CHOICES = {"placement": ("block", "layer", "none"), "init": ("identity", "kaiming")}
AUGMENTATIONS = ("none", "flip", "crop_flip", "trivial")
T = TypeVar("T")
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{key} must be {allowed}, but got {value!r}.")


def _require_range(
    key: str, value: float, low: float, high: float = math.inf, *, open_high: bool = False
) -> None:
    holds = low <= value and (value < high if open_high else value <= high)
    bracket = ")" if open_high or high == math.inf else "]"
    allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}{bracket}"
    _require(holds and math.isfinite(value), key, value, allowed)


def _require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    _require(value in choices, key, value, "one of " + ", ".join(choices))


def parse_seconds(text: str) -> float:
    """Parse a duration such as ``90s``, ``15m``, ``2h``, ``1d``, ``1h30m`` or ``90``.

    Args:
        text: Days, hours, minutes and seconds in this order, each optional; a
            number without a unit is seconds.

    Returns:
        Seconds, greater than 0.

    Raises:
        UserError: If the text is no such duration, or zero.
    """
    match = _TIME.fullmatch(text.strip())
    numbers = [float(group or 0) for group in match.groups()] if match else [0.0]
    seconds = sum(n * unit for n, unit in zip(numbers, (86400, 3600, 60, 1), strict=False))
    if seconds <= 0:
        raise UserError(f"budget.time must be a duration such as 90s, 15m or 2h, but got {text!r}.")
    return seconds


@dataclass(frozen=True)
class GeneConfig:
    """One gene of the search space: a range, or one fixed value."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    value: float | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are prepared."""

    name: str
    source: dict[str, Any]
    root: str | None
    image_size: int
    batch_size: int
    split_seed: int
    augment: str
    class_weights: bool
    max_bad: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_range("data.image_size", self.image_size, 1, 4096)
        _require_range("data.batch_size", self.batch_size, 2)
        _require_range("data.split_seed", self.split_seed, 0, 2**32, open_high=True)
        _require_choice("data.augment", self.augment, AUGMENTATIONS)
        _require_range("data.max_bad", self.max_bad, 0, 1)


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: how it is built, its layers, its weights, its preprocessing."""

    name: str
    network: dict[str, Any]
    n_layers: int
    n_freezable: int
    image_size: int
    min_image_size: int
    weights: str
    mean: list[float]
    std: list[float]
    dropout_at: str
    se: dict[str, str]  # placement and init; empty for a network without SE

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_range("model.n_layers", self.n_layers, 1)
        _require_range("model.n_freezable", self.n_freezable, 0, self.n_layers)
        _require_range("model.image_size", self.image_size, self.min_image_size)
        _require_choice("model.dropout_at", self.dropout_at, ("head", "layers"))
        for name, value in self.se.items():
            _require_choice("model.se", name, tuple(SE_CHOICES))
            _require_choice(f"model.se.{name}", value, SE_CHOICES[name])
        _require(len(self.mean) == 3, "model.mean", self.mean, "three numbers")
        _require(
            len(self.std) == 3 and min(self.std) > 0, "model.std", self.std, "three numbers above 0"
        )


@dataclass(frozen=True)
class GAConfig:
    """The genetic algorithm's parameters."""

    pop: int
    generations: int
    tournament_size: int
    crossover_prob: float
    mutation_prob: float
    n_elites: int
    duplicate_retries: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_range("ga.pop", self.pop, 2)
        _require_range("ga.generations", self.generations, 1)
        _require_range("ga.tournament_size", self.tournament_size, 1, self.pop)
        _require_range("ga.crossover_prob", self.crossover_prob, 0, 1)
        _require_range("ga.mutation_prob", self.mutation_prob, 0, 1)
        _require_range("ga.n_elites", self.n_elites, 0, self.pop - 1)
        _require_range("ga.duplicate_retries", self.duplicate_retries, 0, 1000)

    @property
    def n_trials(self) -> int:
        """The trials of all generations; elites are no trials."""
        return self.pop + (self.generations - 1) * (self.pop - self.n_elites)


@dataclass(frozen=True)
class TrainerConfig:
    """What the Lightning Trainer of every fit gets."""

    max_epochs: int
    accelerator: str
    precision: str
    deterministic: bool

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_range("trainer.max_epochs", self.max_epochs, 1)
        _require_choice("trainer.accelerator", self.accelerator, ACCELERATORS)
        _require_choice("trainer.precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class EvaluatorConfig:
    """Where the fits run."""

    _target_: str
    workers: str
    threads: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        valid = self.workers == "auto" or (self.workers.isdecimal() and int(self.workers) >= 1)
        _require(valid, "evaluator.workers", self.workers, "auto or a whole number of at least 1")
        _require_range("evaluator.threads", self.threads, 1)


@dataclass(frozen=True)
class BudgetConfig:
    """What stops a search."""

    trials: int | None
    time: str | None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.trials is not None:
            _require_range("budget.trials", self.trials, 1)
        if self.time is not None:
            parse_seconds(self.time)

    @property
    def seconds(self) -> float:
        """The time budget; infinite if there is none."""
        return math.inf if self.time is None else parse_seconds(self.time)


@dataclass(frozen=True)
class FinalConfig:
    """The final model: re-evaluation of the best, then a longer training."""

    top_k: int
    seeds: int
    max_epochs: int
    patience: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        for field in fields(self):
            _require_range(f"final.{field.name}", getattr(self, field.name), 1)


@dataclass(frozen=True)
class Config:
    """Everything that one run is told."""

    seed: int
    data: DataConfig
    model: ModelConfig
    space: SearchSpace
    search: dict[str, Any]
    initial: tuple[Mapping[str, float], ...]
    ga: GAConfig
    trainer: TrainerConfig
    evaluator: EvaluatorConfig
    logger: dict[str, Any]
    budget: BudgetConfig
    final: FinalConfig

    def __post_init__(self) -> None:
        """Check what spans several groups."""
        _require_range("seed", self.seed, 0, 2**32, open_high=True)
        if self.data.image_size < self.model.min_image_size:
            raise UserError(
                f"data.image_size must be at least {self.model.min_image_size} for "
                f"model={self.model.name}, but got {self.data.image_size}."
            )
        if len(self.initial) > self.ga.pop:
            raise UserError(
                f"search.initial must have at most ga.pop={self.ga.pop} chromosomes, "
                f"but got {len(self.initial)}."
            )
        for genes in self.initial:
            for name in genes:
                if name not in self.space.names:
                    raise UserError(
                        f"search.initial names the gene {name!r}, but the space has "
                        f"{', '.join(self.space.names)}."
                    )

    @property
    def n_trials(self) -> int:
        """The trials that end the search."""
        return self.ga.n_trials if self.budget.trials is None else self.budget.trials


def _section(cls: type[T], node: object, key: str) -> T:
    """Convert one flat config group; OmegaConf checks names and types, the class ranges."""
    if not isinstance(node, DictConfig):
        raise UserError(f"{key} must be a group of settings, but got {node!r}.")
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)  # set because the class is frozen
    try:
        converted: T = OmegaConf.to_object(OmegaConf.merge(schema, node))  # type: ignore[assignment]
    except MissingMandatoryValue as error:
        name = error.full_key or str(error).rpartition(":")[2].strip()
        raise UserError(f"{key}.{name} is required: give {key}.{name}=VALUE.") from error
    except OmegaConfBaseException as error:
        name = f"{key}.{error.full_key}" if error.full_key else key
        raise UserError(f"{name}: {(error.msg or str(error)).splitlines()[0]}.") from error
    return converted


def _gene(name: str, node: object, model: ModelConfig) -> Gene:
    """Convert one gene of the space and check it against what the gene can mean."""
    key = f"space.{name}"
    known = KNOWN_GENES.get(name)
    if known is None:
        raise UserError(
            f"{key} is no gene that the classifier understands; "
            f"it understands {', '.join(KNOWN_GENES)}."
        )
    gene = _section(GeneConfig, node, key)
    low, high = (gene.low, gene.high) if gene.value is None else (gene.value, gene.value)
    if low is None or high is None:
        raise UserError(f"{key} needs low and high, or one value.")
    ends = {"value": low} if gene.value is not None else {"low": low, "high": high}
    for end, number in ends.items():
        _require(math.isfinite(number), f"{key}.{end}", number, "finite")
        if known.kind is int:
            _require(number == int(number), f"{key}.{end}", number, "a whole number")
        _require(known.allows(number), f"{key}.{end}", number, f"in {known.interval}")
        if known.kind is int:
            _require_range(f"{key}.{end}", int(number), int(known.low), model.n_layers)
    if low > high:
        raise UserError(f"{key}: low <= high must hold, but got (low={low:g}, high={high:g}).")
    if gene.log and low <= 0:
        raise UserError(f"{key}: low must be above 0 when log=true, but got {low:g}.")
    return Gene(name, known.kind(low), known.kind(high), gene.log)


def _space(node: DictConfig, model: ModelConfig) -> SearchSpace:
    genes = {str(name): _gene(str(name), node[name], model) for name in node}
    for name in ("included_layers", "frozen_layers", "learning_rate", "dropout"):
        if name not in genes:
            raise UserError(f"space.{name} is missing; fix it with space.{name}.value=VALUE.")
    if genes["frozen_layers"].low > genes["included_layers"].low:
        raise UserError(
            "space.frozen_layers.low <= space.included_layers.low must hold, because nothing "
            f"behind the last included layer can be frozen, but got "
            f"(frozen_layers.low={genes['frozen_layers'].low}, "
            f"included_layers.low={genes['included_layers'].low})."
        )
    return SearchSpace(tuple(genes.values()))


def checked(composed: DictConfig) -> Config:
    """Turn a composed configuration into the checked one.

    Args:
        composed: What Hydra composed from ``conf/`` and the user's overrides.

    Returns:
        The configuration, immutable, every value in its range.

    Raises:
        UserError: For the first value that is missing, of another type, or out
            of its range; one line.
    """
    cfg = composed.copy()
    for key in GROUPS:
        if not isinstance(cfg.get(key), DictConfig):
            raise UserError(f"{key} must be a group of settings, but got {cfg.get(key)!r}.")
    if OmegaConf.is_missing(cfg.data, "root"):
        raise UserError(f"data.root is required with data={cfg.data.name}: give data.root=PATH.")
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        reason = (error.msg or str(error)).splitlines()[0]
        raise UserError(f"The configuration cannot be resolved: {reason}.") from error
    model = _section(ModelConfig, cfg.model, "model")
    search: dict[str, Any] = OmegaConf.to_container(cfg.search)  # type: ignore[assignment]
    initial = search.pop("initial", None) or []
    if not isinstance(initial, list) or not all(isinstance(genes, dict) for genes in initial):
        raise UserError(f"search.initial must be a list of chromosomes, but got {initial!r}.")
    for genes in initial:
        for name, value in genes.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(number and math.isfinite(value), f"search.initial {name}", value, "a number")
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool):
        raise UserError(f"seed must be a whole number in [0, {2**32}), but got {cfg.seed!r}.")
    return Config(
        seed=cfg.seed,
        data=_section(DataConfig, cfg.data, "data"),
        model=model,
        space=_space(cfg.space, model),
        search=search,
        initial=tuple(initial),
        ga=_section(GAConfig, cfg.ga, "ga"),
        trainer=_section(TrainerConfig, cfg.trainer, "trainer"),
        evaluator=_section(EvaluatorConfig, cfg.evaluator, "evaluator"),
        logger=OmegaConf.to_container(cfg.logger),  # type: ignore[arg-type]
        budget=_section(BudgetConfig, cfg.budget, "budget"),
        final=_section(FinalConfig, cfg.final, "final"),
    )

