"""The checked configuration: frozen dataclasses, one for each config group.

Hydra composes YAML and overrides; `checked` turns the result into these
classes, which verify every type and range. All other code sees only them. The
defaults and their explanations stand in ``conf/``, nowhere else. This module
imports no torch, so that a typing error costs no start-up time.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gatl.chromosome import KNOWN_GENES, Gene, SearchSpace
from gatl.errors import UserError
from gatl.halving import rungs

PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed")
GROUPS = (
    "data",
    "model",
    "space",
    "search",
    "ga",
    "trainer",
    "evaluator",
    "logger",
    "budget",
    "final",
    "cache",
)
OPTIONAL = ("pruner", "study")
ACCELERATORS = ("auto", "cpu", "gpu", "mps")
SE_CHOICES = {"placement": ("block", "layer", "none"), "init": ("identity", "kaiming")}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
MODES = ("generational", "steady_state")
AUGMENTATIONS = ("none", "flip", "crop_flip", "trivial")
MAX_PARALLEL = 1024
"""Workers, or threads of one, that a machine may be asked for; a slip of the hand exceeds it."""
MAX_TRIALS = 1_000_000
"""Trials of a search; a slip of the hand exceeds it, and it would never end."""
T = TypeVar("T")
_TIME = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in ("d", "h", "m", "s?")))
_KINDS = {
    int: "a whole number",
    int | None: "a whole number or null",
    float: "a number",
    float | None: "a number or null",
    bool: "true or false",
    str: "a text",
    str | None: "a text or null",
    list[float]: "a list of numbers",
    dict[str, Any]: "a group of settings",
    dict[str, str]: "a group of texts",
}
"""How messages call the types of the settings."""


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{key} must be {allowed}, but got {value!r}.")


def _require_range(
    key: str, value: float, low: float, high: float = math.inf, *, open_high: bool = False
) -> None:
    open_high = open_high or high == math.inf
    holds = low <= value and (value < high if open_high else value <= high)
    bracket = ")" if open_high else "]"
    allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}{bracket}"
    _require(holds, key, value, allowed)


def _require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    _require(value in choices, key, value, "one of " + ", ".join(choices))


def _require_target(key: str, node: Mapping[str, Any]) -> None:
    target = node.get("_target_")
    _require(
        isinstance(target, str) and target != "",
        f"{key}._target_",
        target,
        "the dotted name of a class or function",
    )


def parse_seconds(text: str, key: str) -> float:
    """Parse a duration such as ``90s``, ``15m``, ``1.5h``, ``1d``, ``1h30m`` or ``90``.

    Args:
        text: Days, hours, minutes and seconds in this order, each optional, each
            perhaps with decimals; a number without a unit at the end is seconds.
        key: The setting, for the error's message.

    Returns:
        Seconds, greater than 0 and finite.

    Raises:
        UserError: If the text is no such duration, or zero.
    """
    match = _TIME.fullmatch(text.strip())
    numbers = [float(group or 0) for group in match.groups()] if match else [0.0]
    seconds = sum(n * unit for n, unit in zip(numbers, (86400, 3600, 60, 1), strict=False))
    if not 0 < seconds < math.inf:
        raise UserError(
            f"{key} must be a duration such as 90s, 15m, 2h or 1h30m, but got {text!r}."
        )
    return seconds


def _timm(name: object, key: str) -> object:
    """Return what `describe` says of a timm model; only then timm and torch are imported."""
    from gatl.models.timm_network import describe

    value = describe(str(name))[key]
    return OmegaConf.create(value) if isinstance(value, list) else value


OmegaConf.register_new_resolver("timm", _timm, replace=True)


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
    max_bad: float
    class_weights: bool = False  # pretraining has no such choice

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_target("data.source", self.source)
        if "root" in self.source and not self.source["root"]:
            raise UserError(f"data.root is required with data={self.name}: give data.root=PATH.")
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
    sources: dict[
        str, Any
    ]  # what weights can name beside none and a file; by word, what returns it
    mean: list[float]
    std: list[float]
    interpolation: str
    dropout_at: str | None  # None: in front of the classifier, the backbone has no choice
    se: dict[str, str]  # placement and init; empty for a network without SE

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_target("model.network", self.network)
        _require_range("model.n_layers", self.n_layers, 1)
        _require_range("model.n_freezable", self.n_freezable, 0, self.n_layers)
        _require_range("model.min_image_size", self.min_image_size, 1)
        _require_range("model.image_size", self.image_size, self.min_image_size)
        for name, source in self.sources.items():
            _require(
                isinstance(source, dict), f"model.sources.{name}", source, "a group of settings"
            )
            _require_target(f"model.sources.{name}", source)
        _require_choice("model.interpolation", self.interpolation, INTERPOLATIONS)
        if "dropout_at" in self.network:
            at, allowed = self.dropout_at, "one of head, layers"
            _require(at in ("head", "layers"), "model.dropout_at", at, allowed)
        else:
            allowed = f"null for model={self.name}, which drops in front of the classifier only"
            _require(self.dropout_at is None, "model.dropout_at", self.dropout_at, allowed)
        for name, value in self.se.items():
            _require_choice("model.se", name, tuple(SE_CHOICES))
            _require_choice(f"model.se.{name}", value, SE_CHOICES[name])
        finite = len(self.mean) == 3 and all(map(math.isfinite, self.mean))
        _require(finite, "model.mean", self.mean, "three numbers")
        positive = len(self.std) == 3 and all(0 < value < math.inf for value in self.std)
        _require(positive, "model.std", self.std, "three numbers above 0")


@dataclass(frozen=True)
class GAConfig:
    """The genetic algorithm's parameters."""

    mode: str
    pop: int
    generations: int
    tournament_size: int
    crossover_prob: float
    mutation_prob: float
    mutation_step: float | None
    n_elites: int
    duplicate_retries: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_choice("ga.mode", self.mode, MODES)
        _require_range("ga.pop", self.pop, 2)
        _require_range("ga.generations", self.generations, 1)
        size, allowed = self.tournament_size, f"in [1, {self.pop}], at most ga.pop={self.pop}"
        _require(1 <= size <= self.pop, "ga.tournament_size", size, allowed)
        _require_range("ga.crossover_prob", self.crossover_prob, 0, 1)
        _require_range("ga.mutation_prob", self.mutation_prob, 0, 1)
        step = self.mutation_step
        holds = step is None or 0 < step < math.inf
        _require(holds, "ga.mutation_step", step, "a number above 0, or null")
        allowed = f"in [0, {self.pop - 1}], below ga.pop={self.pop}"
        _require(0 <= self.n_elites < self.pop, "ga.n_elites", self.n_elites, allowed)
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
    timeout: str | None = None  # an evaluator of another kind need not know of it
    settings: dict[str, Any] = field(default_factory=dict)  # whatever else its YAML says

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_target("evaluator", {"_target_": self._target_})
        valid = self.workers == "auto" or (
            self.workers.isdecimal() and 1 <= int(self.workers) <= MAX_PARALLEL
        )
        allowed = f"auto or a whole number in [1, {MAX_PARALLEL}]"
        _require(valid, "evaluator.workers", self.workers, allowed)
        _require_range("evaluator.threads", self.threads, 1, MAX_PARALLEL)
        if self.timeout is not None:
            parse_seconds(self.timeout, "evaluator.timeout")

    @property
    def seconds(self) -> float:
        """What a fit may take; infinite if that is not limited."""
        if self.timeout is None:
            return math.inf
        return parse_seconds(self.timeout, "evaluator.timeout")


