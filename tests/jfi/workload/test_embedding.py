"""Embeddings against a network written out by hand, and against Flax's own intermediates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfi
import nets
from jfi.errors import InputError
from jfi.workload.embedding import embedding

DRAW = np.random.default_rng(0)
PARAMS = {
    "fc1": DRAW.normal(size=(6, 5)).astype(np.float32),
    "fc2": DRAW.normal(size=(5, 4)).astype(np.float32),
    "scale": np.full(3, 2, np.float32),
    "fc3": DRAW.normal(size=(4, 3)).astype(np.float32),
}
IMAGES = DRAW.normal(size=(150, 6)).astype(np.float32)


def apply(p, x):
    return jnp.tanh(jax.nn.relu(x @ p["fc1"]) @ p["fc2"]) @ p["fc3"] * p["scale"]


def test_layers_of_a_dense_network():
    network = jfi.network(apply, PARAMS, IMAGES[0])
    first = IMAGES @ PARAMS["fc1"]
    second = np.maximum(first, 0) @ PARAMS["fc2"]
    last = np.tanh(second)
    expected = {"fc1": first, "fc2": second, "fc3": last @ PARAMS["fc3"], None: last}
    for layer, values in expected.items():
        np.testing.assert_allclose(embedding(network, IMAGES, layer), values, rtol=2e-4, atol=1e-5)


def test_layers_of_a_convolutional_network():
    net = nets.build("lenet", (8, 8, 1))
    variables = nets.init(net, 0)
    images = DRAW.normal(size=(3, 8, 8, 1)).astype(np.float32)
    network = jfi.network(net.module.apply, variables, images[0])
    _, seen = net.module.apply(variables, images, capture_intermediates=True)
    name = next(site.name for site in network.sites if site.name.startswith("conv"))
    layer = name.split("/")[0]
    own = variables["params"][layer]
    outputs = np.asarray(seen["intermediates"][layer]["__call__"][0]) - own.get("bias", 0)
    found = embedding(network, images, f"{layer}/kernel")
    np.testing.assert_allclose(found, outputs.reshape(3, -1), rtol=1e-4, atol=1e-5)


def test_an_unknown_layer_is_refused():
    network = jfi.network(apply, PARAMS, IMAGES[0])
    with pytest.raises(InputError, match="layer 'fc9' is unknown; the kernels are fc1, fc2, fc3"):
        embedding(network, IMAGES, "fc9")
