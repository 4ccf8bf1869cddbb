"""What a run was made with: versions and hardware."""

import os
import platform
from importlib.metadata import version
from typing import Any

import psutil
import torch

_PACKAGES = ("gatl", "torch", "torchvision", "lightning", "optuna", "hydra-core", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of what takes part; torch's names its build, too."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "torch": torch.__version__}


def hardware() -> dict[str, Any]:
    """Return the machine, and its GPUs by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }
