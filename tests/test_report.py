"""The report: its figures against others' and by hand, hostile folders, and a browser."""

import base64
import csv
import errno
import functools
import io
import itertools
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
from omegaconf import OmegaConf
from PIL import Image
from plotly.offline import get_plotlyjs

from gatl import charts, report, run_folder
from gatl.chromosome import KNOWN_GENES
from gatl.cli import compose
from gatl.errors import UserError
from gatl.run_folder import RunFolder, Trial

EVIL = "<script>alert(1)</script><b>&amp; \" ' {{ 7 * 7 }} </script>"
CLASSES = ("rose", EVIL, "tulip")
HEADER = (
    *("number", "generation", "state", "included_layers", "frozen_layers", "learning_rate"),
    *("dropout", "val_loss", "fitness", "val_accuracy", "epochs", "duration_s"),
    *("trainable_params", "total_params", "reused_from", "error", "micro_batch"),
    *("started_s", "fits"),
)
PLAIN = (58, 0, 0.001, 0.2)
"""The first initial chromosome."""


def row(number, generation, state, genes, loss, **more):
    values = {
        **{"number": number, "generation": generation, "state": state},
        **dict(zip(KNOWN_GENES, genes, strict=False)),
        **{"val_loss": loss, "fitness": -loss, "val_accuracy": 0.5 + number / 100, "epochs": 2},
        **{"duration_s": 10.0 + number, "trainable_params": 1000 * (number + 1)},
        **{"total_params": 9000, "started_s": 12.0 * number},
        **{"fits": json.dumps([[12.0 * number, 10.0 + number, 2]]), **more},
    }
    return [values.get(name, "") for name in HEADER]


ROWS = [
    row(0, 0, "COMPLETE", PLAIN, 1.0),
    row(1, 0, "COMPLETE", (40, 10, 0.01, 0.5), 0.6),
    row(2, 0, "PRUNED", (10, 0, 1e-5, 0.9), 3.0, epochs=1),
    row(3, 1, "COMPLETE", (30, 12, 0.002, 0.3), 0.4),
    row(4, 1, "FAIL", (30, 12, 0.1, 0.3), 0.0, val_loss="", error=EVIL),
    row(5, 1, "COMPLETE", (40, 10, 0.01, 0.5), 0.6, reused_from=1, fits=""),
]
RESULT = {
    "best": {
        "genes": dict(zip(KNOWN_GENES, (30, 12, 0.002, 0.3), strict=False)),
        "val_loss": 0.4,
        "trial": 3,
    },
    "test": {
        "loss": 0.5,
        "accuracy": 0.8,
        "accuracy_ci95": [0.7123, 0.8689],
        "f1_macro": 0.79,
        "n": 100,
        "per_class": [
            {"class": name, "precision": 0.5, "recall": 0.25, "f1": 0.125, "n": 33}
            for name in CLASSES
        ],
    },
    "tests": 1,
    "final": {"epochs": 7, "best_epoch": 5},
    "reevaluation": [
        {"trial": 3, "val_losses": [0.45, 0.55], "mean": 0.5},
        {"trial": 0, "val_losses": [0.7, 0.72], "mean": 0.71},
    ],
    "trials": 6,
    "evaluations": 5,
    "seconds": 7300.0,
    "seed": 3,
    "classes": list(CLASSES),
    "images": {"train": [70, 71, 72], "val": [15, 16, 17], "test": [33, 34, 33], "left_out": 1},
    "precision": "32-true",
    "versions": {"python": "3.11.4", "gatl": "0.1.0"},
    "hardware": {"cores": 2, "gpus": [EVIL]},
    "finished": "2026-01-02T03:04:05+00:00",
}
PREDICTIONS = [
    ("image", "label", "predicted", "probability"),
    (f"photos/{EVIL}.jpg", "rose", "tulip", 0.75),
    ("photos/a.jpg", EVIL, EVIL, 0.99),
    ("photos/b.jpg", "tulip", EVIL, 0.95),
]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


@functools.cache
def configuration():
    words = ["data=folder", "data.root=photos/it", "model=se_densenet121_k12"]
    return OmegaConf.to_yaml(compose(words))


