"""The record of a search: an Optuna study, in the run folder or a database, and ``history.csv``.

One driver holds the run folder. Only then may it mend what a killed one left:
a stale lock of the journal, and a last line that is torn.
"""

import contextlib
import csv
import fcntl
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gatl.chromosome import Value
from gatl.config import Config, StudyConfig
from gatl.errors import UserError, printable
from gatl.files import csv_of, write_whole, writing
from gatl.outcome import LARGEST, Outcome, fitness
from gatl.storage import Database, connected, require_address
from gatl.trust import read_yaml, whole

JOURNAL = "study.journal"
PLACE = "study.json"  # in its place, where the study lies in a database
HISTORY = "history.csv"
RESULT = "result.json"
IMAGES, FEATURES = ".images", ".features"  # while a run lasts
OUTCOME = "outcome"  # the trial's user attribute
SECONDS = "seconds"  # the study's user attribute, and in a trial's outcome: the search's so far
FITS = "fits"  # in a trial's outcome
_MAX_PLACE = 4096  # characters
_OURS = "gatl "  # with it the name of each study in a database begins
_BESIDE = (SECONDS, FITS)  # what stands there that is no part of it

FitTime = tuple[float, float, int]
"""When a fit began, in seconds of the search as `seconds_of` counts them; its own seconds; and the
workers that there were."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder for one driver; the kernel frees it however that ends.

    Raises:
        UserError: If another process holds the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another run: wait for its end, or stop it with Ctrl-C."
            ) from error
        yield
    finally:
        os.close(descriptor)


def run_folder_of(folder: Path) -> Path:
    """Return the run folder in which a fit's folder lies."""
    return next((p for p in folder.parents if record_in(p)), folder.parent)


def identity(run: Path) -> str:
    """Return what no other run has: its record's first line, which names the process."""
    record = record_in(run)
    if record is None:
        return str(run.resolve())
    with record.open(encoding="utf-8", errors="replace") as file:
        return file.readline()


def resume_command(folder: Path, *overrides: str) -> str:
    """Return what a user types to go on with a run."""
    return shlex.join(["python", "-m", "gatl", f"resume={folder}", *overrides])


def final_command(folder: Path, *words: str) -> str:
    """Return what a user types to make the final model of what a search has found."""
    return shlex.join(["python", "-m", "gatl.final", f"run={folder}", *words])


def way_on(folder: Path, *overrides: str) -> str:
    """Say how to go on with a run; one that has no record yet begins anew."""
    if record_in(folder) is None:
        return "start the run again."
    return f"go on with {resume_command(folder, *overrides)}"


@dataclass(frozen=True)
class Place:
    """Where a study lies in a database: what `PLACE` holds.

    Attributes:
        storage: The URL of the database.
        name: The study's, which no other in that database has.
    """

    storage: str
    name: str

    def __str__(self) -> str:
        """Name it in a message."""
        return f"The study {self.name!r} in {self.storage}"


def record_in(folder: Path) -> Path | None:
    """Return the file of a run folder that is its record, or says where that is.

    The first line of either is no other run's. None if the run has no record yet.
    """
    return next((folder / name for name in (PLACE, JOURNAL) if (folder / name).is_file()), None)


def place_of(folder: Path) -> Place | None:
    """Return where the study of a run lies, if in a database.

    Raises:
        UserError: If the file that says so is damaged.
    """
    path = folder / PLACE
    if not path.is_file():
        return None
    with whole(path):
        with path.open(encoding="utf-8") as file:
            content = json.loads(file.read(_MAX_PLACE))
        place = Place(**content)
        if not all(isinstance(value, str) for value in content.values()):
            raise ValueError("it holds something else than texts")
        if not place.name.startswith(_OURS):
            raise ValueError(f"{place.name!r} is no study of gatl's")
        require_address(f"storage in {path}", place.storage)
        return place


def _new_place(folder: Path, storage: str) -> Place:
    """Choose and keep the name of a new study: other folders may be called the same."""
    name = f"{printable('/'.join(folder.parts[-3:]))[-200:]} {secrets.token_hex(8)}"
    place = Place(storage, f"{_OURS}{name}")
    write_whole(folder / PLACE, f"{json.dumps(asdict(place))}\n".encode())
    return place


