"""Bounds of element-wise functions: never below what a dense sample in float64 shows, and tight."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfi.engine import certify, curves
from jfi.hardware.compiling import jit
from jfi.networks.program import run, trace

SIZES = (1e-6, 1e-4, 1e-2, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
KINKS = (0.0, 6.0, 3.0, -3.0, 1.0, -1.0)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def softplus(x):
    return np.logaddexp(x, 0)


def erf(x):
    return np.vectorize(math.erf)(x)


def expm1(x):
    return np.expm1(np.minimum(x, 0))


ALPHA, SCALE = 1.6732632423543772, 1.0507009873554805
GELU = np.sqrt(2 / np.pi)

# By name: as JAX has it, and in float64.
ACTS = {
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "relu6": (jax.nn.relu6, lambda x: np.clip(x, 0, 6)),
    "leaky": (jax.nn.leaky_relu, lambda x: np.where(x > 0, x, 0.01 * x)),
    "elu": (jax.nn.elu, lambda x: np.where(x > 0, x, expm1(x))),
    "selu": (jax.nn.selu, lambda x: SCALE * np.where(x > 0, x, ALPHA * expm1(x))),
    "celu": (jax.nn.celu, lambda x: np.where(x > 0, x, expm1(x))),
    "softplus": (jax.nn.softplus, softplus),
    "log_sigmoid": (jax.nn.log_sigmoid, lambda x: -softplus(-x)),
    "mish": (jax.nn.mish, lambda x: x * np.tanh(softplus(x))),
    "gelu_tanh": (
        nn.gelu,
        lambda x: 0.5 * x * (1 + np.tanh(GELU * (x + 0.044715 * x**3))),
    ),
    "gelu_erf": (
        lambda x: nn.gelu(x, approximate=False),
        lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    ),
    "silu": (jax.nn.silu, lambda x: x * sigmoid(x)),
    "hard_swish": (jax.nn.hard_swish, lambda x: x * np.clip(x + 3, 0, 6) / 6),
    "hard_sigmoid": (jax.nn.hard_sigmoid, lambda x: np.clip(x + 3, 0, 6) / 6),
    "hard_tanh": (jax.nn.hard_tanh, lambda x: np.clip(x, -1, 1)),
    "sigmoid": (jax.nn.sigmoid, sigmoid),
    "tanh": (jnp.tanh, np.tanh),
    "soft_sign": (jax.nn.soft_sign, lambda x: x / (1 + np.abs(x))),
    "squareplus": (jax.nn.squareplus, lambda x: (x + np.sqrt(x**2 + 4)) / 2),
    "sparse_plus": (
        jax.nn.sparse_plus,
        lambda x: np.where(x >= 1, x, np.where(x <= -1, 0, (x + 1) ** 2 / 4)),
    ),
    "by_exp": (lambda x: jnp.log(1 + jnp.exp(x)) + 1 / (1 + jnp.exp(-x)),
               lambda x: softplus(x) + sigmoid(x)),
    "roots": (
        lambda x: jnp.sqrt(x**2 + 0.1) + jax.lax.rsqrt(1 + x**4),
        lambda x: np.sqrt(x**2 + 0.1) + 1 / np.sqrt(1 + x**4),
    ),
    "powers": (lambda x: jnp.exp2(-(x**2)) + x**-2, lambda x: np.exp2(-(x**2)) + x**-2.0),
}  # fmt: skip


def steepest(act, x, r):
    """L by element, as `certify` has it: the bound of act(x) over that of x, r."""
    program = trace(lambda _, x: act(x), [], jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert certify.bounded(program)

    @jit
    def bound(x, r):
        env = run(program, [], x[None])
        _, transpose = jax.vjp(lambda b: certify.propagate(program, env, b), r[None])
        return transpose(jnp.ones_like(r[None]))[0][0]

    return np.asarray(bound(x, r), np.float64)


def drawn(seed):
    """x at kinks and far and near on both sides of 0; r from far less than x to more."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([KINKS, *[s * rng.uniform(-1, 1, 40) for s in SIZES]])
    r = rng.choice(SIZES, x.size) * rng.uniform(0.1, 1, x.size)
    near = rng.choice(KINKS, x.size) - x  # just as far as a kink, too
    r = np.where((rng.random(x.size) < 0.1) & (near != 0), np.abs(near), r)
    return x.astype(np.float32), r.astype(np.float32)


