"""Published methods behind the protocol, against the plan of a campaign and closed forms."""

import numpy as np
import pytest

from jfi.faults import FaultSpace, Site
from jfi.sampling import methods, sampling, sfi
from jfi.sampling.sampling import Request

SPACE = FaultSpace([Site("a", (40,), np.dtype("f4")), Site("b", (500,), np.dtype("f4"))], (0, 1))
LEAVES = [np.random.default_rng(0).normal(size=n).astype("f4") for n in (40, 500)]
CRITICAL = np.random.default_rng(1).random(SPACE.size) < 0.04
CRITICAL[SPACE.decode(np.arange(SPACE.size)).bit == 30] = True


def oracle(ids):
    return CRITICAL[ids]


def truths(levels):
    faults = SPACE.decode(np.arange(SPACE.size))
    units = methods.units(SPACE, levels)
    return np.array([CRITICAL[u.holds(faults.site, faults.bit)].mean() for u in units])


@pytest.mark.parametrize("interval", sfi.INTERVALS)
def test_an_exhaustive_sample_is_the_truth(interval):
    result = sfi.fixed("exhaustive", interval)(SPACE, LEAVES, Request(), methods.LEVELS, oracle, 0)
    assert result.injections == SPACE.size
    for name in ("estimate", "low", "high"):
        found = [getattr(unit, name) for unit in result.units]
        np.testing.assert_allclose(found, truths(methods.LEVELS), atol=1e-12)


def test_a_fixed_sample_has_the_size_and_the_margin_of_the_paper():
    request = Request(0.02, 0.99, 2.58)
    result = sfi.fixed("layer_wise")(SPACE, LEAVES, request, ("layer",), oracle, 3)
    strata = sampling.layer_wise(SPACE, LEAVES, request)
    for unit, stratum in zip(result.units, strata, strict=True):
        assert (unit.injections, unit.population) == (stratum.injections, stratum.population)
        p, n, size = unit.estimate, unit.injections, unit.population
        assert p == pytest.approx(unit.total / n)
        correction = (size - n) / (size - 1)
        assert unit.margin == pytest.approx(2.58 * np.sqrt(p * (1 - p) / n * correction))


def test_units_without_an_injection_say_nothing():
    result = sfi.fixed("network_wise")(SPACE, LEAVES, Request(0.5), ("bit",), oracle, 0)
    empty = [unit for unit in result.units if not unit.injections]
    assert empty
    assert {(unit.low, unit.high) for unit in empty} == {(0.0, 1.0)}


@pytest.mark.parametrize("levels", [("network",), ("layer",), ("bit",), methods.LEVELS])
def test_iterations_end_where_the_share_seen_asks_for_no_more(levels):
    request = Request(0.01, 0.95)
    asked = []

    def listening(ids):
        asked.append(ids)
        return CRITICAL[ids]

    result = sfi.iterative("normal")(SPACE, LEAVES, request, levels, listening, 0)
    ids = np.concatenate(asked)
    assert np.unique(ids).size == ids.size == result.injections == sum(result.rounds)
    assert len(result.rounds) > 1
    # p is drawn towards a half, so the plain normal margin is smaller than the one asked for.
    assert all(unit.margin <= 0.01 for unit in result.units)
    fixed = sfi.fixed("network_wise")(SPACE, LEAVES, request, ("network",), oracle, 0)
    assert levels != ("network",) or result.injections < fixed.injections / 2


def test_a_pilot_without_a_critical_fault_does_not_end_the_iteration():
    result = sfi.iterative()(
        SPACE, LEAVES, Request(0.005, 0.95), ("network",), lambda ids: np.zeros(ids.size, bool), 0
    )
    assert result.injections > 2 * sfi.PILOT
    assert result.units[0].low == 0 < result.units[0].high
