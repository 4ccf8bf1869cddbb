"""``MODEL_CARD.md``: what the final model of a run is, in words for whoever gets it.

After "Model Cards for Model Reporting", Mitchell et al. 2019, https://arxiv.org/abs/1810.03993.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gatl.config import Config
from gatl.errors import printable
from gatl.progress import format_count, format_duration, format_value

MODEL_CARD = "MODEL_CARD.md"
FEW = 30
"""Test images of a class below which its figures say little."""

_STRATEGIES = {
    "gatl.strategies.genetic.of_mode": "A genetic algorithm",
    "gatl.strategies.annealing.Annealing": "Simulated annealing",
    "gatl.strategies.regularized_evolution.RegularizedEvolution": "Regularized evolution",
}
_MARKUP = re.compile(r"[\\`*_\[\]<>#|~&$:@]")  # within a line; a name never begins one

_USE = """\
`RUN` is the folder of this file; gatl must be installed.

```sh
python -m gatl.predict run=RUN images=PHOTOS output=predictions.csv
python -m gatl.export run=RUN format=onnx      # model.onnx, for programs without Python
```

```python
from gatl import load

model = load("RUN")
label, probability = model("photo.jpg")  # or an image of Pillow's, or a tensor (3, H, W)
```"""


def describe(result: Mapping[str, Any], config: Config) -> str:
    """Write the card of a final model as Markdown; names in it are text, whatever they hold.

    Args:
        result: What ``result.json`` holds.
        config: The run's configuration.
    """
    model, data, classes = _text(config.model.name), _text(config.data.name), result["classes"]
    sections = {
        "Use": [_USE, _preprocessing(config)],
        "Data": _data(result, data),
        "How it was found": _search(result, config),
        "Test": _test(result),
        "Limits": ["\n".join(f"- {line}" for line in _limits(result))],
        "Origin": [_origin(result)],
        "Licence": [
            "None is stated: it is for whoever made this model to choose one that the licences of "
            "the images and of the pretrained weights allow."
        ],
    }
    head = [
        f"# {model}, fine-tuned on {data}",
        f"An image classifier: it says which of {len(classes)} classes an image shows. "
        f"{_accuracy(result)} It was found and trained by gatl {result['versions']['gatl']}.",
    ]
    parts = [*head, *(p for name, parts in sections.items() for p in (f"## {name}", *parts))]
    return "\n\n".join(parts) + "\n"


def _accuracy(result: Mapping[str, Any]) -> str:
    test = result["test"]
    low, high = test["accuracy_ci95"]
    unseen = "nothing before has seen" if result["tests"] == 1 else "no training has seen"
    return (
        f"Of {format_count(test['n'], 'image')} that {unseen}, {test['accuracy']:.1%} are "
        f"classified right (95 % interval {low:.1%} to {high:.1%})."
    )


def _preprocessing(config: Config) -> str:
    size, filter_ = config.data.image_size, config.model.interpolation
    return (
        f"Both take images of any size and prepare them as those of the training: upright, RGB, "
        f"the shorter side scaled to {size} pixels ({filter_}, antialiased), the longer one "
        "cropped about its centre. The ONNX file has all behind that inside."
    )


def _data(result: Mapping[str, Any], name: str) -> list[str]:
    images = result["images"]
    counts = [images[split] for split in ("train", "val", "test")]
    rows = zip(map(_text, result["classes"]), *counts, strict=True)
    left_out = images["left_out"]
    bad = f" {format_count(left_out, 'image')} could not be decoded." if left_out else ""
    return [
        f"Data set: {name}. Training fitted the weights, validation chose among chromosomes "
        f"and epochs, and the test split measured the result.{bad}",
        _table(
            ("class", "training", "validation", "test"),
            [*rows, ("**all**", *map(sum, counts))],
        ),
    ]


def _search(result: Mapping[str, Any], config: Config) -> list[str]:
    sampler = config.search.get("sampler")  # Optuna's, within gatl's own strategy for them
    target = (sampler if isinstance(sampler, Mapping) else config.search).get("_target_", "")
    strategy = _STRATEGIES.get(target) or _text(target.rpartition(".")[2])
    final, weights = result["final"], result["weights"]["from"]
    start = "random weights" if weights == "none" else f"the weights {_text(Path(weights).name)}"
    ranges = {gene.name: gene for gene in config.space.genes}
    rows = [
        (_text(name), format_value(value), _range(ranges[name].low, ranges[name].high))
        for name, value in result["best"]["genes"].items()
    ]
    return [
        f"{strategy} chose how to fine-tune {_text(config.model.name)} from {start}: "
        f"{format_count(result['trials'], 'trial')} of up to "
        f"{format_count(config.trainer.max_epochs, 'epoch')}, "
        f"{result['evaluations']} of them fitted. Of the best "
        f"{format_count(len(result['reevaluation']), 'chromosome')}, evaluated again with "
        f"{format_count(config.final.seeds, 'fresh seed')} each, that of trial "
        f"{result['best']['trial']} had the lowest mean validation loss. It was trained for "
        f"{format_count(final['epochs'], 'epoch')}; epoch {final['best_epoch']} is kept. All of "
        f"this took {format_duration(result['seconds'])}.",
        _table(("gene", "value", "searched"), rows),
        f"The network has {final['total_params']:,} parameters, of which "
        f"{final['trainable_params']:,} were trained, and {config.model.n_layers} layers when it "
        "is whole.",
    ]


def _range(low: float, high: float) -> str:
    return "fixed" if low == high else f"{format_value(low)} to {format_value(high)}"


def _test(result: Mapping[str, Any]) -> list[str]:
    test = result["test"]
    rows = [
        (
            _text(row["class"]),
            *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
            row["n"],
        )
        for row in test["per_class"]
    ]
    return [
        f"{_accuracy(result)} The interval is Wilson's. Macro F1 {test['f1_macro']:.3f}, "
        f"cross-entropy {test['loss']:.4f}, computed in {result['precision']} precision.",
        _table(("class", "precision", "recall", "F1", "images"), rows),
    ]


def _limits(result: Mapping[str, Any]) -> list[str]:
    """Say what the figures do not tell."""
    lines = [
        "The test images come from the same collection as the others. Images of other cameras, "
        "places or times were not tested, and pictures in it that are nearly alike may have made "
        "the test easier.",
        "It always names one of its classes, also for an image that shows none of them, or "
        "several. Such images were not tested.",
        "Its probabilities are the softmax's; whether they are calibrated was not tested.",
        "Noise, other resolutions and images made to deceive were not tested, nor whether it is as "
        "good for all people or groups that images may show.",
    ]
    few = sum(row["n"] < FEW for row in result["test"]["per_class"])
    if few:
        n = len(result["classes"])
        lines.append(
            f"{few} of {n} classes have fewer than {FEW} test images: their figures say little."
        )
    if result["tests"] > 1:
        lines.append(
            f"This is final model {result['tests']} of its run: if the best was picked by these "
            "figures, they are optimistic."
        )
    return lines


def _origin(result: Mapping[str, Any]) -> str:
    hardware = result["hardware"]
    gpus = ", ".join(map(_text, hardware["gpus"])) or "no GPU"
    versions = (f"{_text(name)} {_text(number)}" for name, number in result["versions"].items())
    return _table(
        ("", ""),
        [
            ("seed", result["seed"]),
            ("finished", result["finished"]),
            ("versions", ", ".join(versions)),
            ("hardware", f"{format_count(hardware['cores'], 'core')}, {gpus}"),
        ],
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table in Markdown; its cells are Markdown already."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _text(name: object) -> str:
    """Write a name so that Markdown shows it as it is, in one line."""
    return _MARKUP.sub(r"\\\g<0>", printable(name))
