"""Intervals of bounded outcomes against enumerated samples, simulations and closed forms."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from jfi.errors import InputError
from jfi.sampling import bernstein, estimands, estimates
from jfi.sampling.bernstein import PARTS, Sums

RNG = np.random.default_rng(0)


def sums_of(samples, unchanged=0.0, parts=None) -> Sums:
    """The sums of a sample of each stratum, its faults in random parts or in those given."""
    found = np.zeros((3, PARTS, len(samples)))
    for h, x in enumerate(samples):
        ids = RNG.integers(0, 2**60, len(x))
        own = bernstein.part(ids, 0) if parts is None else parts
        for row, values in zip(found[:, :, h], (np.ones(len(x)), x, np.square(x)), strict=True):
            np.add.at(row, own, values)
    return Sums(*found, unchanged)


def drawn(strata, n, **options):
    samples = [RNG.permutation(x)[:k] for x, k in zip(strata, n, strict=True)]
    sizes = np.array([len(x) for x in strata])
    return sizes, sums_of(samples, **options)


def test_parts_double_and_follow_from_the_id_and_the_seed():
    ids = np.arange(1 << 16)
    found = bernstein.part(ids, 3)
    shares = np.bincount(found, minlength=PARTS) / ids.size
    np.testing.assert_allclose(shares, [1 / 64, *(2.0 ** -np.arange(6, 0, -1))], rtol=0.1)
    assert np.array_equal(bernstein.part(ids[5:50], 3), found[5:50])
    assert (bernstein.part(ids, 4) == found).mean() == pytest.approx((shares**2).sum(), abs=0.01)


@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_of_every_ordered_sample_few_enough_miss(confidence):
    """All 6 x 5 x 4 x 3 orders of four of six outcomes, cut into parts."""
    for values in ([0, 0, 0, 0, 0, 1], [0.9, 0.9, 1, 1, 0.9, 0], [0.2, 0.4, 0.5, 0.6, 0.7, 1]):
        missed = orders = 0
        for x in permutations(values, 4):
            sums = sums_of([x], 0.9, parts=[2, 4, 6, 6])
            low, high = bernstein.interval(np.array([6]), sums, confidence)
            missed += not low - 1e-12 <= np.mean(values) <= high + 1e-12
            orders += 1
        assert missed <= (1 - confidence) * orders


POPULATIONS = {
    "rare": ([(RNG.random(n) < p) * 1.0 for n, p in ((40_000, 0.002), (900, 0.3))], 0.0),
    "accuracy": ([0.97 - (RNG.random(n) < 0.03) * RNG.beta(1, 2, n) * 0.9 for n in (9000, 700)],
                 0.97),
    "wide": ([RNG.random(5000), RNG.beta(8, 2, 400), (RNG.random(60) < 0.5) * 1.0], 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("n", [(400, 200, 20), (40, 30, 5)])
def test_intervals_hold(name, n):
    """At 50%, where an interval that is too narrow misses most visibly, and at 90%."""
    strata, unchanged = POPULATIONS[name]
    truth, repeats = np.concatenate(strata).mean(), 300
    missed = np.zeros(2)
    for _ in range(repeats):
        sizes, sums = drawn(strata, n[: len(strata)], unchanged=unchanged)
        for k, confidence in enumerate((0.5, 0.9)):
            low, high = bernstein.interval(sizes, sums, confidence)
            missed[k] += not low <= truth <= high
    for share, count in zip((0.5, 0.1), missed, strict=True):
        assert stats.binomtest(int(count), repeats, share, alternative="greater").pvalue > 1e-3


def test_width_follows_the_variance_that_was_seen():
    """Within twice the normal interval's, where that of 0 and 1 with the same mean is 8 times."""
    x = 0.8 + 0.05 * RNG.standard_normal(200_000).clip(-4, 4)
    sizes, sums = drawn([x], [10_000], unchanged=0.9)
    low, high = bernstein.interval(sizes, sums, 0.99)
    normal = estimates.normal_quantile(0.99) * x.std() / 100
    assert normal < (high - low) / 2 < 2 * normal
    zeros_and_ones = estimates.stratified([len(x)], [10_000], [8000], 0.99)
    assert (high - low) < (zeros_and_ones[1] - zeros_and_ones[0]) / 4


