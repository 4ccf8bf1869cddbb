"""Composing with overrides, what is said when it fails, and the command itself."""

import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import gatl as gatl_package
from gatl import __main__, __version__
from gatl.cli import (
    compose,
    compose_resumed,
    folder_named,
    help_requested,
    narrow_output,
    new_folder,
    one_line_errors,
    own_groups,
    parse,
    quoted,
    read_command_line,
    remember,
    resolve_if,
    resumed,
    split_jobs,
)
from gatl.completion import shell_completion
from gatl.config import checked
from gatl.errors import UserError

CONF = Path(gatl_package.__file__).parents[1] / "conf"
DATA = "cifar10, cifar100, digits, fashion_mnist, flowers, folder"
NO_OVERRIDE = "is no override: write KEY=VALUE"
SEVERAL = (
    "gives several values: sweep over them with python -m gatl -m, or write one list as [a,b]."
)

MESSAGES = {
    ("ga.pops=4",): "ga.pops is no setting (nearest: ga.pop); see python -m gatl --help.",
    ("gap.pop=4",): "gap.pop is no setting (nearest: ga.pop); see python -m gatl --help.",
    ("dropout=0.5",): "dropout is no setting (nearest: space.dropout); see python -m gatl --help.",
    ("ga={pops: 4}",): "ga.pops is no setting (nearest: ga.pop); see python -m gatl --help.",
    ("foo=1",): "foo is no setting; see python -m gatl --help.",
    ("hydra.foo=1",): "hydra.foo is no setting; see python -m gatl --help.",
    ("space.weight_decay.low=0",): (
        'space.weight_decay.low: add the gene whole, "+space.weight_decay={low: LOW, high: HIGH}".'
    ),
    ("data=flower",): f"data=flower is no choice (nearest: flowers); there are: {DATA}",
    ("data=null",): f"data must be one of {DATA}, but got None.",
    ("pruner=${defaults}",): (
        "pruner must be one of none, successive_halving, but got ${defaults}."
    ),
    ("experiment=3",): (
        "experiment must be one of debug, laptop, original, quickstart, single_gpu, but got 3."
    ),
    ("+ga.pop=4",): "ga.pop is set already: leave out the +.",
    ("+data=flowers",): "data is set already: leave out the +.",
    ("ga.pop=4,6",): f"ga.pop=4,6 {SEVERAL}",
    ("ga=default,original",): f"ga=default,original {SEVERAL}",
    ("seed=range(1,3)",): f"seed=range(1,3) {SEVERAL}",
    ("seed=1", "ga.pop"): f"'ga.pop' {NO_OVERRIDE}; a value",
    ("=",): f"'=' {NO_OVERRIDE}.",
    ("ga.pop=(",): f"'ga.pop=(' {NO_OVERRIDE}; a value",
    ("data.root=a(b)",): f"'data.root=a(b)' {NO_OVERRIDE}; a value with blanks, brackets",
}


@pytest.mark.parametrize("overrides", MESSAGES, ids=" ".join)
def test_what_cannot_be_composed_is_one_line(overrides):
    with pytest.raises(UserError) as raised:
        compose(overrides)
    assert str(raised.value).startswith(MESSAGES[overrides])
    assert "\n" not in str(raised.value)


def test_quotes_carry_any_letter():
    assert compose(['data.root="/home/jürgen/my photos"']).data.root == "/home/jürgen/my photos"


@pytest.mark.parametrize(
    "value", ["~/photos", "~", "/home/jürgen", "a&b", "a;b", "50 € + 3", "写真", "C:/x#1!"]
)
def test_letters_that_hydra_has_no_word_for_need_no_quotes(value):
    for key in ("data.root", "+data.root", "model.weights"):
        (override,) = parse([quoted(f"{key}={value}")])
        assert override.value() == value


