"""Every way to run faults gives the same verdicts, and the way is chosen by what it would cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfi
from jfi import bits, routes, tuning
from jfi.faults import Faults
from jfi.hardware import hardware

RNG = np.random.default_rng(3)
STEPS, BATCH, CLASSES = 5, 7, 4


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


PARAMS = {
    "enter": normal(6, 8),
    "again": normal(8, 8) / 3,
    "coarse": normal(8, dtype=jnp.bfloat16),
    "table": RNG.integers(-9, 9, (8, CLASSES)).astype(np.int8),
}
IMAGES = normal(BATCH, STEPS, 6)


def apply(p, x):
    """Unrolled, with words of 8, 16 and 32 bits."""
    h = jnp.zeros((len(x), 8))
    for t in range(STEPS):
        h = jnp.tanh(x[:, t] @ p["enter"] + h @ p["again"] + p["coarse"].astype(jnp.float32))
    return h @ (p["table"].astype(jnp.float32) / 8)


NETWORK = jfi.network(apply, PARAMS, IMAGES[0])
SITES = NETWORK.parameters


def engine(**options):
    return jfi.Engine(NETWORK, IMAGES, np.zeros(BATCH, int), SITES, **options)


def some_faults(words=5):
    """Flips of every bit of some words of every site, and bits stuck."""
    rows = [
        (number, int(index), bit, polarity)
        for number, site in enumerate(SITES)
        for index in RNG.integers(0, site.words, words)
        for bit in range(site.width)
        for polarity in (bits.FLIP, bit % 2)
    ]
    types = (np.int32, np.int64, np.int16, np.int8)
    columns = zip(*rows, strict=True)
    return Faults(*(np.array(c, t) for c, t in zip(columns, types, strict=True)))


def naive_top1(faults):
    """[F, B]: of the network with the faulty word written by NumPy."""
    run, found = jax.jit(apply), []
    for number, index, bit, polarity in zip(*faults, strict=True):
        name = SITES[number].name
        leaf = np.array(PARAMS[name])
        words = leaf.reshape(-1).view(f"u{leaf.itemsize}")
        one = words.dtype.type(1 << int(bit))
        low, high = words[index] & ~one, words[index] | one
        words[index] = [low, high, words[index] ^ one][int(polarity)]
        found.append(np.asarray(run({**PARAMS, name: leaf}, IMAGES)).argmax(-1))
    return np.array(found)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_loop_says_what_naive_runs_say(devices):
    if len(jax.local_devices()) < devices:
        pytest.skip("one device")
    faults = some_faults()
    own = hardware(jax.local_devices()[:devices])
    loop, other = (engine(loop=way, hardware=own) for way in (True, False))
    critical = naive_top1(faults) != loop.golden.top1
    for measure in ("full", "critical"):
        done = loop.run(faults, measure, keep_bits=True)
        told = np.unpackbits(done.critical_bits, axis=1)[:, :BATCH].astype(bool)
        np.testing.assert_array_equal(told, critical)
        np.testing.assert_array_equal(done.critical, other.run(faults, measure).critical)
    detected = loop.run(faults, "detect")
    np.testing.assert_array_equal(detected.critical > 0, critical.any(1))
    assert loop.run(faults).masked.sum() > 0
    assert 0 < critical.sum() < critical.size


def test_more_images_than_a_batch_and_more_faults_than_a_call(monkeypatch):
    from jfi import loop as of

    faults = some_faults(2)
    wanted = engine(loop=True).run(faults)
    monkeypatch.setattr(of, "BATCH", 3)
    monkeypatch.setattr(of, "FAULTS", 5)
    found = engine(loop=True).run(faults)
    np.testing.assert_array_equal(found.critical, wanted.critical)


def test_few_faults_are_looped_and_compile_nothing_of_their_own(monkeypatch):
    monkeypatch.setattr(routes, "EQUATION", 1 << 30)
    runner = engine()
    faults = some_faults(1)
    for measure in ("full", "critical", "detect"):
        runner.run(faults, measure)
    assert not runner._programs
    assert "_pruner" not in runner.__dict__
    jfi.Engine.pairs(runner, faults, np.zeros(faults.site.size, int))
    assert not runner._programs


def test_many_faults_are_not():
    """What a campaign of 1,500 and one of 100,000 faults would take, on the estimates in use."""
    program = NETWORK.program
    cost = routes.looping(program, 1, BATCH)
    few = int(1e9) // cost + 1
    assert routes.looping(program, 2 * few, BATCH) == 2 * few * cost
    assert routes.whole(program) > 0
    assert not routes.bounds_pay(program, [0], BATCH)
    assert routes.bounds_pay(program, [10**9], BATCH)


def test_ways_that_come_close_are_timed_once_and_kept(monkeypatch, tmp_path):
    timed = []

    def seconds(run):
        timed.append(run())
        return float(len(timed))

    monkeypatch.setattr(routes, "CLOSE", 0.0)
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "seconds", seconds)
    faults = some_faults(1)
    wanted = engine(loop=False, hardware=hardware()).run(faults)
    first = engine(hardware=hardware()).run(faults)
    assert len(timed) == 2 * len(SITES)
    again = engine(hardware=hardware()).run(faults)
    assert len(timed) == 2 * len(SITES)
    for found in (first, again):
        np.testing.assert_array_equal(found.critical, wanted.critical)
