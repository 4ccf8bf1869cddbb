"""What comes in a run folder, a checkpoint or an archive is data: nothing in it is run.

Each hostile file would leave a mark if it were; some are shown to do so elsewhere.
"""

import contextlib
import copy
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import lightning
import numpy as np
import optuna
import pytest
import torch
import torchvision
import yaml
from omegaconf import OmegaConf
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._base import BaseJournalSnapshot

import gatl.__main__
from gatl import compare, final, retraining
from gatl.classifier import Classifier
from gatl.cli import compose, remember, resumed
from gatl.config import Config, checked
from gatl.data import cifar
from gatl.data.images import prepare
from gatl.data.source import Source, Split
from gatl.errors import UserError
from gatl.evaluation import Fit, Fitter, build_trainer, silence
from gatl.models.weight_files import read_weights
from gatl.outcome import Outcome
from gatl.record import JOURNAL, begin, open_study, require_genes, return_to_start, tell
from gatl.strategies.build import build_strategy
from gatl.trust import UNPICKLING, word_for, words_of

SMALL = ("experiment=quickstart", "model=lenet5", "trainer.accelerator=cpu", "evaluator.workers=1")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a hostile file makes when it is run."""
    return tmp_path / "mark"


@pytest.fixture(scope="module")
def composed() -> str:
    """The configuration of a small run."""
    return OmegaConf.to_yaml(compose(SMALL))


@pytest.fixture(scope="module")
def config(composed: str) -> Config:
    """The same, checked."""
    return checked(OmegaConf.create(composed))


@pytest.fixture
def run(tmp_path: Path, composed: str) -> Path:
    """The folder of a small run that has just begun."""
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(composed)
    return folder


class Hostile:
    """Its pickle makes a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self._mark}",)


def write(run: Path, **values: object) -> None:
    """Change a run's configuration; a dot in a key is written as two underscores."""
    path = run / ".hydra" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    for key, value in values.items():
        node = content
        *groups, last = key.split("__")
        for group in groups:
            node = node[group]
        node[last] = value
    path.write_text(yaml.safe_dump(content))


def refused(capsys: pytest.CaptureFixture, main, *words: str) -> str:
    """Run a command that must end with one line; return that."""
    capsys.readouterr()
    before, sys.argv = sys.argv, ["gatl", *words]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    line = capsys.readouterr().err
    assert ended.value.code == 1
    assert re.fullmatch(r"gatl: [^\n]+\n", line), line
    assert line[:-1].isprintable()
    return line


def message(call, *arguments) -> str:
    """Call what must refuse its arguments, in one line; return that."""
    with pytest.raises(UserError) as raised:
        call(*arguments)
    line = " ".join(str(raised.value).split())  # as it is shown
    assert len(line) < 1000
    return line


def target(name: str, **more: object) -> dict[str, object]:
    return {"_target_": name, **more}


TARGETS = {
    "args": lambda m: {"data__source": target("os.system", _args_=[f"touch {m}"])},
    "keyword": lambda m: {"model__network": target("os.system", command=f"touch {m}")},
    "eval": lambda m: {"search": target("builtins.eval", _args_=[f"open('{m}', 'w')"])},
    "evaluator": lambda m: {"evaluator___target_": "subprocess.Popen"},
    "source": lambda m: {"model__sources": {"x": target("pathlib.Path.touch", self=str(m))}},
    "partial": lambda m: {"search__sampler": target("os.system", _partial_=True)},
    "nested": lambda m: {"model__network__x": [{"y": target("os.system", command=f"touch {m}")}]},
    "in logger": lambda m: {"logger__save_dir": target("os.system", command=f"touch {m}")},
    "unpickles": lambda m: {"data__source": target("numpy.load", file="x", allow_pickle=True)},
    "begins alike": lambda m: {"search": target("gatl.strategies.genetic.of_mode.x")},
    "gatl's, elsewhere": lambda m: {"logger": target("gatl.data.digits.load")},
    "hydra's": lambda m: {"data__source": target("hydra.utils.instantiate", config="x")},
    "by a word": lambda m: {"data__name": "os.system", "data__source": target("${data.name}")},
    "no text": lambda m: {"data__source": {"_target_": ["os.system"]}},
}


