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
    advancing,
    describe_genes,
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


def plain(n_trials=8):
    """Return a view that is not on a terminal."""
    console = Console(file=io.StringIO(), width=80, _environ={})
    return View(console, n_trials, 2, 58, by_four), console.file


def test_plain_output_is_a_line_a_trial_without_escape_codes():
    view, out = plain()
    with view:
        view.resumed([])
        for number in range(4):
            view.started(number, GENES)
            view.forecast(240.0, {number: 0.5})
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
    assert lines[4:] == [
        "generation 0 done · mean val_loss 0.8500 · best so far 0.7000 (trial 3)",
        "Best so far: all 58 layers, 18 frozen, lr 1.2e-05, dropout 0.50: val_loss 0.7000, "
        "accuracy 25.0% (trial 3)",
    ]


def test_plain_output_says_what_is_best_when_it_is_another_one():
    view, out = plain(12)
    for number in range(12):
        view.ended(trial(number, 0.25 if number == 9 else 0.5))
    told = [line[-9:] for line in out.getvalue().splitlines() if line.startswith("Best so far")]
    assert told == ["(trial 0)", "(trial 9)"]


def test_the_time_left_is_shown_as_far_as_it_is_known():
    for seconds, shown in ((None, ""), (-1.0, ""), (130.0, " · about 2 min left")):
        view, out = plain()
        view.forecast(seconds, {})
        view.ended(trial(0))
        assert out.getvalue().endswith(f" · 60 s{shown}\n")
    view, out = plain(n_trials=1)
    view.forecast(5.0, {})
    view.ended(trial(0))
    assert "left" not in out.getvalue()


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
        view = View(console, 8, 2, 58, by_four)
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
    view = View(terminal(), 8, 2, 58, by_four)
    waiting = trial(1, 1.0, epochs=1)
    waiting.state = TrialState.RUNNING
    cut_off = create_trial(state=TrialState.RUNNING)
    view.resumed([trial(0), waiting, cut_off])
    assert "1 of 4 · 0 running · 1 at a rung" in "\n".join(screen(view))


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
    view = View(terminal(), 8, 2, 58, by_four)
    view.ended(trial(0, 0.75))
    view.ended(trial(1, 0.5))
    view.ended(trial(2, 0.5, reused_from=1))
    view.ended(trial(3, None, error="diverged: ...", diverged=True, val_accuracy=None))
    view.ended(trial(4, None, error="OSError", val_accuracy=None))
    view.ended(trial(5, 1.0, duration_s=30.0))
    view.started(6, trial(6).params)
    view.forecast(54.0, {6: 1.25})
    assert screen(view) == [
        "trial gen included frozen      lr dropout val_loss   acc  time",
        "    0   0       58     18 1.2e-05    0.50   0.7500 25.0%  60 s",
        "    1   0       58     18 1.2e-05    0.50   0.5000 25.0%  60 s",
        "    2   0       58     18 1.2e-05    0.50   0.5000 25.0%   = 1",
        "    3   0       58     18 1.2e-05    0.50 diverged        60 s",
        "    4   1       58     18 1.2e-05    0.50   failed        60 s",
        "    5   1       58     18 1.2e-05    0.50   1.0000 25.0%  30 s",
        "    6   1       58     18 1.2e-05    0.50   2/2 ep       0.0 s",
        f"generation 1  {'━' * 21}╸{'━' * 11}  2 of 4 · 1 running",  # 2.625 of 4
        f"search        {'━' * 27}╺{'━' * 5}  6 of 8 trials · about 54 s left",
        "Best so far: all 58 layers, 18 frozen, lr 1.2e-05, dropout 0.50: val_loss",
        "0.5000, accuracy 25.0% (trial 1)",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("genes", [FOUR, tuple(GENES)])
def test_the_live_table_fits_a_narrow_terminal(width, genes):
    view = View(terminal(width=width), 24, 100, 58, by_four)
    for number in range(8):
        view.ended(trial(number, 0.75, genes=genes, duration_s=89 * 60))
    for number in range(8, 12):
        view.started(number, trial(number, genes=genes).params)
    view.paused(11, {}, Outcome(0.5, epochs=1))
    view.forecast(5000.0, {8: 11.5})
    lines = screen(view, width)
    assert len(lines) <= 18
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    more = ", decay 1.2e-05, smooth 0.10" if len(genes) > 4 else ""
    assert f"all 58 layers, 18 frozen, lr 1.2e-05, dropout 0.50{more}: " in text
    assert text.endswith("val_loss 0.7500, accuracy 25.0% (trial 0)")
    assert "0 of 4 · 3 running · 1 at a rung" in text
    assert "8 of 24 trials · about 83 min left" in text
    (running,) = (line for line in lines if line.lstrip().startswith("8 "))
    assert "12/100 ep" in running
    assert ("gen" in lines[0].split()) == (width > 60)
    assert any(line.split()[:1] == ["search"] and line.count("━") > 3 for line in lines)


@pytest.mark.parametrize("height", [10, 24, 60])
def test_the_widest_table_fits_80_columns_and_any_height(height):
    view = View(terminal(height), 99_999, 2, 58, lambda number: 999)
    for number in range(10_000, 10_040):
        view.ended(trial(number, 123456.789, genes=tuple(GENES), duration_s=89 * 60))
    for number in range(20_000, 20_064):
        view.started(number, GENES)
    view.forecast(1e6, {})
    lines = screen(view, height=height)
    assert len(lines) < height
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert lines[0].split() == [
        *("trial", "gen", "included", "frozen", "lr", "dropout", "decay", "smooth"),
        *("val_loss", "acc", "time"),
    ]
    assert sum("1/2 ep" in line for line in lines) >= 1  # some of the running ones
    assert lines[-4].endswith(" 40 of 99999 · 64 running")
    assert lines[-3].endswith(" 40 of 99999 trials · about 277.8 h left")
    assert lines[-2].startswith("Best so far: all 58 layers, 18 frozen, lr 1.2e-05")
    assert lines[-1].endswith("(trial 10000)")


def test_a_terminal_keeps_the_sums_of_generations_and_the_reasons_of_failures():
    console = terminal()
    with View(console, 8, 2, 58, by_four) as view:
        for number in range(4):
            view.started(number, trial(number).params)
            view.tick()
            view.ended(trial(number, None if number == 2 else 0.5, error="OSError: no space"))
    out = console.file.getvalue()
    assert "trial 2 failed: OSError: no space\n" in out
    assert "generation 0 done · mean val_loss 0.5000 · best so far 0.5000 (trial 0)\n" in out


def test_a_terminal_that_cannot_redraw_gets_plain_lines():
    console = Console(force_terminal=True, file=io.StringIO(), width=80, _environ={"TERM": "dumb"})
    with View(console, 8, 2, 58, by_four) as view:
        view.ended(trial(0))
        view.tick()
    assert console.file.getvalue().startswith("[1/8] trial 0")
    assert "included\n" not in console.file.getvalue()


def test_a_search_without_generations_has_none_to_show():
    console = Console(file=io.StringIO(), width=80)
    view = View(console, 2, 2, 58, lambda number: None)
    view.ended(trial(0))
    view.ended(trial(1))
    assert "generation" not in console.file.getvalue()
    lines = console.file.getvalue().splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["[1/2]", "Best", "[2/2]"]
    assert " 2 of 2 trials · 0 running" in screen(view)[-3]


def test_decoding_is_shown_now_and_then_without_a_terminal(monkeypatch):
    clock = itertools.count(0, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=80)
    with advancing(console, "Decoding images") as report:
        for done in range(256, 1281, 256):
            report(done, 1280)
    assert console.file.getvalue().splitlines() == [
        "Decoding images: 512 of 1280 · about 60 s left ...",  # 40 s for 512
        "Decoding images: 1024 of 1280 · about 20 s left ...",  # 80 s for 1024
    ]


def test_what_was_done_before_tells_nothing_of_the_time_left(monkeypatch):
    clock = iter((0.0, 60.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=80)
    with advancing(console, "Final training", "at most {} left", before=6) as report:
        report(7, 10)
    assert console.file.getvalue() == "Final training: 7 of 10 · at most 3 min left ...\n"


def test_on_a_terminal_work_is_a_bar_that_goes_when_it_is_done():
    console = terminal()
    with advancing(console, "Re-evaluations") as report:
        report(0.5, 4)
    out = console.file.getvalue()
    assert "Re-evaluations" in out
    assert " 0 of 4 · about " in out
    assert out.endswith("\x1b[2K")  # the line is erased


def test_the_live_table_is_drawn_now_and_then(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = terminal()
    with View(console, 8, 2, 58, by_four) as view:
        drawn = []
        for _ in range(21):  # four seconds of the driver's ticks
            view.tick()
            drawn.append(console.file.getvalue().count("search"))
            clock[0] += 0.2
    assert 4 <= len(set(drawn)) <= 9


def test_decoding_few_images_says_nothing_without_a_terminal():
    console = Console(file=io.StringIO(), width=80)
    with advancing(console, "Decoding images") as report:
        report(10, 10)
    assert console.file.getvalue() == ""


def test_one_is_singular():
    assert [format_count(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]


def test_a_chromosome_in_words():
    genes = {name: GENES[name] for name in FOUR}
    assert describe_genes(genes, 58) == "all 58 layers, 18 frozen, lr 1.2e-05, dropout 0.50"
    genes |= {"included_layers": 7, "frozen_layers": 0}
    said = describe_genes(genes, 58)
    assert said == "the first 7 of 58 layers, nothing frozen, lr 1.2e-05, dropout 0.50"


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
    view = View(terminal(), 8, 2, 58, by_four)
    for number in range(3):
        view.started(number, GENES)
        view.paused(number, GENES, Outcome(1.0, val_accuracy=0.5, epochs=2))
    assert screen(view)[-3].endswith(" 0 of 4 · 0 running · 3 at a rung")
    view.started(0, GENES)
    view.ended(pruned(1, 1.25, epochs=2))
    lines = screen(view)
    assert next(line for line in lines if line.lstrip().startswith("1 ")).endswith(
        "1.2500 25.0%   2 ep"
    )
    assert lines[-3].endswith(" 1 of 4 · 1 running · 1 at a rung")
    assert lines[-1] == "Best so far: no trial has come to its end yet"
