"""``python -m gatl.report``: what a run found, as one page that needs nothing but a browser."""

import base64
import contextlib
import functools
import hashlib
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import optuna
from markupsafe import Markup
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial
from plotly.offline import get_plotlyjs

from gatl import charts
from gatl.charts import GENE_NAMES, Chart
from gatl.chromosome import KNOWN_GENES
from gatl.cli import folder_named, help_requested, one_line_errors
from gatl.errors import UserError, printable
from gatl.files import write_whole
from gatl.progress import format_count, format_duration, format_loss, new_console
from gatl.record import RESULT, resume_command
from gatl.run_folder import (
    MAX_CLASSES,
    RunFolder,
    Trial,
    at,
    list_at,
    mean,
    name_of,
    number,
    resolved,
    setting,
    share,
    square,
    whole_number,
)

REPORT = "report.html"
EXAMPLES = "examples"
"""Folder in ``final/`` of small test images: N.png is that of row N of ``predictions.csv``.

N_heat.png is the same with its heat map, where there is one.
"""
SAMPLE_IMAGES = "samples"
"""Folder in ``final/`` of small training images: N.png is one of class N."""
HELP = """\
gatl.report makes report.html in a run folder: what the search found and how
good it is, with charts, in one page that opens offline. A run keeps it up to
date and completes it at its end; the page of a search that was stopped lacks
the importance of the genes, which this command works out.

  python -m gatl.report run=outputs/DATE/TIME"""

MATRIX_CLASSES = 30
"""Classes up to which the confusion matrix is drawn; of more, the pairs most often confused."""
TRIALS_PER_GENE = 5
"""Trials that each gene needs before its importance says anything."""
FANOVA_TRIALS = 200
"""Trials in one analysis of importance; its time grows with their square."""
FANOVA_SEEDS = 3
MAX_LAYERS = 1_000
"""Of a network that is drawn."""
SHOWN = 20
"""Rows of a list of examples."""
REFRESH_S = 30
"""Seconds after which the page of a run in progress is made anew, and reloads itself."""
REFRESH_SHARE = 0.02
"""Of a search's time that its pages may take."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        head: The names of its columns.
        rows: A cell for each column.
        n_text: The first columns, which hold text; the others hold figures.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    n_text: int = 1


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        words: Paragraphs.
        pictures: Small ones as ``data:`` URIs, those beside each other with their words.
        charts: Drawn beside one another where there is room.
        table: Below them.
    """

    title: str
    words: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[tuple[Sequence[str], str]] = ()
    table: Table | None = None


