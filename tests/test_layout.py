"""The direction of imports, and that what is public is documented."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each package keeps away from.
FORBIDDEN = {"jfi": {"nets", "experiments", "absl"}, "nets": {"jfi", "experiments", "absl"}}
# Libraries that are slow to import or optional: loaded by the functions that use them.
LATE = {"torch", "matplotlib", "pyarrow", "sklearn", "tensorflow", "tensorflow_datasets"}
LATE |= {"torchax", "keras", "equinox", "haiku", "onnx", "onnxruntime", "nir"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def modules(package: str) -> list[str]:
    """Names of a package and all its modules."""
    found = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    return [package, *(module.name for module in found)]


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, in functions too; packages of each as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = (name.split(".") for name in names)
    return {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}


def test_imported_sees_every_form(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c.d import e\ndef f():\n    from g import h\n")
    assert imported(path) == {"a", "a.b", "c", "c.d", "c.d.e", "g", "g.h"}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_sources_import_in_one_direction(package):
    assert sources(package)
    for path in sources(package):
        assert not imported(path) & FORBIDDEN[package], path


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
