"""From a chromosome to its val_loss: one `Trainer.fit` each, on local workers."""

import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableSequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.synchronize import Event
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import TorchCheckpointIO

from gatl.classifier import Classifier, Diverged
from gatl.config import Config, EvaluatorConfig, TrainerConfig
from gatl.data.images import PreparedData
from gatl.data.module import ImageData, class_weights
from gatl.errors import UserError
from gatl.features import CachedPrefix, cached_prefix
from gatl.files import is_passing, is_unwritable, write_whole, writing
from gatl.launching import jobs_at_once
from gatl.loggers import Result, build_logger
from gatl.models.layered import LayeredNetwork
from gatl.models.weight_files import read_weights
from gatl.models.weights import LoadReport, differences, load, require_backbone
from gatl.outcome import Outcome
from gatl.streams import Purpose, generator

# What a process takes, in 32 bits on a CPU. Measured with SE-DenseNet-121 at 224 pixels, L = 58,
# F = 0: 0.9 GiB beside the images; 2,894 bytes for each pixel of a training batch (its narrow kin
# at 64 pixels: 1,408), and 290 for each of a validation batch.
PROCESS_BYTES = 2**30
TRAINING_BYTES_PER_PIXEL = 3072
VALIDATION_BYTES_PER_PIXEL = 320
RUNG = "rung.ckpt"
"""In the folder of a fit that waits at a rung."""
EVAL_BATCH_SIZE = 128
"""Validation or test images a batch; nothing that is measured depends on it."""

PARTS = 2
"""Parts of a batch, when memory did not suffice for the whole."""

DIED_TWICE = "its worker process died twice, killed perhaps for want of memory"
OUT_OF_MEMORY = "out of memory: lower data.batch_size or data.image_size"
# How libraries say that memory ran out, beside raising an exception of that name.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory"
    r"|std::bad_alloc|could not create a primitive(?! descriptor)"  # oneDNN's, of a convolution
    r"|(CUDA error|MPS backend)[ :]+out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED)"
)


MOMENT = 0.1
"""Seconds until a process that was killed counts as dead, on a busy machine too."""
ATTEMPTS = 5
"""To start a worker, one kill of whoever starts it each."""


class FitStopped(Exception):
    """A fit was cut off on request."""


class Flag(Protocol):
    """What tells a fit to stop: an event of threads, or of processes."""

    def is_set(self) -> bool:
        """Whether it shall."""


class StopOnRequest(Callback):
    """Cut a fit off after the batch, of training or validation, in which the flag is set."""

    def __init__(self, stop: Flag) -> None:
        self._stop = stop

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Look at the flag."""
        if self._stop.is_set():
            raise FitStopped

    on_train_batch_end = on_validation_batch_end = check


class SeededEpochs(Callback):
    """Draw an epoch's augmentation and dropout from the fit's seed and its number alone.

    So a training that goes on from a checkpoint is the one that was never cut off.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Seed torch's global generators."""
        stream = generator(self._seed, Purpose.FIT, trainer.current_epoch, 1)
        torch.manual_seed(int(stream.integers(2**32)))


class Watched(Callback):
    """Tells after each batch how many epochs of a training are done, such as 1.25."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Count the batches: each is a step."""
        self._tell(trainer.global_step / trainer.num_training_batches)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole, as `write_whole` does.

    Lightning's own lie in the folder for temporary files first, on another disk perhaps, and
    reach no disk for sure.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ANN401 - the base class's type
    ) -> None:
        """Write a checkpoint, in a folder that may have to be made."""
        content = io.BytesIO()  # torch hides why a file cannot be written
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), content.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint; None if there is none, or it is damaged."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if is_passing(error) or is_out_of_memory(error):
            raise
        return None
    return content


@dataclass(frozen=True)
class Fit:
    """One fit that is asked for.

    Attributes:
        genes: The chromosome by name.
        epochs: The fidelity, or the rung up to which it goes.
        seed: Of its weights, order, augmentation and dropout; see `fit_seed`.
        folder: Where its logs go. If `RUNG` lies there, whole, it goes on from that.
        goes_on: Whether to leave such a checkpoint.
    """

    genes: Mapping[str, float]
    epochs: int
    seed: int
    folder: Path
    goes_on: bool = False


