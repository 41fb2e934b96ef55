"""jfi.engine.radii: codes that order as numbers do, the shelf, and when radii are made."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import top1
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jfi
from jfi.engine import certify, radii, rounding
from jfi.hardware.compiling import jit
from jfi.hardware.devices import hardware
from jfi.networks.program import run

SIZES = st.floats(0, float("inf"), width=32) | st.just(float("nan"))


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1))
def test_codes_order_as_the_numbers_do(pairs):
    """A smaller code proves a smaller number; NaN is never the smaller."""
    a, b = np.array(pairs, np.float32).T
    smaller = radii.code(a) < radii.code(b)
    assert not (smaller & ~((a < b) | np.isnan(b))).any()
    assert not (np.isnan(a) & smaller).any()


def test_codes_tell_numbers_apart_by_one_percent():
    a = np.geomspace(1e-30, 1e30, 999)
    assert (radii.code(a) < radii.code(a * 1.01)).all()


def test_shelf_drops_what_was_not_used_for_longest():
    shelf, row = radii.Shelf(2 * 8), np.zeros(1)
    for key in "ab":
        shelf.put(key, row)
    assert shelf.get("a") is not None
    shelf.put("c", row)
    assert [shelf.get(key) is not None for key in "abc"] == [True, False, True]
    shelf.put("d", np.zeros(9))
    assert shelf.get("d") is None


def dense(params, x):
    hidden = jax.nn.relu(x @ params["first"])
    return hidden @ params["second"]


@pytest.fixture
def site():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(6, 4)), "second": rng.normal(size=(4, 3))}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    network = jfi.network(dense, params, np.zeros(6, np.float32))
    images = rng.normal(size=(11, 6)).astype(np.float32)

    def make(pair_flops, memory=1 << 30):
        shelf = radii.Shelf(1 << 20)
        allowances = jit(partial(rounding.allowances, network.program))
        return radii.Radii(
            network.program, top1(network).constraints, network.leaves, 0, pair_flops, hardware(),
            shelf, allowances, memory,
        )  # fmt: skip

    return make, images


def test_radii_are_made_when_they_have_been_paid_for(site, monkeypatch):
    """Not for a few faults; after many, or after few often enough; then kept."""
    make, images = site
    monkeypatch.setattr(radii, "COMPILE", 0)
    dear = make(1 << 30)
    assert dear.where_worth("all", images, 1).shape == (24, 11)
    cheap = make(1)
    cost = next(n for n in range(1, 10**6) if cheap.where_worth("all", images, 1) is not None)
    assert cost > 100
    assert cheap.where_worth("all", images, 0) is not None
    assert cheap.where_worth("others", images, 1) is None


def test_compiling_has_to_be_paid_for(site):
    make, images = site
    assert make(1 << 20).where_worth("all", images, 1) is None


def test_radii_of_an_image_do_not_depend_on_the_others(site):
    make, images = site
    whole, part = make(1).codes(images), make(1).codes(images[3:5])
    assert np.array_equal(whole[:, 3:5], part)
    assert (whole > 0).any()


@pytest.mark.parametrize("memory", [1, 3000, 100_000])
def test_radii_do_not_depend_on_memory(site, memory):
    make, images = site
    assert np.array_equal(make(1, memory).codes(images), make(1).codes(images))


def test_images_and_scales_are_shared_out():
    scales = len(certify.SCALES)
    assert radii.shared_out(10**9, 8, 1) == (8, scales)
    assert radii.shared_out(10**9, 8, 3) == (9, scales)
    assert radii.shared_out(4 * scales, 8, 1) == (4, scales)
    assert radii.shared_out(5, 8, 1) == (1, 5)
    assert radii.shared_out(0, 8, 2) == (2, 1)


def test_making_radii_takes_less_where_memory_is_short(site):
    """As the compiler plans it: a network whose values are larger than its words."""
    params = {"first": np.ones((8, 4096), np.float32), "second": np.ones((4096, 9), np.float32)}
    network = jfi.network(dense, params, np.zeros(8, np.float32))
    rows = np.ones((8, 8), np.float32), np.ones(8, np.float32)
    product, asked = certify.product(network.program, 0), top1(network).constraints

    def taken(scales):
        made = partial(radii._radii, network.program, asked, product, 0, scales)
        found = jax.jit(made).lower(network.leaves, rows).compile().memory_analysis()
        return found.temp_size_in_bytes

    assert taken(1) < taken(len(certify.SCALES)) / 4


def conv(x, w, stride=1, padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers, **options
    )


def softplus(x):
    """Without the test for NaN of JAX's own."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def mish(x):
    return x * jnp.tanh(softplus(x))


