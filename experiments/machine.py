"""The machine a script runs on: what it is, and how its memory is handed out."""

import os
import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("jfi", "jax", "jaxlib", "flax", "numpy", "torch", "pytorchfi")

# By default glibc maps a large array afresh each time one is needed: many page faults.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def describe() -> dict:
    """Device, versions of packages (None where one is absent), commit and allocator."""
    device = jax.devices()[0]
    kind = _cpu_model() if device.platform == "cpu" else device.device_kind
    return {
        "device": {"platform": device.platform, "kind": kind, "cores": cores()},
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "allocator": {name: os.environ.get(name) for name in MALLOC},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit of the checkout this file is in, `-dirty` where tracked files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def peak_mib() -> int:
    """The most host memory that this process has held so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def again(module: str, *arguments: str) -> list[str]:
    """The command that runs a script once more, with more arguments."""
    return [sys.executable, "-m", module, *sys.argv[1:], *arguments]


def tune_allocator(module: str) -> None:
    """Start the running script again with `MALLOC` set, unless it is: glibc reads it once."""
    if not MALLOC.keys() <= os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, again(module), {**os.environ, **MALLOC})


def untuned() -> dict[str, str]:
    """The environment without `MALLOC`, with this checkout: scripts are not installed."""
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    found = {name: value for name, value in os.environ.items() if name not in MALLOC}
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, path))}
