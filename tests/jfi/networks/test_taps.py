"""Faults in run-time values against a plain loop over time, one fault after another."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jfi
from jfi import bits
from jfi.campaign import rounds
from jfi.engine.engine import Engine
from jfi.engine.verify import verify
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, read_fault_list
from jfi.networks import scans, sites, taps
from jfi.sampling.sampling import Request

STEPS, INPUTS, HIDDEN, CLASSES, SAMPLES = 9, 6, 5, 3, 8


def parameters(recurrent: bool):
    draw = np.random.default_rng(3)

    def layer(inputs, neurons):
        return {
            "kernel": draw.normal(size=(inputs, neurons)).astype("f4"),
            "beta": draw.uniform(0.5, 0.95, neurons).astype("f4"),
            "threshold": draw.uniform(0.4, 1.1, neurons).astype("f4"),
        }

    params = {"a": layer(INPUTS, HIDDEN), "b": layer(HIDDEN, CLASSES)}
    if recurrent:
        params["a"]["feedback"] = draw.normal(size=(HIDDEN, HIDDEN)).astype("f4")
    return params


def fires(potential, threshold):
    return (potential > threshold).astype(jnp.float32)


def neuron(p, carry, current, named):
    """A leaky neuron with delayed reset by subtraction; `named` is applied to what it computes."""
    potential, spike = carry
    if "feedback" in p:
        current = current + spike @ p["feedback"]
    reset = fires(potential, p["threshold"]) * p["threshold"]
    potential = named("potential", p["beta"] * potential + current - reset)
    spike = named("spike", fires(potential, p["threshold"]))
    return (potential, spike), spike


def layer(p, name, x):
    """Spikes [T, B, N] of inputs [T, B, M]."""

    def named(what, value):
        return checkpoint_name(value, f"{name}/{what}")

    current = x @ p["kernel"]
    rest = jnp.zeros(current.shape[1:])
    return lax.scan(lambda c, i: neuron(p, c, i, named), (rest, rest), current)[1]


def apply(params, x):
    """A spiking network on [B, T, inputs]; logits are spike counts."""
    spikes = layer(params["a"], "a", jnp.swapaxes(x, 0, 1))
    return layer(params["b"], "b", spikes).sum(axis=0)


def by_hand(params, x, fault):
    """Logits of one sample by a loop over time, with NumPy breaking the word of `fault`.

    fault: (site, index, bit, polarity, step), step None for a permanent one.
    """
    site, index, bit, polarity, step = fault
    if site in ("a/kernel", "a/beta", "b/threshold"):
        name, leaf = site.split("/")
        broken = np.array(params[name][leaf])
        broken.flat[index] = bits.faulty(broken.flat[index], bit, polarity)
        params = {**params, name: {**params[name], leaf: broken}}
    for name in ("a", "b"):
        p, out = params[name], []
        neurons = p["beta"].size
        carry = jnp.zeros(neurons), jnp.zeros(neurons)
        for now in range(STEPS):

            def named(what, value, name=name, now=now):
                if site != f"{name}/{what}" or step not in (None, now):
                    return value
                value = np.array(value)
                value[index] = bits.faulty(value[index], bit, polarity)
                return jnp.asarray(value)

            carry, spike = neuron(p, carry, x[now] @ p["kernel"], named)
            out.append(spike)
        x = jnp.stack(out)
    return np.asarray(x.sum(axis=0))


def workload():
    return (np.random.default_rng(5).random((SAMPLES, STEPS, INPUTS)) < 0.4).astype("f4")


def engine_of(recurrent=False, pattern=".*"):
    network = jfi.network(apply, parameters(recurrent), workload()[0])
    return Engine(network, workload(), np.zeros(SAMPLES, int), sites.select(network, pattern))


def test_every_named_value_is_a_site_after_the_parameters():
    network = jfi.network(apply, parameters(False), workload()[0])
    assert [s.name for s in network.sites[-4:]] == [
        "a/potential", "a/spike", "b/potential", "b/spike",
    ]  # fmt: skip
    assert [s.words for s in network.sites[-4:]] == [HIDDEN, HIDDEN, CLASSES, CLASSES]
    assert {tap.steps for tap in network.taps.values()} == {STEPS}
    assert network.kernels == {"a/kernel", "b/kernel"}
    network = jfi.network(apply, parameters(True), workload()[0])
    assert network.kernels == {"a/kernel", "a/feedback", "b/kernel"}


@pytest.mark.parametrize("recurrent", [False, True])
def test_faults_of_a_spiking_network_do_what_a_loop_over_time_does(recurrent):
    runner, draw = engine_of(recurrent), np.random.default_rng(7)
    moments = sites.select(runner.network, "a/.*@step") + sites.select(runner.network, ".*@4")
    runner = Engine(runner.network, runner.images, runner.labels, (*runner.sites, *moments))
    checked, changed = ["a/kernel", "a/beta", "b/threshold", *runner.network.taps], 0
    for number, site in enumerate(runner.sites):
        name, _ = taps.parse(site.name)
        if name not in checked:
            continue
        index = draw.integers(0, site.words, 12)
        bit = np.resize([31, 30, 29, 25, 23, 22, 0], 12).astype(np.int16)
        polarity = np.resize(np.arange(5, dtype=np.int8), 12)
        image = draw.integers(0, SAMPLES, 12)
        faults = Faults(np.full(12, number, np.int32), index, bit, polarity)
        found = runner.pairs(faults, image).logits
        step, place = taps.moment(site, index)
        for k in range(12):
            when = None if step[k] == taps.EVERY_STEP else step[k]
            fault = name, place[k], bit[k], polarity[k], when
            wanted = by_hand(parameters(recurrent), runner.images[image[k]], fault)
            np.testing.assert_allclose(found[k], wanted, rtol=1e-6, err_msg=f"{site.name} {fault}")
            changed += (wanted != runner.golden.logits[image[k]]).any()
    assert changed > 30


@pytest.mark.parametrize(
    ("recurrent", "measure"),
    [(False, "full"), (True, "full"), (False, "critical"), (True, "detect")],
)
def test_campaigns_over_all_injection_points_agree_with_naive_runs(recurrent, measure):
    runner = engine_of(recurrent, ".*(kernel|feedback|beta|potential|spike)")
    space = FaultSpace(runner.sites, FAULT_MODELS["stuck_at"])
    draw = np.random.default_rng(11)
    faults = space.decode(draw.integers(0, space.size, 1000))
    full, found = (runner.run(faults, of) for of in ("full", measure))
    np.testing.assert_array_equal(full.critical > 0, found.critical > 0)
    assert (full.critical > 0).sum() > 20
    checked = verify(runner, faults, draw.integers(0, SAMPLES, 1000), measure)
    assert checked.disagreements == 0 and checked.agreements >= 990


def test_one_neuron_is_run_again_alone_unless_neurons_feed_back():
    for recurrent in (False, True):
        network = jfi.network(apply, parameters(recurrent), workload()[0])
        eqn = next(e for e in network.program.eqns if e.primitive.name == "scan")
        scan, index = scans.read(eqn), object()
        found = scans.lanes(scan, [None] * len(eqn.invars), {"a/spike": (None, index)})
        if recurrent:
            assert found is None
        else:
            assert set(found.values()) == {(None, index), (index,)}


def test_a_fault_in_an_activation_is_one_word_of_one_layer():
    def lenet_like(params, x):
        x = checkpoint_name(jax.nn.relu(x @ params["a"]), "hidden")
        return x @ params["b"]

    draw = np.random.default_rng(0)
    params = {"a": draw.normal(size=(4, 6)).astype("f4"), "b": draw.normal(size=(6, 3))}
    params["b"] = params["b"].astype("f4")
    images = draw.normal(size=(5, 4)).astype("f4")
    network = jfi.network(lenet_like, params, images[0])
    runner = Engine(network, images, np.zeros(5, int), sites.select(network, "hidden"))
    for index, bit in ((0, 31), (3, 30), (5, 28)):
        faults = Faults(*(np.array([v]) for v in (0, index, bit, bits.FLIP)))
        hidden = np.maximum(images @ params["a"], 0)
        hidden[:, index] = bits.faulty(hidden[:, index], bit, bits.FLIP)
        for k in range(5):
            found = runner.pairs(faults, np.array([k])).logits[0]
            np.testing.assert_allclose(found, hidden[k] @ params["b"], rtol=2e-5, atol=1e-5)


def test_a_name_used_again_and_again_is_one_place_at_several_steps():
    def unrolled(params, x):
        total, state = 0.0, jnp.zeros((len(x), 3))
        for step in range(4):
            state = checkpoint_name(jnp.tanh(state + x[:, step] @ params), "state")
            total = total + state
        return total

    draw = np.random.default_rng(0)
    params, images = draw.normal(size=(2, 3)).astype("f4"), draw.normal(size=(6, 4, 2))
    network = jfi.network(unrolled, params, images[0].astype("f4"))
    assert network.taps["state"].steps == 4
    chosen = (*sites.select(network, "state"), *sites.select(network, "state@step"))
    runner = Engine(network, images.astype("f4"), np.zeros(6, int), chosen)
    faults = FaultSpace(chosen, FAULT_MODELS["flip"])
    faults = faults.decode(draw.integers(0, faults.size, 64))
    checked = verify(runner, faults, draw.integers(0, 6, 64))
    assert checked.agreements + checked.near_ties == 64 and checked.agreements > 50


def test_names_that_name_no_place_are_left_out():
    def odd(params, x):
        x = checkpoint_name(x @ params, "same")
        flags = checkpoint_name(x > 0, "flags")
        return checkpoint_name(jnp.where(flags, x, 0)[:, :2], "same")

    network = jfi.network(odd, np.ones((3, 4), "f4"), np.ones(3, "f4"))
    assert not network.taps


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a/spike@9", "step '9' of a/spike is none of its 9: give 0 to 8, or a/spike@step"),
        ("a/spike@soon", "step 'soon' of a/spike is none of its 9"),
        ("a/kernel@3", "matches no site in full; the run-time values are a/potential, a/spike"),
        ("c/spike", "'c/spike' matches no site in full; the sites are a/kernel, "),
    ],
)
def test_a_site_that_is_not_there_is_refused(pattern, message):
    network = jfi.network(apply, parameters(False), workload()[0])
    with pytest.raises(InputError, match=message):
        sites.select(network, pattern)


def test_an_engine_takes_only_the_sites_of_its_network():
    images = workload()
    network = jfi.network(apply, parameters(False), images[0])
    labels = np.zeros(len(images), int)
    own = [sites.select(network, name)[0] for name in ("a/kernel", "a/spike@3", "a/spike@step")]
    assert jfi.Engine(network, images, labels, own).sites == tuple(own)
    for site, message in (
        (own[0]._replace(name="z/kernel"), "the network has no site z/kernel; it has a/kernel, "),
        (
            own[0]._replace(shape=(2, 2)),
            r"the network's a/kernel is float32\[.*, not float32\[2, 2",
        ),
        (own[1]._replace(name="a/spike@9"), "step '9' of a/spike is none of its 9"),
    ):
        with pytest.raises(InputError, match=message):
            jfi.Engine(network, images, labels, (site,))


def test_neuron_fault_models_know_their_sites():
    network = jfi.network(apply, parameters(False), workload()[0])

    def names(model):
        return [site.name for site in sites.select(network, fault_model=model)]

    assert names("dead") == names("saturated") == ["a/spike", "b/spike"]
    assert names("byzantine") == [
        "a/threshold", "a/beta", "b/threshold", "b/beta", "a/potential", "b/potential",
    ]  # fmt: skip
    plain = jfi.network(lambda w, x: x @ w, np.ones((2, 3), "f4"), np.ones(2, "f4"))
    with pytest.raises(InputError, match=r"fault model dead breaks sites called .*spike, and"):
        sites.select(plain, fault_model="dead")
    for model in ("dead", "saturated"):
        plan = jfi.plan(network, "exhaustive", fault_model=model)
        assert plan.injections == plan.space.size == HIDDEN + CLASSES


def test_dead_and_saturated_neurons():
    network = jfi.network(apply, parameters(False), workload()[0])
    runner = Engine(network, workload(), np.zeros(SAMPLES, int), sites.select(network, "b/spike"))
    for polarity, count in ((bits.DEAD, 0), (bits.SATURATED, STEPS)):
        faults = Faults(*(np.array([v]) for v in (0, 1, 0, polarity)))
        for image in range(SAMPLES):
            assert runner.pairs(faults, np.array([image])).logits[0, 1] == count


def test_values_are_asked_for_only_by_samplers_that_choose_by_them():
    network = jfi.network(apply, parameters(False), workload()[0])
    population = jfi.plan(network, "network_wise", sites_pattern=".*").population.sum()
    parameter_words = sum(leaf.size for leaf in network.leaves)
    assert population == 64 * (parameter_words + 2 * (HIDDEN + CLASSES))
    with pytest.raises(InputError, match="site a/potential is a run-time value: it has no golden"):
        jfi.plan(network, "data_aware", sites_pattern=".*")


@pytest.mark.parametrize("name", rounds.METHODS)
def test_samplers_in_rounds_take_run_time_values(tmp_path, name):
    """Their intervals hold the exact share, which all faults tell."""
    runner = engine_of(pattern="b/(kernel|potential|spike)")
    space = FaultSpace(runner.sites, FAULT_MODELS["stuck_at"])
    every = runner.run(space.decode(np.arange(space.size))).critical > 0
    request = Request(error_margin=0.02, confidence=0.95)
    options = {"request": request, "levels": ("network", "layer"), "verify_pairs": 20}
    found = rounds.run(name, space, runner, tmp_path, {}, measure="full", **options)
    ends = np.cumsum([0, *space.site_sizes])
    layers = [every[a:b].mean() for a, b in pairwise(ends)]
    for unit, share in zip(found["estimates"], [every.mean(), *layers], strict=True):
        low, high = unit["cp_low"], unit["cp_high"]
        assert low - 1e-12 <= share <= high + 1e-12
        assert high - low <= 0.04 + 1e-12 or name == "iterative"  # which reckons normally
    assert found["injections"] <= space.size


def test_the_step_of_a_transient_fault_is_recorded(tmp_path):
    from pyarrow import parquet

    network = jfi.network(apply, parameters(False), workload()[0])
    listed = tmp_path / "faults.csv"
    listed.write_text(
        "site,index,bit,polarity\n"
        f"a/spike@step,{HIDDEN * 2 + 3},0,saturated\na/potential,1,31,flip\nb/spike,0,0,dead\n"
    )
    plan = jfi.plan_listed(network, read_fault_list(listed, sites.listable(network)))
    runner = Engine(network, workload(), np.zeros(SAMPLES, int), plan.space.sites)
    jfi.run(plan, runner, tmp_path / "run", {}, verify_pairs=20)
    rows = parquet.read_table(tmp_path / "run" / "outcomes" / "00000.parquet")
    assert rows["step"].to_pylist() == [2, taps.EVERY_STEP, taps.EVERY_STEP]
