"""The model card: what stands beside a file of weights and says where they come from."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from experiments import machine


def provenance(module: str) -> dict[str, str]:
    """Command, commit, version of JAX and device of the running script."""
    found = machine.describe()
    device = found["device"]
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": found["commit"] or "not in a checkout",
        "jax": jax.__version__,
        "device": f"{device['kind']}, {device['cores']} cores",
    }


def write(path: Path, title: str, rows: Mapping[str, str]) -> None:
    """A table of the rows, as Markdown."""
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    path.write_text(f"# {title}\n\n| | |\n| --- | --- |\n{table}\n", encoding="utf-8")


def _cell(value: str) -> str:
    return value.replace("|", r"\|")
