"""Orders that are computed: permutations, as likely as each other, unrelated between keys."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jfi.errors import InputError
from jfi.sampling import shuffle


@given(size=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_an_order_has_every_element_once(size, key):
    order = shuffle.shuffled(np.arange(size), size, np.uint64(key))
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


def test_any_part_of_an_order_is_that_part_of_the_whole():
    key = shuffle.keys(5, 1)
    whole = shuffle.shuffled(np.arange(1000), 1000, key)
    assert (shuffle.shuffled(np.array([3, 999, 17]), 1000, key) == whole[[3, 999, 17]]).all()
    sizes, keys = np.array([10, 1000]), np.array([key[0], key[0] + np.uint64(1)])
    mixed = shuffle.shuffled(np.array([4, 4]), sizes, keys)
    assert mixed[0] == shuffle.shuffled([4], 10, keys[0])[0]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_order_is_as_likely(size):
    number = {order: i for i, order in enumerate(permutations(range(size)))}
    repeats = 100 * len(number)
    keys = np.repeat(shuffle.keys(1, repeats), size)
    orders = shuffle.shuffled(np.tile(np.arange(size), repeats), size, keys).reshape(-1, size)
    counts = np.bincount([number[tuple(o)] for o in orders.tolist()], minlength=len(number))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [1000, 10**9, 2**61])
def test_first_elements_are_uniform_and_pairs_of_them_unrelated(size):
    keys = shuffle.keys(2, 4000)
    first, second = (shuffle.shuffled(np.full(4000, k), size, keys) / size for k in (0, 1))
    for elements in (first, second, (first - second) % 1):
        assert stats.kstest(elements, "uniform").pvalue > 1e-3


def test_positions_beyond_the_order_are_refused():
    with pytest.raises(InputError, match="position 7 is not in an order of 7 elements"):
        shuffle.shuffled([3, 7], 7, np.uint64(0))
