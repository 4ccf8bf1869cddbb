"""The record of a search in a database: SQLite for what is quick, and a real PostgreSQL server."""

import contextlib
import csv
import functools
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from gatl import __main__, compare, final
from gatl.cli import compose
from gatl.config import Config, StudyConfig, checked
from gatl.errors import UserError
from gatl.outcome import Outcome
from gatl.record import Place, begin, located, open_study, place_of, read_study, record_in, tell
from gatl.storage import Database, connected
from gatl.trust import word_for

GENES = {"dropout": FloatDistribution(0, 1)}
SAMPLER = optuna.samplers.RandomSampler(seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    """A database with a study of three trials, and its name."""
    folder = tmp_path_factory.mktemp("made")
    with connected(f"sqlite:///{folder}/studies.db") as database:
        study = open_study(folder, SAMPLER, database)
        for number, loss in enumerate((0.5, 0.25, None)):
            begin(study, {"dropout": number / 4}, GENES)
            tell(study, number, Outcome(loss, epochs=1, error=None if loss else "no"), number + 1.0)
    return folder / "studies.db", study.study_name


@pytest.fixture
def address(tmp_path: Path, made: tuple[Path, str]) -> str:
    """The URL of a copy of that database."""
    shutil.copy(made[0], tmp_path)
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def run(tmp_path: Path, address: str, made: tuple[Path, str]) -> Path:
    """A run folder whose study it holds."""
    folder = tmp_path / "runs" / "a run"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps({"storage": address, "name": made[1]}))
    return folder


def execute(address: str, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(address.removeprefix("sqlite:///"))) as connection:
        connection.execute(statement)
        connection.commit()


def message(call, *args: object, **kwargs: object) -> str:
    """Return the one line of the error that a call must raise."""
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@functools.cache
def config(storage: str | None = None) -> Config:
    word = "null" if storage is None else f'"{storage}"'
    return checked(compose([f"study.storage={word}"]))


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://gatl@host/db",
        "postgresql+psycopg://gatl@host:5433/db?sslmode=require",
        "postgresql:///db?host=/run/postgresql",
        "mysql://gatl@host/db",
        "sqlite:////home/me/runs.db",
    ],
)
def test_the_url_of_a_database_is_taken_as_it_stands(address):
    assert StudyConfig(address).storage == address


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "must be the URL of a database (postgresql, mysql, sqlite), such as"),
        ("redis://host", "must be the URL of a database"),
        ("postgresql://gatl@host:port/db", "must be the URL of a database"),
        ("postgresql://gatl:secret@host/db", "PGPASSWORD or ~/.pgpass"),
        ("postgresql://gatl@host/db?password=secret", "must hold no password"),
        ("postgresql://gatl@host/db?sslPassword=secret", "must hold no password"),
        ("postgresql://gatl@host/{0.__class__}", "must hold no blanks, braces, commas"),
        ("postgresql://gatl@host/db?host=a,b", "write %2C for a comma"),
        ("postgresql://gatl@host/a b", "must hold no blanks"),
        ("postgresql://gätl@host/db", "letters beyond ASCII"),
        ("sqlite://", "from the root on, as in sqlite:////home/me/runs.db"),
        ("sqlite:///runs.db", "from the root on"),
        ("sqlite:///:memory:", "from the root on"),
    ],
)
def test_any_other_is_one_line_without_its_password(address, said):
    found = message(StudyConfig, address)
    assert found.startswith("study.storage must ")
    assert said in found
    assert "secret" not in found


def test_without_a_choice_the_record_is_a_journal():
    assert config().study.storage is None
    composed = compose([])
    OmegaConf.set_struct(composed, False)
    del composed["study"]  # as in the folders of earlier runs
    assert checked(composed) == config()


@pytest.mark.parametrize(
    ("address", "package", "said"),
    [
        ("postgresql://gatl@host/db", "psycopg", "package psycopg: pip install 'gatl[postgres]'"),
        ("mysql://gatl@host/db", "MySQLdb", "needs the package MySQLdb: install it."),
    ],
)
def test_a_driver_that_is_not_installed_is_one_line(monkeypatch, address, package, said):
    monkeypatch.setitem(sys.modules, package, None)
    assert said in message(Database, address)


def test_what_cannot_be_reached_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        for bad in (f"postgresql://gatl@127.0.0.1:{port}/db", f"sqlite:///{tmp_path}/gone/x.db"):
            folder = tmp_path / "run"
            words = ["data=digits", f"study.storage={bad}", f"hydra.run.dir={folder}"]
            monkeypatch.setattr(sys, "argv", ["gatl", *words])
            with pytest.raises(SystemExit):
                __main__.main()
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.startswith(f"gatl: {bad} cannot be used (")
            assert captured.err.count("\n") == 1
            assert not folder.exists()


