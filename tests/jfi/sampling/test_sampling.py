import math
from fractions import Fraction
from functools import partial
from itertools import combinations
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, FaultSpace, Site
from jfi.sampling import sampling
from jfi.sampling.sampling import Request, Sample, Stratum, sample_size

DATE23 = Request(error_margin=0.01, confidence=0.99, t=2.58)
FLOAT32 = np.dtype("f4")

# DATE'23, Table I: parameters, faults, network-wise, layer-wise and data-unaware sizes by layer.
TABLE_I = (
    [(432, 27_648, 27, 10_389, 26_272)]
    + 6 * [(2_304, 147_456, 143, 14_954, 115_488)]
    + [(4_608, 294_912, 285, 15_752, 189_792)]
    + 3 * [(9_216, 589_824, 571, 16_184, 279_872)]
    + [(9_226, 590_464, 572, 16_185, 280_000)]
    + [(9_216, 589_824, 571, 16_184, 279_872)]
    + [(18_432, 1_179_648, 1_142, 16_410, 366_912)]
    + 5 * [(36_864, 2_359_296, 2_284, 16_524, 434_464)]
    + [(640, 40_960, 40, 11_834, 38_048)]
)
AS_PRINTED = [row[0] for row in TABLE_I]
KERNELS = [9_216 if words == 9_226 else words for words in AS_PRINTED]


def space_of(words, dtype=FLOAT32):
    sites = [Site(f"layer{i}", (n,), np.dtype(dtype)) for i, n in enumerate(words)]
    return FaultSpace(sites, (0, 1))


def golden(space, seed=0):
    rng = np.random.default_rng(seed)
    return [(0.1 * rng.standard_normal(s.shape)).astype(s.dtype) for s in space.sites]


def injections(strata, site=None):
    return sum(s.injections for s in strata if site is None or s.site == site)


def plan(name, space, request=DATE23):
    return sampling.SAMPLERS[name](space, golden(space), request)


@pytest.mark.parametrize(
    ("words", "population", "network", "layer", "unaware"),
    [
        (AS_PRINTED, 17_174_144, 16_625, 307_650, 4_885_760),
        (KERNELS, 17_173_504, 16_625, 307_649, 4_885_632),
    ],
    ids=["table_as_printed", "kernels_alone"],
)
def test_totals_of_date23_table_i(words, population, network, layer, unaware):
    space = space_of(words)
    assert space.size == injections(plan("exhaustive", space)) == population
    assert injections(plan("network_wise", space)) == network
    assert injections(plan("layer_wise", space)) == layer
    assert injections(plan("data_unaware", space)) == unaware


def test_rows_of_date23_table_i():
    space = space_of(AS_PRINTED)
    layer, unaware = plan("layer_wise", space), plan("data_unaware", space)
    network = injections(plan("network_wise", space))
    for site, (_, population, share, of_layer, of_bits) in enumerate(TABLE_I):
        assert space.site_sizes[site] == population
        assert round(network * population / space.size) == share
        assert injections(layer, site) == of_layer
        assert injections(unaware, site) == of_bits


def test_network_wise_size_of_date23_table_ii():
    assert sample_size(141_029_376, 0.01, 2.58) == 16_639


def test_the_quantile_is_exact_unless_given():
    assert Request(confidence=0.99).quantile == pytest.approx(stats.norm.ppf(0.995), rel=1e-14)
    assert Request(confidence=0.95).quantile == pytest.approx(1.959963984540054, rel=1e-14)
    assert DATE23.quantile == 2.58


@given(
    population=st.integers(2, 10**12),
    e=st.floats(1e-4, 0.5),
    t=st.floats(0.5, 5),
    p=st.floats(1e-3, 1 - 1e-3),
)
def test_a_sample_of_that_size_has_the_margin_asked_for(population, e, t, p):
    """The formula inverted: n faults leave the finite-population margin on either side of e."""

    def margin(n):
        return t * math.sqrt(p * (1 - p) / n * (population - n) / (population - 1))

    n = sample_size(population, e, t, p)
    assert 0 <= n <= population
    assert margin(min(n + 0.5, population)) <= e * (1 + 1e-9)
    assert n == 0 or margin(n - 0.5) >= e * (1 - 1e-9)