@pytest.mark.parametrize("hostile", TARGETS.values(), ids=TARGETS)
def test_a_folder_may_name_no_target_but_gatls_own(run, mark, hostile):
    write(run, **hostile(mark))
    line = message(resumed, run, [], ())
    assert "_target_=" in line
    assert "if you trust whoever made it" in line
    assert "trust=" in line
    assert not mark.exists()


def test_every_command_refuses_such_a_folder(run, mark, capsys):
    write(run, **TARGETS["args"](mark))
    expected = "would run data.source._target_=os.system"
    for main, word in ((gatl.__main__.main, "resume"), (final.main, "run")):
        assert expected in refused(capsys, main, f"{word}={run}")
    assert "holds no run" in refused(capsys, compare.main, f"runs={run}")
    assert not mark.exists()


def test_without_the_check_it_would_be_run(run, mark):
    """Hydra has a list of its own of what is not to be run; this is not on it."""
    from hydra.utils import instantiate

    instantiate(target("pathlib.Path.touch", _args_=[target("pathlib.Path", _args_=[str(mark)])]))
    assert mark.exists()


def test_trust_names_exactly_what_may_be_run(run, capsys):
    source = target("sklearn.datasets.load_digits")
    write(run, data__source=source)
    for trust in ("", "sklearn", "sklearn.datasets", "sklearn.datasets.", "load_digits"):
        with pytest.raises(UserError, match=r"add trust=sklearn\.datasets\.load_digits\.$"):
            resumed(run, [], {trust})
    trusted, words = words_of([f"resume={run}", "trust=a.b,sklearn.datasets.load_digits"])
    assert words == [f"resume={run}"]
    config = resumed(run, [], trusted)
    assert config.data.source == source
    assert word_for(config) == ["trust=sklearn.datasets.load_digits"]  # in the next command
    assert word_for(checked(compose(SMALL))) == []
    assert "trust= goes with resume=" in refused(capsys, gatl.__main__.main, "trust=os.system")


def test_what_the_user_overrides_is_not_restricted_but_what_is_remembered_is(run):
    override = "evaluator._target_=my.Evaluator"
    assert resumed(run, [override], ()).evaluator._target_ == "my.Evaluator"
    remember(run, [override])
    with pytest.raises(UserError, match=r"evaluator\._target_=my\.Evaluator"):
        resumed(run, [], ())


def goes_on(run, *words):
    composed = compose([*SMALL, *words])
    OmegaConf.save(composed, run / ".hydra" / "config.yaml")
    return resumed(run, [], UNPICKLING) == checked(composed)


