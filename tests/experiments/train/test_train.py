"""Training: what is learnt, what is kept, and the script from the command line."""

import csv
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import nets
from experiments.data import events, sets
from experiments.train import __main__ as train
from experiments.train import training
from jfi.errors import InputError
from nets.net import Net

ROOT = Path(__file__).resolve().parents[3]
NMNIST = ROOT.parent / "shared" / "data" / "nmnist" / "NMNISTsmall"


@pytest.fixture(scope="module")
def digits() -> sets.Dataset:
    return sets.load("digits")


@pytest.fixture
def start(tmp_path):
    """start(folder, *flags): `python -m experiments.train` begun in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def popen(folder: Path, *flags: str) -> subprocess.Popen:
        arguments = [sys.executable, "-m", "experiments.train", *flags]
        return subprocess.Popen(arguments, cwd=folder, env=environment, **pipes)

    return popen


class Tiny(linen.Module):
    """A convolution with BN, and a dense layer."""

    dtype: type = jnp.float32

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Conv(8, (3, 3), strides=2, dtype=self.dtype)(x)
        x = linen.relu(linen.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))
        return linen.Dense(10, dtype=self.dtype)(x.reshape(len(x), -1))


def tiny() -> Net:
    return Net("tiny", Tiny(), (8, 8, 1), 10, (0.3,), (0.4,))


def assert_same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_lenet_learns_digits_with_the_default_recipe(digits):
    net, kept, reported = nets.build("lenet", (8, 8, 1)), [], []
    recipe = training.Recipe()
    state, history = training.train(
        net, digits, recipe, keep=kept.append, report=lambda *at: reported.append(at)
    )
    found = training.accuracy(net, state.variables, digits.x_test, digits.y_test)
    assert history[-1].accuracy == found >= 0.96
    assert [len(training.history) for training in kept] == list(range(1, recipe.epochs + 1))
    assert history[-1].loss < 0.05 < history[0].loss
    steps = 1437 // 32
    assert reported == [(done, steps) for done in range(1, steps * recipe.epochs + 1)]


def test_training_is_seeded(digits):
    net = nets.build("lenet", (8, 8, 1))
    recipe = training.Recipe(epochs=1, batch_size=256, augment="crop")
    first, again, other = (
        training.train(net, digits, recipe._replace(seed=seed)).state.params for seed in (1, 1, 2)
    )
    assert_same(first, again)
    assert not np.array_equal(first["fc3"]["kernel"], other["fc3"]["kernel"])


def test_a_net_with_batch_normalisation_learns_and_updates_its_statistics(digits):
    net = tiny()
    before = nets.init(net, 0)
    state, history = training.train(net, digits, training.Recipe(epochs=3, batch_size=128))
    assert history[-1].loss < history[0].loss / 2
    assert history[-1].accuracy > 0.5
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b),
        before["batch_stats"],
        state.statistics["batch_stats"],
    )
    assert all(jax.tree.leaves(moved))


def test_half_precision_learns_and_keeps_its_weights_in_float32(digits):
    net = tiny()
    recipe = training.Recipe(epochs=3, batch_size=128, precision="bfloat16")
    state, history = training.train(net, digits, recipe)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {jnp.dtype("float32")}
    assert history[-1].loss < history[0].loss / 2 and history[-1].accuracy > 0.5
    narrow = training.computing_in(net, "bfloat16")
    assert nets.apply(narrow, state.variables, jnp.zeros((1, 8, 8, 1))).dtype == jnp.bfloat16


def test_learning_rate_rises_then_falls_as_a_cosine_and_weights_decay():
    """Without a gradient AdamW moves a weight w by -rate * decay * w alone."""
    recipe = training.Recipe(epochs=4, learning_rate=0.3, weight_decay=0.2)
    optimiser, weight = training._optimiser(recipe, 50), jnp.float32(2)
    state, rates = optimiser.init(weight), []
    for _ in range(200):
        update, state = optimiser.update(jnp.zeros(()), state, weight)
        rates.append(float(-update / (0.2 * weight)))
    expected = [0.3 * i / 10 for i in range(10)]
    expected += [0.15 * (1 + np.cos(np.pi * i / 190)) for i in range(190)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_shifted_by_up_to_four_and_flipped_half_the_time(flip):
    """Images whose pixels are all different tell which shift and side each was given."""
    images = np.arange(1, 401, dtype=np.float32).reshape(1, 10, 10, 4)
    found = training.augmented(jax.random.key(0), jnp.tile(images, (2000, 1, 1, 1)), flip=flip)
    wide = np.pad(images[0], ((4, 4), (4, 4), (0, 0)))
    windows = {
        side(wide[i : i + 10, j : j + 10]).tobytes(): (i, j, name)
        for i in range(9)
        for j in range(9)
        for name, side in (("kept", np.asarray), ("flipped", lambda x: x[:, ::-1]))
    }
    seen = [windows[image.tobytes()] for image in np.asarray(found)]
    assert len({(i, j) for i, j, _ in seen}) == 81
    share = np.mean([name == "flipped" for *_, name in seen])
    assert 0.45 < share < 0.55 if flip else share == 0


class Stopped(Exception):
    """Training was interrupted."""


def test_training_goes_on_where_it_stood(digits):
    """Stopped in the middle of an epoch: the same weights, memory and history as unstopped."""
    net = tiny()
    recipe = training.Recipe(epochs=4, batch_size=256, augment="crop_flip")
    kept = []

    def keep(training):
        kept.append(jax.tree.map(np.array, training))  # the arrays themselves are used up

    def stop(done, steps):
        if done == 2 * steps + 3:
            raise Stopped

    with pytest.raises(Stopped):
        training.train(net, digits, recipe, keep=keep, report=stop)
    assert len(kept) == 2
    start = training.Training(jax.tree.map(jnp.asarray, kept[-1].state), kept[-1].history)
    assert_same(training.train(net, digits, recipe, start), training.train(net, digits, recipe))


def test_loss_is_the_cross_entropy_of_pytorch(digits):
    net = nets.build("lenet", (8, 8, 1))
    variables = nets.init(net, 0)
    x, y = nets.normalise(net, digits.x_test[:32]), digits.y_test[:32]
    loss, statistics = training._loss(net, {}, x, y, variables["params"])
    logits = torch.from_numpy(np.array(nets.apply(net, variables, x)))
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).long())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert statistics == {}


def test_the_loss_of_half_precision_is_taken_in_float32(digits):
    net = training.computing_in(nets.build("lenet", (8, 8, 1)), "bfloat16")
    variables = nets.init(net, 0)
    x, y = nets.normalise(net, digits.x_test[:32]), digits.y_test[:32]
    loss, _ = training._loss(net, {}, x, y, variables["params"])
    logits = nets.apply(net, variables, x).astype(jnp.float32)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(
        float(optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()), rel=1e-6
    )


def test_an_epoch_shows_every_image_once():
    batches = training._batches(training.Recipe(batch_size=4), epoch=0, images=12)
    assert batches.shape == (3, 4)
    assert sorted(batches.ravel()) == list(range(12))
    assert not np.array_equal(batches, training._batches(training.Recipe(batch_size=4), 1, 12))


def test_accuracy_counts_every_image(digits, monkeypatch):
    """In batches, the last of them short, as in one."""
    net = nets.build("lenet", (8, 8, 1))
    variables = nets.init(net, 0)
    found = nets.apply(net, variables, nets.normalise(net, digits.x_test)).argmax(-1)
    monkeypatch.setattr(training, "EVALUATION_BATCH", 100)
    expected = np.mean(np.asarray(found) == digits.y_test)
    assert training.accuracy(net, variables, digits.x_test, digits.y_test) == expected


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
        training.train(net, digits._replace(**change), training.Recipe(**recipe))


def test_script_trains_once_and_keeps_the_weights(script, own_folder):
    first = script(train, "--epochs=2", "--batch_size=128")
    assert first.status == 0, first.err
    assert "test accuracy: " in first.out and first.err == ""
    weights = own_folder / "weights" / "lenet_digits.safetensors"
    before = weights.read_bytes()
    second = script(train)
    assert "is there: not trained again" in second.out
    assert second.out.splitlines()[-1] == first.out.splitlines()[-1]
    assert weights.read_bytes() == before
    _check_card_and_log(weights, first.out.split()[-1])


def test_what_was_trained_with_is_what_is_tested_with(script, own_folder):
    given = ("--mean=0.5", "--std=0.25")
    first = script(train, "--epochs=2", "--batch_size=128", *given)
    assert first.status == 0, first.err
    weights = own_folder / "weights" / "lenet_digits.safetensors"
    assert nets.statistics(weights) == ([0.5], [0.25])
    assert "| mean | [0.5] |" in weights.with_suffix(".md").read_text()
    for flags in ((), given):  # of itself, or told the same
        again = script(train, *flags)
        assert again.out.splitlines()[-1] == first.out.splitlines()[-1]
    refused = script(train, "--mean=0.1307", "--std=0.3081")
    assert refused.status == 2 and "were trained with 0.5 and 0.25" in refused.err
    wrong = script(train, "--overwrite", "--mean=0.5", "--std=0")
    assert wrong.status == 2 and "std 0: finite numbers above 0 are right" in wrong.err


def test_another_normalisation_is_another_run(script, own_folder, monkeypatch):
    monkeypatch.setattr(train, "_publish", _interrupt)
    flags = ("--epochs=1", "--batch_size=256")
    assert script(train, *flags).status == 130
    refused = script(train, *flags, "--mean=0.5", "--std=0.25")
    assert refused.status == 2 and "of another run, with mean [0.1307], not [0.5]" in refused.err


def _interrupt(*_):
    raise KeyboardInterrupt


def _check_card_and_log(weights: Path, accuracy: str):
    with safe_open(weights, "numpy") as file:
        header = file.metadata()
    shown = weights.with_suffix(".md").read_text()
    assert header["command"] == "python -m experiments.train --epochs=2 --batch_size=128"
    assert header["test accuracy"] == f"{accuracy} of 360 test images"
    assert header["dataset"] == "digits: 1,437 training images"
    assert all(f"| {key} | {value} |" in shown for key, value in header.items())
    assert {"commit", "learning_rate", "seed", "jax"} <= header.keys()
    with weights.with_suffix(".csv").open() as file:
        epochs = list(csv.DictReader(file))
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert f"{float(epochs[-1]['test_accuracy']):.2%}" == accuracy
    assert not weights.with_suffix(".checkpoint").exists()


def test_jpegs_are_trained_on_and_named_on_the_card(script, own_folder):
    """The digits once more, as JPEGs."""
    images = sets.load("digits")
    with tarfile.open("digits.tar", "w") as tar:
        for i, label in enumerate(images.y_train):
            file = io.BytesIO()
            pixels = (images.x_train[i, ..., 0] * 255).astype(np.uint8)
            Image.fromarray(pixels).save(file, "jpeg", quality=95)
            entry = tarfile.TarInfo(f"train/{label}/{i}.jpg")
            entry.size = file.tell()
            file.seek(0)
            tar.addfile(entry, file)
    ended = script(train, "--epochs=2", "--batch_size=128", "--extra=digits.tar")
    assert float(ended.out.split()[-1].rstrip("%")) > 60
    card = (own_folder / "weights" / "lenet_digits.md").read_text()
    assert "2,874 training images, among them the JPEG images of digits.tar" in card


def test_a_killed_run_goes_on_to_the_same_weights(start, script, tmp_path, monkeypatch):
    flags = ("--epochs=30", "--augment=crop")
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    with start(part, *flags) as process:
        kept = part / "weights" / "lenet_digits.checkpoint"
        while not kept.exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    monkeypatch.chdir(part)
    refused = script(train, *flags, "--seed=1")
    assert refused.status == 2
    assert "of another run, with seed 0, not 1" in refused.err
    ended = script(train, *flags)
    assert ended.status == 0, ended.err
    assert "going on after epoch" in ended.out
    monkeypatch.chdir(whole)
    assert script(train, *flags).status == 0
    weights = Path("weights", "lenet_digits.safetensors")
    assert_same(load_file(whole / weights), load_file(part / weights))
    logs = [(folder / weights.with_suffix(".csv")).read_text() for folder in (whole, part)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 31


def test_a_damaged_checkpoint_is_refused_or_put_aside(script, own_folder):
    kept = own_folder / "weights" / "lenet_digits.checkpoint"
    kept.parent.mkdir()
    kept.write_bytes(b"no checkpoint")
    refused = script(train, "--epochs=1")
    assert refused.status == 2 and "lenet_digits.checkpoint: damaged" in refused.err
    assert script(train, "--epochs=1", "--overwrite").status == 0
    assert not kept.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--net=alexnet", "net 'alexnet' is unknown"),
        ("--dataset=svhn", "dataset 'svhn' is unknown"),
        ("--epochs=0", "--epochs=0"),
        ("--epoch=1", "Unknown command line flag"),
        ("--extra=none.tar", "images none.tar: no such file"),
        ("--augment=mixup", "--augment=mixup"),
        ("--out=net.pt", "--out=net.pt: a .safetensors file is right"),
        ("--out=file/net.safetensors", "can't be written there"),
    ],
)
def test_script_answers_bad_input_with_one_line_and_status_2(script, own_folder, flag, message):
    (own_folder / "file").touch()
    ended = script(train, flag)
    assert ended.status == 2
    assert message in ended.err and ended.err.startswith("error: ")
    assert len(ended.err.splitlines()) == 1


def halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [B, 20, 4, 4, 2] that spike on the left (0) or on the right (1), and which."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count).astype(np.int32)
    rate = np.where((np.arange(4) // 2 == labels[:, None])[:, None, None, :, None], 0.3, 0.1)
    return (draw.random((count, 20, 4, 4, 2)) < rate).astype(np.float32), labels


def sides() -> sets.Dataset:
    return sets.Dataset("sides", *halves(256, 0), *halves(100, 1))


@pytest.mark.parametrize("gradient", ["atan", "fast_sigmoid"])
def test_spiking_nets_learn_through_surrogate_gradients(gradient):
    net = nets.build("snn_nmnist", (20, 4, 4, 2), 2)
    recipe = training.Recipe(epochs=5, surrogate=gradient)
    state, history = training.train(net, sides(), recipe)
    assert history[-1].accuracy > 0.9 and history[-1].loss < history[0].loss
    before = nets.init(net, 0)["params"]
    for layer in ("fc1", "lif1", "fc2", "lif2"):
        for leaf, values in state.params[layer].items():
            assert not np.array_equal(values, before[layer][leaf]), f"{layer}/{leaf}"


def test_the_surrogate_asked_for_is_the_one_used():
    net = nets.build("snn_nmnist", (20, 4, 4, 2), 2)
    recipe = training.Recipe(epochs=1)  # the net's own is atan
    usual, same, other = (
        training.train(net, sides(), recipe._replace(surrogate=name)).state.params
        for name in (None, "atan", "fast_sigmoid")
    )
    assert_same(usual, same)
    assert not np.array_equal(usual["fc1"]["kernel"], other["fc1"]["kernel"])


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("lenet", training.Recipe(surrogate="atan"), "lenet is no spiking network"),
        (
            "snn_nmnist",
            training.Recipe(augment="crop"),
            "snn_nmnist takes no images; none is right",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_net_is_told(name, recipe, message, digits):
    dataset, shape = (digits, (8, 8, 1)) if name == "lenet" else (sides(), (20, 4, 4, 2))
    with pytest.raises(InputError, match=message):
        training.train(nets.build(name, shape), dataset, recipe)


def test_a_spiking_net_is_trained_by_the_script(own_folder, script):
    x_train, y_train = halves(64, 0)
    arrays = {"x_train": x_train.astype(np.uint8), "y_train": y_train, "frames": "by hand"}
    np.savez("sides.npz", x_test=arrays["x_train"], y_test=y_train, **arrays)
    ended = script(
        train, "--net=snn_nmnist", "--dataset=sides.npz", "--epochs=1", "--surrogate=fast_sigmoid"
    )
    assert ended.status == 0, ended.err
    net = nets.build("snn_nmnist", (20, 4, 4, 2))
    assert nets.load(net, "weights/snn_nmnist_sides.safetensors")["params"]["lif1"]
    assert "fast_sigmoid" in Path("weights/snn_nmnist_sides.md").read_text()


@pytest.mark.data
@pytest.mark.skipif(not NMNIST.is_dir(), reason="no ../shared with N-MNIST's event files")
def test_nmnist_is_learnt_from_real_events():
    binning = events.Binning(50, every=2)
    arrays = events.load("nmnist", NMNIST, binning)
    halves = (arrays[key].astype(np.float32) for key in ("x_train", "x_test"))
    dataset = sets.Dataset(
        "nmnist", next(halves), arrays["y_train"], next(halves), arrays["y_test"]
    )
    net = nets.build("snn_nmnist", (50, 17, 17, 2))
    history = training.train(net, dataset, training.Recipe(epochs=5)).history
    assert history[-1].accuracy >= 0.7
