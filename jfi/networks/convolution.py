"""Convolutions: their numbers by role, and on a CPU the way to compute each that is fastest.

XLA's CPU backend has fast code for most convolutions, channels first or last (it transposes by
itself), of any stride and dilation, so most are left to it. It is slow in four cases, known by
shape alone: so that one network on one kind of machine is always computed the same way.

A product with padding counts as XLA counts it: 0 times an infinite weight is NaN, except on maps
smaller than their kernel, where padding is left out (`_inside`).
"""

import itertools
import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

EXACT = (jnp.float32, jnp.float64)  # rounding in fewer bits is more than an allowance bears

# Rates below are GFLOP/s of one core (AVX-512, JAX 0.10.2), 64 images, of XLA's own and of the way
# taken here. With 8 and 256 images the order is the same.
#
# Few channels: a patch has few terms, and a sum of shifted products beats a matrix product. 28x28x1
# 5x5 to 6: 7, 60; 32x32x3 3x3 to 16: 23, 76; to 64: 57, 85; 1x1 of 12 to 64: 72, 113. With 36
# terms (32x32x4 3x3): to 16 28, 62, to 64 70, 66. Above: 5x5 of 2 to 32 51, 54; of 3 to 64 91, 43;
# 7x7 of 3 to 64 118, 27; 1x1 of 16 115, 104.
FEW_TERMS = 36  # taps times channels
FEW_CHANNELS = 12
# Groups: one convolution a group. 14x14x512 3x3 in 32 groups: 23, 72; 56x56x256 to 28x28 in 32: 8,
# 19; 16x16x32 in 8: 3, 7. More groups than this take long to compile.
MOST_GROUPS = 64
# Maps smaller than the kernel: see `_inside`. More taps than this take long to compile.
MOST_TAPS = 64


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


class _Way(NamedTuple):
    """What a way needs to know of a convolution beside its operands; hashable."""

    conv: Conv
    precision: Any
    out: tuple[int, ...]  # shape of the output


def fast(eqn, x, kernel):
    """The output of a `conv_general_dilated` on a CPU; None where XLA's own code is to be used."""
    conv = numbers(eqn)
    (out,) = eqn.outvars
    if conv is None or jax.default_backend() != "cpu":
        return None
    if not x.dtype == kernel.dtype == out.aval.dtype or out.aval.dtype not in EXACT:
        return None  # a sum by taps would be of another type, or rounded at every tap
    if 0 in (*x.shape, *kernel.shape, *out.aval.shape):
        return None
    found = _way(conv, x.shape, kernel.shape)
    if found is None:
        return None
    return found(_Way(conv, eqn.params["precision"], out.aval.shape), x, kernel)


def _way(conv: Conv, in_shape, kernel_shape):
    """The way that is fastest for these shapes; None for XLA's own."""
    if _leaves_zeros_out(conv, kernel_shape):
        return None
    size, window = (
        math.prod(shape[axis] for axis in axes[2:])
        for shape, axes in ((in_shape, conv.lhs), (kernel_shape, conv.rhs))
    )
    channels, dilated = kernel_shape[conv.rhs[1]], max(conv.dilation, default=1) > 1
    if conv.groups == in_shape[conv.lhs[1]] > 1:
        return None if dilated else _each
    if window > size:
        return _inside if window <= MOST_TAPS and conv.groups == 1 else None
    if conv.groups > 1:
        return _by_group if conv.groups <= MOST_GROUPS and not dilated else None
    few = len(conv.lhs) > 2 and channels <= FEW_CHANNELS and channels * window <= FEW_TERMS
    return _few if few and not dilated else None


def _leaves_zeros_out(conv: Conv, kernel_shape) -> bool:
    """Whether XLA may leave out zeros of padding or between elements that are factors elsewhere."""
    sides = zip(conv.rhs[2:], conv.padding, conv.spacing, strict=True)
    return any(
        gap > 1 or min(pad) < 0 or max(pad) >= kernel_shape[axis] for axis, pad, gap in sides
    )


def _own(way: _Way, x, kernel):
    """The convolution as XLA computes it, of as many groups as the kernel leaves."""
    conv = way.conv
    return lax.conv_general_dilated(
        x, kernel, conv.strides, conv.padding, conv.spacing, conv.dilation,
        lax.ConvDimensionNumbers(conv.lhs, conv.rhs, conv.out),
        feature_group_count=x.shape[conv.lhs[1]] // kernel.shape[conv.rhs[1]],
        precision=way.precision,
    )  # fmt: skip


