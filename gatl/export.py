"""``python -m gatl.export``: the final model of a run as ONNX, for programs without Python.

Shapes: B images of S by S pixels, K classes.
"""

import json
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from gatl import __version__
from gatl.cli import (
    compose_resumed,
    folder_named,
    help_requested,
    one_line_errors,
    settings_in,
)
from gatl.config import checked
from gatl.data.decode import UndecodableImage, to_rgb
from gatl.data.splits import complete_splits
from gatl.errors import UserError
from gatl.files import checkpoint_in, write_whole
from gatl.progress import new_console
from gatl.trust import require_inside, whole, words_of

if TYPE_CHECKING:  # torch takes seconds, which a typing error need not wait for
    from gatl.inference import Model, Pixels

CHECKED = 64
"""Images on which the exported network is compared with the checkpoint's."""
TOLERANCE = 1e-4
"""By which probabilities may differ."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""Those of the extra `export`."""

HELP = """\
gatl.export writes the final model of a run as ONNX, and compares the two.

  python -m gatl.export run=outputs/DATE/TIME [format=onnx] [trust=NAME,NAME]

model.onnx in the run folder takes `images`, uint8 (B, S, S, 3): RGB, scaled and
cropped to the S pixels of the training. All else is inside: it gives
`probabilities`, float32 (B, K). Its metadata hold the K classes; so does
classes.json beside it.
It needs pip install 'gatl[export]'."""


def to_onnx(model: "Model") -> bytes:
    """Return a model as an ONNX file, normalisation and softmax inside.

    Its input `images` is uint8 (B, S, S, 3), RGB, any B; its output `probabilities` float32
    (B, K). The metadata `classes` and `preprocessing` are JSON.

    Raises:
        UserError: If the network cannot be exported.
    """
    import torch

    size = model.image_size
    network = model.network.to("cpu")
    images = torch.zeros(2, size, size, 3, dtype=torch.uint8)  # of one, B would be fixed
    try:
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: "B"}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # as it is with dynamo=True
        program.model.doc_string = usage(model)
        program.model.metadata_props.update(
            classes=json.dumps(model.classes),
            preprocessing=json.dumps({"image_size": size, "interpolation": model.interpolation}),
            gatl=__version__,
        )
        return bytes(program.model_proto.SerializeToString())
    except Exception as error:  # what an exporter raises for a network that it cannot read
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"The network cannot be exported ({type(error).__name__}: {message})."
        ) from error


def usage(model: "Model") -> str:
    """Say in a sentence what a program must do to an image itself."""
    return (
        f"Turn an image upright (EXIF), convert it to 8-bit RGB, scale its shorter side to "
        f"{model.image_size} pixels ({model.interpolation}, antialiased), crop the longer one "
        f"about its centre: uint8 (B, {model.image_size}, {model.image_size}, 3)."
    )


def difference(model: "Model", onnx: bytes, images: "Pixels") -> float:
    """Return by how much the probabilities of the two differ at most.

    Args:
        model: The model that was exported.
        onnx: What `to_onnx` made of it.
        images: At least 2, uint8 (B, S, S, 3); they are seen at once, and the first alone.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    return max(
        float(np.abs(model.probabilities([*batch]) - session.run(None, {"images": batch})[0]).max())
        for batch in (images, images[:1])
    )


def images_of(folder: Path, model: "Model", trusted: Collection[str]) -> "Pixels | None":
    """Return some test images of a run, prepared; None if they are not there any more."""
    try:
        with whole(folder):  # not `resumed`: nothing here connects to where the fits ran
            config = checked(compose_resumed(folder, (), trusted))
        source = complete_splits(instantiate(config.data.source), config.data.split_seed)
    except (UserError, InstantiationException):  # Hydra wraps what a data source raises
        return None
    assert source.test is not None
    found: list[npt.NDArray[np.uint8]] = []
    n = len(source.test)
    for i in np.unique(np.linspace(0, n - 1, CHECKED).astype(int)).tolist():  # of all classes
        try:
            found.append(to_rgb(source.test.images[i], model.image_size, model.interpolation))
        except UndecodableImage:
            continue
    return np.stack(found) if len(found) > 1 else None


def export(folder: Path, trusted: Collection[str] = ()) -> None:
    """Write ``model.onnx`` and ``classes.json`` into a run folder.

    Args:
        folder: The run folder.
        trusted: Functions that are not gatl's own, which the folder may name.

    Raises:
        UserError: If there is no final model, if it cannot be exported, or if what was
            exported computes something else; then nothing is written.
    """
    if not folder.is_dir():
        raise UserError(f"run={folder} is no run folder.")
    checkpoint_in(folder)
    require_inside(folder)
    for name in PACKAGES:
        if find_spec(name) is None:
            raise UserError(f"gatl.export needs the package {name}: pip install 'gatl[export]'.")
    from gatl.evaluation import silence
    from gatl.inference import load

    silence()
    console = new_console()
    model = load(folder, trust=",".join(trusted))
    onnx = to_onnx(model)
    images, kind = images_of(folder, model, trusted), "of the test split"
    if images is None:
        shape, kind = (CHECKED, model.image_size, model.image_size, 3), "drawn at random"
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if not (differ := difference(model, onnx, images)) <= TOLERANCE:  # nor if it is NaN
        raise UserError(
            f"The exported network's probabilities differ by up to {differ:.2g} from the "
            f"checkpoint's, more than {TOLERANCE:g}: it is not written."
        )
    write_whole(folder / "model.onnx", onnx)
    classes = json.dumps(model.classes, indent=2) + "\n"
    write_whole(folder / "classes.json", classes.encode())
    console.print(
        f"On {len(images)} images {kind}, probabilities differ by at most {differ:.1g} from the "
        f"checkpoint's.\nTo use it: {usage(model)}\n"
        f"Model:   {folder / 'model.onnx'}\nClasses: {folder / 'classes.json'}",
        soft_wrap=True,
    )


def main() -> None:
    """Export what the command line names."""
    words = sys.argv[1:]
    if help_requested(words, HELP):
        return
    with one_line_errors():
        trusted, words = words_of(words)
        given = settings_in(words, needed=("run",), optional=("format",))
        if given.get("format", "onnx") != "onnx":
            raise UserError(f"format must be onnx, but got {given['format']}.")
        export(folder_named(given["run"]), trusted)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
