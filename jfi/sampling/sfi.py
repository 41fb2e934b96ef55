"""Statistical fault injection as published, as methods to compare with: fixed samples, iterative.

Sources: Leveugle et al., DATE 2009, and Ruospo et al., DATE 2023 (samples of a fixed size); Ruospo
et al., "An effective iterative statistical fault injection methodology for deep neural networks",
IEEE Transactions on Computers, 2025 (iterative). Their intervals rest on the normal distribution;
stopping by what was seen is not accounted for. `jfi.sampling.adaptive` has neither limit.

Of other outcomes than critical or not there is nothing published: a fixed sample has the interval
of `jfi.sampling.bernstein`, and the iterative one confidence sequences (`jfi.sampling.betting`) of
its strata, which hold whenever it stops.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from jfi.faults import FaultSpace
from jfi.sampling import adaptive, bernstein, betting, estimates, methods, shuffle
from jfi.sampling.bernstein import Sums
from jfi.sampling.betting import Bets, Open
from jfi.sampling.estimands import CRITICAL, Estimand
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
    """A sampler of `sampling.SAMPLERS` with one of `INTERVALS`, all of its faults in one round.

    Of another estimand, `normal` is the estimate and its margin, and any other the interval of
    `jfi.sampling.bernstein`.
    """
    return partial(_fixed, SAMPLERS[sampler], interval)


def _fixed(
    sampler, kind, space: FaultSpace, leaves, request, levels, oracle, seed, estimand=CRITICAL
) -> Result:
    asked = methods.units(space, levels)
    strata = sampler(space, leaves, request)
    sample = Sample(space, strata, seed)
    sums = np.zeros((3, bernstein.PARTS, *space.cells.shape))
    for start in range(0, sample.size, BATCH):
        ids = sample.ids(start, min(start + BATCH, sample.size))
        sums += by_part(space, ids, oracle(ids), bernstein.part(ids, seed))
    sums = Sums(*sums, estimand.unchanged)
    if estimand == CRITICAL:
        counts = np.stack([x.sum(axis=0) for x in sums[:2]]).astype(np.int64)
        found = intervals(space, strata, counts, request, asked, kind)
    else:
        found = of_outcomes(space, strata, sums, request, asked, kind)
    return Result(found, (sample.size,))


def by_part(space: FaultSpace, ids: np.ndarray, outcome: np.ndarray, part) -> np.ndarray:
    """The `Sums` of each (site, bit), float64 [3, P, S, W]."""
    faults, outcome = space.decode(ids), np.asarray(outcome, float)
    shape = bernstein.PARTS, *space.cells.shape
    cell = np.ravel_multi_index((part, faults.site, faults.bit), shape)
    weights = None, outcome, outcome**2
    return np.stack([np.bincount(cell, x, np.prod(shape)).reshape(shape) for x in weights])


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
    return tuple(
        methods.interval(space, unit, e.injections, e.critical, e.estimate, *_ends(e, kind))
        for unit, e in zip(asked, _estimates(space, strata, counts, request, asked), strict=True)
    )


def of_outcomes(
    space: FaultSpace,
    strata: Sequence[Stratum],
    sums: Sums,
    request: Request,
    asked: Sequence[Unit],
    kind: str,
) -> tuple[Interval, ...]:
    """`intervals` of outcomes in [0, 1], from their sums [P, S, W]."""
    counts = np.stack([x.sum(axis=0) for x in (sums.injections, np.zeros_like(sums.total))])
    found = _estimates(space, strata, counts.astype(np.int64), request, asked, sums)
    totals = sums.total.sum(axis=0)
    return tuple(
        methods.interval(
            space, unit, e.injections, of_unit(unit, totals), e.estimate, *_ends(e, kind)
        )
        for unit, e in zip(asked, found, strict=True)
    )


def of_unit(unit: Unit, cells: np.ndarray) -> float:
    """The sum over the cells [S, W] of a unit."""
    return cells[tuple(slice(None) if at is None else at for at in (unit.site, unit.bit))].sum()


def _estimates(space, strata, counts, request, asked, outcomes=None) -> list[estimates.Estimate]:
    number, assumed = strata_cells(space.cells.shape, strata)
    return estimates.estimate(
        [site.name for site in space.sites],
        space.cells,
        *counts,
        number,
        confidence=request.confidence,
        t=request.t,
        assumed_p=assumed,
        levels=list(dict.fromkeys(unit.level for unit in asked)),
        outcomes=outcomes,
    )


def _ends(e: estimates.Estimate, kind: str) -> tuple[float, float]:
    if not e.injections:
        return 0.0, 1.0
    return {
        "normal": (e.estimate - e.margin, e.estimate + e.margin),
        "wilson": (e.low, e.high),
        "clopper_pearson": (e.cp_low, e.cp_high),
        "bernstein": (e.cp_low, e.cp_high),
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
    kind,
    space: FaultSpace,
    leaves,
    request: Request,
    levels,
    oracle: Oracle,
    seed: int,
    estimand: Estimand = CRITICAL,
) -> Result:
    check(request)
    asked = methods.units(space, levels)
    strata = _pilots(space, levels)
    keys = shuffle.keys(seed, len(strata))
    done, hits = np.zeros(len(strata), np.int64), np.zeros(len(strata))
    runs = [_Run(estimand, stratum.population, request.error_margin) for stratum in strata]
    counts, rounds = np.zeros((2, *space.cells.shape), np.int64), []
    while any(s.injections > n for s, n in zip(strata, done, strict=True)):
        rounds.append(0)
        for h, stratum in enumerate(strata):
            k = np.arange(done[h], stratum.injections)
            order = shuffle.shuffled(k, stratum.population, keys[h])
            ids = space.stratum_ids(stratum.site, stratum.bit, order)
            outcome = np.asarray(oracle(ids), float)
            if estimand == CRITICAL:
                counts += tally(space, ids, outcome)
            else:
                runs[h].add(outcome)
            done[h], hits[h] = stratum.injections, hits[h] + outcome.sum()
            rounds[-1] += ids.size
        strata = [_grown(s, hits[h], request) for h, s in enumerate(strata)]
    if estimand == CRITICAL:
        return Result(intervals(space, strata, counts, request, asked, kind), tuple(rounds))
    found = [_together(space, unit, strata, runs, request.confidence) for unit in asked]
    return Result(tuple(found), tuple(rounds))


class _Run:
    """The draws of one stratum, in their order, and the bets on its total."""

    def __init__(self, estimand: Estimand, population: int, margin: float):
        self.estimand, self.population, self.aim = estimand, population, margin * population
        self.bets: Bets = betting.no_bets()
        self.n, self.sums = 0, np.zeros(2)

    def add(self, outcome: np.ndarray) -> None:
        if not outcome.size:
            return
        # As `adaptive` guesses; bets reckon with half a fault at either end.
        strength, doubt = adaptive.STRENGTH, adaptive.DOUBT / (self.n + 1)
        guess, square = (
            ((total + strength * first) / (self.n + strength) + doubt) / (1 + 2 * doubt)
            for total, first in zip(self.sums, adaptive.prior(self.estimand.unchanged), strict=True)
        )
        left = float(self.population - self.n)
        unit = Open(*(np.array([x]) for x in (left, guess, square, 1.0)), float(self.sums[0]))
        only = np.zeros(outcome.size, np.int64)
        self.bets = betting.add(self.bets, unit, only, outcome, (self.aim, self.aim))
        self.n += outcome.size
        self.sums += np.array([outcome.sum(), (outcome**2).sum()])

    def interval(self, confidence: float) -> tuple[float, float]:
        """Of the total, whenever it is asked for."""
        low = float(self.sums[0])
        high = low + self.population - self.n
        return betting.interval(self.bets, low, high, confidence, self.estimand.parts)


def _together(space, unit: Unit, strata, runs: Sequence[_Run], confidence: float) -> Interval:
    """The interval of a unit: the sum of its strata's, which all hold with the confidence."""
    inside = [
        run
        for stratum, run in zip(strata, runs, strict=True)
        if unit.site in (None, stratum.site) and unit.bit in (None, stratum.bit)
    ]
    alone = 1 - (1 - confidence) / len(inside)
    low, high = np.sum([run.interval(alone) for run in inside], axis=0)
    size = sum(run.population for run in inside)
    counts = sum(run.n for run in inside), sum(run.sums[0] for run in inside)
    mean = sum(run.population * run.sums[0] / run.n for run in inside) / size
    return methods.interval(
        space, unit, *counts, np.clip(mean, low / size, high / size), low / size, high / size
    )


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
