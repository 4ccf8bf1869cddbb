"""Where weights come from: words, files, downloads; and what is refused."""

import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import densenet121, resnet18

from gatl.classifier import Classifier
from gatl.cli import compose
from gatl.config import checked
from gatl.data.images import prepare
from gatl.data.source import Source, in_memory
from gatl.errors import UserError
from gatl.evaluation import Fit, Fitter, silence
from gatl.models import weight_files
from gatl.models.layered import LayeredNetwork
from gatl.models.se_densenet import se_densenet
from gatl.models.weight_files import CARD_KEY, read_safetensors, read_weights
from gatl.models.weights import Weights, describe_se, load
from gatl.outcome import Outcome

IMAGENET = {"imagenet": {"_target_": "gatl.models.weight_files.torchvision_densenet121"}}
NETWORK = {
    "_target_": "gatl.models.se_densenet.se_densenet",
    "growth_rate": 4,
    "init_features": 8,
    "block_config": [2, 2],
    "se_placement": "block",
    "se_init": "kaiming",
    "dropout_at": "head",
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    weight_files._read.cache_clear()


def small(included_layers: int = 4) -> LayeredNetwork:
    network: LayeredNetwork = instantiate(
        NETWORK, included_layers=included_layers, n_classes=3, dropout=0.1
    )
    return network


def own(network: LayeredNetwork) -> Weights:
    placement, gate = describe_se(network)
    card = {"se": {"placement": placement, "gate": gate}}
    return Weights(
        {n: t for n, t in network.state_dict().items() if not n.startswith("classifier")}, card
    )


# Files


def test_a_safetensors_file_with_its_card(tmp_path: Path) -> None:
    weights = own(small())
    path = tmp_path / "own.safetensors"
    save_file(dict(weights.tensors), path, metadata={CARD_KEY: json.dumps(weights.card)})
    assert read_safetensors(path).card == weights.card
    read = read_weights(str(path), {})
    assert read is not None
    assert load(small(3), read).notes == ()
    assert read_weights("none", IMAGENET) is None


@pytest.mark.parametrize("form", ["state dict", "lightning"])
def test_a_plain_state_dict(tmp_path: Path, form: str) -> None:
    weights = own(small())
    tensors = dict(weights.tensors)
    torch.save(tensors if form == "state dict" else {"state_dict": tensors}, tmp_path / "w.pt")
    read = read_weights(str(tmp_path / "w.pt"), {})
    assert read is not None
    assert read.tensors.keys() == tensors.keys()
    assert "SE not loaded" in str(load(small(), read))


def test_a_checkpoint_by_gatl_brings_its_se(tmp_path: Path) -> None:
    genes = {"included_layers": 3, "frozen_layers": 0, "learning_rate": 0.1, "dropout": 0.1}
    classifier = Classifier(NETWORK, genes, ("a", "b"), {"image_size": 48})
    torch.save(
        {
            "state_dict": classifier.state_dict(),
            "hyper_parameters": dict(classifier.hparams),
            "pytorch-lightning_version": "2.6.0",
        },
        tmp_path / "best.ckpt",
    )
    read = read_weights(str(tmp_path / "best.ckpt"), {})
    assert read is not None
    backbone = {"growth_rate": 4, "init_features": 8, "block_config": [2, 2]}
    assert read.card == {
        "backbone": {"_target_": NETWORK["_target_"], **backbone},
        "se": {"placement": "block", "gate": "sigmoid"},
        "preprocessing": {"image_size": 48},
    }
    network = small(3)
    report = load(network, read)
    assert report.left_random == ("classifier.weight", "classifier.bias")
    assert report.notes == ()
    for name, tensor in classifier.network.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(network.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "damage", ["truncated", "card", "list", "backbone", "preprocessing", "se", "null"]
)
def test_a_damaged_safetensors_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "own.safetensors"
    cards = {"card": "{", "list": "[]", "backbone": '{"backbone": 5}', "se": '{"se": ["x"]}'}
    cards |= {"preprocessing": '{"preprocessing": 3}', "null": '{"preprocessing": null}'}
    card = cards.get(damage, "{}")
    save_file(dict(own(small()).tensors), path, metadata={CARD_KEY: card})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"own\.safetensors is no file of plain weights") as error:
        read_weights(str(path), {})
    assert "\n" not in str(error.value)


