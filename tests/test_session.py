"""What a run holds: nothing of it may outlive the run, however that ends."""

import functools
import io
import os
import pkgutil
import signal
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from gatl.cli import compose
from gatl.config import checked
from gatl.data import digits
from gatl.data.source import Source
from gatl.errors import UserError
from gatl.evaluation import LocalEvaluator
from gatl.record import held
from gatl.session import opened

OVERRIDES = (
    "data=digits",
    "model=se_densenet121_k12",
    "data.image_size=32",
    "trainer.accelerator=cpu",
    "evaluator.workers=1",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@functools.cache
def configured(*overrides):
    return checked(compose([*OVERRIDES, *overrides]))


def open_run(folder, *overrides):
    console = Console(file=io.StringIO(), width=200, markup=False)
    return opened(configured(*overrides), folder, console)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """Let the decoding take no time."""
    load = digits.load

    def load_few():
        source = load()
        return Source(source.classes, source.train.subset(np.arange(0, len(source.train), 20)))

    monkeypatch.setattr(digits, "load", load_few)


@pytest.fixture(autouse=True)
def handlers():
    """Return the signal handlers, which every test must leave as they were."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_session_holds_its_folder_and_its_images_and_lets_go(tmp_path):
    with open_run(tmp_path) as session:
        assert (tmp_path / ".images" / "train.npy").exists()
        assert len(session.data.train) > 0
        assert session.study.study_name == "gatl"
        assert "Data: digits · 10 classes" in session.console.file.getvalue()
        with pytest.raises(UserError, match="in use by another run"), open_run(tmp_path):
            pass
        assert (tmp_path / ".images" / "train.npy").exists()
    assert not (tmp_path / ".images").exists()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("x"), ZeroDivisionError])
def test_whatever_ends_a_session_nothing_is_left_running(tmp_path, monkeypatch, error):
    closed = []
    close = LocalEvaluator.close

    def spied(self, *, now):
        closed.append((self, now))
        close(self, now=now)

    monkeypatch.setattr(LocalEvaluator, "close", spied)
    with pytest.raises(error if isinstance(error, type) else type(error)):  # noqa: SIM117
        with open_run(tmp_path) as session:
            raise error
    assert closed == [(session.evaluator, error is KeyboardInterrupt)]
    assert session.cut.is_set()
    assert not (tmp_path / ".images").exists()
    with held(tmp_path):
        pass


def test_images_that_have_changed_are_told_before_anything_is_fitted(tmp_path, monkeypatch):
    for _ in range(2):
        with open_run(tmp_path):
            pass
    few = digits.load()

    def load_fewer():
        return Source(few.classes, few.train.subset(np.arange(len(few.train) - 1)))

    monkeypatch.setattr(digits, "load", load_fewer)
    monkeypatch.setattr(LocalEvaluator, "__init__", lambda *_: pytest.fail("a fit may start"))
    with pytest.raises(UserError, match="1 gone; the first: digits/"), open_run(tmp_path):
        pass


def test_that_the_list_of_images_is_gone_is_told(tmp_path):
    for said in (False, True, False):
        with open_run(tmp_path) as session:
            assert ("images.csv is gone" in session.console.file.getvalue()) == said
        if not said:
            (tmp_path / "images.csv").unlink()


def test_pictures_in_two_splits_are_told_and_stop_nothing(tmp_path, monkeypatch):
    few = digits.load()
    monkeypatch.setattr(digits, "load", lambda: Source(few.classes, few.train, test=few.train))
    with open_run(tmp_path) as session:
        said = session.console.file.getvalue()
    assert f"  the same pictures: {len(few.train)} in several splits, 0 in several" in said


def test_the_images_of_a_run_that_was_killed_are_removed(tmp_path):
    (tmp_path / ".images").mkdir()
    (tmp_path / ".images" / "half.npy").touch()
    with open_run(tmp_path):
        assert not (tmp_path / ".images" / "half.npy").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_a_second_one_stops_at_once(tmp_path, number):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path) as session:  # noqa: PT012
        assert not session.stop.is_set()
        signal.raise_signal(number)
        assert session.stop.is_set()
        assert session.console.file.getvalue().count("Stopping") == 1
        signal.raise_signal(number)
    assert not (tmp_path / ".images").exists()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("where", ["gatl.data.digits.load", "gatl.data.images.to_rgb"])
def test_before_the_search_a_signal_stops_at_once(tmp_path, monkeypatch, number, where):
    calls = []
    original = pkgutil.resolve_name(where)

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        time.sleep(0.02)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path):
        pass
    assert len(calls) < 40  # of 90 images
    assert not (tmp_path / ".images").exists()
    assert not (tmp_path / "study.journal").exists()


def test_a_signal_in_the_middle_of_a_print_is_no_error(tmp_path, monkeypatch):
    with open_run(tmp_path) as session:

        def reentrant(*args, **kwargs):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

        monkeypatch.setattr(session.console, "print", reentrant)
        signal.raise_signal(signal.SIGINT)
        assert session.stop.is_set()


def test_weights_that_do_not_fit_are_found_before_the_search(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"features.conv0.weight": torch.zeros(1, 1, 1, 1)}, path)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError) as error, open_run(run, f"model.weights={path}"):
        pass
    assert "\n" not in str(error.value)
    assert not (run / "study.journal").exists()


def test_weights_are_tried_in_the_deepest_network_that_the_space_has(tmp_path):
    with open_run(tmp_path, "space.included_layers.high=4") as session:
        said = session.console.file.getvalue()
        assert "Weights: bundled, " in said
        assert "; new: neck, classifier, SE of 1 layer; " in said
        assert "pretrained with image_size 64, used with 32" in said
    with open_run(tmp_path, "model.weights=none") as session:
        assert "Weights: none, all starts random\n" in session.console.file.getvalue()


@pytest.mark.parametrize(
    "override", ["+search.foo=1", "search.n_elites=50", "search._target_=os.nothing"]
)
def test_a_strategy_that_cannot_be_built_is_found_before_any_data(tmp_path, monkeypatch, override):
    monkeypatch.setattr(digits, "load", lambda: pytest.fail("data was read"))
    with (
        pytest.raises(UserError, match=r"search cannot be built: .*(foo|n_elites|os\.nothing)"),
        open_run(tmp_path, override),
    ):
        pass


class TwoArmed(LocalEvaluator):
    """Another evaluator: one class, and settings of its own in its YAML."""

    def __init__(self, config, data, stop, arms):
        super().__init__(config, data, stop)
        self.arms = arms


def test_another_evaluator_gets_its_own_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("gatl.evaluation.TwoArmed", TwoArmed, raising=False)
    overrides = ("evaluator._target_=gatl.evaluation.TwoArmed", "+evaluator.arms=2")
    with open_run(tmp_path, *overrides) as session:
        assert isinstance(session.evaluator, TwoArmed)
        assert session.evaluator.arms == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluator._target_=gatl.evaluation.Nope", "no attribute 'Nope'"),
        ("evaluator._target_=nowhere.Evaluator", "No module named 'nowhere'"),
        ("+evaluator.num_gpus=1", "unexpected keyword argument 'num_gpus'"),
        ("model.network.growth_rate=-3", "growth_rate=-3"),
        ("model.network.block_config=[58,0]", "at least 1"),
        ("model.network.growth_rate=wide", "model.network cannot be built"),
        ("+model.network.width=2", "unexpected keyword argument 'width'"),
        ("model.n_layers=59", r"in \[1, 58\]"),
    ],
)
def test_what_cannot_be_built_is_known_before_any_image_is_read(
    tmp_path, monkeypatch, override, said
):
    monkeypatch.setattr(digits, "load", lambda: pytest.fail("images were read"))
    with pytest.raises(UserError, match=said) as raised, open_run(tmp_path, override):
        pass
    assert "\n" not in str(raised.value)


def test_the_driver_takes_one_thread_and_leaves_the_cores_to_the_fits(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_run(tmp_path):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("search", ["search=annealing", "search=tpe", "ga.mode=steady_state"])
def test_without_generations_halving_is_off_and_that_is_said(tmp_path, search):
    console = Console(file=io.StringIO(), width=200, markup=False)
    config = configured(search)
    assert config.rungs
    with opened(config, tmp_path, console) as session:
        assert session.config.rungs == ()
        assert session.evaluator._config.rungs == ()
    assert console.file.getvalue().count("Halving: off (") == 1
    with opened(configured(), tmp_path, console) as session:
        assert session.config.rungs
    assert console.file.getvalue().count("Halving: off (") == 1
