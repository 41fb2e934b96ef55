"""Networks of many kinds on random inputs: what `experiments.bench --zoo` is measured on.

Weights are random where none come with the project.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import nets
from jfi.errors import InputError

IMAGES = 64
WEIGHTS = Path(__file__).parent / "weights"
TRAINED = {
    "lenet": "lenet_mnist",
    "resnet20": "resnet20_cifar10_exact",
    "snn_nmnist": "snn_nmnist_nmnist",
}
STEPS, FEATURES, HIDDEN, HEADS, TOKENS, CLASSES = 20, 32, 64, 4, 50, 10


class Sample(NamedTuple):
    """A network as a user brings it, and inputs [B, ...]."""

    apply: Callable[[Any, Any], Any]
    params: Any
    images: np.ndarray


def check(names: Iterable[str]) -> None:
    """Raises InputError for the first name that is no network's."""
    for name in names:
        if name not in ZOO:
            raise InputError(f"network {name!r} is unknown; choose from {', '.join(ZOO)}")


def sample(name: str) -> Sample:
    """The network of that name.

    Raises:
      InputError: there is none.
    """
    check([name])
    return ZOO[name](np.random.default_rng(0))


# --- Of the project


def _of_nets(name: str, rng, shape=None) -> Sample:
    net = nets.build(name, shape)
    images = rng.random((IMAGES, *net.input_shape), np.float32)
    if len(net.input_shape) == 4:  # frames of events
        images = (images < 0.1).astype(np.float32)
    else:
        images = np.asarray(nets.normalise(net, images))
    kept = WEIGHTS / f"{TRAINED.get(name)}.safetensors"
    params = nets.load(net, kept) if kept.exists() else nets.init(net, 0)
    return Sample(partial(nets.apply, net), params, images)


# --- Others, in plain JAX


def _weights(rng, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random weights that keep the size of what goes through them; vectors are zeros."""
    return {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
        if len(shape) > 1
        else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }


def _normal(x):
    """Layer normalisation without scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def _block(p: dict, x, causal: bool):
    """A transformer's block, normalised first."""
    batch, length, width = x.shape
    q, k, v = jnp.split(_normal(x) @ p["qkv"], 3, -1)
    q, k, v = (t.reshape(batch, length, HEADS, -1).transpose(0, 2, 1, 3) for t in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(width / HEADS))
    if causal:
        scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
    heads = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, width)
    x = x + heads @ p["out"]
    return x + jax.nn.gelu(_normal(x) @ p["up"] + p["bias"]) @ p["down"]


def _blocks(rng, layers: int, width: int) -> dict[str, dict]:
    shapes = dict(
        qkv=(width, 3 * width), out=(width, width), up=(width, 4 * width), bias=(4 * width,),
        down=(4 * width, width),
    )  # fmt: skip
    return {f"block{k}": _weights(rng, **shapes) for k in range(layers)}


def _mlp(rng) -> Sample:
    def apply(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["first"]) @ p["second"]) @ p["third"]

    shapes = dict(first=(HIDDEN, 128), second=(128, 128), third=(128, CLASSES))
    return Sample(apply, _weights(rng, **shapes), rng.standard_normal((IMAGES, HIDDEN), np.float32))


def _encoder(rng) -> Sample:
    def apply(p, x):
        for layer in range(2):
            x = _block(p[f"block{layer}"], x, causal=False)
        return _normal(x).mean(1) @ p["head"]["kernel"]

    params = _blocks(rng, 2, HIDDEN) | {"head": _weights(rng, kernel=(HIDDEN, CLASSES))}
    return Sample(apply, params, rng.standard_normal((IMAGES, 16, HIDDEN), np.float32))