@dataclass(frozen=True)
class PrunerConfig:
    """Successive halving: when the worse fits of a generation are stopped."""

    min_epochs: int
    reduction_factor: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_range("pruner.min_epochs", self.min_epochs, 1)
        _require_range("pruner.reduction_factor", self.reduction_factor, 2)


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
            parse_seconds(self.time, "budget.time")

    @property
    def seconds(self) -> float:
        """The time budget; infinite if there is none."""
        return math.inf if self.time is None else parse_seconds(self.time, "budget.time")


@dataclass(frozen=True)
class FinalConfig:
    """The final model: re-evaluation of the best, then a longer training."""

    top_k: int
    seeds: int
    max_epochs: int
    patience: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("top_k", "max_epochs", "patience"):
            _require_range(f"final.{name}", getattr(self, name), 1)
        _require_range("final.seeds", self.seeds, 1, 1000)


@dataclass(frozen=True)
class CacheConfig:
    """What may be kept of the frozen layers' work while a run lasts."""

    max_gb: float | None

    def __post_init__(self) -> None:
        """Check the range."""
        if self.max_gb is not None:
            _require_range("cache.max_gb", self.max_gb, 0, 1_000_000)


@dataclass(frozen=True)
class StudyConfig:
    """Where the record of the search is kept."""

    storage: str | None = None  # None: in the run folder

    def __post_init__(self) -> None:
        """Check the database's address."""
        if self.storage is not None:
            from gatl.storage import require_address  # it needs Optuna, which takes a while

            require_address("study.storage", self.storage)


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
    cache: CacheConfig
    pruner: PrunerConfig | None = None  # None: every fit runs to its end
    study: StudyConfig = StudyConfig()

    def __post_init__(self) -> None:
        """Check what spans several groups."""
        _require_range("seed", self.seed, 0, 2**32, open_high=True)
        _require_target("search", self.search)
        _require_target("logger", self.logger)
        if self.data.image_size < self.model.min_image_size:
            raise UserError(
                f"data.image_size must be at least {self.model.min_image_size} for "
                f"model={self.model.name}, but got {self.data.image_size}."
            )
        if self.n_trials > MAX_TRIALS:
            raise UserError(
                f"A search must have at most {MAX_TRIALS} trials, but got {self.n_trials}: lower "
                "budget.trials, or ga.pop and ga.generations."
            )
        if self.pruner is not None:
            below = self.trainer.max_epochs  # one epoch leaves nothing to stop, and that is all
            allowed = f"below trainer.max_epochs={below}, or 1"
            epochs = self.pruner.min_epochs
            _require(epochs < below or epochs == 1, "pruner.min_epochs", epochs, allowed)
        if "pop" in self.search and len(self.initial) > self.ga.pop:
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
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared for the network, as plain data."""
        return {
            "image_size": self.data.image_size,
            "interpolation": self.model.interpolation,
            "mean": list(self.model.mean),
            "std": list(self.model.std),
        }

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs at which the worse fits of a generation are stopped."""
        if self.pruner is None:
            return ()
        return rungs(self.pruner.min_epochs, self.pruner.reduction_factor, self.trainer.max_epochs)

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
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in names:
        if name not in node and OmegaConf.is_missing(schema, name):
            raise UserError(f"{key}.{name} is required: give {key}.{name}=VALUE.")
    try:
        converted: T = OmegaConf.to_object(OmegaConf.merge(schema, node))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        where = str(error.full_key)
        name = re.split(r"[.\[]", where)[0]
        if name not in names:
            raise UserError(f"{key}.{name} is no setting: {key} has {', '.join(names)}.") from error
        allowed = _KINDS[get_type_hints(cls)[name]]
        raise UserError(f"{key}.{name} must be {allowed}, but got {node[name]!r}.") from error
    return converted