def make(path: Path, *, importance: bool = True, running: bool = False) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        path: The run folder.
        importance: Whether to work out the importance of the genes, which takes
            seconds; all else takes some tenths of one.
        running: Whether the run is in progress: the page says so, and reloads itself.

    Returns:
        The page.

    Raises:
        UserError: If it is no run folder, or leads out of itself.
        OSError: If the page cannot be written.
    """
    page = render(RunFolder(path), importance=importance, running=running)
    write_whole(path / REPORT, page.encode())
    return path / REPORT


@contextlib.contextmanager
def kept_fresh(path: Path) -> Iterator[Callable[..., None]]:
    """Give a run in progress its page; if the run breaks off, the page says how it goes on.

    No failure to write the page ends the run. Of a run that was killed, the page stays the
    one of its last moments, which says so, and how it goes on. Whoever ends a run makes
    the page of its end.

    Args:
        path: The run folder.

    Yields:
        Makes the page anew, if it is time; or `at_once`.
    """
    due = 0.0

    def refresh(*, at_once: bool = False) -> None:
        nonlocal due
        began = time.monotonic()
        if began < due and not at_once:
            return
        with contextlib.suppress(Exception):
            make(path, importance=False, running=True)
        now = time.monotonic()
        due = now + max(REFRESH_S, (now - began) / REFRESH_SHARE)

    try:
        yield refresh
    except BaseException:
        with contextlib.suppress(Exception):
            make(path, importance=False)
        raise


def render(folder: RunFolder, *, importance: bool = True, running: bool = False) -> str:
    """Return the page of a run, see `make`."""
    config, result = folder.yaml(".hydra/config.yaml"), folder.json(RESULT)
    trials = folder.trials()
    found = found_genes(trials, result)
    sections = [
        *_search(folder, trials, config, importance=importance),
        *([] if running else _workers(trials)),  # of what runs, nothing is known here
        *_training(folder, trials),
        *_test(folder, result),
        *_data(folder, result),
    ]
    figures = [chart.figure for section in sections for chart in section.charts]
    library = Markup(get_plotlyjs())  # a part of plotly's package
    draw = Markup((files("gatl") / "templates" / "report.js").read_text(encoding="utf-8"))
    template = _environment().get_template("report.html")
    return template.render(
        title=_title(config),
        headline=headline(result, config, found),
        key_figures=key_figures(trials, result),
        improvement=improvement(trials, config, result),
        network=_network(config, found),
        as_of=datetime.now().strftime("%Y-%m-%d %H:%M:%S") if running else None,
        refresh_s=REFRESH_S,
        way_on=_way_on(folder.path) if running or not _is_made(result) else None,
        sections=sections,
        figures=Markup(_script_json(figures)),
        library=library,
        draw=draw,
        hashes=[_hash(library), _hash(draw)],
        commands=_commands(folder.path),
        started=_started_by(folder),
        config=_config_text(folder, config),
        versions=_versions(result),
        notes=list(dict.fromkeys(folder.notes)),
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("gatl"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _script_json(data: object) -> str:
    """Write JSON so that no text in it ends the script element that holds it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _hash(script: str) -> str:
    """Return what the page's policy calls a script that may run: none but ours."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _is_made(result: Mapping[str, Any]) -> bool:
    return share(at(result, "test", "accuracy")) is not None


def _title(config: object) -> str:
    model, data = setting(config, "model", "name"), setting(config, "data", "name")
    if not (isinstance(model, str) and isinstance(data, str)):
        return "A run of gatl"
    return f"{name_of(model)} on {name_of(data)}"


def found_genes(trials: Sequence[Trial], result: Mapping[str, Any]) -> dict[str, float]:
    """Return the genes of the final model, or those of the best trial so far."""
    if isinstance(genes := at(result, "best", "genes"), Mapping):
        values = {
            name: whole_number(genes.get(name)) if gene.kind is int else number(genes.get(name))
            for name, gene in KNOWN_GENES.items()
        }
        return {name: value for name, value in values.items() if value is not None}
    best = best_of(trials)
    return best.genes if best else {}


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the completed trial with the lowest val_loss, of equal ones the first."""
    complete = [trial for trial in trials if trial.complete]
    return min(complete, key=lambda trial: trial.loss, default=None)


def headline(result: Mapping[str, Any], config: object, genes: Mapping[str, float]) -> list[str]:
    """Say what was found and how good it is, a sentence each."""
    lines = []
    n_layers = whole_number(setting(config, "model", "n_layers"), MAX_LAYERS)
    if {"included_layers", "frozen_layers"} <= genes.keys():
        included, frozen = int(genes["included_layers"]), int(genes["frozen_layers"])
        of = f" of {n_layers}" if n_layers else ""
        rest = [
            f"{GENE_NAMES[name]} {value:.2g}"
            for name, value in genes.items()
            if name not in ("included_layers", "frozen_layers")
        ]
        lines.append(
            f"{'Best' if _is_made(result) else 'Best so far'}: keep the first {included}{of} "
            f"layers, {f'freeze {frozen} of them' if frozen else 'freeze nothing'}"
            + "".join(f", {words}" for words in rest)
            + "."
        )
    accuracy, n = share(at(result, "test", "accuracy")), whole_number(at(result, "test", "n"))
    if accuracy is not None:
        interval = [share(end) for end in list_at(result, "test", "accuracy_ci95")]
        tests = whole_number(at(result, "tests"))
        unseen = "no training has seen" if tests != 1 else "nothing before has seen"
        line = f"Of {n if n is not None else 'the'} images that {unseen}, {accuracy:.1%} are "
        line += "classified right"
        if len(interval) == 2 and interval[0] is not None and interval[1] is not None:
            line += f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})"
        lines.append(line + ".")
        if tests is not None and tests > 1:
            lines.append(
                f"This is final model {tests} of this run: whoever picks the best of them by "
                "these figures makes them optimistic."
            )
    return lines


