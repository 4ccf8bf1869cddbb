"""The record of a search: who holds it, what a kill leaves behind, and history.csv."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from gatl.errors import UserError
from gatl.outcome import Outcome
from gatl.record import (
    History,
    _mend,
    begin,
    fits_of,
    held,
    open_study,
    outcome_of,
    reach,
    resume_command,
    return_to_start,
    seconds_of,
    tell,
)

SPACE = {"learning_rate": FloatDistribution(0, 1)}

# DESIGN.md, section 5, and what was added since.
COLUMNS = (
    "number,generation,state,included_layers,frozen_layers,learning_rate,dropout,val_loss,fitness,"
    "val_accuracy,epochs,duration_s,trainable_params,total_params,reused_from,error,micro_batch,"
    "started_s,fits"
)


def study_in(folder: Path) -> optuna.Study:
    return open_study(folder, optuna.samplers.RandomSampler(seed=0))


def by_two(number: int) -> int:
    return number // 2


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib, gatl.record\n"
        "with gatl.record.held(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another run") as refused, held(tmp_path):
            pass
        assert "\n" not in str(refused.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with held(tmp_path):
        pass


def test_a_holder_lets_go_at_its_end_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path), pytest.raises(UserError), held(tmp_path):
        pass


@pytest.mark.parametrize("torn", [b'{"op_code": 4, "worker', b"{", b'{"op_code":4}'])
def test_a_torn_last_line_and_a_stale_lock_are_mended(tmp_path: Path, torn: bytes) -> None:
    study = study_in(tmp_path)
    study.ask(SPACE)
    tell(study, 0, Outcome(val_loss=0.5))
    whole = (tmp_path / "study.journal").read_bytes()
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(torn)
    (tmp_path / "study.journal.lock").symlink_to("study.journal")
    started = time.monotonic()
    again = study_in(tmp_path)
    assert time.monotonic() - started < 20  # a lock that stays is waited for: 30 s
    assert (tmp_path / "study.journal").read_bytes().startswith(whole)
    again.ask(SPACE)
    tell(again, 1, Outcome(val_loss=0.25))
    assert [trial.value for trial in study_in(tmp_path).get_trials()] == [0.5, 0.25]


@pytest.mark.parametrize("torn", [lambda line, k: line[:k], lambda line, k: zeroed(line, k)])
def test_torn_at_any_byte_the_last_line_is_as_if_it_had_not_been_written(tmp_path: Path, torn):
    """By a kill; or by a power cut, which may keep the length of a line and lose its content."""
    study = study_in(tmp_path)
    begin(study, {"learning_rate": 0.5}, SPACE)
    journal = tmp_path / "study.journal"
    before = journal.read_bytes()
    begin(study, {"learning_rate": 0.25}, SPACE)
    line = journal.read_bytes()[len(before) :]
    assert line.count(b"\n") == 1
    for k in range(len(line) - 1):
        journal.write_bytes(before + torn(line, k))
        _mend(journal)
        assert journal.read_bytes() == before
    journal.write_bytes(before + torn(line, len(line) // 2))
    again = study_in(tmp_path)
    tell(again, 0, Outcome(val_loss=0.5))
    assert [trial.value for trial in study_in(tmp_path).trials] == [0.5]


def zeroed(line: bytes, k: int) -> bytes:
    return line[:k] + bytes(len(line) - k - 1) + b"\n"


def test_a_whole_last_line_stays(tmp_path: Path) -> None:
    study_in(tmp_path)
    journal = tmp_path / "study.journal"
    for content in (b"", b'{"a":1}\n', journal.read_bytes()):
        journal.write_bytes(content)
        _mend(journal)
        assert journal.read_bytes() == content


def test_a_torn_only_line_is_an_empty_study(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_bytes(b'{"op_code": 0, "stu')
    study_in(tmp_path).ask(SPACE)
    assert len(study_in(tmp_path).get_trials()) == 1


def test_a_journal_that_is_damaged_inside_is_one_line(tmp_path: Path) -> None:
    study_in(tmp_path).ask(SPACE)
    content = (tmp_path / "study.journal").read_bytes()
    (tmp_path / "study.journal").write_bytes(b"damage" + content)
    with pytest.raises(UserError, match=r"study\.journal is damaged") as error:
        study_in(tmp_path)
    assert "\n" not in str(error.value)


def test_the_outcome_is_written_before_the_state(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ask(SPACE)
    seen = []
    set_state = study._storage.set_trial_state_values

    def spy(trial_id, state, values=None):
        seen.append(study.get_trials()[0].user_attrs["outcome"]["val_loss"])
        return set_state(trial_id, state, values)

    study._storage.set_trial_state_values = spy
    tell(study, 0, Outcome(val_loss=0.5))
    assert seen == [0.5]


def test_a_trial_begins_whole_as_if_it_had_been_asked_for(tmp_path: Path) -> None:
    space = {"included_layers": IntDistribution(1, 58), "learning_rate": SPACE["learning_rate"]}
    study = study_in(tmp_path)
    asked = study.ask(space)
    n_lines = (tmp_path / "study.journal").read_bytes().count(b"\n")
    begun = begin(study, asked.params, space)
    assert (tmp_path / "study.journal").read_bytes().count(b"\n") == n_lines + 1
    assert begun.number == 1
    for trial in study_in(tmp_path).trials:
        assert trial.state is TrialState.RUNNING
        assert trial.params == asked.params
        assert [type(value) for value in trial.params.values()] == [int, float]
        assert trial.distributions == space
        assert trial.datetime_start is not None


def test_the_seconds_of_a_search_are_those_of_its_last_result(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    assert seconds_of(study) == 0
    study.set_user_attr("seconds", 10.0)  # at the end of a session
    assert seconds_of(study) == 10
    for _ in range(2):
        begin(study, {"learning_rate": 0.5}, SPACE)
    reach(study, 1, Outcome(0.5, epochs=1), 12.5)
    assert seconds_of(study_in(tmp_path)) == 12.5
    tell(study, 0, Outcome(error="diverged", diverged=True), 14.5)
    assert seconds_of(study_in(tmp_path)) == 14.5
    study.set_user_attr("seconds", 20.0)
    assert seconds_of(study) == 20
    assert [outcome_of(trial).epochs for trial in study.trials] == [0, 1]


def test_outcomes_come_back_as_they_were_told(tmp_path: Path) -> None:
    outcomes = [
        Outcome(
            val_loss=0.1 + 0.2,
            val_accuracy=0.5,
            epochs=3,
            duration_s=1.5,
            trainable_params=7,
            total_params=9,
        ),
        Outcome(error="out of memory"),
        Outcome(error="diverged", diverged=True, reused_from=1),
    ]
    study = study_in(tmp_path)
    for number, outcome in enumerate(outcomes):
        study.ask(SPACE)
        tell(study, number, outcome)
    trials = study_in(tmp_path).get_trials()
    assert [outcome_of(trial) for trial in trials] == outcomes
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert trials[0].value == 0.1 + 0.2


def test_history_is_in_the_order_of_numbers_and_current_while_trials_end_out_of_order(
    tmp_path: Path,
) -> None:
    study = study_in(tmp_path)
    for _ in range(5):
        study.ask(SPACE)
    history = History(tmp_path, ["learning_rate"])
    ended = []
    for number in (3, 1, 0, 4, 2):
        tell(study, number, Outcome(val_loss=number / 10, duration_s=1.0))
        ended.append(number)
        history.update(study.get_trials(deepcopy=False), by_two)
        assert [int(row["number"]) for row in rows(tmp_path)] == sorted(ended)
    written = (tmp_path / "history.csv").read_bytes()
    History(tmp_path, ["learning_rate"]).update(study_in(tmp_path).get_trials(), by_two)
    assert (tmp_path / "history.csv").read_bytes() == written
    assert [row["generation"] for row in rows(tmp_path)] == ["0", "0", "1", "1", "2"]


def test_rows_that_stay_are_made_once(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    history = History(tmp_path, ["learning_rate"])
    made: list[int] = []

    def generation(number: int) -> None:
        made.append(number)

    for number in range(20):
        study.ask(SPACE)
        tell(study, number, Outcome(val_loss=1.0))
        history.update(study.get_trials(deepcopy=False), generation)
    assert made == list(range(20))


def test_the_columns_of_history(tmp_path: Path) -> None:
    genes = ["included_layers", "frozen_layers", "learning_rate", "dropout"]
    History(tmp_path, genes)
    assert (tmp_path / "history.csv").read_text() == COLUMNS + "\n"
    History(tmp_path, [*genes, "weight_decay"])
    expected = COLUMNS.replace(",val_loss", ",weight_decay,val_loss")
    assert (tmp_path / "history.csv").read_text() == expected + "\n"


def test_a_row_tells_everything_of_a_trial(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ask({"learning_rate": FloatDistribution(0.5, 0.5)})
    study.ask({"learning_rate": FloatDistribution(0.5, 0.5)})
    tell(study, 0, Outcome(0.25, 0.75, 2, 1.23456, 10, 20, micro_batch=8, reused_from=None))
    fits = [(1.23456, 2.5, 2), (40.0, 8.0, 3)]
    tell(study, 1, Outcome(error='ValueError: a "quoted", comma', duration_s=0.1), 50.0, fits)
    History(tmp_path, ["learning_rate"]).update(study.get_trials(), lambda number: None)
    first, second = (list(row.values()) for row in rows(tmp_path))
    figures = ["0.25", "-0.25", "0.75", "2", "1.235", "10", "20"]
    assert first == ["0", "", "COMPLETE", "0.5", *figures, "", "", "8", "", ""]
    assert second == [
        *("1", "", "FAIL", "0.5", "", "", "", "0", "0.1", "", "", ""),
        *('ValueError: a "quoted", comma', "", "1.235", "[[1.235, 2.5, 2], [40.0, 8.0, 3]]"),
    ]
    assert fits_of(study.trials[0]) == []
    assert fits_of(study.trials[1]) == [(1.235, 2.5, 2), (40.0, 8.0, 3)]


def test_an_error_with_bytes_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ask(SPACE)
    tell(study, 0, Outcome(error="fl\udcf6wers/1.jpg cannot be decoded"))
    History(tmp_path, ["learning_rate"]).update(study.get_trials(), by_two)
    assert b"fl\xf6wers/1.jpg" in (tmp_path / "history.csv").read_bytes()


def test_a_run_goes_back_to_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.chdir(here)
    return_to_start(tmp_path)
    assert Path.cwd() == here
    (tmp_path / ".hydra").mkdir()
    recorded = tmp_path / ".hydra" / "hydra.yaml"
    for cwd in (f"{there}/gone", f"{there}/{'x' * 300}", "[1]", "${oc.env:HOME}", '"\\0"'):
        recorded.write_text(f"hydra:\n  runtime:\n    cwd: {cwd}\n")
        return_to_start(tmp_path)
        assert Path.cwd() == here
    recorded.write_text(f"hydra:\n  runtime:\n    cwd: {there}\n")
    return_to_start(tmp_path)
    assert Path.cwd() == there


def test_the_command_to_go_on_survives_a_shell() -> None:
    command = resume_command(Path("/a b/c=d's"), "budget.trials=9")
    words = subprocess.run(
        ["bash", "-c", f'set -- {command}; printf "%s\\n" "$@"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words == ["python", "-m", "gatl", "resume=/a b/c=d's", "budget.trials=9"]