# By name: what enters the product, the shape of its leaf, the activation after it.
PRODUCTS = {
    "plain": (lambda x, w: x.reshape(len(x), -1) @ w, (72, 9), jax.nn.elu),
    "linear": (lambda x, w: x.reshape(len(x), -1) @ w.T, (9, 72), mish),
    "flat": (lambda x, w: x.reshape(len(x), -1) @ w.reshape(9, 72).T, (648,), jax.nn.gelu),
    "flipped": (lambda x, w: x.reshape(len(x), -1) @ w[::-1, None][:, 0], (72, 9), jax.nn.selu),
    "same": (conv, (3, 3, 2, 4), jax.nn.leaky_relu),
    "oihw": (lambda x, w: conv(x, w.transpose(2, 3, 1, 0)), (4, 2, 3, 3), softplus),
    "strided": (lambda x, w: conv(x, w, 2, "VALID"), (3, 3, 2, 4), jax.nn.elu),
    "grouped": (lambda x, w: conv(x, w, feature_group_count=2), (3, 3, 1, 4), mish),
    "dilated": (lambda x, w: conv(x, w, rhs_dilation=(2, 2)), (3, 3, 2, 4), jax.nn.gelu),
    "spaced": (
        lambda x, w: conv(x, w, padding=((1, 1), (1, 1)), lhs_dilation=(2, 1)),
        (2, 2, 2, 4),
        jax.nn.leaky_relu,
    ),
    "padded": (lambda x, w: conv(x, w, padding=((2, 0), (1, 3))), (3, 3, 2, 4), softplus),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_word_moved_to_its_radius_keeps_top_1(name):
    """Every word, both ways, several images, to 0.999 of the radius."""
    enter, shape, act = PRODUCTS[name]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 6, 6, 2)).astype(np.float32)
    w = (rng.normal(size=shape) * 0.3).astype(np.float32)
    size = enter(images[:1], w).size
    last = (rng.normal(size=(5, size)) * size**-0.5).astype(np.float32)

    def apply(params, x):
        return act(enter(x, params[0])).reshape(len(x), -1) @ params[1].T

    network = jfi.network(apply, [w, last], images[0])
    program, asked = network.program, top1(network).constraints
    for leaf, golden in enumerate((w, last)):
        product = certify.product(program, leaf)

        @jit
        def found(x, product=product, leaf=leaf):
            env = run(program, [w, last], x[None])
            allowance = rounding.allowance(program, env)
            return certify.radii(program, env, product, program.leaves[leaf], allowance, asked)

        @jit
        def tops(x, moves, leaf=leaf, golden=golden):
            def top(number, move):
                moved = jnp.asarray(golden).reshape(-1).at[number].add(move).reshape(golden.shape)
                params = [moved, last] if leaf == 0 else [w, moved]
                return apply(params, x[None])[0].argmax()

            return jax.vmap(top)(jnp.arange(golden.size), moves)

        for x in images:
            r = np.asarray(found(x))
            assert r.shape == golden.shape
            assert np.median(r) > 1e-3  # not for want of a bound
            r = np.where(np.isfinite(r), r, 1e3).ravel()
            (right,) = np.asarray(apply([w, last], x[None])).argmax(axis=1)
            for sign in (-0.999, 0.999):
                assert (np.asarray(tops(x, sign * r)) == right).all()


@pytest.mark.parametrize("enter", [
    lambda x, w: x @ (2 * w.T),
    lambda x, w: x @ jnp.broadcast_to(w[:1], (6, 6)),
    lambda x, w: x @ jnp.concatenate([w[:3], w[:3]]),
    lambda x, w: x @ (w + w[::-1]),
    lambda x, w: x @ w @ w.T,
    lambda x, w: x + w[0],
])  # fmt: skip
def test_words_that_do_not_enter_as_themselves_and_once_have_no_radii(enter):
    w = np.ones((6, 6), np.float32)
    network = jfi.network(lambda p, x: enter(x, p[0]), [w], np.ones(6, np.float32))
    assert certify.product(network.program, 0) is None
