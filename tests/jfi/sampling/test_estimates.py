"""Estimates against SciPy, closed forms, enumerated populations and simulated campaigns."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jfi.errors import InputError
from jfi.sampling import estimates
from jfi.sampling.estimates import estimate

HUGE = 10**15


def one_cell(population, injections, critical, confidence=0.99, **options):
    cells = [np.array([[x]]) for x in (population, injections, critical, 0)]
    options = {"levels": ("network",), **options}
    return estimate(["conv"], *cells, confidence=confidence, **options)[0]


def network_of(population, injections, critical, confidence=0.99, **options):
    """The network's estimate where every site is a stratum of one bit."""
    cells = [np.reshape(x, (-1, 1)) for x in (population, injections, critical)]
    names = [f"conv{i}" for i in range(len(population))]
    stratum = np.arange(len(population))[:, None]
    options = {"levels": ("network",), **options}
    return estimate(names, *cells, stratum, confidence=confidence, **options)[0]


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 50), (1, 50), (7, 20), (20, 20), (300, 4000)])
def test_intervals_are_scipys_where_the_population_is_huge(k, n, confidence):
    test = stats.binomtest(k, n)
    wilson, exact = (
        test.proportion_ci(confidence, method=method) for method in ("wilson", "exact")
    )
    np.testing.assert_allclose(estimates.wilson(k, n, confidence), wilson, atol=1e-12)
    np.testing.assert_allclose(estimates.clopper_pearson(k, n, confidence), exact, atol=1e-12)
    whole = one_cell(HUGE, n, k, confidence)
    np.testing.assert_allclose((whole.low, whole.high), wilson, atol=1e-9)
    np.testing.assert_allclose((whole.cp_low, whole.cp_high), exact, atol=1e-9)


counts = st.integers(1, 10**5).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(max_examples=60, deadline=None)
@given(counts, st.floats(0.5, 0.999))
def test_intervals_of_any_count_are_scipys_and_those_of_statsmodels(count, confidence):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    test = stats.binomtest(*count)
    for name, method, found in (
        ("wilson", "wilson", estimates.wilson(*count, confidence)),
        ("beta", "exact", estimates.clopper_pearson(*count, confidence)),
    ):
        theirs = proportion.proportion_confint(*count, 1 - confidence, method=name)
        np.testing.assert_allclose(found, test.proportion_ci(confidence, method), atol=1e-9)
        np.testing.assert_allclose(found, np.clip(theirs, 0, 1), atol=1e-9)


def test_intervals_are_vectorised_over_real_valued_counts():
    low, high = estimates.clopper_pearson(np.array([0.5, 3.5]), 10.0, 0.95)
    assert low.shape == (2,)
    np.testing.assert_allclose(low[1], stats.beta.ppf(0.025, 3.5, 7.5))
    np.testing.assert_allclose(high[1], stats.beta.ppf(0.975, 4.5, 6.5))


@pytest.mark.parametrize(("k", "n"), [(0, 50), (1, 50), (7, 20), (20, 20), (300, 4000)])
def test_intervals_are_those_of_statsmodels(k, n):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for name, found in {
        "wilson": estimates.wilson(k, n, 0.95),
        "beta": estimates.clopper_pearson(k, n, 0.95),
        "normal": estimates.normal(k, n, HUGE, 0.95),
    }.items():
        expected = proportion.proportion_confint(k, n, 0.05, method=name)
        np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1e-9)


@pytest.mark.parametrize("confidence", [0.9, 0.99])
@pytest.mark.parametrize(("population", "n"), [(1, 1), (12, 5), (40, 30), (60, 59), (60, 60)])
def test_the_exact_interval_is_the_inverted_test_of_every_number(population, n, confidence):
    """By brute force: all K that neither tail excludes; so it covers every K."""
    alpha = (1 - confidence) / 2
    truths = np.arange(population + 1)
    low, high = estimates.hypergeometric(np.arange(n + 1), n, population, confidence)
    for k in range(n + 1):
        at_most = stats.hypergeom.cdf(k, population, truths, n)
        at_least = stats.hypergeom.sf(k - 1, population, truths, n)
        possible = truths[(at_most > alpha) & (at_least > alpha)]
        assert (low[k] * population, high[k] * population) == pytest.approx(
            (possible.min(), possible.max())
        )
    for truth in truths:
        chances = stats.hypergeom.pmf(np.arange(n + 1), population, truth, n)
        held = (low - 1e-12 <= truth / population) & (truth / population <= high + 1e-12)
        assert chances @ held >= confidence - 1e-9


def test_the_exact_interval_of_a_huge_population_is_clopper_pearsons():
    k, n = np.array([0, 3, 500]), np.array([1000, 10_000, 10_000])
    found = estimates.hypergeometric(k, n, 10**8, 0.99)
    expected = estimates.clopper_pearson(k, n, 0.99)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    some = estimates.hypergeometric(5, 900, 1000, 0.99)
    assert some[1] - some[0] < 0.3 * np.diff(estimates.clopper_pearson(5, 900, 0.99))[0]