def improvement(trials: Sequence[Trial], config: object, result: Mapping[str, Any]) -> list[str]:
    """Compare the best val_loss with the first generation's and with the plain recipe's."""
    best = best_of(trials)
    if best is None or best.val_loss is None:
        return []
    loss = best.val_loss
    lines = [f"The best val_loss of the search is {format_loss(loss)} (trial {best.number})."]
    first = [t.val_loss for t in trials if t.complete and t.generation == 0]
    losses = [value for value in first if value is not None]
    average = mean(losses)
    if average is not None:
        lines.append(
            f"The first generation's best was {format_loss(min(losses))}"
            f"{_lower(loss, min(losses))}; its mean, over {format_count(len(losses), 'trial')} "
            f"that completed, {format_loss(average)}{_lower(loss, average)}."
        )
    plain = plain_recipe(trials, config)
    if plain is not None and plain.val_loss is not None:
        same = " It is the best itself." if plain is best else ""
        lines.append(
            f"The plain recipe (all layers, nothing frozen, learning rate "
            f"{plain.genes['learning_rate']:.2g}) had {format_loss(plain.val_loss)}"
            f"{_lower(loss, plain.val_loss)}.{same}"
        )
    luck = "The search chose by these losses, so the best of them is partly the luckiest."
    chosen = _again(result, at(result, "best", "trial"))
    if chosen is not None:
        luck += f" With fresh seeds, the chromosome that was chosen had {chosen}"
        recipe = None if plain is None else _again(result, plain.number)
        luck += f", the plain recipe {recipe}." if recipe not in (None, chosen) else "."
    lines.append(luck)
    return lines


def _again(result: Mapping[str, Any], trial: object) -> str | None:
    """Write the val_loss of a trial's chromosome with fresh seeds; None if it was not chosen."""
    for candidate in list_at(result, "reevaluation"):
        average = number(at(candidate, "mean"))
        if average is not None and at(candidate, "trial") == trial:
            losses = [x for x in map(number, list_at(candidate, "val_losses")) if x is not None]
            sd = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            of = f"{format_count(len(losses), 'seed')}, trial {whole_number(trial)}"
            return f"{format_loss(average)}{sd} ({of})"
    return None


def _lower(loss: float, than: float) -> str:
    """Say by how much a loss is lower than another."""
    return f" (the best is {1 - loss / than:.0%} lower)" if 0 < loss < than else ""


def plain_recipe(trials: Sequence[Trial], config: object) -> Trial | None:
    """Return the trial of the first initial chromosome, if that is all layers, none frozen."""
    initial = (list_at(config, "search", "initial") or [None])[0]
    n_layers = whole_number(setting(config, "model", "n_layers"))
    if not isinstance(initial, Mapping):
        return None
    genes = {name: number(resolved(config, value)) for name, value in initial.items()}
    if genes.get("included_layers") != n_layers or genes.get("frozen_layers") != 0:
        return None
    if "learning_rate" not in genes:
        return None
    for trial in trials:
        if trial.complete and all(trial.genes.get(name) == v for name, v in genes.items()):
            return trial
    return None


def _mapping(node: object) -> dict[Any, Any]:
    return dict(node) if isinstance(node, Mapping) else {}


