"""What the user sees of a search, on a terminal and elsewhere."""

import io
import itertools
import re

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from rich.console import Console

from gatl import progress
from gatl.outcome import Outcome
from gatl.progress import (
    View,
    decoding,
    format_count,
    format_duration,
    format_loss,
    format_value,
    new_console,
)

GENES = {
    "included_layers": 58,
    "frozen_layers": 18,
    "learning_rate": 1.234e-05,
    "dropout": 0.5,
    "weight_decay": 1.234e-05,
    "label_smoothing": 0.1,
}
FOUR = tuple(GENES)[:4]


def trial(number, loss=0.5, *, genes=FOUR, **outcome):
    told = Outcome(val_loss=loss, **({"val_accuracy": 0.25, "duration_s": 60.0} | outcome))
    made = create_trial(
        state=TrialState.FAIL if loss is None else TrialState.COMPLETE,
        value=loss,
        params={name: GENES[name] for name in genes},
        distributions={
            name: IntDistribution(0, 58) if "layers" in name else FloatDistribution(0, 1)
            for name in genes
        },
        user_attrs={"outcome": told.to_json()},
    )
    made.number = number
    return made


def pruned(number, loss, epochs):
    made = trial(number, loss, pruned=True, epochs=epochs)
    made.state = TrialState.PRUNED
    return made


def by_four(number):
    return number // 4


def terminal(height=24, width=80):
    return Console(force_terminal=True, width=width, height=height, file=io.StringIO(), _environ={})


def screen(view, width=80, height=24):
    """Return the lines of the live table as a terminal of this size shows them."""
    console = terminal(height, width)
    console.print(view._table())
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    return [line.rstrip() for line in text.splitlines()]


def plain(n_trials=8, n_workers=2, **more):
    """Return a view that is not on a terminal."""
    console = Console(file=io.StringIO(), width=80, _environ={})
    return View(console, n_trials, n_workers, by_four, **more), console.file


def test_plain_output_is_a_line_a_trial_without_escape_codes():
    view, out = plain()
    with view:
        view.resumed([])
        for number in range(4):
            view.started(number, GENES)
            view.tick()
            view.ended(trial(number, 1.0 - number / 10))
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0] == (
        "[1/8] trial 0 · generation 0 · included 58, frozen 18, lr 1.2e-05, dropout 0.50 · "
        "val_loss 1.0000, accuracy 25.0% · 60 s · about 4 min left"
    )
    assert [line.split(" · ")[0] for line in lines[:4]] == [
        f"[{n + 1}/8] trial {n}" for n in range(4)
    ]
    assert lines[4:] == ["generation 0 done · mean val_loss 0.8500 · best so far 0.7000 (trial 3)"]


def test_the_time_left_follows_from_fits_that_were_run_and_from_the_budget():
    view, out = plain()
    view.resumed(
        [trial(0), trial(1, reused_from=0, duration_s=0.0), trial(2, None, duration_s=120.0)]
    )
    view.ended(trial(3, duration_s=180.0))
    assert out.getvalue().splitlines()[-2].endswith("· about 4 min left")  # 4 fits of 2 min, by 2
    view, out = plain(seconds=30.0)
    view.ended(trial(0))
    assert out.getvalue().splitlines()[-1].endswith("· about 30 s left")
    view, out = plain(seconds=0.0)
    view.ended(trial(0))
    assert out.getvalue().splitlines()[-1].endswith("· 60 s")


def test_failures_and_reused_results_are_told():
    view, out = plain()
    view.ended(trial(0, None, error="out of memory: lower data.batch_size"))
    view.ended(trial(1, None, error="diverged: val_loss is nan", diverged=True, reused_from=0))
    view.ended(trial(2, 0.5, reused_from=1))
    first, second, third = out.getvalue().splitlines()
    assert " · failed: out of memory: lower data.batch_size · " in first
    assert " · failed: diverged: val_loss is nan (as trial 0) · " in second
    assert " · val_loss 0.5000, accuracy 25.0% (as trial 1) · " in third


def test_a_generation_without_a_result_is_summed_up_too():
    view, out = plain()
    for number in range(4):
        view.ended(trial(number, None, error="OSError"))
    assert out.getvalue().splitlines()[-1] == "generation 0 done · none completed"
    view, out = plain()
    for number in range(3):
        view.ended(pruned(number, 1.0, epochs=1))
    view.ended(trial(3, None, error="diverged: val_loss is nan", diverged=True))
    assert out.getvalue().splitlines()[-1] == "generation 0 done · none completed"