def test_the_folder_says_where_its_study_is_which_no_other_folder_shares(tmp_path, address):
    folder = tmp_path / "runs" / "a run"
    folder.mkdir(parents=True)
    with connected(address) as database:
        begin(open_study(folder, SAMPLER, database), {"dropout": 0.5}, GENES)
        assert list(folder.iterdir()) == [record_in(folder)] == [folder / "study.json"]
        place = place_of(folder)
        assert place.storage == address
        assert place.name.startswith(f"gatl {tmp_path.name}/runs/a run ")
        (folder / "study.json").rename(tmp_path / "kept")  # as in another folder of that name
        other = open_study(folder, SAMPLER, database)
        assert other.study_name != place.name
        assert other.trials == []
        (tmp_path / "kept").rename(folder / "study.json")
        (trial,) = open_study(folder, SAMPLER, database).trials
        assert trial.params == {"dropout": 0.5}


def test_the_longest_path_makes_a_name_that_a_database_takes(tmp_path, address):
    folder = tmp_path.joinpath(*(letter * 200 for letter in "abc"), os.fsdecode(b"fl\xf6wer"))
    folder.mkdir(parents=True)
    with connected(address) as database:
        study = open_study(folder, SAMPLER, database)
    assert len(study.study_name) < 250
    assert r"/fl\udcf6wer " in study.study_name


def test_killed_before_the_study_was_created_it_is_created_under_its_name(
    tmp_path, address, monkeypatch
):
    with connected(address) as database:
        monkeypatch.setattr(Database, "create_new_study", lambda *_, **__: 1 / 0)
        assert "ZeroDivisionError" in message(open_study, tmp_path, SAMPLER, database)
        name = place_of(tmp_path).name
        monkeypatch.undo()
        assert open_study(tmp_path, SAMPLER, database).study_name == name


def test_a_study_that_is_gone_is_not_begun_anew(tmp_path, address, run):
    (run / "history.csv").touch()
    execute(address, "UPDATE studies SET study_name = 'another'")
    with connected(address) as database:
        said = message(open_study, run, SAMPLER, database)
    assert f"in {address} is gone, which is the record of {run}" in said


def test_a_begin_whose_success_was_lost_on_its_way_back_is_there_once(run, address, monkeypatch):
    """Optuna would try again, and the trial be there twice."""
    with connected(address) as database:
        study = open_study(run, SAMPLER, database)
        commit = database.engine.dialect.do_commit

        def lost(connection):
            written = connection.total_changes
            commit(connection)
            if written:
                raise sqlite3.OperationalError("the connection\nbroke")

        monkeypatch.setattr(database.engine.dialect, "do_commit", lost)
        said = message(begin, study, {"dropout": 0.5}, GENES)
        assert said == (
            f"{address} cannot be used (the connection broke): when that is mended, try again."
        )
        monkeypatch.undo()
        trials = open_study(run, SAMPLER, database).trials
    assert [trial.state for trial in trials[2:]] == [TrialState.FAIL, TrialState.RUNNING]
    assert trials[3].params == {"dropout": 0.5}


HOSTILE = {
    "a number is left out": "UPDATE trials SET number = number + 1 WHERE number > 0",
    "a number is there twice": "UPDATE trials SET number = 1",
    "waiting": "UPDATE trials SET state = 'WAITING' WHERE number = 1",
    "no loss": "DELETE FROM trial_values",
    "a huge loss": "UPDATE trial_values SET value = 1e300",
    "an infinite loss": "UPDATE trial_values SET value_type = 'INF_POS', value = NULL",
    "maximises": "UPDATE study_directions SET direction = 'MAXIMIZE'",
    "a deep outcome": "UPDATE trial_user_attributes SET value_json = "
    f"'{'[' * 100_000}{']' * 100_000}'",
    "an outcome of something else": "UPDATE trial_user_attributes SET value_json = '{\"a\": 1}'",
    "no JSON": "UPDATE trial_user_attributes SET value_json = 'x'",
    "no such gene": 'UPDATE trial_params SET distribution_json = \'{"name": "Evil"}\'',
}


@pytest.mark.parametrize("statement", HOSTILE.values(), ids=HOSTILE)
def test_what_no_search_can_have_written_is_one_line(run, address, statement):
    execute(address, statement)
    with connected(address) as database:
        assert "is damaged and cannot be read" in message(open_study, run, SAMPLER, database)


