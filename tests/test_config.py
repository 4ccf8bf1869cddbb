"""The checked configuration, composed from the real ``conf/``."""

import dataclasses
import functools
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from optuna.trial import create_trial

import gatl.conf
from gatl.chromosome import Gene
from gatl.cli import compose, parse
from gatl.config import Config, checked, parse_seconds
from gatl.errors import UserError
from gatl.strategies.base import Strategy
from gatl.strategies.build import build_strategy
from gatl.targets import require_arguments

CONF = Path(gatl.conf.__file__).parent


@functools.cache
def default() -> DictConfig:
    return compose([])


def composed(*overrides: str) -> DictConfig:
    """Compose a configuration; change the default one where that comes to the same, and sooner."""
    parsed = parse(overrides)
    if any(o.is_add() or o.is_delete() or (CONF / o.key_or_group).is_dir() for o in parsed):
        return compose(overrides)
    cfg = default().copy()
    for override in parsed:
        OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    return cfg


def config(*overrides: str) -> Config:
    return checked(composed(*overrides))


def error(*overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        config(*overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


def gene(name: str, *overrides: str) -> Gene:
    return next(gene for gene in config(*overrides).space.genes if gene.name == name)


WHOLE, NUMBER = "a whole number", "a number"
TIME = "a duration such as 90s, 15m, 2h or 1h30m"
WORKERS = "auto or a whole number in [1, 1024]"

# override: what the value must be
RANGES = {
    "seed=-1": "in [0, 4294967296)",
    "seed=4294967296": "in [0, 4294967296)",
    "seed=1.5": "a whole number in [0, 4294967296)",
    "seed=true": "a whole number in [0, 4294967296)",
    "seed=null": "a whole number in [0, 4294967296)",
    "seed=[1]": "a whole number in [0, 4294967296)",
    "data.image_size=0": "in [1, 4096]",
    "data.image_size=4097": "in [1, 4096]",
    "data.batch_size=1": "at least 2",
    "data.batch_size=1e9": WHOLE,
    "data.batch_size=inf": WHOLE,
    "data.split_seed=-1": "in [0, 4294967296)",
    "data.split_seed=4294967296": "in [0, 4294967296)",
    "data.augment=rotate": "one of none, flip, crop_flip, trivial",
    "data.class_weights=maybe": "true or false",
    "data.max_bad=-0.1": "in [0, 1]",
    "data.max_bad=1.1": "in [0, 1]",
    "data.max_bad=nan": "in [0, 1]",
    "data.source=3": "a group of settings",
    "data.source._target_=null": "the dotted name of a class or function",
    "model.n_layers=0": "at least 1",
    "model.n_freezable=-1": "in [0, 58]",
    "model.n_freezable=59": "in [0, 58]",
    "model.min_image_size=0": "at least 1",
    "model.image_size=31": "at least 32",
    "model.dropout_at=tail": "one of head, layers",
    "model.se.placement=stem": "one of block, layer, none",
    "model.se.init=zero": "one of identity, kaiming",
    "model.mean=[1,2]": "three numbers",
    "model.mean=[nan,0,0]": "three numbers",
    "model.mean=3": "a list of numbers",
    "model.mean=[a,b,c]": "a list of numbers",
    "model.std=[0,1,1]": "three numbers above 0",
    "model.std=[1,inf,1]": "three numbers above 0",
    "model.network._target_=null": "the dotted name of a class or function",
    "model.weights=null": "a text",
    "ga.pop=1": "at least 2",
    "ga.pop=0": "at least 2",
    "ga.pop=": WHOLE,
    "ga.pop=2.5": WHOLE,
    "ga.pop=true": WHOLE,
    "ga.pop=[4]": WHOLE,
    "ga.pop={a: 1}": WHOLE,
    "ga.generations=0": "at least 1",
    "ga.tournament_size=0": "in [1, 12], at most ga.pop=12",
    "ga.tournament_size=99": "in [1, 12], at most ga.pop=12",
    "ga.crossover_prob=1.1": "in [0, 1]",
    "ga.crossover_prob=often": NUMBER,
    "ga.mutation_prob=-0.1": "in [0, 1]",
    "ga.mutation_prob=nan": "in [0, 1]",
    "ga.mutation_step=0": "a number above 0, or null",
    "ga.mutation_step=inf": "a number above 0, or null",
    "ga.n_elites=12": "in [0, 11], below ga.pop=12",
    "ga.n_elites=-1": "in [0, 11], below ga.pop=12",
    "ga.duplicate_retries=1001": "in [0, 1000]",
    "trainer.max_epochs=0": "at least 1",
    "trainer.accelerator=tpu": "one of auto, cpu, gpu, mps",
    "trainer.precision=16": "one of auto, 32, bf16-mixed, 16-mixed",
    "trainer.deterministic=perhaps": "true or false",
    "evaluator.workers=0": WORKERS,
    "evaluator.workers=-1": WORKERS,
    "evaluator.workers=1.5": WORKERS,
    "evaluator.workers=1025": WORKERS,
    "evaluator.workers=many": WORKERS,
    "evaluator.threads=0": "in [1, 1024]",
    "evaluator.threads=1025": "in [1, 1024]",
    "evaluator.timeout=soon": "a duration such as 90s, 15m, 2h or 1h30m",
    "evaluator.timeout=0": "a duration such as 90s, 15m, 2h or 1h30m",
    "logger._target_=null": "the dotted name of a class or function",
    "search._target_=null": "the dotted name of a class or function",
    "pruner.min_epochs=0": "at least 1",
    "pruner.min_epochs=3": "below trainer.max_epochs=3, or 1",
    "pruner.reduction_factor=1": "at least 2",
    "pruner.reduction_factor=2.5": WHOLE,
    "cache.max_gb=-1": "in [0, 1000000]",
    "cache.max_gb=1e300": "in [0, 1000000]",
    "cache.max_gb=much": "a number or null",
    "cache=0": "a group of settings",
    "budget.trials=0": "at least 1",
    "budget.trials=few": "a whole number or null",
    "budget.time=0": TIME,
    "budget.time=-3s": TIME,
    "budget.time=soon": TIME,
    "budget.time=": TIME,
    "budget.time=1s1h": TIME,
    f"budget.time={'9' * 400}h": TIME,
    "budget.time=[1]": "a text or null",
    "budget=5": "a group of settings",
    "final.top_k=0": "at least 1",
    "final.seeds=0": "in [1, 1000]",
    "final.seeds=1001": "in [1, 1000]",
    "final.max_epochs=0": "at least 1",
    "final.patience=0": "at least 1",
    "search.initial=3": "a list of chromosomes",
    "search.initial=[3]": "a list of chromosomes",
    "space.included_layers.low=0": "a whole number in [1, 58]",
    "space.included_layers.high=59": "a whole number in [1, 58]",
    "space.included_layers.low=1.5": "a whole number in [1, 58]",
    "space.included_layers.value=inf": "a whole number in [1, 58]",
    "space.frozen_layers.high=59": "a whole number in [0, 58]",
    "space.learning_rate.low=0": "a number in (0, 1]",
    "space.learning_rate.high=1.1": "a number in (0, 1]",
    "space.dropout.high=1": "a number in [0, 1)",
    "space.dropout.low=nan": "a number in [0, 1)",
    "space.dropout.value=a": "a number or null",
    "space.dropout.log=maybe": "true or false",
    "space.dropout=3": "a group of settings",
    "+space.weight_decay={low: 0, high: 2}": "a number in [0, 1]",
}


@pytest.mark.parametrize(("override", "allowed"), RANGES.items())
def test_value_out_of_range_is_refused_in_one_line_that_says_what_is_allowed(override, allowed):
    (parsed,) = parse([override])
    key, cfg = parsed.key_or_group, default().copy()
    OmegaConf.update(cfg, key, parsed.value(), force_add=True)
    with pytest.raises(UserError) as raised:
        checked(cfg)
    message = str(raised.value)
    assert message.startswith(key)
    assert f" must be {allowed}, but got " in message
    assert "\n" not in message


# Overrides whose message does not follow the pattern "KEY must be ..., but got ...".
MESSAGES = {
    ("+data.source._partial_=true",): (
        "data.source._partial_ cannot be set: gatl calls data.source._target_ itself."
    ),
    ("+logger._args_=[1]",): "logger._args_ cannot be set: gatl calls logger._target_ itself.",
    ("data=folder",): "data.root is required: give data.root=VALUE.",
    ("data=folder", "data.root=null"): (
        "data.root is required with data=folder: give data.root=PATH."
    ),
    ("~seed",): "seed is required: give seed=VALUE.",
    ("seed=???",): "seed is required: give seed=VALUE.",
    ("~ga",): "ga is required: give ga=VALUE.",
    ("~final.seeds",): "final.seeds is required: give final.seeds=VALUE.",
    ("+sed=1",): (
        "sed is no setting; there are seed, data, model, space, search, ga, trainer, evaluator, "
        "logger, budget, final, cache, pruner, study."
    ),
    ("+ga.size=1",): (
        "ga.size is no setting: ga has mode, pop, generations, tournament_size, crossover_prob, "
        "mutation_prob, mutation_step, n_elites, duplicate_retries."
    ),
    ("++resume=outputs",): ("resume=RUN_FOLDER goes on with a run only as it stands, without +."),
    ("ga.pop=${x}",): "The configuration cannot be resolved: Interpolation key 'x' not found.",
    ("model=se_densenet121_k12", "data.image_size=31"): (
        "data.image_size must be at least 32 for model=se_densenet121_k12, but got 31."
    ),
    ("ga.pop=4", "ga.n_elites=4"): ("ga.n_elites must be in [0, 3], below ga.pop=4, but got 4."),
    ("ga.pop=4", "ga.tournament_size=5"): (
        "ga.tournament_size must be in [1, 4], at most ga.pop=4, but got 5."
    ),
    ("space.dropout.low=0.9", "space.dropout.high=0.1"): (
        "space.dropout: low <= high must hold, but got (low=0.9, high=0.1)."
    ),
    ("space.dropout.low=0", "space.dropout.log=true"): (
        "space.dropout: low must be above 0 when log=true, but got 0."
    ),
    ("space.frozen_layers.low=2",): (
        "space.frozen_layers.low <= space.included_layers.low must hold, because nothing behind "
        "the last included layer can be frozen, but got (frozen_layers.low=2, "
        "included_layers.low=1); raise the second."
    ),
    ("~space.dropout",): "space.dropout is missing; fix it with space.dropout.value=VALUE.",
    ("+space.weight_decay.low=0",): "space.weight_decay needs low and high, or one value.",
    ("+space.momentum={low: 0, high: 1}",): (
        "space.momentum is no gene that the classifier understands; it understands "
        "included_layers, frozen_layers, learning_rate, dropout, weight_decay, label_smoothing."
    ),
    ("search.initial=[{depth: 1}]",): (
        "search.initial names the gene 'depth', but the space has included_layers, "
        "frozen_layers, learning_rate, dropout."
    ),
    ("search.initial=[{dropout: high}]",): (
        "search.initial dropout must be a finite number, but got 'high'."
    ),
    ("search.initial=[{dropout: nan}]",): (
        "search.initial dropout must be a finite number, but got nan."
    ),
    ("budget.trials=1000001",): (
        "A search must have at most 1000000 trials, but got 1000001: lower budget.trials, or "
        "ga.pop and ga.generations."
    ),
    ("ga.pop=500000",): (
        "A search must have at most 1000000 trials, but got 2500000: lower budget.trials, or "
        "ga.pop and ga.generations."
    ),
    (f"ga.pop={2**63}",): f"ga.pop must be below 2**63, but got {2**63}.",
    (f"space.dropout.low=-{2**63}",): f"space.dropout.low must be below 2**63, but got -{2**63}.",
    ("ga.pop=2", "ga.n_elites=0", "search.initial=[{}, {}, {}]"): (
        "search.initial must have at most ga.pop=2 chromosomes, but got 3."
    ),
}


@pytest.mark.parametrize("overrides", MESSAGES, ids=" ".join)
def test_message(overrides):
    assert error(*overrides) == MESSAGES[overrides]


def test_defaults_are_what_conf_says():
    cfg = config()
    assert (cfg.seed, cfg.data.name, cfg.model.name) == (0, "digits", "se_densenet121")
    assert cfg.data.image_size == cfg.model.image_size == 224
    assert cfg.search["_target_"] == "gatl.strategies.genetic.of_mode"
    assert "initial" not in cfg.search
    plain, frozen = cfg.initial
    assert plain == {
        "included_layers": 58,
        "frozen_layers": 0,
        "learning_rate": 1e-3,
        "dropout": 0.2,
    }
    assert frozen == plain | {"frozen_layers": 18}
    assert cfg.space.genes == (
        Gene("included_layers", 1, 58),
        Gene("frozen_layers", 0, 18),
        Gene("learning_rate", 1e-6, 1e-1, log=True),
        Gene("dropout", 0.1, 0.9),
    )
    assert cfg.budget.seconds == math.inf


def test_trials_are_pop_plus_offspring_without_elites():
    overrides = ["ga.pop=10", "ga.generations=5", "ga.n_elites=3"]
    assert config(*overrides).n_trials == 10 + 4 * (10 - 3)
    assert config(*overrides, "budget.trials=7").n_trials == 7


def test_elites_follow_the_population_unless_their_number_is_given():
    for pop, elites in {2: 1, 3: 1, 4: 2, 100: 50}.items():
        cfg = config(f"ga.pop={pop}")
        assert cfg.ga.n_elites == cfg.search["n_elites"] == elites
        assert cfg.n_trials == pop + 8 * (pop - elites)
    assert config("ga.pop=3", "ga.n_elites=0").search["n_elites"] == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0.5", 0.5),
        ("90s", 90),
        ("1.5s", 1.5),
        ("15m", 900),
        ("2h", 7200),
        ("1.5h", 5400),
        ("1d", 86400),
        ("1h30m", 5400),
        ("1d2h3m4s", 93784),
        ("1m30", 90),
        ("'2h'", 7200),
    ],
)
def test_budget_time(text, seconds):
    assert config(f"budget.time={text}").budget.seconds == seconds