def test_sample_size_at_its_edges():
    assert sample_size(0, 0.01, 2.58) == 0
    assert sample_size(1, 0.01, 2.58) == 1
    assert sample_size(10**6, 0.01, 2.58, p=0) == sample_size(10**6, 0.01, 2.58, p=1) == 0
    assert sample_size(100, 1e-9, 2.58) == 100


@pytest.mark.parametrize("request_", [Request(), DATE23, Request(0.05, 0.9)], ids=str)
@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_every_sampler_covers_the_space_once(name, request_):
    sites = [Site("a", (3, 4), FLOAT32), Site("none", (0,), FLOAT32), Site("b", (50,), np.int8)]
    space = FaultSpace(sites, (0, 1), bits=(2, 7, 30))
    strata = sampling.SAMPLERS[name](space, [np.ones(s.shape, s.dtype) for s in sites], request_)
    members = [space.stratum_ids(s.site, s.bit, np.arange(s.population)) for s in strata]
    assert sorted(np.concatenate(members).tolist()) == list(range(space.size))
    for s in strata:
        assert s.injections <= s.population
        assert 0 <= s.p <= 0.5
        expected = sample_size(s.population, request_.error_margin, request_.quantile, s.p)
        assert s.injections == (s.population if name == "exhaustive" else expected)


def test_strata_are_what_the_samplers_are_named_for():
    space = space_of([5, 7])
    assert [(s.site, s.bit) for s in plan("network_wise", space)] == [(None, None)]
    assert [(s.site, s.bit) for s in plan("layer_wise", space)] == [(0, None), (1, None)]
    cells = [(site, bit) for site in range(2) for bit in range(32)]
    assert [(s.site, s.bit) for s in plan("data_unaware", space)] == cells
    assert [(s.site, s.bit) for s in plan("data_aware", space)] == cells


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(error_margin=0.0), "error_margin 0.0 is not between 0 and 1"),
        (Request(error_margin=1), "error_margin 1 is not"),
        (Request(error_margin=math.nan), "error_margin nan is not"),
        (Request(confidence=1.0), "confidence 1.0 is not between 0 and 1"),
        (Request(confidence=99), "confidence 99 is not"),
        (Request(t=0), "t 0 is not a positive number"),
        (Request(t=math.inf), "t inf is not a positive number"),
    ],
)
@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_bad_requests_are_refused(name, request_, message):
    with pytest.raises(InputError, match=message):
        plan(name, space_of([5]), request_)


# Data-aware


def naive_distances(values):
    """Equation 4 value by value, in rational numbers."""
    word = np.dtype(f"u{values.dtype.itemsize}")
    width = 8 * values.dtype.itemsize
    result = []
    for bit in range(width):
        found = ([], [])
        for value in values:
            pattern = int(value.view(word))
            flipped = np.array(pattern ^ (1 << bit), word).view(values.dtype)
            found[pattern >> bit & 1].append(abs(float(flipped) - float(value)))
        finite = [[d for d in ds if math.isfinite(d)] for ds in found]
        parts = [
            float(sum(map(Fraction, f)) / len(f) if f else math.inf) * (len(ds) / len(values))
            for f, ds in zip(finite, found, strict=True)
            if ds
        ]
        result.append(sum(parts))
    return result


