"""Certificates: sound on random networks, in float32 as it runs, and worth having."""

from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import top1
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jfi
import nets
from jfi import bits, outcomes
from jfi.campaign import rounds
from jfi.engine import certify, prune, rounding, verify
from jfi.engine.engine import Engine
from jfi.faults import FAULT_MODELS, FaultSpace
from jfi.networks import sites
from jfi.networks.program import run, section, trace
from jfi.sampling.sampling import Request

RNG = np.random.default_rng(0)
FLAGS = outcomes.CRITICAL | outcomes.CORRECT


ACTS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


def asked(program):
    return top1(program).constraints


class Residual(nn.Module):
    """Three cuts: every kind of layer that has a bound, in a residual network."""

    pool: str = "max"
    act: str = "relu"

    @nn.compact
    def __call__(self, x):
        act = ACTS[self.act]
        x = act(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x)))
        y = act(nn.Conv(6, (3, 3))(x))
        x = act(x + nn.Conv(6, (3, 3), use_bias=False)(y))
        pool = nn.max_pool if self.pool == "max" else nn.avg_pool
        x = pool(x, (2, 2), (2, 2))
        z = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1)))
        x = act(nn.Conv(8, (3, 3), strides=2)(x) + z)
        one = x.max((1, 2)) if self.pool == "max" else x.mean((1, 2))
        flat = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        x = jnp.concatenate([one, flat], axis=1)
        return nn.Dense(4)(act(nn.Dense(16)(x)))


def make(seed=0, size=8, **options):
    net = Residual(**options)
    images = np.random.default_rng(seed).normal(size=(6, size, size, 2)).astype(np.float32)
    variables = net.init(jax.random.key(seed), images[:1])
    return jfi.network(net.apply, variables, images[0]), images


def test_cuts_are_gates_before_products():
    network, _ = make()
    program = network.program
    cuts = certify.cuts(program)
    assert [cut.aval.shape for cut in cuts] == [(1, 8, 8, 6), (1, 4, 4, 6)]
    for cut in cuts:
        rest = section(program, cut)
        # Nothing but the cut and parameters is left to depend on: it runs without the image.
        assert all(program.x not in eqn.invars for eqn in rest.eqns)


def test_one_of_two_values_that_go_on_is_no_gate():
    def apply(w, x):
        def step(h, i):
            h = jnp.tanh(h + i @ w[0])
            return h, h

        last, every = lax.scan(step, jnp.zeros((len(x), 5)), jnp.swapaxes(x, 0, 1))
        return jnp.tanh(last + every.mean(axis=0)) @ w[1]

    w = [RNG.normal(size=shape).astype(np.float32) for shape in ((2, 5), (5, 3))]
    x = RNG.normal(size=(1, 4, 2)).astype(np.float32)
    program = trace(apply, w, jax.ShapeDtypeStruct((4, 2), np.float32))
    env, found = run(program, w, x), certify.gates(program)
    assert len(found) > 2
    for gate in found:
        again = run(section(program, gate), w, env[gate])[program.out]
        np.testing.assert_array_equal(again, env[program.out])


def test_dead_words_are_certified_as_such(tmp_path):
    """Not as the flip of bit 0, as which they are booked."""
    network, images = make()
    chosen = sites.select(network, "Dense_1/kernel")
    runner = Engine(network, images, np.zeros(len(images), int), chosen)
    space = FaultSpace(chosen, FAULT_MODELS["dead"])
    critical = runner.run(space.decode(np.arange(space.size)), "critical").critical > 0
    dead = runner.certified(0, 0, bits.DEAD)
    assert dead.any() and not (dead & critical).any()
    assert (runner.certified(0, 0) & critical).any()
    request = Request(error_margin=0.02)
    found = rounds.run("adaptive_certified", space, runner, tmp_path, {}, request=request)
    (unit,) = found["estimates"]
    assert unit["cp_low"] <= critical.mean() <= unit["cp_high"]


