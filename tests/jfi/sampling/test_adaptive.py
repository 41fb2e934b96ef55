"""The adaptive sampler on made-up networks whose every fault is known."""

import numpy as np
import pytest
from scipy import optimize, stats

from jfi.errors import InputError
from jfi.faults import FaultSpace, Site
from jfi.sampling import adaptive, estimands, methods, strata
from jfi.sampling.sampling import Request

LEVELS = methods.LEVELS


class Net:
    """A network's faults; critical where a flip moves its word beyond the word's threshold."""

    def __init__(self, sizes=(20, 150), hardness=1.0, seed=0):
        rng = np.random.default_rng(seed)
        self.leaves = [rng.normal(scale=0.1, size=n).astype(np.float32) for n in sizes]
        sites = [Site(f"layer{i}", x.shape, x.dtype) for i, x in enumerate(self.leaves)]
        self.space = FaultSpace(sites, (0, 1))
        self.thresholds = [np.exp(rng.normal(hardness, 1, n)) for n in sizes]
        parts = strata.strata(self.space, self.leaves, strata.by_cell(self.space, self.leaves))
        h = np.repeat(np.arange(len(parts.size)), parts.size)
        k = np.concatenate([np.arange(n) for n in parts.size])
        faults = self.space.decode(parts.ids(h, k))
        moved = np.array(
            [
                strata.distances(self.leaves[s][[i]], b)[0]
                for s, i, b in zip(faults.site, faults.index, faults.bit, strict=True)
            ]
        )
        limit = [self.thresholds[s][i] for s, i in zip(faults.site, faults.index, strict=True)]
        self.critical = np.zeros(self.space.size, bool)
        self.critical[self.space.encode(faults)] = ~(moved < limit)
        self.faults = self.space.decode(np.arange(self.space.size))

    def truths(self, levels):
        units = methods.units(self.space, levels)
        inside = (u.holds(self.faults.site, self.faults.bit) for u in units)
        return np.array([self.critical[mask].mean() for mask in inside])

    def run(self, split=strata.by_distance, margin=0.05, confidence=0.9, levels=LEVELS, seed=0):
        method = adaptive.adaptive(split)
        request = Request(margin, confidence)
        return method(self.space, self.leaves, request, levels, self.critical.__getitem__, seed)