@pytest.mark.parametrize("k", [0, 1000])
def test_the_stratified_interval_of_one_stratum_is_clopper_pearsons_at_the_ends(k):
    found = estimates.stratified([10**9], [1000], [k], 0.99)
    np.testing.assert_allclose(found, estimates.clopper_pearson(k, 1000, 0.99), atol=1e-9)


def test_the_stratified_interval_holds_for_every_small_population():
    """Enumerated: two strata with all numbers of critical faults, and all samples of them."""
    population, n, confidence = np.array([6, 12]), np.array([4, 3]), 0.8
    k = [np.arange(m + 1) for m in n]
    found = np.array(
        [[estimates.stratified(population, n, [a, b], confidence) for b in k[1]] for a in k[0]]
    )
    for first in range(7):
        for second in range(13):
            chances = np.outer(
                stats.hypergeom.pmf(k[0], 6, first, 4), stats.hypergeom.pmf(k[1], 12, second, 3)
            )
            truth = (first + second) / 18
            held = (found[..., 0] <= truth + 1e-9) & (truth <= found[..., 1] + 1e-9)
            assert (chances * held).sum() >= confidence - 1e-9, (first, second)


def test_the_stratified_interval_bounds_silent_strata_together():
    """500 strata of 20 injections without a critical fault count as one of 10,000."""
    silent = estimates.stratified([10**6] * 500, [20] * 500, [0] * 500, 0.99)
    one = estimates.stratified([5 * 10**8], [10**4], [0], 0.99)
    np.testing.assert_allclose(silent, one, rtol=1e-6)


def test_the_stratified_interval_of_strata_known_or_unknown_whole():
    assert estimates.stratified([30, 10], [30, 10], [3, 5], 0.9) == (0.2, 0.2)
    assert estimates.stratified([30, 10], [0, 10], [0, 5], 0.9) == (0.125, 0.875)
    assert estimates.stratified([30, 10], [0, 0], [0, 0], 0.9) == (0.0, 1.0)


def test_margin_is_the_papers_and_inverts_the_sample_size():
    """DATE'23: n for e = 1%, t = 2.58, p = 0.5 of the network's 17,174,144 faults is 16,625."""
    achieved = one_cell(17_174_144, 16_624, 8_312, t=2.58).margin
    assert achieved == pytest.approx(0.01, rel=1e-4)
    e = one_cell(1000, 200, 50, confidence=0.95)
    expected = stats.norm.ppf(0.975) * math.sqrt(0.25 * 0.75 / 200 * 800 / 999)
    assert e.margin == pytest.approx(expected)
    assert e.estimate == 0.25


def test_stratified_estimate_and_margin_are_the_closed_form():
    population, n, k = np.array([1000, 50, 30_000]), np.array([100, 50, 40]), np.array([3, 20, 1])
    weight, p = population / population.sum(), k / n
    variance = weight**2 * p * (1 - p) / n * (population - n) / (population - 1)
    e = network_of(population, n, k, t=2.0)
    assert e.estimate == pytest.approx((weight * p).sum())
    assert e.margin == pytest.approx(2.0 * math.sqrt(variance.sum()))
    assert (e.population, e.injections, e.critical) == (31_050, 190, 24)
    assert e.low < e.estimate < e.high
    assert e.cp_low < e.estimate < e.cp_high
    assert e.unsampled == 0


