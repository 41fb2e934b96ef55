"""What `pip install jfi` brings: the library alone, and with it the README's start works."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
START = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1]
# Nothing of the checkout can be imported, and every module of the library can.
ALONE = """
import importlib, importlib.util, pkgutil, jfi
assert not any(map(importlib.util.find_spec, ("nets", "experiments", "tests")))
for module in pkgutil.walk_packages(jfi.__path__, "jfi."):
    importlib.import_module(module.name)
print(jfi.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, of a copy: building leaves files behind, and takes up those that were left."""
    pytest.importorskip("setuptools")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("jfi", "nets", "experiments", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={out}", copy)
    (found,) = out.glob("*.whl")
    return found


def pip(*arguments, python: str | Path = sys.executable) -> None:
    """`pip` of this environment, for the environment of `python`."""
    run(sys.executable, "-m", "pip", "--python", python, "-q", *arguments)


def run(*command, cwd: Path | None = None) -> str:
    """What a command prints; its errors where it fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(python: Path, folder: Path) -> None:
    """The README's start in an empty folder, by an environment that has the wheel alone."""
    folder.mkdir()
    assert str(python.parents[1]) in run(python, "-c", ALONE, cwd=folder)
    printed = run(python, "-c", START, cwd=folder)
    (report,) = folder.glob("runs/*/report.html")
    assert str(report.relative_to(folder)) in printed


def test_the_wheel_holds_the_library_alone(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = ((ROOT / "jfi").rglob(pattern) for pattern in ("*.py", "*.jinja"))
    assert held == {str(path.relative_to(ROOT)) for paths in sources for path in paths}


def test_the_wheel_asks_for_nothing_that_scripts_alone_need(wheel):
    (path,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    asked = zipfile.ZipFile(wheel).read(path).decode()
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", asked, re.M)
    assert {"jax", "numpy"} <= set(needed)
    assert not {"absl-py", "tensorflow-datasets", "flax", "optax", "scikit-learn"} & set(needed)


def test_the_start_runs_where_only_the_wheel_is_installed(wheel, tmp_path):
    """With the libraries of this environment, and nothing else of it."""
    if find_spec("torchax") is None:  # importing it takes what `jfi.adopt` does
        pytest.skip("torchax is not installed")
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip("install", "--no-deps", "--no-index", wheel, python=python)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A folder that a .pth file names is searched; its own .pth files, editable installs, are not.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    start(python, tmp_path / "empty")


@pytest.mark.slow
def test_the_start_runs_in_an_empty_environment(wheel, tmp_path):
    """Everything the wheel asks for is installed anew: needs a package index."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip("install", "torch==2.13.0", f"{wheel}[torch]", python=python)
    start(python, tmp_path / "empty")
