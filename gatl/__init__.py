"""gatl finds by a genetic algorithm how to fine-tune a pretrained CNN on your images."""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatl.inference import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the language's protocol
    """Import `load` when it is first asked for: it needs torch, which takes seconds."""
    if name == "load":
        from gatl.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _require_packages() -> None:
    """End in one line if the Python that runs a command lacks what gatl is made of."""
    for name in ("hydra", "lightning", "optuna", "torch"):
        if importlib.util.find_spec(name) is None:
            sys.exit(
                f"gatl needs the package {name}: enter its environment (source "
                ".venv/bin/activate), or install it (pip install -e .)."
            )


if sys.argv[:1] == ["-m"]:  # so only while python -m looks for the command
    _require_packages()