@pytest.mark.parametrize("text", ["", "s", "0h", "-1s", "1x", "1h 30m", "m1", "nan", "inf", "1e3s"])
def test_no_duration(text):
    with pytest.raises(UserError, match=r"budget\.time must be a duration"):
        parse_seconds(text, "budget.time")


def test_timeout_of_a_fit():
    assert config().evaluator.seconds == math.inf
    assert config("evaluator.timeout=90").evaluator.seconds == 90
    assert config("evaluator.timeout=1h30m").evaluator.seconds == 5400


def test_space_is_narrowed_fixed_and_grown_without_code():
    assert gene("dropout", "space.dropout.high=0.5") == Gene("dropout", 0.1, 0.5)
    fixed = gene("learning_rate", "space.learning_rate.value=1e-3")
    assert fixed == Gene("learning_rate", 1e-3, 1e-3)
    whole = gene("included_layers", "space.included_layers.value=42")
    assert whole == Gene("included_layers", 42, 42)
    assert isinstance(whole.low, int)
    added = "+space.weight_decay={low: 1e-6, high: 1e-2, log: true}"
    assert gene("weight_decay", added) == Gene("weight_decay", 1e-6, 1e-2, log=True)
    assert config(added).space.names[-1] == "weight_decay"
    both = ("space.frozen_layers.value=5", "space.included_layers.low=5")
    assert gene("frozen_layers", *both) == Gene("frozen_layers", 5, 5)