def fit_seed(seed: int, purpose: Purpose, genes: Mapping[str, float], index: int = 0) -> int:
    """Return the seed of a fit, which depends on these arguments alone.

    Args:
        seed: The run's seed, in [0, 2**32), as the result.
        purpose: FIT for the search's own, REEVALUATION or FINAL.
        genes: The canonical chromosome by name.
        index: Tells re-evaluations of one chromosome apart.
    """
    digest = hashlib.sha256(json.dumps([genes, index], sort_keys=True).encode()).digest()
    a, b = (int.from_bytes(digest[i : i + 4], "big") for i in (0, 4))
    return int(generator(seed, purpose, a, b).integers(2**32))


def resolve_precision(config: TrainerConfig) -> str:
    """Return Lightning's name of the precision that suits the device.

    Raises:
        UserError: If the device that was asked for is missing or cannot do it.
    """
    gpu = uses_cuda(config)
    if config.accelerator == "gpu" and not gpu:
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU: use auto or cpu.")
    if config.precision == "16-mixed" and not gpu:
        raise UserError(
            "trainer.precision=16-mixed needs a GPU, and torch sees none that it may use: "
            "use auto, 32 or bf16-mixed."
        )
    if config.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator=mps, but torch sees no MPS device: use auto or cpu.")
    if config.precision != "auto":
        return "32-true" if config.precision == "32" else config.precision
    if not gpu:
        return "32-true"
    # GPUs before Ampere emulate bfloat16, slower than the 32 bits that it is to replace.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if native else "16-mixed"


def uses_cuda(config: TrainerConfig) -> bool:
    """Return whether fits run on CUDA devices."""
    return config.accelerator in ("auto", "gpu") and torch.cuda.is_available()