def write_run(folder, rows=ROWS):
    """Write what a finished run leaves, as far as the report reads it."""
    hydra = folder / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "config.yaml").write_text(configuration())
    OmegaConf.save(OmegaConf.create(["data=folder", f"data.root={EVIL}"]), hydra / "overrides.yaml")
    write_csv(folder / "history.csv", [HEADER, *rows])
    (folder / "result.json").write_text(json.dumps(RESULT))
    log = [("epoch", "step", "train_loss", "val_loss"), (0, 9, 1.5, 1.2), (1, 19, 0.9, 0.4)]
    for number in (0, 1, 3):
        write_csv(folder / "trials" / str(number) / "metrics.csv", log)
    curve = [("epoch", "train_loss", "val_loss"), (1, 1.5, 1.2), (2, 0.9, 0.4)]
    write_csv(folder / "final" / "learning_curve.csv", curve)
    counts = [("label", *CLASSES), *((name, 30, 2, 1) for name in CLASSES)]
    write_csv(folder / "final" / "confusion_matrix.csv", counts)
    write_csv(folder / "final" / "predictions.csv", PREDICTIONS)
    names = ("examples/0", "examples/0_heat", "examples/1", "examples/2", "samples/1")
    for index, name in enumerate(names):
        path = folder / "final" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 50 * index, np.uint8)).save(path)
    bad = [("test", "rose", EVIL, "", "it is none")]
    write_csv(folder / "images.csv", [("split", "class", "image", "digest", "error"), *bad])
    return folder


@pytest.fixture(autouse=True)
def library(request, monkeypatch):
    """Leave plotly.js out where its megabytes would only be read over."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(report, "get_plotlyjs", lambda: "// plotly.js")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


class Page(HTMLParser):
    """What a reader sees of a page, and what a browser would make of it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text, self.sections = [], [], "", {}
        self.images = []
        self._open, self._section = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "rect", "link", "br"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._open[-1:] != ["style"]:
            if self._open[-1:] == ["h2"]:
                self._section = data
            self.text += data
            self.sections[self._section] = self.sections.get(self._section, "") + data

    @property
    def figures(self):
        (found,) = (text for attrs, text in self.scripts if "type" in attrs)
        return json.loads(found)


def decoded(uri):
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def read(folder):
    return Page(report.make(folder).read_text(encoding="utf-8"))


def test_the_summary_says_what_was_found_and_how_good_it_is(run):
    words = read(run).sections[""]
    for part in (
        "se_densenet121_k12 on folder",
        "Best: keep the first 30 of 58 layers, freeze 12 of them, learning rate 0.002, dropout 0.3",
        "Of 100 images that nothing before has seen, 80.0% are classified right "
        "(95% interval 71.2% to 86.9%).",
        "The best val_loss of the search is 0.4000 (trial 3).",
        # generation 0: 1.0 and 0.6 completed; 1 - 0.4 / 0.6, and 1 - 0.4 / 0.8
        "first generation's best was 0.6000 (the best is 33% lower); its mean, over 2 trials that "
        "completed, 0.8000 (the best is 50% lower)",
        "The plain recipe (all layers, nothing frozen, learning rate 0.001) had 1.0000 "
        "(the best is 60% lower).",
        "With fresh seeds, the chromosome that was chosen had 0.5000 ± 0.0707 (2 seeds, trial 3), "
        "the plain recipe 0.7100 ± 0.0141 (2 seeds, trial 0).",
        "12 frozen",
        "18 trained",
        "28 left out",
    ):
        assert part in words, part


def test_the_price_is_added_up(run):
    trials = RunFolder(run).trials()
    figures = {words: figure for figure, words in report.key_figures(trials, RESULT)}
    assert figures == {
        "trials": "6",
        "evaluations": "5",
        "epochs of the search": "9",  # 2 + 2 + 1 + 2 + 2
        "of fits, workers added up": "60 s",  # 10 + 11 + 12 + 13 + 14
        "epochs of the final training": "7",
        "in all": "2.0 h",
    }