def _vit(rng) -> Sample:
    """ViT-tiny in small: patches of 8x8 of a 32x32 image, four layers of width 96."""
    width = 96

    def apply(p, x):
        patches = x.reshape(len(x), 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        x = patches.reshape(len(x), 16, -1) @ p["embed"]["kernel"] + p["embed"]["place"]
        for layer in range(4):
            x = _block(p[f"block{layer}"], x, causal=False)
        return _normal(x).mean(1) @ p["head"]["kernel"]

    params = _blocks(rng, 4, width) | {
        "embed": _weights(rng, kernel=(192, width), place=(16, width)),
        "head": _weights(rng, kernel=(width, CLASSES)),
    }
    return Sample(apply, params, rng.standard_normal((IMAGES, 32, 32, 3), np.float32))


def _gpt(rng) -> Sample:
    """Two layers; logits of the next token after the last of 16."""

    def apply(p, tokens):
        x = p["embed"]["token"][tokens] + p["embed"]["place"]
        for layer in range(2):
            x = _block(p[f"block{layer}"], x, causal=True)
        return _normal(x)[:, -1] @ p["head"]["kernel"]

    params = _blocks(rng, 2, HIDDEN) | {
        "embed": _weights(rng, token=(TOKENS, HIDDEN), place=(16, HIDDEN)),
        "head": _weights(rng, kernel=(HIDDEN, TOKENS)),
    }
    return Sample(apply, params, rng.integers(0, TOKENS, (IMAGES, 16), np.int32))


def _lstm_step(p, state, x):
    h, c = state
    i, f, g, o = jnp.split(x @ p["input"].T + h @ p["hidden"].T + p["bias"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None


def _gru_step(p, state, x):
    (h,) = state
    a, b = x @ p["input"].T + p["bias"], h @ p["hidden"].T
    (ra, za, na), (rb, zb, nb) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
    r, z = jax.nn.sigmoid(ra + rb), jax.nn.sigmoid(za + zb)
    return ((1 - z) * jnp.tanh(na + r * nb) + z * h,), None


def _recurrent(step, gates: int, states: int, scanned: bool, rng) -> Sample:
    """Weights laid out as PyTorch's, [out, in]; the loop over time unrolled, or a `lax.scan`."""

    def apply(p, x):
        state = tuple(jnp.zeros((len(x), HIDDEN)) for _ in range(states))
        if scanned:
            state, _ = lax.scan(partial(step, p), state, x.swapaxes(0, 1))
        else:
            for t in range(STEPS):
                state, _ = step(p, state, x[:, t])
        return state[0] @ p["out"]

    shapes = dict(input=(FEATURES, gates * HIDDEN), hidden=(HIDDEN, gates * HIDDEN))
    params = {name: leaf.T.copy() for name, leaf in _weights(rng, **shapes).items()}
    params |= _weights(rng, bias=(gates * HIDDEN,), out=(HIDDEN, CLASSES))
    return Sample(apply, params, rng.standard_normal((IMAGES, STEPS, FEATURES), np.float32))


def _embedding(rng) -> Sample:
    def apply(p, tokens):
        return jax.nn.relu(p["table"][tokens].mean(1) @ p["hidden"]) @ p["out"]

    shapes = dict(table=(1000, HIDDEN), hidden=(HIDDEN, HIDDEN), out=(HIDDEN, CLASSES))
    return Sample(apply, _weights(rng, **shapes), rng.integers(0, 1000, (IMAGES, 12), np.int32))


_STEPS = {"lstm": (_lstm_step, 4, 2), "gru": (_gru_step, 3, 1)}
ZOO: dict[str, Callable[[np.random.Generator], Sample]] = {
    "mlp": _mlp,
    "embedding": _embedding,
    "encoder": _encoder,
    "vit": _vit,
    "gpt": _gpt,
    **{
        f"{name}_{way}": partial(_recurrent, *step, way == "scanned")
        for name, step in _STEPS.items()
        for way in ("unrolled", "scanned")
    },
    **{name: partial(_of_nets, name) for name in ("lenet", "resnet20", "resnet18")},
    "resnet18_64": partial(_of_nets, "resnet18", shape=(64, 64, 3)),
    **{name: partial(_of_nets, name) for name in ("mobilenetv2", "vgg16", "snn_nmnist")},
}
