"""Every way to run faults gives the same verdicts, and the way is chosen by what it would cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfi
from jfi import bits, outcomes
from jfi.engine import loop, routes, to_logits
from jfi.engine.routes import Ways
from jfi.engine.split import split
from jfi.faults import Faults
from jfi.hardware import tuning
from jfi.hardware.devices import hardware
from jfi.networks.program import count

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


def test_a_loop_says_what_naive_runs_say():
    faults = some_faults()
    looped, other = (engine(loop=way) for way in (True, False))
    critical = naive_top1(faults) != looped.answers
    for measure in ("full", "critical"):
        done = looped.run(faults, measure, keep_bits=True)
        told = np.unpackbits(done.critical_bits, axis=1)[:, :BATCH].astype(bool)
        np.testing.assert_array_equal(told, critical)
        np.testing.assert_array_equal(done.critical, other.run(faults, measure).critical)
    detected = looped.run(faults, "detect")
    np.testing.assert_array_equal(detected.critical > 0, critical.any(1))
    assert looped.run(faults).masked.sum() > 0
    assert 0 < critical.sum() < critical.size


@pytest.mark.parametrize("dtype", [np.int8, jnp.bfloat16])
def test_positions_beyond_what_a_word_of_the_network_can_count(dtype):
    """A network of narrow words alone: the 300th of 8 bits, the 70,000th of 16."""
    words = 300 if dtype == np.int8 else 70_000
    weights = np.ones((words, 2), dtype)
    images = np.zeros((1, words), np.float32)
    images[0, -1] = 1
    network = jfi.network(lambda p, x: x @ p["w"].astype(jnp.float32), {"w": weights}, images[0])
    sign = network.sites[0].width - 1
    fault = jfi.fault_list([("w", (words - 1, 0), sign, "flip")], network.sites)
    for way in (True, False):
        runner = jfi.Engine(network, images, np.zeros(1, int), network.sites, loop=way)
        assert runner.run(fault).critical[0] == 1


def test_more_images_than_a_batch_and_more_faults_than_a_call(monkeypatch):
    faults = some_faults(2)
    wanted = engine(loop=True).run(faults)
    monkeypatch.setattr(loop, "BATCH", 3)
    monkeypatch.setattr(loop, "FAULTS", 5)
    found = engine(loop=True).run(faults)
    np.testing.assert_array_equal(found.critical, wanted.critical)


def test_few_faults_are_looped_and_compile_nothing_of_their_own(monkeypatch):
    monkeypatch.setattr(routes, "EQUATION", 1 << 30)
    runner = engine()
    faults = some_faults(1)
    for measure in ("full", "critical", "detect"):
        runner.run(faults, measure)
    assert not runner._to_logits._programs
    assert "pruner" not in runner._cut_to_cut.__dict__
    runner.pairs(faults, np.zeros(faults.site.size, int))
    assert not runner._to_logits._programs


def test_many_faults_are_not_looped(monkeypatch):
    """Nor few of them, where it was said that many are to come."""
    monkeypatch.setattr(routes, "EQUATION", 1 << 30)
    ways = Ways(NETWORK.program, BATCH, NETWORK.program)
    many = 2 * ways.compiling // ways.looping(1)
    assert ways.are_few(many // 4)
    assert not ways.are_few(many)

    def parts(site):
        return split(NETWORK.program, NETWORK.source(SITES[site]))

    every = range(len(SITES))
    assert not ways.bounded(dict.fromkeys(every, many // 4), parts)
    endless = dict.fromkeys(every, 10**9)
    told = {SITES[site].name for site in ways.bounded(endless, parts)}
    assert told == {SITES[site].name for site in ways.bounded({}, parts)}  # kept from run to run
    assert told == {"enter", "again", "coarse"}  # tanh comes after them; after the table, nothing
    monkeypatch.setattr(routes, "HOST", 1 << 18)
    afresh = Ways(NETWORK.program, BATCH, NETWORK.program)
    assert not afresh.bounded(endless, parts)  # none of these pairs takes as long as its listing
    monkeypatch.setattr(routes, "HOST", 0)
    runner, faults = engine(), some_faults(1)
    runner.expect(dict.fromkeys(every, many))
    runner.run(faults)
    assert sorted(runner._to_logits._programs) == [*every]
    runner.expect(endless)
    runner.run(faults, "critical")
    assert "pruner" in runner._cut_to_cut.__dict__


def test_a_loop_of_one_leaf_where_what_it_spares_pays_for_compiling(monkeypatch):
    monkeypatch.undo()  # the costs as they are
    ways = Ways(NETWORK.program, BATCH, NETWORK.program)
    first, last = (NETWORK.positions[name] for name in ("enter", "table"))
    assert not ways.own_loop(10**5, first)  # next to nothing comes before it
    assert ways.own_loop(10**5, last)
    assert not ways.own_loop(100, last)


def test_programs_of_a_site_are_compiled_where_they_may_spare_as_much(monkeypatch):
    monkeypatch.undo()
    ways = Ways(NETWORK.program, BATCH, NETWORK.program)
    whole = split(NETWORK.program, NETWORK.positions["enter"])
    whole = whole._replace(flops=ways.whole, live=0)  # they spare nothing but what is hoped for
    n = ways.compiling // ways.looping(1)
    assert not ways.are_worth(2 * n, whole)
    assert ways.are_worth(20 * n, whole)
    assert ways.are_worth(2 * n, whole._replace(flops=0))


def test_equations_within_loops_and_branches_are_counted():
    def apply(p, x):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x @ p + h), None), x[0] @ p, x)
        return jax.lax.cond(h[0] > 0, lambda h: h + 1, lambda h: jnp.sin(h) * 2, h)

    eqns = jax.make_jaxpr(apply)(normal(4, 4), normal(3, 4)).jaxpr.eqns
    within = [eqn.primitive.name for eqn in eqns]
    assert {"scan", "cond"} <= {*within}
    assert count(eqns) == len(eqns) + 3 + (1 + 2)  # tanh(x @ p + h); h + 1, sin(h) * 2


@pytest.mark.parametrize("way", [to_logits.ANY, to_logits.OWN])
def test_a_loop_calls_masked_what_changes_no_bit(way):
    """Golden by the same program: weights of an input that is always 0."""
    images = IMAGES.copy()
    images[..., 2] = 0
    runner = jfi.Engine(NETWORK, images, None, SITES, loop=True)
    number = [site.name for site in SITES].index("enter")
    faults = jfi.fault_list(
        [("enter", (2, k), bit, "flip") for k in range(8) for bit in (3, 31)], SITES
    )
    for rows, codes, _ in runner._to_logits._looped(number, faults, np.arange(16), way):
        assert (codes & outcomes.CLASS_MASK == outcomes.MASKED).all(), rows


def test_a_campaign_says_how_much_it_will_run(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(jfi.Engine, "expect", lambda self, faults: told.append(dict(faults)))
    rows = [("enter", 3, 1, "flip"), ("again", 1, 2, "flip"), ("again", 5, 2, "flip")]
    plan = jfi.plan_listed(NETWORK, jfi.fault_list(rows, jfi.listable(NETWORK)))
    own = jfi.Engine(NETWORK, IMAGES, np.zeros(BATCH, int), plan.space.sites)
    jfi.run(plan, own, tmp_path, {})
    names = {plan.space.sites[number].name: n for number, n in told[0].items() if n}
    assert names == {"enter": 1, "again": 2}


def test_a_screen_has_no_loop():
    with pytest.raises(jfi.InputError, match="'bfloat16' has no loop"):
        engine(screen="bfloat16", loop=True)


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