def test_nothing_changed_bounds_all_strata_together():
    """300 strata of 4 draws: as one sample of 1,200, within a factor of 2 of the rule of three."""
    strata, n = [np.full(1000, 0.95)] * 300, [4] * 300
    low, high = bernstein.interval(*drawn(strata, n, unchanged=0.95), 0.95)
    alone = -np.log(0.025) / 1200
    assert 0.95 - 2 * alone < low < 0.95 - alone
    assert high == pytest.approx(min(0.95 + (0.95 - low), 1))


def test_what_is_known_is_exact():
    whole, half = RNG.random(50), RNG.random(80)
    low, high = bernstein.interval(*drawn([whole], [50]), 0.99)
    assert low == pytest.approx(whole.mean()) == high
    # All but a few: no more is unknown than they are.
    low, high = bernstein.interval(*drawn([half], [78]), 0.99)
    assert low <= half.mean() <= high <= low + 2 / 80 + 1e-12
    low, high = bernstein.interval(*drawn([whole, half], [50, 40]), 0.99)
    alone = np.array(bernstein.interval(*drawn([half], [40]), 0.99))
    assert high - low == pytest.approx((alone[1] - alone[0]) * 80 / 130, rel=0.3)


def test_a_stratum_without_an_injection_counts_as_assumed():
    sizes = np.array([100, 300])
    sums = sums_of([RNG.random(100), []], 0.8)
    known = sums.total.sum() / 400
    assert bernstein.interval(sizes, sums, 0.99) == pytest.approx((known, known + 0.75))
    low, high = bernstein.interval(sizes, sums, 0.99, np.array([1, 0.01]))
    assert low == pytest.approx(known + 0.75 * 0.99 * 0.8)
    assert high == pytest.approx(low + 0.75 * 0.01)


def test_assumptions_that_are_right_narrow_the_interval_and_hold():
    """As data-aware plans: few draws where few faults change anything."""
    shares = np.array([0.0, 0.001, 0.01, 0.5])
    strata = [(RNG.random(5000) < p) * RNG.random(5000) for p in shares]
    shares = np.array([(x > 0).mean() for x in strata])
    assumed = np.where(shares < 0.4, shares, 1.0)
    truth, repeats, missed, widths = np.mean(strata), 200, 0, np.zeros(2)
    for _ in range(repeats):
        sizes, sums = drawn(strata, [3, 8, 60, 2000])
        low, high = bernstein.interval(sizes, sums, 0.9, assumed)
        missed += not low <= truth <= high
        free = bernstein.interval(sizes, sums, 0.9)
        widths += high - low, free[1] - free[0]
    assert missed <= 0.1 * repeats
    assert widths[0] < widths[1] / 5


def test_an_assumption_that_the_sample_contradicts_is_dropped():
    sizes = np.array([1000, 1000])
    sums = sums_of([np.array([1.0, 0, 0, 0]), np.zeros(500)])
    _, high = bernstein.interval(sizes, sums, 0.99, np.array([0.001, 1]))
    assert high > 0.25


def cells(outcomes, sizes):
    """Two sites of two bits, of which one is a stratum of two cells: sums of the drawn."""
    n = np.array([[len(x) for x in row] for row in outcomes])
    sums = np.zeros((3, PARTS, 2, 2))
    for s, row in enumerate(outcomes):
        for b, x in enumerate(row):
            part = RNG.integers(0, PARTS, len(x))
            for k, values in enumerate((np.ones(len(x)), x, np.square(x))):
                np.add.at(sums[k, :, s, b], part, values)
    return np.array(sizes), n, sums


