"""Flax NNX and Linen, Equinox, Haiku and Keras adopted: LeNet and a batch-norm CNN in each."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adopting import check_campaign
from flax import linen, nnx

import jfi

RNG = np.random.default_rng(0)
SMALL = RNG.normal(size=(8, 12, 12, 1)).astype(np.float32)
COLOUR = RNG.normal(size=(8, 12, 12, 3)).astype(np.float32)


def settled(tree):
    """Statistics of batch norm as training leaves them, not 0 and 1."""
    return jax.tree.map(lambda x: jnp.asarray(RNG.uniform(0.5, 1.5, x.shape), x.dtype), tree)


# Several inputs and outputs.


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, more):
        y = self.fc(jnp.concatenate([x, more], -1))
        return y, y.max(-1)


class LinenPair(linen.Module):
    @linen.compact
    def __call__(self, x, more):
        y = linen.Dense(3)(jnp.concatenate([x, more], -1))
        return y, y.max(-1)


def pairs():
    """Models of two inputs, by framework."""
    x = jnp.zeros((1, 4)), jnp.zeros((1, 2))
    linear = LinenPair()
    yield "nnx", lambda: Pair(nnx.Rngs(0))
    yield "linen", lambda: (linear, linear.init(jax.random.key(0), *x))

    def of_equinox():
        eqx = pytest.importorskip("equinox")

        class One(eqx.Module):
            fc: eqx.nn.Linear

            def __call__(self, x, more):
                y = self.fc(jnp.concatenate([x, more]))
                return y, y.max()

        return One(eqx.nn.Linear(6, 3, key=jax.random.key(0)))

    def of_haiku():
        hk = pytest.importorskip("haiku")

        def both(x, more):
            y = hk.Linear(3)(jnp.concatenate([x, more], -1))
            return y, y.max(-1)

        made = hk.transform(both)
        return made, made.init(jax.random.key(0), *x)

    yield "equinox", of_equinox
    yield "haiku", of_haiku


@pytest.mark.parametrize("model", [pytest.param(make, id=name) for name, make in pairs()])
@pytest.mark.parametrize("names", [True, False])
def test_several_inputs_and_outputs(model, names):
    """Compared with the model itself on the way in; the second output is judged by name."""
    x, more = (RNG.normal(size=(5, n)).astype(np.float32) for n in (4, 2))
    images = {"x": x, "more": more} if names else (x, more)
    network = jfi.adopt(model(), images)
    assert [array.shape for array in network.outputs.arrays] == [(3,), ()]
    first = jfi.adopt(model(), images, output="0")
    assert jfi.study(first, images).criterion.text == "top_1"


# Flax NNX.


class NnxLeNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 6, (5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(16, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)
        self.fc3, self.dropout = nnx.Linear(8, 5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = nnx.relu(self.fc1(x.reshape(len(x), -1)))
        return self.fc3(self.dropout(nnx.relu(self.fc2(x))))


class NnxBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.fc = nnx.Linear(6, 5, rngs=rngs)
        self.norm.mean[...] = settled(self.norm.mean[...])
        self.norm.var[...] = settled(self.norm.var[...])

    def __call__(self, x):
        return self.fc(nnx.relu(self.norm(self.blocks[0](x))).mean((1, 2)))


def test_nnx_lenet(campaign):
    model = NnxLeNet(nnx.Rngs(0))
    network = jfi.adopt(model, SMALL)
    assert {"conv1/kernel", "fc3/bias"} <= set(network.positions)
    assert not model.dropout.deterministic
    campaign(network, SMALL)


def test_nnx_batch_norm():
    model = NnxBatchNorm(nnx.Rngs(0))
    network = jfi.adopt(model, COLOUR)
    assert {"blocks/0/kernel", "norm/mean", "norm/var", "norm/scale"} <= set(network.positions)
    assert not model.norm.use_running_average
    check_campaign(network, COLOUR)


def test_nnx_that_draws_all_the_same_is_refused():
    class Draws(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.rngs = nnx.Linear(4, 3, rngs=rngs), rngs

        def __call__(self, x):
            return self.fc(x) + jax.random.normal(self.rngs.noise(), (3,))

    with pytest.raises(
        jfi.InputError, match=r"NNX module is in training mode: .* changed its .*co"
    ):
        jfi.adopt(Draws(nnx.Rngs(0)), SMALL[:, 0, :4, 0])


def test_nnx_that_asks_for_training_is_told_not_to():
    class Asks(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.drop = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, train=True):
            return self.drop(self.fc(x), deterministic=not train)

    network = jfi.adopt(Asks(nnx.Rngs(0)), SMALL[:, 0, :4, 0])
    assert set(network.positions) == {"fc/kernel", "fc/bias"}


# Flax Linen.


class LinenLeNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = True):
        x = linen.max_pool(linen.relu(linen.Conv(6, (5, 5))(x)), (2, 2), (2, 2))
        x = linen.max_pool(linen.relu(linen.Conv(16, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = linen.relu(linen.Dense(12)(x.reshape(len(x), -1)))
        x = linen.Dropout(0.5, deterministic=not train)(linen.relu(linen.Dense(8)(x)))
        return linen.Dense(5)(x)


class LinenBatchNorm(linen.Module):
    @linen.compact
    def __call__(self, x, use_running_average: bool):
        x = linen.Conv(6, (3, 3), strides=2)(x)
        x = linen.BatchNorm(use_running_average)(x)
        return linen.Dense(5)(linen.relu(x).mean((1, 2)))


def test_linen_lenet():
    model = LinenLeNet()
    network = jfi.adopt((model, model.init(jax.random.key(0), SMALL, train=False)), SMALL)
    assert {"Conv_0/kernel", "Dense_2/bias"} <= set(network.positions)
    check_campaign(network, SMALL)


def test_linen_batch_norm():
    model = LinenBatchNorm()
    variables = model.init(jax.random.key(0), COLOUR, True)
    variables = {**variables, "batch_stats": settled(variables["batch_stats"])}
    network = jfi.adopt((model, variables), COLOUR)
    names = {"Conv_0/kernel", "BatchNorm_0/scale", "batch_stats/BatchNorm_0/mean"}
    assert names <= set(network.positions)
    check_campaign(network, COLOUR)


def test_linen_in_training_mode_is_refused():
    class Trains(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dropout(0.5, deterministic=False)(linen.Dense(3)(x))

    model, x = Trains(), SMALL[:, 0, :4, 0]
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(jfi.InputError, match="Trains does not run with its variables alone; is it"):
        jfi.adopt((model, model.init(keys, x)), x)
    with pytest.raises(jfi.InputError, match=r"of Flax Linen; .* adopted as \(module, variables\)"):
        jfi.adopt(model, x)


# Equinox.


def equinox_lenet(eqx):
    class LeNet(eqx.Module):
        convs: list
        layers: list
        dropout: eqx.nn.Dropout

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            conv = eqx.nn.Conv2d
            self.convs = [conv(1, 6, 5, padding=2, key=keys[0]), conv(6, 16, 5, key=keys[1])]
            sizes = zip((16, 12, 8), (12, 8, 5), keys[2:], strict=True)
            self.layers = [eqx.nn.Linear(a, b, key=key) for a, b, key in sizes]
            self.dropout = eqx.nn.Dropout(0.5)

        def __call__(self, x, key=None):
            for conv in self.convs:
                x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(conv(x)))
            x = x.ravel()
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](self.dropout(x, key=key))

    return LeNet(jax.random.key(0))


def test_equinox_lenet(campaign):
    eqx = pytest.importorskip("equinox")
    model, images = equinox_lenet(eqx), SMALL.transpose(0, 3, 1, 2)
    network = jfi.adopt(model, images)
    assert {"convs/0/weight", "layers/2/bias"} <= set(network.positions)
    assert not model.dropout.inference
    campaign(network, images)


def test_equinox_batch_norm():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        fc: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(3, 6, 3, 2, key=one)
            self.norm = eqx.nn.BatchNorm(6, "batch", mode="batch")
            self.fc = eqx.nn.Linear(6, 5, key=two)

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.fc(jax.nn.relu(x).mean((1, 2))), state

    images = COLOUR.transpose(0, 3, 1, 2)
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for _ in range(3):
        _, state = run(jnp.asarray(images), state)  # statistics as training leaves them
    network = jfi.adopt((model, state), images)
    kept = [name for name in network.positions if name.startswith("state/norm/")]
    assert {"conv/weight", "norm/weight", "fc/bias"} <= set(network.positions) and len(kept) >= 2
    assert not model.norm.inference
    check_campaign(network, images)


# Haiku.


def haiku_lenet(hk):
    def lenet(x, is_training=True):
        x = hk.max_pool(jax.nn.relu(hk.Conv2D(6, 5)(x)), (2, 2, 1), (2, 2, 1), "VALID")
        x = hk.max_pool(
            jax.nn.relu(hk.Conv2D(16, 5, padding="VALID")(x)), (2, 2, 1), (2, 2, 1), "VALID"
        )
        x = jax.nn.relu(hk.Linear(12)(hk.Flatten()(x)))
        x = jax.nn.relu(hk.Linear(8)(x))
        x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
        return hk.Linear(5)(x)

    return lenet


def test_haiku_lenet(campaign):
    hk = pytest.importorskip("haiku")
    transformed = hk.transform(haiku_lenet(hk))
    params = transformed.init(jax.random.key(0), SMALL)
    network = jfi.adopt((transformed, params), SMALL)
    assert {"conv2_d/w", "linear_2/b"} <= set(network.positions)
    campaign(network, SMALL)


def haiku_batch_norm(hk, is_training):
    def net(x, is_training):
        x = hk.Conv2D(6, 3, 2)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        return hk.Linear(5)(jax.nn.relu(x).mean((1, 2)))

    params, state = hk.transform_with_state(net).init(jax.random.key(0), COLOUR, True)
    return hk.transform_with_state(lambda x: net(x, is_training)), params, state


def test_haiku_batch_norm():
    hk = pytest.importorskip("haiku")
    net, params, state = haiku_batch_norm(hk, True)
    for _ in range(3):
        _, state = net.apply(params, state, None, COLOUR)
    net, _, _ = haiku_batch_norm(hk, False)
    network = jfi.adopt((net, params, state), COLOUR)
    names = {"conv2_d/w", "batch_norm/scale", "state/batch_norm/~/mean_ema/average"}
    assert names <= set(network.positions)
    check_campaign(network, COLOUR)


def test_haiku_in_training_mode_is_refused():
    hk = pytest.importorskip("haiku")
    with pytest.raises(
        jfi.InputError, match=r"training mode: .* changed its batch_norm/~/mean_ema/"
    ):
        jfi.adopt(haiku_batch_norm(hk, True), COLOUR)
    lenet = haiku_lenet(hk)
    transformed = hk.transform(lambda x: lenet(x))
    params = transformed.init(jax.random.key(0), SMALL)
    with pytest.raises(jfi.InputError, match="Haiku function draws random numbers in inference"):
        jfi.adopt((transformed, params), SMALL)
    with pytest.raises(
        jfi.InputError, match=r"TransformedWithState is adopted as \(transformed, p"
    ):
        jfi.adopt(haiku_batch_norm(hk, False)[:2], COLOUR)


# Keras.


def keras_lenet(keras):
    inputs = keras.Input((12, 12, 1))
    layers = keras.layers
    x = layers.MaxPooling2D()(layers.Conv2D(6, 5, padding="same", activation="relu")(inputs))
    x = layers.MaxPooling2D()(layers.Conv2D(16, 5, activation="relu")(x))
    x = layers.Dense(12, activation="relu")(layers.Flatten()(x))
    x = layers.Dropout(0.5)(layers.Dense(8, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(5)(x))


def test_keras_lenet(campaign):
    keras = pytest.importorskip("keras")
    keras.utils.clear_session()
    network = jfi.adopt(keras_lenet(keras), SMALL)
    assert {"conv2d/kernel", "dense_2/bias"} <= set(network.positions)
    campaign(network, SMALL)


def test_keras_batch_norm():
    keras = pytest.importorskip("keras")
    keras.utils.clear_session()
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Conv2D(6, 3, 2, name="first"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
        ],
        name="net",
    )
    with pytest.raises(jfi.InputError, match="the Keras model net is not built"):
        jfi.adopt(model, COLOUR)
    model(COLOUR)
    for _ in range(3):
        model(COLOUR, training=True)
    network = jfi.adopt(model, COLOUR)
    names = {"net/first/kernel", "net/batch_normalization/moving_variance", "net/dense/bias"}
    assert names <= set(network.positions)
    check_campaign(network, COLOUR)


def test_keras_that_trains_all_the_same_is_refused():
    keras = pytest.importorskip("keras")

    class Trains(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def call(self, x):
            return self.norm(x, training=True)

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), Trains()])
    with pytest.raises(jfi.InputError, match=r"Keras model is in training mode: .*moving_mean"):
        jfi.adopt(model, SMALL[:, 0, :4, 0])


@pytest.mark.slow
def test_keras_on_another_backend_is_refused():
    pytest.importorskip("keras")
    pytest.importorskip("torch")
    code = (
        "import keras, numpy, jfi\n"
        "model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])\n"
        "try: jfi.adopt(model, numpy.ones((2, 4), 'float32'))\n"
        "except jfi.InputError as error: print(error)"
    )
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "Keras runs on torch; jfi adopts models on JAX: set the environment" in said.stdout


@pytest.mark.slow
def test_keras_mobilenet_v2():
    keras = pytest.importorskip("keras")
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, weights=None, classes=10)
    images = RNG.normal(size=(8, 64, 64, 3)).astype(np.float32)
    # Statistics of these images: with those at the start, nothing of them reaches the logits.
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(images, training=True)
    network = jfi.adopt(model, images)
    assert {"Conv1/kernel", "bn_Conv1/moving_mean"} <= set(network.positions)
    check_campaign(network, images, most=200)
