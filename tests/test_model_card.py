"""The model card: what it says, read by a Markdown parser."""

import copy
import functools
import re

import pytest
from markdown_it import MarkdownIt

from gatl.cli import compose
from gatl.config import checked
from gatl.model_card import describe

NAMES = (
    "rose",
    "<script>alert(1)</script>",
    "a|b *bold* [link](http://x.y) `code` # h ![i](j) ~~s~~ &amp; \\| _e_ $x$",
    "two\nlines\x1b[2J",
)
RESULT = {
    "best": {
        "genes": {
            "included_layers": 3,
            "frozen_layers": 1,
            "learning_rate": 0.002,
            "dropout": 0.25,
        },
        "val_loss": 0.5,
        "trial": 7,
    },
    "test": {
        "loss": 0.612345,
        "accuracy": 0.8,
        "accuracy_ci95": [0.7123, 0.8689],
        "f1_macro": 0.7891,
        "n": 100,
        "per_class": [
            {"class": name, "precision": 0.5, "recall": 0.25 * i, "f1": 0.1 * i, "n": 10 * (i + 1)}
            for i, name in enumerate(NAMES)
        ],
    },
    "tests": 1,
    "final": {
        "epochs": 12,
        "best_epoch": 9,
        "trainable_params": 12345,
        "total_params": 67890,
    },
    "reevaluation": [{}, {}],
    "trials": 60,
    "evaluations": 51,
    "seconds": 7300.0,
    "seed": 3,
    "classes": list(NAMES),
    "images": {
        "train": [70, 71, 72, 73],
        "val": [15, 16, 17, 18],
        "test": [10, 20, 30, 40],
        "left_out": 2,
    },
    "weights": {"from": "/home/somebody/weights_v2.safetensors"},
    "precision": "32-true",
    "versions": {"python": "3.11.4", "gatl": "0.1.0", "torch": "2.7.0+cu126"},
    "hardware": {"cores": 2, "gpus": []},
    "finished": "2026-01-02T03:04:05+00:00",
}


@functools.cache
def configured(*overrides):
    return checked(compose(["data=digits", "model=lenet5", *overrides]))


def card(result=RESULT, *overrides):
    return describe(result, configured(*overrides))


class Read:
    """What a reader sees of a card: headings, paragraphs, list items and tables, as text."""

    def __init__(self, text: str) -> None:
        parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
        self.kinds: set[str] = set()
        self.blocks: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        opened: list[str] = []
        for token in parser.parse(text):
            self.kinds.add(token.type)
            if token.nesting == 1:
                opened.append(token.tag)
                if token.tag == "table":
                    self.tables.append([])
                elif token.tag == "tr":
                    self.tables[-1].append([])
            elif token.nesting == -1:
                opened.pop()
            elif token.type == "inline":
                self.kinds |= {child.type for child in token.children or ()}
                seen = "".join(
                    child.content or " " * (child.type == "softbreak")
                    for child in token.children or ()
                )
                if opened[-1] in ("td", "th"):
                    self.tables[-1][-1].append(seen)
                else:
                    self.blocks.setdefault(opened[-1], []).append(seen)


@pytest.fixture
def read():
    return Read(card())


def test_names_are_text_whatever_they_hold(read):
    shown = [*NAMES[:3], r"two\nlines\x1b[2J"]
    data, _, test, _ = read.tables
    assert [row[0] for row in data] == ["class", *shown, "all"]
    assert [row[0] for row in test] == ["class", *shown]
    assert not read.kinds & {"html_inline", "html_block", "link_open", "image", "s_open", "em_open"}


def test_the_figures_stand_where_they_belong(read):
    data, genes, test, origin = read.tables
    assert data[0] == ["class", "training", "validation", "test"]
    assert data[1][1:] == ["70", "15", "10"]
    assert data[-1][1:] == ["286", "66", "100"]
    assert genes == [
        ["gene", "value", "searched"],
        ["included_layers", "3", "1 to 5"],
        ["frozen_layers", "1", "0 to 2"],
        ["learning_rate", "2.0e-03", "1.0e-06 to 0.10"],
        ["dropout", "0.25", "0.10 to 0.90"],
    ]
    assert test[2][1:] == ["0.500", "0.250", "0.100", "20"]
    assert dict(origin)["seed"] == "3"
    assert dict(origin)["versions"] == "python 3.11.4, gatl 0.1.0, torch 2.7.0+cu126"
    text = " ".join(read.blocks["p"])
    for part in (
        "Of 100 images that nothing before has seen, 80.0% are classified right "
        "(95 % interval 71.2% to 86.9%)",
        "it says which of 4 classes",
        "2 images could not be decoded",
        "A genetic algorithm chose how to fine-tune lenet5 from the weights weights_v2.safetensors",
        "60 trials of up to 3 epochs, 51 of them fitted",
        "Of the best 2 chromosomes, evaluated again with 3 fresh seeds each, that of trial 7 had",
        "It was trained for 12 epochs; epoch 9 is kept. All of this took 2.0 h",
        "12,345 were trained",
        "the shorter side scaled to 32 pixels (bicubic",
        "Macro F1 0.789, cross-entropy 0.6123",
    ):
        assert part in text, part


def test_it_has_every_part(read):
    assert read.blocks["h1"] == ["lenet5, fine-tuned on digits"]
    assert read.blocks["h2"] == [
        *("Use", "Data", "How it was found", "Test", "Limits", "Origin", "Licence")
    ]
    text = card()
    for part in ("gatl.predict run=RUN", "gatl.export run=RUN", "from gatl import load"):
        assert part in text


def test_it_names_no_place_of_this_machine():
    assert not re.search(r"/home|somebody", card())


def test_limits_follow_the_figures():
    assert "2 of 4 classes have fewer than 30 test images" in " ".join(Read(card()).blocks["p"])
    many, again = copy.deepcopy(RESULT), copy.deepcopy(RESULT)
    for row in many["test"]["per_class"]:
        row["n"] = 30
    assert "fewer than" not in card(many)
    assert "nothing before has seen" in card(many)
    again["tests"] = 2
    assert "This is final model 2 of its run" in card(again)
    assert "nothing before has seen" not in card(again)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("annealing", "Simulated annealing chose"),
        ("regularized_evolution", "Regularized evolution chose"),
        ("tpe", "TPESampler chose"),
    ],
)
def test_it_names_the_strategy(search, words):
    assert words in card(RESULT, f"search={search}")


def test_a_fixed_gene_was_not_searched():
    fixed = card(RESULT, "space.dropout.value=0.25")
    assert "| dropout | 0.25 | fixed |" in fixed
