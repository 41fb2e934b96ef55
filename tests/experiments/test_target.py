"""The network under test from the flags: which weights it has."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import nets
from experiments import campaign, plan, target
from experiments.bench import __main__ as bench
from experiments.data import sets
from experiments.samplers import truth
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


def workload_of(script, module, *flags: str) -> np.ndarray:
    """The images that a script would judge faults on."""
    seen = []
    usual = {plan: lambda: plan._subject().workload()[0]}
    load = usual.get(module, lambda: target.load().images)
    named = SimpleNamespace(
        __name__=module.__name__,
        __doc__="",
        define_flags=module.define_flags,
        main=lambda: seen.append(load()),
    )
    ended = script(named, "--net=lenet", *flags)
    assert ended.status == 0, ended.err
    return np.asarray(seen[0])


@pytest.mark.parametrize("module", [plan, campaign, truth, bench], ids=lambda m: m.__name__)
def test_every_script_normalises_as_the_flags_say(script, own_folder, lenet_weights, module):
    digits = sets.load("digits").x_test
    flags = ("--dataset=digits", f"--weights={lenet_weights}")
    usual = workload_of(script, module, *flags)
    np.testing.assert_allclose(usual, (digits - 0.1307) / 0.3081, rtol=1e-4, atol=1e-5)
    given = workload_of(script, module, *flags, "--mean=-0.5", "--std=2")
    np.testing.assert_allclose(given, (digits + 0.5) / 2, rtol=1e-5)
    # Of weights whose file says what they were trained with.
    net = nets.build("lenet", (8, 8, 1))
    header = nets.statistics_header(nets.normalising(net, [0.25], [0.5]))
    nets.save("trained.safetensors", nets.load(net, lenet_weights), header)
    trained = workload_of(script, module, "--dataset=digits", "--weights=trained.safetensors")
    np.testing.assert_allclose(trained, (digits - 0.25) / 0.5, rtol=1e-5, atol=1e-6)
    # Masks, as they are.
    masks = (digits[..., 0] > 0.5).astype(np.uint8)
    np.savez("masks.npz", x_test=masks, y_test=np.zeros(len(masks), int))
    flags = ("--dataset=masks.npz", flags[1], "--mean=0", "--std=1", "--pixel_max=1")
    np.testing.assert_array_equal(workload_of(script, module, *flags)[..., 0], masks)