PLACES = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "one text": '{"storage": "sqlite:////x.db"}',
    "more": '{"storage": "sqlite:////x.db", "name": "gatl a", "path": "b"}',
    "a number": '{"storage": "sqlite:////x.db", "name": 3}',
    "the study of something else": '{"storage": "sqlite:////x.db", "name": "my study"}',
    "deep": "[" * 4000,
    "long": '{"storage": "sqlite:////x.db", "name": "gatl ' + "a" * 5000 + '"}',
    "a password": '{"storage": "postgresql://a:b@c/d", "name": "gatl x"}',
    "another scheme": '{"storage": "redis://a", "name": "gatl x"}',
    "braces": '{"storage": "postgresql://a@{0}/d", "name": "gatl x"}',
}


@pytest.mark.parametrize("text", PLACES.values(), ids=PLACES)
def test_a_hostile_study_json_is_one_line(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    assert "study.json" in message(place_of, tmp_path)
    (tmp_path / "study.json").write_text('{"storage": "sqlite:////x.db", "name": "gatl x"}')
    assert place_of(tmp_path) == Place("sqlite:////x.db", "gatl x")
    (tmp_path / "study.json").write_text(text)
    said = message(compare.read_runs, tmp_path)
    assert "left out" in said
    assert "UserError" not in said


def test_by_itself_a_folder_connects_to_nothing(tmp_path, address, run, monkeypatch):
    monkeypatch.setattr("gatl.record.connected", lambda *_, **__: pytest.fail("it connects"))
    for trusted in ((), {"sqlite:////other.db"}):
        said = message(located, run, config(), trusted)
        assert said == (f"The record of {run} lies in {address}: give trust={address} to connect.")
        assert said in message(compare.read_runs, run, trusted)
    assert located(run, config(), {address}).study.storage == address
    begun = config(address)  # and killed before all else
    assert f"give trust={address}" in message(located, tmp_path, begun, ())
    assert located(tmp_path, begun, {address}).study.storage == address
    assert word_for(begun) == [f"trust={address}"]
    assert word_for(begun, record=False) == []
    (tmp_path / "study.journal").touch()
    assert located(tmp_path, begun, ()).study.storage is None


@pytest.mark.parametrize("module", [__main__, final])
def test_to_go_on_with_a_folder_says_which_word_it_needs(run, address, monkeypatch, capsys, module):
    (run / ".hydra").mkdir()
    OmegaConf.save(compose([]), run / ".hydra" / "config.yaml")
    key = "resume" if module is __main__ else "run"
    monkeypatch.setattr(sys, "argv", ["gatl", f"{key}={run}"])
    with pytest.raises(SystemExit):
        module.main()
    said = capsys.readouterr().err
    assert (
        said == f"gatl: The record of {run} lies in {address}: give trust={address} to connect.\n"
    )


def test_comparing_reads_the_databases_that_are_trusted(tmp_path, address, run, monkeypatch):
    (tmp_path / "runs" / "begun").mkdir()
    place = {"storage": address, "name": "gatl not yet"}
    (tmp_path / "runs" / "begun" / "study.json").write_text(json.dumps(place))
    called = []
    monkeypatch.setattr(compare, "compare", lambda *given: called.append(given))
    monkeypatch.setattr(sys, "argv", ["compare", f"runs={tmp_path}/runs", f"trust={address}"])
    compare.main()
    assert called == [(tmp_path / "runs", {address})]
    (whole, begun), left_out = compare.read_runs(*called[0])
    assert left_out == []
    assert (whole.folder, whole.best, whole.seconds) == (run, [0.5, 0.25, 0.25], 3.0)
    assert begun.best == []
    execute(address, "UPDATE trial_values SET value = 1e300")
    assert "it holds the number 1e+300" in compare.read_runs(*called[0])[1][0]


# A real server.

SEARCH = (
    *("data=digits", "model=lenet5", "trainer.accelerator=cpu", "data.image_size=32"),
    *("trainer.max_epochs=2", "pruner.min_epochs=1", "pruner.reduction_factor=2"),
    *("ga.pop=3", "ga.generations=2", "ga.n_elites=1", "evaluator.workers=1"),
    *("final.max_epochs=1", "final.seeds=1", "final.top_k=1"),
)


class Server:
    """A PostgreSQL server of its own, in a folder of its own, for a user that is not root."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._folder, self._binaries = folder, binaries
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        options = ("--username=owner", "--auth=trust", "--no-sync", "--locale=C")
        self._run("initdb", "-D", "data", *options).communicate()
        self.start()
        self.execute("CREATE ROLE gatl LOGIN")
        self.execute("CREATE ROLE reader LOGIN")
        self.execute("CREATE DATABASE gatl OWNER gatl")

    def _run(self, name: str, *words: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [self._binaries / name, *words],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self._user,
        )

    def start(self) -> None:
        settings = {
            **{"listen_addresses": "127.0.0.1", "port": self._port, "fsync": "off"},
            "unix_socket_directories": "",
        }
        words = itertools.chain.from_iterable(("-c", f"{k}={v}") for k, v in settings.items())
        self._process = self._run("postgres", "-D", "data", *words)
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.execute("SELECT 1")
            except OSError:
                assert time.monotonic() < deadline
                assert self._process.poll() is None
                time.sleep(0.1)

    def stop(self) -> None:
        """End it at once, as a crash would."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def execute(self, statement: str, database: str = "postgres") -> None:
        import psycopg

        where = f"host=127.0.0.1 port={self._port} user=owner dbname={database}"
        try:
            with psycopg.connect(where, autocommit=True) as connection:
                connection.execute(statement)
        except psycopg.OperationalError as error:
            raise OSError(str(error)) from error

    def address(self, user: str = "gatl", database: str = "gatl") -> str:
        return f"postgresql://{user}@127.0.0.1:{self._port}/{database}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg")
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else Path("/usr/lib/postgresql").glob("*/bin")
    binaries = next((p for p in places if (p / "initdb").exists()), None)
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed here (Debian: apt install postgresql)")
    with tempfile.TemporaryDirectory(prefix="gatl-") as folder:
        server = Server(Path(folder), binaries)
        yield server
        server.stop()