def test_fixed_gene_is_not_held_to_a_logarithm():
    assert gene("frozen_layers", "space.frozen_layers.log=true", "space.frozen_layers.value=0")
    assert gene("weight_decay", "+space.weight_decay={value: 0, log: true}").low == 0


def test_frozen_may_reach_beyond_the_default_up_to_the_last_layer():
    assert gene("frozen_layers", "space.frozen_layers.high=58").high == 58


def test_initial_chromosomes_may_leave_genes_out_or_be_none():
    assert config("search.initial=[{dropout: 0.2}]").initial == ({"dropout": 0.2},)
    assert config("search.initial=[]").initial == ()
    assert config("search.initial=null").initial == ()


@pytest.mark.parametrize(
    ("genes", "allowed"),
    [
        ("included_layers: 99", "included_layers must be a whole number in [1, 58]"),
        ("included_layers: 0", "included_layers must be a whole number in [1, 58]"),
        ("included_layers: 2.5", "included_layers must be a whole number in [1, 58]"),
        ("frozen_layers: 59", "frozen_layers must be a whole number in [0, 58]"),
        ("learning_rate: 5", "learning_rate must be a number in (0, 1]"),
        ("learning_rate: 0", "learning_rate must be a number in (0, 1]"),
        ("dropout: 2", "dropout must be a number in [0, 1)"),
    ],
)
def test_an_initial_gene_that_no_network_can_have_is_refused(genes, allowed):
    message = error(f"search.initial=[{{dropout: 0.5}}, {{{genes}}}]")
    assert message.startswith(f"search.initial {allowed}, but got ")


