"""Which faults to inject, so that the estimate has the error margin asked for.

A sampler is a pure function `(space, leaves, request) -> strata`: it splits a fault space into
strata and says how many faults to draw from each. A `Sample` then draws them: simple random
sampling without replacement within each stratum, the same on any machine for the same seed.

Sources: Leveugle et al., "Statistical fault injection: quantified error and confidence", DATE 2009
(sample size); Ruospo et al., "Assessing convolutional neural networks reliability through
statistical fault injections", DATE 2023 (samplers), called DATE'23 below.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import NamedTuple, Protocol

import numpy as np
from scipy import special

from jfi import bits
from jfi.errors import InputError
from jfi.faults import FaultSpace


class Request(NamedTuple):
    """The precision asked for."""

    error_margin: float = 0.01  # e: half the width of the interval
    confidence: float = 0.99
    t: float | None = None  # normal quantile to use in place of the exact one; DATE'23 has 2.58

    @property
    def quantile(self) -> float:
        """t of the sample-size formula: two-sided normal quantile of the confidence."""
        return float(special.ndtri((1 + self.confidence) / 2)) if self.t is None else self.t


def check(request: Request) -> Request:
    """`request` as it is.

    Raises:
        InputError: error margin or confidence outside (0, 1), or t not positive and finite.
    """
    for name in ("error_margin", "confidence"):
        value = getattr(request, name)
        if not isinstance(value, Real) or not 0 < value < 1:
            raise InputError(f"{name} {value} is not between 0 and 1, both excluded")
    if request.t is not None and not 0 < request.t < math.inf:
        raise InputError(f"t {request.t} is not a positive number, such as 2.58 for 99%")
    return request


def sample_size(population: int, error_margin: float, t: float, p: float = 0.5) -> int:
    """Faults to draw from a population, to nearest (DATE'23, equation 1).

    Args:
        population: N.
        error_margin: e, wanted half-width of the interval of the failure probability.
        t: normal quantile of the confidence.
        p: failure probability expected; 0.5 is the safest.

    Returns:
        n = N / (1 + e^2 (N - 1) / (t^2 p (1 - p))), in [0, N]; 0 where p is 0 or 1.
    """
    spread = t**2 * p * (1 - p)
    if population == 0 or spread == 0:
        return 0
    size = population / (1 + error_margin**2 * (population - 1) / spread)
    return min(population, math.floor(size + 0.5))


class Stratum(NamedTuple):
    """A part of the fault space, and how many faults to draw from it."""

    site: int | None  # None: every site
    bit: int | None  # None: every bit
    population: int
    injections: int
    p: float  # failure probability its size was planned with


def strata_cells(
    shape: tuple[int, int], strata: Sequence[Stratum]
) -> tuple[np.ndarray, np.ndarray]:
    """[S, W] each: the stratum of a (site, bit), and the p assumed of it where none is seen.

    p = 0.5 is no assumption but the safest plan; a smaller one is what the sampler rests on.
    """
    number, assumed = np.zeros(shape, np.int32), np.ones(shape)
    for n, stratum in enumerate(strata):
        where = tuple(slice(None) if at is None else at for at in (stratum.site, stratum.bit))
        number[where] = n
        assumed[where] = stratum.p if stratum.p < 0.5 else 1.0
    return number, assumed


class Sampler(Protocol):
    """Splits a fault space into strata, and sizes the sample of each."""

    def __call__(
        self, space: FaultSpace, leaves: Iterable[np.ndarray], request: Request
    ) -> tuple[Stratum, ...]:
        """`leaves` are the golden values of each site of `space`, in order, if it asks for them."""


def exhaustive(space: FaultSpace, leaves, request: Request) -> tuple[Stratum, ...]:
    """Every fault: one stratum a site."""
    strata = layer_wise(space, leaves, request)
    return tuple(s._replace(injections=s.population) for s in strata)


def network_wise(space: FaultSpace, leaves, request: Request) -> tuple[Stratum, ...]:
    """One sample of the whole network (Leveugle 2009; DATE'23, section IV)."""
    return _strata(space, [(None, None, 0.5)], request)


def layer_wise(space: FaultSpace, leaves, request: Request) -> tuple[Stratum, ...]:
    """A sample of each site (DATE'23, section IV)."""
    return _strata(space, [(site, None, 0.5) for site in range(len(space.sites))], request)


def data_unaware(space: FaultSpace, leaves, request: Request) -> tuple[Stratum, ...]:
    """A sample of each bit of each site, all with p = 0.5 (DATE'23, equation 3)."""
    return _strata(space, [(site, bit, 0.5) for site, bit in _cells(space)], request)


def tukey(distances: np.ndarray, k: float = 1.5) -> np.ndarray:
    """Outliers, bool[W]: above the upper quartile by more than k interquartile ranges of log10.

    Tukey's upper fence, on the orders of magnitude because the distances of a float's bits grow
    geometrically. It finds the exponent's top bit of float formats, and no bit of integers.
    """
    with np.errstate(divide="ignore"):
        magnitude = np.log10(distances)
    finite = magnitude[np.isfinite(magnitude)]
    if finite.size == 0:
        return np.zeros(distances.shape, bool)
    low, high = np.quantile(finite, (0.25, 0.75))
    return magnitude > high + k * (high - low)


def no_outliers(distances: np.ndarray) -> np.ndarray:
    """Outliers, bool[W]: none."""
    return np.zeros(distances.shape, bool)


OUTLIERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"tukey": tukey, "none": no_outliers}


def data_aware(
    space: FaultSpace, leaves: Iterable[np.ndarray], request: Request, *, outliers=tukey
) -> tuple[Stratum, ...]:
    """A sample of each bit of each site, with p from the golden values (DATE'23, section III-B).

    All sites of one dtype share p(bit), computed from their values together. Bits with p = 0 get
    no injection: the method takes them to be harmless.

    Args:
        outliers: as in `data_aware_p`; fix it with functools.partial to get another sampler.

    Raises:
        InputError: leaves that are not of the shapes and dtypes of the sites, or faults of whole
            words (dead, saturated), of which no bit tells how far they move a value.
    """
    leaves = list(leaves)
    _check_leaves(space, leaves)
    if set(space.polarities) & set(bits.WHOLE_WORD):
        raise InputError(
            "data_aware goes by bits, and dead and saturated are faults of whole words: "
            "take another sampler or fault model"
        )
    dtypes = [np.dtype(site.dtype) for site in space.sites]
    p = {
        dtype: data_aware_p(
            [x for x, d in zip(leaves, dtypes, strict=True) if d == dtype], outliers
        )
        for dtype in set(dtypes)
    }
    return _strata(
        space, [(site, bit, float(p[dtypes[site]][bit])) for site, bit in _cells(space)], request
    )


SAMPLERS: dict[str, Sampler] = {
    "exhaustive": exhaustive,
    "network_wise": network_wise,
    "layer_wise": layer_wise,
    "data_unaware": data_unaware,
    "data_aware": data_aware,
}


def data_aware_p(leaves: Sequence[np.ndarray], outliers=tukey) -> np.ndarray:
    """Failure probability float64[W] assumed for each bit, in [0, 0.5] (DATE'23, equation 5).

    The distances of `bit_distances`, min-max normalised to [0, 0.5] over the bits that are not
    outliers; outliers get 0.5. So do all bits where the distances do not tell them apart.

    Args:
        leaves: golden values, of one dtype.
        outliers: rule `distances[W] -> bool[W]`. DATE'23 sets outliers apart without saying which
            they are; ours is `tukey`. Infinite distances are outliers under any rule.
    """
    distances = bit_distances(leaves)
    ordinary = np.isfinite(distances)
    ordinary &= ~outliers(distances)
    p = np.full(distances.shape, 0.5)
    if ordinary.any():
        low, high = distances[ordinary].min(), distances[ordinary].max()
        if high > low:
            p[ordinary] = 0.5 * ((distances[ordinary] - low) / (high - low))
    return p


def bit_distances(leaves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean distance float64[W] that a flip of each bit moves a value (DATE'23, equation 4).

    D_avg = D_01 f_0 + D_10 f_1, where D_01 is the mean |faulty - golden| over the values whose bit
    is 0, D_10 over those whose bit is 1, and f_0, f_1 their frequencies. Non-finite distances (to
    infinities and NaN) are left out of the means; infinite where none is left.

    Args:
        leaves: golden values, of one dtype.
    """
    values = _pooled(leaves)
    f0, f1 = bit_frequencies([values])
    d01, d10 = np.array([_mean_distances(values, bit) for bit in range(f0.size)]).T
    return np.where(f0 > 0, d01, 0) * f0 + np.where(f1 > 0, d10, 0) * f1


def bit_frequencies(leaves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(f_0, f_1), float64[W] each: the shares of values whose bit is 0 and 1.

    Args:
        leaves: golden values, of one dtype.
    """
    words = bits.to_bits(_pooled(leaves))
    width = bits.width(words.dtype)
    set_bits = [np.count_nonzero(words & words.dtype.type(1 << bit)) for bit in range(width)]
    f1 = np.array(set_bits) / words.size
    return 1 - f1, f1


def _pooled(leaves: Sequence[np.ndarray]) -> np.ndarray:
    dtypes = {np.asarray(leaf).dtype for leaf in leaves}
    if len(dtypes) != 1:
        raise InputError(f"leaves have dtypes {sorted(map(str, dtypes))}: pool those of one dtype")
    values = np.concatenate([np.ravel(leaf) for leaf in leaves])
    if values.size == 0:
        raise InputError("leaves hold no value to take the distances from")
    return values


def _mean_distances(values: np.ndarray, bit: int) -> tuple[float, float]:
    """(D_01, D_10) of one bit."""
    was_set = (bits.to_bits(values) >> bit & 1).astype(bool)
    with np.errstate(invalid="ignore", over="ignore"):
        flipped = bits.faulty(values, bit, bits.FLIP).astype(np.float64)
        distances = np.abs(flipped - values.astype(np.float64))
    return _finite_mean(distances[~was_set]), _finite_mean(distances[was_set])


def _finite_mean(distances: np.ndarray) -> float:
    finite = distances[np.isfinite(distances)]
    if finite.size == 0:
        return math.inf
    # Scaled by a power of two, which is exact: the distances of float64 reach 1e308.
    return float(np.ldexp(np.mean(np.ldexp(finite, -64)), 64))


def _check_leaves(space: FaultSpace, leaves: Sequence[np.ndarray]) -> None:
    if len(leaves) != len(space.sites):
        raise InputError(f"{len(leaves)} leaves for {len(space.sites)} sites: give one a site")
    for site, leaf in zip(space.sites, leaves, strict=True):
        if leaf.shape != tuple(site.shape) or leaf.dtype != site.dtype:
            raise InputError(
                f"leaf of {site.name} is {leaf.dtype}{list(leaf.shape)}, "
                f"not {np.dtype(site.dtype)}{list(site.shape)}"
            )


def _cells(space: FaultSpace) -> list[tuple[int, int]]:
    return [(int(site), int(bit)) for site, bit in np.argwhere(space.cells)]


def _strata(
    space: FaultSpace, parts: Sequence[tuple[int | None, int | None, float]], request: Request
) -> tuple[Stratum, ...]:
    check(request)
    e, t = request.error_margin, request.quantile
    sized = ((site, bit, space.stratum_size(site, bit), p) for site, bit, p in parts)
    return tuple(Stratum(s, b, size, sample_size(size, e, t, p), p) for s, b, size, p in sized)


class Sample:
    """The faults drawn from a fault space, as one sequence of fault ids.

    Strata follow each other in order; inside one, ids ascend. A stratum's faults depend on the
    seed, its site, its bit, its population and its number of injections, and on nothing else.
    Strata that are injected whole take no memory.

    Args:
        space: the fault space.
        strata: from a sampler.
        seed: a non-negative integer.

    Attributes:
        space, strata, seed: as given.
        size: faults in the sample.
    """

    def __init__(self, space: FaultSpace, strata: Sequence[Stratum], seed: int):
        self.space, self.strata, self.seed = space, tuple(strata), seed
        self._drawn = [_draw(stratum, seed) for stratum in self.strata]
        self._ends = np.cumsum([0, *(s.injections for s in self.strata)], dtype=np.int64)
        self.size = int(self._ends[-1])

    def ids(self, lo: int, hi: int) -> np.ndarray:
        """The ids int64[hi - lo] of the faults `lo` to `hi` (left out) of the sample.

        Raises:
            InputError: not 0 <= lo <= hi <= size.
        """
        if not 0 <= lo <= hi <= self.size:
            raise InputError(f"faults {lo} to {hi} are not in the sample: it has {self.size}")
        first = max(int(np.searchsorted(self._ends, lo, side="right")) - 1, 0)
        last = int(np.searchsorted(self._ends, hi, side="left"))
        parts = [self._stratum_ids(h, lo, hi) for h in range(first, last)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _stratum_ids(self, h: int, lo: int, hi: int) -> np.ndarray:
        start, end = int(self._ends[h]), int(self._ends[h + 1])
        rows = slice(max(lo, start) - start, min(hi, end) - start)
        drawn = self._drawn[h]
        k = np.arange(rows.start, rows.stop) if drawn is None else drawn[rows]
        return self.space.stratum_ids(self.strata[h].site, self.strata[h].bit, k)


def _draw(stratum: Stratum, seed: int) -> np.ndarray | None:
    """Sorted positions int64[n] in the stratum; None for all of them."""
    if stratum.injections == stratum.population:
        return None
    place = (0 if at is None else at + 1 for at in (stratum.site, stratum.bit))
    return draw_without_replacement(stratum.population, stratum.injections, (seed, *place))


def draw_without_replacement(population: int, n: int, key: tuple[int, ...]) -> np.ndarray:
    """A simple random sample: n distinct integers of [0, population), sorted, int64[n].

    The first n distinct values of a stream of uniform integers; where n is more than half of the
    population, all but the first population - n. The stream comes from the raw output of NumPy's
    Philox, whose stability NumPy guarantees, so the sample depends on the arguments alone, not on
    the machine or NumPy's version.

    Args:
        key: non-negative integers that seed the stream: a seed, then any number below 2^32.

    Raises:
        InputError: n not in [0, population], a population beyond int64, or a negative key.
    """
    if not 0 <= n <= population <= np.iinfo(np.int64).max:
        raise InputError(f"cannot draw {n} of {population} faults without replacement")
    if min(key) < 0:
        raise InputError(f"seed {key[0]} with key {key[1:]} is negative: give integers from 0")
    # As entropy and spawn key, because SeedSequence takes (1,) and (1, 0) as one and the same.
    stream = np.random.Philox(np.random.SeedSequence(key[0], spawn_key=key[1:]))
    if 2 * n > population:
        return np.flatnonzero(~_mark_distinct(stream, population, population - n))
    if _SPARSE * n > population:
        return np.flatnonzero(_mark_distinct(stream, population, n))
    return _collect_distinct(stream, population, n)


# Below one in so many, sorting what was drawn costs less than a table of the population.
_SPARSE = 32


def _mark_distinct(stream: np.random.Philox, population: int, n: int) -> np.ndarray:
    """bool[population], True at the first n distinct values of the stream."""
    marked = np.zeros(population, bool)
    missing = n
    # No more values at a time than are missing: so each distinct one is among the first n.
    while missing:
        marked[_uniform(stream, population, missing)] = True
        missing = n - np.count_nonzero(marked)
    return marked


def _collect_distinct(stream: np.random.Philox, population: int, n: int) -> np.ndarray:
    """The values that `_mark_distinct` marks, sorted, int64[n]."""
    found = np.empty(0, np.int64)
    while found.size < n:
        drawn = np.concatenate([found, _uniform(stream, population, n - found.size)])
        drawn.sort()
        found = drawn[np.diff(drawn, prepend=-1) > 0]
    return found


def _uniform(stream: np.random.Philox, population: int, words: int) -> np.ndarray:
    """Integers uniform in [0, population), int64: the next `words` random words modulo population.

    The words above the last whole multiple of population are left out: they would favour the
    smallest values.
    """
    raw = stream.random_raw(words)
    kept = raw[raw <= np.uint64(2**64 - 2**64 % population - 1)]
    return (kept % np.uint64(population)).astype(np.int64)