def test_a_primitive_without_a_bound_ends_the_cuts():
    def apply(w, x):
        y = jnp.tanh(x.reshape(1, -1) @ w[0])
        return jnp.sort(jnp.tanh(y @ w[1])) @ w[2]

    w = [RNG.normal(size=shape).astype(np.float32) for shape in ((32, 40), (40, 40), (40, 3))]
    program = trace(apply, w, jax.ShapeDtypeStruct((4, 4, 2), np.float32))
    for cut in certify.cuts(program):
        assert all(eqn.primitive.name != "sort" for eqn in section(program, cut).eqns)
    with pytest.raises(certify.Unbounded, match="sort"):
        env = run(program, w, jnp.ones((1, 4, 4, 2)))
        certify.bound_map(program, env, program.eqns[2].outvars[0], 0.1, 0.0, asked(program))


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from(sorted(ACTS)),
    st.sampled_from(["max", "avg"]),
    st.sampled_from([1e-4, 1e-2, 0.3]),
    st.booleans(),
)
def test_a_certified_difference_keeps_top_1(seed, act, pool, scale, spiky):
    """Differences scaled to just below what the map certifies, in the directions that hurt."""
    network, images = make(seed, act=act, pool=pool)
    program, leaves = network.program, network.leaves
    env = run(program, leaves, images[:1])
    rng = np.random.default_rng(seed)
    allowance = rounding.allowance(program, env)
    for cut in certify.cuts(program):
        slopes = np.asarray(certify.bound_map(program, env, cut, scale, allowance, asked(program)))
        if not np.isfinite(slopes).all():
            continue  # an uncertain image: nothing is certified
        d = rng.choice([-1.0, 1.0], slopes.shape) * (
            rng.random(slopes.shape) < (0.05 if spiky else 1)
        )
        d *= scale
        cost = np.sum(np.abs(d) * slopes)
        d = d * min(1.0, 0.98 / max(cost, 1e-30))
        later = run(section(program, cut), leaves, env[cut] + d.astype(np.float32))
        assert later[program.out].argmax() == env[program.out].argmax()


@pytest.mark.parametrize("room", [0, 5, 20])
def test_maps_do_not_depend_on_how_many_are_made_at_a_time(room):
    network, images = make(0)
    cut = certify.cuts(network.program)[-1]
    rows = images[:3], np.full(3, 1e-4, np.float32)
    some, wanted = (
        np.asarray(
            jax.jit(partial(prune._maps, network.program, asked(network), cut, n))(
                network.leaves, rows
            )
        )
        for n in (room, 1000)
    )
    assert wanted.shape[:2] == (len(certify.SCALES), 3)
    np.testing.assert_allclose(some, wanted, rtol=1e-5)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 9), st.sampled_from(sorted(ACTS)))
def test_a_change_below_its_radius_keeps_top_1(seed, act):
    """Every kernel, every image: the word with the largest radius moved by just less."""
    network, images = make(seed, act=act)
    program = network.program
    env = run(program, network.leaves, images[:1])
    allowance = rounding.allowance(program, env)
    for site in jfi.select(network):
        leaf = network.positions[site.name]
        product = certify.product(program, leaf)
        radii = np.asarray(
            certify.radii(program, env, product, program.leaves[leaf], allowance, asked(program))
        )
        assert radii.shape == site.shape
        word = np.unravel_index(np.argmax(np.where(np.isfinite(radii), radii, 0)), radii.shape)
        for sign in (-1, 1):
            leaves = [np.array(x) for x in network.leaves]
            leaves[leaf][word] += sign * 0.99 * radii[word]
            moved = run(program, leaves, images[:1])[program.out]
            assert moved.argmax() == env[program.out].argmax()


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_certified_pairs_agree_with_naive_reruns(act):
    """In the engine, every bit: certificates hold in float32, and are no small part."""
    network, images = make(3, act=act)
    labels = np.zeros(len(images), int)
    runner = jfi.Engine(network, images, labels, jfi.select(network))
    space = jfi.FaultSpace(runner.sites, (bits.FLIP,))
    faults = space.decode(np.random.default_rng(0).integers(0, space.size, 1500))
    image = np.random.default_rng(1).integers(0, len(images), 1500)
    found = verify.verify(runner, faults, image, "critical")
    assert found.disagreements == 0, found.worst
    assert found.certified > 500