def test_what_gatl_composes_may_go_on(run):
    assert goes_on(run, "search=tpe", "data=folder", "data.root=/images", "logger=tensorboard")
    assert goes_on(
        run, "+search.sampler.n_startup_trials=5", "search=tpe", "data.name=${model.name}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("group", ["data", "search", "model", "logger", "ga", "pruner"])
def test_all_that_gatl_composes_may_go_on(run, group):
    for path in (Path(gatl.__file__).parents[1] / "conf" / group).glob("*.yaml"):
        assert goes_on(run, f"{group}={path.stem}", "++data.root=/images")


RESOLVERS = {
    "plain": {"data__name": "${mark:}"},
    "environment": {"data__name": "${oc.env:HOME}"},
    "in a text": {"data__name": "a ${oc.env:HOME} b"},
    "escaped": {"data__name": "\\${mark:}"},
    "put together": {"data": {"a": "$", "b": "{mark:}", "c": "${data.a}${data.b}", "d": "${.c}"}},
    "by a part": {"data": {"a": "mark:", "c": "${${data.a}}"}},
    "in a key": {"data": {"${mark:}": 1}},
    "in a list": {"search__initial": [{"dropout": "${mark:}"}]},
    "gatl's, changed": {"model__n_layers": "${timm:${mark:},n_layers}"},
}


@pytest.mark.parametrize("hostile", RESOLVERS.values(), ids=RESOLVERS)
def test_a_folder_may_name_no_resolver_but_gatls_own(run, mark, hostile):
    OmegaConf.register_new_resolver("mark", lambda *_: mark.touch(), replace=True)
    try:
        write(run, **hostile)
        line = message(resumed, run, [], ())
        assert "nterpolation" in line
        assert os.environ["HOME"] not in line.replace(str(run), "")
    finally:
        OmegaConf.clear_resolver("mark")
    assert not mark.exists()


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 30))
TEXTS = {
    "tag": "seed: !!python/object/apply:os.system ['touch MARK']",
    "new": "seed: !!python/object/new:os.system ['touch MARK']",
    "name": "seed: !!python/name:os.system",
    "path": "seed: !!python/object/apply:pathlib.Path ['${oc.env:HOME}']",
    "bytes": "seed: !!binary AAAA",
    "aliases": BOMB,
    "deep": "seed: " + "[" * 500 + "]" * 500,
    "many digits": "seed: " + "9" * 5000,
    "many hexadecimal digits": "seed: 0x" + "f" * 5000,
    "control": 'seed: 0\ndata: {name: "\\e]0;title\\a"}',
    "no group": "data: 3",
    "nothing": "",
    "no text": "\0",
    "infinite": "seed: .inf",
    "large": "seed: [" + "0," * 200_000 + "]",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_hostile_yaml_file_is_one_line(run, mark, monkeypatch, composed, text):
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    text = text.replace("MARK", str(mark))
    (run / ".hydra" / "config.yaml").write_text(text)
    message(resumed, run, [], ())
    (run / ".hydra" / "config.yaml").write_text(composed)
    (run / JOURNAL).write_text("")
    for name in ("overrides.yaml", "hydra.yaml"):
        (run / ".hydra" / name).write_text(text)
        for read in (
            compare.read_runs,
            return_to_start,
            lambda run: remember(run, ["budget.trials=1"]),
        ):
            with contextlib.suppress(UserError):  # some are empty, or hold what nobody asks for
                read(run)
    assert not mark.exists()


def test_cma_es_needs_trust_because_it_unpickles(run):
    write(run, search=yaml.safe_load(Path("conf/search/cmaes.yaml").read_text()))
    assert "add trust=optuna.samplers.CmaEsSampler." in message(resumed, run, [], ())
    config = resumed(run, [], UNPICKLING)
    assert word_for(config) == ["trust=optuna.samplers.CmaEsSampler"]


def test_a_folder_connects_to_no_cluster_of_its_own_choice(run):
    """What a Ray cluster sends is unpickled."""
    ray = yaml.safe_load(Path("conf/evaluator/ray.yaml").read_text())
    for address in ("local", "auto"):  # this machine says where that is
        write(run, evaluator=ray | {"address": address})
        assert word_for(resumed(run, [], ())) == []
    write(run, evaluator=ray | {"address": "ray://far:10001"})
    assert "add trust=ray://far:10001; or give" in message(resumed, run, [], ())
    assert "add trust=ray://far:10001; or give" in message(resumed, run, ["budget.trials=9"], ())
    assert "add trust=ray://far:10001; or give" in message(
        resumed, run, [], {"ray://far:1", "auto"}
    )
    config = resumed(run, [], {"ray://far:10001"})
    assert word_for(config) == ["trust=ray://far:10001"]
    for given in ("evaluator.address=ray://near:1", "evaluator=local"):
        resumed(run, [given], ())
    with pytest.raises(UserError, match="would connect to ray://far:10001"):
        resumed(run, ["evaluator={workers: 2}"], ())  # which leaves the folder's address


def test_no_other_sampler_unpickles_nor_does_the_journal():
    samplers = Path(optuna.samplers.__file__).parent
    unpickling = [p.name for p in samplers.rglob("*.py") if "pickle.load" in p.read_text()]
    assert unpickling == ["_cmaes.py"]
    assert not issubclass(JournalFileBackend, BaseJournalSnapshot)  # what is a pickle there


def test_a_pickle_in_the_journal_is_not_run(tmp_path, mark):
    """Not even by CMA-ES, whose own study lies in memory."""
    config = checked(compose([*SMALL, "search=cmaes", "search.lag=0", "search.initial=[]"]))
    strategy = build_strategy(config)
    study = open_study(tmp_path, strategy)
    state = {"cma:optimizer:0": pickle.dumps(Hostile(mark)).hex()}
    for number in range(3):
        genes = config.space.to_dict(strategy.propose(number, study.get_trials()))
        trial = begin(study, genes, strategy.distributions())
        for key, value in state.items():
            study._storage.set_trial_system_attr(trial._trial_id, key, value)
            study._storage.set_study_system_attr(study._study_id, key, value)
        tell(study, number, Outcome(1.0 / (number + 1)))
    again = open_study(tmp_path, build_strategy(config))
    assert any(state.items() <= trial.system_attrs.items() for trial in again.get_trials())
    again.ask(strategy.distributions())
    assert not mark.exists()
    with contextlib.suppress(Exception):  # what it reads is no state of CMA-ES
        again.sampler = optuna.samplers.CmaEsSampler(seed=0)
        again.ask(strategy.distributions())
    assert mark.exists()


def record_in(folder: Path) -> optuna.Study:
    folder.mkdir(parents=True)
    return record(folder)


def record(folder: Path) -> optuna.Study:
    """Write a record of three trials, each with an end of its own; return the study."""
    strategy = build_strategy(checked(compose([*SMALL, "search=random"])))
    study = open_study(folder, strategy)
    ends = (Outcome(0.5, 0.9, 1), Outcome(0.7, 0.8, 1, pruned=True), Outcome(error="OSError: no"))
    for number, outcome in enumerate(ends):
        begin(study, strategy.space.to_dict(strategy.opening(number)), strategy.distributions())
        tell(study, number, outcome, number + 1.0)
    return study


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """The journal of such a record."""
    folder = tmp_path_factory.mktemp("record")
    record(folder)
    return (folder / JOURNAL).read_text().splitlines()


def changed(op: int, key: str, value: object):
    """Return what sets a value in the first line of a kind; the key may lead into it."""

    def change(lines: list[str]) -> None:
        index = next(i for i, line in enumerate(lines) if json.loads(line)["op_code"] == op)
        log = json.loads(lines[index])
        node, *keys = log, *key.split(".")
        for name in keys[:-1]:
            node = node[name]
        node[keys[-1]] = value
        lines[index] = json.dumps(log)

    return change


OUTCOME, STATE, BEGIN, STUDY = 8, 6, 4, 0
JOURNALS = {
    "no text": lambda lines: lines.insert(0, "\0\0"),
    "no group": lambda lines: lines.insert(0, "[]"),
    "no such operation": lambda lines: lines.append('{"op_code": 99}'),
    "deep": lambda lines: lines.append("[" * 100_000 + "]" * 100_000),
    "many digits": lambda lines: lines.append('{"op_code": ' + "9" * 5000 + "}"),
    "loss is NaN": changed(OUTCOME, "user_attr.outcome.val_loss", float("nan")),
    "loss is huge": changed(STATE, "values", [1e300]),
    "loss is a huge whole number": changed(STATE, "values", [10**400]),
    "loss is a text": changed(STATE, "values", ["<script>"]),
    "no loss": changed(STATE, "values", None),
    "several losses": changed(STATE, "values", [1.0, 2.0]),
    "epochs are a text": changed(OUTCOME, "user_attr.outcome.epochs", "../../x"),
    "outcome is a list": changed(OUTCOME, "user_attr.outcome", [1]),
    "outcome has more": changed(OUTCOME, "user_attr.outcome.path", "/etc/passwd"),
    "seconds are infinite": changed(OUTCOME, "user_attr.outcome.seconds", float("inf")),
    "fits are a number": changed(OUTCOME, "user_attr.outcome.fits", 3),
    "a fit has two numbers": changed(OUTCOME, "user_attr.outcome.fits", [[1.0, 2.0]]),
    "a fit began never": changed(OUTCOME, "user_attr.outcome.fits", [[float("nan"), 2.0, 1]]),
    "a fit has a text": changed(OUTCOME, "user_attr.outcome.fits", [[1.0, 2.0, "x"]]),
    "time is a huge whole number": changed(OUTCOME, "user_attr.outcome.duration_s", 10**400),
    "loss of the outcome is one": changed(OUTCOME, "user_attr.outcome.val_loss", -(10**400)),
    "epochs are true": changed(OUTCOME, "user_attr.outcome.epochs", True),
    "pruned is 1": changed(OUTCOME, "user_attr.outcome.pruned", 1),
    "state is none": changed(STATE, "state", 17),
    "state is waiting": changed(STATE, "state", 4),
    "gene is a text": changed(BEGIN, "params.dropout", "../../x"),
    "maximises": changed(STUDY, "directions", [2]),
}


@pytest.mark.parametrize("change", JOURNALS.values(), ids=JOURNALS)
def test_a_hostile_journal_is_one_line(tmp_path, lines, change):
    lines = list(lines)
    change(lines)
    (tmp_path / JOURNAL).write_text("\n".join(lines) + "\n")
    assert "study.journal is damaged" in message(open_study, tmp_path, None)
    assert "left out" in message(compare.read_runs, tmp_path)


def test_a_journal_of_other_genes_is_one_line(tmp_path, lines):
    (tmp_path / JOURNAL).write_text("\n".join(lines) + "\n")
    config = checked(compose([*SMALL, "search=random"]))
    study = open_study(tmp_path, None)
    require_genes(study, build_strategy(config).distributions())
    for words in (["space.dropout.high=0.5"], ["space.dropout.value=0.5"]):
        narrow = build_strategy(checked(compose([*SMALL, *words])))
        with pytest.raises(ValueError, match="genes of trial 0"):
            require_genes(study, narrow.distributions())
    for gene, value in {"included_layers": 5000, "frozen_layers": -3, "dropout": 7.5}.items():
        outside = list(lines)
        changed(BEGIN, f"params.{gene}", value)(outside)
        (tmp_path / JOURNAL).write_text("\n".join(outside) + "\n")
        study = open_study(tmp_path, None)
        with pytest.raises(ValueError, match="genes of trial 0"):
            require_genes(study, build_strategy(config).distributions())
    more = changed(BEGIN, "params", {"os.system": 1.0})
    lines = list(lines)
    more(lines)
    (tmp_path / JOURNAL).write_text("\n".join(lines) + "\n")
    message(open_study, tmp_path, None)


RESULTS = (
    "[" * 100_000,
    '{"trials": "9", "tests": "x"}',
    '{"trials": [], "tests": -0.5}',
    '{"trials": 1e400, "settings": SETTINGS, "test": {"accuracy": "x"}}',
    '{"trials": 99, "settings": SETTINGS, "test": []}',
    '{"trials": 99, "settings": SETTINGS, "test": {"accuracy": "<b>"}}',
    '{"trials": ' + "9" * 5000 + "}",
    '{"trials": 99, "settings": SETTINGS, "test": {"accuracy": 1e400}}',
    '{"trials": 99, "settings": SETTINGS, "test": {"accuracy": ' + "9" * 400 + "}}",
    '{"trials": 99, "settings": SETTINGS, "test": {"accuracy": true}}',
    "null",
)


@pytest.mark.parametrize("text", RESULTS, ids=range(len(RESULTS)))
def test_a_hostile_result_is_none(tmp_path, lines, config, text):
    settings = json.dumps(dataclasses.asdict(config.final))
    (tmp_path / "result.json").write_text(text.replace("SETTINGS", settings))
    assert final.made_before(tmp_path, config, 3) is None
    (tmp_path / JOURNAL).write_text("\n".join(lines) + "\n")
    assert "left out" in message(compare.read_runs, tmp_path)


class Page(HTMLParser):
    """Collects the elements of a page, and their attributes' names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.names |= {tag, *(name for name, _ in attrs)}


def test_the_page_and_the_terminal_show_markup_as_text(tmp_path, capsys):
    hostile = "<img src=x onerror=alert(1)>"
    for name in ("<script>alert(1)", "a\x1b]0;title\x07", os.fsdecode(b"fl\xf6wer")):
        folder = tmp_path / name
        (folder / ".hydra").mkdir(parents=True)
        record(folder)
        words = [f"a={hostile}{name}", *(f"{key}={len(name)}" for key in "bcd"), f"e={hostile}"]
        words = [word.encode(errors="replace").decode() for word in words]
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(words))
        (folder / "result.json").write_text(json.dumps({"test": {"accuracy": 0.5}}))
    (tmp_path / hostile).mkdir()
    (tmp_path / hostile / JOURNAL).write_text("damage\n")
    compare.compare(tmp_path)
    page = Page()
    page.feed((tmp_path / "compare.html").read_text(encoding="utf-8"))
    assert not page.names & {"script", "img", "onerror", "src"}
    assert "&lt;img src=x onerror=alert(1)&gt;" in (tmp_path / "compare.html").read_text("utf-8")
    assert "\x1b" not in capsys.readouterr().out
    with (tmp_path / "compare.csv").open(encoding="utf-8") as file:
        groups = {row["group"] for row in csv.DictReader(file)}
    assert groups == {"<script>alert(1)", r"a\x1b]0;title\x07", r"fl\udcf6wer"}


LINKS = ("history.csv", "trials", "final", "best.ckpt", ".hydra/overrides.yaml", "final/fit")


@pytest.mark.parametrize("name", LINKS)
def test_a_run_folder_with_a_link_out_of_it_is_refused(run, tmp_path, name):
    """What is written there would be written, or removed, elsewhere."""
    (run / "study.journal.lock").symlink_to(tmp_path / "gone")  # of a killed driver, moved since
    (run / "latest").symlink_to(run / ".hydra")  # inside
    resumed(run, [], ())
    victim = tmp_path / "victim"
    victim.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to("../victim" if "/" not in name else victim)
    assert f"{run / name} is a link to {victim}" in message(resumed, run, [], ())


def test_a_run_folder_with_a_pipe_is_refused(run):
    os.mkfifo(run / "result.json")
    assert "result.json is neither a file nor a folder" in message(resumed, run, [], ())


def make_file(path):
    path.write_text("x")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *((name, Path.mkdir) for name in ("study.journal", "study.journal.lock", "history.csv")),
        *((name, Path.mkdir) for name in ("images.csv", "result.json", "best.ckpt")),
        *((name, make_file) for name in ("final", "trials", ".images", ".features")),
    ],
)
def test_a_file_where_a_folder_should_be_is_one_line(run, capsys, name, make):
    make(run / name)
    expected = f"{name} is a {'folder' if make is Path.mkdir else 'file'}, as no run makes it"
    assert expected in message(resumed, run, [], ())
    assert expected in refused(capsys, gatl.__main__.main, f"resume={run}")


def test_a_refusal_is_no_damage_whatever_the_folder_is_called(run, mark):
    write(run, **TARGETS["args"](mark))
    folder = run.rename(run.with_name("a\nrun"))
    line = message(resumed, folder, [], ())
    assert "trust=os.system" in line
    assert "damaged" not in line


def test_a_run_that_links_elsewhere_is_left_out_of_a_comparison(tmp_path):
    for name in ("0", "1"):
        record_in(tmp_path / "sweep" / name)
    (tmp_path / "secret.yaml").write_text("- password=hunter2")
    (tmp_path / "sweep/1/.hydra").mkdir()
    (tmp_path / "sweep/1/.hydra/overrides.yaml").symlink_to(tmp_path / "secret.yaml")
    runs, left_out = compare.read_runs(tmp_path / "sweep")
    assert [run.folder.name for run in runs] == ["0"]
    assert "out of the run folder" in left_out[0]


@pytest.mark.parametrize("suffix", ["html", "csv", "png", "svg"])
def test_a_comparison_is_not_written_through_a_link(tmp_path, suffix):
    (tmp_path / "runs" / "0").mkdir(parents=True)
    record(tmp_path / "runs" / "0")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "runs" / f"compare.{suffix}").symlink_to(victim)
    assert "is a link" in message(compare.compare, tmp_path / "runs")
    assert victim.read_text() == "mine"


def checkpoint(path: Path, settings: dict | None = None, **more: object) -> Path:
    """Write a checkpoint of a small classifier, with other settings perhaps."""
    genes = {"included_layers": 5, "frozen_layers": 0, "learning_rate": 0.1, "dropout": 0.0}
    classifier = Classifier(target("gatl.models.lenet.lenet5"), genes, ["a", "b"], {})
    content = {
        "state_dict": classifier.state_dict(),
        "hyper_parameters": dict(classifier.hparams) | (settings or {}),
        "pytorch-lightning_version": lightning.__version__,
        **more,
    }
    torch.save(content, path)
    return path


def test_a_checkpoint_may_name_no_target_but_gatls_own(tmp_path, mark):
    load = Classifier.load_from_checkpoint
    path = tmp_path / "best.ckpt"
    assert load(checkpoint(path)).classes == ("a", "b")
    for settings in (
        {"network": target("os.system", _args_=[f"touch {mark}"])},
        {"network": target("gatl.models.lenet.lenet5", x=target("os.system", command="x"))},
        {"network": target("gatl.data.folder.load", root="/")},
        {"genes": target("os.system", command=f"touch {mark}")},
    ):
        assert "best.ckpt would run model." in message(load, checkpoint(path, settings))
    touch = (
        f"{{_target_: pathlib.Path.touch, _args_: [{{_target_: pathlib.Path, _args_: [{mark}]}}]}}"
    )
    for text in (f"${{oc.create:'{touch}'}}", f"${{oc.create:{touch}}}", "${oc.env:HOME}"):
        settings = {"network": target("gatl.models.lenet.lenet5", x=text)}
        assert "holds the interpolation" in message(load, checkpoint(path, settings))
    settings = {"network": target("gatl.models.lenet.lenet5", x=1)}
    assert "unexpected keyword argument 'x'" in message(load, checkpoint(path, settings))
    for settings in ({"_instantiator": "os.system"}, {"class_path": "os.system"}):
        assert "its settings are" in message(load, checkpoint(path, settings))
    message(load, checkpoint(path, more=Hostile(mark)))
    torch.save([1], path)
    message(load, path)
    assert not mark.exists()
    path = checkpoint(path, {"network": target(f"{__name__}.lenet")})
    sys.modules[__name__].lenet = lambda **genes: gatl.models.lenet.lenet5(**genes)
    assert f"add trust={__name__}.lenet." in message(load, path)
    with contextlib.suppress(Exception):  # this module's name need not be importable
        load(path, trusted={f"{__name__}.lenet"})


def test_a_small_file_makes_no_large_weights(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(1).expand(10**12)}, path)
    assert path.stat().st_size < 10_000
    assert "is larger than what the file holds of it" in message(read_weights, str(path), {})


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_weights_run_nothing(tmp_path, mark, form):
    path = tmp_path / "weights.pt"
    if form == "torch":
        torch.save({"conv.weight": Hostile(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"conv.weight": Hostile(mark)}))
    assert "is refused" in message(read_weights, str(path), {})
    settings = {"network": target("os.system", command=f"touch {mark}"), "preprocessing": {}}
    read = read_weights(str(checkpoint(path, settings)), {})  # its target is compared, not called
    assert read.card["backbone"]["_target_"] == "os.system"
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng = np.random.default_rng(0)

    def split(n: int, prefix: str) -> Split:
        names = [f"{prefix}{i}" for i in range(n)]
        return Split(list(rng.integers(0, 255, (n, 32, 32, 3), np.uint8)), np.arange(n) % 2, names)

    source = Source(("a", "b"), split(8, "x"), split(4, "y"), split(4, "z"))
    folder = tmp_path_factory.mktemp("images")
    return prepare(source, image_size=32, split_seed=0, max_bad=0, folder=folder)


def test_a_checkpoint_of_a_rung_runs_nothing(tmp_path, mark, images, config):
    (tmp_path / "0").mkdir()
    torch.save({"callbacks": Hostile(mark)}, tmp_path / "0" / "rung.ckpt")
    genes = {"included_layers": 5, "frozen_layers": 0, "learning_rate": 0.1, "dropout": 0.1}
    stop = multiprocessing.get_context("spawn").Event()
    silence()
    outcome = Fitter(config, images, stop)(Fit(genes, 1, 0, tmp_path / "0"))
    assert (outcome.error, outcome.epochs) == (None, 1)  # it begins anew
    assert not mark.exists()


@pytest.mark.parametrize("lie", ["local://VICTIM", "FOLDER/../VICTIM", "s3://bucket/x"])
def test_a_final_training_deletes_no_file_that_its_checkpoint_names(tmp_path, lie):
    folder, victim = tmp_path / "fit", tmp_path / "victim"
    folder.mkdir()
    lie = lie.replace("FOLDER/../VICTIM", f"{folder}/../victim").replace("VICTIM", str(victim))
    (folder / "training.json").write_text('{"threads": 1}')
    epochs = [{"val_loss": 1.0}]
    checkpoint(folder / "best.ckpt", epochs=epochs)
    states = {
        "ModelCheckpoint": {"dirpath": str(folder), "best_model_path": "", "best_k_models": {}}
    }
    checkpoint(folder / "last.ckpt", epochs=epochs, callbacks=states)
    assert retraining._begun(folder, {}, 3)["epochs"] == epochs
    for key, value in (("best_model_path", lie), ("best_k_models", {lie: 1.0})):
        hostile = copy.deepcopy(states)
        hostile["ModelCheckpoint"][key] = value
        (folder / "training.json").write_text('{"threads": 1}')
        checkpoint(folder / "best.ckpt", epochs=epochs)
        checkpoint(folder / "last.ckpt", epochs=epochs, callbacks=hostile)
        assert retraining._begun(folder, {}, 3) is None


def test_nothing_in_the_name_of_the_run_folder_is_resolved(tmp_path):
    folder = tmp_path / "${oc.env:HOME}" / "trials" / "0"
    trainer = build_trainer(checked(compose(SMALL)), 1, folder, [], 0)
    assert trainer.logger.log_dir == str(folder)


def test_a_logger_writes_into_the_run_folder_alone(tmp_path):
    pytest.importorskip("tensorboard")
    config = checked(compose([*SMALL, "logger=tensorboard", f"+logger.sub_dir={tmp_path}/x"]))
    with pytest.raises(UserError, match=r"would write into .*/x, not into"):
        build_trainer(config, 1, tmp_path / "run" / "trials" / "0", [], 0)
    config = checked(compose([*SMALL, "logger=tensorboard", "+logger.sub_dir=x"]))
    build_trainer(config, 1, tmp_path / "run" / "trials" / "0", [], 0)


START = """
import multiprocessing, pathlib, sys
from gatl.record import return_to_start

if __name__ == "__main__":
    return_to_start(pathlib.Path(sys.argv[1]))
    process = multiprocessing.get_context("forkserver").Process(target=print)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_no_worker_imports_what_lies_where_the_folder_says_it_began(run, mark, tmp_path):
    """Python begins a worker in the current folder, and would look for its modules there first."""
    (run / "multiprocessing.py").write_text(f"open({str(mark)!r}, 'w')")
    (run / ".hydra" / "hydra.yaml").write_text(f"hydra: {{runtime: {{cwd: {run}}}}}")
    script = tmp_path / "start.py"
    script.write_text(START)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    subprocess.run([sys.executable, script, run], check=True, env=environment)
    assert not mark.exists()


def members(mark: Path) -> dict[str, tarfile.TarInfo]:
    """Return what an archive must not hold."""

    def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        return member

    return {
        "above": info(f"../../{mark.name}"),
        "absolute": info(str(mark)),
        "link": info("link", tarfile.SYMTYPE, str(mark.parent)),
        "hard link": info("link", tarfile.LNKTYPE, f"../../{mark.name}"),
        "device": info("null", tarfile.CHRTYPE),
        "pipe": info("pipe", tarfile.FIFOTYPE),
    }


@pytest.mark.parametrize("kind", members(Path("/mark")))
def test_an_archive_is_unpacked_into_its_folder_alone(tmp_path, mark, monkeypatch, kind):
    """Even one with the right checksum."""
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.addfile(members(mark)[kind])
    digest = hashlib.md5((root / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", digest)
    line = message(cifar.load, str(root), 10)
    assert "incomplete or damaged" in line
    found = set(tmp_path.rglob("*"))
    assert {path for path in found if not path.is_relative_to(root)} == {root.parent}
    assert not any(path.is_symlink() for path in found)
    assert all(path.is_dir() or path.is_file() for path in found)
    assert not mark.exists()
    assert tarfile.TarFile.extraction_filter is None  # as it was


def test_an_archive_with_another_checksum_is_not_unpacked(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/x")
    assert "cannot be downloaded" in message(cifar.load, str(tmp_path), 10)
    assert not (tmp_path / "cifar-10-batches-py").exists()


def test_the_pickles_of_cifar_may_hold_arrays_alone(tmp_path, mark):
    path = tmp_path / "data_batch_1"
    for protocol in range(5):  # that of the authors is 2
        batch = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}
        path.write_bytes(pickle.dumps(batch, protocol))
        read = cifar._read(path)
        assert np.array_equal(read["data"], batch["data"])
        path.write_bytes(pickle.dumps(batch | {"labels": Hostile(mark)}, protocol))
        with pytest.raises(pickle.UnpicklingError, match=r"would run (posix|os)\.system"):
            cifar._read(path)
    assert not mark.exists()
