"""Pretraining: what is written, what is measured, what survives a kill, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from rich.console import Console
from safetensors.torch import load_file

import gatl.pretrain
from gatl.cli import compose
from gatl.data import digits
from gatl.data.decode import to_rgb
from gatl.data.source import Source
from gatl.data.splits import complete_splits
from gatl.errors import UserError
from gatl.models.weight_files import read_safetensors
from gatl.models.weights import load
from gatl.pretrain import (
    PretrainConfig,
    Pretraining,
    backbone,
    checked,
    choose_precision,
    learning_rate_factor,
    pretraining_splits,
    run,
)

TINY = (
    "data=digits",
    "data.image_size=32",
    "data.batch_size=64",
    "model.n_layers=4",
    "model.n_freezable=2",
    "model.network.block_config=[2,2]",
    "model.network.growth_rate=4",
    "model.network.init_features=8",
    "trainer.precision=32",
    "recipe.test_every=2",
)


def config(output: Path | str, *overrides: str) -> PretrainConfig:
    return checked(compose([*TINY, f"output={output}", *overrides], "pretrain"))


def pretrain(output: Path, *overrides: str) -> tuple[Path, str]:
    """Return the weights file and what was printed."""
    printed = StringIO()
    path = run(config(output, *overrides), Console(file=printed, width=80), "the command")
    return path, printed.getvalue()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two epochs of a tiny network on digits."""
    return pretrain(tmp_path_factory.mktemp("whole"), "trainer.max_epochs=2")


def card_of(path: Path) -> dict[str, Any]:
    return dict(read_safetensors(path).card)


