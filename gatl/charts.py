"""The charts of the report, as the plain data that plotly.js draws.

The page gives them their colours, which follow light and dark.
Names stand in them as text: plotly reads a few tags, so `label` writes their brackets as entities.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gatl.chromosome import KNOWN_GENES
from gatl.progress import format_duration, format_genes, format_loss
from gatl.run_folder import Trial, mean

Figure = dict[str, Any]
Curves = Mapping[str, Sequence[tuple[int, float]]]

GENE_NAMES = {
    "included_layers": "included layers",
    "frozen_layers": "frozen layers",
    "learning_rate": "learning rate",
    "dropout": "dropout",
    "weight_decay": "weight decay",
    "label_smoothing": "label smoothing",
}
GREY = "#808a94"
"""Can be seen in light and dark."""
CUT = "The worst lie outside the picture; a double click shows all."
BARS = 1_000
"""Fits that are drawn."""
LOGARITHMIC = ("learning_rate", "weight_decay")


@dataclass(frozen=True)
class Chart:
    """A figure with its words.

    Attributes:
        title: Stands above it.
        figure: `data` and `layout` of plotly.
        caption: Stands below it; says how to read it.
    """

    title: str
    figure: Figure
    caption: str = ""


def label(name: object) -> str:
    """Write a text so that plotly shows it as it is."""
    return escape(str(name), quote=False)


def short(name: str, width: int = 24) -> str:
    """Cut a name to what an axis has room for."""
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # a page of thousands of trials stays small


def _axis(title: str, log: bool = False, **more: object) -> dict[str, Any]:
    logarithmic = {"type": "log", "exponentformat": "power", "dtick": 1} if log else {}
    return {"title": {"text": title, "standoff": 12}, "automargin": True, **logarithmic, **more}


def _figure(
    data: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **more: object
) -> Figure:
    layout = {"xaxis": x, "yaxis": y, "showlegend": len(data) > 1, **more}
    return {"data": data, "layout": layout}


def _points(
    name: str, points: Iterable[tuple[float, float, str]], mode: str = "markers", **more: object
) -> dict[str, Any]:
    """Return a trace of points (x, y, text)."""
    rows = list(points)
    return {
        "type": "scatter",
        "mode": mode,
        "name": label(name),
        "x": [_rounded(x) for x, _, _ in rows],
        "y": [_rounded(y) for _, y, _ in rows],
        "text": [label(text) for _, _, text in rows],
        "hovertemplate": "%{text}<extra></extra>",
        **more,
    }


def _loss(trial: Trial) -> float:
    return trial.loss


def _better(one: Trial, other: Trial) -> Trial:
    return min(one, other, key=_loss)


def about(trial: Trial) -> str:
    """Say in a line what a trial was, and what came of it."""
    loss = "" if trial.val_loss is None else f" · val_loss {format_loss(trial.val_loss)}"
    return f"trial {trial.number} · {format_genes(trial.genes)}{loss}"


def _scaled(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return an axis that is logarithmic if the values on it are far apart."""
    low, high = min(values, default=0), max(values, default=0)
    if low <= 0 or high / low <= 10:
        return _axis(title)
    return _axis(title, log=True) | {"dtick": "D2" if high / low < 300 else 1}


def progress(trials: Sequence[Trial]) -> Chart | None:
    """Draw best and mean fitness of each generation; without generations the best so far."""
    complete = [trial for trial in trials if trial.complete]
    if not complete:
        return None
    generations = generations_of(complete)
    if not generations:
        best = itertools.accumulate(complete, _better)
        steps = [
            (t.number, -b.loss, f"after trial {t.number}: {about(b)}")
            for t, b in zip(complete, best, strict=True)
        ]
        every = [(t.number, -t.loss, about(t)) for t in complete]
        data = [
            _points("best so far", steps, "lines", line={"shape": "hv"}),
            _points("trial", every, marker={"opacity": 0.5}),
        ]
        y = _axis("fitness (-val_loss)", **_range(every))
        return Chart("Fitness over the trials", _figure(data, _axis("trial"), y))
    bests, means = [], []
    for generation, members in generations.items():
        losses = [trial.loss for trial in members]
        average = mean(losses) or 0.0
        best_one = min(members, key=_loss)
        bests.append((generation, -min(losses), about(best_one)))
        words = f"mean of {len(losses)} completed trials: val_loss {format_loss(average)}"
        means.append((generation, -average, words))
    data = [
        _points("best", bests, "lines+markers"),
        _points("mean", means, "lines+markers", line={"dash": "dot"}),
    ]
    cut = _range([*bests, *means])
    note = (
        "Of the trials that completed; those that were stopped early, and the parents kept from "
        "earlier generations, do not count."
    )
    x = _axis("generation", **_whole_ticks(len(generations)))
    y = _axis("fitness (-val_loss)", **cut)
    return Chart(
        "Fitness of the generations", _figure(data, x, y), f"{note} {CUT}" if cut else note
    )


