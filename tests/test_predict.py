"""``python -m gatl.predict``: what it writes, what it says of images that it cannot read."""

import csv
import io
import json
import os
import shutil
import sys

import pytest

from gatl import load, predict
from gatl.predict import HELP, find_images, main


@pytest.fixture
def command(monkeypatch, capsysbinary):
    """Call it with words; returns exit status, standard output and the lines of standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["gatl.predict", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code
        out, err = capsysbinary.readouterr()
        return status, out.decode(errors="surrogateescape"), err.decode().splitlines()

    return call


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_folder_gives_what_the_run_found(command, final_run, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 7)
    status, out, err = command(f"run={final_run.folder}", f"images={final_run.images}")
    assert (status, err) == (0, [])
    rows = rows_of(out)
    top = ("label", "probability")
    assert list(rows[0]) == ["path", *top, *(f"{name}_{i}" for i in (2, 3) for name in top)]
    assert [row["path"] for row in rows] == [str(p) for p in find_images(str(final_run.images))]
    assert len(rows) == 30
    found = {row["path"]: row for row in rows}
    with (final_run.folder / "final" / "predictions.csv").open(encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            mine = found[str(final_run.images / row["image"])]
            assert mine["label"] == row["predicted"]
            assert float(mine["probability"]) == pytest.approx(float(row["probability"]), abs=1e-5)
    for row in rows:
        probabilities = [float(row[name]) for name in row if name.startswith("probability")]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert len({row[name] for name in row if name.startswith("label")}) == 3


def test_json_says_the_same(command, final_run, tmp_path):
    words = f"run={final_run.folder / 'best.ckpt'}", f"images={final_run.images}", "top_k=2"
    status, out, err = command(*words, f"output={tmp_path / 'all.json'}")
    assert (status, out) == (0, "")
    assert err == [f"30 images predicted: {tmp_path / 'all.json'}"]
    assert command(*words, f"output={tmp_path / 'all.CSV'}")[0] == 0
    table = rows_of((tmp_path / "all.CSV").read_text(encoding="utf-8"))
    entries = json.loads((tmp_path / "all.json").read_text())
    for row, entry in zip(table, entries, strict=True):
        assert (row["path"], row["label"]) == (entry["path"], entry["label"])
        assert float(row["probability"]) == entry["probability"]
        second = {"label": row["label_2"], "probability": float(row["probability_2"])}
        first = {"label": row["label"], "probability": float(row["probability"])}
        assert entry["top_k"] == [first, second]


def test_unreadable_images_are_told_and_the_others_are_there(command, final_run, tmp_path):
    shutil.copytree(final_run.images, tmp_path / "photos")
    good = find_images(str(tmp_path / "photos"))
    (tmp_path / "photos" / "bad\x1b[2J.png").write_text("no image")
    (tmp_path / "photos" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "photos" / "notes.txt").write_text("no image, and not called one")
    status, out, err = command(f"run={final_run.folder}", f"images={tmp_path / 'photos'}")
    assert status == 1
    assert [row["path"] for row in rows_of(out)] == list(map(str, good))
    assert err == [
        f"{tmp_path}/photos/bad\\x1b[2J.png cannot be decoded: not an image file",
        f"{tmp_path}/photos/gone.jpg cannot be decoded: No such file or directory",
        "2 of 32 images could not be read.",
    ]


def test_of_nothing_readable_only_the_header_is_there(command, final_run, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    status, out, _ = command(f"run={final_run.folder}", f"images={tmp_path / 'a.png'}")
    assert (status, len(out.splitlines())) == (1, 1)


def test_a_terminal_gets_no_command(command, final_run, monkeypatch):
    words = f"run={final_run.folder}", f"images={final_run.images}"
    _, out, _ = command(*words)
    assert "\x1b[31m stripes" in {row["label"] for row in rows_of(out)}
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    _, out, _ = command(*words)
    assert "\x1b" not in out
    assert "\\x1b[31m stripes" in {row["label"] for row in rows_of(out)}


def test_a_name_that_is_no_text_keeps_its_bytes(command, final_run, tmp_path):
    name = os.fsdecode(b'fl\xf6w\rer, "1"\n.png')
    shutil.copy(next(final_run.images.rglob("0*.png")), tmp_path / name)
    status, out, _ = command(f"run={final_run.folder}", f"images={tmp_path}")
    assert (status, rows_of(out)[0]["path"]) == (0, str(tmp_path / name))
    assert command(f"run={final_run.folder}", f"images={tmp_path}", f"output={tmp_path}/o.json")
    assert json.loads((tmp_path / "o.json").read_text())[0]["path"] == str(tmp_path / name)


def test_a_reader_that_stops_is_no_error(final_run, monkeypatch, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:  # noqa: PTH123 - a descriptor
        monkeypatch.setattr(sys, "stdout", pipe)
        one = next(final_run.images.rglob("*.png"))
        assert predict.predict(final_run.folder, str(one), None, None, "")


def test_a_glob_names_files(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.jpg", "c.txt", "in/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "e.jpg").mkdir()
    (tmp_path / "[x].jpg").touch()
    monkeypatch.chdir(tmp_path)
    assert list(map(str, find_images("?.jpg"))) == ["a.jpg", "b.jpg"]
    assert list(map(str, find_images("**/d.*"))) == ["in/d.jpg"]
    assert list(map(str, find_images(f"{tmp_path}/a*"))) == [f"{tmp_path}/a.jpg"]
    assert list(map(str, find_images("[x].jpg"))) == ["[x].jpg"]  # as it stands, if it is there
    assert list(map(str, find_images("in"))) == ["in/d.jpg"]
    assert list(map(str, find_images("."))) == ["[x].jpg", "a.jpg", "b.jpg", "in/d.jpg"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images("~/in") == [tmp_path / "in" / "d.jpg"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run= is missing"),
        (["run={run}"], "images= is missing"),
        (["run={run}", "images="], "images= is missing"),
        (["run={run}", "images={run}/.hydra"], "names no image"),
        (["run={run}", "images=no/*.jpg"], "images=no/*.jpg names no image"),
        (["run={run}/no", "images={images}"], "neither a run folder nor a checkpoint"),
        (["run={run}/final", "images={images}"], "holds no best.ckpt"),
        (
            ["run={run}", "images={images}", "topk=3"],
            "'topk=3' is no word of this command, which takes "
            "run=, images=, output=, top_k=, trust=.",
        ),
        (["run={run}", "images={images}", "--fast"], "'--fast' is no word of this command"),
        (["run={run}", "run=b", "images={images}"], "run= is given twice"),
        (["run={run}", "images={images}", "top_k=0"], "top_k must be a whole number"),
        (["run={run}", "images={images}", "top_k=²"], "top_k must be a whole number"),
        (["run={run}", "images={images}", "output=a.txt"], "must end in .csv or .json"),
        (["run={run}", "images={images}", "output=no/a.csv"], "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(command, final_run, words, message):
    words = [word.format(run=final_run.folder, images=final_run.images) for word in words]
    status, out, err = command(*words)
    assert (status, out, len(err)) == (1, "", 1)
    assert message in err[0]


def test_top_k_is_at_most_the_classes(command, final_run):
    one = next(final_run.images.rglob("*.png"))
    words = f"run={final_run.folder}", f"images={one}"
    _, out, _ = command(*words, "top_k=99")
    assert "label_3" in rows_of(out)[0]
    assert "label_4" not in rows_of(out)[0]
    _, out, _ = command(*words, "top_k=1")
    assert list(rows_of(out)[0]) == ["path", "label", "probability"]
    assert rows_of(out)[0]["label"] == load(final_run.folder)(one)[0]


def test_help_needs_nothing_else(command):
    assert command("run=x", "--help") == (0, f"{HELP}\n", [])
    assert all(len(line) <= 80 for line in HELP.splitlines())