def test_names_are_text_wherever_they_stand(run):
    page = read(run)
    assert page.tags.count("script") == 3
    assert not {"b", "iframe", "object", "link", "a"} & set(page.tags)
    assert "49" not in page.sections["Classes"]  # {{ 7 * 7 }}
    shown = EVIL.replace("{{", "{{")
    for section in ("Classes", "The most confident mistakes", "Data"):
        assert shown in page.sections[section], section
    assert "alert(1)" in page.sections["How it was made, and what to do with it"]
    texts = json.dumps(page.figures)
    assert "alert(1)" in texts
    assert "<" not in re.sub(r"<extra></extra>", "", texts)


def test_the_figures_are_plotlys(run):
    for figure in read(run).figures:
        go.Figure(figure)  # raises if it knows a property not


def test_fitness_of_the_generations(run):
    best, mean = charts.progress(RunFolder(run).trials()).figure["data"]
    assert (best["x"], best["y"]) == ([0, 1], [-0.6, -0.4])
    assert (mean["x"], mean["y"]) == ([0, 1], [-0.8, -0.5])


def test_without_generations_the_best_so_far_is_drawn(tmp_path):
    rows = [[r[0], "", *r[2:]] for r in ROWS]
    page = read(write_run(tmp_path / "run", rows))
    best, trials = page.figures[0]["data"]
    assert (best["x"], best["y"]) == ([0, 1, 3, 5], [-1, -0.6, -0.4, -0.4])
    assert trials["y"] == [-1, -0.6, -0.4, -0.6]
    assert "first generation" not in page.text


def test_mistakes_are_sorted_by_how_sure_the_model_was(run):
    page = read(run)
    words = page.sections["The most confident mistakes"]
    assert "2 mistakes on the test images" in words
    assert words.index("95.0%") < words.index("75.0%")
    assert "photos/a.jpg" not in words
    assert "rose, taken for tulip (75.0%)" in words
    assert f"{EVIL} (99.0%)" in page.sections["Right answers"]
    assert all(uri.startswith("data:image/png;base64,") for uri in page.images)


def test_pictures_stand_where_they_belong(run):
    shades = [decoded(uri)[0, 0, 0] // 50 for uri in read(run).images]
    # The surest mistake first; a heat map behind its image; right answers; a sample.
    assert shades == [3, 0, 1, 2, 4]


def test_heat_maps_are_explained_where_they_are(run):
    words = read(run).sections
    assert "Grad-CAM" in words["The most confident mistakes"]
    assert "Grad-CAM" not in words["Right answers"]  # it has none
    (run / "final" / "examples" / "0_heat.png").unlink()
    assert "Grad-CAM" not in read(run).text


def test_without_mistakes_right_answers_are_shown(run):
    write_csv(run / "final" / "predictions.csv", PREDICTIONS[:1] + PREDICTIONS[2:3])
    (run / "final" / "examples" / "0_heat.png").unlink()
    page = read(run)
    assert "The most confident mistakes" not in page.sections
    assert "Right answers" in page.sections


def test_many_answers_without_a_picture_cost_no_look_at_each(run, monkeypatch):
    looked = []
    picture = RunFolder.picture
    monkeypatch.setattr(
        RunFolder, "picture", lambda self, name: looked.append(name) or picture(self, name)
    )
    write_csv(run / "final" / "predictions.csv", PREDICTIONS + PREDICTIONS[2:3] * 1000)
    assert len(read(run).images) == 5
    assert len(looked) < 100


def test_what_is_no_small_png_is_not_embedded(run):
    examples = run / "final" / "examples"
    (examples / "0.png").write_bytes(b"<svg onload='alert(1)'/>")
    (examples / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(10**6))
    page = read(run)
    assert len(page.images) == 3
    assert page.text.count("is no small PNG file") == 2


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in rng.integers(0, 12, (60, 2)).tolist()]
    beaten = {p for p in points if any(a <= p[0] and b >= p[1] and (a, b) != p for a, b in points)}
    kept = [points[i] for i in charts.front(points)]
    assert kept == sorted(set(points) - beaten)
    assert charts.front([]) == []