class Malicious:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["pickle", "torch", "legacy torch"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "was-run"
    content = {"stem.conv.weight": Malicious(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match="running code") as error:
        read_weights(str(path), {})
    assert "\n" not in str(error.value)
    assert not proof.exists()


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_truncated_torch_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "w.pth"
    torch.save(dict(own(small()).tensors), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.weights=.*w\.pth") as error:
        read_weights(str(path), {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "no state dict of tensors"),
        ({"a": 1}, "no state dict of tensors"),
        ({1: torch.zeros(2)}, "no state dict of tensors"),
        (torch.zeros(2), "no state dict of tensors"),
        ({"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": None}, "fit nothing"),
        ({"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": {"settings": "x"}}, "fit no"),
        ({"a": torch.zeros(2).to_sparse()}, "no plain one"),
        ({"a": torch.tensor([0.0, float("nan")])}, "NaN or infinity"),
        ({**own(small()).tensors, "stem.norm.bias": torch.zeros(8, dtype=torch.int8)}, "int8"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=said) as error:
        load(small(), read_weights(str(tmp_path / "w.pt"), {}) or Weights({}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"some text\n", b"\x80\x02}q\x00(X", b"PK\x03\x04" + b"x" * 99]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_no_such_file(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.weights=.*w\.") as error:
        read_weights(str(tmp_path / f"w{suffix}"), {})
    assert "\n" not in str(error.value)


def test_the_home_of_nobody_is_no_file() -> None:
    with pytest.raises(UserError, match=r"there is no file '~nobody-of-that-name/w\.pt'"):
        read_weights("~nobody-of-that-name/w.pt", {})


def test_a_file_of_another_network(tmp_path: Path) -> None:
    torch.save(resnet18(num_classes=2).state_dict(), tmp_path / "w.pt")
    read = read_weights(str(tmp_path / "w.pt"), {})
    assert read is not None
    with pytest.raises(UserError, match=r"fit nothing in the model: .*'conv1\.weight'"):
        load(small(), read)


def test_a_missing_file_names_the_other_choices() -> None:
    with pytest.raises(UserError, match=r"must be none, imagenet or a file, .*'nowhere\.pt'"):
        read_weights("nowhere.pt", IMAGENET)
    with pytest.raises(UserError, match="must be none or a file"):
        read_weights("imagenet", {})


# Downloads, from a local server


@dataclass
class Served:
    """What the server answers, and how often it was asked."""

    url: str
    content: bytes
    cut: bool = False
    requests: int = 0


def as_torchvisions_file() -> dict[str, Tensor]:
    """A DenseNet-121 of random numbers, with the names of the file that torchvision offers."""
    torch.manual_seed(0)
    state = densenet121(num_classes=10).state_dict()
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "densenet121.pth"
    torch.save(as_torchvisions_file(), path)
    return path.read_bytes()


@pytest.fixture
def served(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server of the file, whose name holds its checksum, and an empty cache."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.content)))
            self.end_headers()
            half = len(state.content) // 2
            self.wfile.write(state.content[:half] if state.cut else state.content)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    checksum = hashlib.sha256(content).hexdigest()[:8]
    url = f"http://127.0.0.1:{server.server_port}/densenet121-{checksum}.pth"
    state = Served(url, content)
    monkeypatch.setattr(weight_files, "DENSENET121_URL", url)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    yield state
    server.shutdown()
    server.server_close()


def fit_with(tmp_path: Path, *overrides: str) -> Outcome:
    """Fit five layers, two of them frozen, to a few images of noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3), np.uint8)
    source = Source(("a", "b"), in_memory(images, np.arange(30) % 2, "noise"))
    config = checked(compose(["data.image_size=32", "trainer.accelerator=cpu", *overrides]))
    data = prepare(source, image_size=32, split_seed=0, max_bad=0, folder=tmp_path)
    genes = {"included_layers": 5, "frozen_layers": 2, "learning_rate": 1e-3, "dropout": 0.1}
    stop = multiprocessing.get_context("spawn").Event()
    silence()
    return Fitter(config, data, stop)(Fit(genes, 1, 0, tmp_path / "fit"))


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "hub" / "checkpoints").iterdir())


def test_imagenet_from_server_to_network(served: Served, tmp_path: Path) -> None:
    weights = read_weights("imagenet", IMAGENET)
    assert weights is not None
    cfg = checked(compose(["model=se_densenet121"]))
    network = Classifier(
        cfg.model.network,
        {"included_layers": 58, "frozen_layers": 0, "learning_rate": 1e-3, "dropout": 0.1},
        ("a", "b"),
        {},
    ).network
    report = load(network, weights)
    assert report.to_json()["new"] == ["classifier", "SE of 4 layers"]
    assert report.loaded == len(weights.tensors) - 2
    key = "features.denseblock4.denselayer16.conv.2.weight"
    assert torch.equal(network.state_dict()["layers.57.dense.conv2.weight"], weights.tensors[key])
    weight_files._read.cache_clear()
    assert fit_with(tmp_path, "model=se_densenet121", "model.weights=imagenet").val_loss
    assert served.requests == 1
    assert [path.name for path in cached(tmp_path)] == [served.url.rpartition("/")[2]]


def test_a_cut_connection_leaves_nothing_behind(served: Served, tmp_path: Path) -> None:
    served.cut = True
    with pytest.raises(UserError, match=r"imagenet cannot be had \(.*\): give .*weights=none") as e:
        read_weights("imagenet", IMAGENET)
    assert "\n" not in str(e.value)
    assert cached(tmp_path) == []
    served.cut = False
    assert read_weights("imagenet", IMAGENET) is not None


def test_a_wrong_checksum_is_an_error(served: Served, tmp_path: Path) -> None:
    served.content = served.content[:-1] + b"x"
    with pytest.raises(UserError, match=r"cannot be had \(invalid hash value"):
        read_weights("imagenet", IMAGENET)
    assert cached(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_fetched_again(served: Served, tmp_path: Path) -> None:
    read_weights("imagenet", IMAGENET)
    (path,) = cached(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    weight_files._read.cache_clear()
    assert read_weights("imagenet", IMAGENET) is not None
    assert served.requests == 2


def test_without_a_network_the_other_choices_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weight_files, "DENSENET121_URL", "http://127.0.0.1:9/d-01234567.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    sources = IMAGENET | {"bundled": {"_target_": "gatl.models.weight_files.bundled"}}
    with pytest.raises(UserError, match="refused") as error:
        read_weights("imagenet", sources)
    assert str(error.value).endswith(
        "give model.weights=none or model.weights=bundled or model.weights=PATH."
    )


def test_a_full_cache_folder_is_an_error_and_leaves_nothing(served: Served, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; it counts for its own process only."""
    program = f"""
        import resource, signal, torch
        from gatl.models import weight_files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({10**6}, {resource.RLIM_INFINITY}))
        torch.hub.set_dir({str(tmp_path / "hub")!r})
        weight_files.DENSENET121_URL = {served.url!r}
        try:
            weight_files.read_weights("imagenet", {IMAGENET!r})
        except weight_files.UserError as error:
            print(error)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"model\.weights=imagenet cannot be had \(.*\): give .*\n", ended.stdout)
    assert "too large" in ended.stdout
    assert cached(tmp_path) == []


def test_se_densenet_is_named_as_torchvision_names_it() -> None:
    network = se_densenet(
        58,
        10,
        0.0,
        growth_rate=32,
        init_features=64,
        block_config=(6, 12, 24, 16),
        se_placement="none",
        se_init="identity",
        dropout_at="head",
    )
    theirs = {key for key in densenet121().state_dict() if not key.startswith("classifier")}
    assert network.names.keys() == theirs
    ours = {key for key in network.state_dict() if not key.startswith("classifier")}
    assert set(network.names.values()) == ours


# The hub


@pytest.mark.slow  # the hub's client waits before it tries again
def test_timms_weights_come_from_the_hub_once(tmp_path: Path) -> None:
    """A local server stands for the hub; its address is read when its client is imported."""
    name = "mobilenetv3_small_050"
    save_file(timm.create_model(name).state_dict(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    damage = ""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            requests.append(f"{self.command} {self.path}")
            found = self.path.endswith("model.safetensors")
            self.send_response(200 if found else 404)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if self.path.endswith("model.safetensors"):
                sent = content[:-1] + b"x" if damage == "checksum" else content
                self.wfile.write(sent[:1000] if damage == "cut" else sent)
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = f"""
        from gatl.models.weight_files import read_weights, UserError
        source = {{"_target_": "gatl.models.timm_network.timm_weights", "name": "{name}"}}
        try:
            weights = read_weights("imagenet", {{"imagenet": source}})
            print(len(weights.tensors), float(weights.tensors["conv_head.weight"].sum()))
        except UserError as error:
            print(error)
    """

    def read(home: str) -> str:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**os.environ, **hub, "HF_HOME": str(tmp_path / home), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    refused = r"model\.weights=imagenet cannot be had \(.*\): give .*PATH.*\.\n"
    for damage in ("checksum", "cut"):  # the handler looks at it
        said = read("home")
        assert re.fullmatch(refused, said)
        assert ("invalid hash value" in said) == (damage == "checksum")
    damage = ""
    requests.clear()
    expected = load_file(tmp_path / "model.safetensors")
    first = read("home").split()
    assert int(first[0]) == len(expected) - 2  # without the classifier
    assert float(first[1]) == pytest.approx(float(expected["conv_head.weight"].sum()), abs=1e-3)
    server.shutdown()
    server.server_close()
    assert sum(line.startswith("GET") and "safetensors" in line for line in requests) == 1
    assert read("home").split() == first  # from the cache, for nobody answers any more
    assert re.fullmatch(refused, read("empty"))
