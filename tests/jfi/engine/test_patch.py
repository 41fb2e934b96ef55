"""Every rule against a whole re-run with the faulty parameter, and that it stays local."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jfi.engine.split import prefix, split, suffix
from jfi.networks.program import flops, trace

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 6, 6, 4)).astype(np.float32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def both(apply, params, images=IMAGES, leaf=0, seed=0):
    """(logits by the split program, by whole re-runs, share of the operations left)."""
    image = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
    program = trace(apply, params, image)
    parts = split(program, leaf)
    leaves, tree = jax.tree.flatten(params)
    constants, residuals = jax.jit(lambda x: prefix(parts, leaves, x))(images)
    rng = np.random.default_rng(seed)
    fast, slow = [], []
    run = jax.jit(apply)
    local = jax.jit(lambda i, at, v: suffix(parts, constants, residuals, i, list(at), v)[0])
    for _ in range(6):
        at = tuple(int(rng.integers(d)) for d in leaves[leaf].shape)
        value = np.asarray(rng.normal() * 3).astype(leaves[leaf].dtype)
        number = int(rng.integers(len(images)))
        fast.append(local(number, np.array(at, np.int32), value))
        broken = np.array(leaves[leaf])
        broken[at] = value
        faulty = jax.tree.unflatten(tree, [*leaves[:leaf], broken, *leaves[leaf + 1 :]])
        slow.append(run(faulty, images[number][None])[0])
    return np.stack(fast), np.stack(slow), parts.flops / flops(program.eqns)


def head(y):
    """Logits of a feature map, by a function that hides no channel."""
    return jnp.tanh(y).reshape(y.shape[0], -1)


CONVOLUTIONS = {
    "plain": {"window_strides": (1, 1), "padding": "SAME"},
    "valid": {"window_strides": (1, 1), "padding": "VALID"},
    "stride": {"window_strides": (2, 2), "padding": "SAME"},
    "uneven": {"window_strides": (2, 1), "padding": ((0, 1), (2, 0))},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
    "transposed": {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2)},
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weight_of_a_convolution(name, groups):
    def apply(w, x):
        return head(conv(w, x, groups, **CONVOLUTIONS[name]))

    fast, slow, share = both(apply, normal(3, 3, 4 // groups, 8))
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5)
    assert share < 0.6


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("groups", [1, 8], ids=["plain", "depthwise"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_channel_into_the_next_convolution(name, groups, layout):
    """After one output channel changed, the next convolution is updated, not run again."""

    def apply(params, x):
        y = jax.nn.relu(conv(params[0], x, 1, (1, 1), "SAME"))
        dims = (layout, "HWIO", layout)
        y = jnp.transpose(y, (0, 3, 1, 2)) if layout == "NCHW" else y
        return head(conv(params[1], y, groups, dims=dims, **CONVOLUTIONS[name]))

    fast, slow, share = both(apply, [normal(3, 3, 4, 8), normal(3, 3, 8 // groups, 8)])
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5)
    assert share < 0.5


def conv(w, x, groups, window_strides, padding, dims=("NHWC", "HWIO", "NHWC"), **dilation):
    return lax.conv_general_dilated(
        x,
        w,
        window_strides,
        padding,
        feature_group_count=groups,
        dimension_numbers=dims,
        **dilation,
    )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_convolution(data):
    """Weight and channel rules over random numbers, one and three spatial axes included."""
    rank = data.draw(st.integers(1, 3))
    size = data.draw(st.integers(3, 5))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    groups = data.draw(st.sampled_from([1, 2, 4]))
    numbers = {
        "window_strides": [data.draw(st.integers(1, 2)) for _ in range(rank)],
        "padding": [
            data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in range(rank)
        ],
        "rhs_dilation": [data.draw(st.integers(1, 2)) for _ in range(rank)],
        "lhs_dilation": [data.draw(st.integers(1, 2)) for _ in range(rank)],
    }
    spatial = "DHW"[:rank]
    dims = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    reach = [(k - 1) * g + 1 for k, g in zip(kernel, numbers["rhs_dilation"], strict=True)]
    room = [
        (size - 1) * g + 1 + sum(p)
        for g, p in zip(numbers["lhs_dilation"], numbers["padding"], strict=True)
    ]
    if any(r > s for r, s in zip(reach, room, strict=True)):
        return

    def apply(params, x):
        y = jax.nn.relu(conv(params[0], x, groups, dims=dims, **numbers))
        return head(
            lax.conv_general_dilated(y, params[1], (1,) * rank, "SAME", dimension_numbers=dims)
        )

    images = normal(2, *[size] * rank, 4)
    params = [normal(*kernel, 4 // groups, 4), normal(*[3] * rank, 4, 3)]
    fast, slow, _ = both(apply, params, images, seed=data.draw(st.integers(0, 99)))
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-4)


def dense(params, x):
    y = jnp.tanh(x.reshape(x.shape[0], -1) @ params["a"] + params["b"])
    return y @ params["c"]


@pytest.mark.parametrize("leaf", range(3))
def test_dense(leaf):
    params = {"a": normal(144, 32), "b": normal(32), "c": normal(32, 5)}
    fast, slow, share = both(dense, params, leaf=leaf)
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5)
    assert share < 0.1


def attention(params, x):
    """Products with batch axes and both operands faulty: everything a transformer has."""
    tokens = x.reshape(x.shape[0], 36, 4)
    q, k, v = (jnp.einsum("btc,chd->bhtd", tokens, w) for w in params["qkv"])
    weights = jax.nn.softmax(jnp.einsum("bhtd,bhsd->bhts", q, k), axis=-1)
    out = jnp.einsum("bhts,bhsd->bthd", weights, v)
    return jnp.einsum("bthd,hdc->bc", out, params["out"])


@pytest.mark.parametrize("leaf", range(4))
def test_attention(leaf):
    params = {"out": normal(2, 3, 5), "qkv": [normal(4, 2, 3) for _ in range(3)]}
    fast, slow, _ = both(attention, params, leaf=leaf)
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-5)


LAYERS = {
    "max_pool": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    ),
    "avg_pool": lambda y: lax.reduce_window(y, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"),
    "pool_over_channels": lambda y: lax.reduce_window(
        y, 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME"
    ),
    "global_mean": lambda y: y.mean((1, 2)),
    "max_over_channels": lambda y: y.max(3),
    "softmax": lambda y: jax.nn.softmax(y, axis=-1),
    "transpose": lambda y: jnp.transpose(y, (0, 3, 2, 1)),
    "split_axis": lambda y: y.reshape(y.shape[0], 36, 8),
    "merge_channels": lambda y: y.reshape(y.shape[0], 6, 48),
    "pad_channels": lambda y: jnp.pad(y[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 3))),
    "pad_space": lambda y: jnp.pad(y, ((0, 0), (1, 2), (0, 0), (0, 0))),
    "crop_channels": lambda y: y[..., 1:5],
    "crop_negative": lambda y: lax.pad(y, 0.0, ((0, 0, 0), (0, 0, 0), (0, 0, 0), (-1, -2, 0))),
    "gaps": lambda y: lax.pad(y, 0.0, ((0, 0, 0), (0, 0, 0), (0, 0, 0), (1, 0, 1))),
    "concatenate": lambda y: jnp.concatenate([jnp.sin(y), y * 0 + 1, y], axis=3),
    "concatenate_space": lambda y: jnp.concatenate([y, jnp.cos(y)], axis=1),
    "dense_net": lambda y: jnp.concatenate([jnp.ones_like(y), y], axis=3),
    "where": lambda y: jnp.where(y > 0.1, y, jnp.exp(y)),
    "clip": lambda y: jnp.clip(y, -0.5, 0.5) ** 3,
    "squeeze": lambda y: y[:, None].squeeze(1),
    "reverse": lambda y: y[..., ::-1],
    "sort": lambda y: jnp.sort(y, axis=-1),
    "shuffle": lambda y: y[..., np.array([3, 1, 2, 0, 7, 6, 4, 5])],
    "scan": lambda y: lax.scan(lambda c, r: (c * 0.5 + r, c), y[:, 0], jnp.moveaxis(y, 1, 0))[0],
    "cond": lambda y: lax.cond(y.sum() > 0, jnp.sin, jnp.cos, y),
    "normalise": lambda y: (y - y.mean((1, 2, 3))) / (y.std((1, 2, 3)) + 1e-3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_after_a_convolution(name):
    """Whether a rule holds or the layer falls back, the logits are those of a whole re-run."""

    def apply(params, x):
        y = conv(params[0], x, 1, (1, 1), "SAME") + params[1]
        return head(LAYERS[name](y))

    params = [normal(3, 3, 4, 8), normal(8)]
    for leaf in range(2):
        fast, slow, _ = both(apply, params, leaf=leaf)
        np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-5)


LOCAL = [
    "max_pool", "avg_pool", "global_mean", "transpose", "split_axis", "pad_channels", "pad_space",
    "gaps", "concatenate_space", "dense_net", "where", "clip", "squeeze",
]  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_layer_keeps_the_change_in_its_channel(name):
    """The next layer still sees a block: far fewer operations than running it again."""

    def apply(params, x):
        y = LAYERS[name](conv(params[0], x, 1, (1, 1), "SAME"))
        y = jnp.moveaxis(y, 1, -1) if name == "transpose" else y
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        return jnp.einsum("btc,cd->bd", jnp.tanh(y), params[1][: y.shape[-1]])

    *_, share = both(apply, [normal(3, 3, 4, 8), normal(24, 200)])
    assert share < 0.6


def test_tied_weights():
    """One leaf used twice, in two ways."""

    def apply(w, x):
        y = jnp.tanh(x.reshape(x.shape[0], -1)[:, :12] @ w)
        return y @ w.T + w.sum(1)

    fast, slow, _ = both(apply, normal(12, 7))
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5)


def lstm(p, x):
    """Steps as PyTorch unrolls them: all gates by one product, weights as [out, in]."""
    h = c = jnp.zeros((x.shape[0], 5))
    for t in range(x.shape[1]):
        gates = x[:, t] @ p[0].T + h @ p[1].T + p[2]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h


def convolved_thrice(p, x):
    y = x
    for stride in (1, 2, 1):
        y = jnp.tanh(conv(p[0], y, 1, (stride, stride), "SAME"))
    return head(y)


@pytest.mark.parametrize("leaf", range(2))
def test_weights_that_every_step_uses(leaf):
    """They are never written out for a fault: no value of a pair is as large as the weights."""
    params = [normal(20, 3), normal(20, 5), normal(20)]
    images = normal(3, 6, 3)
    fast, slow, share = both(lstm, params, images, leaf)
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5)
    assert share < 1.1
    program = trace(lstm, params, jax.ShapeDtypeStruct(images.shape[1:], images.dtype))
    assert split(program, leaf).live <= 20 * 4


def test_a_kernel_that_is_used_again():
    fast, slow, share = both(convolved_thrice, [normal(3, 3, 4, 4) / 4])
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5)
    assert share < 1.3


def test_quantised_weights():
    """int8 kernels with a scale, and a product accumulated in int32: no overflow of differences."""

    def apply(params, x):
        q = jnp.clip(jnp.round(x.reshape(x.shape[0], -1) * 30), -128, 127).astype(jnp.int8)
        y = lax.dot_general(
            q, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )
        return y.astype(jnp.float32) * params["scale"]

    params = {
        "scale": normal(9),
        "w": RNG.integers(-128, 128, (144, 9)).astype(np.int8),
    }
    fast, slow, _ = both(apply, params, leaf=1)
    np.testing.assert_array_equal(fast, slow)


def test_leaf_the_logits_do_not_need():
    def apply(params, x):
        return x.reshape(x.shape[0], -1)[:, :5] + params["used"]

    fast, slow, _ = both(apply, {"unused": normal(3), "used": normal(5)}, leaf=0)
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    """Leaves of few bits that are cast on the way; within a few roundings of a whole run."""

    def apply(params, x):
        y = conv(params[0].astype(jnp.float32), x, 1, (1, 1), "SAME")
        return head(jax.nn.relu(y).astype(dtype)).astype(jnp.float32)

    params = [jnp.asarray(normal(3, 3, 4, 8), dtype)]
    fast, slow, _ = both(apply, [np.asarray(p) for p in params])
    np.testing.assert_allclose(fast, slow, atol=2e-2)