def test_the_strip_has_a_cell_for_each_layer():
    drawn = charts.strip(58, 30, 14, (6, 12, 24, 16))
    kinds = re.findall(r'<rect class="([\w-]+)" x="([\d.]+)"', drawn)
    assert [kind for kind, _ in kinds] == ["frozen"] * 14 + ["trained"] * 16 + ["left-out"] * 28
    places = np.array([float(x) for _, x in kinds])
    assert (np.flatnonzero(np.diff(places) > 10) + 1).tolist() == [6, 18, 42]
    assert "the first 14 frozen, 16 trained, 28 left out" in drawn
    assert (
        len(set(np.diff([float(x) for x in re.findall(r' x="([\d.]+)"', charts.strip(5, 5, 0))])))
        == 1
    )


def trials_where(n, loss):
    rng = np.random.default_rng(1)
    genes = [
        dict(zip(KNOWN_GENES, (int(a), int(b), float(10**c), float(d)), strict=False))
        for a, b, c, d in zip(
            rng.integers(1, 59, n),
            rng.integers(0, 19, n),
            rng.uniform(-6, -1, n),
            rng.uniform(0.1, 0.9, n),
            strict=True,
        )
    ]
    return [
        Trial(i, 0, "COMPLETE", g, loss(g), 0.5, 1, 1.0, 10, False) for i, g in enumerate(genes)
    ]


def test_the_gene_that_decides_is_the_important_one(run):
    trials = trials_where(60, lambda g: 1 + 5 * g["dropout"] + 0.001 * g["included_layers"])
    ranges = report._ranges(RunFolder(run).yaml(".hydra/config.yaml"))
    assert list(ranges) == ["included_layers", "frozen_layers", "learning_rate", "dropout"]
    assert (ranges["included_layers"].low, ranges["included_layers"].high) == (1, 58)
    assert ranges["learning_rate"].log
    shares = report.importance(trials, ranges)
    assert min(shares["dropout"]) > 0.9
    assert len(shares["dropout"]) == report.FANOVA_SEEDS
    assert len(set(shares["dropout"])) > 1  # the spread is there to see
    assert np.sum(list(shares.values()), 0) == pytest.approx(1)


def test_few_trials_tell_no_importance(run):
    words = read(run).sections["Importance of the genes"]
    assert (
        "at least 20 completed trials (5 for each of 4 genes) to tell it, and there are 3" in words
    )
    config = RunFolder(run).yaml(".hydra/config.yaml")
    assert report._importance(trials_where(19, lambda g: g["dropout"]), config).charts == ()
    section = report._importance(trials_where(20, lambda g: g["dropout"]), config)
    assert len(section.charts) == 1
    assert "n = 20" in section.words[0]
    constant = report._importance(trials_where(20, lambda _: 1.0), config)
    assert "same val_loss" in constant.words[0]


def test_a_search_without_a_final_model_has_a_page(run):
    shutil.rmtree(run / "final")
    (run / "result.json").unlink()
    page = read(run)
    assert "Best so far: keep the first 30 of 58 layers" in page.text
    assert "are classified right" not in page.text
    words = page.sections["No final model yet"]
    assert f"python -m gatl resume={run}" in words
    assert f"python -m gatl.final run={run}" in words
    assert len(page.figures) > 5


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(compose(["data=digits"]), tmp_path / ".hydra" / "config.yaml")
    page = read(tmp_path)
    assert "No trial has ended yet." in page.text
    assert page.figures == []


# Workers.


def test_workers_are_told_how_busy_they_were(run):
    # 10 + 11 + 12 + 13 + 14 seconds of fits, by 2 workers, until 48 + 14
    words = read(run).sections["Workers"]
    assert "The workers were busy 48% of the search's time." in words


