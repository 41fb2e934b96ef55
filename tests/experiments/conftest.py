"""Scripts run in this process: starting JAX anew for each would cost seconds."""

import contextlib
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest
from absl import flags

import nets
from experiments import cli


class Ended(NamedTuple):
    """How a script ended: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


def run_script(module: ModuleType, *arguments: str) -> Ended:
    """`python -m MODULE ARGUMENTS`, with flags of its own and no cache."""
    out, err, known = io.StringIO(), io.StringIO(), set(flags.FLAGS)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [module.__name__, *arguments]),
        mock.patch.object(cli.tuning, "keep_compiled", lambda: None),
        mock.patch.object(cli.tuning, "folder", lambda: None),
        pytest.raises(SystemExit) as stop,
    ):
        try:
            module.define_flags()
            cli.run(module.main, **getattr(module, "RUN", {}))
        finally:
            flags.FLAGS.remove_flag_values(set(flags.FLAGS) - known)
    return Ended(stop.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def script():
    """script(module, "--flag=...", ...) -> Ended(status, out, err)."""
    return run_script


@pytest.fixture(scope="session")
def lenet_weights(tmp_path_factory) -> Path:
    """Fresh weights of the LeNet for digits, as safetensors."""
    path = tmp_path_factory.mktemp("weights") / "lenet.safetensors"
    nets.save(path, nets.init(nets.build("lenet", (8, 8, 1)), 0))
    return path


@pytest.fixture
def own_folder(monkeypatch, tmp_path) -> Path:
    """An empty folder to run in: weights/ and runs/ go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
