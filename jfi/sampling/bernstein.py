"""An interval of the mean of a bounded outcome in a union of strata, from samples of fixed sizes.

Outcomes x are in [0, 1]; n of the N faults of a stratum are a simple random sample. A random order
of them is cut into parts, each twice the size of the one before. Of a part of n_j faults, drawn
from R_j that were left and hold the rest of the stratum's total T, S_< of which was seen before,
and for any guess g of its outcomes made before,

    E exp( sum lambda (x - (T - S_<) / R_j) - psi(lambda) (x - g)^2 ) <= 1,
    psi(lambda) = -log(1 - lambda) - lambda,    0 <= lambda < 1,

as exp(lambda y - psi(lambda) y^2) <= 1 + lambda y for y >= -1 (Fan, Grama and Liu, 2015), drawn
with replacement; and without, as a convex function of a sum (Hoeffding, 1963, theorem 4). With
lambda = s w_j and sum_j w_j n_j / R_j = 1 the logarithm is linear in T, whatever the strata's
shares are: so the product over parts and strata is a test of the total of all of them, with an
error that follows the variances that were seen (an empirical Bernstein bound). The mean of such
tests over some s, fixed beforehand, is one too. By Markov's inequality a total at which it is above
2 / alpha is excluded, and so on the other side: at least the confidence, for any sizes and
outcomes. w_j as 1 / R_j is the finite-population correction; a stratum injected whole is known.

A stratum for which the sampler assumes that at most a share p of its faults changes anything
(data-aware) has a variance of p at most, and Bennett's bound of that in place of what was seen
(Hoeffding's theorem 4 for the faults drawn or for those left, whichever are fewer: the error is
the same). Where n p is small, and so is p itself, no draw is expected to say more than p does, and
the stratum counts from none changed to p changed; so does one without an injection, from 0 to 1
where nothing is assumed, p = 1. **Where the assumption is wrong, so may be the interval.** What was
seen takes the place of p where it is more, and a light stratum is free of its p once anything is
seen in it.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B
86, 2024, theorem 2 and section 5 (empirical Bernstein, without replacement); Fan, Grama and Liu,
"Exponential inequalities for martingales with applications", EJP 20, 2015; Bennett, JASA 57, 1962;
Hoeffding, JASA 58, 1963.
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from jfi.sampling.shuffle import mix

PARTS = 7  # the first is one in 64 of the sample
MOST = 0.9  # the largest lambda
LIGHT = 0.1  # changed faults that are expected in the sample of a stratum that p alone bounds


class Sums(NamedTuple):
    """Sums over the injected faults of each random part: float64 [P, ...], cells or strata behind.

    injections: how many. total, squares: of their outcomes x and of x^2.
    unchanged: the outcome of a fault that changes nothing: the first guess.
    """

    injections: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    unchanged: float = 0.0


def part(ids: np.ndarray, seed: int) -> np.ndarray:
    """The random part int64 [F] of faults, 0 to `PARTS` - 1, each twice as likely as before."""
    key = np.random.SeedSequence(seed, spawn_key=(PARTS,)).generate_state(1, np.uint64)
    draw = mix(np.asarray(ids).astype(np.uint64) ^ key) >> np.uint64(64 - PARTS + 1)
    # The highest bit that is set, 0 of none.
    return np.frexp(draw.astype(np.float64))[1].astype(np.int64)


def interval(
    population: np.ndarray, sums: Sums, confidence: float, assumed: np.ndarray | float = 1.0
) -> tuple[float, float]:
    """The interval of the mean in a union of H strata.

    Args:
        population: N, int64 [H].
        sums: [P, H].
        assumed: at most this share of a stratum's faults changes anything; 1 assumes nothing.
    """
    size = np.asarray(population, float)
    assumed = np.broadcast_to(np.asarray(assumed, float), size.shape)
    n, total = sums.injections.sum(axis=0), sums.total.sum(axis=0)
    done = (n == size) & (size > 0)
    changed = sums.squares.sum(axis=0) - sums.unchanged * (2 * total - n * sums.unchanged) > 1e-9
    light = (assumed < 1) & (n * assumed <= LIGHT) & ~done
    assumed = np.where(light & changed, 1.0, assumed)
    bare = ((n == 0) | (light & ~changed)) & ~done
    at = ~(bare | done)
    low = high = float(total[done].sum())
    likely = (1 - assumed[bare]) * sums.unchanged * size[bare]
    low, high = low + likely.sum(), high + (likely + assumed[bare] * size[bare]).sum()
    if at.any():
        own = Sums(*(x[:, at] for x in sums[:3]), sums.unchanged)
        middle, half = _tails(size[at], own, assumed[at], np.log(2 / (1 - confidence)))
        seen, left = total[at].sum(), (size - n)[at].sum()
        low, high = low + max(middle - half, seen), high + min(middle + half, seen + left)
    return float(low / size.sum()), float(high / size.sum())


def _tails(size: np.ndarray, sums: Sums, assumed: np.ndarray, enough: float) -> tuple[float, float]:
    """An estimate of the total of strata, and how far it may be off on either side."""
    rests = assumed < 1
    n, total, squares = (np.where(rests, _last(x), x) for x in sums[:3])
    before, seen = np.cumsum(n, axis=0) - n, np.cumsum(total, axis=0) - total
    left = size - before
    weight = 1 / left / (n / left**2).sum(axis=0)
    middle = (weight * (total + n * seen / left)).sum()
    guess = (seen + sums.unchanged) / (before + 1)
    spread = np.maximum(squares - 2 * guess * total + n * guess**2, 0)
    # Of strata with an assumption, that of n faults; the guess there is `unchanged`.
    drawn = n.sum(axis=0)
    fewer = np.where(rests, np.minimum(drawn, size - drawn) / drawn, 1)
    spread = fewer * np.where(rests, np.maximum(spread, n * assumed), spread)
    limit = np.where(rests, np.log1p(enough / (fewer * drawn * assumed + 1e-300)), MOST)
    last = (limit / np.where(n > 0, weight, 0).max(axis=0)).min()
    largest = fewer * n * weight**2 * np.where(rests, np.minimum(assumed, 0.25), 0.25)
    first = min(np.sqrt(2 * enough / max(largest.sum(), 1e-300)), last)
    tilts = np.geomspace(last, first, 1 + int(np.ceil(np.log2(last / first))))
    cost = np.array([_cost(s * weight, spread, rests).sum() for s in tilts])

    def lacks(half: float) -> float:
        return special.logsumexp(tilts * half - cost) - np.log(tilts.size) - enough

    far = float(((enough + np.log(tilts.size) + cost) / tilts).min())
    return float(middle), optimize.brentq(lacks, 0, far) if lacks(far) > 0 else far


def _cost(rate: np.ndarray, spread: np.ndarray, rests: np.ndarray) -> np.ndarray:
    """What a bet at a rate costs for a spread; where there is none, nothing."""
    seen = np.where(rests, 0, np.minimum(rate, MOST))
    bennett = np.expm1(np.minimum(rate, 500)) - rate
    return np.where(spread > 0, np.where(rests, bennett, -np.log1p(-seen) - seen), 0) * spread


def _last(x: np.ndarray) -> np.ndarray:
    """All of it in the last part."""
    return np.concatenate([np.zeros_like(x[1:]), x.sum(axis=0, keepdims=True)])
