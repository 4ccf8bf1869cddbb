"""``python -m gatl.predict``: what the final model of a run says of new images."""

import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from gatl.cli import folder_named, help_requested, one_line_errors, settings_in
from gatl.data.decode import UndecodableImage
from gatl.data.folder import images_below
from gatl.errors import UserError, printable
from gatl.files import checkpoint_in, csv_of, is_unwritable, write_whole
from gatl.progress import format_count
from gatl.trust import words_of

if TYPE_CHECKING:  # torch takes seconds, which a typing error need not wait for
    from gatl.inference import Model

BATCH = 64
THREADS = 4
"""They decode; the network has its own."""
TOP_K = 5
FORMATS = (".csv", ".json")

HELP = f"""\
gatl.predict says which classes new images are of, by the final model of a run.

  python -m gatl.predict run=outputs/DATE/TIME images=PATH [KEY=VALUE ...]

  run=     the run folder, or a checkpoint such as its best.ckpt
  images=  an image, a folder with all that lie below it, or a glob in quotes,
           as in 'images=photos/**/*.jpg'
  output=  a file that ends in {" or ".join(FORMATS)}; otherwise CSV is printed
  top_k=   so many classes of each image, the most probable first (default:
           {TOP_K}, or all if there are fewer)
  trust=   NAME,NAME: functions that are not gatl's own, which the model of
           somebody else may call to build its network; see SECURITY.md

The columns are path, label, probability, then label_2, probability_2 and so on.
Images are prepared as those of the training were. An image that cannot be read
has a line of its own; the exit status is 1 then, and the others are there."""


class Prediction(NamedTuple):
    """What the model says of an image.

    Attributes:
        path: The image.
        top: The most probable classes with their probabilities, falling.
    """

    path: Path
    top: list[tuple[str, float]]


def find_images(text: str) -> list[Path]:
    """Return the images that a user names: a file, those below a folder, or a glob's files.

    Raises:
        UserError: If there are none, or a folder cannot be read.
    """
    folder_named(text)  # its user must exist
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            found = images_below(path)
        elif os.path.lexists(path):
            found = [path]
        else:
            # Path.glob takes no absolute pattern
            matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
            found = sorted(match for match in matches if not match.is_dir())
    except OSError as error:
        raise UserError(f"images={text} cannot be read: {error.strerror}.") from error
    if not found:
        raise UserError(f"images={text} names no image: give a file, a folder or a glob.")
    return found


def predictions(
    model: "Model", paths: Sequence[Path], top_k: int
) -> Iterator[Prediction | UndecodableImage]:
    """Yield what the model says of each image, in order, or why it cannot be read.

    A batch is decoded while the network sees the one before.

    Args:
        model: The model.
        paths: The images.
        top_k: Classes of each image, in [1, K].
    """

    def decode(path: Path) -> npt.NDArray[np.uint8] | UndecodableImage:
        try:
            return model.pixels(path)
        except UndecodableImage as error:
            return error

    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = pool.map(decode, batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            decoded, ahead = list(ahead), pool.map(decode, following)
            readable = [image for image in decoded if isinstance(image, np.ndarray)]
            rows: Iterator[npt.NDArray[np.float32]] = iter(
                model.probabilities(readable) if readable else ()
            )
            for path, image in zip(batch, decoded, strict=True):
                if isinstance(image, UndecodableImage):
                    yield image
                else:
                    row = next(rows)
                    best = np.argsort(-row, kind="stable")[:top_k].tolist()
                    yield Prediction(path, [(model.classes[i], float(row[i])) for i in best])


def as_csv(found: Sequence[Prediction], top_k: int) -> bytes:
    """Write predictions as CSV, a row for each image; see the columns in `HELP`."""
    more = [f"{name}_{i}" for i in range(2, top_k + 1) for name in ("label", "probability")]
    rows = [
        (path, *(cell for label, p in top for cell in (label, f"{p:.6f}"))) for path, top in found
    ]
    return csv_of([("path", "label", "probability", *more), *rows])


def as_json(found: Sequence[Prediction]) -> bytes:
    """Write predictions as a JSON list: path, label, probability, and all of the top k."""
    rows: list[dict[str, object]] = []
    for path, top in found:
        classes = [{"label": label, "probability": round(p, 6)} for label, p in top]
        rows.append({"path": str(path), **classes[0], "top_k": classes})
    return (json.dumps(rows, indent=2) + "\n").encode()


def predict(run: Path, images: str, output: Path | None, top_k: int | None, trust: str) -> bool:
    """Predict, then write or print the results.

    Args:
        run: A run folder or a checkpoint.
        images: What the user named.
        output: A file that ends in one of `FORMATS`; None prints CSV.
        top_k: At least 1, or None for the default; there are no more than classes.
        trust: See `gatl.inference.load`.

    Returns:
        Whether all images could be read.

    Raises:
        UserError: If there is no such model, no image, or the file cannot be written.
    """
    checkpoint_in(run)
    paths = find_images(images)
    from gatl.evaluation import silence
    from gatl.inference import load

    silence()
    model = load(run, trust=trust)
    top_k = min(top_k or TOP_K, len(model.classes))
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    found: list[Prediction] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Predicting", total=len(paths))
        for prediction in predictions(model, paths, top_k):
            if isinstance(prediction, Prediction):
                found.append(prediction)
            else:
                console.print(str(prediction), soft_wrap=True)
            bar.advance(task)
    if output is None:
        _print(found, top_k)
    else:
        json_asked = output.suffix.lower() == ".json"
        _write(output, as_json(found) if json_asked else as_csv(found, top_k))
        console.print(f"{format_count(len(found), 'image')} predicted: {output}", soft_wrap=True)
    if n_bad := len(paths) - len(found):
        console.print(f"{n_bad} of {format_count(len(paths), 'image')} could not be read.")
    return not n_bad


def _print(found: Sequence[Prediction], top_k: int) -> None:
    """Print predictions; a terminal gets names that cannot command it, a file what they are."""
    if sys.stdout.isatty():
        found = [
            Prediction(Path(printable(path)), [(printable(label), p) for label, p in top])
            for path, top in found
        ]
    try:
        sys.stdout.buffer.write(as_csv(found, top_k))
        sys.stdout.flush()
    except BrokenPipeError:  # as when it is piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        if is_unwritable(error):
            raise
        raise UserError(f"output={path} cannot be written: {error.strerror}.") from error


def _output(text: str) -> Path:
    """Check, before anything is computed, the file that a user names."""
    path = folder_named(text)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"output={text} must end in {' or '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise UserError(f"output={text} cannot be written: there is no folder {path.parent}.")
    return path


def _top_k(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise UserError(f"top_k must be a whole number, at least 1, but got {text!r}.")
    return int(text)


def main() -> None:
    """Predict what the command line names."""
    words = sys.argv[1:]
    if help_requested(words, HELP):
        return
    with one_line_errors():
        trusted, words = words_of(words)
        given = settings_in(words, needed=("run", "images"), optional=("output", "top_k"))
        whole = predict(
            folder_named(given["run"]),
            given["images"],
            _output(given["output"]) if "output" in given else None,
            _top_k(given["top_k"]) if "top_k" in given else None,
            ",".join(trusted),
        )
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