def key_figures(trials: Sequence[Trial], result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the run cost, as figures with their words."""
    fitted = [trial for trial in trials if not trial.reused]
    epochs = sum(trial.epochs or 0 for trial in fitted)
    work = sum(trial.duration_s or 0.0 for trial in fitted)
    figures = [
        (str(len(trials)), "trials"),
        (str(len(fitted)), "evaluations"),
        (f"{epochs:,}", "epochs of the search"),
        (format_duration(work), "of fits, workers added up"),
    ]
    final_epochs = whole_number(at(result, "final", "epochs"))
    seconds = number(at(result, "seconds"))
    if final_epochs is not None:
        figures.append((str(final_epochs), "epochs of the final training"))
    if seconds is not None and seconds >= 0:
        figures.append((format_duration(seconds), "in all"))
    return figures


def _network(config: object, genes: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the strip of the network's layers, with its numbers."""
    n_layers = whole_number(setting(config, "model", "n_layers"), MAX_LAYERS)
    if not n_layers or not {"included_layers", "frozen_layers"} <= genes.keys():
        return None
    included = min(int(genes["included_layers"]), n_layers)
    frozen = min(int(genes["frozen_layers"]), included)
    found = [
        whole_number(n, MAX_LAYERS) for n in list_at(config, "model", "network", "block_config")
    ]
    blocks = [n for n in found if n] if len(found) <= MAX_LAYERS else []
    return {
        "svg": Markup(charts.strip(n_layers, included, frozen, blocks)),  # of numbers alone
        "frozen": frozen,
        "trained": included - frozen,
        "left_out": n_layers - included,
        "blocks": blocks if sum(blocks) == n_layers else [],
    }


def _search(
    folder: RunFolder, trials: Sequence[Trial], config: object, *, importance: bool
) -> list[Section]:
    """Return the sections about the search."""
    if not trials:
        return [Section("The search", ["No trial has ended yet."])]
    sections = []
    failed = sum(trial.state == "FAIL" for trial in trials)
    words = [f"{format_count(failed, 'trial')} failed, see history.csv."] if failed else []
    if chart := charts.progress(trials):
        sections.append(Section("The search", words, [chart]))
    else:
        sections.append(Section("The search", [*words, "No trial has completed yet."]))
    if genes := charts.varied(trials):
        sections.append(
            Section(
                "Where the genes went",
                [
                    "Each point is a trial; where there are generations, a box holds the middle "
                    "half of one."
                ],
                [charts.gene_over_time(trials, gene) for gene in genes],
            )
        )
        drawn = [chart for gene in genes if (chart := charts.gene_against_loss(trials, gene))]
        if drawn:
            sections.append(
                Section(
                    "Genes and val_loss",
                    ["Lower is better. A trial that was stopped early shows the loss it had then."],
                    drawn,
                )
            )
    if importance:
        sections.append(_importance(trials, config))
    drawn = [
        chart
        for cost in ("trainable_params", "duration_s")
        if (chart := charts.trade_off(trials, cost))
    ]
    if drawn:
        sections.append(
            Section(
                "Accuracy and its price",
                [
                    "Validation accuracy of the trials that completed. On the Pareto front, none "
                    "is both cheaper and at least as accurate. Seconds depend on what ran beside."
                ],
                drawn,
            )
        )
    return sections


def _importance(trials: Sequence[Trial], config: object) -> Section:
    """Say how much of the variation of val_loss each gene explains, if that can be told."""
    title = "Importance of the genes"
    ranges = _ranges(config)
    usable = [
        t
        for t in trials
        if t.complete
        and not t.reused
        and all(n in t.genes and d._contains(t.genes[n]) for n, d in ranges.items())
    ]
    if len(ranges) < 2:
        return Section(title, ["Fewer than two genes were searched, so there is none to tell."])
    needed = TRIALS_PER_GENE * len(ranges)
    if len(usable) < needed:
        return Section(
            title,
            [
                f"It takes at least {needed} completed trials ({TRIALS_PER_GENE} for each of "
                f"{len(ranges)} genes) to tell it, and there are {len(usable)}."
            ],
        )
    if len({t.val_loss for t in usable}) == 1:
        return Section(title, ["All trials have the same val_loss, so there is none to tell."])
    drawn = min(len(usable), FANOVA_TRIALS)
    each = f", each of {drawn} drawn from them at random" if drawn < len(usable) else ""
    chart = Chart(
        "Share of the variation that a gene explains",
        charts.importances(importance(usable, ranges)),
    )
    return Section(
        title,
        [
            f"By Optuna's fANOVA (Hutter et al. 2014), from n = {len(usable)} completed trials: "
            f"the mean of {FANOVA_SEEDS} analyses with other seeds{each}, and as a line the "
            "lowest and the highest. It is about the whole range that was searched, bad regions "
            "too, and a search does not draw evenly from it."
        ],
        [chart],
    )


def _ranges(config: object) -> dict[str, BaseDistribution]:
    """Return the genes of the configuration that have a range to search."""
    found: dict[str, BaseDistribution] = {}
    for name, gene in KNOWN_GENES.items():
        low, high = (number(setting(config, "space", name, end)) for end in ("low", "high"))
        fixed = setting(config, "space", name, "value") is not None
        if fixed or low is None or high is None or not low < high:
            continue
        log = setting(config, "space", name, "log") is True and low > 0
        if gene.kind is int:
            if low == int(low) and high == int(high) and (low >= 1 or not log):
                found[name] = IntDistribution(int(low), int(high), log=log)
        else:
            found[name] = FloatDistribution(low, high, log=log)
    return found


def importance(
    trials: Sequence[Trial], ranges: Mapping[str, BaseDistribution]
) -> dict[str, list[float]]:
    """Return for each gene its share of the variation of val_loss, once for each seed.

    Args:
        trials: Completed, with all genes of `ranges`, each in its range.
        ranges: The genes that were searched.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shares: dict[str, list[float]] = {name: [] for name in ranges}
    for seed in range(FANOVA_SEEDS):
        order = np.random.default_rng((seed, 1, 0, 0)).permutation(len(trials))[:FANOVA_TRIALS]
        study = optuna.create_study(direction="minimize")
        study.add_trials(
            [
                create_trial(
                    params={name: trials[i].genes[name] for name in ranges},
                    distributions=dict(ranges),
                    value=trials[i].val_loss,
                )
                for i in order
            ]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            found = optuna.importance.get_param_importances(
                study, evaluator=FanovaImportanceEvaluator(seed=seed)
            )
        for name in ranges:
            shares[name].append(float(found[name]))
    return shares


def _workers(trials: Sequence[Trial]) -> list[Section]:
    """Return when fits ran, and how busy that kept the workers."""
    share_busy = charts.busy(trials)
    if share_busy is None:
        return []
    n_fits = sum(len(trial.fits) for trial in trials)
    cut = f" The first {charts.BARS:,} of {n_fits:,} are drawn." if n_fits > charts.BARS else ""
    words = [
        f"The workers were busy {share_busy:.0%} of the search's time.",
        "A bar is a fit, of trials that have ended; a trial that stood at rungs has several. At "
        "the end of a generation, and at each rung, workers wait for the last fit. The time "
        f"between sessions of a search that was resumed does not count.{cut}",
    ]
    return [Section("Workers", words, [Chart("Fits that ran at once", charts.workers(trials))])]


def _training(folder: RunFolder, trials: Sequence[Trial]) -> list[Section]:
    """Return the learning curves of the best trials and of the final training."""
    fitted = [trial for trial in trials if trial.complete and not trial.reused]
    best = sorted(fitted, key=lambda trial: trial.loss)[:5]
    curves = {f"trial {t.number}": folder.curve(f"trials/{t.number}/metrics.csv", 0) for t in best}
    curves = {name: curve for name, curve in curves.items() if curve["val_loss"]}
    final = folder.curve("final/learning_curve.csv", 1)
    drawn = []
    if curves:
        drawn.append(
            Chart(f"The best {format_count(len(curves), 'trial')}", charts.learning_curves(curves))
        )
    if final["val_loss"]:
        figure = charts.learning_curves({"final training": final}, both=True)
        drawn.append(Chart("The final training", figure))
    return [Section("Learning curves", [], drawn)] if drawn else []


def _test(folder: RunFolder, result: Mapping[str, Any]) -> list[Section]:
    """Return what the test says: confusions, figures of the classes, the worst mistakes."""
    sections = []
    rows = folder.table("final/confusion_matrix.csv", MAX_CLASSES)
    matrix = square(rows)
    if rows and matrix is None:
        folder.notes.append("final/confusion_matrix.csv is damaged and not shown.")
    if matrix is not None:
        sections.append(_confusions(*matrix))
    classes = [row for row in list_at(result, "test", "per_class") if isinstance(row, Mapping)]
    if classes:
        shown = [
            (
                name_of(row.get("class")),
                *(_figure(share(row.get(key))) for key in ("precision", "recall", "f1")),
                _count(whole_number(row.get("n"))),
            )
            for row in classes[:MAX_CLASSES]
        ]
        head = ("class", "precision", "recall", "F1", "images")
        sections.append(Section("Classes", [], table=Table(head, shown)))
    sections += _examples(folder)
    return sections


def _examples(folder: RunFolder) -> list[Section]:
    """Return the answers that the model was surest of, with pictures where the run kept them."""
    answers = [
        (probability, row, index)
        for index, row in enumerate(folder.records("final/predictions.csv"))
        if (probability := share(row.get("probability"))) is not None
    ]
    answers.sort(key=lambda answer: -answer[0])
    wrong = [answer for answer in answers if answer[1].get("label") != answer[1].get("predicted")]
    right = [answer for answer in answers if answer[1].get("label") == answer[1].get("predicted")]
    sections = []
    if wrong:
        rows = [
            (*(name_of(row.get(key, "")) for key in ("image", "label", "predicted")), f"{p:.1%}")
            for p, row, _ in wrong[:SHOWN]
        ]
        words = (
            f"{format_count(len(wrong), 'mistake')} on the test images; those that the model was "
            "surest of. A wrong label shows itself here."
        )
        table = Table(("image", "is", "taken for", "probability"), rows, 3)
        pictures = _answers(folder, wrong)
        about = [words, *_about_heat(pictures)]
        title = "The most confident mistakes"
        sections.append(Section(title, about, pictures=pictures, table=table))
    if pictures := _answers(folder, right):
        words = "Of a few classes, the test image that the model recognised most surely."
        about = [words, *_about_heat(pictures)]
        sections.append(Section("Right answers", about, pictures=pictures))
    return sections


def _answers(
    folder: RunFolder, answers: Sequence[tuple[float, Mapping[str, str], int]]
) -> list[tuple[list[str], str]]:
    """Return the pictures that there are of some answers, each with its heat map, and words."""
    shown = []
    with contextlib.suppress(OSError):
        kept = {path.name for path in (folder.path / "final" / EXAMPLES).iterdir()}
        answers = [answer for answer in answers if f"{answer[2]}.png" in kept]
    for probability, row, index in answers:
        names = (f"final/{EXAMPLES}/{index}{end}.png" for end in ("", "_heat"))
        pictures = [picture for name in names if (picture := folder.picture(name)) is not None]
        if pictures:
            label, predicted = (name_of(row.get(key, "")) for key in ("label", "predicted"))
            what = "" if label == predicted else f", taken for {predicted}"
            shown.append((pictures, f"{label}{what} ({probability:.1%})"))
        if len(shown) == SHOWN:
            break
    return shown


def _about_heat(pictures: Sequence[tuple[Sequence[str], str]]) -> list[str]:
    """Say how to read heat maps, where there are any."""
    if not any(len(beside) > 1 for beside, _ in pictures):
        return []
    return [
        "The coloured one of two pictures shows what spoke for the answer: most where it is red "
        "(Grad-CAM, Selvaraju et al. 2017). It is coarse, as the network's last feature maps are, "
        "and says where the model looked, not why."
    ]


def _confusions(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Section:
    title = "Confusions"
    if len(classes) <= MATRIX_CLASSES:
        words = [
            "Test images: a row for what they are, a column for what they were taken for; "
            "the colour is the share of the row."
        ]
        return Section(title, words, [Chart("", charts.confusion(classes, counts))])
    pairs = [
        (n, classes[i], classes[j])
        for i, row in enumerate(counts)
        for j, n in enumerate(row)
        if i != j and n
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows = [(a, b, n) for n, a, b in pairs[:SHOWN]]
    words = [
        f"Of {len(classes)} classes, the pairs that were confused most often on the test images."
        if pairs
        else "No test image was confused."
    ]
    table = Table(("is", "taken for", "images"), rows, 2)
    return Section(title, words, table=table if pairs else None)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _data(folder: RunFolder, result: Mapping[str, Any]) -> list[Section]:
    """Return the counts of images, from the result or, without one, from ``images.csv``."""
    splits = ("train", "val", "test")
    listed = folder.records("images.csv")
    bad = [row for row in listed if row.get("error")]
    names = [name_of(name) for name in list_at(result, "classes")[:MAX_CLASSES]]
    counts = [[whole_number(n) for n in list_at(result, "images", split)] for split in splits]
    if not names or any(len(column) < len(names) for column in counts):  # there is no result
        by_class: dict[str, list[int]] = {}
        for row in listed:
            if row.get("split") in splits and not row.get("error"):
                line = by_class.setdefault(name_of(row.get("class", "")), [0, 0, 0])
                line[splits.index(row["split"])] += 1
        names = [*dict.fromkeys([*names, *sorted(by_class)])][:MAX_CLASSES]
        counts = [[by_class.get(name, (0, 0, 0))[i] for name in names] for i in range(3)]
    if not names:
        return []
    rows = [(name, *(_count(n[i]) for n in counts)) for i, name in enumerate(names)]
    totals = [sum(n or 0 for n in column[: len(names)]) for column in counts]
    rows.append(("all", *map(_count, totals)))
    words = [
        f"{len(names)} classes. Training images "
        "fit the weights, validation images choose among chromosomes and epochs, and test "
        "images measure the final model, once."
    ]
    if bad:
        listed_bad = ", ".join(name_of(row.get("image", "")) for row in bad[:SHOWN])
        more = ", ..." if len(bad) > SHOWN else "."
        words.append(f"{format_count(len(bad), 'image')} could not be decoded: {listed_bad}{more}")
    samples = [
        ([picture], name)
        for i, name in enumerate(names[:SHOWN])
        if (picture := folder.picture(f"final/{SAMPLE_IMAGES}/{i}.png")) is not None
    ]
    if samples:
        words.append("A training image of each of the first classes, as the network saw it:")
    head = ("class", "training", "validation", "test")
    return [Section("Data", words, pictures=samples, table=Table(head, rows))]


def _command(*words: str) -> str:
    return printable(shlex.join(["python", "-m", *words]))


def _way_on(path: Path) -> list[tuple[str, str]]:
    return [
        ("go on with the search", printable(resume_command(path))),
        ("make the final model of what was found", _command("gatl.final", f"run={path}")),
    ]


def _commands(path: Path) -> list[tuple[str, str]]:
    run = f"run={path}"
    return [
        ("go on with a larger budget", printable(resume_command(path, "budget.trials=N"))),
        ("classify new images", _command("gatl.predict", run, "images=PHOTOS")),
        ("export the model as ONNX", _command("gatl.export", run, "format=onnx")),
        ("compare with other runs", _command("gatl.compare", f"runs={path.parent}")),
        ("make this page again", _command("gatl.report", run)),
    ]


def _started_by(folder: RunFolder) -> str | None:
    """Return the command that started the run."""
    words = folder.yaml(".hydra/overrides.yaml")
    return _command("gatl", *map(str, words)) if isinstance(words, list) else None


def _config_text(folder: RunFolder, config: object) -> str | None:
    """Return the configuration as its file has it."""
    if config is None:
        return None
    path = folder.path / ".hydra" / "config.yaml"
    lines = path.read_text(encoding="utf-8").split("\n")
    return "\n".join(map(printable, lines))


def _versions(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return seed, versions and hardware."""
    own = ("seed", "finished", "precision")
    rows = [(key, name_of(result[key])) for key in own if key in result]
    for group in ("versions", "hardware"):
        for key, value in list(_mapping(at(result, group)).items())[:SHOWN]:
            values = value if isinstance(value, list) else [value]
            rows.append((name_of(key), ", ".join(map(name_of, values[:SHOWN])) or "none"))
    return rows


def main() -> None:
    """Make the report of the run that the command line names."""
    words = sys.argv[1:]
    if help_requested(words, HELP):
        return
    with one_line_errors():
        if len(words) != 1 or not words[0].startswith("run="):
            raise UserError("Give one run folder: python -m gatl.report run=outputs/DATE/TIME")
        folder = folder_named(words[0].removeprefix("run="))
        new_console().print(f"Report: {make(folder)}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
