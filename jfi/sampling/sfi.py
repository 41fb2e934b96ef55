"""Statistical fault injection as published, as methods to compare with: fixed samples, iterative.

Sources: Leveugle et al., DATE 2009, and Ruospo et al., DATE 2023 (samples of a fixed size); Ruospo
et al., "An effective iterative statistical fault injection methodology for deep neural networks",
IEEE Transactions on Computers, 2025 (iterative). Their intervals rest on the normal distribution;
stopping by what was seen is not accounted for. `jfi.sampling.adaptive` has neither limit.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from jfi.faults import FaultSpace
from jfi.sampling import estimates, methods, shuffle
from jfi.sampling.methods import Interval, Method, Oracle, Result, Unit
from jfi.sampling.sampling import (
    SAMPLERS,
    Request,
    Sample,
    Stratum,
    check,
    sample_size,
    strata_cells,
)

INTERVALS = ("normal", "wilson", "clopper_pearson")
PILOT = 100  # faults of each stratum that the iterative method starts with
BATCH = 1 << 18  # faults asked for at a time


def fixed(sampler: str, interval: str = "normal") -> Method:
    """A sampler of `sampling.SAMPLERS` with one of `INTERVALS`, all of its faults in one round."""
    return partial(_fixed, SAMPLERS[sampler], interval)


def _fixed(sampler, kind, space: FaultSpace, leaves, request, levels, oracle, seed) -> Result:
    asked = methods.units(space, levels)
    strata = sampler(space, leaves, request)
    sample = Sample(space, strata, seed)
    counts = np.zeros((2, *space.cells.shape), np.int64)
    for start in range(0, sample.size, BATCH):
        ids = sample.ids(start, min(start + BATCH, sample.size))
        counts += tally(space, ids, oracle(ids))
    return Result(intervals(space, strata, counts, request, asked, kind), (sample.size,))


def tally(space: FaultSpace, ids: np.ndarray, critical: np.ndarray) -> np.ndarray:
    """(injections, those found critical) of each (site, bit), int64 [2, S, W]."""
    faults = space.decode(ids)
    counts = np.zeros((2, *space.cells.shape), np.int64)
    np.add.at(counts[0], (faults.site, faults.bit), 1)
    np.add.at(counts[1], (faults.site, faults.bit), np.asarray(critical, np.int64))
    return counts


def intervals(
    space: FaultSpace,
    strata: Sequence[Stratum],
    counts: np.ndarray,
    request: Request,
    asked: Sequence[Unit],
    kind: str,
) -> tuple[Interval, ...]:
    """The intervals of one of `INTERVALS` of the units asked for.

    Args:
        counts: as of `tally`.
    """
    number, assumed = strata_cells(space.cells.shape, strata)
    found = estimates.estimate(
        [site.name for site in space.sites],
        space.cells,
        *counts,
        number,
        confidence=request.confidence,
        t=request.t,
        assumed_p=assumed,
        levels=list(dict.fromkeys(unit.level for unit in asked)),
    )
    return tuple(
        methods.interval(space, unit, e.injections, e.critical, e.estimate, *_ends(e, kind))
        for unit, e in zip(asked, found, strict=True)
    )


def _ends(e: estimates.Estimate, kind: str) -> tuple[float, float]:
    if not e.injections:
        return 0.0, 1.0
    return {
        "normal": (e.estimate - e.margin, e.estimate + e.margin),
        "wilson": (e.low, e.high),
        "clopper_pearson": (e.cp_low, e.cp_high),
    }[kind]


def iterative(interval: str = "wilson") -> Method:
    """Iterative SFI: samples that grow to the size that the share seen so far asks for.

    What we take the method of Ruospo et al. to be: each stratum begins with a pilot; the
    sample-size formula with the p seen so far in place of 0.5 says how many faults its margin
    needs; the missing ones are drawn; and so on until none is missing. Strata are the finest units
    asked for: the network, its layers, its bits, or bits of layers. p is the centre of Wilson's
    interval, so that a pilot without a critical fault does not end it.
    """
    return partial(_iterative, interval)


def _iterative(
    kind, space: FaultSpace, leaves, request: Request, levels, oracle: Oracle, seed: int
) -> Result:
    check(request)
    asked = methods.units(space, levels)
    strata = _pilots(space, levels)
    keys = shuffle.keys(seed, len(strata))
    done, hits = np.zeros(len(strata), np.int64), np.zeros(len(strata), np.int64)
    counts, rounds = np.zeros((2, *space.cells.shape), np.int64), []
    while any(s.injections > n for s, n in zip(strata, done, strict=True)):
        rounds.append(0)
        for h, stratum in enumerate(strata):
            k = np.arange(done[h], stratum.injections)
            order = shuffle.shuffled(k, stratum.population, keys[h])
            ids = space.stratum_ids(stratum.site, stratum.bit, order)
            critical = np.asarray(oracle(ids), bool)
            counts += tally(space, ids, critical)
            done[h], hits[h] = stratum.injections, hits[h] + critical.sum()
            rounds[-1] += ids.size
        strata = [_grown(s, hits[h], request) for h, s in enumerate(strata)]
    return Result(intervals(space, strata, counts, request, asked, kind), tuple(rounds))


def _pilots(space: FaultSpace, levels: Sequence[str]) -> list[Stratum]:
    sites = range(len(space.sites)) if "layer" in levels else [None]
    bits = [int(b) for b in np.flatnonzero(space.cells.any(axis=0))] if "bit" in levels else [None]
    sized = [(s, b, space.stratum_size(s, b)) for s in sites for b in bits]
    return [Stratum(s, b, size, min(PILOT, size), 0.5) for s, b, size in sized if size]


def _grown(stratum: Stratum, critical: int, request: Request) -> Stratum:
    """The stratum with the size that its share of critical faults asks for."""
    n, t = stratum.injections, request.quantile
    p = (critical + t**2 / 2) / (n + t**2)
    wanted = sample_size(stratum.population, request.error_margin, t, p)
    return stratum._replace(injections=max(n, wanted))