@pytest.mark.parametrize(
    "word",
    [
        *("data.root=photos/a-b_c.d", "data.root=my photos", "data.root='~/photos'"),
        *('data.root="/home/jürgen"', "data.root=~/a,~/b", "data.root=ü(1)", "data.root=${x}/ü"),
        *("data.root=ü=1", "~budget.time", "ga.pop", "=", "ga.pop=4", "data.root=it's"),
    ],
)
def test_what_hydra_can_read_or_what_may_mean_something_else_is_left(word):
    assert quoted(word) == word


@pytest.mark.parametrize(
    ("words", "overrides", "for_hydra"),
    [
        (["ga.pop=4", "-m", "seed=1,2"], ["ga.pop=4", "seed=1,2"], ["-m"]),
        (["seed=1", "--cfg", "job", "ga.pop=4"], ["seed=1", "ga.pop=4"], ["--cfg", "job"]),
        (["--info", "all", "seed=1"], ["seed=1"], ["--info", "all"]),
        (["data.root=~/a"], ['data.root="~/a"'], []),
        (["resume=~/a"], ["resume=~/a"], []),
        (["-h", "seed=1"], ["seed=1"], ["-h"]),
        ([], [], []),
    ],
)
def test_options_may_stand_anywhere(monkeypatch, words, overrides, for_hydra):
    monkeypatch.setattr(sys, "argv", ["gatl", *words])
    assert read_command_line().overrides == overrides
    assert sys.argv == ["gatl", *overrides, *for_hydra]
    read = get_args_parser().parse_args()  # as Hydra does it
    assert read.overrides == overrides


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pop", "4"], "--pop is no option: write KEY=VALUE, as in ga.pop=4"),
        (["ga.pop=4", "--ga.pop=4"], "--ga.pop=4 is no option: write KEY=VALUE"),
        (["-x"], "-x is no option: write KEY=VALUE"),
        (["--multi"], "--multi is no option: write KEY=VALUE"),
        (["--cfg", "foo"], "argument --cfg/-c: invalid choice: 'foo'"),
        (["--cfg"], "argument --cfg/-c: expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["gatl", *words])
    with pytest.raises(UserError) as raised:
        read_command_line()
    assert str(raised.value).startswith(message)
    assert str(raised.value).endswith("; see python -m gatl --help.")
    assert capsys.readouterr() == ("", "")


def test_long_lines_are_broken_between_words(capsys):
    with narrow_output(20):
        print("data: digits, cifar-100, flowers\n\n  ga.pop  seed")
    assert capsys.readouterr().out == "data: digits,\n  cifar-100, flowers\n\n  ga.pop  seed\n"


def test_a_word_asks_for_help_or_the_version(capsys):
    for words in (["--help"], ["run=x", "-h"]):
        assert help_requested(words, "python -m gatl.x")
        assert capsys.readouterr().out == "python -m gatl.x\n"
    assert help_requested(["--version"], "python -m gatl.x")
    assert capsys.readouterr().out == f"gatl {__version__}\n"
    assert not help_requested(["run=-h", "help"], "python -m gatl.x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "--cfg", "job"], "Give one of --run, --multirun, --cfg, --info"),
        (["--info", "--run"], "Give one of --run, --multirun, --cfg, --info"),
        (["--resolve", "seed=1"], "--resolve goes with --cfg."),
    ],
)
def test_options_that_do_not_go_together_are_one_line(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["gatl", *words])
    with pytest.raises(UserError) as raised:
        read_command_line()
    assert str(raised.value).startswith(message)


def test_runs_that_start_in_one_second_get_a_folder_each(tmp_path):
    made = [new_folder(tmp_path / "date" / "time") for _ in range(3)]
    assert [folder.name for folder in made] == ["time", "time_2", "time_3"]
    assert all(folder.is_dir() and not list(folder.iterdir()) for folder in made)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made: .*; give another with hydra\.run\.dir="):
        new_folder(tmp_path / "file" / "time")


def test_parse_keeps_the_order():
    keys = [override.key_or_group for override in parse(["seed=1", "data=digits", "+a.b=2"])]
    assert keys == ["seed", "data", "a.b"]