def test_an_initial_gene_outside_a_narrowed_range_is_left_to_the_strategy():
    cfg = config("space.dropout.low=0.3", "space.included_layers.value=3")
    assert cfg.initial[0]["dropout"] == 0.2
    assert config("search.initial=[{included_layers: 58.0}]").initial


def test_rungs_follow_from_pruner_and_epochs():
    assert config("trainer.max_epochs=9").rungs == (1, 2, 4, 8)
    assert config("trainer.max_epochs=9", "pruner.reduction_factor=3").rungs == (1, 3)
    assert config("trainer.max_epochs=9", "pruner.min_epochs=5").rungs == (5,)
    assert config("trainer.max_epochs=1").rungs == ()
    assert config("pruner=none").rungs == ()
    assert config("experiment=original").rungs == ()


def test_experiments_and_presets():
    quick = config("experiment=quickstart")
    assert (quick.data.name, quick.model.name, quick.data.image_size) == (
        "digits",
        "se_densenet121_k12",
        32,
    )
    original = config("ga=original")
    assert (original.ga.n_elites, original.initial) == (0, ())
    assert (original.ga.mutation_prob, original.ga.mutation_step) == (0.25, None)
    assert config("experiment=original").model.se["init"] == "kaiming"
    assert config("experiment=original").model.weights == "imagenet"
    assert config("experiment=original", "model=se_densenet121_k12").model.weights == "bundled"
    laptop = config("experiment=laptop", "data=folder", "data.root=photos", "data.augment=none")
    assert (laptop.data.name, laptop.data.root, laptop.data.augment) == ("folder", "photos", "none")
    assert (laptop.model.name, laptop.data.image_size) == ("se_densenet121_k12", 64)
    gpu = config("data=folder", "data.root=photos", "experiment=single_gpu")
    assert (gpu.data.name, gpu.data.root) == ("folder", "photos")
    assert (gpu.model.name, gpu.data.image_size) == ("se_densenet121", 224)
    assert (gpu.trainer.precision, gpu.evaluator.workers) == ("16-mixed", "1")
    assert config("experiment=debug").n_trials == 3


