"""What pretrained weights are worth, and how Squeeze-and-Excitation is best added to them.

    python benchmarks/transfer.py root=PHOTOS

PHOTOS holds a folder of images for each class. One chromosome (all layers, nothing
frozen, learning rate 1e-3, dropout 0.2) is fitted from several starts, with the same
epochs and seeds for each. A finished fit is kept in ``OUTPUT/fits.json``, from where the
same command goes on. Prints tables; writes them with every fit to ``results=FILE``, by
default ``benchmarks/results/transfer.json``.

Options and their defaults: ``epochs=5 seeds=3 workers=2 weights=bundled``,
``only=VARIANT,VARIANT`` (all), ``output=outputs/transfer``. Every other word is a Hydra
override for all variants, such as ``data.batch_size=64``.
"""

import hashlib
import json
import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from common import (
    RESULTS,
    commit,
    decoded,
    evaluated,
    options,
    origin,
    over_seeds,
    table,
    whole,
    written,
)

from gatl.cli import compose, one_line_errors
from gatl.config import Config, checked
from gatl.data.images import PreparedData
from gatl.errors import UserError
from gatl.evaluation import Fit, LocalEvaluator, fit_seed, silence
from gatl.files import write_json
from gatl.models.weight_files import CARD_KEY, read_weights
from gatl.models.weights import Weights
from gatl.outcome import Outcome
from gatl.record import held
from gatl.streams import Purpose

DEFAULTS = {
    **{"root": "", "epochs": "5", "seeds": "3", "workers": "2", "weights": "bundled", "only": ""},
    "output": "outputs/transfer",
    "results": str(RESULTS / "transfer.json"),
}


class Variant(NamedTuple):
    """Where a fit starts: ``model.weights``, ``model.se`` and ``model.dropout_at``."""

    weights: str
    placement: str = "block"
    init: str = "identity"
    dropout_at: str = "head"


VARIANTS = {  # "new SE": the weights without their SE
    "none": Variant("none"),
    "bundled": Variant("all"),
    "block_identity": Variant("new SE"),
    "block_kaiming": Variant("new SE", init="kaiming"),
    "layer_identity": Variant("new SE", "layer"),
    "layer_kaiming": Variant("new SE", "layer", "kaiming"),
    "without_se": Variant("new SE", "none"),
    "dropout_layers": Variant("new SE", dropout_at="layers"),
}
TABLES = {  # by title: the reference, and what is compared with it
    "Pretrained weights": ("none", "bundled"),
    "SE in pretrained weights, which have SE of their own in `bundled` only": (
        *("block_identity", "block_kaiming", "layer_identity", "layer_kaiming", "without_se"),
        "bundled",
    ),
    "Where to drop": ("block_identity", "dropout_layers"),
}
FIGURES = {"val_loss": (".3f", 1, ""), "val_accuracy": (".1f", 100, " %")}  # how they are written
GENES = {"frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.2}  # and all layers
IDENTITY = ("seed", "epochs", "genes", "overrides", "weights_sha256")
"""What makes two fits the same, which is not done twice."""


def main() -> None:
    """Do the fits that are missing; print and save the figures."""
    given, extra = options(sys.argv[1:], DEFAULTS)
    output, kept = Path(given["output"]), Path(given["output"], "fits.json")
    output.mkdir(parents=True, exist_ok=True)
    with held(output), tempfile.TemporaryDirectory() as images:
        configs, jobs = plan(given, extra)
        keys = [json.dumps([job[name] for name in IDENTITY]) for job in jobs]
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        print(f"{len(jobs)} fits, {len(known.keys() & set(keys))} of which are done", flush=True)
        data, source = decoded(next(iter(configs.values())), Path(images)), commit()
        for name, config in configs.items():
            missing = {
                key: job
                for key, job in zip(keys, jobs, strict=True)
                if job["variant"] == name and key not in known
            }
            for key, outcome in fit(config, missing, data, output):
                known[key] = {**missing[key], **outcome.to_json(), "commit": source}
                print(in_words(known[key]), flush=True)
                # A failure that may pass is tried again the next time.
                lasting = {k: f for k, f in known.items() if f["error"] is None or f["diverged"]}
                write_json(kept, lasting)
    about = {name: len(getattr(data, name)) for name in ("classes", "train", "val")}
    tables = compare(fits := [known[key] for key in keys])
    write_json(Path(given["results"]), {**origin(), "data": about, "tables": tables, "fits": fits})
    print(markdown(tables))


def plan(given: dict[str, str], extra: list[str]) -> tuple[dict[str, Config], list[dict[str, Any]]]:
    """Return the configuration of each variant, and all fits as they are recorded."""
    if not given["root"]:
        raise UserError("Give a folder that holds a folder of images for each class: root=PATH")
    names = given["only"].split(",") if given["only"] else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"only={unknown[0]} is no variant; there are {', '.join(VARIANTS)}.")
    new_se = Path(given["output"], "new_se.safetensors")
    files = {"none": "none", "all": given["weights"], "new SE": str(new_se)}
    epochs, seeds = (whole(name, given[name]) for name in ("epochs", "seeds"))
    configs, jobs = {}, []
    for name in names:
        variant = VARIANTS[name]
        overrides = [
            *("data=folder", "model=se_densenet121_k12", *extra),
            f"model.se.placement={variant.placement}",
            f"model.se.init={variant.init}",
            f"model.dropout_at={variant.dropout_at}",
        ]
        paths = {"data.root": given["root"], "model.weights": files[variant.weights]}
        quoted = [f"{key}='" + path.replace("'", r"\'") + "'" for key, path in paths.items()]
        workers = f"evaluator.workers={given['workers']}"
        config = configs[name] = checked(compose([*overrides, *quoted, workers]))
        if variant.weights == "new SE":
            remove_se(read_weights(given["weights"], config.model.sources), new_se)
        weights = read_weights(config.model.weights, config.model.sources)
        content = safetensors.torch.save({**weights.tensors}) if weights else b""
        job = {
            "variant": name,
            "epochs": epochs,
            "genes": {"included_layers": config.model.n_layers, **GENES},
            "overrides": overrides + [f"{key}={Path(path).name}" for key, path in paths.items()],
            "weights_sha256": hashlib.sha256(content).hexdigest() if weights else None,
        }
        jobs += [{**job, "seed": seed} for seed in range(seeds)]
    return configs, jobs


