"""Operators of ONNX in JAX: https://onnx.ai/onnx/operators/, opsets 7 and later.

Each takes a `Node` and its inputs, None where one is left out. `node.xp` is NumPy where all inputs
are known, so that shapes are computed in 64 bits and while tracing, else `jax.numpy`.
"""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jfi.errors import InputError


class Node(NamedTuple):
    """One node of a graph."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int
    xp: Any = jnp

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)


# Inputs whose values must be known while tracing.
STATIC = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Split": (1,),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "OneHot": (1,),
    "CumSum": (1,),
    "Trilu": (1,),
    "TopK": (1,),
    "Dropout": (1, 2),
    **dict.fromkeys(
        "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare "
        "ReduceLogSum ReduceLogSumExp".split(),
        (1,),
    ),
}

OPERATORS: dict[str, Callable[..., Any]] = {}


def _operator(*names: str):
    def keep(function):
        OPERATORS.update(dict.fromkeys(names or (function.__name__,), function))
        return function

    return keep


def _unsupported(node: Node, what: str) -> InputError:
    return InputError(
        f"the ONNX node {node.op} ({node.outputs[0]}) has {what}, which jfi does not support"
    )


# Element by element.


def _by_name(names: dict[str, str]) -> None:
    def make(name):
        return lambda node, *x: getattr(node.xp, name)(*x)

    OPERATORS.update({op: make(name) for op, name in names.items()})


_by_name(
    dict(
        Add="add", Sub="subtract", Mul="multiply", Equal="equal", Greater="greater", Less="less",
        GreaterOrEqual="greater_equal", LessOrEqual="less_equal", And="logical_and",
        Or="logical_or", Xor="logical_xor", Not="logical_not", Where="where", Abs="abs",
        Neg="negative", Ceil="ceil", Floor="floor", Exp="exp", Log="log", Sqrt="sqrt", Sin="sin",
        Cos="cos", Tan="tan", Asin="arcsin", Acos="arccos", Atan="arctan", Sinh="sinh",
        Cosh="cosh", Asinh="arcsinh", Acosh="arccosh", Atanh="arctanh", Tanh="tanh", Sign="sign",
        IsNaN="isnan", Reciprocal="reciprocal", MatMul="matmul", Round="round",
    )
)  # fmt: skip


def _alone(names: dict[str, Callable[[Any], Any]]) -> None:
    def make(function):
        return lambda node, x: function(x)

    OPERATORS.update({op: make(function) for op, function in names.items()})


_alone(
    dict(
        Identity=lambda x: x, Relu=jax.nn.relu, Sigmoid=jax.nn.sigmoid, Softplus=jax.nn.softplus,
        Softsign=jax.nn.soft_sign, Mish=jax.nn.mish, Erf=lax.erf,
        HardSwish=lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    )
)  # fmt: skip


@_operator()
def Div(node, a, b):
    """Integers are divided towards zero."""
    if not jnp.issubdtype(a.dtype, jnp.integer):
        return node.xp.divide(a, b)
    quotient = node.xp.abs(a) // node.xp.abs(b)
    return (quotient * node.xp.sign(a) * node.xp.sign(b)).astype(a.dtype)


@_operator()
def Pow(node, a, b):
    """Of the type of the base."""
    if isinstance(b, np.ndarray) and b.size == 1 and b.item() in (2.0, 3.0):
        return node.xp.asarray(a ** int(b.item())).astype(a.dtype)
    return node.xp.power(a, b).astype(a.dtype)


@_operator()
def Mod(node, a, b):
    """The sign is the divisor's, with fmod the dividend's."""
    return node.xp.fmod(a, b) if node.get("fmod", 0) else node.xp.mod(a, b)


@_operator("Max", "Min", "Sum", "Mean")
def _several(node, *x):
    """Of any number of inputs."""
    function = {"Max": "maximum", "Min": "minimum"}.get(node.op, "add")
    total = reduce(getattr(node.xp, function), x)
    return total / len(x) if node.op == "Mean" else total


@_operator()
def LeakyRelu(node, x):
    """alpha x below zero."""
    return jnp.where(x < 0, x * _as(x, node.get("alpha", 0.01)), x)


@_operator()
def PRelu(node, x, slope):
    """A slope of its own below zero."""
    return jnp.where(x < 0, x * slope, x)


@_operator()
def Elu(node, x):
    """alpha (exp(x) - 1) below zero."""
    return jax.nn.elu(x, node.get("alpha", 1.0))


@_operator()
def Celu(node, x):
    """alpha (exp(x / alpha) - 1) below zero."""
    return jax.nn.celu(x, node.get("alpha", 1.0))


@_operator()
def Selu(node, x):
    """gamma times Elu."""
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return _as(x, gamma) * jax.nn.elu(x, alpha)


@_operator()
def ThresholdedRelu(node, x):
    """Zero up to alpha."""
    return jnp.where(x > node.get("alpha", 1.0), x, 0)


@_operator()
def HardSigmoid(node, x):
    """alpha x + beta, between 0 and 1."""
    return jnp.clip(x * _as(x, node.get("alpha", 0.2)) + _as(x, node.get("beta", 0.5)), 0, 1)


@_operator()
def Gelu(node, x):
    """x times the normal distribution, or its approximation by tanh."""
    return jax.nn.gelu(x, approximate=node.get("approximate", "none") == "tanh")


@_operator()
def Swish(node, x):
    """x times its sigmoid."""
    return x * jax.nn.sigmoid(x * _as(x, node.get("alpha", 1.0)))


@_operator()
def Clip(node, x, low=None, high=None):
    """Bounds are attributes before opset 11."""
    low = node.get("min") if low is None else low
    high = node.get("max") if high is None else high
    x = x if low is None else node.xp.maximum(x, _as(x, low))
    return x if high is None else node.xp.minimum(x, _as(x, high))


@_operator()
def Cast(node, x):
    """Floats become integers towards zero."""
    dtype = _dtype(node, node.get("to"))
    return x.astype(dtype if node.xp is np else jax.dtypes.canonicalize_dtype(dtype))


@_operator()
def CastLike(node, x, other):
    """To the type of the other."""
    return x.astype(other.dtype)


@_operator()
def Dropout(node, x, ratio=None, training=None):
    """Nothing in inference.

    Raises:
      InputError: it is told to train.
    """
    if training is not None and bool(np.asarray(training)):
        raise InputError(
            f"the ONNX node Dropout ({node.outputs[0]}) is in training mode: export the model for "
            "inference"
        )
    return x, jnp.ones(x.shape, bool)


# Shapes.


@_operator()
def Shape(node, x):
    """The shape, or a slice of it."""
    return np.asarray(x.shape, np.int64)[slice(node.get("start", 0), node.get("end"))]


@_operator()
def Size(node, x):
    """How many elements there are."""
    return np.asarray(math.prod(x.shape), np.int64)


@_operator()
def Reshape(node, x, shape):
    """0 keeps an axis, unless allowzero."""
    shape = _ints(shape)
    if not node.get("allowzero", 0):
        shape = [x.shape[k] if n == 0 else n for k, n in enumerate(shape)]
    return node.xp.reshape(x, shape)


@_operator()
def Flatten(node, x):
    """To two axes."""
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return node.xp.reshape(x, (math.prod(x.shape[:axis]), -1))


@_operator()
def Squeeze(node, x, axes=None):
    """Without axes of size 1."""
    axes = _axes(node, axes)
    return node.xp.squeeze(x, None if axes is None else tuple(axes))


@_operator()
def Unsqueeze(node, x, axes=None):
    """With axes of size 1."""
    return node.xp.expand_dims(x, tuple(_axes(node, axes)))


@_operator()
def Transpose(node, x):
    """Axes reversed unless told."""
    return node.xp.transpose(x, node.get("perm"))


@_operator()
def Concat(node, *x):
    """Along an axis."""
    return node.xp.concatenate(x, node.get("axis"))


@_operator()
def Split(node, x, sizes=None):
    """Into parts of given sizes, or about equal ones."""
    axis, sizes = node.get("axis", 0), node.get("split") if sizes is None else _ints(sizes)
    if sizes is None:
        count = node.get("num_outputs", len(node.outputs))
        each = -(-x.shape[axis] // count)
        sizes = [each] * (count - 1)
    else:
        sizes = list(sizes)[:-1]
    return tuple(node.xp.split(x, list(np.cumsum(sizes)), axis))


@_operator()
def Slice(node, x, starts=None, ends=None, axes=None, steps=None):
    """With ends beyond the axis cut to it, as Python has it."""
    starts = _ints(node.get("starts") if starts is None else starts)
    ends = _ints(node.get("ends") if ends is None else ends)
    axes = node.get("axes") if axes is None else axes
    axes = range(len(starts)) if axes is None else _ints(axes)
    steps = [1] * len(starts) if steps is None else _ints(steps)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Backwards to the start is past it, which Python says by None.
        past = step < 0 and end < -x.shape[axis]
        index[axis] = slice(start, None if past else end, step)
    return x[tuple(index)]


@_operator()
def Gather(node, x, index):
    """By numbers, negative ones from the end."""
    axis = node.get("axis", 0)
    if node.xp is np:
        return np.take(x, index, axis)
    return jnp.take(x, jnp.where(index < 0, index + x.shape[axis], index), axis, mode="clip")


@_operator()
def GatherElements(node, x, index):
    """One number for each element."""
    return node.xp.take_along_axis(x, index, node.get("axis", 0))


@_operator()
def GatherND(node, x, index):
    """By rows of numbers."""
    if node.get("batch_dims", 0):
        raise _unsupported(node, "batch_dims")
    return x[tuple(node.xp.moveaxis(index, -1, 0))]


@_operator()
def Expand(node, x, shape):
    """Broadcast both ways."""
    return node.xp.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_ints(shape))))


@_operator()
def Tile(node, x, repeats):
    """Repeated along every axis."""
    return node.xp.tile(x, _ints(repeats))


@_operator()
def Pad(node, x, pads=None, value=None, axes=None):
    """By a constant, the edge, a reflection, or around."""
    pads = _ints(node.get("pads") if pads is None else pads)
    axes = range(x.ndim) if axes is None else _ints(axes)
    value = node.get("value", 0) if value is None else value
    widths = [(0, 0)] * x.ndim
    for k, axis in enumerate(axes):
        widths[axis] = (pads[k], pads[k + len(axes)])
    mode = node.get("mode", "constant")
    # Negative widths cut.
    cut = tuple(
        slice(max(0, -a), n - max(0, -b)) for n, (a, b) in zip(x.shape, widths, strict=True)
    )
    x, widths = x[cut], [(max(0, a), max(0, b)) for a, b in widths]
    if mode == "constant":
        return node.xp.pad(x, widths, constant_values=_as(x, value).reshape(()))
    return node.xp.pad(x, widths, mode=mode)


@_operator()
def ConstantOfShape(node, shape):
    """One value throughout."""
    value = node.get("value", np.zeros(1, np.float32))
    return np.full(tuple(_ints(shape)), value.ravel()[0], value.dtype)


@_operator()
def Range(node, start, limit, step):
    """Numbers in a row."""
    return np.arange(start.item(), limit.item(), step.item(), start.dtype)


@_operator()
def OneHot(node, index, depth, values):
    """The second value at the index, the first elsewhere."""
    depth, axis = int(np.ravel(depth)[0]), node.get("axis", -1)
    index = jnp.where(index < 0, index + depth, index)
    hot = jax.nn.one_hot(index, depth, axis=axis, dtype=bool)
    return jnp.where(hot, values[1], values[0])


@_operator()
def CumSum(node, x, axis):
    """Running sums."""
    if node.get("exclusive", 0) or node.get("reverse", 0):
        raise _unsupported(node, "exclusive or reverse")
    return node.xp.cumsum(x, int(np.ravel(axis)[0])).astype(x.dtype)


@_operator()
def Trilu(node, x, k=0):
    """The upper or lower triangle."""
    function = node.xp.triu if node.get("upper", 1) else node.xp.tril
    return function(x, int(np.ravel(k)[0]))


@_operator()
def DepthToSpace(node, x):
    """Blocks of channels become blocks of space."""
    b, c, h, w = x.shape
    n = node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        x = x.reshape(b, n, n, c // n**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(b, c // n**2, n, n, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, c // n**2, h * n, w * n)


@_operator()
def SpaceToDepth(node, x):
    """Blocks of space become channels."""
    b, c, h, w = x.shape
    n = node.get("blocksize")
    order = (0, 1, 3, 5, 2, 4) if node.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    x = x.reshape(b, c, h // n, n, w // n, n).transpose(order)
    return x.reshape(b, c * n**2, h // n, w // n)


@_operator("Resize", "Upsample")
def _resize(node, x, *given):
    """The nearest neighbour, by whole factors."""
    _, scales, sizes = (None, *given, None) if node.op == "Upsample" else (*given, *[None] * 3)[:3]
    if node.get("axes"):
        raise _unsupported(node, "axes of its own")
    scales = None if scales is None or not np.size(scales) else np.ravel(scales)
    target = _ints(sizes) if sizes is not None else None
    if target is None:
        target = [math.floor(n * s) for n, s in zip(x.shape, scales, strict=True)]
    mode, at = node.get("mode", "nearest"), node.get("coordinate_transformation_mode", "half_pixel")
    rounded = node.get("nearest_mode", "round_prefer_floor")
    early = node.op == "Upsample" or node.opset < 11
    repeats = early or (at, rounded) == ("asymmetric", "floor")
    repeats |= at in ("half_pixel", "pytorch_half_pixel") and rounded.startswith("round")
    whole = all(t % n == 0 for t, n in zip(target, x.shape, strict=True))
    if mode != "nearest" or not whole or not repeats:
        raise _unsupported(node, f"mode {mode} {at} {rounded} from {x.shape} to {target}")
    for axis, (n, t) in enumerate(zip(x.shape, target, strict=True)):
        x = node.xp.repeat(x, t // n, axis) if t != n else x
    return x


# Reductions.


def _reduction(node, x, axes=None):
    axes = _axes(node, axes)
    if axes is None or not len(axes):
        if node.get("noop_with_empty_axes", 0):
            return x
        axes = range(x.ndim)
    options = {"axis": tuple(axes), "keepdims": bool(node.get("keepdims", 1))}
    if node.op in ("ReduceL1", "ReduceL2", "ReduceSumSquare"):
        x = abs(x) if node.op == "ReduceL1" else x * x
        total = node.xp.sum(x, **options)
        return node.xp.sqrt(total) if node.op == "ReduceL2" else total
    if node.op == "ReduceLogSumExp":
        return jax.nn.logsumexp(x, **options)
    name = "Sum" if node.op == "ReduceLogSum" else node.op.removeprefix("Reduce")
    found = getattr(node.xp, name.lower())(x, **options)
    return node.xp.log(found) if node.op == "ReduceLogSum" else found


_operator(*(name for name in STATIC if name.startswith("Reduce")))(_reduction)


@_operator("ArgMax", "ArgMin")
def _arg(node, x):
    """The first place of the extreme."""
    axis, last = node.get("axis", 0), node.get("select_last_index", 0)
    function = node.xp.argmax if node.op == "ArgMax" else node.xp.argmin
    found = function(node.xp.flip(x, axis), axis) if last else function(x, axis)
    found = x.shape[axis] - 1 - found if last else found
    return node.xp.expand_dims(found, axis) if node.get("keepdims", 1) else found


@_operator("Softmax", "LogSoftmax")
def _softmax(node, x):
    """Over one axis; before opset 13 over all from that axis on."""
    function = jax.nn.softmax if node.op == "Softmax" else jax.nn.log_softmax
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.ndim
    return function(x, tuple(range(axis, x.ndim)))


# Layers.


@_operator()
def Gemm(node, a, b, c=None):
    """alpha a b + beta c."""
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    y = _times(a @ b, node.get("alpha", 1.0))
    return y if c is None else y + _times(c, node.get("beta", 1.0))


def _times(x, factor):
    return x if factor == 1.0 else x * _as(x, factor)


@_operator()
def Einsum(node, *x):
    """By its equation."""
    return node.xp.einsum(node.get("equation"), *x)


def _windows(node, shape, kernel) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Strides, dilations and padding of a window over the axes of `shape`."""
    dims = len(kernel)
    strides = list(node.get("strides") or [1] * dims)
    dilations = list(node.get("dilations") or [1] * dims)
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for n, k, s, d in zip(shape, kernel, strides, dilations, strict=True):
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            less, more = total // 2, total - total // 2
            pads.append((less, more) if auto == "SAME_UPPER" else (more, less))
        return strides, dilations, pads
    flat = [0] * 2 * dims if auto == "VALID" else list(node.get("pads") or [0] * 2 * dims)
    return strides, dilations, list(zip(flat[:dims], flat[dims:], strict=True))