def _require_gene(key: str, name: str, value: float, model: ModelConfig) -> None:
    """Check a value of a known gene against what the gene can mean in this network."""
    known = KNOWN_GENES[name]
    if known.kind is int:
        allowed = f"a whole number in [{known.low}, {model.n_layers}]"
        holds = float(value).is_integer() and known.low <= value <= model.n_layers
    else:
        allowed, holds = f"a number in {known.interval}", known.allows(value)
    _require(holds, key, value, allowed)


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
        _require_gene(f"{key}.{end}", name, number, model)
    if low > high:
        raise UserError(f"{key}: low <= high must hold, but got (low={low:g}, high={high:g}).")
    log = gene.log and gene.value is None
    if log and low <= 0:
        raise UserError(f"{key}: low must be above 0 when log=true, but got {low:g}.")
    return Gene(name, known.kind(low), known.kind(high), log)


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
            f"included_layers.low={genes['included_layers'].low}); raise the second."
        )
    return SearchSpace(tuple(genes.values()))


def _evaluator(node: DictConfig) -> EvaluatorConfig:
    """Set apart what an evaluator has beyond what all have; its class checks it."""
    shared = ("_target_", "workers", "threads", "timeout")
    settings = {str(name): node[name] for name in node if name not in shared}
    flat = OmegaConf.masked_copy(node, [name for name in shared if name in node])
    return replace(_section(EvaluatorConfig, flat, "evaluator"), settings=settings)


