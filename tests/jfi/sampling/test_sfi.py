"""Published methods behind the protocol, against the plan of a campaign and closed forms."""

import numpy as np
import pytest

from jfi.faults import FaultSpace, Site
from jfi.sampling import estimands, methods, sampling, sfi
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


# Critical faults change some of 20 images; 18 are answered right without a fault.
CHANGED = np.where(CRITICAL, np.random.default_rng(2).integers(1, 21, SPACE.size), 0)
OUTCOMES = {
    "pairs": (estimands.estimand("pairs", 20), CHANGED / 20),
    "accuracy": (estimands.estimand("accuracy", 20, 0.9), (18 - np.minimum(CHANGED, 18)) / 20),
}


def means(outcome, levels):
    faults = SPACE.decode(np.arange(SPACE.size))
    units = methods.units(SPACE, levels)
    return np.array([outcome[u.holds(faults.site, faults.bit)].mean() for u in units])


@pytest.mark.parametrize("name", OUTCOMES)
@pytest.mark.parametrize("interval", ["normal", "bernstein"])
def test_an_exhaustive_sample_of_other_outcomes_is_the_truth(name, interval):
    estimand, outcome = OUTCOMES[name]
    result = sfi.fixed("exhaustive", interval)(
        SPACE, LEAVES, Request(), methods.LEVELS, outcome.__getitem__, 0, estimand
    )
    for field in ("estimate", "low", "high"):
        found = [getattr(unit, field) for unit in result.units]
        np.testing.assert_allclose(found, means(outcome, methods.LEVELS), atol=1e-12)
    assert result.units[0].total == pytest.approx(outcome.sum())


METHODS = {
    **{
        name: sfi.fixed(name, "bernstein")
        for name in sampling.SAMPLERS
        if name not in ("exhaustive", "data_aware")
    },
    "iterative": sfi.iterative(),
}


@pytest.mark.parametrize("name", OUTCOMES)
@pytest.mark.parametrize("method", METHODS)
def test_means_of_other_outcomes_are_held(name, method):
    """30 campaigns of 3 units at 80%."""
    estimand, outcome = OUTCOMES[name]
    levels, repeats = ("network", "layer"), 30
    truths, missed = means(outcome, levels), np.zeros(3)
    for seed in range(repeats):
        result = METHODS[method](
            SPACE, LEAVES, Request(0.03, 0.8), levels, outcome.__getitem__, seed, estimand
        )
        assert 0 < result.injections < SPACE.size
        for k, unit in enumerate(result.units):
            assert unit.low <= unit.estimate <= unit.high
            missed[k] += not unit.low - 1e-12 <= truths[k] <= unit.high + 1e-12
    assert missed.max() <= 0.2 * repeats


def test_iterations_on_other_outcomes_bet_on_every_draw_once():
    estimand, outcome = OUTCOMES["pairs"]
    asked = []

    def listening(ids):
        asked.append(ids)
        return outcome[ids]

    request = Request(0.01, 0.95)
    result = sfi.iterative()(SPACE, LEAVES, request, ("layer", "bit"), listening, 0, estimand)
    ids = np.concatenate(asked)
    assert np.unique(ids).size == ids.size == result.injections == sum(result.rounds)
    layers = [unit for unit in result.units if unit.level == "layer"]
    assert sum(unit.injections for unit in layers) == ids.size
    assert sum(unit.total for unit in layers) == pytest.approx(outcome[ids].sum())