def _convolve(node, x, w, preferred=None):
    strides, dilations, pads = _windows(node, x.shape[2:], w.shape[2:])
    return lax.conv_general_dilated(
        x, w, strides, pads, rhs_dilation=dilations, feature_group_count=node.get("group", 1),
        preferred_element_type=preferred,
    )  # fmt: skip


def _per_channel(values, ndim: int, axis: int = 1):
    return values if values.ndim == 0 else values.reshape(_one_axis(ndim, axis))


def _one_axis(ndim: int, axis: int) -> list[int]:
    return [-1 if k == axis % ndim else 1 for k in range(ndim)]


@_operator()
def Conv(node, x, w, bias=None):
    """Cross-correlation, channels first."""
    y = _convolve(node, x, w)
    return y if bias is None else y + _per_channel(bias, y.ndim)


@_operator()
def ConvTranspose(node, x, w, bias=None):
    """The gradient of a convolution with regard to its input."""
    dims, groups = w.ndim - 2, node.get("group", 1)
    if node.get("auto_pad", "NOTSET") != "NOTSET" or node.get("output_shape"):
        raise _unsupported(node, "auto_pad or output_shape")
    strides, dilations, pads = _windows(node, x.shape[2:], w.shape[2:])
    extra = list(node.get("output_padding") or [0] * dims)
    # [C_in, C_out / groups, ...] -> [C_out, C_in / groups, ...], turned around.
    w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).swapaxes(1, 2)
    w = jnp.flip(w.reshape(-1, *w.shape[2:]), tuple(range(2, w.ndim - 1)))
    reach = [(k - 1) * d for k, d in zip(w.shape[2:], dilations, strict=True)]
    around = [(r - a, r - b + e) for r, (a, b), e in zip(reach, pads, extra, strict=True)]
    y = lax.conv_general_dilated(
        x, w, [1] * dims, around, lhs_dilation=strides, rhs_dilation=dilations,
        feature_group_count=groups,
    )  # fmt: skip
    return y if bias is None else y + _per_channel(bias, y.ndim)


