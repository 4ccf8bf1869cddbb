"""gatl finds by a genetic algorithm how to fine-tune a pretrained CNN on your images."""

import importlib.util
import sys

__version__ = "0.1.0"


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