def schedule(rng, n_fits, sessions):
    """Return the fits that workers did, one behind the other, as trials of up to three."""
    fits, end = [], 0.0
    for n_workers in sessions:
        free = [end] * n_workers
        for _ in range(n_fits):
            worker = int(np.argmin(free))
            began = free[worker] + rng.exponential(0.3)
            seconds = rng.exponential(1.0)
            fits.append((began, seconds, n_workers))
            free[worker] = began + seconds
        end = max(free)
    rng.shuffle(fits)
    cuts = np.cumsum(rng.integers(0, 4, len(fits)))
    pieces = np.split(np.array(fits), cuts[cuts < len(fits)])
    return [
        Trial(i, 0, "COMPLETE", {}, 0.5, 0.5, 1, 1.0, 10, False,
              tuple((float(a), float(b), int(c)) for a, b, c in piece))
        for i, piece in enumerate(pieces)
    ]  # fmt: skip


@pytest.mark.parametrize("sessions", [(1,), (4,), (3, 8, 2)])
def test_the_strip_has_a_lane_for_each_fit_at_once(sessions):
    trials = schedule(np.random.default_rng(0), 30, sessions)
    fits = [fit for trial in trials for fit in trial.fits]
    (bars,) = charts.workers(trials)["data"]
    assert len(bars["x"]) == len(fits)
    assert set(bars["y"]) == set(range(1, max(sessions) + 1))
    for lane in set(bars["y"]):
        spans = [(b, b + x) for b, x, y in zip(bars["base"], bars["x"], bars["y"], strict=True)
                 if y == lane]  # fmt: skip
        assert all(end <= begin + 0.0021 for (_, end), (begin, _) in itertools.pairwise(spans))
    # The same share by looking at moments.
    moments = np.linspace(0, max(b + s for b, s, _ in fits), 20_001)[:-1]
    running = sum((b <= moments) & (moments < b + s) for b, s, _ in fits)
    order = sorted(fits)
    last = np.searchsorted([b for b, _, _ in order], moments, side="right") - 1
    there = np.array([n for _, _, n in order])[np.maximum(last, 0)]
    assert charts.busy(trials) == pytest.approx(running.sum() / there.sum(), abs=2e-3)


@pytest.mark.parametrize(
    "cell", ["[[1, 2]]", "[[1, -2, 1]]", "[[1, 2, 0]]", "[1, 2, 3]", '{"a": 1}', "[" * 10**5]
)
def test_what_is_no_fit_is_none(tmp_path, cell):
    folder = write_run(tmp_path / "run", [row(0, 0, "COMPLETE", PLAIN, 1.0, fits=cell)])
    assert RunFolder(folder).trials()[0].fits == ()
    assert "Workers" not in read(folder).sections


# The page of a run in progress.

RELOADS = '<meta http-equiv="refresh" content="30">'


def test_a_run_in_progress_has_a_page_that_says_so_and_reloads(run):
    (run / "result.json").unlink()
    with report.kept_fresh(run) as refresh:
        refresh()
        content = (run / "report.html").read_text()
        page = Page(content)
        assert RELOADS in content
        assert f"python -m gatl resume={run}" in page.sections["In progress"]
        assert "No final model yet" not in page.sections
        assert "Workers" not in page.sections  # of what runs the page knows nothing
        assert "Importance of the genes" not in page.sections  # it takes seconds
        assert len(page.figures) > 5
    finished = report.make(run).read_text()
    assert 'http-equiv="refresh"' not in finished
    assert "In progress" not in Page(finished).sections


def test_the_page_is_made_anew_when_it_is_time(run, monkeypatch):
    now, made = [0.0], []

    def make(path, **kwargs):
        made.append(now[0])
        now[0] += 1  # it takes a second

    monkeypatch.setattr(report, "make", make)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    with report.kept_fresh(run) as refresh:
        while now[0] < 200:
            refresh()
            now[0] += 0.25
        refresh(at_once=True)
    assert made == [0, 51, 102, 153, 200]  # a second in fifty


def broken_off(run, error):
    with report.kept_fresh(run) as refresh:
        refresh()
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("it is broken")])
def test_a_run_that_breaks_off_has_a_page_that_says_how_it_goes_on(run, error):
    (run / "result.json").unlink()
    with pytest.raises(type(error)):
        broken_off(run, error)
    content = (run / "report.html").read_text()
    assert 'http-equiv="refresh"' not in content
    page = Page(content)
    assert "In progress" not in page.sections
    assert f"python -m gatl resume={run}" in page.sections["No final model yet"]