def _pool(node, x, start, function, pads=None):
    """Windows of `x`; its padding, if given, is not that of the node."""
    kernel = list(node.get("kernel_shape"))
    strides, dilations, _ = _windows(node, x.shape[2:], kernel)
    pads = _pool_pads(node, x.shape[2:]) if pads is None else pads
    return lax.reduce_window(
        x, start, function, (1, 1, *kernel), (1, 1, *strides), [(0, 0), (0, 0), *pads],
        window_dilation=(1, 1, *dilations),
    )  # fmt: skip


def _pool_pads(node, shape) -> list[tuple[int, int]]:
    """Padding, with what the last window of ceil_mode needs beyond it."""
    kernel = list(node.get("kernel_shape"))
    strides, dilations, pads = _windows(node, shape, kernel)
    if not node.get("ceil_mode", 0):
        return pads
    return [
        (a, b + _overhang(n + a + b, k, s, d, a + n))
        for n, k, s, d, (a, b) in zip(shape, kernel, strides, dilations, pads, strict=True)
    ]


def _overhang(size: int, k: int, s: int, d: int, inside: int) -> int:
    """What the last window of ceil_mode needs beyond the padding; it must start inside."""
    reach = (k - 1) * d + 1
    steps = -(-(size - reach) // s)
    steps -= steps * s >= inside
    return max(0, steps * s + reach - size)


@_operator()
def MaxPool(node, x):
    """The largest of a window; indices are not given."""
    if len(node.outputs) > 1 and node.outputs[1]:
        raise _unsupported(node, "an output of indices")
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    return _pool(node, x, np.asarray(lowest, x.dtype), lax.max)


@_operator()
def AveragePool(node, x):
    """The mean of a window, padding counted only if told."""
    total = _pool(node, x, np.zeros((), x.dtype), lax.add)
    inside = np.ones((1, 1, *x.shape[2:]), x.dtype)
    pads = _pool_pads(node, x.shape[2:])
    if node.get("count_include_pad", 0):
        # What ceil_mode adds is not counted.
        _, _, own = _windows(node, x.shape[2:], node.get("kernel_shape"))
        inside = np.pad(inside, [(0, 0), (0, 0), *own], constant_values=1)
        pads = [(0, more - b) for (_, more), (_, b) in zip(pads, own, strict=True)]
    count = _pool(node, inside, np.zeros((), x.dtype), lax.add, pads)
    return total / count


@_operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node, x):
    """Over all of space."""
    function = node.xp.mean if node.op == "GlobalAveragePool" else node.xp.max
    return function(x, axis=tuple(range(2, x.ndim)), keepdims=True)