def remove_se(weights: Weights | None, path: Path) -> None:
    """Write pretrained weights to a file without their SE."""
    if weights is None:
        raise UserError("weights=none has no SE to be removed: give only=none with it.")
    kept = {name: tensor for name, tensor in weights.tensors.items() if ".se." not in name}
    card = {key: value for key, value in weights.card.items() if key != "se"}
    new = path.with_suffix(".new")  # the old file may be mapped
    safetensors.torch.save_file(kept, new, {CARD_KEY: json.dumps(card)})
    new.replace(path)


def fit(
    config: Config, jobs: dict[str, dict[str, Any]], data: PreparedData, output: Path
) -> Iterator[tuple[str, Outcome]]:
    """Do fits of one configuration, several at once; yield the key of each that has ended."""
    stop = multiprocessing.get_context("spawn").Event()
    evaluator = LocalEvaluator(config, data, stop)
    keys = list(jobs)
    fits = [
        Fit(
            job["genes"],
            job["epochs"],
            fit_seed(job["seed"], Purpose.FIT, job["genes"]),
            output / "fits" / f"{job['variant']}_{job['seed']}",
        )
        for job in jobs.values()
    ]
    try:
        for index, outcome in evaluated(evaluator, fits):
            yield keys[index], outcome
    finally:
        stop.set()
        evaluator.close()


def in_words(done: dict[str, Any]) -> str:
    """Say how a fit ended."""
    figures = (f"{name} {written(over_seeds([done[name]]), *FIGURES[name])}" for name in FIGURES)
    told = ", ".join(figures) if done["error"] is None else done["error"]
    return f"{done['variant']}, seed {done['seed']}: {told}, {done['duration_s']:.0f} s"


def compare(fits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tables: each variant's figures, and its differences to the reference, by seed."""
    tables = []
    for title, names in TABLES.items():
        rows: dict[str, dict[str, Any]] = {name: {} for name in names}
        for figure in FIGURES:
            by_seed = {
                name: {
                    f["seed"]: f[figure] for f in fits if f["variant"] == name and not f["error"]
                }
                for name in names
            }
            base = by_seed[names[0]]
            for name, own in by_seed.items():
                paired = [own[seed] - base[seed] for seed in own if seed in base]
                rows[name][figure] = over_seeds(list(own.values()))
                rows[name][f"{figure}_difference"] = over_seeds(paired)
        done = {name: row for name, row in rows.items() if any(f["variant"] == name for f in fits)}
        tables.append({"title": title, "reference": names[0], "variants": done})
    return [found for found in tables if found["variants"]]


def markdown(tables: Sequence[dict[str, Any]]) -> str:
    """Write the tables for people."""
    parts = []
    for found in tables:
        reference = found["reference"]
        rows = [["variant", *Variant._fields, *FIGURES, f"val_loss less that of {reference}"]]
        for name, row in found["variants"].items():
            figures = [written(row[figure], *form) for figure, form in FIGURES.items()]
            difference = "" if name == reference else written(row["val_loss_difference"], "+.3f")
            rows.append([name, *VARIANTS[name], *figures, difference])
        parts += ["", f"{found['title']}: mean ± sd over the seeds", "", table(*rows)]
    return "\n".join(parts)


if __name__ == "__main__":
    silence()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. The same command goes on.\n")
        sys.exit(130)
