"""What a user may bring as a network: read, or refused in one line that names it."""

import dataclasses
import html
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jfi
from jfi.campaign import records
from jfi.engine.inputs import MEASURES
from jfi.engine.verify import verify
from jfi.networks.sites import Beside, beside, told_beside

RNG = np.random.default_rng(0)
IMAGE = np.ones(12, np.float32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


W = {"w": normal(12, 5)}


def linear(params, x):
    return x @ params["w"]


def refused(message, apply=linear, params=W, image=IMAGE):
    with pytest.raises(jfi.InputError, match=message) as error:
        jfi.network(apply, params, image)
    assert "\n" not in str(error.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """As Equinox has them: the activation is a leaf, beside the weights."""

    weight: object
    activation: object


def test_a_function_for_a_leaf_is_held_fixed():
    module = Module(W["w"], jax.nn.relu)
    network = jfi.network(lambda m, x: m.activation(x @ m.weight), module, IMAGE)
    assert [site.name for site in network.sites] == ["weight"]
    assert network.left_out == {"activation": "custom_jvp relu, held fixed"}


def test_apply_gets_leaves_that_are_no_arrays_as_they_are():
    """At every call, by the engine and the naive runs alike, each in its place."""
    static = {"a": 2.5, "axes": [1, None], "relu": "relu", "on": True, "f": np.tanh, "of": np.int32}
    seen = []

    def apply(params, x):
        seen.append({name: params[name] for name in static})
        y = params["f"](np.float32(0.5)) * params["w"] * params["a"]
        return x @ y if params["on"] else None

    network = jfi.network(apply, {**static, **W}, IMAGE)
    assert network.left_out == {
        "a": "float 2.5, held fixed",
        "axes/0": "int 1, held fixed",
        "axes/1": "None, held fixed",
        "relu": "str 'relu', held fixed",
        "on": "bool True, held fixed",
        "f": "ufunc tanh, held fixed",
        "of": "type int32, held fixed",
    }
    assert [site.name for site in network.sites] == ["w"] and network.kernels == {"w"}
    images = RNG.normal(size=(4, 12)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(network.apply)(network.params, images),
        images @ (np.tanh(np.float32(0.5)) * W["w"] * 2.5),
        rtol=1e-5,
    )
    runner = jfi.Engine(network, images, np.zeros(4, int), network.sites)
    faults = jfi.FaultSpace(network.sites, (2,)).decode(np.arange(0, 60 * 32, 7))
    for measure in MEASURES:
        found = verify(runner, faults, np.arange(faults.site.size) % 4, measure)
        assert not found.disagreements, found.worst
    assert len(seen) > 3 and all(given == static for given in seen)


def test_numpy_numbers_are_arrays():
    network = jfi.network(lambda p, x: x @ p["w"] * p["k"], {**W, "k": np.float32(2)}, IMAGE)
    assert [site.name for site in network.sites] == ["w", "k"] and not network.left_out


def test_a_network_with_static_leaves_is_read_again_from_its_own():
    network = jfi.network(lambda p, x: x @ p["w"] * p["k"], {**W, "k": 3}, IMAGE)
    again = jfi.network(network.apply, network.params, IMAGE)
    assert again.sites == network.sites and set(again.left_out) == {"k"}


class Foreign:
    """As an array of a library that JAX does not read."""

    dtype, shape = np.dtype("f4"), (12, 5)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.array([None]), r"parameter k is object\[1\] \(ndarray\); arrays in params must be"),
        (np.array(["a"]), r"parameter k is <U1\[1\] \(ndarray\);"),
        (jax.ShapeDtypeStruct((3,), np.float32), r"k is float32\[3\] \(ShapeDtypeStruct\);"),
        (Foreign(), r"parameter k is float32\[12, 5\] \(Foreign\); arrays in params must be NumPy"),
        (np.array([1.0, np.nan], np.float32), "parameter k is nan at index 1"),
    ],
)
def test_arrays_that_jax_does_not_read_are_refused(leaf, message):
    refused(message, lambda p, x: x @ p["w"] + jnp.sum(p["k"]), {**W, "k": leaf})


def test_params_that_hold_nothing_are_refused():
    for params in (None, {}, [None], {"k": 2.5}, [np.tanh]):
        refused("params are .* and hold no array", params=params)
    refused("apply is None; it must be a function", apply=None)


