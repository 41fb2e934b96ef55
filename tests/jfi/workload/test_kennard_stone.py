"""The order of choice against its definition, by brute force with SciPy's distances."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jfi.errors import InputError
from jfi.workload import kennard_stone, workload


def brute_force(points, metric):
    """(order, distance each was chosen at)."""
    apart = cdist(points, points, metric)
    np.fill_diagonal(apart, -1)
    first = np.unravel_index(apart.argmax(), apart.shape)
    chosen, at = list(first), [apart.max()] * 2
    while len(chosen) < len(points):
        rest = [k for k in range(len(points)) if k not in chosen]
        nearest = [apart[k, chosen].min() for k in rest]
        chosen.append(rest[int(np.argmax(nearest))])
        at.append(max(nearest))
    return chosen, at


@pytest.mark.parametrize("metric", ["euclidean", "correlation"])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_the_order_is_that_of_the_definition(metric, block, monkeypatch):
    monkeypatch.setattr(kennard_stone, "_BLOCK", block)
    points = np.random.default_rng(1).normal(size=(40, 6))
    chosen, at = brute_force(points, metric)
    found = kennard_stone.chosen_at(points, metric)
    np.testing.assert_allclose(found[chosen], at, rtol=1e-9)
    order = workload.order(found)
    assert set(order[:2]) == set(chosen[:2]) and order[2:].tolist() == chosen[2:]


def test_points_on_a_line_are_taken_from_its_ends():
    found = kennard_stone.chosen_at(np.array([[0.0], [1], [2], [4], [10]]))
    # 0 and 10 first; 4 is 4 from 0; then 2, at 2; then 1, at 1.
    assert found.tolist() == [10, 1, 2, 4, 10]


def test_points_without_variation_and_equal_points():
    equal = kennard_stone.chosen_at(np.ones((4, 3)))
    assert equal.tolist() == [0, 0, 0, 0]
    flat = np.array([[1.0, 1, 1], [0, 1, 2], [0, 2, 4]])
    # The first has r = 0 with all, so a distance of 1; the others are the same direction.
    np.testing.assert_allclose(kennard_stone.chosen_at(flat, "correlation"), [1, 1, 0], atol=1e-12)
    assert kennard_stone.chosen_at(np.ones((1, 3))).tolist() == [0]


def test_an_unknown_distance_is_refused():
    with pytest.raises(InputError, match="choose from euclidean, correlation"):
        kennard_stone.chosen_at(np.ones((2, 2)), "cosine")