def test_pairs_of_some_images_in_blocks():
    """Few pairs, images in several blocks: each is decided as with all in one."""
    network, images = make(3)
    labels, sites = np.zeros(len(images), int), jfi.select(network)
    space = jfi.FaultSpace(sites, (bits.FLIP,))
    faults = space.decode(np.random.default_rng(0).integers(0, space.size, 40))
    image = np.resize([0, 4, 5], 40)
    found = [
        jfi.Engine(network, images, labels, sites, memory=memory).critical_pairs(faults, image)
        for memory in (1 << 30, 1)
    ]
    (one, one_certified), (blocks, blocks_certified) = found
    assert np.array_equal(one & FLAGS, blocks & FLAGS)
    assert np.array_equal(one_certified, blocks_certified)


def test_verify_finds_a_wrong_certificate(monkeypatch):
    """Certifying too much shows as disagreements."""
    network, images = make(3)
    runner = jfi.Engine(network, images, np.zeros(len(images), int), jfi.select(network))
    space = jfi.FaultSpace(runner.sites, (bits.FLIP,), bits=(30,))
    faults = space.decode(np.arange(0, space.size, 7))
    image = np.arange(faults.site.size) % len(images)
    honest = certify.radii
    monkeypatch.setattr(certify, "radii", lambda *a: honest(*a) + jnp.inf)
    assert verify.verify(runner, faults, image, "critical").disagreements > 0


@pytest.mark.slow
@pytest.mark.data
def test_20000_certified_pairs_of_resnet20():
    """Trained weights, real images, flips of all words and bits: none certified is critical."""
    shared = Path(__file__).resolve().parents[3].parent / "shared"
    weights = shared / "weights" / "resnet_cifar10" / "resnet20-12fca82f.th"
    if not weights.exists():
        pytest.skip("needs the trained ResNet-20 and the exact CIFAR-10 images")
    net = nets.build("resnet20")
    variables = nets.load(net, weights)
    with np.load(shared / "data" / "cifar10" / "cifar10_exact_subset.npz") as arrays:
        images = np.asarray(nets.normalise(net, arrays["x_test"][:64].astype(np.float32) / 255))
        labels = arrays["y_test"][:64].astype(np.int32)
    network = jfi.network(net.module.apply, variables, images[0])
    runner = jfi.Engine(network, images, labels, jfi.select(network))
    space, rng = jfi.FaultSpace(runner.sites, (bits.FLIP,)), np.random.default_rng(0)
    faults = space.decode(np.sort(rng.integers(0, space.size, 26_000)))
    found = verify.verify(runner, faults, rng.integers(0, 64, 26_000), "critical")
    assert found.disagreements == 0, found.worst
    assert found.certified >= 20_000


def test_images_within_rounding_of_a_tie_are_never_certified():
    def apply(w, x):
        return jax.nn.relu(x.reshape(len(x), -1) @ w["a"]) @ w["b"]

    w = {"a": np.eye(4, dtype=np.float32), "b": np.eye(4, dtype=np.float32)[:, :2]}
    program = trace(apply, w, jax.ShapeDtypeStruct((4,), np.float32))
    for gap, certain in ((1e-6, False), (0.5, True)):
        x = jnp.array([[1.0, 1.0 + gap, 0.3, 0.3]])
        env = run(program, [w["a"], w["b"]], x)
        own = rounding.allowance(program, env)
        slopes = np.asarray(certify.bound_map(program, env, program.x, 0.1, own, asked(program)))
        assert np.isfinite(slopes).all() == certain
    # By hand: d0 and d1 both count against the margin less the allowance, the others do not.
    allowance = rounding.TOLERANCE * np.finfo(np.float32).eps * 1.5
    np.testing.assert_allclose(slopes, [[1 / (0.5 - allowance)] * 2 + [0, 0]], rtol=1e-6)
