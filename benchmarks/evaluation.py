"""How long a list of fits takes: gatl beside a usual script and beside bare loops.

    python benchmarks/evaluation.py root=PHOTOS

PHOTOS holds a folder of images for each class, of which some are copied to ``output``.
The same chromosomes, spread over the space, are fitted by

- ``peer``: Optuna, Lightning, `ImageFolder` and `DataLoader`, see `peer`;
- ``bare``: a bare PyTorch loop over tensors in memory, no cache;
- ``bare, cached``: a bare loop over what the frozen prefixes give, computed once for each;
- ``gatl, 1 worker``, with as many threads as there are cores, as the three above;
- ``gatl``: all workers, a thread each; and both once more in ``bf16``.

Each starts in a process of its own with one short fit, which is not timed; decoding is.
Prints the times, as ratios to the peer of the same repeat too, and the losses; writes
them to ``results=FILE``, by default ``benchmarks/results/evaluation.json``.

Options and their defaults: ``chromosomes=8 images=1000 val=250 epochs=3 repeats=3``,
``output=outputs/evaluation``, ``only=`` for some of the above, separated by semicolons.
Every other word is a Hydra override.
"""

import functools
import io
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import peer
import torch
from common import RESULTS, decoded, evaluated, options, origin, over_repeats, table, whole
from peer import Genes
from rich.console import Console
from scipy.stats import qmc
from torch import Tensor

from gatl.chromosome import Gene, SearchSpace, Value
from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.cost import expected_costs
from gatl.data.images import PreparedData, PreparedSplit
from gatl.errors import UserError
from gatl.evaluation import EVAL_BATCH_SIZE, Fit, build_data, fit_seed
from gatl.features import CHUNK
from gatl.files import write_json
from gatl.session import opened
from gatl.streams import Purpose

DEFAULTS = {
    **{"root": "", "chromosomes": "8", "images": "1000", "val": "250"},
    **{"epochs": "3", "repeats": "3", "only": "", "output": "outputs/evaluation"},
    "results": str(RESULTS / "evaluation.json"),
}
CORES = os.cpu_count() or 1
WARM_UP: Genes = {
    **{"included_layers": 1, "frozen_layers": 0},
    **{"learning_rate": 1e-3, "dropout": 0.5},
}


class Measured(NamedTuple):
    """One way through the list."""

    seconds: float
    losses: list[float | None]  # None: diverged