def _range(points: Sequence[tuple[float, float, str]]) -> dict[str, Any]:
    """Let the few worst points leave the picture where they would flatten the rest."""
    values = sorted(y for _, y, _ in points)
    high, middle, low = values[-1], values[len(values) // 2], values[0]
    if high - low <= 10 * (high - middle) or high == middle:
        return {}
    bottom = high - 4 * (high - middle)
    if sum(value < bottom for value in values) > len(values) / 10:  # they are the story
        return {}
    return {"range": [_rounded(bottom), _rounded(high + 0.05 * (high - bottom))]}


def generations_of(trials: Iterable[Trial]) -> dict[int, list[Trial]]:
    """Return the trials of each generation; none where a trial has no generation."""
    found: dict[int, list[Trial]] = {}
    for trial in trials:
        if trial.generation is None:
            return {}
        found.setdefault(trial.generation, []).append(trial)
    return dict(sorted(found.items()))


def _whole_ticks(n: int) -> dict[str, Any]:
    return {"dtick": 1, "tick0": 0} if n <= 15 else {}


def varied(trials: Sequence[Trial]) -> list[str]:
    """Return the genes that have more than one value."""
    return [name for name in KNOWN_GENES if len({t.genes.get(name) for t in trials} - {None}) > 1]


def gene_over_time(trials: Sequence[Trial], gene: str) -> Chart:
    """Draw where a gene went: a strip for each generation, or a point for each trial."""
    known = [trial for trial in trials if gene in trial.genes]
    generations = generations_of(known)
    y = _axis(GENE_NAMES[gene], gene in LOGARITHMIC)
    values = [_rounded(trial.genes[gene]) for trial in known]
    texts = [label(about(trial)) for trial in known]
    common = {"y": values, "text": texts, "hovertemplate": "%{text}<extra></extra>"}
    if not generations:
        numbers = [trial.number for trial in known]
        data = {"type": "scatter", "mode": "markers", "x": numbers, **common}
        data["marker"] = {"opacity": 0.6}
        return Chart(GENE_NAMES[gene], _figure([data], _axis("trial"), y))
    box = {
        "type": "box",
        "x": [trial.generation for trial in known],
        "boxpoints": "all",
        "pointpos": 0,
        "jitter": 0.5,
        "marker": {"opacity": 0.8},
        "line": {"width": 1, "color": GREY},
        "fillcolor": "rgba(128,128,128,0.12)",
        "hoveron": "points",
        **common,
    }
    x = _axis("generation", **_whole_ticks(len(generations)))
    return Chart(GENE_NAMES[gene], _figure([box], x, y))


def gene_against_loss(trials: Sequence[Trial], gene: str) -> Chart | None:
    """Draw a gene against val_loss, apart for trials that were stopped early."""
    known = [t for t in trials if gene in t.genes and t.val_loss is not None and not t.reused]
    if not known:
        return None
    look: dict[str, dict[str, Any]] = {
        "COMPLETE": {"opacity": 0.75},
        "PRUNED": {"opacity": 0.6, "symbol": "circle-open"},
    }
    names = {"COMPLETE": "completed", "PRUNED": "stopped early"}
    data = [
        _points(
            names[state],
            ((t.genes[gene], t.loss, about(t)) for t in known if t.state == state),
            marker=marker,
        )
        for state, marker in look.items()
        if any(t.state == state for t in known)
    ]
    losses = sorted(t.loss for t in known)
    usual = losses[: max(1, round(0.95 * len(losses)))]
    y = _scaled("val_loss", usual)
    cut = losses[-1] > 5 * usual[-1] > 0  # a few losses would flatten all others
    if cut:
        low, high = usual[0], 1.1 * usual[-1]
        log = y.get("type") == "log"
        y["range"] = [math.log10(0.9 * low), math.log10(high)] if log else [0.9 * low, high]
    x = _axis(GENE_NAMES[gene], gene in LOGARITHMIC)
    return Chart(GENE_NAMES[gene], _figure(data, x, y), CUT if cut else "")


def importances(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the importance of each gene: the mean over the repeats, and their range.

    Args:
        shares: For each gene its importance in each repeat, in [0, 1].
    """
    means = {gene: mean(values) or 0.0 for gene, values in shares.items()}
    order = sorted(means, key=means.__getitem__)
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": [GENE_NAMES[gene] for gene in order],
        "x": [_rounded(means[gene]) for gene in order],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "color": GREY,
            "array": [_rounded(max(shares[gene]) - means[gene]) for gene in order],
            "arrayminus": [_rounded(means[gene] - min(shares[gene])) for gene in order],
        },
        "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
    }
    x = _axis("share of the variation of val_loss", tickformat=".0%", rangemode="tozero")
    return _figure([bar], x, {"automargin": True}, height=110 + 45 * len(order))


def learning_curves(curves: Mapping[str, Curves], both: bool = False) -> Figure:
    """Draw losses over epochs, a line for each name.

    Args:
        curves: For each name the points of `train_loss` and `val_loss`.
        both: Whether to draw the training loss too.
    """
    data = []
    for name, curve in curves.items():
        for metric in ("val_loss", "train_loss") if both else ("val_loss",):
            points = [(x, y, f"{name} · epoch {x}: {format_loss(y)}") for x, y in curve[metric]]
            shown = metric if both else name
            dash = "dot" if metric == "train_loss" else "solid"
            data.append(_points(shown, points, "lines+markers", line={"dash": dash}))
    losses = [y for curve in curves.values() for _, y in curve["val_loss"]]
    epochs = max((x for curve in curves.values() for x, _ in curve["val_loss"]), default=0)
    y_axis = _scaled("loss" if both else "val_loss", losses)
    return _figure(data, _axis("epoch") | _whole_ticks(epochs), y_axis)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the Pareto front of (cost, accuracy): nothing else is as cheap and as accurate.

    Returns:
        The indices of its points, the cheapest first; of equal ones the first alone.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] > points[kept[-1]][1]:
            kept.append(i)
    return kept


def trade_off(trials: Sequence[Trial], cost: str) -> Chart | None:
    """Draw validation accuracy against ``trainable_params`` or ``duration_s``, the front marked."""
    titles = {"trainable_params": "trainable parameters", "duration_s": "seconds of the fit"}
    known = [
        (float(value), trial.val_accuracy, about(trial))
        for trial in trials
        if trial.complete
        and not trial.reused
        and trial.val_accuracy is not None
        and (value := getattr(trial, cost)) is not None
    ]
    if not known:
        return None
    best = [known[i] for i in front([(x, y) for x, y, _ in known])]
    data = [
        _points("trial", known, marker={"opacity": 0.55}),
        _points(
            "Pareto front",
            best,
            "lines+markers",
            line={"shape": "hv", "width": 1.5},
            marker={"size": 10, "symbol": "diamond"},
        ),
    ]
    x = _scaled(titles[cost], [x for x, _, _ in known])
    y = _axis("validation accuracy", tickformat=".0%")
    return Chart(f"Accuracy against {titles[cost]}", _figure(data, x, y))


def lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Lay spans of time out so that none lies over another, but for what rounding did.

    Args:
        spans: When each begins and ends, in the order of their beginnings.

    Returns:
        For each the lowest lane that is free, from 0; there are as many as spans at once.
    """
    ends: list[float] = []
    found = []
    for begin, end in spans:
        lane = next((i for i, last in enumerate(ends) if last <= begin + 0.002), len(ends))
        ends[lane : lane + 1] = [end]
        found.append(lane)
    return found


def busy(trials: Sequence[Trial]) -> float | None:
    """Return the share in [0, 1] of their time in which the workers of a search ran fits."""
    fits = sorted(fit for trial in trials for fit in trial.fits)
    if not fits:
        return None
    begins = [0.0, *(begin for begin, _, _ in fits[1:]), max(b + s for b, s, _ in fits)]
    there = math.fsum(
        n * (end - begin)
        for (_, _, n), (begin, end) in zip(fits, itertools.pairwise(begins), strict=True)
    )
    return min(1.0, math.fsum(s for _, s, _ in fits) / there) if there > 0 else None


def workers(trials: Sequence[Trial]) -> Figure:
    """Draw when fits ran, a line for each that ran at once; at most the first `BARS`."""
    fits = sorted(
        ((fit, trial) for trial in trials for fit in trial.fits), key=lambda found: found[0]
    )[:BARS]
    rows = lanes([(begin, begin + seconds) for (begin, seconds, _), _ in fits])
    bar = {
        "type": "bar",
        "orientation": "h",
        "base": [_rounded(begin) for (begin, _, _), _ in fits],
        "x": [_rounded(seconds) for (_, seconds, _), _ in fits],
        "y": [lane + 1 for lane in rows],
        "text": [label(f"{about(t)} · {format_duration(s)}") for (_, s, _), t in fits],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"line": {"width": 1, "color": GREY}},
    }
    y = {"automargin": True, "dtick": 1, "autorange": "reversed"}
    n = max(rows, default=0) + 1
    return _figure(
        [bar], _axis("seconds of the search", rangemode="tozero"), y, height=min(110 + 32 * n, 700)
    )


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """Draw a confusion matrix: rows are what images are, columns what they were taken for.

    Args:
        classes: Their names.
        counts: (n_classes, n_classes).
    """
    n = len(classes)
    shares = [[c / max(sum(row), 1) for c in row] for row in counts]
    ticks: dict[str, Any] = {
        "tickmode": "array",
        "tickvals": list(range(n)),
        "ticktext": [label(short(name)) for name in classes],
        "showgrid": False,
        "zeroline": False,
    }
    hover = [
        [label(f"{a}, taken for {b}: {counts[i][j]}") for j, b in enumerate(classes)]
        for i, a in enumerate(classes)
    ]
    heat: dict[str, Any] = {
        "type": "heatmap",
        "z": [[_rounded(s) for s in row] for row in shares],
        "zmin": 0,
        "zmax": 1,
        "customdata": hover,
        "text": [[str(c) if c else "" for c in row] for row in counts],
        "hovertemplate": "%{customdata}<extra></extra>",
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }
    if n <= 15:
        heat["texttemplate"] = "%{text}"
    x = _axis("taken for", **ticks)
    y = _axis("is", **ticks) | {"autorange": "reversed"}
    return _figure([heat], x, y, height=min(220 + 34 * n, 860))


def strip(n_layers: int, included: int, frozen: int, blocks: Sequence[int] = ()) -> str:
    """Draw the layers of the network that came out as SVG: frozen, trained, left out.

    Args:
        n_layers: Of the whole network, at least 1.
        included: The first layers that were kept, at most `n_layers`.
        frozen: The first of them that were frozen, at most `included`.
        blocks: Layers of each block, if they are known; they are set apart.

    Returns:
        An ``svg`` element; its cells have the classes ``frozen``, ``trained`` and ``left-out``.
    """
    ends = set(itertools.accumulate(blocks)) if sum(blocks) == n_layers else set()
    cells, x = [], 0.0
    for layer in range(1, n_layers + 1):
        kind = "frozen" if layer <= frozen else "trained" if layer <= included else "left-out"
        cells.append(
            f'<rect class="{kind}" x="{x:g}" y="1" width="8" height="26" rx="1.5">'
            f"<title>layer {layer}: {kind.replace('-', ' ')}</title></rect>"
        )
        x += 18 if layer in ends else 10
    words = (
        f"{n_layers} layers: the first {frozen} frozen, {included - frozen} trained, "
        f"{n_layers - included} left out"
    )
    return (
        f'<svg class="strip" role="img" aria-label="{words}" viewBox="-1 0 {x:g} 28" '
        f'preserveAspectRatio="none">{"".join(cells)}</svg>'
    )
