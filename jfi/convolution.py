"""Convolutions: their numbers by role; those that mix no channels as sums of shifted products."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EXACT = (jnp.float32, jnp.float64)  # rounding in fewer bits is more than an allowance bears


class Conv(NamedTuple):
    """The numbers of a convolution, by role."""

    lhs: tuple[int, ...]  # axes (batch, feature, *spatial) of the input
    rhs: tuple[int, ...]  # axes (out feature, in feature, *spatial) of the kernel
    out: tuple[int, ...]  # axes (batch, feature, *spatial) of the output
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]  # of the kernel
    spacing: tuple[int, ...]  # of the input (lhs_dilation)
    groups: int

    def pad_config(self) -> list[tuple[int, int, int]]:
        """Padding of the input as `lax.pad` takes it."""
        config = [(0, 0, 0)] * len(self.lhs)
        for axis, pad, gap in zip(self.lhs[2:], self.padding, self.spacing, strict=True):
            config[axis] = (*pad, gap - 1)
        return config

    def depthwise(self, in_shape, kernel_shape) -> bool:
        """One output channel an input channel, each of its own."""
        return self.groups == in_shape[self.lhs[1]] == kernel_shape[self.rhs[0]]

    def window(self, in_shape, out_shape, *, batch: int) -> list[int]:
        """Sizes of the padded one-channel input that one kernel tap meets."""
        sizes = [1] * len(in_shape)
        sizes[self.lhs[0]] = batch
        for axis, place, stride in zip(self.lhs[2:], self.out[2:], self.strides, strict=True):
            sizes[axis] = (out_shape[place] - 1) * stride + 1
        return sizes

    def strided(self, x):
        """Every stride-th element of a window, laid out as the output."""
        steps = [1] * x.ndim
        for axis, stride in zip(self.lhs[2:], self.strides, strict=True):
            steps[axis] = stride
        x = lax.slice(x, (0,) * x.ndim, x.shape, steps)
        order = [0] * x.ndim
        for source, target in zip(self.lhs, self.out, strict=True):
            order[target] = source
        return lax.transpose(x, order)


def numbers(eqn) -> Conv | None:
    """The numbers of a `conv_general_dilated`; None for one that groups its batch."""
    p = eqn.params
    if p["batch_group_count"] != 1:
        return None
    d = p["dimension_numbers"]
    return Conv(
        d.lhs_spec, d.rhs_spec, d.out_spec, p["window_strides"], tuple(p["padding"]),
        p["rhs_dilation"], p["lhs_dilation"], p["feature_group_count"],
    )  # fmt: skip


def taps(conv: Conv, out_shape, x, weights):
    """A convolution that mixes no channels as a sum over kernel taps of shifted input times weight.

    Under vmap the weights of a one-channel convolution differ per fault, which a convolution would
    take as one group per fault; a product per tap stays element-wise.
    """
    padded = lax.pad(x, jnp.zeros((), x.dtype), conv.pad_config())
    weights = lax.transpose(weights, (*conv.rhs[2:], conv.rhs[1], conv.rhs[0]))
    spatial, features = weights.shape[:-2], weights.shape[-1]
    sizes = conv.window(padded.shape, out_shape, batch=x.shape[conv.lhs[0]])
    sizes[conv.lhs[1]] = x.shape[conv.lhs[1]]
    row = [features if axis == conv.out[1] else 1 for axis in range(padded.ndim)]
    total = None
    for tap in itertools.product(*map(range, spatial)):
        start = [0] * padded.ndim
        for axis, k, gap in zip(conv.lhs[2:], tap, conv.dilation, strict=True):
            start[axis] = k * gap
        limit = [a + b for a, b in zip(start, sizes, strict=True)]
        term = conv.strided(lax.slice(padded, start, limit)) * weights[tap].reshape(row)
        total = term if total is None else total + term
    return total


def depthwise(eqn, x, kernel):
    """The output of a depthwise convolution on a CPU, by taps; None for any other.

    XLA's CPU backend has no fast code for it: 12 to 35 times faster (32 images, 3x3).
    """
    conv = numbers(eqn)
    if conv is None or not conv.depthwise(x.shape, kernel.shape) or max(conv.dilation) > 1:
        return None
    if conv.groups == 1 or jax.default_backend() != "cpu":
        return None
    (out,) = eqn.outvars
    if not x.dtype == kernel.dtype == out.aval.dtype or out.aval.dtype not in EXACT:
        return None  # a sum by taps would be of another type, or rounded at every tap
    return taps(conv, out.aval.shape, x, kernel)