def located(folder: Path, config: Config, trusted: Collection[str]) -> Config:
    """Return a configuration with the place of the record of a run that goes on.

    Args:
        folder: The run folder.
        config: Its configuration.
        trusted: What the user has said to trust; a folder by itself connects to nothing.

    Raises:
        UserError: If the record lies in a database that is not among that.
    """
    record, place = record_in(folder), place_of(folder)
    storage = place.storage if place else None if record else config.study.storage
    _require_trusted(folder, storage, trusted)
    return replace(config, study=StudyConfig(storage))


def _require_trusted(folder: Path, storage: str | None, trusted: Collection[str]) -> None:
    if storage is not None and storage not in trusted:
        word = shlex.quote(f"trust={storage}")
        raise UserError(f"The record of {folder} lies in {storage}: give {word} to connect.")


def remove_scratch(folder: Path) -> None:
    """Remove what a run needs only while it lasts, and leaves if it is killed."""
    for name in (IMAGES, FEATURES):
        shutil.rmtree(folder / name, ignore_errors=True)


def return_to_start(folder: Path) -> None:
    """Go where a run was started, because its relative paths begin there.

    Stay here if that is not known, or not there any more. No process that is started from
    now on imports what lies there: the folder says where it is, and anybody may have written that.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    path = folder / ".hydra" / "hydra.yaml"
    node = read_yaml(path) if path.is_file() else None
    for name in ("hydra", "runtime", "cwd"):
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, str):
        with contextlib.suppress(OSError, ValueError):
            os.chdir(node)


def _mend(journal: Path) -> None:
    """Remove a dead driver's journal lock and cut off a torn last line.

    A torn line can still be read past, but the next write would fuse with it,
    and then the journal no longer opens. A power cut can leave zeros within a line.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        last = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
        if b"\0" in content[last:end]:
            end = last
        if end < len(content):
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())


class _Journal(JournalFileBackend):
    """Optuna's journal, of which a write that fails leaves nothing, so that others can follow."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines, and wait until they are on the disk."""
        path = Path(self._file_path)
        end = path.stat().st_size
        with writing(path):
            try:
                super().append_logs(logs)
            except OSError:
                os.truncate(path, end)
                raise


def open_study(
    folder: Path, sampler: optuna.samplers.BaseSampler, database: Database | None = None
) -> optuna.Study:
    """Open the study of a run folder that this process holds, or create it.

    Args:
        folder: The run folder, see `held`.
        sampler: The search strategy.
        database: Where the study is to be, or is already; else it is in the folder.

    Returns:
        The study, in the folder called ``gatl``; it minimises val_loss.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if database is not None:
        place = place_of(folder) or _new_place(folder, database.address)
        with whole(place):
            if (folder / HISTORY).exists():  # which is begun behind the study
                _require_there(database, place, folder)
            return _sound(database, place.name, sampler)
    journal = folder / JOURNAL
    _mend(journal)
    with whole(journal):
        return _sound(JournalStorage(_Journal(str(journal))), "gatl", sampler)


def _sound(storage: BaseStorage, name: str, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        sampler=sampler,
        pruner=optuna.pruners.NopPruner(),
        direction="minimize",
        load_if_exists=True,
    )
    require_sound(study)
    return study


def _require_there(database: Database, place: Place, folder: Path) -> None:
    """Refuse to begin a search anew in the folder of one whose record is gone."""
    try:
        database.get_study_id_from_name(place.name)
    except KeyError as error:
        raise UserError(
            f"{place} is gone, which is the record of {folder}: restore it, or begin a new run."
        ) from error


@contextlib.contextmanager
def read_study(folder: Path, trusted: Collection[str]) -> Iterator[optuna.Study | None]:
    """Open the study of a run folder to read it, though another process may hold the folder.

    Args:
        folder: The run folder, which has a record.
        trusted: See `located`.

    Yields:
        The study; None if the run has only begun.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if (place := place_of(folder)) is not None:
        _require_trusted(folder, place.storage, trusted)
        with connected(place.storage, new=False) as database:
            assert database is not None
            try:
                study = optuna.load_study(study_name=place.name, storage=database)
            except KeyError:
                yield None
                return
            require_sound(study)
            yield study
        return
    if not (folder / JOURNAL).stat().st_size:
        yield None
        return
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.load_study(study_name="gatl", storage=storage)
    require_sound(study)
    yield study


