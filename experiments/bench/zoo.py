"""Networks of many kinds on random inputs: what `experiments.bench --zoo` is measured on.

Weights are random where none come with the project. Batch normalisation of the networks at 224x224
is folded into the convolutions, as it is where they are deployed.
"""

import math
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

IMAGES, FEWER = 64, 16  # small networks; those of 32x32 images with many operations
LARGE = 4  # images of networks at 64x64 and 224x224 ...
SHORT = 50  # ... and faults of a campaign
SIDE, THOUSAND = 224, 1000
WEIGHTS = Path(__file__).parents[1] / "weights"
TRAINED = {
    "lenet": "lenet_mnist",
    "resnet20": "resnet20_cifar10_exact",
    "snn_nmnist": "snn_nmnist_nmnist",
}
STEPS, FEATURES, HIDDEN, HEADS, TOKENS, CLASSES = 20, 32, 64, 4, 50, 10


class Sample(NamedTuple):
    """A network as a user brings it, inputs [B, ...], and how many faults make a campaign."""

    apply: Callable[[Any, Any], Any]
    params: Any
    images: np.ndarray
    campaign: int = 1000


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


def _of_nets(name: str, rng, shape=None, images: int = IMAGES, campaign: int = 1000) -> Sample:
    net = nets.build(name, shape)
    images = rng.random((images, *net.input_shape), np.float32)
    if len(net.input_shape) == 4:  # frames of events
        images = (images < 0.1).astype(np.float32)
    else:
        images = np.asarray(nets.normalise(net, images))
    kept = WEIGHTS / f"{TRAINED.get(name)}.safetensors"
    params = nets.load(net, kept) if kept.exists() else nets.init(net, 0)
    return Sample(partial(nets.apply, net), params, images, campaign)


# --- Others, in plain JAX


def _weights(rng, gain: float = 1.0, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random weights that keep the size of what goes through them, times `gain`; vectors are 0."""
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(gain / np.sqrt(_inputs(shape)))
        if len(shape) > 1
        else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }


def _inputs(shape: tuple[int, ...]) -> int:
    """What one output of a product sums over."""
    return math.prod(shape[:-1])


def _normal(x):
    """Layer normalisation without scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def _block(p: dict, x, causal: bool, heads: int = HEADS):
    """A transformer's block, normalised first."""
    batch, length, width = x.shape
    q, k, v = jnp.split(_normal(x) @ p["qkv"], 3, -1)
    q, k, v = (t.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3) for t in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(width / heads))
    if causal:
        scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
    found = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, width)
    x = x + found @ p["out"]
    return x + jax.nn.gelu(_normal(x) @ p["up"] + p["bias"]) @ p["down"]


def _blocks(rng, layers: int, width: int) -> dict[str, dict]:
    shapes = dict(
        qkv=(width, 3 * width), out=(width, width), up=(width, 4 * width), bias=(4 * width,),
        down=(4 * width, width),
    )  # fmt: skip
    return {f"block{k}": _weights(rng, **shapes) for k in range(layers)}


