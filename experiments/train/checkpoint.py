"""Where a run of training stands, in one file that is there whole or not at all.

safetensors, as weights are: one tensor a leaf of the state, and in the header what the run is (so
that only the same run goes on from it) and its history.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nets
from jfi.errors import InputError


def save(path: Path, run: Mapping[str, Any], state: Any, history: list) -> None:
    """Write the state (a pytree of arrays) and the history (a JSON list) of a run.

    Raises OSError where it can't be written; what was there is then untouched.
    """
    header = {"run": json.dumps(run), "history": json.dumps(history)}
    nets.save(path, _leaves(state), header)


def load(path: Path, run: Mapping[str, Any], like: Any) -> tuple[Any, list]:
    """(state, history) of the run; `like` is a state of the same structure.

    Raises InputError where the file is damaged, or is of another run, naming what differs.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kept, history = json.loads(header["run"]), json.loads(header["history"])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"checkpoint {path}: damaged, or not one; delete it") from error
    _refuse_difference(path, kept, json.loads(json.dumps(run)))
    leaves = [jnp.asarray(found[name]) for name in _leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), history


def _leaves(state: Any) -> dict[str, jax.Array]:
    """Leaves by their path, as .params['conv1']['kernel']."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _refuse_difference(path: Path, kept: dict, run: dict) -> None:
    for key in sorted(kept.keys() | run.keys()):
        then, now = kept.get(key), run.get(key)
        if then != now:
            raise InputError(
                f"checkpoint {path}: of another run, with {key} {then!r}, not {now!r}; "
                "go on with the same flags, or --overwrite"
            )
