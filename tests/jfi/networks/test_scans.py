"""Loops over time that users write, broken, against plain Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jfi
from jfi import bits
from jfi.engine.engine import Engine
from jfi.engine.verify import verify
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, Faults, FaultSpace
from jfi.networks import sites, taps

STEPS, INPUTS, HIDDEN, CLASSES, IMAGES = 4, 3, 5, 3, 3


class ByHand:
    """`name` and `scan` in plain Python; the word `index` of the value `site` is broken.

    step: the one it is broken at, in the order of computing, or None for all.
    """

    def __init__(self, site=None, index=0, bit=0, polarity=0, step=None):
        self.site, self.index, self.step, self.made = site, index, step, 0
        self.fault = bit, polarity

    def name(self, value, name):
        if name != self.site:
            return value
        self.made += 1
        if self.step not in (None, self.made - 1):
            return value
        value = np.array(value)
        value.flat[self.index] = bits.faulty(value.flat[self.index], *self.fault)
        return jnp.asarray(value)

    def scan(self, body, carry, xs):
        outs = []
        for t in range(STEPS):
            carry, out = body(carry, jax.tree.map(lambda x, t=t: x[t], xs))
            outs.append(out)
        return carry, jax.tree.map(lambda *out: jnp.stack(out), *outs)


class Traced:
    """The same for the engine."""

    name, scan = staticmethod(checkpoint_name), staticmethod(lax.scan)


def one_neuron(p, x, use):
    def body(u, i):
        u = use.name(0.8 * u + i @ p["in"][:, :1], "u")
        return u, u

    start = jnp.zeros((len(x), 1))
    return use.scan(body, start, jnp.swapaxes(x, 0, 1))[1].sum(axis=0) @ p["out"][:1]


def one_number(p, x, use):
    def body(h, i):
        h = jnp.tanh(h + i @ p["in"])
        return h, h * use.name(jnp.float32(1.5) * p["beta"][0], "u")

    start = jnp.zeros((len(x), HIDDEN))
    return use.scan(body, start, jnp.swapaxes(x, 0, 1))[1].sum(axis=0) @ p["out"]


def two_layers_of_one_name(p, x, use):
    def body(carry, i):
        u, v = carry
        u = use.name(jnp.tanh(0.8 * u + i @ p["in"]), "u")
        v = use.name(jnp.tanh(0.8 * v + u), "u")
        return (u, v), v

    start = jnp.zeros((len(x), HIDDEN))
    return use.scan(body, (start, start), jnp.swapaxes(x, 0, 1))[1].sum(axis=0) @ p["out"]


def trace_beside_a_map(p, x, use):
    """A word of `beta` changes a row of the map, and by the trace all of it."""

    def body(carry, i):
        u, trace = carry
        trace = 0.9 * trace + p["beta"]
        u = 0.5 * u + i * trace
        return (u, trace), u

    current = (jnp.swapaxes(x, 0, 1) @ p["in"] * p["beta"])[..., None] * jnp.ones(HIDDEN)
    start = jnp.zeros((len(x), HIDDEN, HIDDEN)), jnp.zeros(HIDDEN)
    return use.scan(body, start, current)[1].sum(axis=(0, 3)) @ p["out"]


def weight_times_itself(p, x, use):
    def body(h, i):
        h = jnp.tanh(h @ (p["square"] @ p["square"]) + i @ p["in"])
        return h, h

    return use.scan(body, jnp.zeros((len(x), HIDDEN)), jnp.swapaxes(x, 0, 1))[0] @ p["out"]


def weight_handed_out(p, x, use):
    def body(h, i):
        h = jnp.tanh(h @ p["square"] + i @ p["in"])
        return h, p["square"]

    start = jnp.zeros((len(x), HIDDEN))
    h, weights = use.scan(body, start, jnp.swapaxes(x, 0, 1))
    return (h + weights.sum(axis=(0, 1))) @ p["out"]


def parameters():
    draw = np.random.default_rng(0)
    shapes = {
        "in": (INPUTS, HIDDEN), "beta": (HIDDEN,), "square": (HIDDEN, HIDDEN),
        "out": (HIDDEN, CLASSES),
    }  # fmt: skip
    return {name: draw.normal(size=shape).astype("f4") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("net", "pattern"),
    [
        (one_neuron, "u"),
        (one_neuron, "u@step"),
        (one_number, "u"),
        (one_number, "u@step"),
        (two_layers_of_one_name, "u"),
        (two_layers_of_one_name, "u@step"),
        (trace_beside_a_map, "beta"),
        (weight_times_itself, "square"),
        (weight_handed_out, "square"),
    ],
)
def test_a_broken_loop_does_what_a_plain_loop_does(net, pattern):
    params, draw = parameters(), np.random.default_rng(1)
    images = draw.normal(size=(IMAGES, STEPS, INPUTS)).astype("f4")
    network = jfi.network(lambda p, x: net(p, x, Traced), params, images[0])
    (site,) = sites.select(network, pattern)
    runner = Engine(network, images, np.zeros(IMAGES, int), (site,))
    index, image = draw.integers(0, site.words, 10), draw.integers(0, IMAGES, 10)
    bit = np.resize([31, 25, 24, 23, 22], 10).astype(np.int16)
    polarity = np.full(10, bits.FLIP, np.int8)
    found = runner.pairs(Faults(np.zeros(10, np.int32), index, bit, polarity), image).logits
    step, place = taps.moment(site, index)
    for k in range(10):
        broken = {name: np.array(leaf) for name, leaf in params.items()}
        if pattern in broken:
            leaf = broken[pattern]
            leaf.flat[index[k]] = bits.faulty(leaf.flat[index[k]], bit[k], bits.FLIP)
        when = None if step[k] == taps.EVERY_STEP else step[k]
        use = ByHand(taps.parse(pattern)[0], place[k], bit[k], bits.FLIP, when)
        wanted = net(broken, images[image[k]][None], use)[0]
        np.testing.assert_allclose(found[k], wanted, rtol=1e-4, atol=1e-4)
        assert not np.allclose(wanted, runner.golden.logits[image[k]], rtol=1e-4, atol=1e-4)


def test_values_named_beside_the_broken_one_may_be_of_any_dtype():
    """Verification breaks the one value, and leaves flags and whole numbers alone."""

    def net(p, x):
        def body(u, i):
            u = checkpoint_name(jnp.tanh(u + i @ p["in"]), "u")
            on = checkpoint_name(u > 0, "on")
            level = checkpoint_name(jnp.round(u * 100).astype(jnp.int8), "level")
            return u, jnp.where(on, level, 0).astype(jnp.float32)

        start = jnp.zeros((len(x), HIDDEN))
        return lax.scan(body, start, jnp.swapaxes(x, 0, 1))[1].sum(axis=0) @ p["out"]

    draw = np.random.default_rng(2)
    images = draw.normal(size=(IMAGES, STEPS, INPUTS)).astype("f4")
    network = jfi.network(net, parameters(), images[0])
    chosen = sites.select(network, "u|level")
    runner = Engine(network, images, np.zeros(IMAGES, int), chosen)
    space = FaultSpace(chosen, FAULT_MODELS["flip"])
    faults = space.decode(draw.integers(0, space.size, 40))
    checked = verify(runner, faults, draw.integers(0, IMAGES, 40))
    assert checked.disagreements == 0 and checked.agreements > 30


def test_names_out_of_reach_are_left_out():
    def net(p, x):
        def inner(h, _):
            return checkpoint_name(0.9 * h, "deep"), None

        def body(h, i):
            h = lax.scan(inner, jnp.tanh(h + i @ p["in"]), None, length=2)[0]
            h = lax.cond(h.sum() > 0, lambda h: checkpoint_name(h, "branch"), jnp.tanh, h)
            # Broken here alone, it would be a fault in a part of the values of its name.
            return checkpoint_name(h, "deep"), checkpoint_name(h, "seen")

        out = lax.scan(body, jnp.zeros((len(x), HIDDEN)), jnp.swapaxes(x, 0, 1))[1]
        return out.sum(axis=0) @ p["out"]

    network = jfi.network(net, parameters(), np.zeros((STEPS, INPUTS), "f4"))
    assert [tap.name for tap in network.taps.values()] == ["seen"]


def test_layers_of_one_name_and_two_shapes_in_a_loop_are_left_out():
    def net(p, x):
        def body(carry, i):
            u = checkpoint_name(jnp.tanh(i @ p["in"]), "u")
            return carry, checkpoint_name(u @ p["out"], "u")

        return lax.scan(body, 0.0, jnp.swapaxes(x, 0, 1))[1].sum(axis=0)

    assert not jfi.network(net, parameters(), np.zeros((STEPS, INPUTS), "f4")).taps


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spike@2", "value name 'spike@2' has an @, which stands before a step"),
        ("out", "a parameter and a named value are both called out: rename one"),
    ],
)
def test_names_that_could_mean_two_places_are_refused(name, message):
    def net(p, x):
        return checkpoint_name(x @ p["out"], name)

    with pytest.raises(InputError, match=message):
        jfi.network(net, parameters(), np.zeros(HIDDEN, "f4"))


def test_a_recurrent_layer_in_few_bits_is_run_whole():
    """A product that is rounded has no exact update."""
    draw = np.random.default_rng(0)
    params = {"w": jnp.bfloat16(draw.normal(size=(5, 5))), "c": draw.normal(size=(5, 3))}
    params = {name: np.asarray(leaf, leaf.dtype) for name, leaf in params.items()}
    params["c"] = params["c"].astype(np.float32)

    def apply(p, x):
        x = x.astype(jnp.bfloat16)
        h, _ = lax.scan(lambda c, _: (jnp.tanh(c @ p["w"] + x), None), x, length=3)
        return h.astype(jnp.float32) @ p["c"]

    images = draw.normal(size=(8, 5)).astype(np.float32)
    network = jfi.network(apply, params, images[0])
    runner = Engine(network, images, np.zeros(8, int), network.sites)
    space = FaultSpace(network.sites, FAULT_MODELS["flip"])
    faults = space.decode(draw.choice(space.size, 300, replace=False))
    for measure in ("full", "critical"):
        found = verify(runner, faults, draw.integers(0, 8, 300), measure)
        assert found.disagreements == 0 and found.agreements > 290