def _patches(x, side: int):
    """[B, H, W, C] -> [B, patches, values]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, side * side * channels)


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
        x = _patches(x, 8) @ p["embed"]["kernel"] + p["embed"]["place"]
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


# --- At 224x224, of 1000 classes


def _conv(p: dict, x, stride: int = 1, groups: int = 1):
    """Square convolution of [B, H, W, C], padded by half its side."""
    half = p["kernel"].shape[0] // 2
    return p["bias"] + lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), [(half, half)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


def _pool(x, side: int, pad: int):
    """Largest of windows, every second."""
    window, pads = (1, side, side, 1), [(0, 0), (pad, pad), (pad, pad), (0, 0)]
    return lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 2, 2, 1), pads)


def _kernel(rng, side: int, inputs: int, outputs: int, gain: float = 1.0) -> dict[str, Any]:
    return _weights(rng, gain, kernel=(side, side, inputs, outputs), bias=(outputs,))


def _large(apply, params: dict, rng) -> Sample:
    return Sample(apply, params, rng.standard_normal((LARGE, SIDE, SIDE, 3), np.float32), SHORT)


def _resnet50(rng) -> Sample:
    """He, Zhang, Ren, Sun, CVPR 2016, Table 1, 50 layers; strides in the 3x3 convolutions."""
    stages = ((64, 3), (128, 4), (256, 6), (512, 3))
    params: dict[str, Any] = {"conv1": _kernel(rng, 7, 3, 64)}
    strides, width = {}, 64
    for stage, (planes, count) in enumerate(stages):
        for k in range(count):
            name = f"layer{stage + 1}.{k}"
            strides[name] = 2 if stage and not k else 1
            params[name] = {
                "conv1": _kernel(rng, 1, width, planes),
                "conv2": _kernel(rng, 3, planes, planes),
                "conv3": _kernel(rng, 1, planes, 4 * planes),
            }
            if not k:
                params[name]["downsample"] = _kernel(rng, 1, width, 4 * planes)
            width = 4 * planes
    params["fc"] = _weights(rng, kernel=(width, THOUSAND))

    def apply(p, x):
        x = _pool(jax.nn.relu(_conv(p["conv1"], x, 2)), 3, 1)
        for name, stride in strides.items():
            own = p[name]
            y = jax.nn.relu(_conv(own["conv1"], x))
            y = jax.nn.relu(_conv(own["conv2"], y, stride))
            same = _conv(own["downsample"], x, stride) if "downsample" in own else x
            x = jax.nn.relu(_conv(own["conv3"], y) + same)
        return x.mean((1, 2)) @ p["fc"]["kernel"]

    return _large(apply, params, rng)


def _vgg16(rng) -> Sample:
    """Simonyan, Zisserman, ICLR 2015, Table 1, column D."""
    stages = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    gain, width, params = math.sqrt(2), 3, {}
    for stage, widths in enumerate(stages):
        for k, channels in enumerate(widths):
            params[f"conv{stage + 1}.{k}"] = _kernel(rng, 3, width, channels, gain)
            width = channels
    shapes = dict(first=(49 * width, 4096), second=(4096, 4096), third=(4096, THOUSAND))
    params["classifier"] = _weights(rng, gain, **shapes)

    def apply(p, x):
        for stage, widths in enumerate(stages):
            for k in range(len(widths)):
                x = jax.nn.relu(_conv(p[f"conv{stage + 1}.{k}"], x))
            x = _pool(x, 2, 0)
        x, last = x.reshape(len(x), -1), p["classifier"]
        return jax.nn.relu(jax.nn.relu(x @ last["first"]) @ last["second"]) @ last["third"]

    return _large(apply, params, rng)


# Expansion, channels, blocks, stride of the first.
MOBILE = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def _mobilenetv2(rng) -> Sample:
    """Sandler et al., CVPR 2018, Table 2."""
    gain, width = math.sqrt(2), 32
    params: dict[str, Any] = {"stem": _kernel(rng, 3, 3, width, gain)}
    strides = {}
    for stage, (factor, channels, count, stride) in enumerate(MOBILE):
        for k in range(count):
            name, wide = f"stage{stage}.{k}", factor * width
            strides[name] = stride if not k else 1
            params[name] = {"expand": _kernel(rng, 1, width, wide, gain)} if factor > 1 else {}
            params[name]["depthwise"] = _kernel(rng, 3, 1, wide, gain)
            params[name]["project"] = _kernel(rng, 1, wide, channels)
            width = channels
    params["top"] = _kernel(rng, 1, width, 1280, gain)
    params["classifier"] = _weights(rng, kernel=(1280, THOUSAND))

    def apply(p, x):
        x = jax.nn.relu6(_conv(p["stem"], x, 2))
        for name, stride in strides.items():
            own, y = p[name], x
            if "expand" in own:
                y = jax.nn.relu6(_conv(own["expand"], y))
            y = jax.nn.relu6(_conv(own["depthwise"], y, stride, groups=y.shape[-1]))
            y = _conv(own["project"], y)
            x = x + y if x.shape == y.shape else y
        x = jax.nn.relu6(_conv(p["top"], x))
        return x.mean((1, 2)) @ p["classifier"]["kernel"]

    return _large(apply, params, rng)


def _vit_b16(rng) -> Sample:
    """Dosovitskiy et al., ICLR 2021, Table 1: Base, patches of 16x16."""
    width, side, layers, heads = 768, 16, 12, 12
    places = (SIDE // side) ** 2

    def apply(p, x):
        x = _patches(x, side) @ p["embed"]["kernel"]
        first = jnp.broadcast_to(p["embed"]["first"], (len(x), 1, width))
        x = jnp.concatenate([first, x], 1) + p["embed"]["place"]
        for layer in range(layers):
            x = _block(p[f"block{layer}"], x, causal=False, heads=heads)
        return _normal(x)[:, 0] @ p["head"]["kernel"]

    embed = dict(kernel=(3 * side**2, width), first=(1, width), place=(1 + places, width))
    params = _blocks(rng, layers, width) | {
        "embed": _weights(rng, **embed),
        "head": _weights(rng, kernel=(width, THOUSAND)),
    }
    return _large(apply, params, rng)


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
    **{name: partial(_of_nets, name) for name in ("lenet", "resnet20", "snn_nmnist")},
    **{
        name: partial(_of_nets, name, images=FEWER) for name in ("mobilenetv2", "vgg16", "resnet18")
    },
    "resnet18_64": partial(_of_nets, "resnet18", shape=(64, 64, 3), images=LARGE, campaign=SHORT),
    "resnet50_224": _resnet50,
    "vgg16_224": _vgg16,
    "mobilenetv2_224": _mobilenetv2,
    "vit_b16_224": _vit_b16,
}