NET = Net()
SCORES = {
    "cell": strata.by_cell,
    "distance": strata.by_distance,
    "thresholds": lambda _, leaves: strata.by_score(
        leaves, [np.stack(2 * [1 / t]) for t in NET.thresholds]
    ),
    # A score that says nothing of a fault.
    "random": lambda _, leaves: strata.by_array(
        [np.random.default_rng(0).lognormal(0, 4, (x.size, 32)) for x in leaves]
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_intervals_hold_the_truth_and_meet_the_margin_whatever_the_strata(name):
    """12 campaigns of 35 units at 90%: each unit's misses are at most a tenth, pooled and alone."""
    truths, repeats = NET.truths(LEVELS), 12
    missed = np.zeros(len(truths))
    for seed in range(repeats):
        result = NET.run(SCORES[name], margin=0.1, seed=seed)
        low, high = (np.array([getattr(u, x) for u in result.units]) for x in ("low", "high"))
        assert (high - low <= 2 * 0.1 + 1e-12).all()
        missed += (truths < low - 1e-12) | (high + 1e-12 < truths)
    assert missed.sum() <= 0.1 * repeats * len(truths)
    assert stats.binomtest(int(missed.max()), repeats, 0.1, alternative="greater").pvalue > 1e-3


IMAGES = 20


def outcomes(net, name):
    """The estimand, and the outcome of every fault: critical ones change any number of images."""
    rng = np.random.default_rng(1)
    changed = np.where(net.critical, np.ceil(IMAGES * rng.beta(0.4, 1, net.space.size)), 0)
    estimand = estimands.estimand(name, IMAGES, 0.9)
    if name == "pairs":
        return estimand, changed / IMAGES
    return estimand, np.clip(0.9 - (changed - (rng.random(changed.size) < 0.1)) / IMAGES, 0, 1) * (
        net.critical
    ) + 0.9 * ~net.critical


@pytest.mark.parametrize("name", ["pairs", "accuracy"])
@pytest.mark.parametrize("split", [strata.by_cell, strata.by_distance])
def test_means_of_other_outcomes_hold_and_meet_the_margin(name, split):
    estimand, outcome = outcomes(NET, name)
    units = methods.units(NET.space, LEVELS)
    truths = [outcome[u.holds(NET.faults.site, NET.faults.bit)].mean() for u in units]
    repeats, missed = 12, np.zeros(len(truths))
    for seed in range(repeats):
        result = adaptive.adaptive(split)(
            NET.space, NET.leaves, Request(0.05, 0.9), LEVELS, outcome.__getitem__, seed, estimand
        )
        low, high = (np.array([getattr(u, x) for u in result.units]) for x in ("low", "high"))
        assert (high - low <= 2 * 0.05 + 1e-12).all()
        # Bounds are whole numbers of images, as are all outcomes.
        sizes = np.array([u.population for u in result.units]) * IMAGES
        np.testing.assert_allclose(low * sizes, np.round(low * sizes), atol=1e-5)
        missed += (truths < low - 1e-9) | (high + 1e-9 < truths)
    assert missed.sum() <= 0.1 * repeats * len(truths)
    assert stats.binomtest(int(missed.max()), repeats, 0.1, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("name", ["pairs", "accuracy"])
def test_every_fault_that_matters_tells_the_mean_exactly(name):
    net = Net((4, 6))
    estimand, outcome = outcomes(net, name)
    result = adaptive.adaptive()(
        net.space, net.leaves, Request(1e-6, 0.9), ("network",), outcome.__getitem__, 0, estimand
    )
    (unit,) = result.units
    assert unit.low == pytest.approx(outcome.mean(), abs=1e-9) == unit.high
    assert unit.injections <= net.space.size / 2


def test_outcomes_of_small_variance_take_fewer_injections():
    """Of images that all change together, and of one in twenty of them."""
    spent = []
    for scale in (1.0, 1 / IMAGES):
        result = adaptive.adaptive()(
            NET.space, NET.leaves, Request(0.01, 0.9), ("network",),
            lambda ids, scale=scale: NET.critical[ids] * scale, 0,
            estimands.Estimand("pairs", IMAGES),
        )  # fmt: skip
        spent.append(result.injections)
    assert spent[1] < spent[0] / 3


def test_a_good_score_saves_injections_and_a_bad_one_costs_them():
    spent = {
        name: np.mean(
            [NET.run(split, 0.01, levels=("layer",), seed=s).injections for s in range(6)]
        )
        for name, split in SCORES.items()
    }
    assert spent["thresholds"] < spent["distance"] < spent["cell"] < spent["random"]


def test_stopping_biases_the_estimate_by_little_of_the_margin():
    """The values are unbiased, as enumerated in test_betting; when to stop follows from them."""
    found = [NET.run(levels=("network",), seed=s).units[0].estimate for s in range(150)]
    assert abs(np.mean(found) - NET.truths(("network",))[0]) < 0.05 / 10


def test_far_fewer_injections_than_there_are_faults():
    net = Net((200, 4000), hardness=2.0)
    result = net.run(margin=0.01, confidence=0.99, levels=("network", "layer"))
    assert result.injections < net.space.size / 50
    assert result.injections == sum(result.rounds)


def test_the_same_seed_asks_the_same_and_no_fault_twice():
    asked = {seed: [] for seed in (0, 1)}

    def run(seed):
        def oracle(ids):
            asked[seed].append(ids)
            return NET.critical[ids]

        arguments = NET.space, NET.leaves, Request(0.03, 0.9), ("network", "bit"), oracle, seed
        return adaptive.adaptive()(*arguments)

    first = run(0)
    ids, asked[0] = np.concatenate(asked[0]), []
    assert run(0) == first
    assert np.array_equal(np.concatenate(asked[0]), ids)
    assert np.unique(ids).size == ids.size == first.injections
    run(1)
    assert set(np.concatenate(asked[1]).tolist()) != set(ids.tolist())


def test_an_impossible_margin_injects_everything_that_matters_and_is_exact():
    net = Net((4, 6))
    result = net.run(margin=1e-6)
    assert [u.low for u in result.units] == [u.high for u in result.units]
    np.testing.assert_allclose([u.estimate for u in result.units], net.truths(LEVELS))
    assert result.injections <= net.space.size / 2


@pytest.mark.parametrize("critical", [False, True])
def test_none_and_all_critical_are_bounded_honestly(critical):
    """Half of the stuck-at faults change nothing, so the share is 0 or 1/2."""
    net = Net((300, 900))
    net.critical[:] = critical
    truth, missed = critical / 2, 0
    for seed in range(20):
        unit = net.run(margin=0.005, confidence=0.95, levels=("network",), seed=seed).units[0]
        missed += not unit.low <= truth <= unit.high
        assert unit.high > unit.low
        # No fewer than the rule of three: 2 e of the stuck-at faults are 4 e of the flips.
        assert unit.injections > -np.log(0.025) / (4 * 0.005) * 0.9
    assert stats.binomtest(missed, 20, 0.05, alternative="greater").pvalue > 1e-2


def test_what_is_known_beforehand_is_not_injected():
    def split(space, leaves):
        plain = strata.by_distance(space, leaves)

        def with_known(site, bit):
            safe = strata.distances(leaves[site], bit) < NET.thresholds[site]
            return np.where(safe, np.uint8(strata.KNOWN), plain(site, bit))

        return with_known

    result = NET.run(split, levels=("network",), margin=0.01)
    assert result.injections < NET.run(levels=("network",), margin=0.01).injections / 2
    assert result.units[0].total == result.units[0].injections
    assert result.units[0].low <= NET.truths(("network",))[0] <= result.units[0].high


def test_chromy_is_neyman_for_one_unit():
    weight, p = np.array([0.7, 0.2, 0.1]), np.array([0.01, 0.5, 0.2])
    spread = weight**2 * p * (1 - p) / 0.01**2
    n = adaptive.chromy(spread[None], np.zeros(3))
    deviation = weight * np.sqrt(p * (1 - p))
    np.testing.assert_allclose(n, deviation * deviation.sum() / 0.01**2)
    assert adaptive.chromy(spread[None], np.full(3, 400.0)).min() >= 400


def test_chromy_is_near_the_least_sample_of_many_units():
    rng = np.random.default_rng(0)
    spread = rng.random((4, 10)) * (rng.random((4, 10)) < 0.6) * 100
    n = adaptive.chromy(spread, np.full(10, 1e-3), turns=300)
    assert (spread / n).sum(axis=1).max() <= 1 + 1e-6
    best = optimize.minimize(
        lambda x: np.exp(x).sum(),
        np.log(n),
        constraints={"type": "ineq", "fun": lambda x: 1 - (spread / np.exp(x)).sum(axis=1)},
        method="SLSQP",
    )
    assert n.sum() < 1.05 * best.fun


def test_strata_are_picked_by_chance_and_never_beyond_their_end():
    stream = np.random.default_rng(1)
    picked = adaptive.pick(np.array([1.0, 0.0, 3.0]), np.array([10**6] * 3), 4000, stream)
    counts = np.bincount(picked, minlength=3)
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2]], [1000, 3000]).pvalue > 1e-3
    few = adaptive.pick(np.array([1.0, 1.0]), np.array([3, 5]), 1000, stream)
    assert np.bincount(few).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": ("neuron",)}, "level 'neuron' is unknown"),
        ({"levels": ()}, "no level is asked for"),
        ({"margin": 2.0}, "error_margin 2.0 is not between"),
        ({"confidence": 0.0}, "confidence 0.0 is not between"),
    ],
)
def test_bad_requests_are_refused_before_a_fault_is_injected(change, message):
    def never(ids):
        raise AssertionError("a fault was injected")

    wanted = {"levels": ("network",), "margin": 0.1, "confidence": 0.9, **change}
    request = Request(wanted["margin"], wanted["confidence"])
    with pytest.raises(InputError, match=message):
        adaptive.adaptive()(NET.space, NET.leaves, request, wanted["levels"], never, 0)