@_operator()
def BatchNormalization(node, x, scale, bias, mean, variance):
    """By stored statistics.

    Raises:
      InputError: it is told to train.
    """
    if node.get("training_mode", 0):
        raise InputError(
            f"the ONNX node BatchNormalization ({node.outputs[0]}) is in training mode: export the "
            "model for inference"
        )
    scale, bias, mean, variance = (_per_channel(v, x.ndim) for v in (scale, bias, mean, variance))
    return (x - mean) * scale / jnp.sqrt(variance + _as(x, node.get("epsilon", 1e-5))) + bias


def _normalised(x, axes, epsilon):
    """Of mean 0 and variance 1, and the mean and the inverse deviation."""
    mean = x.mean(axes, keepdims=True)
    centred = x - mean
    deviation = jnp.sqrt((centred * centred).mean(axes, keepdims=True) + _as(x, epsilon))
    return centred / deviation, mean, 1 / deviation


@_operator()
def LayerNormalization(node, x, scale, bias=None):
    """Over the last axes."""
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    y, mean, inverse = _normalised(x, axes, node.get("epsilon", 1e-5))
    y = y * scale
    return (y if bias is None else y + bias), mean, inverse


@_operator()
def InstanceNormalization(node, x, scale, bias):
    """Over space, every channel of every image."""
    y, *_ = _normalised(x, tuple(range(2, x.ndim)), node.get("epsilon", 1e-5))
    return y * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)