def test_an_array_alone_is_called_params():
    network = jfi.network(lambda p, x: x @ p, W["w"], IMAGE)
    assert [site.name for site in network.sites] == ["params"]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "None"),
        (3.0, "float 3.0"),
        (np.array(["a"]), r"<U1\[1\]"),
        (jax.random.key(0), r"key<fry>\[\]"),
    ],
)
def test_an_image_that_is_no_array_is_refused(image, said):
    refused(f"image is {said}; it must be an array of numbers", image=image)


@pytest.mark.parametrize(
    ("image", "said"),
    [([1.0, IMAGE], "image: 0 is float 1.0"), ({"pixels": {"a": "b"}}, "pixels/a is str 'b'")],
)
def test_a_tree_of_images_that_are_no_arrays_is_refused(image, said):
    refused(f"{said}; it must be an array of numbers", image=image)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (lambda y: None, "None; it must return an array"),
        (lambda y: {}, "dict of nothing; it must return an array"),
        (lambda y: y.sum(), r"float32\[\] for one image; the first axis must be that of images"),
        (lambda y: (y, y[0]), r"float32\[5\] as 1 for one image"),
        (lambda y: 3.0, "float 3.0; it must be an array of real numbers"),
        (lambda y: {"text": "a"}, "str 'a' as text; it must be an array"),
        (lambda y: y + 0j, r"complex64\[1, 5\]; it must be an array of real numbers"),
    ],
)
def test_an_output_that_is_no_array_of_images_is_refused(out, said):
    refused(f"the network returns {said}", lambda p, x: out(x @ p["w"]))


def test_two_leaves_of_one_name_are_refused():
    both = {"a/b": normal(12, 5), "a": {"b": normal(5)}}
    message = r"params\['a'\]\['b'\] and params\['a/b'\] are both called a/b: rename one"
    refused(message, lambda p, x: x @ p["a/b"] + p["a"]["b"], both)
    both = {"a": normal(12, 5), "params": {"a": normal(5)}}
    refused("are both called a: rename", lambda p, x: x @ p["a"] + p["params"]["a"], both)


def test_a_parameter_with_an_at_is_refused():
    refused("parameter w@1 has an @", lambda p, x: x @ p["w@1"], {"w@1": W["w"]})


