"""jfi.radii: codes that order as numbers do, the shelf, and when radii are made."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jfi
from jfi import radii
from jfi.hardware import hardware

SIZES = st.floats(0, float("inf"), width=32) | st.just(float("nan"))


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1))
def test_codes_order_as_the_numbers_do(pairs):
    """A smaller code proves a smaller number; NaN is never the smaller."""
    a, b = np.array(pairs, np.float32).T
    smaller = radii.code(a) < radii.code(b)
    assert not (smaller & ~((a < b) | np.isnan(b))).any()
    assert not (np.isnan(a) & smaller).any()


def test_codes_tell_numbers_apart_by_one_percent():
    a = np.geomspace(1e-30, 1e30, 999)
    assert (radii.code(a) < radii.code(a * 1.01)).all()


def test_shelf_drops_what_was_not_used_for_longest():
    shelf, row = radii.Shelf(2 * 8), np.zeros(1)
    for key in "ab":
        shelf.put(key, row)
    assert shelf.get("a") is not None
    shelf.put("c", row)
    assert [shelf.get(key) is not None for key in "abc"] == [True, False, True]
    shelf.put("d", np.zeros(9))
    assert shelf.get("d") is None


def dense(params, x):
    hidden = jax.nn.relu(x @ params["first"])
    return hidden @ params["second"]


@pytest.fixture
def site():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(6, 4)), "second": rng.normal(size=(4, 3))}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    network = jfi.network(dense, params, np.zeros(6, np.float32))
    images = rng.normal(size=(11, 6)).astype(np.float32)

    def make(pair_flops):
        shelf = radii.Shelf(1 << 20)
        return radii.Radii(network.program, network.leaves, 0, pair_flops, hardware(), shelf)

    return make, images


def test_radii_are_made_when_they_have_been_paid_for(site, monkeypatch):
    """Not for a few faults; after many, or after few often enough; then kept."""
    make, images = site
    monkeypatch.setattr(radii, "COMPILE", 0)
    dear = make(1 << 30)
    assert dear.where_worth("all", images, 1).shape == (24, 11)
    cheap = make(1)
    cost = next(n for n in range(1, 10**6) if cheap.where_worth("all", images, 1) is not None)
    assert cost > 100
    assert cheap.where_worth("all", images, 0) is not None
    assert cheap.where_worth("others", images, 1) is None


def test_compiling_has_to_be_paid_for(site):
    make, images = site
    assert make(1 << 20).where_worth("all", images, 1) is None


def test_radii_of_an_image_do_not_depend_on_the_others(site):
    make, images = site
    whole, part = make(1).codes(images), make(1).codes(images[3:5])
    assert np.array_equal(whole[:, 3:5], part)
    assert (whole > 0).any()
