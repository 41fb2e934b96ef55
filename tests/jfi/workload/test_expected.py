"""Chances on a network solved by hand; the greedy order by brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
from asking import top1

import jfi
from jfi.errors import InputError
from jfi.workload import expected, workload

DRAW = np.random.default_rng(0)
W = DRAW.normal(size=(3, 4)).astype(np.float32) / 5  # below 1: no flip gives an infinity
IMAGES = DRAW.normal(size=(20, 3)).astype(np.float32)


def linear(params, x):
    return x @ params["w"]


def chance(word: int, bit: int) -> np.ndarray:
    """[B] of one flip, by running the faulty network in float64: linear, so exact."""
    words = W.ravel().copy()
    words.view(np.uint32)[word] ^= np.uint32(1 << bit)
    golden, broken = (IMAGES.astype(float) @ w.reshape(W.shape) for w in (W, words.astype(float)))
    second, first = np.argsort(golden, axis=1)[:, -2:].T
    rows = np.arange(len(IMAGES))
    before, after = (x[rows, first] - x[rows, second] for x in (golden, broken))
    r = np.clip((before - after) / before, 0, expected.LIMIT)
    return r / (1 + r)


def test_chances_of_a_linear_network_are_what_its_faults_do():
    network = jfi.network(linear, {"w": W}, IMAGES[0])
    found = expected.chances(network, IMAGES, network.sites, top1(network))
    rows = np.array([chance(word, bit) for word in range(W.size) for bit in range(32)])
    near = rows[rows.max(axis=1) > 0.1]
    assert found.shape == near.shape
    # Every flip once, in whatever order.
    np.testing.assert_allclose(np.sort(found, 0), np.sort(near, 0), rtol=1e-3, atol=1e-4)


def test_batches_and_integers_do_not_matter(monkeypatch):
    def scaled(params, x):
        return (x * params["q"].astype(jnp.float32)) @ params["w"]

    params = {"q": np.array([1, 2, 3], np.int8), "w": W}
    network = jfi.network(scaled, params, IMAGES[0])
    whole = expected.chances(network, IMAGES, network.sites, top1(network))
    monkeypatch.setattr(expected, "_MEMORY", 4 * W.size * 7)
    parts = expected.chances(network, IMAGES, network.sites, top1(network))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    few = expected.chances(network, IMAGES, network.sites, top1(network), faults=50)
    assert 0 < len(few) < 50 and few.shape[1] == 20


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_greedy(seed):
    chances = np.random.default_rng(seed).random((30, 12)).astype(np.float32) ** 3
    left, order, gains = np.ones(30), [], []
    while len(order) < 12:
        gain = [-1 if b in order else left @ chances[:, b] for b in range(12)]
        order.append(int(np.argmax(gain)))
        gains.append(max(gain) / 30)
        left *= 1 - chances[:, order[-1]]
    found = expected.found_at(chances)
    np.testing.assert_array_equal(workload.order(found), order)
    np.testing.assert_allclose(found[order], gains, rtol=1e-4)


def test_no_fault_near_critical_leaves_every_image_tied():
    assert expected.found_at(np.zeros((0, 5), np.float32)).tolist() == [0] * 5


def test_the_metric_asks_for_chances_that_fit():
    seen = workload.golden_pass(np.eye(3))
    with pytest.raises(InputError, match="needs chances"):
        workload.select("expected:top:2", seen)
    with pytest.raises(InputError, match=r"\[F, 3\] is needed"):
        workload.check(seen._replace(chances=np.zeros((4, 2))))
    certain = np.array([[0.1, 0.9, 0.2]], np.float32)
    found = workload.select("expected:top:2", seen._replace(chances=certain))
    assert found.indices.tolist() == [1, 2]
