"""Networks by name, and their weights.

net = nets.build("resnet20")
variables = nets.load(net, "resnet20.th")
logits = nets.apply(net, variables, nets.normalise(net, images))
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nets import lenet, mobilenet, resnet, resnet9, resnet18, vgg
from nets.net import Net, NetError, apply, fast, init, normalise
from nets.weights import load, save

__all__ = [
    "Net", "NetError", "apply", "build", "fast", "init", "load", "names", "normalise", "save",
]  # fmt: skip


class Entry(NamedTuple):
    """How to build a net: build(input_shape, num_classes, dtype) -> Net, and its usual input."""

    build: object
    input_shape: tuple[int, int, int]


CIFAR = (32, 32, 3)
REGISTRY = (
    {"lenet": Entry(lenet.build, (28, 28, 1))}
    | {f"resnet{n}": Entry(partial(resnet.build, n), CIFAR) for n in resnet.DEPTHS}
    | {"resnet9": Entry(resnet9.build, CIFAR), "resnet18": Entry(resnet18.build, CIFAR)}
    | {f"vgg{n}": Entry(partial(vgg.build, n), CIFAR) for n in vgg.STAGES}
    | {"mobilenetv2": Entry(mobilenet.build, CIFAR)}
)


def names() -> tuple[str, ...]:
    """Names that `build` knows."""
    return tuple(REGISTRY)


def build(
    name: str,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int = 10,
    dtype=jnp.float32,
) -> Net:
    """The net of that name for images (H, W, C), computing in `dtype` with parameters of `dtype`.

    Raises NetError for an unknown name, a shape the net isn't made for, or a type that isn't one
    of floating point.
    """
    if name not in REGISTRY:
        raise NetError(f"net {name!r} is unknown; known are {', '.join(names())}")
    entry = REGISTRY[name]
    shape = tuple(int(n) for n in (input_shape or entry.input_shape))
    if len(shape) != 3 or min(shape) < 1:
        raise NetError(f"{name}: input shape {shape}; (height, width, channels) is right")
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
