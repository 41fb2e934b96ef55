"""Networks by name, and their weights.

net = nets.build("resnet20")
variables = nets.load(net, "resnet20.th")
logits = nets.apply(net, variables, nets.normalise(net, images))
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nets import lenet, mobilenet, resnet, resnet9, resnet18, spiking, transformer, vgg
from nets.net import (
    Net,
    NetError,
    apply,
    apply_named,
    fast,
    init,
    named_outputs,
    normalise,
    normalising,
)
from nets.weights import load, save, statistics, statistics_header

__all__ = [
    "Net", "NetError", "apply", "apply_named", "build", "fast", "init", "load", "named_outputs",
    "names", "normalise", "normalising", "save", "statistics", "statistics_header",
]  # fmt: skip


class Entry(NamedTuple):
    """How to build a net: build(input_shape, num_classes, dtype) -> Net, its usual input and number
    of classes, and what the axes of an input are."""

    build: object
    input_shape: tuple[int, ...]
    num_classes: int = 10
    axes: tuple[str, ...] = ("height", "width", "channels")


def _spiking(build, name: str, size, input_shape: tuple[int, ...], num_classes: int) -> dict:
    """The entry of a spiking net: frames of events, or trains of spikes."""
    axes = ("steps", "height", "width", "polarities") if len(input_shape) == 4 else (
        "steps", "channels",
    )  # fmt: skip
    return {name: Entry(partial(build, name, size), input_shape, num_classes, axes)}


CIFAR = (32, 32, 3)
NMNIST = (100, 17, 17, 2)
REGISTRY = (
    {"lenet": Entry(lenet.build, (28, 28, 1))}
    | {f"resnet{n}": Entry(partial(resnet.build, n), CIFAR) for n in resnet.DEPTHS}
    | {"resnet9": Entry(resnet9.build, CIFAR), "resnet18": Entry(resnet18.build, CIFAR)}
    | {f"vgg{n}": Entry(partial(vgg.build, n), CIFAR) for n in vgg.STAGES}
    | {"mobilenetv2": Entry(mobilenet.build, CIFAR)}
    | {"vit": Entry(transformer.build_vit, (28, 28, 1))}
    | {"gpt": Entry(transformer.build_gpt, (32,), len(transformer.CHARACTERS), ("characters",))}
    | _spiking(spiking.build_dense, "snn_nmnist", (20,), NMNIST, 10)
    | _spiking(spiking.build_dense, "snn_nmnist500", (500,), NMNIST, 10)
    | _spiking(spiking.build_recurrent, "snn_shd", 200, (100, 700), 20)
    | _spiking(spiking.build_conv, "snn_dvs128", (12, 32), (25, 32, 32, 2), 11)
)


def names() -> tuple[str, ...]:
    """Names that `build` knows."""
    return tuple(REGISTRY)


def build(
    name: str,
    input_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    dtype=jnp.float32,
) -> Net:
    """The net of that name, computing in `dtype` with parameters of `dtype`.

    `input_shape` is that of one input: an image (H, W, C); of a spiking net frames (T, H, W, P) or
    a train (T, channels), T being any number of time steps; of gpt a text (T,). Where it or
    `num_classes` isn't given, it is the net's usual one.
    Raises NetError for an unknown name, a shape the net isn't made for, or a type that isn't one
    of floating point.
    """
    if name not in REGISTRY:
        raise NetError(f"net {name!r} is unknown; known are {', '.join(names())}")
    entry = REGISTRY[name]
    shape = tuple(int(n) for n in (input_shape or entry.input_shape))
    if len(shape) != len(entry.axes) or min(shape) < 1:
        raise NetError(f"{name}: input shape {shape}; ({', '.join(entry.axes)}) is right")
    num_classes = entry.num_classes if num_classes is None else num_classes
    if num_classes < 2:
        raise NetError(f"{name}: {num_classes} classes; 2 or more are right")
    return entry.build(shape, num_classes, _float_type(name, dtype))


def _float_type(name: str, dtype) -> jnp.dtype:
    """`dtype` as JAX will compute in it, or NetError."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise NetError(f"{name}: dtype {dtype!r} is unknown; float32 is usual") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NetError(f"{name}: dtype {dtype}; a type of floating point is right")
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise NetError(f"{name}: dtype float64 needs 64 bits enabled in JAX (JAX_ENABLE_X64=1)")
    return dtype