def test_jobs_of_a_sweep_are_the_product():
    assert split_jobs(["ga.pop=4,6", "seed=range(1,3)", "data=digits"]) == [
        ["ga.pop=4", "seed=1", "data=digits"],
        ["ga.pop=4", "seed=2", "data=digits"],
        ["ga.pop=6", "seed=1", "data=digits"],
        ["ga.pop=6", "seed=2", "data=digits"],
    ]
    assert split_jobs(["ga=glob(o*)"]) == [["ga=original"]]
    assert split_jobs([]) == [[]]


def test_what_only_another_sweeper_draws_is_left_to_it():
    draws = "space.dropout.high=interval(0.2,0.9)"
    assert split_jobs(["hydra/sweeper=basic", draws, "seed=1,2"]) == [
        ["hydra/sweeper=basic", "seed=1"],
        ["hydra/sweeper=basic", "seed=2"],
    ]
    with pytest.raises(UserError, match="needs another sweeper"):
        split_jobs([draws])


@pytest.fixture(scope="module")
def of_a_run() -> DictConfig:
    """A configuration that differs from the default."""
    return compose(["experiment=quickstart", "seed=7", "final.seeds=1"])


@pytest.fixture
def run_folder(tmp_path: Path, of_a_run: DictConfig) -> Path:
    path = tmp_path / ".hydra" / "config.yaml"
    path.parent.mkdir()
    OmegaConf.save(of_a_run, path)
    return tmp_path


def test_resumed_configuration_is_the_runs_own(run_folder, of_a_run):
    assert checked(compose_resumed(run_folder, [])) == checked(of_a_run)


def test_budget_evaluator_logger_and_final_may_change_on_resume(run_folder):
    before = checked(compose_resumed(run_folder, []))
    overrides = [
        "budget.time=1h",
        "budget.trials=5",
        "evaluator=local",
        "evaluator.workers=2",
        "logger=tensorboard",
        "logger.default_hp_metric=true",  # of the new choice
        "+logger.log_graph=false",
        "final={top_k: 1}",
    ]
    after = checked(compose_resumed(run_folder, overrides))
    assert (after.budget.seconds, after.n_trials, after.evaluator.workers) == (3600, 5, "2")
    assert after.logger == {
        "_target_": "lightning.pytorch.loggers.TensorBoardLogger",
        "default_hp_metric": True,
        "log_graph": False,
    }
    assert (after.final.top_k, after.final.seeds) == (1, 1)
    for group in ("seed", "data", "model", "space", "search", "initial", "ga", "trainer"):
        assert getattr(after, group) == getattr(before, group)


def test_threads_are_part_of_the_result_and_stay_on_resume(tmp_path):
    path = tmp_path / ".hydra" / "config.yaml"
    path.parent.mkdir()
    OmegaConf.save(compose(["evaluator.threads=4", "evaluator.timeout=1h"]), path)
    for override in ("evaluator=local", "evaluator.workers=2", "evaluator.threads=4"):
        after = resumed(tmp_path, [override], []).evaluator
        assert (after.threads, after.timeout) == (4, "1h")
    for override in ("evaluator.threads=2", "evaluator={threads: 2}"):
        with pytest.raises(UserError) as caught:
            resumed(tmp_path, [override], [])
        assert str(caught.value) == (
            "evaluator.threads=2 cannot change on resume, because the finished search must be the "
            "same: it is 4."
        )
    with pytest.raises(UserError, match=r"evaluator must be a group of settings, but got None\.$"):
        resumed(tmp_path, ["evaluator=null"], [])
    config = OmegaConf.load(path)
    config.evaluator = {"_target_": "my.Evaluator", "workers": 1, "threads": 2}  # without timeout
    OmegaConf.save(config, path)
    after = resumed(tmp_path, ["evaluator=local"], ["my.Evaluator"]).evaluator
    assert (after._target_, after.threads) == ("gatl.evaluation.LocalEvaluator", 2)
    config.evaluator = [1]
    OmegaConf.save(config, path)
    with pytest.raises(UserError, match=r"evaluator must be a group of settings, but got \[1\]"):
        resumed(tmp_path, [], [])


