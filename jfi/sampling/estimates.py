"""Estimates of criticality with their margins and intervals, for any union of cells.

A *cell* is one (site, bit) of the fault space. Every stratum of a sample is a union of cells,
and so is every unit a campaign reports on (network, layer, bit, layer x bit), which makes one
stratified estimator serve all of them. In a unit the faults of a stratum are a simple random
sample of the part of the stratum that lies in the unit, given how many fell there.

Which interval holds, of n faults drawn from a population with the share p critical:

| interval | of | guarantee | p rare | none seen critical |
| --- | --- | --- | --- | --- |
| `normal` (the papers') | one sample | for large n p (1 - p) alone | too narrow | [0, 0]: none |
| `wilson` | one sample | nominal on average over p | nearly | nearly |
| `clopper_pearson` | one sample | at least nominal, any n and p | holds | holds |
| `hypergeometric` | one sample | at least nominal, any N, n and p | holds | holds |
| `Estimate.low`, `cp_low` | strata | none proven; simulated | cp holds | rest on assumed p |
| `stratified` | strata | at least nominal, any sizes and shares | holds | holds, jointly |
| `bernstein.interval` | strata | at least nominal, any outcome in [0, 1] | holds | holds, jointly |

The last row is that of other outcomes than critical or not (`jfi.sampling.estimands`), and stands
in both places of an `Estimate` there. All but the last three rows are for simple random samples
whose size does not follow from what was seen. Where it does, as in a campaign that stops when its
margin is met, only `jfi.sampling.betting` holds.

Sources: Leveugle et al., "Statistical fault injection: quantified error and confidence", DATE
2009 (margin); Wilson 1927; Clopper and Pearson 1934; Korn and Graubard, "Confidence intervals
for proportions with small expected number of positive counts", Survey Methodology 24, 1998
(effective sample size of a stratified sample); Wang, "Exact optimal confidence intervals for
hypergeometric parameters", JASA 110, 2015, section 2 (inverted tests); Hoeffding, "Probability
inequalities for sums of bounded random variables", JASA 58, 1963, theorem 4 (without replacement).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from jfi.errors import InputError
from jfi.sampling import bernstein
from jfi.sampling.bernstein import Sums

LEVELS = ("network", "layer", "bit", "layer_bit")


class Estimate(NamedTuple):
    """The share of critical faults in a unit, or the mean of another outcome in [0, 1].

    ``critical`` counts critical faults, whatever is estimated. Of other outcomes both intervals are
    that of `jfi.sampling.bernstein`, and strata without an injection count as unchanged.
    ``margin`` is the achieved error margin, zero where no or every injection was critical:
    the intervals stay honest there. ``low`` to ``high`` is the Wilson interval, ``cp_low`` to
    ``cp_high`` the Clopper-Pearson interval; both rest on the p assumed of strata where no
    injection was critical, where one is. ``unsampled`` is the share of the unit's population in
    strata without an injection: the estimate counts it as not critical, the upper bounds at its
    assumed p. With no injection at all ``estimate`` and ``margin`` are NaN.
    """

    unit: str
    level: str
    site: str | None
    bit: int | None
    population: int
    injections: int
    critical: int
    estimate: float
    margin: float
    low: float
    high: float
    cp_low: float
    cp_high: float
    unsampled: float


class Cells(NamedTuple):
    """Counts of faults per (site, bit): arrays ``[S, W]``, or ``[cells]`` of one unit."""

    population: np.ndarray
    injections: np.ndarray
    critical: np.ndarray
    stratum: np.ndarray
    assumed_p: np.ndarray


class Strata(NamedTuple):
    """The sampled strata of a unit, float64 ``[H]``; ``weight`` sums to one."""

    weight: np.ndarray
    population: np.ndarray
    injections: np.ndarray
    critical: np.ndarray
    assumed: np.ndarray

    def cap(self, p: np.ndarray) -> np.ndarray:
        """``p [H]``, at most what is assumed of strata where no injection was critical."""
        return np.where(self.critical == 0, np.minimum(p, self.assumed), p)

    @property
    def p(self) -> np.ndarray:
        """The share of critical injections, ``[H]``."""
        return self.critical / self.injections

    @property
    def point(self) -> float:
        """The weighted mean of p, without a rounding where every fault was injected."""
        expected = self.population * self.critical / self.injections
        return float(expected.sum() / self.population.sum())

    @property
    def correction(self) -> np.ndarray:
        """Finite-population correction of the variance: 1 for one of many, 0 for all."""
        return (self.population - self.injections) / np.maximum(self.population - 1, 1)


def estimate(
    site_names: Sequence[str],
    population: np.ndarray,
    injections: np.ndarray,
    critical: np.ndarray,
    stratum: np.ndarray,
    *,
    confidence: float,
    t: float | None = None,
    assumed_p: np.ndarray | float | None = None,
    levels: Sequence[str] = LEVELS,
    outcomes: Sums | None = None,
) -> list[Estimate]:
    """Estimates of every unit of ``levels`` that has a population, in the order of ``levels``.

    Arrays are integer ``[S, W]`` (S sites, W bits of the widest): the population, the injections
    and those found critical of each cell, and the number of the stratum it belongs to.
    ``t`` replaces the normal quantile of ``confidence`` in the margin (the papers use 2.58 for
    99%). ``assumed_p`` (a number or ``[S, W]``, 1 by default: nothing is assumed) is the most that
    the upper bounds of a unit of several strata count a stratum as in which no injection was
    critical; a sampler that plans on a small p (data-aware) rests on it.
    ``outcomes``, sums [P, S, W], makes them estimates of the mean outcome. Raises InputError for
    impossible counts, confidence or levels.
    """
    cells = Cells(
        *(np.asarray(x) for x in (population, injections, critical, stratum)),
        np.broadcast_to(1.0 if assumed_p is None else assumed_p, np.shape(population)),
    )
    _check(site_names, cells, confidence, levels)
    quantile = normal_quantile(confidence) if t is None else t

    def of_unit(chosen: tuple) -> tuple:
        own = Cells(*(x[chosen] for x in cells))
        if outcomes is None:
            return _of_unit(own, confidence, quantile)
        sums = (x[:, *chosen].reshape(len(x), -1) for x in outcomes[:3])
        return _of_outcomes(own, Sums(*sums, outcomes.unchanged), confidence, quantile)

    return [
        Estimate(*label, *of_unit(chosen))
        for label, chosen in _units(site_names, cells.population, levels)
    ]


def normal_quantile(confidence: float) -> float:
    """The two-sided standard normal quantile: 1.96 for 95%, 2.576 for 99%."""
    return float(special.ndtri(0.5 + confidence / 2))


def wilson(k, n, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson score interval of ``k`` of ``n`` (real-valued arrays, n > 0)."""
    n = np.asarray(n, float)
    p, v = k / n, normal_quantile(confidence) ** 2 / n
    half = np.sqrt(v * (p * (1 - p) + v / 4))
    return (
        np.maximum((p + v / 2 - half) / (1 + v), 0),
        np.minimum((p + v / 2 + half) / (1 + v), 1),
    )