def test_a_page_that_cannot_be_written_ends_no_run(run, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_whole", fail)
    with report.kept_fresh(run) as refresh:
        refresh()
    with pytest.raises(ZeroDivisionError):
        broken_off(run, ZeroDivisionError())


def test_many_classes_have_a_list_of_pairs(tmp_path):
    n = report.MATRIX_CLASSES + 1
    counts = 10 * np.eye(n, dtype=int)
    counts[3, 7], counts[8, 2] = 5, 9
    names = [f"class {i}" for i in range(n)]
    section = report._confusions(names, counts.tolist())
    assert section.charts == ()
    assert section.table.rows == [("class 8", "class 2", 9), ("class 3", "class 7", 5)]


NUMBERS = ("nan", "inf", "-inf", "1e400", "9" * 5000, "-1", "0", "1e99", "", "x", "1e-300", "\0")


@pytest.mark.parametrize("value", NUMBERS)
def test_odd_numbers_are_shown_as_missing_or_as_they_are(tmp_path, value):
    rows = [*ROWS]
    for column in range(len(HEADER)):
        changed = list(ROWS[3])
        changed[0], changed[column] = 6 + column, value
        rows.append(changed)
    page = read(write_run(tmp_path / "run", rows))
    texts = json.dumps(page.figures)
    assert "NaN" not in texts
    assert "Infinity" not in texts


@pytest.mark.parametrize(
    "value", ["Infinity", "NaN", "1e400", "9" * 4000, "-1", '"x"', "[]", "{}", "null", "true"]
)
def test_odd_results_are_shown_as_missing(run, value):
    def replaced(node, depth):
        """Put the value in place of whatever lies so deep."""
        if depth and isinstance(node, dict):
            return {key: replaced(child, depth - 1) for key, child in node.items()}
        if depth and isinstance(node, list):
            return [replaced(child, depth - 1) for child in node]
        return "@@"

    for depth in range(5):
        text = json.dumps(replaced(RESULT, depth)).replace('"@@"', value)
        (run / "result.json").write_text(text)
        assert read(run).tags.count("script") == 3


DAMAGES = {
    "bytes": b"\xff\xfe\0\x80" * 100,
    "nothing": b"",
    "quote": b'a,"b\n' * 3,
    "a long field": b"number," + b"x" * 200_000 + b"\n1,2\n",
    "deep": b"[" * 100_000,
    "text": b"not,what\nit,should\nbe",
    "tags": b"<script>alert(1)</script>\n<script>,<script>\n",
}


@pytest.mark.parametrize("damage", [*DAMAGES, None])
@pytest.mark.parametrize(
    "name",
    [
        *("history.csv", "result.json", "images.csv", ".hydra/config.yaml"),
        *(".hydra/overrides.yaml", "trials/3/metrics.csv", "final/learning_curve.csv"),
        *("final/confusion_matrix.csv", "final/predictions.csv", "final/examples/0.png"),
        *("final/examples/0_heat.png", "final/samples/1.png"),
    ],
)
def test_a_file_that_is_damaged_or_missing_costs_no_more_than_itself(run, name, damage):
    if damage is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(DAMAGES[damage])
    page = read(run)
    assert page.tags.count("script") == 3
    kept = {"history.csv": "Classes", "result.json": "The search"}.get(
        name, "Importance of the genes"
    )
    assert kept in page.sections


def test_no_interpolation_is_resolved_that_says_more_than_the_file(run, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    path = run / ".hydra" / "config.yaml"
    path.write_text(path.read_text().replace("name: se_densenet121_k12", "name: ${oc.env:SECRET}"))
    assert "hunter2" not in read(run).text


def test_references_in_a_circle_end():
    assert run_folder.setting({"a": "${b}", "b": "${a}"}, "a") is None
    assert run_folder.setting({"a": "${b.c}", "b": {"c": 3}}, "a") == 3


def test_a_link_out_of_the_folder_is_refused(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a,b")
    (run / "images.csv").unlink()
    (run / "images.csv").symlink_to(secret)
    with pytest.raises(UserError, match="out of the run folder"):
        report.make(run)


def test_a_large_search_makes_no_page_of_8_mb(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "get_plotlyjs", get_plotlyjs)
    rng = np.random.default_rng(0)
    rows = [
        row(i, i // 100, "COMPLETE", (int(rng.integers(1, 59)), 3, rng.random(), rng.random()),
            rng.random(), reused_from="" if i < 15 else 1)
        for i in range(run_folder.MAX_TRIALS + 5)
    ]  # fmt: skip
    folder = write_run(tmp_path / "run", rows)
    page = report.make(folder)
    assert page.stat().st_size < 8e6
    assert "its first 10000 rows are shown" in page.read_text()


def test_a_few_bad_losses_leave_the_picture():
    trials = trials_where(60, lambda g: 100.0 if g["dropout"] > 0.88 else 1 + g["dropout"])
    chart = charts.gene_against_loss(trials, "dropout")
    low, high = chart.figure["layout"]["yaxis"]["range"]
    assert low < 1.1
    assert 1.8 < high < 3
    assert "double click" in chart.caption


@pytest.mark.parametrize(
    ("losses", "cut"), [([9, 0.2, 0.21], False), ([9, *[0.2, 0.21] * 9], True)]
)
def test_of_few_generations_the_first_stays_in_the_picture(losses, cut):
    genes = {"included_layers": 1, "frozen_layers": 0, "learning_rate": 0.1, "dropout": 0.5}
    trials = [
        Trial(i, i, "COMPLETE", genes, loss, 0.5, 1, 1.0, 10, False)
        for i, loss in enumerate(losses)
    ]
    chart = charts.progress(trials)
    assert ("range" in chart.figure["layout"]["yaxis"]) == cut
    assert ("double click" in chart.caption) == cut


# The command.


def test_the_command_makes_the_page(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gatl.report", f"run={run}"])
    report.main()
    assert capsys.readouterr().out == f"Report: {run / 'report.html'}\n"
    before = (run / "report.html").read_bytes()
    report.main()
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "Give one run folder"), (["run=a", "run=b"], "Give one"), (["run=missing"], "is no run")],
)
def test_the_command_says_in_one_line_what_it_lacks(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["gatl.report", *words])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


# A browser.


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("there is no Chromium here")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it(run, browser, scheme, width):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page = report.make(run)
    browser.get(page.as_uri())
    ask = browser.execute_script
    drawn = ask(
        "return [...document.querySelectorAll('.chart')]"
        ".map(chart => chart.querySelectorAll('.main-svg').length)"
    )
    assert len(drawn) == len(Page(page.read_text()).figures)
    assert min(drawn) > 0
    assert browser.get_log("browser") == []  # no error, and nothing that the policy refused
    inside, outside = (
        "document.documentElement." + name for name in ("scrollWidth", "clientWidth")
    )
    assert ask(f"return {inside} - {outside}") == 0  # nothing sticks out
    brightness = ask("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", brightness))) > 382) == (scheme == "light")
    shown = ask("return document.body.innerText")
    assert "<script>alert(1)</script>" in shown
    ticks = ask("return [...document.querySelectorAll('.ytick text')].map(t => t.textContent)")
    assert any(tick.startswith("<script>alert(1)</") for tick in ticks)
    assert ask("return [...document.images].every(i => i.naturalWidth == 64)")
    ask("window.dispatchEvent(new Event('beforeprint'))")  # paper is white
    ink = ask("return getComputedStyle(document.querySelector('.xtick text')).fill")
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) < 200


@pytest.mark.slow
def test_in_a_browser_the_page_of_a_run_in_progress_reloads_itself(run, browser, monkeypatch):
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
    monkeypatch.setattr(report, "REFRESH_S", 1)
    browser.get(report.make(run, importance=False, running=True).as_uri())
    assert "In progress" in browser.page_source
    report.make(run)
    wait(browser, 20).until(lambda b: "In progress" not in b.page_source)