def _values(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys of all values, and the values."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _values(value, f"{key}[{index}]")
    else:
        yield key, node


def _fill_elites(ga: object) -> None:
    """Let the number of elites, where none is given, be half of the population."""
    if isinstance(ga, DictConfig) and "n_elites" in ga and ga.n_elites is None:
        pop = ga.get("pop")  # checked later, so it may be anything yet
        ga.n_elites = pop // 2 if isinstance(pop, int) else 0


@contextlib.contextmanager
def resolving() -> Iterator[None]:
    """Turn what goes wrong with interpolations inside this context into a `UserError`."""
    try:
        yield
    except OmegaConfBaseException as error:
        if isinstance(error.__context__, UserError):  # what a resolver raised
            raise error.__context__ from None
        reason = (error.msg or str(error)).splitlines()[0].rstrip(".")
        raise UserError(f"The configuration cannot be resolved: {reason}.") from error


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
    for key, value in _values(OmegaConf.to_container(cfg)):
        if value == "???":
            raise UserError(f"{key} is required: give {key}=VALUE.")
        if isinstance(value, int) and abs(value) >= 2**63:  # nothing takes more
            raise UserError(f"{key} must be below 2**63, but got {value}.")
    for key in ("seed", *GROUPS):
        if key not in cfg:
            raise UserError(f"{key} is required: give {key}=VALUE.")
    for name in map(str, cfg):
        if name not in ("seed", "resume", "trust", *GROUPS, *OPTIONAL):
            known = ", ".join(("seed", *GROUPS, *OPTIONAL))
            raise UserError(f"{name} is no setting; there are {known}.")
    with resolving():
        _fill_elites(cfg.ga)
        OmegaConf.resolve(cfg)
    for key in GROUPS:
        if not isinstance(cfg[key], DictConfig):
            raise UserError(f"{key} must be a group of settings, but got {cfg[key]!r}.")
    for key in ("data.source", "model.network", "logger", "evaluator"):
        node = OmegaConf.select(cfg, key)
        for word in node if isinstance(node, DictConfig) else ():
            if word in ("_args_", "_convert_", "_partial_", "_recursive_"):
                raise UserError(f"{key}.{word} cannot be set: gatl calls {key}._target_ itself.")
    if cfg.get("resume") is not None:
        raise UserError("resume=RUN_FOLDER goes on with a run only as it stands, without +.")
    if cfg.get("trust") is not None:
        raise UserError("trust=NAME,NAME goes with resume=RUN_FOLDER, and as it stands, without +.")
    model = _section(ModelConfig, cfg.model, "model")
    search: dict[str, Any] = OmegaConf.to_container(cfg.search)  # type: ignore[assignment]
    initial = search.pop("initial", None) or []
    if not isinstance(initial, list) or not all(isinstance(genes, dict) for genes in initial):
        raise UserError(f"search.initial must be a list of chromosomes, but got {initial!r}.")
    for genes in initial:
        for name, value in genes.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            holds = number and math.isfinite(value)
            _require(holds, f"search.initial {name}", value, "a finite number")
            if name in KNOWN_GENES:
                _require_gene(f"search.initial {name}", name, value, model)
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
        evaluator=_evaluator(cfg.evaluator),
        logger=OmegaConf.to_container(cfg.logger),  # type: ignore[arg-type]
        budget=_section(BudgetConfig, cfg.budget, "budget"),
        final=_section(FinalConfig, cfg.final, "final"),
        cache=_section(CacheConfig, cfg.cache, "cache"),
        pruner=_section(PrunerConfig, cfg.pruner, "pruner") if cfg.get("pruner") else None,
        study=_section(StudyConfig, cfg.get("study") or OmegaConf.create(), "study"),
    )
