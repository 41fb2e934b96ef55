"""How far the estimate of the network narrowed while its campaign ran."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from jfi.report.tally import Seen
from jfi.sampling import estimates
from jfi.sampling.bernstein import Sums
from jfi.sampling.estimates import Estimate
from jfi.sampling.sampling import Stratum, strata_cells


class Step(NamedTuple):
    """Where the estimate stood after so many injections; shares are in [0, 1]."""

    injections: int
    low: float
    high: float
    estimate: float | None = None


def steps(
    manifest: Mapping[str, Any], summary: Mapping[str, Any], found: Sequence[Estimate], seen: Seen
) -> list[Step]:
    """The steps, the end last; empty where the record does not tell or nothing was sampled.

    Of a campaign in rounds they are the intervals that it saw. Of a sample they are those of
    random parts of it, as if it had been stopped there.
    """
    whole = [e for e in found if e.level == "network"]
    if not whole or whole[0].injections == whole[0].population:
        return []
    if "rounds" in summary:
        done = accumulate(summary["rounds"])
        ends = summary.get("narrowed") or ()
        return [Step(n, low, high) for n, (low, high) in zip(done, ends, strict=False)]
    return _of_sample(manifest, found, seen, whole[0])


def _of_sample(
    manifest: Mapping[str, Any], found: Sequence[Estimate], seen: Seen, whole: Estimate
) -> list[Step]:
    population = _population(manifest, found, seen.injected.shape[1:])
    if not population.any() or seen.faults != whole.injections:
        return []
    strata = [Stratum(**stratum) for stratum in manifest.get("strata", ())]
    stratum, assumed = strata_cells(population.shape, strata)
    _, confidence, t = manifest["identity"]["request"]
    injected, revealed = (np.cumsum(x, axis=0) for x in (seen.injected, seen.revealed))
    so_far = [
        estimates.estimate(
            manifest["sites"], population, injected[k], revealed[k], stratum,
            confidence=confidence, t=t, assumed_p=assumed, levels=("network",),
            outcomes=_first(seen.outcomes, k + 1),
        )[0]
        for k in range(len(injected))
    ]  # fmt: skip
    # An estimate that misses strata speaks of another part of the network.
    return [
        Step(e.injections, e.cp_low, e.cp_high, e.estimate)
        for e in so_far
        if e.injections and e.unsampled <= whole.unsampled + 1e-9
    ]


def _first(outcomes: Sums | None, parts: int) -> Sums | None:
    if outcomes is None:
        return None
    return Sums(*(x[:parts] for x in outcomes[:3]), outcomes.unchanged)


def _population(manifest, found: Sequence[Estimate], shape: tuple[int, int]) -> np.ndarray:
    number = {name: k for k, name in enumerate(manifest.get("sites", ()))}
    population = np.zeros(shape, np.int64)
    for e in found:
        if e.level == "layer_bit":
            population[number[e.site], e.bit] = e.population
    return population