def worst(exact, x, r):
    """The most that f moves, and that per d, over |d| <= r: [n] each, in float64."""
    x, r = x.astype(np.float64), r.astype(np.float64)
    share = np.concatenate([np.geomspace(1e-3, 1, 200), np.linspace(0, 1, 400)[1:]])
    d = np.concatenate([share, -share])[:, None] * r
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        moved = np.abs(exact(x + d) - exact(x))
        # What float64 can't tell from 0 next to the value is no slope.
        moved = moved - 1e-15 * (np.abs(exact(x)) + np.abs(exact(x + d)) + np.abs(x))
        return np.fmax.reduce(moved, axis=0), np.fmax.reduce(moved / np.abs(d), axis=0)


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ACTS)
def test_no_change_of_an_activation_is_larger_than_its_bound(name, seed):
    act, exact = ACTS[name]
    x, r = drawn(seed)
    slope = steepest(act, x, r)
    most, per = worst(exact, x, r)
    assert not np.isnan(slope).any()
    # A hair for constants in float32 (0.01, 0.0447) that the formulas have in float64.
    wrong = (per > slope * (1 + 2e-7)) | (most > slope * r * (1 + 2e-7))
    assert not wrong.any(), (x[wrong], r[wrong])


@pytest.mark.parametrize("name", sorted(set(ACTS) - {"powers"}))
def test_the_bound_over_a_short_way_is_tight(name):
    """Far from a kink, for r of 0.001: within 1% of the slope, or of 1."""
    act, exact = ACTS[name]
    x = np.array([-20, -5.5, -2.1, -0.7, -0.1, 0.1, 0.7, 2.1, 5.5, 20], np.float32)
    r = np.full_like(x, 1e-3)
    _, per = worst(exact, x, r)
    np.testing.assert_allclose(steepest(act, x, r), per, rtol=0.01, atol=0.01)


def test_a_slope_that_is_too_small_is_found(monkeypatch):
    """What the tests above are for."""
    wrong = curves._monotone(lambda x: (0.99 * jnp.exp(x.low), 0.99 * jnp.exp(x.high)))
    monkeypatch.setitem(curves.RULES, "expm1", wrong)
    act, exact = ACTS["elu"]
    x, r = np.float32([-1, -3]), np.float32([1e-3, 1e-2])
    assert (worst(exact, x, r)[1] > steepest(act, x, r)).all()


@pytest.mark.parametrize("act", [
    lambda x: jnp.where(x > 0, 1.0, 0.0),
    lambda x: jnp.where(x > 1, x, 0.5 * x),
    lambda x: jnp.where((x > 0) & (x < 2), x, 0.0),
    lambda x: jnp.where(x > 0.5 * x + 1e-3, x, -x),  # where it changes is not known
    lambda x: jnp.log(x - 0.5), lambda x: 1 / x, lambda x: jnp.sqrt(x), lambda x: x**-1,
])  # fmt: skip
def test_a_jump_or_a_pole_within_reach_is_unbounded(act):
    x = np.float32([0, 1, 2, 0.002])
    reached = ~np.isfinite(steepest(act, x, np.full_like(x, 3)))
    assert reached.all()
    far = steepest(act, np.float32([7, 8]), np.float32([0.1, 0.1]))
    assert np.isfinite(far).all()


def test_kinks_where_both_cases_meet():
    """By comparisons, with and, or and not: the slopes of both, and of one out of reach."""
    x, r = np.float32([-1, 0, 0.5, 1, 1.2, 3]), np.float32([0.1] * 6)

    def hat(x):
        inside = (x > 0) & jnp.logical_not(x >= 1)
        return jnp.where(inside, x * (1 - x) * 4, 0.0)

    slope = steepest(hat, x, r)
    assert (slope[[0, 4, 5]] < 1e-30).all()
    assert (slope[1:4] > [3.9, 0.3, 3.9]).all() and np.isfinite(slope).all()
    table = np.float32([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # PReLU: a slope of each unit's own
    found = steepest(lambda x: jnp.where(x > 0, x, x * table), x, r)
    np.testing.assert_allclose(found, [0.1, 1, 1, 1, 1, 1], rtol=1e-3)


def test_what_has_no_rule_is_refused():
    for act in (
        jnp.floor,
        lambda x: jnp.round(x).astype(jnp.int8).astype(jnp.float32),
        lambda x: (x > 0).astype(jnp.float32) * x,
        lambda x: jax.nn.elu(x.astype(jnp.bfloat16)).astype(jnp.float32),
        lambda x: jnp.where(x > 0, x, x[::-1]),
    ):
        program = trace(lambda _, x, act=act: act(x), [], jax.ShapeDtypeStruct((3,), np.float32))
        assert not certify.bounded(program)
        env = run(program, [], jnp.ones((1, 3)))
        with pytest.raises(certify.Unbounded):
            certify.propagate(program, env, jnp.ones((1, 3)))


def test_nan_and_infinity_are_unbounded():
    x = np.float32([np.nan, np.inf, -np.inf, 1e38, 1])
    r = np.float32([1, 1, 1, 1e38, np.inf])
    for name in ("elu", "softplus", "mish", "gelu_tanh", "squareplus"):
        slope = steepest(ACTS[name][0], x, r)
        assert not (slope[[0, 3, 4]] < 0.5).any(), name
