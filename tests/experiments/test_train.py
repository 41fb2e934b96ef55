"""Training: what is learnt, what is kept, and the script from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import nets
from experiments import data, train
from jfi.errors import InputError
from nets.net import Net
from nets.resnet import ResNet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def script(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """`python -m experiments.train` in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "experiments.train", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_lenet_learns_digits_with_the_default_recipe(digits):
    net, epochs = nets.build("lenet", (8, 8, 1)), []
    variables = train.train(net, digits, train.Recipe(), lambda *progress: epochs.append(progress))
    assert train.accuracy(net, variables, digits.x_test, digits.y_test) >= 0.96
    assert [epoch for epoch, _ in epochs] == list(range(train.Recipe().epochs))
    assert epochs[-1][1] < 0.05 < epochs[0][1]


def test_training_is_seeded(digits):
    net, recipe = nets.build("lenet", (8, 8, 1)), train.Recipe(epochs=1, batch_size=256)
    first, again, other = (
        train.train(net, digits, recipe._replace(seed=seed)) for seed in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["params"]["fc3"]["kernel"], other["params"]["fc3"]["kernel"])


def test_a_net_with_batch_normalisation_learns_and_updates_its_statistics(digits):
    net = Net("resnet8", ResNet(1), (8, 8, 1), 10, (0.3,), (0.4,))
    before = nets.init(net, 0)
    losses = []
    recipe = train.Recipe(epochs=3, batch_size=128)
    variables = train.train(net, digits, recipe, lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] / 2
    assert train.accuracy(net, variables, digits.x_test, digits.y_test) > 0.5
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), before["batch_stats"], variables["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))


def test_loss_is_the_cross_entropy_of_pytorch(digits):
    net = nets.build("lenet", (8, 8, 1))
    variables = nets.init(net, 0)
    x, y = nets.normalise(net, digits.x_test[:32]), digits.y_test[:32]
    loss, statistics = train._loss(net, {}, x, y, variables["params"])
    logits = torch.from_numpy(np.array(nets.apply(net, variables, x)))
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).long())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert statistics == {}


def test_an_epoch_shows_every_image_once():
    batches = train._batches(train.Recipe(batch_size=4), epoch=0, images=12)
    assert batches.shape == (3, 4)
    assert sorted(batches.ravel()) == list(range(12))
    assert not np.array_equal(batches, train._batches(train.Recipe(batch_size=4), 1, 12))


def test_accuracy_counts_every_image(digits, monkeypatch):
    """In batches, the last of them short, as in one."""
    net = nets.build("lenet", (8, 8, 1))
    variables = nets.init(net, 0)
    found = nets.apply(net, variables, nets.normalise(net, digits.x_test)).argmax(-1)
    monkeypatch.setattr(train, "EVALUATION_BATCH", 100)
    expected = np.mean(np.asarray(found) == digits.y_test)
    assert train.accuracy(net, variables, digits.x_test, digits.y_test) == expected


@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        ({"x_train": None, "y_train": None}, {}, "digits: no x_train and y_train"),
        ({}, {"batch_size": 2000}, "batch_size 2000: dataset digits has only 1437"),
        ({"y_train": np.full(1437, 10)}, {}, r"y_train\[0\] is 10"),
    ],
)
def test_bad_input_is_refused_before_training(digits, change, recipe, message):
    net = nets.build("lenet", (8, 8, 1))
    with pytest.raises(InputError, match=message):
        train.train(net, digits._replace(**change), train.Recipe(**recipe))


def test_script_trains_once_and_keeps_the_weights(tmp_path):
    first = script(tmp_path, "--epochs=2", "--batch_size=128")
    assert first.returncode == 0, first.stderr
    assert "test accuracy: " in first.stdout and first.stderr == ""
    weights = tmp_path / "weights" / "lenet_digits.safetensors"
    before = weights.read_bytes()
    second = script(tmp_path)
    assert "is there: not trained again" in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--net=alexnet", "net 'alexnet' is unknown"),
        ("--dataset=svhn", "dataset 'svhn' is unknown"),
        ("--epochs=0", "--epochs=0"),
        ("--epoch=1", "Unknown command line flag"),
        ("--out=net.pt", "--out=net.pt: a .safetensors file is right"),
        ("--out=file/net.safetensors", "can't be written there"),
    ],
)
def test_script_answers_bad_input_with_one_line_and_status_2(tmp_path, flag, message):
    (tmp_path / "file").touch()
    ended = script(tmp_path, flag)
    assert ended.returncode == 2
    assert message in ended.stderr and ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
