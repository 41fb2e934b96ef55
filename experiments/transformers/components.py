"""What a transformer is made of, and what samples say of each part.

A component is a group of sites. Its sample is stratified by bit: a simple random sample of the
faults of every bit, over all sites of the component together, drawn for itself. So any union of
(component, bit) has the stratified estimator, and the interval of `estimates.stratified`, which
holds at any sizes and shares; one (component, bit) alone has the exact hypergeometric one.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jfi.campaign.campaign import Plan
from jfi.errors import InputError
from jfi.faults import FaultSpace, Site
from jfi.networks.sites import Network
from jfi.sampling import estimates
from jfi.sampling.sampling import Request, Sample, Stratum

# Regular expressions of the sites' whole names. Each site must be of one of them.
COMPONENTS = {
    "embedding": r"(embedding|tokens)/.*|cls|position",
    "q": r".*/q/.*",
    "k": r".*/k/.*",
    "v": r".*/v/.*",
    "projection": r".*/projection/.*",
    "MLP": r".*/mlp/.*",
    "norms": r"(.*/)?norm\d*/.*",
    "head": r"head/.*",
}


Parts = Mapping[str, Sequence[Site]]  # the sites of each component


class Counts(NamedTuple):
    """Faults there are, faults injected, those found critical; int64 [C, W] each, by component and
    bit."""

    population: np.ndarray
    injections: np.ndarray
    critical: np.ndarray


class Share(NamedTuple):
    """The critical share of a union of (component, bit), in [0, 1], with its interval."""

    population: int
    injections: int
    critical: int
    estimate: float
    low: float
    high: float


def split(network: Network) -> dict[str, tuple[Site, ...]]:
    """The parameters of each component that has any, in the order of `COMPONENTS`.

    Raises:
      InputError: a parameter of none of them, or of two.
    """
    found: dict[str, list[Site]] = {name: [] for name in COMPONENTS}
    for site in network.parameters:
        own = [name for name, of in COMPONENTS.items() if re.fullmatch(of, site.name)]
        if len(own) != 1:
            raise InputError(
                f"parameter {site.name} is of {' and '.join(own) or 'no component'}; a transformer "
                f"made as nets.transformer is needed, of {', '.join(COMPONENTS)}"
            )
        found[own[0]].append(site)
    return {name: tuple(sites) for name, sites in found.items() if sites}


def fields(dtype: Any) -> dict[str, tuple[int, ...]]:
    """The bits of a word of floating point, from the left: sign, each exponent bit, mantissa."""
    info = jnp.finfo(dtype)
    exponent = range(info.bits - 2, info.nmant - 1, -1)
    return {
        "sign": (info.bits - 1,),
        **{str(bit): (bit,) for bit in exponent},
        "mantissa": tuple(range(info.nmant)),
    }


def by_bit(space: FaultSpace, parts: Parts, sizes: Mapping[int, int], seed: int) -> np.ndarray:
    """Ids int64 [n] of a simple random sample of each bit over all sites of each component.

    Args:
      space: of all the sites.
      sizes: how many of each bit, or all there are.
    """
    number = {site: k for k, site in enumerate(space.sites)}
    found = []
    for rank, sites in enumerate(parts.values()):
        own = FaultSpace(sites, space.polarities)
        there = {bit: own.stratum_size(bit=bit) for bit in own.bits}
        strata = [Stratum(None, bit, n, min(n, sizes[bit]), 0.5) for bit, n in there.items()]
        # A seed of its own: those of one seed are of the same places in components of one size.
        sample = Sample(own, strata, seed * len(parts) + rank)
        faults = own.decode(sample.ids(0, sample.size))
        site = np.array([number[site] for site in sites], np.int32)[faults.site]
        found.append(space.encode(faults._replace(site=site)))
    return np.concatenate(found)


def listed(space: FaultSpace, request: Request, ids: np.ndarray) -> Plan:
    """The plan that injects exactly these faults."""
    faults, population = space.decode(ids), np.zeros_like(space.cells)
    np.add.at(population, (faults.site, faults.bit), 1)
    strata = (Stratum(None, None, ids.size, ids.size, 0.5),)
    return Plan(space, request, strata, population, listed=ids)


def simple(space: FaultSpace, request: Request, n: int, seed: int) -> Plan:
    """A simple random sample of n faults of all sites, or all there are."""
    strata = (Stratum(None, None, space.size, min(n, space.size), 0.5),)
    return Plan(space, request, strata, space.cells, seed)


def counts(summary: Mapping[str, Any], space: FaultSpace, parts: Parts) -> Counts:
    """The counts of a campaign of `by_bit`, from its summary."""
    rows = {site.name: row for row, sites in enumerate(parts.values()) for site in sites}
    component = [rows[site.name] for site in space.sites]
    found = np.zeros((3, len(parts), space.cells.shape[1]), np.int64)
    np.add.at(found[0], component, space.cells)
    for unit in summary["estimates"]:
        if unit["level"] == "layer_bit":
            drawn = unit["injections"], unit["critical"]
            found[1:, rows[unit["site"]], unit["bit"]] += drawn
    return Counts(*found)


def share(of: Counts, rows: Sequence[int], bits: Sequence[int], confidence: float) -> Share:
    """The share of these components and bits together."""
    cells = np.ix_(rows, bits)
    population, injections, critical = (x[cells].ravel() for x in of)
    expected = population * critical / injections
    if population.size == 1:
        low, high = estimates.hypergeometric(critical, injections, population, confidence)
        low, high = float(low[0]), float(high[0])
    else:
        low, high = estimates.stratified(population, injections, critical, confidence)
    sums = (int(x.sum()) for x in (population, injections, critical))
    return Share(*sums, float(expected.sum() / population.sum()), low, high)


def fallen(summary: Mapping[str, Any], sites: Sequence[Site], confidence: float) -> Share | None:
    """What a simple random sample of a whole network says of some of its sites; None where no
    fault fell there. Given how many did, they are a simple random sample of them."""
    names = {site.name for site in sites}
    units = [u for u in summary["estimates"] if u["level"] == "layer" and u["site"] in names]
    population, injections, critical = (
        sum(unit[name] for unit in units) for name in Counts._fields
    )
    if not injections:
        return None
    low, high = estimates.hypergeometric(critical, injections, population, confidence)
    return Share(population, injections, critical, critical / injections, float(low), float(high))