def test_what_a_run_is_told_when_it_goes_on_is_remembered(run_folder):
    (run_folder / ".hydra" / "overrides.yaml").write_text("- seed=7\n- budget.trials=9\n")
    first = ["budget.trials=5", "logger=tensorboard", "final={top_k: 1}"]
    remember(run_folder, first)
    remember(run_folder, ["budget.trials=6"])
    now = checked(compose_resumed(run_folder, []))
    assert (now.n_trials, now.final.top_k, now.final.seeds) == (6, 1, 1)
    assert now.logger["_target_"].endswith("TensorBoardLogger")
    assert "pop: ${ga.pop}\n" in (run_folder / ".hydra" / "config.yaml").read_text()
    overrides = OmegaConf.to_object(OmegaConf.load(run_folder / ".hydra" / "overrides.yaml"))
    assert overrides == ["seed=7", *first[1:], "budget.trials=6"]
    names = {"config.yaml", "overrides.yaml"}
    assert {path.name for path in (run_folder / ".hydra").iterdir()} == names


def test_a_run_that_is_told_nothing_stays_as_it_is(run_folder):
    path = run_folder / ".hydra" / "config.yaml"
    before = path.stat().st_mtime_ns
    remember(run_folder, [])
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=8", "seed=8 cannot change on resume"),
        ("data=flowers", "data=flowers cannot change on resume"),
        ("+space.weight_decay={value: 0}", "+space.weight_decay={value: 0} cannot change on"),
        ("hydra.run.dir=x", "hydra.run.dir=x cannot change on resume"),
        ("~budget.time", "~budget.time cannot change on resume"),
        ("logger.foo=1", "logger.foo is no setting (nearest: logger)"),
        ("final.sead=1", "final.sead is no setting (nearest: final.seeds)"),
        ("logger=mlflow", "logger=mlflow is no choice; there are: csv, tensorboard, wandb"),
        ("final.seeds=1,2", f"final.seeds=1,2 {SEVERAL}"),
        ("budget", f"'budget' {NO_OVERRIDE}"),
    ],
)
def test_what_may_not_change_on_resume(run_folder, override, message):
    with pytest.raises(UserError) as raised:
        compose_resumed(run_folder, [override])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder: it has no .hydra/config.yaml."),
        ("a: [", "cannot be read"),
        ("- 1", "is no configuration"),
        ("\xff", "cannot be read"),
    ],
)
def test_folder_that_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / ".hydra").mkdir()
        (tmp_path / ".hydra" / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as raised:
        checked(compose_resumed(tmp_path, []))
    assert str(tmp_path) in str(raised.value)
    assert message in str(raised.value)


def test_a_configuration_cut_off_anywhere_is_one_line_that_names_it(run_folder):
    path = run_folder / ".hydra" / "config.yaml"
    content, config = path.read_bytes(), resumed(run_folder, [], [])
    ends = [i + 1 for i, letter in enumerate(content) if letter == ord("\n")]
    cuts = {0, 1, *ends[:-1:20], ends[-2], len(content) - 4, *range(37, len(content), 331)}
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(UserError) as raised:
            resumed(run_folder, [], [])
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    path.write_bytes(content[:-1])
    assert resumed(run_folder, [], []) == config


def test_user_error_is_one_line_and_status_1(capsys, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise UserError("a\n\x1b[2Jb")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "gatl: a\\n\\x1b[2Jb\n"


def test_user_error_that_hydra_wraps_is_found(capsys, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    target = {"_target_": "gatl.data.folder.load", "root": "/nowhere"}
    with pytest.raises(SystemExit), one_line_errors():
        instantiate(target)
    line = capsys.readouterr().err
    assert line.startswith("gatl: data.root=/nowhere ")
    with pytest.raises(SystemExit), one_line_errors():
        instantiate({"_target_": "gatl.nothing"})
    line = capsys.readouterr().err
    assert "gatl.nothing" in line
    assert line.count("\n") == 1


def test_full_error_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError), one_line_errors():
        raise UserError("a")
    with pytest.raises(InstantiationException), one_line_errors():
        instantiate({"_target_": "gatl.nothing"})


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0


def gatl(
    folder: Path, *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    environment |= env or {}
    return subprocess.run(
        [sys.executable, "-m", "gatl", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


TYPING_ERRORS = [
    ["ga.pop=1"],
    ["ga.pops=4"],
    ["data=folder"],
    ["data=folder", "~data.source.root"],
    ["-m", "ga.pop=4,1"],
    ["-m", "ga.pop=4,", "seed=interval(0,1)"],
    ["data=folder", "data.root=nowhere"],
    ["data=folder", "data.root=~/no such folder"],
    ["-m", "data=folder", "data.root=nowhere", "seed=1,2"],
    ["--pop", "4"],
    ["resume=nowhere"],
    ["-m", "resume=nowhere"],
    ["--cfg", "job", "ga.pops=4"],
    ["--help", "ga.pops=4"],
    ["--info", "config", "ga.pops=4"],
]
FORKS = """
import contextlib, io, json, os, sys, tempfile
from gatl import __main__

for words in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.argv = ["gatl", *words]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = __main__.main()
            except SystemExit as ended:
                code = ended.code
        found = [code, out.getvalue(), err.getvalue(), list(sys.modules), os.listdir()]
    print(json.dumps(found), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def in_a_light_process():
    """By its words, what the command did: status, prints, modules imported, files left.

    Each runs in a process of its own, a fork of one that has started once.
    """
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(TYPING_ERRORS)],
        env={k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(map(tuple, TYPING_ERRORS), found, strict=True))


@pytest.mark.parametrize("words", TYPING_ERRORS, ids=" ".join)
def test_typing_error_is_one_line_at_once_and_leaves_nothing(words, in_a_light_process):
    code, out, err, imported, left = in_a_light_process[tuple(words)]
    assert (code, out, left) == (1, "", [])
    assert err.startswith("gatl: ")
    assert err.count("\n") == 1
    assert "hydra" in imported
    assert not {"torch", "lightning", "optuna"} & set(imported)  # they take seconds


def test_traceback_on_request(tmp_path):
    assert "Traceback" in gatl(tmp_path, "ga.pop=1", env={"HYDRA_FULL_ERROR": "1"}).stderr


@pytest.fixture(scope="module")
def help_text(tmp_path_factory):
    return gatl(tmp_path_factory.mktemp("help"), "--help").stdout


def section(text: str, head: str) -> list[str]:
    """Return the entries below a heading of the help: a line, with those it goes on in."""
    rows = text.partition(f"\n{head}")[2].partition("\n\n")[2].partition("\n\n")[0]
    return re.sub(r"\n {4,}", " ", rows).splitlines()


def test_help_has_an_entry_for_each_group_with_every_choice(help_text):
    named = {}
    for entry in section(help_text, "Groups"):
        group, what, choices = re.fullmatch(r"  ([\w/]+)= +([^:]+): (.+)", entry).groups()
        assert len(what.split()) <= 8
        named[group] = choices.split(", ")
    shipped: dict[str, list[str]] = {"hydra/launcher": ["basic"]}  # Hydra's own
    for path in CONF.rglob("*/*.yaml"):
        shipped.setdefault(str(path.parent.relative_to(CONF)), []).append(path.stem)
    assert {group: sorted(choices) for group, choices in named.items()} == {
        group: sorted(choices) for group, choices in shipped.items()
    }
    defaults = OmegaConf.load(CONF / "config.yaml").defaults[1:]
    chosen = {k.removeprefix("override "): v for d in defaults for k, v in d.items()}
    for group, choices in named.items():
        assert group == "experiment" or choices[0] == chosen[group]


def test_help_has_examples_and_fits_a_terminal(help_text):
    for word in ("experiment=quickstart", "data.root=PHOTOS", "resume=", "-sc install=bash"):
        assert word in help_text.partition("Examples:")[2]
    assert "$$" not in help_text
    assert max(map(len, help_text.splitlines())) <= 80
    template = OmegaConf.load(CONF / "config.yaml").hydra.help
    for text in (template.header, template.footer, template.template):
        assert max(map(len, text.splitlines())) <= 80  # so none had to be broken


def test_version_is_gatls_own(tmp_path):
    assert gatl(tmp_path, "--version").stdout == f"gatl {__version__}\n"


def test_a_folder_that_is_missing_is_shown_as_it_was_looked_for(tmp_path):
    for root, path in {"~/no": tmp_path / "no", "no": tmp_path / "here" / "no"}.items():
        (tmp_path / "here").mkdir(exist_ok=True)
        words = ["data=folder", f"data.root={root}"]
        done = gatl(tmp_path / "here", *words, env={"HOME": str(tmp_path)})
        assert done.stderr.startswith(f"gatl: data.root={path} does not exist; ")


@pytest.mark.parametrize("module", ["gatl", "gatl.final", "gatl.pretrain"])
def test_a_python_without_the_packages_is_one_line(module):
    done = subprocess.run(
        [sys.executable, "-S", "-m", module],
        cwd=Path(gatl_package.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "gatl needs the package hydra: enter its environment (source .venv/bin/activate), or "
        "install it (pip install -e .).\n"
    )


def test_gatl_is_imported_by_others_without_its_packages():
    script = "import gatl; print(gatl.__version__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=Path(gatl_package.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{__version__}\n"


def test_help_names_keys_that_exist(help_text):
    cfg = compose([])
    entries = section(help_text, "Overrides people use")
    assert len(entries) == 8
    for key in " ".join(entry.partition(":")[2] for entry in entries).split():
        group, _, leaf = key.replace("GENE", "dropout").rpartition(".")
        assert leaf in (OmegaConf.select(cfg, group) if group else cfg), key


def test_cfg_prints_what_was_composed(tmp_path):
    done = gatl(tmp_path, "--cfg", "job", "seed=3", "experiment=quickstart")
    assert OmegaConf.create(done.stdout) == compose(["seed=3", "experiment=quickstart"])
    assert list(tmp_path.iterdir()) == []


# Folders and names that a user gives


def test_a_folder_that_a_user_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_named("~/run") == tmp_path / "run"
    assert quoted("hydra.run.dir=~/run") == f'hydra.run.dir="{tmp_path}/run"'
    with pytest.raises(UserError, match="no such user"):
        folder_named("~nobody-of-that-name/run")


def test_a_new_folder_below_what_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "outputs").symlink_to(tmp_path / "unmounted" / "disk")
    (tmp_path / "file").touch()
    for place in ("outputs", "file"):
        with pytest.raises(UserError, match=f"{place}.* cannot be made"):
            new_folder(tmp_path / place / "day" / "time")
    assert new_folder(tmp_path / "day" / "time") == tmp_path / "day" / "time"
    assert new_folder(tmp_path / "day" / "time") == tmp_path / "day" / "time_2"


def test_a_name_of_timms_needs_timm():
    with pytest.raises(UserError, match="add model=timm"):
        compose(["model.name=resnet50"])
    with pytest.raises(UserError, match="add model=timm"):
        compose(["model=efficientnet_lite0", "model.name=resnet50"])
    assert compose(["model=timm", "model.name=resnet18"]).model.name == "resnet18"


def test_what_a_resolver_says_is_one_line():
    composed = compose(["model=timm", "model.name=nope"])
    resolve_if(False, composed)
    with pytest.raises(UserError, match=r"model\.name=nope is no model of timm's"):
        resolve_if(True, composed)


# What a shell completes


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_tab_completes_a_choice_in_bash(tmp_path):
    """In a terminal, as a user types."""
    typed = (
        b'eval "$(python -m gatl -sc install=bash)"\n',
        b"python -m gatl -m seed=1,2 model=lenet5 data=fl\t",
    )
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    ours, theirs = pty.openpty()
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "TERM": "dumb"}
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        cwd=tmp_path,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    try:
        seen = b""
        os.write(ours, b"".join(typed))
        deadline = time.monotonic() + 60
        while b"data=flowers" not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096)
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python -m gatl ga=", "default original"),
        ("python3 -m gatl ga.po", "ga.pop="),
        ("python -m gatl.final ru", ""),
        ("python -m json.tool ", ""),
        ("python gatl", ""),
    ],
)
def test_what_is_offered(tmp_path, monkeypatch, capsys, line, offered):
    monkeypatch.setattr(sys, "argv", ["gatl", "-sc", "install=bash"])
    __main__.main()
    script = capsys.readouterr().out + (
        f"COMP_LINE={line!r} COMP_POINT={len(line)}; _gatl {sys.executable}; "
        'echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{offered}\n", "")


def test_completion_runs_nothing_that_a_files_name_says(monkeypatch, tmp_path, capsys):
    (tmp_path / "$(touch${IFS}ran)").touch()
    (tmp_path / "b;c").touch()
    monkeypatch.setattr(sys, "argv", ["gatl", "-sc", "install=bash"])
    __main__.main()
    line = "python -m gatl data.root=./"
    script = capsys.readouterr().out + (
        f"COMP_LINE={line!r} COMP_POINT={len(line)}; _gatl {sys.executable}; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert not (tmp_path / "ran").exists()
    offered = {shlex.split(word)[0] for word in done.stdout.splitlines()}
    assert offered == {"./$(touch${IFS}ran)", "./b;c"}  # as words of the shell


@pytest.mark.parametrize("words", [[], ["install=fish"], ["query=bash"], ["install=bash", "a=b"]])
def test_other_shells_are_told(monkeypatch, words):
    monkeypatch.delenv("COMP_LINE", raising=False)
    with pytest.raises(UserError, match=r"for bash alone: eval "):
        shell_completion(words)


# Groups of a user's own


@pytest.mark.parametrize("name", ['14" prints', "a\\", '\\"\\\\"', "a, [b]", "${seed}", "it's a=b"])
def test_a_folder_of_ones_own_choices_may_have_any_name(tmp_path, name):
    (tmp_path / name / "ga").mkdir(parents=True)
    (tmp_path / name / "ga" / "tiny.yaml").write_text("defaults: [default]\npop: 3\n")
    assert compose([*own_groups(str(tmp_path / name)), "ga=tiny"]).ga["pop"] == 3


def test_a_folder_of_ones_own_choices(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "my conf"
    (folder / "ga").mkdir(parents=True)
    (folder / "ga" / "tiny.yaml").write_text("defaults: [default]\npop: 3\n")
    monkeypatch.setattr(sys, "argv", ["gatl", f"--config-dir={folder}", "ga=tiny", "--cfg", "job"])
    __main__.main()
    assert OmegaConf.create(capsys.readouterr().out).ga["pop"] == 3
    assert compose([*own_groups(str(folder)), "ga=tiny"]).ga["pop"] == 3
    assert own_groups(None) == []
    for words, message in {
        (f"--config-dir={tmp_path}/no", "ga=tiny"): f"--config-dir={tmp_path}/no is no folder.",
        (f"--config-dir={folder}", "ga=tin"): "ga=tin is no choice (nearest: tiny); there are: ",
        (f"--config-dir={folder}", f"resume={tmp_path}"): "leave out --config-dir.",
    }.items():
        monkeypatch.setattr(sys, "argv", ["gatl", *words])
        with pytest.raises(SystemExit):
            __main__.main()
        assert message in capsys.readouterr().err