class Odd(nnx.Module):
    """Beside weights, what has no words to break, and what dropout keeps but does not use."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(12, 5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.key = nnx.Variable(jax.random.key(3))
        self.mask = nnx.Variable(jnp.arange(5) > 0)
        self.four = nnx.Variable(jnp.arange(5).astype(jnp.int4))
        self.phase = nnx.Variable(jnp.ones(5, jnp.complex64))

    def __call__(self, x):
        noise = jax.random.normal(self.key[...], (5,)) + self.four.astype(jnp.float32)
        return self.drop(self.fc(x)) * self.mask + noise + self.phase.real


def odd():
    graph, state = nnx.split(Odd(nnx.Rngs(0)))
    return jfi.network(lambda state, x: nnx.merge(graph, state)(x), state, IMAGE)


def test_what_is_left_out_is_told_with_its_reason():
    network = odd()
    assert [site.name for site in network.sites] == ["fc/kernel", "fc/bias"]
    assert network.left_out == {
        "drop/rngs/count": "the logits do not need it",
        "drop/rngs/key": "the logits do not need it",
        "four": "int4 words can't be broken",
        "key": "key<fry> words can't be broken",
        "mask": "bool words can't be broken",
        "phase": "complex64 words can't be broken",
    }
    assert jfi.network(linear, W, IMAGE).left_out == {}


def test_a_pattern_of_what_is_left_out_says_why():
    with pytest.raises(jfi.InputError, match=r"only what is left out: mask \(bool words can't"):
        jfi.select(odd(), "mask")
    assert [site.name for site in jfi.select(odd(), "mask|fc/bias")] == ["fc/bias"]
    refused(
        r"no array with bits .*; left out: w \(int4 words",
        lambda p, x: x @ p["w"].astype(jnp.float32),
        {"w": jnp.ones((12, 5), jnp.int4)},
    )


def test_a_campaign_with_random_keys_records_what_it_leaves_out(tmp_path):
    """Keys among the parameters and closed over; their words are part of its identity."""
    network, images = odd(), RNG.normal(size=(5, 12)).astype(np.float32)
    key = jax.random.key(7)
    noisy = jfi.network(
        lambda p, x: network.apply(p, x) + jax.random.normal(key, (5,)), network.params, IMAGE
    )
    for net in (network, noisy):
        plan = jfi.plan(net, "network_wise", request=jfi.Request(error_margin=0.1))
        runner = jfi.Engine(net, images, np.zeros(5, int), plan.space.sites)
        path = tmp_path / str(net is noisy)
        summary = jfi.run(plan, runner, path, {}, measure="critical", verify_pairs=20)
        assert not summary["verify"]["disagreements"]
        assert records.read_manifest(path)["left_out"] == network.left_out


def test_an_engine_takes_sites_alone():
    network = jfi.network(linear, W, IMAGE)
    images = np.ones((3, 12), np.float32)
    for sites, said in (
        ("w", "sites hold str 'w'"),
        (None, "None"),
        (network.sites[0], "sites are .*"),
    ):
        with pytest.raises(jfi.InputError, match=f"{said}, not .*: choose with jfi.select"):
            jfi.Engine(network, images, np.zeros(3, int), sites)


def described():
    """Kernels of 60 and 25 words; beside them 5 + 5 of biases, 12 of a scale, 40 of a table."""
    params = {
        "fc1": {"kernel": normal(12, 5), "bias": normal(5)},
        "fc2": {"kernel": normal(5, 5), "bias": normal(5).astype(jnp.float16)},
        "norm.scale": normal(12),
        "tables": [normal(4, 10)],
        "unused": normal(99),
    }

    def apply(p, x):
        h = jnp.tanh((x * p["norm.scale"]) @ p["fc1"]["kernel"] + p["fc1"]["bias"])
        rows = p["tables"][0][jnp.argmax(x[:, :4], axis=1)]
        return h @ p["fc2"]["kernel"] + p["fc2"]["bias"] + rows[:, :5]

    return jfi.network(apply, params, IMAGE)


def test_what_is_beside_the_default_sites_is_counted_by_its_last_name():
    network = described()
    bits_of = {"tables": 40 * 32, "scale": 12 * 32, "bias": 5 * 32 + 5 * 16}
    total = sum(bits_of.values()) + (60 + 25) * 32
    assert beside(network, jfi.select(network)) == [
        ("tables", 1, 40, bits_of["tables"] / total),
        ("scale", 1, 12, bits_of["scale"] / total),
        ("bias", 2, 10, bits_of["bias"] / total),
    ]
    assert beside(network, jfi.select(network, "fc1/.*|tables/0"))[0][:3] == ("kernel", 1, 25)
    assert beside(network, network.sites) == []
    told = told_beside(beside(network, jfi.select(network)))
    assert told == (
        "parameters beside these sites, 41.2% of all their bits: tables (1 leaf, 40 words, 27.7%), "
        "scale (1 leaf, 12 words, 8.3%), bias (2 leaves, 10 words, 5.2%); --sites (in Python "
        "sites=) takes them too, `.*` all, `.*tables.*` those of the first name"
    )
    assert [s.name for s in jfi.select(network, ".*tables.*")] == ["tables/0"]


def test_many_names_beside_the_sites_stay_short():
    names = [f"{chr(97 + k)}{k}" for k in range(12)]
    numbered = {f"onnx::Add_{k}": normal(5) for k in range(30)}
    params = {**W, **{name: normal(5) for name in names}, **numbered}
    network = jfi.network(
        lambda p, x: x @ p["w"] + sum(v for k, v in p.items() if k != "w"), params, IMAGE
    )
    told = told_beside(beside(network, jfi.select(network)))
    assert "Add_# (30 leaves, 150 words, " in told and "5 more leaves (25 words, " in told
    assert len(jfi.select(network, ".*Add_.*")) == 30


def test_of_run_time_values_alone_nothing_is_beside():
    network = jfi.network(lambda p, x: checkpoint_name(x @ p["w"], "y") * p["w"][0], W, IMAGE)
    assert beside(network, jfi.select(network, "y")) == []


def texts(result):
    """The reports, as plain text."""
    paths = [Path(path) for path in result.report()]
    return [html.unescape(p.read_text()) for p in paths if p.suffix in (".md", ".html")]


def test_a_campaign_records_and_reports_what_is_beside_its_sites(tmp_path):
    network, images = described(), RNG.normal(size=(5, 12)).astype(np.float32)
    study = jfi.study(network, images)
    result = study.run("network_wise", error_margin=0.1, workdir=tmp_path, progress=False)
    found = records.read_manifest(tmp_path)["beside"]
    assert [Beside(**group) for group in found] == beside(network, jfi.select(network))
    for text in texts(result):
        assert "No fault was put in parameters beside these sites, 41.2% of all their bits" in text
        assert "tables (1 leaf, 40 words, 27.7%)" in text
    result = study.run("network_wise", error_margin=0.1, workdir=tmp_path / "all", sites=".*",
        progress=False)  # fmt: skip
    assert not any("No fault was put" in text for text in texts(result))