def test_what_looks_like_markup_or_an_emoji_is_shown_as_it_is():
    name = "[red]roses[/red] :smile: [/] \\[b]"
    for console in (Console(file=io.StringIO()), terminal()):
        view = View(console, 8, 1, by_four)
        view.ended(trial(0, None, error=f"OSError: {name}"))
        assert f"failed: OSError: {name}" in console.file.getvalue()


def test_the_console_of_a_command_prints_names_as_they_are(capsysbinary, monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    console = new_console()
    console.print("[red]roses[/red] :smile: fl\xf6\udcf6wers", soft_wrap=True)
    console.file.flush()
    assert buffer.getvalue() == b"[red]roses[/red] :smile: fl\\xf6\\udcf6wers\n"


def test_nothing_that_is_printed_commands_the_terminal(capsys):
    new_console().print("a\x1b]0;title\x07\x1b[2Jb\rc\nd", soft_wrap=True)
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\\x1b[2Jb\\rc\nd\n"


def test_a_full_cache_is_told_once():
    view, out = plain()
    for number in range(3):
        view.ended(trial(number, uncached=number > 0))
    assert out.getvalue().count("Feature cache: full, so trial 1 computed") == 1
    assert out.getvalue().count("Feature cache") == 1


def test_micro_batches_are_told_in_a_line_of_their_own():
    view, out = plain()
    view.ended(trial(0, micro_batch=8))
    view.ended(trial(1, micro_batch=8, reused_from=0))
    said = [line for line in out.getvalue().splitlines() if "memory" in line]
    assert said == [
        "trial 0: out of memory; then in micro-batches of 8 images, whose gradients add up to "
        "those of a batch (batch normalisation sees 8 at a time)"
    ]


def test_going_on_counts_who_waits_at_a_rung():
    view = View(terminal(), 8, 2, by_four)
    waiting = trial(1, 1.0, epochs=1)
    waiting.state = TrialState.RUNNING
    cut_off = create_trial(state=TrialState.RUNNING)
    view.resumed([trial(0), waiting, cut_off])
    assert "1 of 8 trials done · 0 running · 1 waiting at a rung" in "\n".join(screen(view))


def test_going_on_says_what_is_done():
    view, out = plain()
    view.resumed([trial(0, 0.5), trial(1, 0.25)])
    assert out.getvalue() == ("Going on: 2 of 8 trials done · best so far 0.2500 (trial 1)\n")
    view, out = plain()
    view.resumed([trial(0, None, error="OSError")])
    assert out.getvalue() == "Going on: 1 of 8 trials done\n"
    view, out = plain()
    view.resumed([])
    assert out.getvalue() == ""


def test_the_live_table_shows_where_the_search_stands():
    view = View(terminal(), 8, 2, by_four)
    view.ended(trial(0, 0.75))
    view.ended(trial(1, 0.5))
    view.ended(trial(2, 0.5, reused_from=1))
    view.ended(trial(3, None, error="diverged: ...", diverged=True, val_accuracy=None))
    view.ended(trial(4, None, error="OSError", val_accuracy=None))
    view.ended(trial(5, 1.0, duration_s=30.0))
    view.started(6, trial(6).params)
    assert screen(view) == [
        "trial gen included frozen      lr dropout val_loss   acc  time",
        "    0   0       58     18 1.2e-05    0.50   0.7500 25.0%  60 s",
        "    1   0       58     18 1.2e-05    0.50   0.5000 25.0%  60 s",
        "    2   0       58     18 1.2e-05    0.50   0.5000 25.0%   = 1",
        "    3   0       58     18 1.2e-05    0.50 diverged        60 s",
        "    4   1       58     18 1.2e-05    0.50   failed        60 s",
        "    5   1       58     18 1.2e-05    0.50   1.0000 25.0%  30 s",
        "    6   1       58     18 1.2e-05    0.50      ...       0.0 s",
        "6 of 8 trials done · 1 running · about 54 s left",
        "generation 1: mean val_loss 1.0000 · best so far 0.5000 (trial 1)",
    ]


@pytest.mark.parametrize("height", [10, 24, 60])
def test_the_widest_table_fits_80_columns_and_any_height(height):
    view = View(terminal(height), 99_999, 64, lambda number: 999)
    for number in range(10_000, 10_040):
        view.ended(trial(number, 123456.789, genes=tuple(GENES), duration_s=89 * 60))
    for number in range(20_000, 20_064):
        view.started(number, GENES)
    lines = screen(view, height=height)
    assert len(lines) < height
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert lines[0].split() == [
        *("trial", "gen", "included", "frozen", "lr", "dropout", "decay", "smooth"),
        *("val_loss", "acc", "time"),
    ]
    assert all(len(line.split()) in (9, 10, 11, 12, 13) for line in lines[1:-2])
    assert sum("..." in line for line in lines) >= 2  # some of the running ones
    assert lines[-2].startswith("40 of 99999 trials done · 64 running · about")
    assert (
        lines[-1] == "generation 999: mean val_loss 1.23e+05 · best so far 1.23e+05 (trial 10000)"
    )


def test_a_terminal_keeps_the_sums_of_generations_and_the_reasons_of_failures():
    console = terminal()
    with View(console, 8, 1, by_four) as view:
        for number in range(4):
            view.started(number, trial(number).params)
            view.tick()
            view.ended(trial(number, None if number == 2 else 0.5, error="OSError: no space"))
    out = console.file.getvalue()
    assert "trial 2 failed: OSError: no space\n" in out
    assert "generation 0 done · mean val_loss 0.5000 · best so far 0.5000 (trial 0)\n" in out


def test_a_terminal_that_cannot_redraw_gets_plain_lines():
    console = Console(force_terminal=True, file=io.StringIO(), width=80, _environ={"TERM": "dumb"})
    with View(console, 8, 1, by_four) as view:
        view.ended(trial(0))
        view.tick()
    assert console.file.getvalue().startswith("[1/8] trial 0")
    assert "included\n" not in console.file.getvalue()


def test_a_search_without_generations_has_none_to_show():
    console = Console(file=io.StringIO(), width=80)
    view = View(console, 2, 1, lambda number: None)
    view.ended(trial(0))
    view.ended(trial(1))
    assert "generation" not in console.file.getvalue()
    assert len(console.file.getvalue().splitlines()) == 2


def test_decoding_is_shown_now_and_then_without_a_terminal(monkeypatch):
    clock = itertools.count(0, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=80)
    with decoding(console) as report:
        for done in range(256, 1281, 256):
            report(done, 1280)
    lines = console.file.getvalue().splitlines()
    assert lines
    assert len(lines) < 5
    assert all(re.fullmatch(r"Decoding images: \d+ of 1280 \.\.\.", line) for line in lines)


def test_decoding_few_images_says_nothing_without_a_terminal():
    console = Console(file=io.StringIO(), width=80)
    with decoding(console) as report:
        report(10, 10)
    assert console.file.getvalue() == ""


def test_one_is_singular():
    assert [format_count(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]


def test_numbers_are_short():
    assert [format_value(x) for x in (58, 0.5, 1e-6, 0.0, 0.1)] == [
        *("58", "0.50", "1.0e-06", "0.00", "0.10")
    ]
    assert [format_loss(x) for x in (0.5, 999.99994, 1000.0, 1e30)] == [
        *("0.5000", "999.9999", "1.00e+03", "1.00e+30")
    ]
    assert [format_duration(x) for x in (0.4, 89.4, 90, 5399, 5400, 360000)] == [
        *("0.4 s", "89 s", "2 min", "90 min", "1.5 h", "100.0 h")
    ]


def test_plain_output_shows_rungs_and_who_is_stopped_there():
    view, out = plain()
    with view:
        for number in range(3):
            view.started(number, GENES)
            reached = Outcome(1.0 + number, val_accuracy=0.5, epochs=1)
            view.paused(number, {"included_layers": 58, "dropout": 0.5}, reached)
        view.ended(pruned(2, 3.0, epochs=1))
    lines = out.getvalue().splitlines()
    assert lines[1] == (
        "trial 1 · included 58, dropout 0.50 · val_loss 2.0000, accuracy 50.0% after 1 epoch"
    )
    assert "[1/8] trial 2" in lines[3]
    assert "stopped after 1 epoch: val_loss 3.0000" in lines[3]
    assert "best so far" not in out.getvalue()


def test_live_table_counts_who_waits_at_a_rung_and_marks_who_was_stopped():
    view = View(terminal(), 8, 2, by_four)
    for number in range(3):
        view.started(number, GENES)
        view.paused(number, GENES, Outcome(1.0, val_accuracy=0.5, epochs=2))
    assert screen(view)[-1] == "0 of 8 trials done · 0 running · 3 waiting at a rung"
    view.started(0, GENES)
    view.ended(pruned(1, 1.25, epochs=2))
    lines = screen(view)
    assert next(line for line in lines if line.lstrip().startswith("1 ")).endswith(
        "1.2500 25.0% 2 ep"
    )
    assert "1 of 8 trials done · 1 running · 1 waiting at a rung" in lines[-1]