def test_estimates_and_margins_are_the_stratified_formulas():
    outcomes = [[RNG.random(30), RNG.random(20)], [RNG.beta(5, 1, 40), RNG.random(10)]]
    sizes, n, sums = cells(outcomes, [[300, 200], [500, 10]])
    stratum = np.array([[0, 0], [1, 2]])
    found = estimates.estimate(
        ["a", "b"], sizes, n, np.zeros_like(n), stratum, confidence=0.99, outcomes=Sums(*sums)
    )
    of = {e.unit: e for e in found}
    samples = [np.concatenate(outcomes[0]), *outcomes[1]]
    weight = np.array([500, 500, 10]) / 1010
    mean = np.array([x.mean() for x in samples])
    assert of["network"].estimate == pytest.approx((weight * mean).sum())
    variance = [
        w**2 * x.var() / len(x) * (size - len(x)) / (size - 1)
        for w, x, size in zip(weight, samples, (500, 500, 10), strict=True)
    ]
    margin = estimates.normal_quantile(0.99) * np.sqrt(sum(variance))
    assert of["network"].margin == pytest.approx(margin)
    exact = of["b bit 1"]
    assert exact.estimate == exact.low == exact.high == pytest.approx(samples[2].mean())
    assert exact.margin == 0
    for e in found:
        assert e.low <= e.estimate <= e.high
        assert (e.low, e.high) == (e.cp_low, e.cp_high)


def test_zeros_and_ones_are_estimated_as_critical_or_not():
    outcomes = [[(RNG.random(k) < 0.2) * 1.0 for k in (300, 200)] for _ in range(2)]
    sizes, n, sums = cells(outcomes, [[3000, 2000], [5000, 1000]])
    k = sums[1].sum(axis=0).astype(int)
    stratum = np.array([[0, 0], [1, 2]])
    plain = estimates.estimate(["a", "b"], sizes, n, k, stratum, confidence=0.95)
    other = estimates.estimate(
        ["a", "b"], sizes, n, k, stratum, confidence=0.95, outcomes=Sums(*sums)
    )
    for a, b in zip(plain, other, strict=True):
        assert a[:7] == b[:7]
        assert a.estimate == pytest.approx(b.estimate)
        assert a.margin == pytest.approx(b.margin)


def test_without_an_injection_nothing_is_said():
    sizes, n, sums = cells([[[], []], [[], []]], [[5, 5], [5, 5]])
    (e,) = estimates.estimate(
        ["a", "b"], sizes, n, n, n, confidence=0.9, levels=("network",), outcomes=Sums(*sums)
    )
    assert np.isnan(e.estimate) and (e.low, e.high, e.unsampled) == (0, 1, 1)


@pytest.mark.parametrize(
    ("name", "measure", "labelled", "message"),
    [
        ("share", "critical", True, "estimate 'share' is unknown; choose from faults, pairs, acc"),
        ("pairs", "detect", True, "counts images, and measure 'detect' tells only one"),
        ("accuracy", "detect", True, "take the measure 'critical' or 'full'"),
        ("accuracy", "full", False, "needs labels, and there are none"),
    ],
)
def test_what_can_not_be_estimated_is_refused(name, measure, labelled, message):
    with pytest.raises(InputError, match=message):
        estimands.check(name, measure, labelled)
    assert estimands.check("faults", "detect", False) == "faults"


def test_outcomes_are_those_of_the_record():
    shard = {
        "first_critical": np.array([-1, 3]),
        "critical": np.array([0, 4]),
        "correct": np.array([7, 5]),
    }
    found = [
        (e, e.counts(shard).tolist())
        for e in (estimands.estimand(name, 8, 0.875) for name in estimands.WORDS)
    ]
    assert [counts for _, counts in found] == [[0, 1], [0, 4], [7, 5]]
    assert [(e.parts, e.unchanged) for e, _ in found] == [(1, 0), (8, 0), (8, 0.875)]