class Process:
    """A run of the command in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gatl", *words],
            cwd=folder.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def wait_for_trials(self, n: int) -> None:
        history = self.folder / "history.csv"
        while not history.exists() or history.read_text().count("\n") <= n:
            assert self._process.poll() is None, self._process.communicate()
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def end(self, code: int = 0) -> str:
        """Wait for its end; return what it said of errors."""
        out, err = self._process.communicate(timeout=300)
        assert self._process.returncode == code, (out, err)
        return err


def result(folder: Path) -> tuple[list[dict[str, str]], dict[str, object]]:
    """Return all trials and what came of them, but for times."""
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("duration_s", "started_s", "fits"):
            del row[name]
    found = json.loads((folder / "result.json").read_text())
    return rows, {key: found[key] for key in ("best", "test", "reevaluation", "trials")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[list[dict[str, str]], dict[str, object]]:
    """The same search with its record in a journal."""
    folder = tmp_path_factory.mktemp("journal") / "run"
    assert Process(folder, *SEARCH, f"hydra.run.dir={folder}").end() == ""
    return result(folder)


@pytest.mark.slow
def test_with_postgresql_and_killed_it_is_the_same_search_as_with_a_journal(
    tmp_path, server, expected
):
    folder, address = tmp_path / "run", server.address()
    run = Process(folder, *SEARCH, f"study.storage={address}", f"hydra.run.dir={folder}")
    run.wait_for_trials(2)
    run.kill()
    assert Process(folder, f"resume={folder}", f"trust={address}").end() == ""
    assert result(folder) == expected
    with read_study(folder, {address}) as study:
        losses = [row["val_loss"] for row in expected[0]]
        told = [trial.user_attrs["outcome"].get("val_loss") for trial in study.trials]
        assert told == [float(loss) if loss else None for loss in losses]
    assert not (folder / "study.journal").exists()
    assert "nobody" not in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_server_that_stops_in_the_middle_costs_one_line_and_nothing_else(
    tmp_path, server, expected
):
    folder, address = tmp_path / "run", server.address()
    run = Process(folder, *SEARCH, f"study.storage={address}", f"hydra.run.dir={folder}")
    run.wait_for_trials(2)
    server.stop()
    try:
        said = run.end(1)
        assert said.startswith(f"gatl: {address} cannot be used (")
        way_on = f"python -m gatl resume={folder} trust={address}\n"
        assert said.endswith(f"): when that is mended, go on with {way_on}")
        assert said.count("\n") == 1
    finally:
        server.start()
    assert Process(folder, f"resume={folder}", f"trust={address}").end() == ""
    assert result(folder) == expected


@pytest.mark.slow
def test_a_server_that_was_started_anew_between_two_trials_is_not_noticed(tmp_path, server):
    with connected(server.address()) as database:
        study = open_study(tmp_path, SAMPLER, database)
        begin(study, {"dropout": 0.5}, GENES)
        server.stop()
        server.start()
        assert tell(study, 0, Outcome(0.25, epochs=1)).value == 0.25


@pytest.mark.slow
def test_what_a_server_refuses_is_one_line(server):
    assert 'database "other" does not exist' in message(Database, server.address(database="other"))
    assert 'role "nobody" does not exist' in message(Database, server.address("nobody"))
    assert "permission denied for schema public" in message(
        Database, server.address("reader", "postgres")
    )
    with connected(server.address()):
        server.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", "gatl")
        assert "permission denied for table studies" in message(Database, server.address("reader"))
        with connected(server.address("reader"), new=False) as database:  # to compare
            assert database.get_all_studies() is not None