@_operator()
def GroupNormalization(node, x, scale, bias):
    """Over groups of channels; scale and bias are of groups before opset 21."""
    groups, channels = node.get("num_groups"), x.shape[1]
    grouped = x.reshape(len(x), groups, -1)
    y = _normalised(grouped, 2, node.get("epsilon", 1e-5))[0].reshape(x.shape)
    if scale.shape[0] == groups != channels:
        scale, bias = (jnp.repeat(v, channels // groups) for v in (scale, bias))
    return y * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)


@_operator()
def LRN(node, x):
    """Divided by a power of the neighbouring channels' squares."""
    size = node.get("size")
    before = (size - 1) // 2
    pads = [(0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)]
    window = (1, size, *[1] * (x.ndim - 2))
    squares = lax.reduce_window(x * x, np.zeros((), x.dtype), lax.add, window, (1,) * x.ndim, pads)
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    return x / (_as(x, bias) + _as(x, alpha / size) * squares) ** _as(x, beta)


# Recurrent layers: x [T, B, I], weights [D, gates H, I] and [D, gates H, H], D directions.


def _recurrent(node, x, w, r, b, starts, step):
    """Outputs [T, D, B, H] and the last states, each [D, B, H]; `step` advances one direction."""
    if node.get("layout", 0) or node.get("clip") is not None or node.get("activations"):
        raise _unsupported(node, "a layout, a clip or activations of its own")
    hidden, ways = node.get("hidden_size") or r.shape[-1], w.shape[0]
    direction = node.get("direction", "forward")
    outputs, lasts = [], []
    for way in range(ways):
        zero = jnp.zeros((x.shape[1], hidden), x.dtype)
        start = tuple(zero if given is None else given[way] for given in starts)
        bias = jnp.zeros((2, r.shape[1]), x.dtype) if b is None else b[way].reshape(2, -1)
        reverse = direction == "reverse" or way == 1

        def body(state, now, way=way, bias=bias):
            after = step(state, now, w[way], r[way], bias)
            return after, after[0]

        last, each = lax.scan(body, start, x, reverse=reverse)
        outputs.append(each)
        lasts.append(last)
    stacked = tuple(jnp.stack(part) for part in zip(*lasts, strict=True))
    return jnp.stack(outputs, 1), *stacked


def _whole(node, lengths, x):
    if lengths is not None and not _all_are(lengths, x.shape[0]):
        raise _unsupported(node, "sequence_lens other than the whole sequence")


def _all_are(lengths, steps: int) -> bool:
    return isinstance(lengths, np.ndarray) and bool((lengths == steps).all())


@_operator()
def LSTM(node, x, w, r, b=None, lengths=None, h=None, c=None, peephole=None):
    """Gates input, output, forget, cell."""
    _whole(node, lengths, x)
    if peephole is not None or node.get("input_forget", 0):
        raise _unsupported(node, "peepholes or a coupled forget gate")

    def step(state, now, w, r, bias):
        h, c = state
        i, o, f, g = jnp.split(now @ w.T + h @ r.T + bias[0] + bias[1], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    return _recurrent(node, x, w, r, b, (h, c), step)


@_operator()
def GRU(node, x, w, r, b=None, lengths=None, h=None):
    """Gates update, reset, hidden."""
    _whole(node, lengths, x)
    after = node.get("linear_before_reset", 0)

    def step(state, now, w, r, bias):
        (h,) = state
        wz, wr, wh = jnp.split(now @ w.T + bias[0], 3, axis=-1)
        rz, rr, rh = jnp.split(r, 3)
        bz, br, bh = jnp.split(bias[1], 3)
        z = jax.nn.sigmoid(wz + h @ rz.T + bz)
        reset = jax.nn.sigmoid(wr + h @ rr.T + br)
        inner = reset * (h @ rh.T + bh) if after else (reset * h) @ rh.T + bh
        return ((1 - z) * jnp.tanh(wh + inner) + z * h,)

    return _recurrent(node, x, w, r, b, (h,), step)


@_operator()
def RNN(node, x, w, r, b=None, lengths=None, h=None):
    """tanh of a sum."""
    _whole(node, lengths, x)

    def step(state, now, w, r, bias):
        return (jnp.tanh(now @ w.T + state[0] @ r.T + bias[0] + bias[1]),)

    return _recurrent(node, x, w, r, b, (h,), step)


# Quantised layers: real = (code - zero) scale.


@_operator()
def QuantizeLinear(node, x, scale, zero=None):
    """To the nearest code, ties to even, cut to the range."""
    if node.get("block_size", 0):
        raise _unsupported(node, "blocks")
    axis = node.get("axis", 1)
    dtype = jnp.dtype(jnp.uint8) if zero is None else zero.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise _unsupported(node, f"codes of type {dtype}")
    codes = jnp.round(x / _along(scale, x.ndim, axis))
    if zero is not None:
        codes = codes + _along(zero, x.ndim, axis).astype(x.dtype)
    info = jnp.iinfo(dtype)
    return jnp.clip(codes, info.min, info.max).astype(dtype)


@_operator()
def DequantizeLinear(node, codes, scale, zero=None):
    """(code - zero) scale."""
    if node.get("block_size", 0):
        raise _unsupported(node, "blocks")
    axis = node.get("axis", 1)
    exact = jnp.int32 if jnp.issubdtype(codes.dtype, jnp.integer) else jnp.float32
    wide = codes.astype(exact)
    if zero is not None:
        wide = wide - _along(zero, codes.ndim, axis).astype(exact)
    return wide.astype(scale.dtype) * _along(scale, codes.ndim, axis)


def _along(values, ndim: int, axis: int):
    """One number for all, or one for each place of an axis."""
    return values.reshape(()) if values.size == 1 else values.reshape(_one_axis(ndim, axis))


def _centred(codes, zero, axis=None):
    """Codes as int32 minus their zero."""
    wide = codes.astype(jnp.int32)
    if zero is None:
        return wide
    axis = codes.ndim - 1 if axis is None else axis
    return wide - _along(zero, codes.ndim, axis).astype(jnp.int32)


def _requantised(total, scale, zero):
    codes = jnp.round(total.astype(jnp.float32) * scale) + zero.astype(jnp.float32)
    info = jnp.iinfo(zero.dtype)
    return jnp.clip(codes, info.min, info.max).astype(zero.dtype)


@_operator()
def QLinearConv(node, x, xs, xz, w, ws, wz, ys, yz, bias=None):
    """A convolution of codes, summed in int32."""
    total = _convolve(node, _centred(x, xz), _centred(w, wz, 0), jnp.int32)
    if bias is not None:
        total = total + _per_channel(bias, total.ndim)
    return _requantised(total, xs.reshape(()) * _along(ws, total.ndim, 1) / ys, yz)


@_operator()
def ConvInteger(node, x, w, xz=None, wz=None):
    """A convolution of codes, in int32."""
    return _convolve(node, _centred(x, xz), _centred(w, wz, 0), jnp.int32)


@_operator()
def MatMulInteger(node, a, b, az=None, bz=None):
    """A product of codes, in int32."""
    return jnp.matmul(_centred(a, az), _centred(b, bz), preferred_element_type=jnp.int32)


@_operator()
def QLinearMatMul(node, a, a_scale, az, b, bs, bz, ys, yz):
    """A product of codes, summed in int32."""
    total = jnp.matmul(_centred(a, az), _centred(b, bz), preferred_element_type=jnp.int32)
    return _requantised(total, a_scale * bs / ys, yz)


@_operator()
def DynamicQuantizeLinear(node, x):
    """Codes in uint8 by the range of the values."""
    low, high = jnp.minimum(x.min(), 0), jnp.maximum(x.max(), 0)
    scale = (high - low) / 255
    zero = jnp.clip(jnp.round(-low / scale), 0, 255)
    codes = jnp.clip(jnp.round(x / scale) + zero, 0, 255)
    return codes.astype(jnp.uint8), scale, zero.astype(jnp.uint8)


# Helpers.


def _as(x, value):
    """A number of the type of `x`."""
    if isinstance(value, float | int):
        return np.asarray(value, x.dtype)
    return value.astype(x.dtype)


def _ints(values) -> list[int]:
    return [int(n) for n in np.ravel(np.asarray(values))]


def _axes(node, given) -> list[int] | None:
    """Axes, an input in later opsets and an attribute in earlier ones."""
    found = node.get("axes") if given is None else given
    return None if found is None else _ints(found)


def _dtype(node, number: int):
    """A type by its number in ONNX (`TensorProto.DataType`)."""
    types = {
        1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
        9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
        16: ml_dtypes.bfloat16,
    }  # fmt: skip
    if number not in types:
        raise _unsupported(node, f"a cast to type {number}")
    return np.dtype(types[number])