def silence() -> None:
    """Keep Lightning from repeating its tips with every fit, and Pillow from warning of files."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Of a file, Pillow says either that it cannot be decoded, or nothing that matters.
    warnings.filterwarnings("ignore", module=r"(lightning|PIL)\..*")


def build_classifier(
    config: Config, data: PreparedData, genes: Mapping[str, float]
) -> tuple[Classifier, LoadReport | None]:
    """Build the classifier of a chromosome with its weights loaded; seed torch before.

    Returns:
        The classifier, and what was loaded into it; None if all of it starts random.
    """
    weights = class_weights(data.train.labels, len(data.classes))
    classifier = Classifier(
        network=config.model.network,
        genes=dict(genes),
        classes=list(data.classes),
        preprocessing=config.preprocessing,
        class_weights=[float(w) for w in weights] if config.data.class_weights else None,
    )
    return classifier, load_pretrained(config, classifier.network)


def load_pretrained(config: Config, network: LayeredNetwork) -> LoadReport | None:
    """Load what ``model.weights`` names into a network.

    Returns:
        What was loaded; None for ``none``.

    Raises:
        UserError: If the weights cannot be had or read, or are another network's.
    """
    weights = read_weights(config.model.weights, config.model.sources)
    if weights is None:
        return None
    try:
        require_backbone(weights.card, config.model.network)
        report = load(network, weights)
    except UserError as error:
        model, spec = config.model.name, config.model.weights
        raise UserError(f"model.weights={spec} with model={model}: {error}") from error
    notes = differences(weights.card, config.preprocessing)
    return replace(report, notes=(*report.notes, *notes))


def build_data(config: Config, data: PreparedData, seed: int, n_parts: int = 1) -> ImageData:
    """Build the batches of one fit; their order depends on the seed and the epoch.

    Validation and test batches are as many times smaller as training batches have parts.
    """
    return ImageData(
        data,
        batch_size=config.data.batch_size,
        augment=config.data.augment,
        mean=config.model.mean,
        std=config.model.std,
        seed=seed,
        eval_batch_size=EVAL_BATCH_SIZE // n_parts,
    )


def build_cache(
    config: Config,
    data: PreparedData,
    classifier: Classifier,
    report: LoadReport | None,
    stopper: StopOnRequest,
) -> list[CachedPrefix]:
    """Build what lets a fit start behind its frozen prefix; nothing where that cannot be."""
    settings = {
        "network": config.model.network,
        "preprocessing": config.preprocessing,
        "precision": resolve_precision(config.trainer),
    }
    return cached_prefix(
        data,
        classifier,
        report,
        augment=config.data.augment,
        settings=settings,
        check=stopper.check,
    )


def build_trainer(
    config: Config, epochs: int, folder: Path, callbacks: list[Callback], device: int, **more: Any
) -> lightning.Trainer:
    """Build a silent Trainer that logs into ``folder`` by the configured logger."""
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator=config.trainer.accelerator,
        devices=[device] if uses_cuda(config.trainer) else 1,
        precision=resolve_precision(config.trainer),  # type: ignore[arg-type]
        deterministic=config.trainer.deterministic,
        logger=build_logger(config, folder),
        callbacks=[*callbacks, Result()],
        plugins=[WholeCheckpoints()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **more,
    )


class Fitter:
    """Runs fits one after another, in the process and thread that calls it.

    Args:
        config: The run's configuration.
        data: The decoded images.
        stop: Set to cut the running fit off.
        device: Index of the GPU to use, where there is one.
        tell: Called after each batch with the epochs that the running fit has done.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        stop: Flag,
        device: int = 0,
        tell: Callable[[float], None] = lambda epochs: None,
    ) -> None:
        self._config, self._data, self._stop, self._device = config, data, stop, device
        self._tell = tell

    def __call__(self, fit: Fit) -> Outcome:
        """Run one fit; once more in parts of batches, if memory runs out.

        Returns:
            Its outcome. A failure is an outcome too; its traceback goes to
            ``error.txt`` beside the logs.

        Raises:
            UserError: If no fit of this run can work, for example because the
                weights do not fit the network.
            OSError: If the disk is full: then, too, none can.
        """
        started = time.monotonic()
        outcome = self._try(fit)
        whole = outcome.micro_batch is None
        if outcome.error == OUT_OF_MEMORY and whole and can_be_parted(self._config):
            free_memory()
            outcome = self._try(fit, PARTS)
        if outcome.error == OUT_OF_MEMORY and outcome.micro_batch is not None:
            error = f"{OUT_OF_MEMORY}, or evaluator.workers (half a batch was too much as well)"
            outcome = replace(outcome, error=error)
        _collect()
        if outcome.stopped:
            return outcome
        return replace(outcome, duration_s=time.monotonic() - started)

    def _try(self, fit: Fit, n_parts: int = 1) -> Outcome:
        classifier: Classifier | None = None
        checkpoint = fit.folder / RUNG
        try:
            kept = read_checkpoint(checkpoint)
            if kept is not None:  # what began in parts ends in parts
                n_parts = max(n_parts, kept.get("n_parts", 1))
            torch.manual_seed(fit.seed)
            classifier, report = build_classifier(self._config, self._data, fit.genes)
            classifier.train_in_parts(n_parts)
            stopper = StopOnRequest(self._stop)
            cache = build_cache(self._config, self._data, classifier, report, stopper)
            trainer = build_trainer(
                self._config,
                fit.epochs,
                fit.folder,
                [SeededEpochs(fit.seed), stopper, *cache, Watched(self._tell)],
                self._device,
                enable_checkpointing=False,
            )
            with writing(fit.folder):
                trainer.fit(
                    classifier,
                    datamodule=build_data(self._config, self._data, fit.seed, n_parts),
                    ckpt_path=None if kept is None else checkpoint,
                    weights_only=True,
                )
            if fit.goes_on:
                trainer.save_checkpoint(checkpoint)
            best = min(classifier.epochs, key=lambda epoch: epoch["val_loss"])
            outcome = Outcome(
                val_loss=best["val_loss"],
                val_accuracy=best["val_accuracy"],
                uncached=bool(cache) and not classifier.behind_prefix,
            )
        except UserError:
            raise
        except FitStopped:
            return Outcome(stopped=True)
        except Diverged as error:
            outcome = Outcome(error=str(error), diverged=True)
        except Exception as error:  # whatever one fit meets must not end the search
            if is_unwritable(error):
                raise
            write_trace(fit.folder)
            outcome = Outcome(error=reason(error))
        if classifier is None:
            return outcome
        return replace(
            outcome,
            epochs=len(classifier.epochs),
            trainable_params=classifier.network.n_trainable,
            total_params=classifier.network.n_parameters,
            micro_batch=micro_batch(self._config, classifier),
        )


def write_trace(folder: Path) -> None:
    """Keep the traceback of the exception that is handled, in ``error.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "error.txt"
    with writing(path):
        path.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")


def reason(error: Exception) -> str:
    """Say in one line why a fit failed."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, the device's or the machine's."""
    kinds = MemoryError | torch.OutOfMemoryError
    return isinstance(error, kinds) or _NO_MEMORY.search(str(error)) is not None


