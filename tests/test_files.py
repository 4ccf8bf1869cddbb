"""Files that no kill and no power cut tears, and a disk that is full."""

import csv
import errno
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from gatl.cli import one_line_errors, require_room
from gatl.data.images import prepare
from gatl.data.source import Source, in_memory
from gatl.errors import UserError
from gatl.features import FeatureFiles
from gatl.files import csv_of, is_unwritable, write_whole, writing
from gatl.outcome import Outcome
from gatl.record import History, begin, open_study, reach, tell
from gatl.trust import whole

SPACE = {"learning_rate": FloatDistribution(0, 1)}
GENES = {"learning_rate": 0.5}


@pytest.fixture
def at_most():
    """Limit the size of files, which a write then meets in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    fsync = os.fsync

    def spied(descriptor):
        fsync(descriptor)
        seen.append((path.read_bytes(), (tmp_path / ".file.part").read_bytes()))

    monkeypatch.setattr(os, "fsync", spied)
    write_whole(path, b"new")
    assert seen == [(b"old", b"new")]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_whole_stays_as_it_was(tmp_path, at_most):
    path = tmp_path / "file"
    write_whole(path, b"old")
    at_most(100)
    with pytest.raises(OSError, match="file") as raised:
        write_whole(path, bytes(200))
    at_most(resource.RLIM_INFINITY)
    assert is_unwritable(raised.value)
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_of_a_write_names_its_file_in_other_processes_too(tmp_path):
    with pytest.raises(OSError, match="x") as raised, writing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert pickle.loads(pickle.dumps(raised.value)).filename == str(tmp_path / "x")
    assert not is_unwritable(ValueError())
    assert not is_unwritable(OSError(errno.ENOENT, "there is none"))


def test_that_the_disk_is_full_when_a_record_begins_is_no_damage(tmp_path, at_most):
    at_most(100)
    with pytest.raises(OSError, match=r"study\.journal") as raised:
        open_study(tmp_path, optuna.samplers.RandomSampler(seed=0))
    at_most(resource.RLIM_INFINITY)
    assert is_unwritable(raised.value)
    assert open_study(tmp_path, optuna.samplers.RandomSampler(seed=0)).trials == []


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "no luck")])
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, error):
    with pytest.raises((UserError, MemoryError)) as raised, whole(tmp_path / "x"):
        raise error
    assert "damaged" not in str(raised.value)


def test_a_table_can_be_read_again_whatever_its_cells_hold(tmp_path):
    rows = [["a\rb", "c\nd", 'e"f', "g,h", "i\r\nj", ""], ["", "x", "\udcf6", " ", "ö", "1"]]
    path = tmp_path / "table.csv"
    path.write_bytes(csv_of(rows))
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == rows
    assert path.read_bytes().endswith(b",x,\xf6, ,\xc3\xb6,1\n")


@pytest.mark.parametrize("n_bytes", [0, 1, 50])
@pytest.mark.parametrize("write", ["begin", "reach", "tell"])
def test_a_line_that_does_not_fit_leaves_the_record_whole(tmp_path, at_most, write, n_bytes):
    study = open_study(tmp_path, optuna.samplers.RandomSampler(seed=0))
    begin(study, GENES, SPACE)
    journal = tmp_path / "study.journal"
    before = journal.read_bytes()
    at_most(len(before) + n_bytes)
    with pytest.raises(OSError, match=r"study\.journal") as raised:
        {
            "begin": lambda: begin(study, GENES, SPACE),
            "reach": lambda: reach(study, 0, Outcome(0.5, epochs=1)),
            "tell": lambda: tell(study, 0, Outcome(0.5)),
        }[write]()
    at_most(resource.RLIM_INFINITY)
    assert is_unwritable(raised.value)
    assert journal.read_bytes() == before
    assert not (tmp_path / "study.journal.lock").is_symlink()
    tell(study, 0, Outcome(0.25))  # later lines do not meet half of another
    begin(study, GENES, SPACE)
    again = open_study(tmp_path, optuna.samplers.RandomSampler(seed=0))
    assert [trial.value for trial in again.trials] == [0.25, None]


def test_a_history_that_cannot_be_written_is_named_and_written_again(tmp_path, at_most):
    study = open_study(tmp_path, optuna.samplers.RandomSampler(seed=0))
    begin(study, GENES, SPACE)
    history = History(tmp_path, list(SPACE))
    trials = [tell(study, 0, Outcome(0.25))]
    at_most((tmp_path / "history.csv").stat().st_size + 5)
    with pytest.raises(OSError, match=r"history\.csv"):
        history.update(trials, lambda number: None)
    at_most(10)
    with pytest.raises(OSError, match=r"history\.csv"):
        History(tmp_path, list(SPACE))
    at_most(resource.RLIM_INFINITY)
    History(tmp_path, list(SPACE)).update(trials, lambda number: None)
    assert (tmp_path / "history.csv").read_text().splitlines()[1].startswith("0,,COMPLETE,0.5,0.25")


def test_images_are_given_their_room_before_one_is_decoded(tmp_path, at_most, monkeypatch):
    """Written through a map, a full disk would be a signal that kills the driver."""
    monkeypatch.setattr("gatl.data.images.to_rgb", lambda *args, **kwargs: pytest.fail("decoded"))
    reserved = []

    def full(descriptor, offset, length):
        reserved.append(length)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    pixels = np.zeros((30, 8, 8), np.uint8)
    source = Source(("a", "b"), in_memory(pixels, np.arange(30) % 2, "some"))
    with pytest.raises(OSError, match="No space left"):
        prepare(source, image_size=8, split_seed=0, max_bad=0.0, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == []
    monkeypatch.undo()
    at_most(1000)
    with pytest.raises(OSError, match="too large"):
        prepare(source, image_size=8, split_seed=0, max_bad=0.0, folder=tmp_path)
    assert len(reserved) == 1
    assert reserved[0] > 20 * 3 * 64


@pytest.mark.parametrize("full", ["from the start", "in the middle", "for locks"])
def test_a_cache_without_room_is_none(tmp_path, at_most, monkeypatch, full):
    files = FeatureFiles(tmp_path, 10**6)
    row = np.ones((1, 1000), np.uint8)
    if full == "for locks":
        monkeypatch.setattr(Path, "open", raising_no_space)
    at_most({"from the start": 0, "in the middle": 2500}.get(full, 10**6))
    assert files.get("a", 5, lambda: iter([row] * 5), lambda: None) is None
    monkeypatch.undo()
    at_most(resource.RLIM_INFINITY)
    assert not list(tmp_path.glob("*.part"))
    assert files.get("a", 5, lambda: iter([row] * 5), lambda: None) is not None


def raising_no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_does_not_begin_where_nothing_fits(tmp_path, at_most, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    require_room(folder)
    assert list(folder.iterdir()) == []
    at_most(1000)
    with pytest.raises(UserError, match=r"run cannot be written .*: make room, then start again"):
        require_room(folder)
    assert not folder.exists()


def test_a_full_disk_is_one_line_for_every_command(tmp_path, capsys):
    with pytest.raises(SystemExit), one_line_errors(), writing(tmp_path / "page.html"):
        raise OSError(errno.ENOSPC, "No space left on device")
    said = capsys.readouterr().err
    path = tmp_path / "page.html"
    assert said == (
        f"gatl: {path} cannot be written (No space left on device): make room, then try again.\n"
    )
    with pytest.raises(OSError, match="busy"), one_line_errors():
        raise OSError(errno.EBUSY, "busy")
