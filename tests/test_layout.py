"""The direction of imports, and that what is public is documented."""

import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
# What each package keeps away from.
FORBIDDEN = {"jfi": {"nets", "experiments", "absl"}, "nets": {"jfi", "experiments", "absl"}}
# Libraries that are slow to import or optional: loaded by the functions that use them.
LATE = {"torch", "matplotlib", "pyarrow", "sklearn", "tensorflow", "tensorflow_datasets"}
LATE |= {"torchax", "keras", "pandas", "jinja2", "equinox", "haiku", "onnx", "onnxruntime", "nir"}


def modules(package: str) -> list[str]:
    """Names of a package and all its modules."""
    found = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    return [package, *(module.name for module in found)]


def test_wings_know_only_those_below_them():
    """The contracts in pyproject.toml."""
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize("wrong", ["report.tables", "engine.engine"])
def test_a_contract_is_broken_by_an_import_from_above(tmp_path, wrong):
    """A copy of the house whose bottom floor imports one above it."""
    for name in ("jfi", "nets", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "jfi" / "errors.py").open("a") as file:
        file.write(f"import jfi.{wrong}\n")
    ended = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom importlinter.cli import lint_imports\n"
         "sys.exit(lint_imports(no_cache=True))"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "jfi is a house of wings BROKEN" in ended.stdout


@pytest.mark.parametrize("package", FORBIDDEN)
def test_importing_every_module_loads_nothing_of_the_others(package):
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules(package)!r}: importlib.import_module(name)\n"
        "print('\\n'.join(sys.modules))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ended.stdout.split())
    assert set(modules(package)) <= loaded
    # Flax loads absl.
    assert not loaded & (FORBIDDEN[package] - {"absl"} | LATE)


@pytest.mark.parametrize("name", [*modules("jfi"), *modules("nets")])
def test_what_is_public_is_documented(name):
    module = importlib.import_module(name)
    own = [x for x in vars(module).values() if getattr(x, "__module__", None) == name]
    public = [x for x in own if not getattr(x, "__name__", "_").startswith("_")]
    missing = [x.__name__ for x in (module, *public) if not documented(x)]
    assert not missing


def documented(value) -> bool:
    """A docstring that someone wrote; NamedTuple makes one of its own."""
    text = inspect.getdoc(value) or ""
    return bool(text) and not text.startswith(f"{value.__name__}(")
