"""The network under test from the flags: which weights it has."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import nets
from experiments import target
from jfi.errors import InputError

KEPT = sorted(target.KEPT.glob("*.safetensors"))


def path_for(name: str, dataset: str, weights=None) -> Path:
    with mock.patch.object(target.flags, "FLAGS", SimpleNamespace(weights=weights)):
        return target.weights_path(nets.build(name), dataset)


def test_weights_that_are_named_come_first_then_trained_ones_then_those_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert path_for("lenet", "mnist") == target.KEPT / "lenet_mnist.safetensors"
    trained = Path("weights", "lenet_mnist.safetensors")
    trained.parent.mkdir()
    trained.touch()
    assert path_for("lenet", "mnist") == trained
    assert path_for("lenet", "mnist", "own.th") == Path("own.th")
    with pytest.raises(InputError, match=r"no --weights given and weights/lenet_stl10.safetensors"):
        path_for("lenet", "stl10")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_weights_kept_are_small_load_and_have_a_card(path):
    assert path.stat().st_size < 3 << 20
    name = next(name for name in nets.names() if path.stem.startswith(f"{name}_"))
    card = path.with_suffix(".md").read_text()
    shapes = {"cifar10_exact": (32, 32, 3), "mnist": (28, 28, 1), "digits": (8, 8, 1)}
    net = nets.build(name, shapes.get(path.stem.removeprefix(f"{name}_")))
    x = np.random.default_rng(0).random((2, *net.input_shape)).astype(np.float32)
    logits = nets.apply(net, nets.load(net, path), x)
    assert np.isfinite(logits).all()
    for row in ("| dataset |", "| test accuracy |", "| command | python -m experiments.train"):
        assert row in card