def clopper_pearson(k, n, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Clopper-Pearson ("exact") interval of ``k`` of ``n`` (real-valued arrays, n > 0)."""
    k, n = np.broadcast_arrays(np.asarray(k, float), np.asarray(n, float))
    return 1 - _beta_upper(n - k, n, confidence), _beta_upper(k, n, confidence)


def normal(k, n, population, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The papers' interval of ``k`` of ``n``: normal, with finite-population correction.

    k / n -+ t sqrt(p (1 - p) / n (N - n) / (N - 1)), cut to [0, 1] (Leveugle 2009).
    """
    n, population = np.asarray(n, float), np.asarray(population, float)
    p = k / n
    correction = (population - n) / np.maximum(population - 1, 1)
    half = normal_quantile(confidence) * np.sqrt(p * (1 - p) / n * correction)
    return np.maximum(p - half, 0), np.minimum(p + half, 1)


def hypergeometric(k, n, population, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The exact interval of the share in a finite population of which ``n`` were drawn.

    Integer arrays that broadcast, 0 <= k <= n <= population. Every number K of critical faults
    stays that neither tail of the hypergeometric distribution excludes at (1 - confidence) / 2:
    coverage is at least the confidence for every K. By bisection on K, so a population of 10^8
    costs 27 steps.
    """
    k, n, population = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in (k, n, population)))
    high = _most_critical(k, n, population, (1 - confidence) / 2)
    low = population - _most_critical(n - k, n, population, (1 - confidence) / 2)
    return low / population, high / population


def _most_critical(k, n, population, alpha: float) -> np.ndarray:
    """The largest K for which k or fewer critical of n are more likely than alpha."""
    low, high = np.array(k), population - (n - k)  # K = k leaves no doubt: k is the most there is
    while (low < high).any():
        middle = (low + high + 1) // 2
        likely = stats.hypergeom.cdf(k, population, middle, n) > alpha
        low, high = np.where(likely, middle, low), np.where(likely, high, middle - 1)
    return low


def stratified(population, injections, critical, confidence: float) -> tuple[float, float]:
    """An interval of the share in a union of strata that holds for any sizes and shares.

    Integer arrays [H] of the strata, simple random samples of sizes fixed beforehand. Strata
    without a critical fault are bounded together, not one by one; one without an injection counts
    from 0 to 1. Chernoff's bound of the estimate's tail, at those shares of the strata, among all
    with the same sum, that make the tail heaviest: at least ``confidence``, two-sided. Where
    H = 1 and nothing or everything is critical it is Clopper and Pearson's.

    For s, v > 0 and T the estimate, c = W / n the weight of one injection,
    log P(T <= t) <= s t + sum_h max_p [n log(1 - p (1 - e^(-s c))) + v W p] - v m
    at the true share m (Hoeffding's theorem 4 and weak duality), so the right side must be above
    log(alpha / 2). All (s, v) hold at once: they bound tails of one number T.
    """
    counts = (np.asarray(x, float) for x in (population, injections, critical))
    population, injections, critical = counts
    done = population == injections
    known = critical[done].sum() / population.sum()
    weight = population / population.sum()
    n, w = injections[~done], weight[~done]
    k = critical[~done]
    if not w.size:
        return float(known), float(known)
    high = known + (_chernoff(w, n, k, confidence) if (k < n).any() else w.sum())
    low = known + (w.sum() - _chernoff(w, n, n - k, confidence) if k.any() else 0)
    return float(max(low, known)), float(min(high, 1.0))


def _chernoff(weight, n, k, confidence: float) -> float:
    """Upper bound of sum(weight p) given k of n in each stratum."""
    drawn = n > 0
    bare = float(weight[~drawn].sum())
    weight, n, k = weight[drawn], n[drawn], k[drawn]
    if not weight.size:
        return bare
    one = weight / n
    point, enough = float((one * k).sum()), np.log(2 / (1 - confidence))

    def bound(logs: np.ndarray) -> float:
        s, v = np.exp(logs)
        a = -np.expm1(-s * one)
        p = np.clip(1 / a - 1 / (v * one), 0, 1)
        heaviest = n * np.log1p(-np.minimum(p * a, 1 - 1e-15)) + v * weight * p
        return (s * point + heaviest.sum() + enough) / v

    # The best (s, v) of one stratum, over a range of s. Any pair is a bound that holds.
    share = point / weight.sum()
    tilts = np.geomspace(0.01, 100, 41) / one.mean()
    a = -np.expm1(-tilts * one.mean())
    starts = np.log(np.stack([tilts, a / (1 - share * a + 1e-12) / one.mean()], axis=1))
    found = optimize.minimize(bound, min(starts, key=bound), method="Nelder-Mead")
    return bare + min(float(found.fun), float(weight.sum()))


def finite_clopper_pearson(k, n, population, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Clopper-Pearson interval of the share in a finite population of which ``n`` were drawn.

    Only the faults not drawn are unknown. Their share follows, in the way that Clopper-Pearson's
    bound is a quantile of Beta(k+1, n-k), a beta-binomial; here the beta of its mean and
    variance. The bounds are whole faults. Equals ``clopper_pearson`` for population >> n, and
    the point k/n for n = population.
    """
    k, n, population = np.broadcast_arrays(*(np.asarray(x, float) for x in (k, n, population)))
    return (
        1 - _finite_upper(n - k, n, population, confidence),
        _finite_upper(k, n, population, confidence),
    )


def _beta_upper(k: np.ndarray, n: np.ndarray, confidence: float) -> np.ndarray:
    bound = special.betaincinv(k + 1, np.maximum(n - k, 1e-300), 0.5 + confidence / 2)
    return np.where(k >= n, 1.0, bound)


def _finite_upper(k, n, population, confidence: float) -> np.ndarray:
    rest = population - n
    mean = (k + 1) / (n + 1)
    # The beta of the beta-binomial's variance; with one fault left it is a single draw, s = 0.
    s = np.maximum((n + 2) * rest / (population + 1) - 1, 1e-6)
    share = special.betaincinv(mean * s, np.maximum((1 - mean) * s, 1e-300), 0.5 + confidence / 2)
    share = np.where(k >= n, 1.0, share)
    return np.minimum(k + _ceil(rest * share), population) / population


def _units(
    names: Sequence[str], population: np.ndarray, levels: Sequence[str]
) -> Iterator[tuple[tuple, tuple]]:
    """((unit, level, site, bit), index of its cells) of every unit with a population."""
    all_sites, all_bits = slice(None), slice(None)
    sites = [s for s, row in enumerate(population) if row.any()]
    bits = [b for b, column in enumerate(population.T) if column.any()]
    of_level = {
        "network": lambda: [(("network", "network", None, None), (all_sites, all_bits))],
        "layer": lambda: [((names[s], "layer", names[s], None), (s, all_bits)) for s in sites],
        "bit": lambda: [((f"bit {b}", "bit", None, b), (all_sites, b)) for b in bits],
        "layer_bit": lambda: [
            ((f"{names[s]} bit {b}", "layer_bit", names[s], b), (s, slice(b, b + 1)))
            for s in sites
            for b in bits
            if population[s, b]
        ],
    }
    for level in levels:
        yield from of_level[level]()


def _of_unit(cells: Cells, confidence: float, quantile: float) -> tuple:
    """The fields of an Estimate from ``population`` on, of the cells of one unit."""
    strata, unsampled, assumed = _strata(Cells(*(np.ravel(x) for x in cells)))
    counts = tuple(int(x.sum()) for x in (cells.population, cells.injections, cells.critical))
    if not strata.weight.size:
        return (*counts, np.nan, np.nan, 0.0, 1.0, 0.0, 1.0, 1.0)
    total = counts[0]
    sampled = 1 - unsampled
    bounds = []
    for low, high in (_wilson(strata, confidence), _clopper_pearson(strata, confidence)):
        # Criticality is a whole number of faults: the interval goes out to the next one.
        low = _floor(sampled * low * total) / total
        high = _ceil(sampled * high * total) / total + assumed
        bounds += [float(max(low, 0.0)), float(min(high, 1.0))]
    margin = sampled * quantile * np.sqrt(_variance(strata, strata.p))
    return (*counts, sampled * strata.point, float(margin), *bounds, unsampled)


def _of_outcomes(cells: Cells, sums: Sums, confidence: float, quantile: float) -> tuple:
    """As `_of_unit`, of the outcomes whose sums [P, cells] are given."""
    _, inverse = np.unique(np.ravel(cells.stratum), return_inverse=True)
    population, assumed = np.ravel(cells.population), np.ravel(cells.assumed_p)
    size = np.bincount(inverse, population)
    share = np.bincount(inverse, population * assumed) / np.maximum(size, 1)
    sums = Sums(
        *(np.stack([np.bincount(inverse, x, size.size) for x in own]) for own in sums[:3]),
        sums.unchanged,
    )
    n, total, squares = (x.sum(axis=0) for x in sums[:3])
    counts = tuple(int(x.sum()) for x in (cells.population, cells.injections, cells.critical))
    if not n.any():
        return (*counts, np.nan, np.nan, 0.0, 1.0, 0.0, 1.0, 1.0)
    drawn = n > 0
    mean = np.divide(total, n, out=np.full(n.shape, sums.unchanged), where=drawn)
    point = (np.where(drawn, size * total / np.maximum(n, 1), size * mean)).sum() / size.sum()
    # p (1 - p) of outcomes 0 and 1, whose squares are themselves.
    spread = mean * (1 - mean) - np.divide(total - squares, n, out=np.zeros(n.shape), where=drawn)
    correction = (size - n) / np.maximum(size - 1, 1) / np.maximum(n, 1)
    terms = np.where(drawn, (size / size.sum()) ** 2 * np.maximum(spread, 0) * correction, 0)
    # A unit of one stratum is what was seen of it: nothing need be assumed.
    low, high = bernstein.interval(size, sums, confidence, share if size.size > 1 else 1.0)
    low, high = min(low, point), max(high, point)
    margin = quantile * np.sqrt(terms.sum())
    unsampled = float(size[~drawn].sum() / size.sum())
    return (*counts, float(point), float(margin), low, high, low, high, unsampled)


def _strata(cells: Cells) -> tuple[Strata, float, float]:
    """The sampled strata; the share of the unit in the others, and that share times assumed p."""
    numbers, inverse = np.unique(cells.stratum, return_inverse=True)
    sums = [np.bincount(inverse, x, numbers.size) for x in cells[:3]]
    expected = np.bincount(inverse, cells.population * cells.assumed_p, numbers.size)
    drawn = sums[1] > 0
    population, injections, critical = (x[drawn] for x in sums)
    total = sums[0].sum()
    weight = population / max(population.sum(), 1)
    unsampled = float(sums[0][~drawn].sum() / total)
    assumed = float(expected[~drawn].sum() / total)
    p = expected[drawn] / np.maximum(population, 1)
    return Strata(weight, population, injections, critical, p), unsampled, assumed


def _variance(strata: Strata, p: np.ndarray) -> float:
    terms = strata.weight**2 * p * (1 - p) / strata.injections * strata.correction
    return float(terms.sum())


def _effective_injections(strata: Strata) -> float:
    """The simple random sample of equal variance (Korn and Graubard 1998, section 3).

    Each stratum's p is drawn towards the unit's by one injection, and that one towards 1/2, so
    that strata without a critical fault still have a variance, and many of them not too much.
    One stratum gives n (N-1) / (N-n); infinite when every fault was injected.
    """
    k, n, weight = strata.critical, strata.injections, strata.weight
    prior = np.sum(weight * strata.cap((k + 0.5) / (n + 1)))
    p = strata.cap((k + prior) / (n + 1))
    mean, variance = np.sum(weight * p), _variance(strata, p)
    return float(mean * (1 - mean) / variance) if variance > 0 else np.inf


def _wilson(strata: Strata, confidence: float) -> tuple[float, float]:
    open_strata = Strata(*(x[strata.correction > 0] for x in strata))
    n = open_strata.injections / open_strata.correction
    alone = wilson(open_strata.p * n, n, confidence)
    return _combined(wilson, strata, open_strata, alone, confidence)


def _clopper_pearson(strata: Strata, confidence: float) -> tuple[float, float]:
    open_strata = Strata(*(x[strata.correction > 0] for x in strata))
    k, n, population = open_strata.critical, open_strata.injections, open_strata.population
    alone = finite_clopper_pearson(k, n, population, confidence)
    return _combined(clopper_pearson, strata, open_strata, alone, confidence)


def _combined(interval, strata, open_strata, alone, confidence) -> tuple[float, float]:
    """The interval at the effective sample size, no narrower than any one stratum leaves open.

    The effective size alone is too hopeful where a lightly sampled stratum holds most of the
    weight and others most of the critical faults (simulated coverage 94% instead of 99%).
    """
    point = strata.point
    n = _effective_injections(strata)
    if np.isinf(n):
        return point, point
    low, high = interval(point * n, n, confidence)
    below = open_strata.weight * (open_strata.p - alone[0])
    above = open_strata.weight * (open_strata.cap(alone[1]) - open_strata.p)
    return min(float(low), point - below.max()), max(float(high), point + above.max())


# Whole numbers, forgiving the rounding of shares times populations.
def _floor(x):
    return np.floor(x + 1e-6)


def _ceil(x):
    return np.ceil(x - 1e-6)


def _check(names: Sequence[str], cells: Cells, confidence: float, levels: Sequence[str]) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it must lie between 0 and 1, as 0.99")
    for level in levels:
        if level not in LEVELS:
            raise InputError(f"level {level!r} is unknown; choose from {', '.join(LEVELS)}")
    for field, x in zip(Cells._fields, cells, strict=True):
        if x.ndim != 2 or x.shape != cells.population.shape or x.shape[0] != len(names):
            shape = (len(names), *cells.population.shape[1:])
            raise InputError(f"{field} has shape {x.shape}; it must be [sites, bits] {shape}")
    ordered = (cells.critical >= 0) & (cells.critical <= cells.injections)
    bad = np.argwhere(~(ordered & (cells.injections <= cells.population)))
    if bad.size:
        s, b = (int(i) for i in bad[0])
        counts = tuple(int(x[s, b]) for x in (cells.critical, cells.injections, cells.population))
        raise InputError(
            f"{names[s]} bit {b} has critical, injections, population = {counts}; "
            "they must not be negative and must not decrease"
        )