def test_the_folder_holds_weights_card_curve_and_checkpoint(pretrained):
    path, printed = pretrained
    names = {"last.ckpt", "metrics.csv", "se_densenet121_k12.md", "se_densenet121_k12.safetensors"}
    assert {p.name for p in path.parent.iterdir()} == names
    assert path.name == "se_densenet121_k12.safetensors"
    assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()
    rows = (path.parent / "metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,train_loss,train_accuracy,test_loss,test_accuracy,seconds"
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2"]
    assert rows[1].split(",")[3] == ""  # only every second epoch is tested
    assert rows[2].split(",")[3] != ""
    assert re.search(r"^epoch 1/2 · loss [\d.]+ · accuracy [\d.]+% · \d+ images/s", printed, re.M)
    assert re.search(r"^epoch 2/2 .* · test accuracy [\d.]+% · \d+ images/s$", printed, re.M)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_card_says_what_the_weights_are_and_how_they_were_made(pretrained):
    path, _ = pretrained
    card = card_of(path)
    assert card["model"] == "se_densenet121_k12"
    assert card["layers"] == 4
    assert card["se"] == {"placement": "block", "gate": "2*sigmoid"}
    assert card["data"] == {"name": "digits", "classes": 10, "images": 1797 - 269}
    assert card["test"]["images"] == 269
    assert card["epochs"] == 2
    assert card["bits"] == 16
    assert card["seed"] == 0
    assert card["command"] == "the command"
    assert card["preprocessing"]["image_size"] == 32
    assert card["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert card["recipe"]["learning_rate"] == 0.1
    assert {"python", "gatl", "torch"} < card["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", card["date"])
    json.dumps(card, allow_nan=False)
    readable = path.with_suffix(".md").read_text()
    assert f"{card['test']['accuracy']:.2%} of 269 images" in readable
    assert card["date"] in readable
    assert "None" not in readable


def test_the_file_is_the_backbone_in_16_bits(pretrained):
    path, _ = pretrained
    tensors = load_file(path)
    trained = torch.load(path.parent / "last.ckpt", weights_only=True)["state_dict"]
    expected = {
        name.removeprefix("network."): value
        for name, value in trained.items()
        if name.startswith("network.") and value.is_floating_point() and "classifier" not in name
    }
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, expected[name].half())
    own = sum(v.numel() for n, v in tensors.items() if not n.endswith(("_mean", "_var")))
    assert card_of(path)["parameters"] == own


def test_numbers_too_large_for_16_bits_keep_32():
    network = instantiate(config("x").model.network, 4, 10, 0.0, _convert_="all")
    network.stem.norm.running_var.fill_(1e5)
    tensors = backbone(network, 16)
    assert tensors["stem.norm.running_var"].dtype == torch.float32
    assert tensors["stem.norm.running_mean"].dtype == torch.float16
    assert {tensor.dtype for tensor in backbone(network, 32).values()} == {torch.float32}


def test_the_accuracy_is_that_of_the_file(pretrained):
    """Measure again with nothing of the measurement's own code but the network."""
    path, _ = pretrained
    checkpoint = torch.load(path.parent / "last.ckpt", weights_only=True)
    network = instantiate(config("x").model.network, 4, 10, 0.0, _convert_="all")
    report = load(network, read_safetensors(path))
    assert report.left_random == ("classifier.weight", "classifier.bias")
    for name in ("weight", "bias"):
        value = checkpoint["state_dict"][f"network.classifier.{name}"]
        getattr(network.classifier, name).data.copy_(value)
    test = complete_splits(digits.load(), 0).test
    pixels = np.stack([to_rgb(image, 32) for image in test.images]).transpose(0, 3, 1, 2) / 255
    mean, std = (
        np.array(x).reshape(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        logits = network.eval()(torch.tensor((pixels - mean) / std, dtype=torch.float32))
    right = int((logits.argmax(1).numpy() == test.labels).sum())
    expected = card_of(path)["test"]
    assert right / len(test) == expected["accuracy"]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(test.labels))
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_killed_pretraining_goes_on_bit_for_bit(pretrained, tmp_path):
    script = (
        "import os, signal, gatl.pretrain as p\n"
        "def kill(self, outputs, batch, index):\n"
        "    if self.current_epoch == 1 and index == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "p.Pretraining.on_train_batch_end = kill\n"
        "p.main()"
    )
    words = [*TINY, "trainer.max_epochs=2", f"output={tmp_path}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | threads,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "epoch 1/2" in done.stdout
    assert not (tmp_path / "se_densenet121_k12.safetensors").exists()
    path, printed = pretrain(tmp_path, "trainer.max_epochs=2")
    assert "Going on from" in printed.replace("\n", " ")
    assert "epoch 1/2" not in printed
    assert "epoch 2/2" in printed
    _assert_same(path, pretrained[0])
    assert not (tmp_path / ".images").exists()


def _assert_same(path: Path, other: Path) -> None:
    tensors, expected = load_file(path), load_file(other)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    curves = [
        [row.rpartition(",")[0] for row in (p.parent / "metrics.csv").read_text().splitlines()]
        for p in (path, other)
    ]
    assert curves[0] == curves[1]
    assert card_of(path)["test"] == card_of(other)["test"]


def test_a_finished_pretraining_is_only_measured_again(pretrained):
    path, _ = pretrained
    before, card = load_file(path), card_of(path)
    again, printed = pretrain(path.parent, "trainer.max_epochs=2")
    assert "images/s" not in printed
    assert again == path
    assert all(torch.equal(before[name], value) for name, value in load_file(path).items())
    assert card_of(path)["test"] == card["test"]
    assert card_of(path)["epochs"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_keeps_whole_epochs(monkeypatch, tmp_path, number):
    def ask(self: Pretraining, *args: object) -> None:
        if self.current_epoch == 1:
            signal.raise_signal(number)

    monkeypatch.setattr(Pretraining, "on_train_batch_start", ask)
    before = signal.getsignal(number)
    printed = StringIO()
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path, "trainer.max_epochs=3"), Console(file=printed), "")
    assert "1 of 3 epochs are kept" in printed.getvalue()
    assert signal.getsignal(number) == before
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "metrics.csv"}
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert [metrics["epoch"] for metrics in kept["epochs"]] == [1]


def test_a_terminal_gets_a_progress_bar(capsys, tmp_path):
    printed = StringIO()
    console = Console(file=printed, force_terminal=True)
    run(config(tmp_path, "trainer.max_epochs=1"), console, "")
    bar, _ = capsys.readouterr()
    assert re.search(r"Epoch 0: +100%.*loss=\d", bar)
    assert re.search(r"epoch 1/1 · loss", bar)  # written above the bar
    assert "Pretraining" in printed.getvalue()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.momentum=0"], r"recipe.momentum must be in \(0, 1\), but got 0"),
        (["recipe.learning_rate=0"], r"recipe.learning_rate must be in \(0, 10\]"),
        (["recipe.warmup=1"], r"recipe.warmup must be in \[0, 1\)"),
        (["recipe.test_every=0"], "recipe.test_every must be at least 1"),
        (["recipe.weight_decay=much"], "recipe.weight_decay"),
        (["recipe=3"], "recipe"),
        (["bits=8"], "bits must be 16 or 32, but got 8"),
        (["bits=half"], "bits must be a whole number"),
        (["seed=-1"], r"seed must be in \[0, 4294967296\)"),
        (["output=''"], "output must be a folder"),
        (["model.weights=imagenet"], "model.weights must be none, because"),
        (["data.class_weights=true"], "data.class_weights is no setting"),
        (["data.image_size=16"], "data.image_size must be at least 32"),
        (["data=folder"], "data.root is required"),
        (["data=nothing"], "data=nothing is no choice"),
        (["recipe.momemtum=0.9"], "recipe.momemtum is no setting"),
        (["trainer.precision=8"], "trainer.precision must be one of"),
    ],
)
def test_a_wrong_setting_is_one_line(overrides: Sequence[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        checked(compose(overrides, "pretrain"))
    assert "\n" not in str(error.value)


def test_a_typing_error_leaves_nothing_behind(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gatl.pretrain", "bits=8"])
    with pytest.raises(SystemExit) as ending:
        gatl.pretrain.main()
    assert ending.value.code == 1
    assert capsys.readouterr().err == "gatl: bits must be 16 or 32, but got 8.\n"
    assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_go_on(pretrained):
    folder = pretrained[0].parent
    with pytest.raises(UserError, match=r"with seed=0, not 5: give the same settings"):
        pretrain(folder, "trainer.max_epochs=2", "seed=5")
    with pytest.raises(UserError, match=r"with trainer.max_epochs=2, not 3"):
        pretrain(folder, "trainer.max_epochs=3")


def test_a_damaged_checkpoint(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is no checkpoint of a pretraining: remove it"):
        pretrain(tmp_path)


def test_divergence_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"diverged: the loss is nan in epoch 1; give a lower"):
        pretrain(tmp_path, "model.std=[1e-39,1,1]")  # makes pixels infinite


def test_no_image_is_wasted():
    bare = digits.load()
    splits = pretraining_splits(bare, 0)
    assert len(splits.train) + len(splits.test) == len(bare.train)
    assert set(splits.train.names).isdisjoint(splits.test.names)
    assert splits.val is splits.test
    expected = complete_splits(bare, 0).test
    assert splits.test.names == expected.names
    rest = bare.train.subset(np.arange(100, len(bare.train)))
    official = Source(bare.classes, rest, test=bare.train.subset(np.arange(100)))
    splits = pretraining_splits(official, 0)
    assert splits.train is official.train
    assert splits.test is official.test


def test_the_schedule_rises_to_one_and_falls_to_zero():
    factors = [learning_rate_factor(step, 1000, 0.15) for step in range(1001)]
    assert 0 < factors[0] < 0.01
    assert max(factors) == 1 == factors[150]
    assert sorted(factors[:151]) == factors[:151]
    assert sorted(factors[150:], reverse=True) == factors[150:]
    assert factors[1000] == 0
    assert learning_rate_factor(0, 10, 0.0) == 1


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", None])
def test_auto_is_bf16_where_a_cpu_computes_it(monkeypatch, feature):
    features = {"avx512_bf16": False, "amx_bf16": False} | ({feature: True} if feature else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    words = ["trainer.accelerator=cpu"]
    expected = "bf16-mixed" if feature else "32-true"
    assert choose_precision(config("x", *words, "trainer.precision=auto").trainer) == expected
    assert choose_precision(config("x", *words).trainer) == "32-true"


def test_biases_and_normalisation_do_not_decay():
    module = Pretraining(config("x").settings, list("abc"))
    module.trainer = type("T", (), {"estimated_stepping_batches": 10})()
    decayed, plain = module.configure_optimizers()["optimizer"].param_groups
    assert decayed["weight_decay"] == 5e-4
    assert plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(module.network.parameters()))
    assert all(p.ndim in (2, 4) for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
