"""The wheel: built through the source distribution, installed alone, run from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
SHIPPED = ("conf", "gatl", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    # Without the caller's PYTHON* and Hydra variables, which would change what is found and shown.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HYDRA"))}
    done = subprocess.run(
        command, cwd=cwd, env=kept | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build in a copy: a build folder that is left behind leaks old files into new wheels."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy
        copy(CHECKOUT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a fresh environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def run_installed(python: Path, *arguments: str, cwd: Path) -> str:
    # The dependencies come from the environment of the tests. Of a folder on PYTHONPATH no .pth
    # file is read, so an editable installation of the checkout that lies there is out of reach.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return run(python, *arguments, cwd=cwd, PYTHONPATH=os.pathsep.join(sorted(paths)))


def test_the_wheel_holds_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"gatl/py.typed"}
    for folder, shipped_as in (("gatl", "gatl"), ("conf", "gatl/conf")):
        for path in (CHECKOUT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".safetensors", ".md", ".html", ".js"}:
                expected.add(f"{shipped_as}/{path.relative_to(CHECKOUT / folder).as_posix()}")
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_code_and_configuration_come_from_the_installation(installed, tmp_path):
    script = "import gatl, gatl.conf; print(gatl.__file__, gatl.conf.__file__, sep='\\n')"
    for place in run_installed(installed, "-c", script, cwd=tmp_path).splitlines():
        assert Path(place).is_relative_to(installed.parents[1])


def test_it_prints_its_configuration(installed, tmp_path):
    printed = run_installed(installed, "-m", "gatl", "--cfg", "job", "ga.pop=7", cwd=tmp_path)
    assert "pop: 7" in printed
    assert "included_layers:" in printed
    assert list(tmp_path.iterdir()) == []  # looking makes no run folder


def test_it_prints_its_help(installed, tmp_path):
    printed = run_installed(installed, "-m", "gatl", "--help", cwd=tmp_path)
    assert "ga.pop" in printed
    for choice in ("flowers", "se_densenet121_k12", "quickstart"):
        assert choice in printed
    assert list(tmp_path.iterdir()) == []
