"""Every measure against a naive re-run, on networks where a rule once held that did not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import top1
from jax import lax

import jfi
from jfi import bits, outcomes
from jfi.engine import certify
from jfi.engine.judge import Case
from jfi.faults import Faults
from jfi.hardware.compiling import jit

MEASURES = ("full", "critical", "detect", "radii")
NEAR = 1e-4  # of the largest logit: summed in another order, the answer may be another
CASES = {}


def case(make):
    CASES[make.__name__] = make
    return make


def draw(seed, *shape, scale=None):
    values = np.random.default_rng(seed).standard_normal(shape)
    return (values * (scale or shape[0] ** -0.5)).astype(np.float32)


@case
def truncated_activations():
    """A conversion from float to int is a step: a small change can move it by one."""

    def apply(p, x):
        steps = jnp.clip(jax.nn.relu(x @ p["a"]) * 4, 0, 127).astype(jnp.int8)
        return steps.astype(jnp.float32) @ p["c"]

    return apply, {"a": draw(0, 12, 16), "c": draw(1, 16, 5)}, draw(9, 32, 12, scale=1)


@case
def leaf_twice_in_one_product():
    def apply(p, x):
        return jax.nn.relu(x @ jnp.einsum("ij,ik->jk", p["w"], p["w"])) @ p["c"]

    return apply, {"w": draw(2, 12, 12), "c": draw(3, 12, 5)}, draw(9, 32, 12, scale=1)


@case
def minus_zero():
    """The sign flip of 0.0 is a change, though -0.0 == 0.0."""
    params = {"a": draw(4, 6, 4), "z": np.zeros(4, np.float32), "c": draw(5, 4, 3)}

    def apply(p, x):
        return (jax.nn.relu(x @ p["a"]) + jnp.where(jnp.signbit(p["z"]), 3.0, 0.0)) @ p["c"]

    return apply, params, draw(9, 32, 6, scale=1)


def _low_precision(dtype):
    params = {"a": draw(6, 16, 24), "b": draw(7, 24, 24), "c": draw(8, 24, 10)}

    def apply(p, x):
        a, b, c, x = (v.astype(dtype) for v in (p["a"], p["b"], p["c"], x))
        return (jax.nn.relu(jax.nn.relu(x @ a) @ b) @ c).astype(jnp.float32)

    return apply, params, draw(9, 48, 16, scale=1)


@case
def bfloat16_inside():
    return _low_precision(jnp.bfloat16)


@case
def float16_inside():
    return _low_precision(jnp.float16)


@case
def float8_operand():
    """The cost of a change, summed in float8, would vanish and the radius grow."""
    params = {"a": draw(6, 12, 16).astype(jnp.float8_e4m3fn), "c": draw(8, 16, 5)}

    def apply(p, x):
        y = jnp.dot(x.astype(jnp.float8_e4m3fn), p["a"], preferred_element_type=jnp.float32)
        return jax.nn.relu(y) @ p["c"]

    return apply, params, draw(9, 32, 12, scale=1)


@case
def integer_product():
    """int8 times int8 into int32: the common quantised layer."""
    codes = np.random.default_rng(10).integers(-128, 128, (12, 16)).astype(np.int8)

    def apply(p, x):
        x = jnp.round(x * 30).astype(jnp.int8)
        h = lax.dot(x, p["a"], preferred_element_type=jnp.int32).astype(jnp.float32)
        return jax.nn.relu(h / 4096) @ p["c"]

    return apply, {"a": codes, "c": draw(11, 16, 5)}, draw(9, 32, 12, scale=1)


def _conv(x, w, stride, groups=1, **options):
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), **options,
    )  # fmt: skip


@case
def grouped_strided_convolution():
    """JAX has no batched gradient of it: no radii, and no traceback."""
    shapes = {"s": (3, 3, 3, 8), "g": (3, 3, 4, 16)}
    params = {n: draw(k, *shape, scale=0.3) for k, (n, shape) in enumerate(shapes.items(), 12)}

    def apply(p, x):
        h = jax.nn.silu(_conv(jax.nn.relu(_conv(x, p["s"], 1)), p["g"], 2, groups=2))
        return h.mean((1, 2)) @ p["c"]

    return apply, {**params, "c": draw(14, 16, 5)}, draw(9, 8, 8, 8, 3, scale=1)


@case
def depthwise_convolution_into_another_type():
    """As `nnx.Conv(preferred_element_type=...)` offers it."""
    params = {"d": draw(1, 3, 3, 1, 4, scale=0.3), "c": draw(2, 4, 5)}

    def apply(p, x):
        x, d = x.astype(jnp.bfloat16), p["d"].astype(jnp.bfloat16)
        y = _conv(x, d, 1, groups=4, preferred_element_type=jnp.float32)
        return jax.nn.relu(y).mean((1, 2)) @ p["c"]

    return apply, params, draw(9, 8, 6, 6, 4, scale=1)


@case
def division_by_what_moves():
    def apply(p, x):
        return jax.nn.soft_sign(x @ p["a"]) @ p["c"]

    return apply, {"a": draw(15, 12, 16), "c": draw(16, 16, 5)}, draw(9, 32, 12, scale=1)


@case
def sigmoid_far_out():
    """Where s(x) (1 - s(x)) is 0 in float32, though large weights make up for it."""

    def apply(p, x):
        h = jax.nn.sigmoid(x @ p["a"] + 18.0)
        return (h - 1.0) * 1e8 @ p["c"]

    return apply, {"a": draw(17, 6, 8, scale=1), "c": draw(18, 8, 4)}, draw(9, 32, 6, scale=1)


@case
def variance_of_a_normalisation():
    """Flips of a variance give NaN, which a reduction must not lose."""
    params = {"a": draw(19, 12, 16), "v": np.full(16, 1.5, np.float32), "c": draw(20, 16, 5)}

    def apply(p, x):
        h = jax.nn.relu(x @ p["a"] * lax.rsqrt(p["v"] + 1e-5))
        return (h - h.mean(axis=1, keepdims=True)) @ p["c"]

    return apply, params, draw(9, 32, 12, scale=1)


@case
def softmax_for_the_output():
    def apply(p, x):
        return jax.nn.softmax(x @ p["w"] + p["b"])

    params = {"w": draw(21, 12, 5, scale=0.5), "b": draw(22, 5)}
    return apply, params, draw(9, 32, 12, scale=1)


@case
def dilated_max_pool():
    params = {"k": draw(23, 3, 3, 2, 6, scale=0.3), "c": draw(24, 6, 5)}

    def apply(p, x):
        h = jax.nn.relu(_conv(x, p["k"], 1))
        options = {"window_strides": (1, 1, 1, 1), "padding": "VALID"}
        h = lax.reduce_window(
            h, -jnp.inf, lax.max, (1, 2, 2, 1), window_dilation=(1, 3, 3, 1), **options
        )
        return h.mean((1, 2)) @ p["c"]

    return apply, params, draw(9, 16, 8, 8, 2, scale=1)


@case
def division_by_the_sum_of_magnitudes():
    def apply(p, x):
        h = x @ p["a"]
        return h / jnp.abs(h).sum(axis=1, keepdims=True) @ p["c"]

    return apply, {"a": draw(25, 12, 16), "c": draw(26, 16, 5)}, draw(9, 32, 12, scale=1)


@case
def clamp_by_an_activation():
    params = {"a": draw(27, 12, 16), "b": draw(28, 12, 16), "c": draw(29, 16, 5)}

    def apply(p, x):
        return lax.clamp(0.0, x @ p["a"], jax.nn.relu(x @ p["b"])) @ p["c"]

    return apply, params, draw(9, 32, 12, scale=1)


ACTIVATIONS = {
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
}


def activated(act):
    """A convolution and two layers as PyTorch has them, x @ w.T, with an activation after each."""
    params = {"a": draw(0, 3, 3, 2, 6, scale=0.25), "b": draw(3, 16, 54, scale=0.14)}

    def apply(p, x):
        h = act(_conv(x, p["a"], 2)).reshape(len(x), -1)
        return act(h @ p["b"].T) @ p["c"].T

    return apply, {**params, "c": draw(2, 5, 16, scale=0.25)}, draw(9, 16, 6, 6, 2, scale=1)


CASES |= {name: partial(activated, act) for name, act in ACTIVATIONS.items()}


def flips(sites, most=600):
    """Up to about so many flips, of all bits, all over the words of every site."""
    rows = [
        (s, i, b, bits.FLIP)
        for s, site in enumerate(sites)
        for i in range(site.words)
        for b in range(site.width)
    ]
    some = np.array(rows)[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))]
    types = (np.int32, np.int64, np.int16, np.int8)
    return Faults(*(column.astype(t) for column, t in zip(some.T, types, strict=True)))


def naive(apply, params, images, sites, faults):
    """Logits [F, B, C]: write the faulty word into the leaf, run the whole network."""
    run, logits = jit(apply), []
    for site, index, bit in zip(faults.site, faults.index, faults.bit, strict=True):
        name = sites[site].name
        words = np.array(params[name])
        flat = words.reshape(-1).view(f"u{words.itemsize}")
        flat[index] ^= flat.dtype.type(1 << int(bit))
        logits.append(np.asarray(run({**params, name: words}, images)))
    return np.array(logits)


def near_ties(logits):
    """bool [F, B]: the answer hangs on how sums are rounded."""
    with np.errstate(invalid="ignore"):
        second, first = np.sort(logits, axis=-1)[..., -2:].transpose(2, 0, 1)
        size = np.maximum(1, np.abs(logits).max(axis=-1))
        return (first - second <= NEAR * size) | ~np.isfinite(logits).all(axis=-1)


def judged(engine, faults, measure):
    """bool [F, B]: critical, of `detect` [F, 1]; and the share of pairs that was certified."""
    if measure == "radii":
        engine.make_radii()
        measure = "critical"
    done = engine.run(faults, measure, keep_bits=measure != "detect")
    share = done.certified.mean() / len(engine.images)
    if measure == "detect":
        return (done.critical > 0)[:, None], share
    packed = np.unpackbits(done.critical_bits, axis=1)
    return packed[:, : len(engine.images)].astype(bool), share


@pytest.mark.parametrize("name", CASES)
def test_every_measure_says_what_a_naive_run_says(name):
    apply, params, images = CASES[name]()
    network = jfi.network(apply, params, images[0])
    faults = flips(network.sites)
    logits = naive(apply, params, images, network.sites, faults)
    golden = np.asarray(jit(apply)(params, images)).argmax(axis=1)
    right, unsure = logits.argmax(axis=-1) != golden, near_ties(logits)
    assert 20 < right[~unsure].sum() < 0.9 * right.size  # a case that could fail
    engine = jfi.Engine(network, images, np.zeros(len(images), int), network.sites)
    for measure in MEASURES:
        found, certified = judged(engine, faults, measure)
        if measure == "detect":
            clear = (right & ~unsure).any(axis=1) | ~unsure.any(axis=1)
            wrong = (found[:, 0] != right.any(axis=1)) & clear
        else:
            wrong = (found != right) & ~unsure
        assert not wrong.any(), f"{measure}: {wrong.sum()} of {wrong.size} wrong"
        assert measure != "radii" or name not in ACTIVATIONS or certified > 0.6


def test_no_certificate_rests_on_less_than_float32():
    for name in ("truncated_activations", "bfloat16_inside", "float8_operand", "integer_product"):
        apply, params, images = CASES[name]()
        program = jfi.network(apply, params, images[0]).program
        names = sorted(params)
        assert certify.product(program, names.index("a")) is None


def test_a_masked_pair_has_the_same_bits():
    zeros, minus = jnp.zeros((1, 3)), jnp.array([[0.0, -0.0, 0.0]])
    assert outcomes.classify(zeros, minus, jnp.zeros(1, int), top1(3))[0] & 7 != outcomes.MASKED
    nan = jnp.full((1, 3), jnp.nan)
    assert outcomes.classify(nan, nan, jnp.zeros(1, int), top1(3))[0] & 7 == outcomes.MASKED


def test_images_that_influence_each_other_are_refused():
    """Not by the first image alone: the others decide which branch is taken here."""
    params = {"a": draw(0, 6, 8), "c": draw(1, 8, 4)}

    def apply(p, x):
        h = jax.nn.relu(x @ p["a"])
        late = jnp.arange(len(x)) > 0
        h = jnp.where(late[:, None], lax.cond(h.sum() > 20, lambda h: 2 * h, jnp.tanh, h), h)
        return h @ p["c"]

    images = draw(9, 32, 6, scale=1)
    network = jfi.network(apply, params, images[0])
    with pytest.raises(jfi.InputError, match=r"image [1-9]\d* alone .* must not influence"):
        jfi.Engine(network, images, np.zeros(32, int), network.sites)


def test_a_campaign_that_a_naive_run_contradicts_raises(tmp_path, monkeypatch):
    params, images = {"a": draw(0, 6, 8), "c": draw(1, 8, 4)}, draw(9, 16, 6, scale=1)
    network = jfi.network(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["c"], params, images[0])
    engine = jfi.Engine(network, images, np.zeros(16, int), network.sites)
    plan = jfi.plan(network, "exhaustive", fault_model="flip")
    right = Case.change
    monkeypatch.setattr(Case, "change", lambda *a: (-right(*a)[0], right(*a)[1]))
    with pytest.raises(jfi.VerificationError, match=r"verification failed: [ac] index") as error:
        jfi.run(plan, engine, tmp_path, {}, verify_pairs=100)
    assert error.value.summary["verify"]["disagreements"] > 0
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("kind", ["dense", "twice", "convolution"])
def test_a_product_that_was_all_of_a_sum_leaves_nothing_behind(kind):
    """A word that becomes tiny decides the sign alone, as it does in NumPy."""
    a, b, c = draw(0, 4, 6), draw(1, 6, 6), draw(2, 6, 5)
    if kind == "convolution":
        images = np.zeros((9, 3, 3, 1), np.float32)
        images.reshape(9, 9)[range(9), range(9)] = draw(3, 9)
        a, c = draw(0, 3, 3, 1, 2), draw(2, 18, 5)
    else:
        images = np.diag(draw(3, 4))

    def signs(xp, p, x, times):
        h = times(x, p["a"])
        if kind == "twice":  # of the second product, all but one channel is 0
            h = times(h * np.eye(1, 6, dtype=np.float32), p["b"])
        h = h.reshape(len(x), -1)
        return (xp.sign(h) + 0.5 * xp.sign(h * h - 1e-30)) @ p["c"]

    def by_jax(x, w):
        if w.ndim == 2:
            return x @ w
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def by_numpy(x, w):
        if w.ndim == 2:
            return (x[:, :, None] * w).sum(1)
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(padded[:, i : i + 3, j : j + 3] * w[i, j] for i in range(3) for j in range(3))

    params = {"a": a, "b": b, "c": c}
    network = jfi.network(lambda p, x: signs(jnp, p, x, by_jax), params, images[0])
    site = tuple(site for site in network.sites if site.name == "a")
    engine = jfi.Engine(network, images, None, site, loop=False)
    rows = [("a", i, bit, "flip") for i in range(a.size) for bit in range(32)]
    told = engine.run(jfi.fault_list(rows, site), keep_bits=True).critical_bits
    told = np.unpackbits(told, axis=1)[:, : len(images)].astype(bool)
    right = []
    for _, index, bit, _ in rows:
        faulty = a.copy()
        faulty.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << bit)
        with np.errstate(all="ignore"):
            logits = signs(np, {**params, "a": faulty}, images, by_numpy)
        right.append(logits.argmax(1) != engine.answers)
    np.testing.assert_array_equal(told, right)
    assert told.any()