@pytest.mark.parametrize(
    "overrides",
    [
        ("budget.time='2h'", "ga.pop=3", "seed=7"),
        ("space.dropout={low: 0.2, high: 0.3}", "search.initial=[{dropout: 0.2}]"),
        ("space.learning_rate.value=1e-3", "pruner.min_epochs=2", "trainer.max_epochs=9"),
    ],
    ids=" ".join,
)
def test_a_changed_default_is_what_hydra_composes(overrides):
    assert composed(*overrides) == compose(overrides)


def test_checked_leaves_what_it_was_given_as_it_was():
    given = compose([])
    before = OmegaConf.to_yaml(given)
    checked(given)
    assert OmegaConf.to_yaml(given) == before


def test_configuration_is_immutable_to_the_bottom():
    cfg = config()
    for part in (cfg, *(getattr(cfg, field.name) for field in dataclasses.fields(cfg))):
        if dataclasses.is_dataclass(part):
            name = dataclasses.fields(part)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, name, 1)


def test_typing_error_needs_no_torch():
    script = (
        "import sys; from gatl.cli import compose; from gatl.config import checked\n"
        "checked(compose(['experiment=quickstart']))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# Whatever a user may type


def defaults_of(path: Path, prefix: str = "") -> dict[str, object]:
    """Return the defaults of a YAML file by their dotted keys, groups among them."""

    def values(node: object, prefix: str) -> Iterator[tuple[str, object]]:
        for name, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{name}", value
            yield from values(value, f"{prefix}{name}.")

    return dict(values(OmegaConf.to_container(OmegaConf.load(path)), prefix))


FILES = sorted(path for path in CONF.glob("*/*.yaml") if not path.stem.startswith("_"))
# timm's models are known to timm alone, which takes torch along; Optuna's GP is made of torch.
CHOICES = {
    f"{path.parent.name}={path.stem}": defaults_of(path, f"{path.parent.name}.")
    for path in FILES
    if path.stem not in ("timm", "gp")
}
"""With the defaults of each."""
DEFAULTS = ("ga=default", "space=default", "trainer=default", "pruner=successive_halving")
NO_KEYS = "foo data.foo model.network.foo search.sampler.foo évolution ga.pop.x a.b.c ga@x ga/x ++x"
ABSENT = "space.weight_decay space.weight_decay.low search.sampler.seed evaluator.foo experiment"
KEYS = sorted(
    {path.parent.name for path in FILES}
    | {key for path in FILES for key in defaults_of(path, f"{path.parent.name}.")}
    | set(defaults_of(CONF / "config.yaml"))
    | set(NO_KEYS.split())
    | set(ABSENT.split())
)
EDGES = (
    "null ??? true 0 -1 1 2 3 1.5 0.5 1e9 1e309 -1e400 nan -inf inf auto 32 ü '' 'ä' [] {} {a:1} "
    "{low:0,high:1} {low:nan,high:1} {value:3} [{dropout:1}] [{1:2}] {_target_:x} 0x10 1_000 "
    "${x} ${seed} ${ga} ${data.root} ${.} ${oc.env:NO_SUCH} ${oc.env:HOME} ${now:%Y} ${x ${} "
    '1,2 range(1,3) glob(*) int(3) str(3) interval(0,1) digits default ( = " a=b @ ~ * 90s 1h30m '
    "os.system builtins.dict gatl.nothing 🐈 \u202e \x07 ' ] 1- 1/2 $ % \\ #1 --x"
)
HUGE = [str(10**400), str(-(10**400)), str(2**63), str(2**32), "9" * 5000, "1" * 400 + ".5"]
WORDS = "true false null 1e-3 2h none flip auto cpu 32 bicubic head block [] {}"
TEXTS = st.text(max_size=5)
PLAUSIBLE = st.one_of(
    st.integers(-1, 20).map(str),
    st.floats(0, 1).map(str),
    st.sampled_from(WORDS.split()),
)
ALIKE = {
    bool: st.sampled_from(["true", "false"]),
    int: st.integers(0, 20).map(str),
    float: st.floats(0, 1).map(str),
}
LEAVES = st.one_of(
    st.sampled_from(EDGES.split()),
    st.sampled_from(HUGE),
    st.integers().map(str),
    st.floats().map(str),
    TEXTS,
    TEXTS.map(lambda text: f"'{text}'"),
    st.sampled_from(KEYS).map(lambda key: f"${{{key}}}"),
)
NESTED = st.recursive(
    st.one_of(LEAVES, PLAUSIBLE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.dictionaries(
            st.sampled_from(["low", "high", "value", "log", "dropout", "a", "_target_", "1"]),
            inner,
            max_size=3,
        ).map(lambda d: "{" + ",".join(f"{k}:{v}" for k, v in d.items()) + "}"),
    ),
    max_leaves=3,
)


@st.composite
def overrides_of_any_kind(draw: st.DrawFn) -> list[str]:
    """Draw a choice of a group or two, and a few settings, half of them sensible."""
    choices = st.lists(
        st.sampled_from(list(CHOICES)),
        max_size=2,
        unique_by=lambda choice: choice.partition("=")[0],
    )
    lines = draw(choices)
    known = [item for choice in (*DEFAULTS, *lines) for item in CHOICES[choice].items()]
    sensible = draw(st.booleans())
    values = draw(st.sampled_from([PLAUSIBLE, LEAVES, NESTED]))
    for _ in range(draw(st.integers(1, 3))):
        if sensible:
            key, default = draw(st.sampled_from(known))
            lines.append(f"{key}={draw(ALIKE.get(type(default), PLAUSIBLE))}")
        else:
            sign = draw(st.sampled_from(["", "", "", "", "", "+", "++", "~"]))
            key = draw(st.sampled_from(KEYS))
            lines.append(f"{sign}{key}" if sign == "~" else f"{sign}{key}={draw(values)}")
    return lines


def told(lines: list[str]) -> Config | str:
    """Compose, check, and build the strategy, all of which a command does before torch."""
    try:
        cfg = checked(compose(lines))
        strategy = build_strategy(cfg)
        require_arguments("data.source", cfg.data.source)
    except UserError as refused:
        return str(refused)
    rehearse(cfg, strategy)
    return cfg


def rehearse(cfg: Config, strategy: Strategy) -> None:
    """Let an accepted configuration do what a search does, with losses out of the air."""
    rng, record = np.random.default_rng(0), []
    spaces, distributions = cfg.space, strategy.distributions()
    for number in range(min(cfg.n_trials, 16)):
        horizon = strategy.horizon(number)
        assert 0 <= horizon <= number
        pending = [spaces.from_dict(trial.params) for trial in record[horizon:]]
        chromosome = strategy.propose(number, record[:horizon], pending)
        assert chromosome == spaces.repair(chromosome)
        loss, params = float(rng.exponential()), spaces.to_dict(chromosome)
        trial = create_trial(params=params, distributions=distributions, value=loss)
        trial.number = number
        record.append(trial)
    assert strategy.generation(cfg.n_trials) is None or cfg.n_trials
    assert cfg.rungs == tuple(sorted(set(cfg.rungs)))
    assert all(0 < rung < cfg.trainer.max_epochs for rung in cfg.rungs)
    assert 1 <= cfg.n_trials <= 10**6
    for node in map(dataclasses.asdict, (cfg.data, cfg.ga, cfg.model, cfg.final, cfg.cache)):
        assert all(math.isfinite(x) for x in node.values() if isinstance(x, float)), node


def check(lines: list[str]) -> None:
    started = time.process_time()
    result = told(lines)
    if isinstance(result, str):
        assert result.isprintable()
        assert time.process_time() - started < 3


@pytest.fixture(scope="module")
def _no_torch() -> Iterator[None]:
    """Whoever imports torch to find a mistake fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        yield


@pytest.mark.usefixtures("_no_torch")
@settings(max_examples=10)
@given(overrides_of_any_kind())
def test_any_override_is_accepted_and_works_or_is_refused_in_one_line(lines):
    check(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_torch")
@settings(max_examples=2500)
@given(overrides_of_any_kind())
def test_so_are_thousands_of_them(lines):
    check(lines)