def require_sound(study: optuna.Study) -> None:
    """Look at all of a record: anybody may have written it.

    Raises:
        TypeError, ValueError: If no search can have.
    """
    if study.directions != [StudyDirection.MINIMIZE]:
        raise ValueError("the study does not minimise one value")
    numbers = [study.user_attrs.get(SECONDS, 0.0)]
    for number, trial in enumerate(study.get_trials(deepcopy=False)):
        if trial.number != number:  # a database takes any
            raise ValueError(f"trial {number} is not there")
        kept = trial.user_attrs.get(OUTCOME, {})
        outcome = Outcome.from_json({name: kept[name] for name in kept if name not in _BESIDE})
        numbers += [kept.get(SECONDS, 0.0), *trial.params.values()]
        for began, seconds, n_workers in kept.get(FITS, []):
            numbers += [began, seconds, n_workers]
        numbers += [*trial.intermediate_values.values(), *(trial.values or ())]
        complete = trial.state is TrialState.COMPLETE
        if complete and (len(trial.values or ()) != 1 or (kept and outcome.val_loss is None)):
            raise ValueError(f"trial {trial.number} is COMPLETE without a val_loss")
        if trial.state is TrialState.WAITING:
            raise ValueError(f"trial {trial.number} is WAITING")
    for value in numbers:
        if not (type(value) in (int, float) and abs(value) <= LARGEST):
            raise ValueError(f"it holds the number {value!r}")


def require_genes(study: optuna.Study, distributions: Mapping[str, BaseDistribution]) -> None:
    """Look whether the trials of a record have the genes of a search.

    Raises:
        ValueError: If one has others, or its genes have other ranges.
    """
    for trial in study.get_trials(deepcopy=False):
        known = trial.distributions.items() <= distributions.items()
        inside = all(
            gene._contains(gene.to_internal_repr(trial.params[name]))
            for name, gene in trial.distributions.items()
        )
        # One that was cut off while it was asked for has no genes, or not all of them.
        all_there = len(trial.params) == len(distributions) or not trial.state.is_finished()
        if not (known and inside and all_there):
            raise ValueError(f"the genes of trial {trial.number} are not those of the search")


# Each write to the journal waits for the disk, and reading all trials takes the longer the more
# there are. So a trial costs three writes: its beginning, genes included, its outcome, its state;
# and what follows finds it by its number alone.


def begin(
    study: optuna.Study, genes: Mapping[str, Value], distributions: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    """Record a trial, RUNNING, as `Study.ask` would; a kill leaves all of it or nothing."""
    trial = optuna.trial.create_trial(
        state=TrialState.RUNNING, params=dict(genes), distributions=dict(distributions)
    )
    return study._storage.get_trial(study._storage.create_new_trial(study._study_id, trial))


def reach(
    study: optuna.Study,
    number: int,
    outcome: Outcome,
    seconds: float = 0.0,
    fits: Sequence[FitTime] = (),
) -> FrozenTrial:
    """Record what a trial, which goes on RUNNING, has at a rung; see `tell`."""
    trial = _trial_id(study, number)
    assert outcome.val_loss is not None
    # The attribute last: of a trial that has it, the loss at the rung is known.
    study._storage.set_trial_intermediate_value(trial, outcome.epochs, outcome.val_loss)
    study._storage.set_trial_user_attr(trial, OUTCOME, _kept(outcome, seconds, fits))
    return study._storage.get_trial(trial)


def tell(
    study: optuna.Study,
    number: int,
    outcome: Outcome,
    seconds: float = 0.0,
    fits: Sequence[FitTime] = (),
) -> FrozenTrial:
    """End a trial in the study: COMPLETE with its val_loss, PRUNED, or FAIL with its reason.

    Args:
        study: The study.
        number: The trial's number.
        outcome: Of its fit.
        seconds: That the search has taken up to now, see `seconds_of`.
        fits: Those of the trial: none if it got another's result, several if it stood at rungs.

    Returns:
        The trial.
    """
    trial = _trial_id(study, number)
    # The attribute first: a kill between the two leaves the trial RUNNING, to be evaluated again.
    study._storage.set_trial_user_attr(trial, OUTCOME, _kept(outcome, seconds, fits))
    if outcome.val_loss is None:
        study.tell(number, state=TrialState.FAIL)
    elif outcome.pruned:
        study.tell(number, state=TrialState.PRUNED)
    else:
        study.tell(number, outcome.val_loss)
    return study._storage.get_trial(trial)


def _kept(outcome: Outcome, seconds: float, fits: Sequence[FitTime]) -> dict[str, Any]:
    """Return the user attribute of a trial that has ended, or has reached a rung."""
    times = [(round(began, 3), round(spent, 3), n_workers) for began, spent, n_workers in fits]
    return outcome.to_json() | {SECONDS: seconds, FITS: times}


def _trial_id(study: optuna.Study, number: int) -> int:
    """Return a trial's key in the storage."""
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)