FORMATS = ("f2", "f4", "f8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "i1", "i4")


@pytest.mark.parametrize("dtype", [np.dtype(d) for d in FORMATS], ids=str)
def test_distances_and_frequencies_are_those_counted_one_by_one(dtype):
    # Values beyond 1 too, whose flips reach infinity and NaN.
    leaves = [(20 * x).astype(dtype) for x in golden(space_of([40, 15]))]
    pooled = np.concatenate(leaves)
    distances = sampling.bit_distances(leaves)
    np.testing.assert_allclose(distances, naive_distances(pooled), rtol=1e-12)
    f0, f1 = sampling.bit_frequencies(leaves)
    digits = [f"{int(w):0{8 * dtype.itemsize}b}" for w in pooled.view(f"u{dtype.itemsize}")]
    ones = [sum(d[-1 - bit] == "1" for d in digits) / 55 for bit in range(f0.size)]
    np.testing.assert_allclose(f1, ones)
    np.testing.assert_allclose(f0 + f1, 1)


@pytest.mark.parametrize(
    ("dtype", "top"), [("f2", 14), (ml_dtypes.bfloat16, 14), ("f4", 30), ("f8", 62)], ids=str
)
def test_the_outlier_of_a_float_format_is_the_top_bit_of_its_exponent(dtype, top):
    leaves = [x.astype(dtype) for x in golden(space_of([2000]))]
    distances = sampling.bit_distances(leaves)
    assert np.flatnonzero(sampling.tukey(distances)).tolist() == [top]
    p = sampling.data_aware_p(leaves)
    rest = np.delete(np.arange(p.size), top)
    assert p[top] == 0.5
    assert p[rest].min() == 0 and p[rest].max() == 0.5
    np.testing.assert_allclose(p[rest], 0.5 * min_max(distances[rest]))


def min_max(x):
    return (x - x.min()) / (x.max() - x.min())


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4"])
def test_a_flip_moves_an_integer_by_the_weight_of_its_bit(dtype):
    leaves = [np.arange(100).astype(dtype)]
    width = 8 * np.dtype(dtype).itemsize
    weights = 2.0 ** np.arange(width)
    assert sampling.bit_distances(leaves).tolist() == weights.tolist()
    np.testing.assert_allclose(sampling.data_aware_p(leaves), 0.5 * min_max(weights))


def test_without_a_rule_for_outliers_one_bit_dwarfs_the_others():
    leaves = golden(space_of([500]))
    p = sampling.data_aware_p(leaves, sampling.OUTLIERS["none"])
    assert p[30] == 0.5
    assert np.delete(p, 30).max() < 1e-30


def test_the_outlier_rule_is_a_parameter_of_the_sampler():
    space = space_of([500])

    def all_but_one(distances):
        return np.arange(distances.size) != 3

    request = Request(0.05)
    cautious = partial(sampling.data_aware, outliers=all_but_one)(space, golden(space), request)
    assert cautious == sampling.data_unaware(space, golden(space), request)


@pytest.mark.parametrize(
    "values",
    [np.zeros(5, "f4"), np.full(5, -0.0, "f4"), np.ones(1, "f4"), np.full(3, np.inf, "f4")],
    ids=["zero", "minus_zero", "one", "infinite"],
)
@pytest.mark.parametrize("rule", sampling.OUTLIERS)
def test_odd_values_give_probabilities_all_the_same(values, rule):
    p = sampling.data_aware_p([values], sampling.OUTLIERS[rule])
    assert ((p >= 0) & (p <= 0.5)).all()


def test_distances_that_do_not_differ_get_the_safest_probability(monkeypatch):
    monkeypatch.setattr(sampling, "bit_distances", lambda leaves: np.full(8, 0.25))
    assert sampling.data_aware_p([]).tolist() == 8 * [0.5]


def test_each_dtype_has_its_own_probabilities():
    sites = [Site("a", (300,), FLOAT32), Site("q", (9,), np.int8), Site("b", (40,), FLOAT32)]
    space = FaultSpace(sites, (0, 1))
    a, b = golden(space_of([300, 40]))
    q = np.arange(9, dtype=np.int8)
    p = {s[:2]: s.p for s in sampling.data_aware(space, [a, q, b], DATE23)}
    of_floats, of_integers = sampling.data_aware_p([a, b]), sampling.data_aware_p([q])
    assert all(p[0, bit] == p[2, bit] == of_floats[bit] for bit in range(32))
    assert all(p[1, bit] == of_integers[bit] for bit in range(8))


def test_leaves_that_do_not_fit_the_sites_are_refused():
    space = space_of([5, 7])
    with pytest.raises(InputError, match="1 leaves for 2 sites"):
        sampling.data_aware(space, [np.ones(5, "f4")], DATE23)
    with pytest.raises(InputError, match=r"leaf of layer1 is float32\[6\], not float32\[7\]"):
        sampling.data_aware(space, [np.ones(5, "f4"), np.ones(6, "f4")], DATE23)
    with pytest.raises(InputError, match="leaf of layer0 is float64"):
        sampling.data_aware(space, [np.ones(5), np.ones(7, "f4")], DATE23)
    with pytest.raises(InputError, match=r"leaves have dtypes \['float32', 'int8'\]"):
        sampling.bit_distances([np.ones(5, "f4"), np.ones(5, "i1")])
    with pytest.raises(InputError, match="leaves hold no value"):
        sampling.bit_distances([np.ones(0, "f4")])
    dead = FaultSpace(space.sites, FAULT_MODELS["dead"])
    with pytest.raises(InputError, match="dead and saturated are faults of whole words"):
        sampling.data_aware(dead, [np.ones(s.shape, s.dtype) for s in dead.sites], DATE23)


RESNET20 = "weights/resnet_cifar10/resnet20-12fca82f.th"


@pytest.mark.data
def test_data_aware_on_the_weights_of_resnet20():
    """The method as DATE'23 states it; its column (2,732 ... 207,837) does not follow from it."""
    torch = pytest.importorskip("torch")
    path = Path(__file__).resolve().parents[3].parent / "shared" / RESNET20
    if not path.exists():
        pytest.skip(f"{path} is absent")
    tensors = torch.load(path, weights_only=True, map_location="cpu")["state_dict"].values()
    leaves = [t.numpy() for t in tensors if t.ndim in (2, 4)]
    sites = [Site(f"layer{i}", x.shape, x.dtype) for i, x in enumerate(leaves)]
    space = FaultSpace(sites, (0, 1))
    assert [site.words for site in sites] == KERNELS

    distances = sampling.bit_distances(leaves)
    assert np.flatnonzero(sampling.tukey(distances)).tolist() == [30]
    assert distances[30] == pytest.approx(2.33e37, rel=1e-3)
    assert np.argsort(distances)[-2] == 25
    assert distances[25] == pytest.approx(0.62, abs=5e-3)
    strata = sampling.data_aware(space, leaves, DATE23)
    assert injections(strata, site=0) == 8_095
    assert injections(strata) == 792_088


# Drawing


@given(population=st.integers(0, 300), share=st.floats(0, 1), seed=st.integers(0, 2**70))
def test_draws_are_distinct_sorted_and_in_range(population, share, seed):
    n = round(share * population)
    drawn = sampling.draw_without_replacement(population, n, (seed, 1, 31))
    assert drawn.dtype == np.int64 and drawn.shape == (n,)
    assert (np.diff(drawn) > 0).all()
    assert n == 0 or (drawn[0] >= 0 and drawn[-1] < population)
    assert np.array_equal(drawn, sampling.draw_without_replacement(population, n, (seed, 1, 31)))


@pytest.mark.parametrize(
    ("population", "n", "key", "expected"),
    [
        (10, 4, (0, 0, 0), [0, 7, 8, 9]),
        (10, 8, (0, 0, 0), [1, 2, 3, 4, 5, 6, 7, 8]),
        (1000, 5, (1,), [55, 278, 483, 538, 583]),
        (1000, 5, (1, 0, 0), [235, 331, 472, 616, 665]),
        (10**9, 5, (7, 1, 31), [3754536, 78486271, 169844510, 663264055, 849930838]),
        (2**40, 3, (2**40, 20, 0), [386061549223, 503260054882, 760889072542]),
    ],
)
def test_draws_are_the_same_on_every_machine(population, n, key, expected):
    assert sampling.draw_without_replacement(population, n, key).tolist() == expected


def by_definition(population, n, key):
    """The first n distinct values of the stream, one word at a time."""
    stream = np.random.Philox(np.random.SeedSequence(key[0], spawn_key=key[1:]))
    found = []
    while len(found) < n:
        word = int(stream.random_raw())
        if word < 2**64 // population * population and word % population not in found:
            found.append(word % population)
    return sorted(found)


@pytest.mark.parametrize("population", [7, 64, 1000, 2**62 + 2**61 + 1])
@pytest.mark.parametrize("n", [0, 1, 3, 5, 7])
def test_draws_are_the_first_distinct_values_or_all_the_others(population, n):
    drawn = sampling.draw_without_replacement(population, n, (3, 1, 2)).tolist()
    if 2 * n <= population:
        assert drawn == by_definition(population, n, (3, 1, 2))
    else:
        left_out = by_definition(population, population - n, (3, 1, 2))
        assert drawn == sorted(set(range(population)) - set(left_out))


@pytest.mark.parametrize(("population", "n"), [(6, 2), (6, 3), (6, 4), (100, 1), (40, 39)])
def test_every_subset_is_as_likely(population, n):
    subsets = {s: i for i, s in enumerate(combinations(range(population), n))}
    draws = 60 * len(subsets)
    drawn = (
        subsets[tuple(sampling.draw_without_replacement(population, n, (seed,)).tolist())]
        for seed in range(draws)
    )
    counts = np.bincount(np.fromiter(drawn, np.int64, draws), minlength=len(subsets))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("n", [1000, 20_000, 60_000])
def test_large_draws_are_uniform(n):
    drawn = sampling.draw_without_replacement(100_000, n, (11, 0, 0))
    counts = np.bincount(drawn // 1000, minlength=100)
    variance = n / 100 * (1 - n / 100_000)  # nearly: the hypergeometric counts sum to n
    assert stats.chi2.sf(((counts - n / 100) ** 2 / variance).sum(), 99) > 1e-3


def test_a_million_from_a_billion():
    drawn = sampling.draw_without_replacement(10**9, 10**6, (0, 0, 0))
    assert np.unique(drawn).size == 10**6
    assert stats.kstest(drawn / 1e9, "uniform").pvalue > 1e-3


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="cannot draw 11 of 10"):
        sampling.draw_without_replacement(10, 11, (0,))
    with pytest.raises(InputError, match="cannot draw -1 of 10"):
        sampling.draw_without_replacement(10, -1, (0,))
    with pytest.raises(InputError, match=r"seed -1 .* is negative"):
        sampling.draw_without_replacement(10, 1, (-1, 0))


# Samples


def mixed_sample(seed=5):
    """Strata drawn, taken whole and empty, over part of a space."""
    space = space_of([3, 50, 4])
    sizes = [(0, None, 192), (1, 3, 0), (1, 30, 40), (1, 31, 100), (2, None, 99)]
    strata = [Stratum(s, b, space.stratum_size(s, b), n, 0.5) for s, b, n in sizes]
    return Sample(space, strata, seed)


def test_a_sample_has_the_faults_of_its_strata_in_order():
    sample = mixed_sample()
    ids = sample.ids(0, sample.size)
    assert ids.dtype == np.int64 and ids.size == sample.size == 431
    assert np.unique(ids).size == ids.size
    ends = np.cumsum([s.injections for s in sample.strata])[:-1]
    for stratum, part in zip(sample.strata, np.split(ids, ends), strict=True):
        assert (np.diff(part) > 0).all()
        faults = sample.space.decode(part)
        assert (faults.site == stratum.site).all()
        assert stratum.bit is None or (faults.bit == stratum.bit).all()


@given(st.integers(0, 431), st.integers(0, 431))
def test_any_part_of_a_sample_is_that_part_of_the_whole(a, b):
    sample, (lo, hi) = mixed_sample(), sorted((a, b))
    assert np.array_equal(sample.ids(lo, hi), sample.ids(0, 431)[lo:hi])


def test_a_stratum_is_drawn_alike_whatever_else_is():
    sample = mixed_sample()
    alone = Sample(sample.space, sample.strata[2:3], sample.seed)
    assert np.array_equal(alone.ids(0, 40), sample.ids(192, 232))


def test_strata_of_one_size_are_drawn_apart():
    space = space_of([1000, 1000])
    strata = [Stratum(site, bit, 2000, 50, 0.5) for site in (0, 1) for bit in (0, 1)]
    drawn = Sample(space, strata, 0).ids(0, 200).reshape(4, 50)
    words = {tuple(space.decode(ids).index) for ids in drawn}
    assert len(words) == 4


def test_another_seed_draws_other_faults():
    drawn = [tuple(mixed_sample(seed).ids(192, 232)) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert np.array_equal(mixed_sample(1).ids(0, 431), mixed_sample(1).ids(0, 431))


def test_an_exhaustive_sample_of_10_to_the_12_faults():
    space = space_of([10**10, 56 * 10**8])
    sample = Sample(space, sampling.exhaustive(space, None, DATE23), 0)
    assert sample.size == space.size == 998_400_000_000
    lo = 64 * 10**10 - 2
    assert sample.ids(lo, lo + 4).tolist() == list(range(lo, lo + 4))


@pytest.mark.parametrize(("lo", "hi"), [(-1, 3), (3, 2), (0, 432)])
def test_parts_beyond_the_sample_are_refused(lo, hi):
    with pytest.raises(InputError, match="are not in the sample: it has 431"):
        mixed_sample().ids(lo, hi)


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed -3"):
        mixed_sample(-3)
