"""The rules of the layout: who may import whom, what starts without torch, what composes."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import gatl
import gatl.conf
from gatl import cli, config

PACKAGE = Path(gatl.__file__).parent
CONF = Path(gatl.conf.__file__).parent

# Of each chain, no part may need a part to its right, not even by way of others.
CHAINS = (
    (("chromosome",), ("strategies",), ("search",), ("__main__",)),
    (("data", "models"), ("classifier",), ("evaluation",), ("search",), ("__main__",)),
)

# Typing errors, strategies and reading a record must not wait seconds for torch.
WITHOUT_TORCH = (
    "gatl",
    "gatl.chromosome",
    "gatl.cli",
    "gatl.config",
    "gatl.data.folder",
    "gatl.data.images",
    "gatl.export",
    "gatl.final",
    "gatl.model_card",
    "gatl.outcome",
    "gatl.predict",
    "gatl.ranking",
    "gatl.record",
    "gatl.report",
    "gatl.run_folder",
    "gatl.charts",
    "gatl.compare",
    "gatl.strategies.annealing",
    "gatl.strategies.genetic",
    "gatl.strategies.optuna_sampler",
    "gatl.strategies.regularized_evolution",
)

# What a choice of a config group cannot do without.
NEEDS = {"data=folder": ["data.root=photos"]}


def module_name(path: Path) -> str:
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(name: str) -> set[str]:
    """Return the modules of gatl that a module imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: imports are absolute"
            assert node.module is not None
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


IMPORTS = {name: imported(name) for name in MODULES}


def needed(name: str) -> set[str]:
    """Return the modules of gatl that a module needs, by way of others too."""
    found: set[str] = set()
    ahead = [name]
    while ahead:
        new = IMPORTS[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def belongs(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"gatl.{part}.")


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(part[0] for part in chain))
def test_dependencies_point_one_way(chain):
    for index, parts in enumerate(chain):
        later = [part for stage in chain[index + 1 :] for part in stage]
        for name in MODULES:
            if any(belongs(name, part) for part in parts):
                wrong = [m for m in needed(name) if any(belongs(m, part) for part in later)]
                assert not wrong, f"{name} must not need {wrong}"


def test_no_module_needs_itself():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError


@pytest.mark.parametrize("name", ["gatl.charts", "gatl.report", "gatl.run_folder"])
def test_the_report_reads_only_what_a_run_wrote(name):
    parts = (
        "data",
        "models",
        "classifier",
        "evaluation",
        "final",
        "retraining",
        "testing",
        "search",
        "strategies",
    )
    assert not [m for m in IMPORTS[name] if any(belongs(m, part) for part in parts)]


def test_nothing_imports_main():
    assert [name for name in MODULES if "gatl.__main__" in IMPORTS[name]] == []


def test_starts_without_torch():
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def choices() -> list[str]:
    paths = (path.relative_to(CONF) for path in sorted(CONF.glob("*/*.yaml")))
    return [f"{path.parent}={path.stem}" for path in paths if not path.stem.startswith("_")]


@pytest.mark.parametrize("choice", choices())
def test_every_choice_composes_into_a_valid_configuration(choice):
    assert config.checked(cli.compose([choice, *NEEDS.get(choice, [])]))