def outcome_of(trial: FrozenTrial) -> Outcome:
    """Return the recorded outcome of a trial that has ended, or has reached a rung."""
    recorded = trial.user_attrs.get(OUTCOME, {})
    return Outcome(**{name: value for name, value in recorded.items() if name not in _BESIDE})


def fits_of(trial: FrozenTrial) -> list[FitTime]:
    """Return when the fits of a trial ran that has ended, or has reached a rung."""
    recorded = trial.user_attrs.get(OUTCOME, {}).get(FITS, [])
    return [(began, seconds, n_workers) for began, seconds, n_workers in recorded]


def told_after(trial: FrozenTrial) -> float:
    """Return the seconds that the search had taken when a trial's result came."""
    return float(trial.user_attrs.get(OUTCOME, {}).get(SECONDS, 0.0))


def seconds_of(study: optuna.Study) -> float:
    """Return the seconds that a search has taken, all sessions together, up to its last result.

    The study knows them at the end of a session; of one that was killed, its trials do.
    """
    outcomes = (trial.user_attrs.get(OUTCOME, {}) for trial in study.get_trials(deepcopy=False))
    return max(float(known.get(SECONDS, 0.0)) for known in (study.user_attrs, *outcomes))


def any_complete(folder: Path) -> bool:
    """Whether a run has a COMPLETE trial, of which a final model could be made."""
    history = folder / HISTORY
    if not history.is_file():
        return False
    with history.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return any(row.get("state") == TrialState.COMPLETE.name for row in csv.DictReader(file))


class History:
    """``history.csv``: a row for each ended trial, in the order of their numbers.

    Rows behind the first trial that has not ended are written again when it has.
    The file is written anew from the study whenever it is opened.

    Args:
        folder: The run folder.
        genes: The names of the genes, a column each.
    """

    def __init__(self, folder: Path, genes: Sequence[str]) -> None:
        self._path = folder / HISTORY
        self._genes = tuple(genes)
        self._rows = 0  # trials 0 ... n - 1 have their rows for good
        self._end = 0  # of those rows, in bytes
        self._behind: dict[int, bytes] = {}  # rows that are written again, by number
        with writing(self._path):
            self._path.write_bytes(b"")
        self._end = self._write([csv_of([self.columns])])

    @property
    def columns(self) -> tuple[str, ...]:
        """The header."""
        results = "val_loss fitness val_accuracy epochs duration_s trainable_params total_params"
        return (
            *("number", "generation", "state"),
            *self._genes,
            *results.split(),
            *("reused_from", "error", "micro_batch", "started_s", FITS),
        )

    def update(
        self, trials: Sequence[FrozenTrial], generation: Callable[[int], int | None]
    ) -> None:
        """Write the rows of the trials that have ended since.

        Args:
            trials: All trials of the study, by number.
            generation: From a number to the generation, where the strategy has any.
        """
        for trial in trials[self._rows :]:
            if trial.number not in self._behind and trial.state.is_finished():
                self._behind[trial.number] = csv_of([self._row(trial, generation(trial.number))])
        first = self._rows
        while self._rows in self._behind:
            self._rows += 1
        self._end = self._write(self._behind.pop(number) for number in range(first, self._rows))
        if self._behind:
            self._write(self._behind[number] for number in sorted(self._behind))

    def _row(self, trial: FrozenTrial, generation: int | None) -> tuple[object, ...]:
        outcome, fits = outcome_of(trial), fits_of(trial)
        return (
            *(trial.number, generation, trial.state.name),
            *(trial.params.get(gene) for gene in self._genes),
            outcome.val_loss,
            None if outcome.val_loss is None else fitness(outcome.val_loss),
            outcome.val_accuracy,
            outcome.epochs,
            round(outcome.duration_s, 3),
            outcome.trainable_params,
            outcome.total_params,
            outcome.reused_from,
            outcome.error,
            outcome.micro_batch,
            fits[0][0] if fits else None,
            json.dumps(fits) if fits else None,
        )

    def _write(self, rows: Iterable[bytes]) -> int:
        """Write rows behind those that stay; return where they end."""
        with writing(self._path), self._path.open("r+b") as file:
            file.seek(self._end)
            file.write(b"".join(rows))
            return file.tell()