small = st.lists(
    st.lists(st.integers(0, 1), min_size=2, max_size=5).flatmap(
        lambda faults: st.tuples(st.just(faults), st.integers(1, len(faults)))
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(small)
def test_the_estimate_is_unbiased_and_its_variance_what_cochran_says(strata):
    """Every sample of every stratum is enumerated.

    The margin takes p (1 - p) / n for a variance, as the papers do: short of the true one by
    (n - 1) N / (n (N - 1)), Cochran's Sampling Techniques, theorem 2.4.
    """
    sizes = np.array([len(faults) for faults, _ in strata])
    n = np.array([n for _, n in strata])
    samples = itertools.product(*(itertools.combinations(*stratum) for stratum in strata))
    found = [network_of(sizes, n, [sum(own) for own in sample], t=1.0) for sample in samples]
    points, variances = (
        np.array(x) for x in zip(*((e.estimate, e.margin**2) for e in found), strict=True)
    )
    p = np.array([np.mean(faults) for faults, _ in strata])
    assert points.mean() == pytest.approx(sizes @ p / sizes.sum())
    true = (sizes / sizes.sum()) ** 2 * p * (1 - p) / n * (sizes - n) / (sizes - 1)
    assert points.var() == pytest.approx(true.sum())
    assert variances.mean() == pytest.approx((true * (n - 1) / n * sizes / (sizes - 1)).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data(), st.floats(0.5, 0.99))
def test_exact_intervals_cover_any_small_population(population, data, confidence):
    n = data.draw(st.integers(1, population))
    k = np.arange(n + 1)
    low, high = estimates.hypergeometric(k, n, population, confidence)
    for truth in range(population + 1):
        held = (low - 1e-12 <= truth / population) & (truth / population <= high + 1e-12)
        assert stats.hypergeom.pmf(k, population, truth, n) @ held >= confidence - 1e-9


def test_one_stratum_over_many_cells_is_a_simple_random_sample():
    population = np.array([[500, 300], [200, 0]])
    n, k = np.array([[50, 30], [20, 0]]), np.array([[5, 1], [4, 0]])
    cells = estimate(
        ["a", "b"], population, n, k, np.zeros((2, 2)), confidence=0.95, levels=("network",)
    )
    assert cells[0][4:] == pytest.approx(one_cell(1000, 100, 10, confidence=0.95)[4:])


@pytest.mark.parametrize("critical", [0, 7, 40])
def test_everything_injected_gives_the_point(critical):
    e = one_cell(40, 40, critical)
    assert e.margin == 0
    assert {e.low, e.high, e.cp_low, e.cp_high} == {e.estimate} == {critical / 40}
    both = network_of([40, 3], [40, 3], [critical, 3])
    assert both.low == both.high == both.cp_high == both.estimate == (critical + 3) / 43


def test_no_critical_fault_seen_still_gives_a_positive_upper_bound():
    e = one_cell(10**6, 1000, 0)
    assert (e.estimate, e.margin, e.low, e.cp_low) == (0, 0, 0, 0)
    # The rate that would show nothing in n draws with probability 0.5%.
    assert e.cp_high == pytest.approx(1 - 0.005 ** (1 / 1000), rel=0.01)
    assert e.high > 0.005
    many = network_of([10**6] * 50, [20] * 50, [0] * 50)
    assert many.cp_high == pytest.approx(e.cp_high, rel=0.01) or many.cp_high > e.cp_high


@pytest.mark.parametrize("confidence", [0.9, 0.99])
@pytest.mark.parametrize(("population", "n"), [(12, 5), (20, 8), (40, 30), (100, 10), (100, 95)])
def test_clopper_pearson_covers_every_small_population(population, n, confidence):
    """Enumerated: whatever the number of critical faults, at least the nominal coverage."""
    found = [one_cell(population, n, k, confidence) for k in range(n + 1)]
    for truth in range(population + 1):
        chances = stats.hypergeom.pmf(np.arange(n + 1), population, truth, n)
        covered = [e.cp_low - 1e-12 <= truth / population <= e.cp_high + 1e-12 for e in found]
        assert chances @ covered >= confidence - 1e-9, truth
        wilson = [e.low - 1e-12 <= truth / population <= e.high + 1e-12 for e in found]
        assert chances @ wilson >= confidence - 0.07, truth


def test_many_strata_without_a_critical_fault_do_not_blow_up_the_interval():
    """500 of them, 20 injections each: together they bound their share like 10,000 injections."""
    population, n = np.array([10**6] * 501), np.array([20] * 500 + [2000])
    e = network_of(population, n, np.array([0] * 500 + [1000]))
    assert e.estimate == pytest.approx(0.5 / 501)
    assert 5.3 / 10_000 < e.cp_high - e.estimate < 3 * 5.3 / 10_000


@pytest.mark.parametrize(
    ("population", "n", "p"),
    [
        # A lightly sampled stratum with most of the weight, another with most critical faults.
        ([970_000, 30_000], [100, 10_000], [0.03, 0.5]),
        # The bits of a layer under data-aware sampling.
        ([9216] * 8, [5000, 2500, 600, 400, 50, 50, 20, 10], [0.68, 0.12, 0.03, 0.02, 0, 0, 0, 0]),
        ([500] * 40, [25] * 40, [0.02] * 40),
        ([500] * 40, [2] * 40, [0.2] * 40),
        ([864, 4608, 36_864], [700, 1000, 1200], [0.002, 0.002, 0.001]),
    ],
)
def test_stratified_intervals_cover_in_simulation(population, n, p):
    rng = np.random.default_rng(3)
    population, n = np.array(population), np.array(n)
    critical = np.round(population * np.array(p)).astype(int)
    truth = critical.sum() / population.sum()
    repeats = 600
    k = rng.hypergeometric(critical, population - critical, n, size=(repeats, n.size))
    found = [network_of(population, n, row) for row in k]
    exact = np.mean([e.cp_low <= truth <= e.cp_high for e in found])
    wilson = np.mean([e.low <= truth <= e.high for e in found])
    # Nominal 99%, less three standard errors of the simulation.
    assert exact >= 0.99 - 3 * math.sqrt(0.99 * 0.01 / repeats)
    assert wilson >= 0.97
    mean = np.mean([e.estimate for e in found])
    assert mean == pytest.approx(truth, abs=5 * np.std([e.estimate for e in found]) / repeats**0.5)


def test_sparse_strata_without_a_critical_fault_rest_on_what_is_assumed():
    """Two injections in a tenth of the network: 9 points of doubt, or the 0.1% assumed."""
    population = np.array([[9000], [1000]])
    counts = {"injections": np.array([[5000], [2]]), "critical": np.array([[500], [0]])}
    stratum = np.array([[0], [1]])

    def network(**more):
        return estimate(["a", "b"], population, *counts.values(), stratum, confidence=0.99, **more)

    doubtful, assumed = network(), network(assumed_p=np.array([[1.0], [0.001]]))
    point = 0.9 * 500 / 5000
    assert doubtful[0].cp_high > point + 0.08
    assert point + 0.1 * 0.001 <= assumed[0].cp_high < point + 0.01
    # A unit of that stratum alone says what its two injections do.
    assert assumed[2].unit == "b"
    assert assumed[2].cp_high == doubtful[2].cp_high > 0.9
    counts["critical"] = np.array([[500], [1]])
    assert network(assumed_p=np.array([[1.0], [0.001]]))[0].cp_high > point + 0.08


def test_unsampled_strata_are_stated_and_bounded_by_what_is_assumed():
    sampled, n, k = np.array([600, 300, 100]), np.array([60, 30, 0]), np.array([6, 0, 0])
    rest = network_of(sampled[:2], n[:2], k[:2])
    worst = network_of(sampled, n, k)
    assert worst.unsampled == pytest.approx(0.1)
    assert worst.estimate == pytest.approx(0.9 * rest.estimate)
    assert worst.margin == pytest.approx(0.9 * rest.margin)
    # Bounds are whole faults, of 900 and of 1000.
    assert worst.cp_high == pytest.approx(0.9 * rest.cp_high + 0.1, abs=1e-9)
    assert worst.low == pytest.approx(0.9 * rest.low, abs=1e-9)
    assumed = network_of(sampled, n, k, assumed_p=np.array([[0.5], [0.5], [0.02]]))
    assert assumed.high == pytest.approx(worst.high - 0.1 + 0.1 * 0.02)


def test_a_unit_without_injections_claims_nothing():
    e = one_cell(1000, 0, 0)
    assert math.isnan(e.estimate)
    assert math.isnan(e.margin)
    assert (e.low, e.high, e.cp_low, e.cp_high, e.unsampled) == (0, 1, 0, 1, 1)


def test_units_are_named_summed_and_skipped_where_empty():
    """An int8 site beside a float32 one has no bit 30."""
    population = np.zeros((2, 32), int)
    population[0], population[1, :8] = 10, 4
    injections, critical = population.copy(), np.zeros_like(population)
    critical[0, 30], critical[1, 3] = 7, 1
    stratum = np.arange(2)[:, None] * np.ones(32, int)
    units = {
        e.unit: e
        for e in estimate(["a", "b"], population, injections, critical, stratum, confidence=0.9)
    }
    assert len(units) == 1 + 2 + 32 + 40
    assert units["network"].critical == 8
    assert units["a"].estimate == 7 / 320
    assert units["bit 3"].population == 14
    assert units["b bit 3"][1:9] == ("layer_bit", "b", 3, 4, 4, 1, 0.25, 0)
    assert "b bit 30" not in units
    only = estimate(
        ["a", "b"], population, injections, critical, stratum, confidence=0.9, levels=("bit",)
    )
    assert [e.unit for e in only] == [f"bit {b}" for b in range(32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": 1.0}, "confidence is 1.0; it must lie between 0 and 1"),
        ({"confidence": float("nan")}, "confidence is nan"),
        ({"levels": ("neuron",)}, "level 'neuron' is unknown; choose from network, layer"),
        ({"critical": np.array([[9]])}, r"a bit 0 has critical, injections, population = \(9, 5"),
        ({"injections": np.array([[11]])}, r"= \(1, 11, 10\)"),
        ({"critical": np.array([[1, 1]])}, r"critical has shape \(1, 2\)"),
        ({"site_names": ["a", "b"]}, "population has shape"),
    ],
)
def test_impossible_input_is_named(change, message):
    cells = {"population": [[10]], "injections": [[5]], "critical": [[1]], "stratum": [[0]]}
    arguments = {"site_names": ["a"], **{k: np.array(v) for k, v in cells.items()}}
    with pytest.raises(InputError, match=message):
        estimate(**{"confidence": 0.9, **arguments, **change})
