"""What a network takes and returns: nothing is lost on the way through rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfi
from jfi import forms
from jfi.errors import InputError


def test_inputs_come_back_bit_by_bit():
    rng = np.random.default_rng(0)
    tree = {
        "image": rng.normal(size=(3, 2, 2)).astype(np.float32),
        "mask": rng.random((3, 5)) < 0.5,
        "tokens": (rng.integers(0, 9, (3, 4)).astype(np.int32), np.array([1, 2, 3], np.int16)),
        "half": jnp.asarray(rng.normal(size=(3, 2)), jnp.bfloat16),
    }
    form = forms.inputs(jax.tree.map(lambda x: x[0], tree))
    rows = form.pack(tree)
    assert rows.shape == (3, form.size) == (3, 16 + 5 + 16 + 2 + 4)
    back = jax.jit(form.unpack)(rows)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_outputs_come_back_bit_by_bit():
    rng = np.random.default_rng(0)
    tree = {
        "scores": rng.normal(size=(2, 3)).astype(np.float32),
        "half": jnp.asarray(rng.normal(size=(2, 2, 2)), jnp.bfloat16),
        "id": np.array([[-(2**31), 2**31 - 1], [70000, -1]], np.int32),
        "there": np.array([True, False]),
        "small": np.array([[-128], [127]], np.int8),
    }
    form = forms.outputs(jax.tree.map(lambda x: x[:1], tree))
    rows = jax.jit(form.row)(jax.tree.map(jnp.asarray, tree))
    assert rows.shape == (2, form.size) and rows.dtype == np.float32
    for number, row in enumerate(rows):
        back = form.of_row(row)
        for name, leaf in tree.items():
            assert back[name].dtype == leaf.dtype
            assert np.asarray(back[name]).tobytes() == np.asarray(leaf[number]).tobytes(), name


def test_several_inputs_are_judged_as_one_would_be():
    """A state, tokens and a mask, against the loop anyone would write."""
    rng = np.random.default_rng(1)
    params = {
        "table": rng.normal(size=(9, 4)), "w": rng.normal(size=(4, 6)),
        "u": rng.normal(size=(6, 6)), "out": rng.normal(size=(6, 3)),
    }  # fmt: skip
    params = {name: value.astype(np.float32) for name, value in params.items()}

    def apply(params, x):
        tokens, (mask, state) = x["tokens"], x["more"]
        y = params["table"][tokens] * mask[..., None]
        state = jnp.tanh(y.sum(1) @ params["w"] + state @ params["u"])
        return state @ params["out"]

    images = {
        "tokens": rng.integers(0, 9, (5, 7)),
        "more": (rng.random((5, 7)) < 0.7, rng.normal(size=(5, 6)).astype(np.float32)),
    }
    net = jfi.adopt((apply, params), images)
    engine = jfi.study(net, images).engine(net.sites)
    space = jfi.FaultSpace(net.sites, (0, 1))
    faults = space.decode(np.arange(0, space.size, 7))
    told = engine.run(faults, "critical")
    golden = np.asarray(apply(params, images)).argmax(1)
    wanted = []
    for site, index, bit, polarity in zip(*faults, strict=True):
        name = net.sites[site].name
        words = params[name].ravel().copy()
        words[index] = jfi.bits.faulty(words[index : index + 1], bit, polarity)[0]
        broken = {**params, name: words.reshape(params[name].shape)}
        found = np.asarray(jax.jit(apply)(broken, images))
        wanted.append((found.argmax(1) != golden).sum())
    assert (told.critical == wanted).mean() > 0.999 and told.critical.any()


def test_what_is_no_image_or_output_is_said():
    def apply(params, x):
        return x["a"] @ params["w"]

    params, image = {"w": np.ones((3, 2), np.float32)}, {"a": np.ones(3, np.float32)}
    net = jfi.network(apply, params, image)
    for bad, said in (
        ({"b": np.ones((2, 3))}, "the network takes"),
        ({"a": np.ones((2, 4), np.float32)}, r"a has shape \(2, 4\) and dtype float32"),
        ({"a": np.ones((2, 3), np.int32)}, "dtype int32; the network takes"),
    ):
        with pytest.raises(InputError, match=said):
            jfi.Engine(net, bad, None, net.sites)
    with pytest.raises(InputError, match=r"image: a is object; it must be an array of numbers"):
        jfi.network(apply, params, {"a": object()})
    for output, said in (
        (lambda p, x: x["a"].sum() * p["w"].sum(), "first axis must be that of images"),
        (lambda p, x: (), "it must return an array, or several"),
        (lambda p, x: {"s": (x["a"] @ p["w"]).astype(complex)}, "array of real numbers"),
    ):
        with pytest.raises(InputError, match=said):
            jfi.network(output, params, image)


def test_images_that_influence_each_other_are_told_by_output():
    def apply(params, x):
        y = x @ params["w"]
        return {"alone": y, "mixed": y - y.mean(0)}

    images = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    net = jfi.network(apply, {"w": np.ones((3, 2), np.float32)}, images[0])
    with pytest.raises(InputError, match=r"apply gives mixed .* images must not influence"):
        jfi.Engine(net, images, None, net.sites, criterion="tolerance:1")
