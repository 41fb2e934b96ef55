"""Convolutions as they are computed on a CPU, against XLA's own: values, gradients, NaN."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jfi.hardware.compiling import jit
from jfi.networks import convolution, program

LAYOUTS = {
    "last": ("NHWC", "HWIO", "NHWC"),
    "first": ("NCHW", "OIHW", "NCHW"),
    "odd": ("HWNC", "OHWI", "NHCW"),
}


class Shape(NamedTuple):
    """A convolution of squares, if not said otherwise."""

    way: str | None
    size: tuple[int, int]
    channels: int
    features: int
    window: tuple[int, int]
    stride: int = 1
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1))
    groups: int = 1
    dilation: int = 1
    spacing: int = 1


NONE = ((0, 0), (0, 0))
TWO = ((2, 2), (2, 2))
SHAPES = {
    "lenet1": Shape("_few", (14, 14), 1, 6, (5, 5), padding=TWO),
    "lenet2": Shape(None, (12, 12), 6, 16, (5, 5), padding=NONE),
    "stem": Shape("_few", (9, 9), 3, 16, (3, 3)),
    "strided stem": Shape("_few", (10, 7), 3, 8, (3, 3), 2),
    "one row": Shape("_few", (1, 11), 2, 4, (1, 5), padding=((0, 0), (2, 1))),
    "wide stem": Shape(None, (16, 16), 3, 8, (7, 7), 2, ((3, 3), (3, 3))),
    "pointwise of few": Shape("_few", (5, 5), 8, 4, (1, 1), padding=NONE),
    "pointwise": Shape(None, (4, 4), 16, 24, (1, 1), padding=NONE),
    "shortcut": Shape(None, (8, 8), 16, 32, (1, 1), 2, NONE),
    "3x3": Shape(None, (8, 8), 16, 16, (3, 3)),
    "patches": Shape(None, (16, 16), 3, 12, (8, 8), 8, NONE),
    "1x1": Shape("_inside", (1, 1), 16, 12, (3, 3)),
    "4x4": Shape("_inside", (4, 4), 5, 3, (5, 5), padding=TWO),
    "2x2, strided": Shape("_inside", (2, 2), 16, 12, (3, 3), 2),
    "2x3, dilated": Shape("_inside", (2, 3), 4, 4, (3, 3), padding=TWO, dilation=2),
    "2x2, seen in part": Shape("_inside", (2, 2), 4, 4, (3, 3), 2, ((1, 2), (2, 1))),
    "groups": Shape("_by_group", (6, 6), 12, 8, (3, 3), groups=4),
    "groups, strided": Shape("_by_group", (7, 6), 12, 8, (3, 3), 2, groups=4),
    "groups, 2x2": Shape(None, (2, 2), 12, 8, (3, 3), groups=4),
    "depthwise, strided": Shape("_each", (7, 6), 8, 8, (3, 3), 2, groups=8),
    "depthwise, twice": Shape("_each", (6, 5), 4, 8, (3, 3), groups=4),
    "dilated": Shape(None, (9, 9), 3, 4, (3, 3), padding=TWO, dilation=2),
    "transposed": Shape(None, (4, 4), 3, 4, (3, 3), spacing=2),
    "cropped": Shape(None, (6, 6), 3, 4, (3, 3), padding=((-1, 1), (0, 0))),
}
IMAGES = 3


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere convolutions are left as they are")


def _array(seed: int, spec: str, **sizes) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=[sizes[axis] for axis in spec])
    return found.astype(np.float32)


def _traced(shape: Shape, layout: str):
    """The equation of a convolution of one image, the images, their axis, and the kernel."""
    specs = LAYOUTS[layout]
    height, width = shape.size
    x = _array(0, specs[0], N=IMAGES, H=height, W=width, C=shape.channels)
    x = np.stack(np.split(x, IMAGES, specs[0].index("N")))
    kernel = _array(
        1, specs[1], H=shape.window[0], W=shape.window[1], I=shape.channels // shape.groups,
        O=shape.features,
    )  # fmt: skip
    convolve = partial(
        lax.conv_general_dilated, window_strides=(shape.stride,) * 2, padding=shape.padding,
        lhs_dilation=(shape.spacing,) * 2, rhs_dilation=(shape.dilation,) * 2,
        dimension_numbers=specs, feature_group_count=shape.groups,
    )  # fmt: skip
    (eqn,) = jax.make_jaxpr(convolve)(x[0], kernel).eqns
    return eqn, x, kernel


def _fast(eqn, x, kernel):
    return program.bind(eqn, [x, kernel])[0]


def _own(eqn, x, kernel):
    return eqn.primitive.bind(x, kernel, **eqn.params)


def _assert_close(found, expected):
    """Within 1e-5 of the largest, NaN and infinities at the same places."""
    expected = np.asarray(expected)
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * finite.max(initial=1e-30))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_way_its_values_and_what_is_not_finite(name, layout):
    shape = SHAPES[name]
    eqn, x, kernel = _traced(shape, layout)
    way = convolution._way(convolution.numbers(eqn), x.shape[1:], kernel.shape)
    assert getattr(way, "__name__", None) == shape.way
    if way is None:
        return  # XLA's own
    fast, own = (jit(jax.vmap(partial(f, eqn), (0, None))) for f in (_fast, _own))
    _assert_close(fast(x, kernel), own(x, kernel))
    for bad in (np.nan, np.inf, -np.inf):
        for which in (0, 1):
            operands = [x.copy(), kernel.copy()]
            for place in (0, operands[which].size // 2):
                operands[which].flat[place] = bad
                _assert_close(fast(*operands), own(*operands))


@pytest.mark.parametrize(
    "name",
    ["lenet1", "strided stem", "one row", "2x2, strided", "2x3, dilated", "groups, strided",
     "depthwise, twice"],
)  # fmt: skip
def test_gradients_and_a_kernel_an_image(name):
    eqn, x, kernel = _traced(SHAPES[name], "last")
    kernels = np.stack([kernel, -kernel, kernel * 2])

    def outcome(convolve, x, kernel):
        y, pull = jax.vjp(partial(convolve, eqn), x, kernel)
        return y, *pull(jnp.sin(y))

    one, each = (
        jax.tree.map(np.asarray, jit(jax.vmap(partial(outcome, _fast), (0, axis)))(x, k))
        for axis, k in ((None, kernel), (0, kernels))
    )
    for k in range(IMAGES):
        jax.tree.map(_assert_close, [y[k] for y in one], [*outcome(_own, x[k], kernel)])
        jax.tree.map(_assert_close, [y[k] for y in each], [*outcome(_own, x[k], kernels[k])])


def test_forward_derivatives_of_few_channels():
    eqn, x, kernel = _traced(SHAPES["stem"], "last")
    for moved in ((x[1], kernel), (x[1], 0 * kernel), (0 * x[1], kernel)):
        found, expected = (
            jax.jvp(partial(f, eqn), (x[0], kernel), moved) for f in (_fast, _own)
        )  # fmt: skip
        jax.tree.map(_assert_close, found, expected)


def test_narrow_types_and_groups_of_images_are_left_alone():
    x, kernel = jnp.ones((2, 6, 6, 1)), jnp.ones((3, 3, 1, 2))
    convolve = partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME",
        dimension_numbers=LAYOUTS["last"],
    )  # fmt: skip
    for function, of, by in (
        (convolve, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)),
        (partial(convolve, batch_group_count=2), x, kernel),
        (convolve, jnp.ones((0, 6, 6, 1)), kernel),
    ):
        (eqn,) = jax.make_jaxpr(function)(of, by).eqns
        assert convolution.fast(eqn, of, by) is None


def test_what_is_written_as_a_call_is_counted_in_full():
    """Operations of a pair do not depend on how a convolution is written."""
    for name in ("stem", "2x2, strided", "groups"):
        eqn, x, kernel = _traced(SHAPES[name], "last")
        (call,) = jax.make_jaxpr(partial(_fast, eqn))(x[0], kernel).eqns
        own, written = program.flops([eqn]), program.flops([call])
        assert own / 10 < written < own * 10