def main() -> None:
    """Measure; print and save."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    if not given["root"]:
        raise UserError("Give a folder that holds a folder of images for each class: root=PATH")
    n, n_train, n_val, repeats = (
        whole(name, given[name]) for name in ("chromosomes", "images", "val", "repeats")
    )
    output = Path(given["output"]).absolute()
    names = given["only"].split(";") if given["only"] else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"only={unknown[0]} is none of {'; '.join(VARIANTS)}.")
    peer.subset(given["root"], output / "photos", n_train, n_val)
    config = checked(
        compose(
            [
                *("data=folder", f"data.root='{output / 'photos'}'", "data.image_size=64"),
                *("model=se_densenet121_k12", "model.weights=bundled", "pruner=none"),
                *("data.batch_size=32", f"trainer.max_epochs={whole('epochs', given['epochs'])}"),
                *extra,
            ]
        )
    )
    chromosomes = spread(config, n)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, name, config, chromosomes, output, repeat).result()
            measured[name].append(found)
            print(f"repeat {repeat + 1}: {name} {found.seconds:.1f} s", flush=True)
        result = {**origin(), **summary(chromosomes, measured)}
        write_json(Path(given["results"]), result)
    print(f"\n{markdown(result)}")


def spread(config: Config, n: int) -> list[Genes]:
    """Return the initial chromosomes, then a Sobol design of the space, so many in all."""
    return [*map(dict, config.initial), *sobol(config.space, n)][:n]


def sobol(space: SearchSpace, n: int) -> list[Genes]:
    """Return a scrambled Sobol design (Sobol' 1967) of at least so many chromosomes, repaired."""
    m = math.ceil(math.log2(max(1, n)))  # a power of two is what keeps the design balanced
    points = qmc.Sobol(len(space.genes), rng=0).random_base2(m)
    return [
        space.to_dict(
            space.repair([_at(gene, u) for gene, u in zip(space.genes, point, strict=True)])
        )
        for point in points
    ]


def _at(gene: Gene, u: float) -> Value:
    """Return the value of a gene at u in [0, 1); every integer owns as much as any other."""
    if gene.log:
        return float(gene.low * (gene.high / gene.low) ** u)
    return float(
        gene.low + (gene.high - gene.low + (gene.kind is int)) * u - 0.5 * (gene.kind is int)
    )


def measure(
    name: str, config: Config, chromosomes: Sequence[Genes], folder: Path, seed: int
) -> Measured:
    """Fit the list in one way, in this process."""
    peer.quiet()
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    return VARIANTS[name](replace(config, seed=seed), chromosomes, folder / "run")


def by_peer(config: Config, chromosomes: Sequence[Genes], folder: Path) -> Measured:
    """Fit with Optuna, Lightning, ImageFolder and DataLoader."""
    study = optuna.create_study(direction="minimize")
    peer.suggest_all(study, [WARM_UP, *chromosomes])
    objective = peer.Objective(config, folder)
    study.optimize(objective, 1)
    started = time.perf_counter()
    study.optimize(objective, len(chromosomes))
    return Measured(time.perf_counter() - started, [t.value for t in study.trials[1:]])


def by_bare_loop(
    config: Config, chromosomes: Sequence[Genes], folder: Path, *, cached: bool
) -> Measured:
    """Fit in a bare loop, with or without a cache of what frozen prefixes give."""
    started = time.perf_counter()
    data = decoded(config, folder)
    splits = [_tensors(config, data, split) for split in (data.train, data.val)]
    decoding = time.perf_counter() - started
    boundaries: dict[tuple[int, bool], list[tuple[Tensor, Tensor]]] = {}

    def fit(index: int, genes: Genes) -> float | None:
        torch.manual_seed(index + 1000 * config.seed)
        network = peer.build_network(config, genes, len(data.classes))
        network.fit_neck_statistics(splits[0][0].split(EVAL_BATCH_SIZE))  # of a linear probe
        fitted = splits
        behind_prefix = cached and network.n_frozen > 0
        if behind_prefix:
            network.to(memory_format=torch.channels_last)
            key = network.n_frozen, network.n_frozen == genes["included_layers"]
            if key not in boundaries:
                network.eval()
                with torch.no_grad():
                    boundaries[key] = [
                        (torch.cat([network.prefix(x) for x in images.split(CHUNK)]), labels)
                        for images, labels in splits
                    ]
            fitted = boundaries[key]
        loss = peer.bare_fit(config, network, genes, *fitted, behind_prefix=behind_prefix)
        return loss if math.isfinite(loss) else None

    fit(0, WARM_UP)
    started = time.perf_counter()
    losses = [fit(index, genes) for index, genes in enumerate(chromosomes)]
    return Measured(decoding + time.perf_counter() - started, losses)


def by_gatl(
    config: Config, chromosomes: Sequence[Genes], folder: Path, **settings: Any
) -> Measured:
    """Fit with gatl's evaluator, decoding included."""
    evaluator = {key: settings[key] for key in ("workers", "threads")}
    config = replace(
        config,
        evaluator=replace(config.evaluator, **evaluator),
        trainer=replace(config.trainer, precision=settings["precision"]),
    )

    def fit(genes: Genes, name: str) -> Fit:
        seed = fit_seed(config.seed, Purpose.FIT, genes)
        return Fit(genes, config.trainer.max_epochs, seed, folder / name)

    started = time.perf_counter()
    with opened(config, folder, Console(file=io.StringIO())) as session:
        decoding = time.perf_counter() - started
        warm_up = [fit(WARM_UP, f"warm-up{i}") for i in range(session.evaluator.n_workers)]
        list(evaluated(session.evaluator, warm_up))
        started = time.perf_counter()
        costs = expected_costs(chromosomes, [])  # the driver's order, of a first generation
        order = sorted(range(len(chromosomes)), key=lambda i: -costs[i])
        fits = [fit(chromosomes[i], str(i)) for i in order]
        ended = {order[i]: outcome for i, outcome in evaluated(session.evaluator, fits)}
        seconds = time.perf_counter() - started
    if failed := [o.error for o in ended.values() if o.error and not o.diverged]:
        raise UserError(f"A fit failed: {failed[0]}")
    return Measured(decoding + seconds, [ended[i].val_loss for i in range(len(chromosomes))])


Variant = Callable[[Config, Sequence[Genes], Path], Measured]
ONE = {"workers": "1", "threads": CORES}
ALL = {"workers": "auto", "threads": 1}
VARIANTS: dict[str, Variant] = {
    "peer": by_peer,
    "bare": functools.partial(by_bare_loop, cached=False),
    "bare, cached": functools.partial(by_bare_loop, cached=True),
    "gatl, 1 worker": functools.partial(by_gatl, **ONE, precision="32"),
    "gatl": functools.partial(by_gatl, **ALL, precision="32"),
    "gatl, 1 worker, bf16": functools.partial(by_gatl, **ONE, precision="bf16-mixed"),
    "gatl, bf16": functools.partial(by_gatl, **ALL, precision="bf16-mixed"),
}


def _tensors(config: Config, data: PreparedData, split: PreparedSplit) -> tuple[Tensor, Tensor]:
    """Return a split as normalised images (N, 3, S, S), NCHW in memory, and labels (N,)."""
    labels = torch.from_numpy(split.labels)
    pixels = split.images.batch(torch.arange(len(split)).numpy())
    return build_data(config, data, 0).normalise(pixels).contiguous(), labels


def summary(chromosomes: Sequence[Genes], measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Return times, ratios to the first way of the same repeat, and losses."""
    first = next(iter(measured))
    return {
        "chromosomes": list(chromosomes),
        "first": first,
        "seconds": {
            name: over_repeats([m.seconds for m in found]) for name, found in measured.items()
        },
        "times_as_fast": {
            name: over_repeats(
                [a.seconds / b.seconds for a, b in zip(measured[first], found, strict=True)]
            )
            for name, found in measured.items()
        },
        "losses": {name: [m.losses for m in found] for name, found in measured.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """Return both tables."""
    names = list(result["seconds"])
    times = table(
        ("way", "seconds, median", "least to most", f"times as fast as {result['first']}"),
        *(
            (
                *(name, f"{(s := result['seconds'][name])['median']:.1f}"),
                f"{s['min']:.1f} to {s['max']:.1f}",
                f"{(r := result['times_as_fast'][name])['median']:.2f} "
                f"({r['min']:.2f} to {r['max']:.2f})",
            )
            for name in names
        ),
    )
    losses = table(
        ("L", "F", "lr", "dropout", *names),
        *(
            (
                *(str(genes[name]) for name in ("included_layers", "frozen_layers")),
                *(f"{genes[name]:.1e}" for name in ("learning_rate",)),
                f"{genes['dropout']:.2f}",
                *(_spread([repeat[i] for repeat in result["losses"][name]]) for name in names),
            )
            for i, genes in enumerate(result["chromosomes"])
        ),
    )
    return f"{times}\n\nval_loss, mean ± sd over repeats:\n\n{losses}"


def _spread(losses: Sequence[float | None]) -> str:
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < len(losses):
        return "diverged"
    sd = f" ± {statistics.stdev(finite):.3f}" if len(finite) > 1 else ""
    return f"{statistics.fmean(finite):.3f}{sd}"


if __name__ == "__main__":
    with one_line_errors():
        main()