def _each(way: _Way, x, kernel):
    """Every output channel from one input channel, by taps.

    XLA has no fast code for it: 12 to 60 times faster (32x32x96 3x3: 0.4, 5; 112x112x32: 0.5, 52).
    """
    feature = way.conv.lhs[1]
    x = jnp.repeat(x, kernel.shape[way.conv.rhs[0]] // x.shape[feature], feature)
    return taps(way.conv, way.out, x, kernel)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _few(way: _Way, x, kernel):
    """Of few input channels, each by taps.

    In two halves, of a loop: what no loop makes is computed anew in every later operation that XLA
    fuses with it, five times in ResNet-20. Of one channel (LeNet) it is cheap enough for that.
    Differentiated it is XLA's own: the gradient of shifted products is many times slower.
    """
    if x.shape[way.conv.lhs[1]] == 1:
        return taps(way.conv, way.out, x, kernel)
    conv = way.conv._replace(padding=((0, 0),) * len(way.conv.padding))
    padded = lax.pad(x, jnp.zeros((), x.dtype), way.conv.pad_config())
    longest = max(range(len(conv.strides)), key=lambda k: way.out[conv.out[2 + k]])
    side, place, stride = conv.lhs[2 + longest], conv.out[2 + longest], conv.strides[longest]
    rows = way.out[place]
    half = (rows + 1) // 2
    seen = (half - 1) * stride + kernel.shape[conv.rhs[2 + longest]]
    sizes = tuple(half if axis == place else size for axis, size in enumerate(way.out))

    def fill(number, out):
        start = number * (rows - half)
        part = lax.dynamic_slice_in_dim(padded, start * stride, seen, side)
        return lax.dynamic_update_slice_in_dim(
            out, _by_channel(conv, sizes, part, kernel), start, place
        )

    return lax.fori_loop(0, 2, fill, jnp.zeros(way.out, x.dtype))


def _by_channel(conv: Conv, out_shape, x, kernel):
    """A convolution as the sum over its input channels, each by taps."""
    each = (
        jnp.split(operand, operand.shape[axis], axis)
        for operand, axis in ((x, conv.lhs[1]), (kernel, conv.rhs[1]))
    )
    return reduce(jnp.add, (taps(conv, out_shape, *channel) for channel in zip(*each, strict=True)))


def _few_jvp(way: _Way, operands, moved):
    (x, kernel), (dx, dkernel) = operands, moved
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_own(way, dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(_own(way, x, dkernel))
    out = _few(way, x, kernel)
    return out, reduce(jnp.add, terms, jnp.zeros_like(out) if not terms else terms.pop())


_few.defjvp(_few_jvp, symbolic_zeros=True)


# Compiled as calls: what they cut out of kernels is not a value of a pair (`split.live`).
@partial(jax.jit, static_argnums=0)
def _inside(way: _Way, x, kernel):
    """On a map smaller than the kernel: the sum over taps of a product of what each sees of it.

    XLA exchanges input and kernel here and has only loops for what results: 2x2x512 3x3: 1.5, 420;
    1x1x512 3x3: 12, 1600; 4x4x128 5x5: 6, 300. Padding is no factor in its loops, nor here; most
    taps see little else.
    """
    conv = way.conv
    x = lax.transpose(x, (conv.lhs[0], *conv.lhs[2:], conv.lhs[1]))
    kernel = lax.transpose(kernel, (*conv.rhs[2:], conv.rhs[1], conv.rhs[0]))
    places = [way.out[axis] for axis in conv.out[2:]]
    total = jnp.zeros((len(x), *places, kernel.shape[-1]), x.dtype)
    for tap in itertools.product(*map(range, kernel.shape[:-2])):
        sides = zip(
            tap, x.shape[1:], places, conv.strides, conv.padding, conv.dilation, strict=False
        )
        seen = [_seen(k * gap - low, *side) for k, *side, (low, _), gap in sides]
        if all(first < end for first, end, _ in seen):
            part = x[:, *(index for *_, index in seen)]
            product = lax.dot_general(
                part, kernel[tap], (((part.ndim - 1,), (0,)), ((), ())), precision=way.precision
            )
            ends = [(first, n - end, 0) for (first, end, _), n in zip(seen, places, strict=True)]
            zero = jnp.zeros((), x.dtype)
            total = total + lax.pad(product, zero, [(0, 0, 0), *ends, (0, 0, 0)])
    order = [0] * total.ndim
    for source, target in enumerate((conv.out[0], *conv.out[2:], conv.out[1])):
        order[target] = source
    return lax.transpose(total, order)


def _seen(start: int, size: int, places: int, stride: int) -> tuple[int, int, slice]:
    """Of one axis: the places where a tap, `start` from the map at the first, is on it (from, to),
    and what it sees there."""
    first = max(0, -(start // stride))
    end = min(places, -((start - size) // stride))
    return first, end, slice(start + first * stride, start + (end - 1) * stride + 1, stride)


@partial(jax.jit, static_argnums=0)
def _by_group(way: _Way, x, kernel):
    """One convolution a group: faster, and its gradient can be mapped also where it strides."""
    conv = way.conv
    parts = (
        jnp.split(operand, conv.groups, axis)
        for operand, axis in ((x, conv.lhs[1]), (kernel, conv.rhs[0]))
    )
    found = [_own(way, *part) for part in zip(*parts, strict=True)]
    return lax.concatenate(found, conv.out[1])