def micro_batch(config: Config, classifier: Classifier) -> int | None:
    """Return how many images of a batch pass a classifier at once; None for whole batches."""
    n_parts = classifier.n_parts
    return None if n_parts == 1 else -(-config.data.batch_size // n_parts)


def can_be_parted(config: Config) -> bool:
    """Whether no part of a batch is a single image, see `Classifier.train_in_parts`."""
    return config.data.batch_size >= 2 * PARTS


def _collect() -> None:
    """Free what a fit leaves: a Trainer and its module refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory() -> None:
    """Give back what a fit leaves that ran out of memory, so that there is some for another."""
    _collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps what is freed; convolutions map theirs anew
        libc.malloc_trim(0)


class Evaluator(Protocol):
    """Runs fits somewhere. The driver submits at most `n_free` and waits for any.

    A class may have a static method `require`, which takes the configuration and what else stands
    in its YAML: it raises what can be known before images are decoded.
    """

    @property
    def n_workers(self) -> int:
        """How many fits run at once."""

    @property
    def n_free(self) -> int:
        """How many more fits it takes now."""

    def submit(self, key: int, fit: Fit) -> None:
        """Start a fit; ``key`` names it in what `wait` returns."""

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        """Return the fits that have ended, after the first one or ``timeout`` seconds."""

    def epochs_done(self, key: int) -> float:
        """Return how many epochs a running fit has done, such as 1.25; 0 if that is not known."""

    def close(self, *, now: bool = False) -> None:
        """Free the workers, once their fits have ended, or at once if that can be done."""


def took_too_long(settings: EvaluatorConfig, seconds: float) -> Outcome:
    """Return the outcome of a fit that was killed after so many seconds."""
    error = f"killed after evaluator.timeout={settings.timeout}"
    return Outcome(error=error, duration_s=seconds)


_fitter: Fitter  # of a worker process


def _start_worker(
    config: Config,
    data: PreparedData,
    stop: Event,
    device: int,
    epochs: MutableSequence[float],
    worker: int,
) -> None:
    global _fitter
    threading.Thread(target=_end_with_driver, daemon=True).start()
    silence()
    torch.set_num_threads(config.evaluator.threads)
    _fitter = Fitter(config, data, stop, device, functools.partial(epochs.__setitem__, worker))
    gc.collect()
    gc.freeze()  # what is there by now stays: the collection behind each fit need not look at it


def _end_with_driver() -> None:
    """End this worker when nobody will ever ask it for anything again."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()  # ends, too, when a driver that lives gives this worker up
        deadline = time.monotonic() + MOMENT / 2  # who is killed closes files before it is dead
        while _lives(driver.pid) and time.monotonic() < deadline:
            time.sleep(MOMENT / 50)
        if not _lives(driver.pid):
            shutil.rmtree(get_temp_dir(), ignore_errors=True)  # the driver's, where sockets lie
        os._exit(1)


def _lives(pid: int | None) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _fit_in_worker(fit: Fit) -> Outcome:
    return _fitter(fit)


class _Running(NamedTuple):
    """A fit that runs."""

    worker: int
    key: int
    fit: Fit
    since: float  # seconds, as `time.monotonic` has them
    server: int  # the process that started its worker


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes that no Ctrl-C or SIGTERM reaches.

    Signals reach the whole process group; the driver alone decides what they mean. What it
    blocks, the fork server blocks, and a worker from its first moment on.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _fork_server() -> int:
    """Return the id of the process that starts workers; a new one if that was killed."""
    with _signals_blocked():
        forkserver.ensure_running()
    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


class LocalEvaluator:
    """Runs fits on this machine, in processes of their own.

    Each worker is a pool of one, so that one that dies takes no other with it, nor the driver.

    Args:
        config: The run's configuration.
        data: The decoded images; workers map the same file.
        stop: Set to cut the running fits off.
    """

    def __init__(self, config: Config, data: PreparedData, stop: Event) -> None:
        self._config, self._data, self._stop = config, data, stop
        count = config.evaluator.workers
        self._n_workers = auto_workers(config) if count == "auto" else int(count)
        # Worker processes ask for huge pages: a fit takes 6 to 8 % less time with them on Linux.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([__name__])  # so torch is imported once for all
        # Shared memory without a lock: whoever is killed while he writes a number blocks nobody.
        self._epochs = self._processes.RawArray("d", self._n_workers)
        self._pools = [self._pool(worker) for worker in range(self._n_workers)]
        self._idle = list(range(self._n_workers))
        self._running: dict[concurrent.futures.Future[Outcome], _Running] = {}
        self._lost: dict[int, int] = {}  # by key: how often its worker died

    @property
    def n_workers(self) -> int:
        """How many fits run at once."""
        return self._n_workers

    @property
    def n_free(self) -> int:
        """How many more fits it takes now."""
        return len(self._idle)

    def submit(self, key: int, fit: Fit) -> None:
        """Start a fit on an idle worker."""
        worker = self._idle.pop(0)
        self._epochs[worker] = 0.0
        with _signals_blocked():
            future = self._send(worker, fit)
        self._running[future] = _Running(worker, key, fit, time.monotonic(), _fork_server())

    def _send(self, worker: int, fit: Fit) -> concurrent.futures.Future[Outcome]:
        """Give a worker a fit; if it was killed while it was idle, another one in its place.

        The fork server may have been killed, too, perhaps while it started that one.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._pools[worker].submit(_fit_in_worker, fit)
            except (BrokenProcessPool, EOFError, ConnectionError) as error:
                self._replace(worker)
                time.sleep(MOMENT * attempt)
                failed = error
        raise UserError(
            f"No worker process can be started ({reason(failed)}): is there enough memory? "
            "Fewer evaluator.workers take less."
        ) from failed

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        """Return the fits that have ended, after the first one or ``timeout`` seconds.

        Raises:
            UserError: If a fit says that none can work.
            OSError: If the disk is full.
        """
        done, _ = concurrent.futures.wait(
            self._running, timeout, return_when=concurrent.futures.FIRST_COMPLETED
        )
        ended = self._give_up()
        for future in done:
            worker, key, fit, _, server = self._running.pop(future)
            self._idle.append(worker)
            try:
                outcome = future.result()
            except BrokenProcessPool:
                self._replace(worker)
                time.sleep(MOMENT)
                died = server == _fork_server()  # otherwise that was killed, and takes all with it
                self._lost[key] = self._lost.get(key, 0) + died
                if self._stop.is_set():
                    outcome = Outcome(stopped=True)
                elif self._lost[key] < 2:
                    self.submit(key, fit)
                    continue
                else:
                    outcome = Outcome(error=DIED_TWICE)
            self._lost.pop(key, None)
            ended.append((key, outcome))
        return sorted(ended, key=lambda pair: pair[0])

    def epochs_done(self, key: int) -> float:
        """Return how many epochs a running fit has done, such as 1.25; 0 before its first batch."""
        running = (fit.worker for fit in self._running.values() if fit.key == key)
        return float(next((self._epochs[worker] for worker in running), 0.0))

    def _give_up(self) -> list[tuple[int, Outcome]]:
        """Kill the workers of fits that take too long, replace them, and return these fits."""
        settings, now = self._config.evaluator, time.monotonic()
        late = [
            future
            for future, fit in self._running.items()
            if now - fit.since > settings.seconds and not future.done()
        ]
        ended = []
        for future in late:
            fit = self._running.pop(future)
            self._kill(fit.worker)
            self._replace(fit.worker)
            self._idle.append(fit.worker)
            self._lost.pop(fit.key, None)
            ended.append((fit.key, took_too_long(settings, now - fit.since)))
        return ended

    def close(self, *, now: bool = False) -> None:
        """End the workers, once their fits have ended: set ``stop`` to make that soon.

        Args:
            now: Kill worker processes, whatever they do; those whose fits take longer than
                ``evaluator.timeout`` to end are killed in any case.
        """
        if not now:
            limit = min(self._config.evaluator.seconds, threading.TIMEOUT_MAX)
            now = bool(concurrent.futures.wait(self._running, limit).not_done)
        for worker, pool in enumerate(self._pools):
            if now:
                self._kill(worker)
            pool.shutdown(wait=True, cancel_futures=True)

    def _kill(self, worker: int) -> None:
        for process in list((self._pools[worker]._processes or {}).values()):  # None once shut down
            process.kill()

    def _replace(self, worker: int) -> None:
        self._pools[worker].shutdown(wait=False)
        self._pools[worker] = self._pool(worker)

    def _pool(self, worker: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1,
            self._processes,
            _start_worker,
            (
                *(self._config, self._data, self._stop),
                worker % max(1, torch.cuda.device_count()),
                *(self._epochs, worker),
            ),
        )


def auto_workers(config: Config) -> int:
    """Return how many fits this machine can run at once: by GPUs or cores, and by memory.

    Other jobs of a sweep that run beside this one have their part of cores and memory.
    """
    if uses_cuda(config.trainer):
        return int(torch.cuda.device_count())
    if config.trainer.accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return 1  # there is one such device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    batch = max(
        config.data.batch_size * TRAINING_BYTES_PER_PIXEL,
        EVAL_BATCH_SIZE * VALIDATION_BYTES_PER_PIXEL,
    )
    each = PROCESS_BYTES + batch * config.data.image_size**2
    by_memory = psutil.virtual_memory().available // each
    at_once = min((cores or 1) // config.evaluator.threads, int(by_memory))
    return max(1, at_once // jobs_at_once())
