"""Sensitivities against finite differences and networks solved by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from asking import top1

import jfi
from jfi.errors import InputError
from jfi.networks import scores


def linear(params, x):
    return x @ params["w"]


def test_the_sensitivity_of_a_linear_network_is_the_image_over_the_margin():
    """To growth and to fall of each word, the worst of all images and rivals, one by one."""
    w = np.array([[2.0, 0.0, 0.5], [0.0, 1.0, 0.5]], np.float32)
    images = np.array([[1.0, 0.25], [0.5, 2.0]], np.float32)
    network = jfi.network(linear, {"w": w}, images[0])
    (found,) = scores.sensitivity(network, images, network.sites, top1(network))
    expected = np.zeros((2, *w.shape))
    for image, row in zip(images, images @ w, strict=True):
        top = row.argmax()
        for rival in {0, 1, 2} - {int(top)}:
            slope = np.zeros_like(w)
            slope[:, top], slope[:, rival] = image, -image
            falls = slope / (row[top] - row[rival])
            expected = np.maximum(expected, [-falls, falls])
    np.testing.assert_allclose(found, expected.reshape(2, -1), rtol=1e-5)


def test_only_the_nearest_rivals_count(monkeypatch):
    """Of three classes, the second is nearest: the third's column has no slope of its own."""
    monkeypatch.setattr(scores, "RIVALS", 1)
    w = np.array([[3.0, 2.0, 1.0]], np.float32)
    network = jfi.network(linear, {"w": w}, np.ones(1, np.float32))
    (found,) = scores.sensitivity(
        network, np.ones((1, 1), np.float32), network.sites, top1(network)
    )
    assert found.tolist() == [[0, 1, 0], [1, 0, 0]]


def mixed(params, x):
    scaled = params["q"].astype(jnp.float32) * params["w"]
    return jnp.tanh(x @ scaled) @ params["v"].astype(jnp.float32)


def test_batches_do_not_matter_and_integers_have_no_gradient(monkeypatch):
    rng = np.random.default_rng(0)
    params = {
        "q": rng.integers(1, 5, (6, 4)).astype(np.int8),
        "v": rng.normal(size=(4, 3)).astype(np.float16),
        "w": rng.normal(size=(6, 4)).astype(np.float32),
    }
    images = rng.normal(size=(7, 6)).astype(np.float32)
    network = jfi.network(mixed, params, images[0])
    whole = scores.sensitivity(network, images, network.sites, top1(network))
    monkeypatch.setattr(scores, "MEMORY", 80)
    parts = scores.sensitivity(network, images, network.sites, top1(network))
    for site, a, b in zip(network.sites, whole, parts, strict=True):
        assert a.shape == (2, site.words)
        # One of the leaves is of float16: sums over other batches round by its epsilon.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=np.finfo(np.float16).eps * b.max())
    names = [site.name for site in network.sites]
    assert (whole[names.index("q")] == 1).all()
    assert (whole[names.index("w")].max(axis=0) > 0).all()


def test_no_images_are_refused():
    network = jfi.network(linear, {"w": np.eye(2, dtype=np.float32)}, np.zeros(2, np.float32))
    with pytest.raises(InputError, match="no images"):
        scores.sensitivity(network, np.zeros((0, 2), np.float32), network.sites, top1(network))
