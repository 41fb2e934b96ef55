"""A network as the experiments see it: a Flax module and what is needed to feed it."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nets.layers import depthwise_by_taps

# Usual mean and standard deviation of a pixel in [0, 1], by number of channels: MNIST's for grey
# images; ImageNet's for colour, which the public CIFAR-10 ResNets were trained with. `normalising`
# takes others.
PIXELS = {
    1: ((0.1307,), (0.3081,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Mean and standard deviation that leave an input as it is: spikes are not normalised.
UNCHANGED = ((0.0,), (1.0,))


class NetError(ValueError):
    """A network or its weights can't be had, in one line: the name, the value, what is right."""


class Net(NamedTuple):
    """A pure Flax module with its input and its normalisation.

    `module.apply(variables, x)` maps normalised images [B, H, W, C] to logits [B, num_classes];
    a spiking net takes frames [B, T, H, W, P] or trains [B, T, channels], and leaves them as they
    are. `input_shape` is that of one input, without B.
    `flattened` names the dense kernels that read a flattened feature map, with its (H, W, C):
    PyTorch flattens C, H, W where Flax flattens H, W, C, so importing one permutes its rows.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flattened: tuple[tuple[str, tuple[int, int, int]], ...] = ()


def pixel_statistics(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that images of `channels` are normalised with."""
    if channels not in PIXELS:
        raise NetError(f"{name}: images of {channels} channels; known are 1 (grey) and 3 (colour)")
    return PIXELS[channels]


def normalising(net: Net, mean: Sequence[float], std: Sequence[float]) -> Net:
    """The net with a mean and a standard deviation of pixels in [0, 1] other than its usual ones.

    Args:
      mean, std: a number a channel.

    Raises:
      NetError: a net that takes no images; another number of channels; a mean that is not finite,
        a deviation that is not finite and positive, or so small that float32 overflows.
    """
    if len(net.input_shape) != 3:
        raise NetError(
            f"{net.name} takes events, which are not normalised; no mean and std is right"
        )
    channels = net.input_shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise NetError(
                f"{name} {_listed(values)}: {len(values)} numbers; images of {net.name} have "
                f"{channels} channels, and want one for each"
            )
    with np.errstate(all="ignore"):
        center, scale = np.float32(mean), np.float32(std)
        ends = (np.float32([[0], [1]]) - center) / scale
    if not np.isfinite(center).all():
        raise NetError(f"mean {_listed(mean)}: finite numbers are right")
    if not ((scale > 0) & np.isfinite(scale) & np.isfinite(ends)).all():
        raise NetError(f"std {_listed(std)}: finite numbers above 0 are right")
    return net._replace(mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def init(net: Net, seed: int) -> dict:
    """Fresh variables {"params": ..., "batch_stats": ...} (the latter where the net has BN)."""
    return _init(net.module, jax.random.key(seed), jnp.zeros((1, *net.input_shape)))


@partial(jax.jit, static_argnums=0)
def _init(module: nn.Module, key: jax.Array, image: jax.Array) -> dict:
    return module.init(key, image)


def apply(net: Net, variables: dict, x: jax.Array) -> jax.Array:
    """Logits [B, num_classes] of normalised images [B, H, W, C]; BN in inference mode."""
    return net.module.apply(variables, x)


def apply_named(net: Net, variables: dict, x: jax.Array) -> jax.Array:
    """As `apply`, with the output of every layer named for JAX: `conv1/output`, `layer1_0/output`.

    Names (`jax.ad_checkpoint.checkpoint_name`) change no number; they say where a value is made.
    """
    with named_outputs():
        return apply(net, variables, x)


def named_outputs():
    """A context in which the output of every Flax Linen layer is named, as `apply_named` says."""

    def name(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name != "__call__" or not context.module.path:
            return out
        return checkpoint_name(out, "/".join((*context.module.path, "output")))

    return nn.intercept_methods(name)


def fast(net: Net) -> Net:
    """The net as this machine runs it fastest: the same variables, logits equal up to rounding.

    For training and plain inference. Fault injection wants the net itself: it knows a layer by its
    convolution.
    """
    if jax.default_backend() != "cpu" or not hasattr(net.module, "depthwise"):
        return net
    return net._replace(module=net.module.clone(depthwise=depthwise_by_taps))


def normalise(net: Net, images):
    """Images in [0, 1], [B, H, W, C], as the net expects them: float32, (image - mean) / std;
    frames of spikes, as float32.

    Raises NetError where the images aren't of the net's input shape.
    """
    if images.shape[1:] != net.input_shape:
        raise NetError(
            f"images of shape {tuple(images.shape)}: {net.name} takes [B, ...] with "
            f"{net.input_shape} for one"
        )
    mean, std = np.float32(net.mean), np.float32(net.std)
    return (images.astype(np.float32) - mean) / std
